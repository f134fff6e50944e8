"""Tiny random models of several architectures, built from their configs, and a byte-level ChatML tokenizer.

    model = tiny("llama")                     # float64, CPU, eval mode, the same weights for the same seed
    model = tiny("llama", num_hidden_layers=3, dtype=torch.float32)
    tokenizer = tiny_tokenizer()              # 256 bytes + <|endoftext|> <|im_start|> <|im_end|>; no pad token
    save_tiny(tmp_path / "base", "qwen2")     # a whole Transformers folder: weights, config, tokenizer, template

| kind        | what is special about it                                        |
|-------------|-----------------------------------------------------------------|
| gpt2        | learnt positions, one fused qkv `Conv1D`, biases, tied head     |
| llama       | grouped-query attention, rotary positions, untied head          |
| qwen2       | biases on q, k, v; tied head                                    |
| mistral     | sliding window of 8 on every layer                              |
| gemma2      | soft caps on scores and logits, window on every other layer     |
| gemma3      | q and k norms, a window layer with rotary frequencies of its own |
| mixtral     | mixture of 4 experts, 2 used                                    |

Encoders and vision transformers stand in tables of their own, and are built as stacks without heads:

| kind        | what is special about it                                        |
|-------------|-----------------------------------------------------------------|
| bert        | attention to both sides, types of the two texts of a pair       |
| roberta     | positions counted from behind the padding's, no types           |
| distilbert  | names of its own for every part, no types                       |
| vit         | pictures of 8 x 8 in four patches and [CLS]                     |

    tokenizer = pair_tokenizer()              # 256 bytes + [CLS] [SEP] [PAD] [MASK], joins two texts as BERT does
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

BYTES = 256
END_OF_TEXT, IM_START, IM_END = BYTES, BYTES + 1, BYTES + 2
VOCABULARY = 264
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": IM_END, "pad_token_id": None,
}
_LLAMA: dict[str, Any] = {
    **_COMMON, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4,
             "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": IM_END,
             "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "llama": {"model_type": "llama", **_LLAMA},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 8},
    "gemma2": {"model_type": "gemma2", **_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3": {"model_type": "gemma3_text", **_LLAMA, "sliding_window": 8, "query_pre_attn_scalar": 8,
               "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"model_type": "mixtral", **_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2,
                "experts_implementation": "eager"},  # the grouped product of experts knows no float64
}
CLS, SEP, PAD, MASK = range(BYTES, BYTES + 4)
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.15, "pad_token_id": PAD,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_BERT},
    "roberta": {"model_type": "roberta", **_BERT, "pad_token_id": 1, "type_vocab_size": 1},
    "distilbert": {"model_type": "distilbert", "vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2,
                   "n_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.15, "pad_token_id": PAD,
                   "dropout": 0.0, "attention_dropout": 0.0},
}
VISIONS: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "num_channels": 3, "initializer_range": 0.15,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def tiny(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, words: bool = False, **overrides: Any) -> nn.Module:
    """A random model of `kind`; `overrides` are fields of its Transformers config. Leaves the global generator alone.
    `words`: an encoder with its head for masked words; the stack is the same as without."""
    settings = {**(KINDS | ENCODERS | VISIONS)[kind], **overrides}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    built = AutoModelForCausalLM if kind in KINDS else AutoModelForMaskedLM if words else AutoModel
    pooler = {"add_pooling_layer": False} if kind in ("bert", "roberta", "vit") and not words else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = built.from_config(config, dtype=dtype, **pooler)
        with torch.no_grad():
            # Biases start at 0 and norms at 1: a test of code that forgot them could not fail.
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
        if words:
            model.base_model.load_state_dict(tiny(kind, seed, dtype, **overrides).state_dict())
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token whose id is its value; three special tokens follow. Has a ChatML template and no pad token."""
    byte_of = {char: byte for byte, char in _byte_letters().items()}
    backend = Tokenizer(models.BPE(vocab=byte_of, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False)
                                for word in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token=None)
    tokenizer.chat_template = CHATML
    return tokenizer


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; `[CLS] a [SEP]`, and `[CLS] a [SEP] b [SEP]` with types for two texts."""
    words = ("[CLS]", "[SEP]", "[PAD]", "[MASK]")
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in _byte_letters().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def with_sentinels(tokenizer: PreTrainedTokenizerFast, count: int = 5) -> PreTrainedTokenizerFast:
    """The same with T5's <extra_id_0>, <extra_id_1>, ...; five fit into `VOCABULARY`."""
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(count)]})
    return tokenizer


def save_tiny(path: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Path:
    """Write `tiny(...)` and its tokenizer as a Transformers folder at `path`, and give the path back."""
    tiny(kind, seed, dtype, **overrides).save_pretrained(path)
    if kind not in VISIONS:
        (pair_tokenizer() if kind in ENCODERS else tiny_tokenizer()).save_pretrained(path)
    return path


def _byte_letters() -> dict[int, str]:
    """The letter by which byte-level tokenizers write each byte: itself where it prints, else one from 256 up."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printing}
    for byte in range(BYTES):
        letters.setdefault(byte, chr(256 + len(letters) - len(printing)))
    return letters
