"""One file for each kind of architecture. Read `causal.py` first."""
