"""Rows to examples. Read `registry.py` first."""
