"""Writing a run for other tools: what is refused, merging with its check, atomic output. Read `files.py` first."""
