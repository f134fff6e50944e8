"""Virtual tokens: where they are placed and how attention sees them. Read `layout.py` first, then `causal.py`."""
