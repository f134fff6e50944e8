"""Attention over packed rows. Read `packed.py` first."""
