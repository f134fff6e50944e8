"""Metrics of generated answers. Read `answer_metrics.py` first, then `generation_eval.py`."""
