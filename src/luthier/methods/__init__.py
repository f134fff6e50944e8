"""Which parameters train and how they enter the forward pass. One file per method; start with `full.py`, then
`lora.py`.

A new method is one file and one line here; the recipe, the command line and the contract tests read this table.
"""

from typing import Any

from luthier.core.config import Config
from luthier.methods.adalora import AdaLoraConfig
from luthier.methods.adapter import AdapterConfig
from luthier.methods.bitfit import BitfitConfig
from luthier.methods.freeze import FreezeConfig
from luthier.methods.full import FullConfig
from luthier.methods.ia3 import Ia3Config
from luthier.methods.ln_tuning import LnTuningConfig
from luthier.methods.lora import LoraConfig
from luthier.methods.peft import PeftConfig
from luthier.methods.prefix import PrefixConfig
from luthier.methods.prompt import PromptConfig
from luthier.methods.ptuning import PTuningConfig
from luthier.methods.ptuning_v2 import PTuningV2Config

METHODS: dict[str, type[Config]] = {
    "full": FullConfig,
    "freeze": FreezeConfig,
    "lora": LoraConfig,
    "adalora": AdaLoraConfig,
    "adapter": AdapterConfig,
    "bitfit": BitfitConfig,
    "ia3": Ia3Config,
    "ln_tuning": LnTuningConfig,
    "prompt": PromptConfig,
    "ptuning": PTuningConfig,
    "prefix": PrefixConfig,
    "ptuning_v2": PTuningV2Config,
    "peft": PeftConfig,
}

# PEFT types that a method here reads; all others are loaded by the method `peft`.
READERS: dict[str, Any] = {
    "ADALORA": AdaLoraConfig,
    "IA3": Ia3Config,
    "LORA": LoraConfig,
    "PREFIX_TUNING": PrefixConfig,
    "PROMPT_TUNING": PromptConfig,
    "P_TUNING": PTuningConfig,
}
