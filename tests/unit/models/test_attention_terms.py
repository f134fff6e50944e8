"""A term of attention's scores that is not computed here is an error, never left out."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.core.errors import BaseError
from luthier.models import CausalLM
from tiny import tiny_tokenizer


def test_attention_sinks_are_refused() -> None:
    config = AutoConfig.for_model("gpt_oss", vocab_size=264, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=3,
                                  num_experts_per_tok=2, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(BaseError, match="s_aux"):
        CausalLM(model, tiny_tokenizer())
