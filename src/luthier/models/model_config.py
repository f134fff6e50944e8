"""The recipe's section on the base model. Read `core/config.py` first."""

from __future__ import annotations

from typing import Literal

from luthier.core.config import Config
from luthier.models.quantization import QuantizationType
from luthier.models.surgery import SurgeryConfig


class ModelConfig(Config):
    """Which base model is loaded, and in which form.

    Args:
        name_or_path: an alias, a `.gguf` file, a Transformers folder, or a hub id.
        dtype: of the parameters; `auto` is the dtype that the weights are stored in. A float16 base cannot be trained.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether Python code that comes with the base may run.
        device: `auto` selects a GPU if there is one.
        pooling: which state represents a whole text: that of its last token, its first token, or the mean. `auto`: as
            the base was trained (a decoder: last; an encoder: as its folder says, else first).
        quantize: quantize the linear layers to 4 bits (nf4) or 8 bits (int8), for QLoRA and every other method that
            leaves the base frozen.
        surgery: changes to the model before training: new tokens, added layers, dropped layers.
    """

    name_or_path: str = "smollm2"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    pooling: Literal["auto", "last", "first", "mean"] = "auto"
    quantize: QuantizationType = "none"
    surgery: SurgeryConfig | None = None
