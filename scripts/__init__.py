"""What ran once and is kept for the record; run from the repository's root."""
