"""Virtual tokens (soft prompts and prefixes): their positions, and how attention uses them. Read `layout.py` first,
then `causal.py`."""
