"""Operations with a backward pass of their own. Read `fused_logprobs.py` first."""
