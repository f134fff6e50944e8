"""One file for each side of a comparison, run in a process of its own. Read `watch.py` first: what all of them share."""
