"""Side by side against peers. Start with `sft.py`; each peer's side is one file in `peers/`."""
