"""Estimates and advice before a long run, computed from short measured trials. Read `estimates.py` first."""
