"""The stream "coin": the CoIN benchmark's own files, in any of the layouts in which they are published."""
