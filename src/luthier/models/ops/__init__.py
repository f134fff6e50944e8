"""Operations with a custom backward pass. Read `fused_logprobs.py` first."""
