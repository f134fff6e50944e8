"""The public functions: one file for each verb. Read `train.py` first; `compare` and `rlhf` alone call other verbs."""
