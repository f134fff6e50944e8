"""The dtype of a base's stored weights, and casting a model to a dtype. Read `loading.py` first."""

from __future__ import annotations

from collections import Counter
from math import prod

import torch
from safetensors import safe_open

from luthier.core.protocols import Family
from luthier.models.model_config import ModelConfig
from luthier.models.model_folder import list_weight_files, prepare_folder

# By safetensors' names.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_stored_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype of most weights in the base's files, read from their headers; float32 if none of them is floating
    point."""
    counts: Counter[torch.dtype] = Counter()
    for shard in list_weight_files(prepare_folder(config)):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                part = file.get_slice(name)
                if part.get_dtype() in DTYPES:
                    counts[DTYPES[part.get_dtype()]] += prod(part.get_shape())
    return counts.most_common(1)[0][0] if counts else torch.float32


def cast_weights(family: Family, dtype: torch.dtype) -> None:
    """Convert the weights of the model and of its heads."""
    family.structure.model.to(dtype)
    if family.heads.task_head is not None:
        family.heads.task_head.to(dtype)
