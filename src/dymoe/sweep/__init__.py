"""Many runs and one table: sweep files, their cells, the jobs that learn them, the Markdown they become."""
