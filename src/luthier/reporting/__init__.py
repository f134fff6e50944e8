"""Plots and model cards. The only package that imports matplotlib. Read `plots.py` first."""
