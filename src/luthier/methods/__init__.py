"""Which parameters train and how they enter the forward pass. One file a method; start with `full.py`, then `lora.py`.

A new method is one file and one line here; the recipe, the command line and the contract tests read this table.
"""

from luthier.core.config import Config
from luthier.methods.adapter import AdapterConfig
from luthier.methods.bitfit import BitfitConfig
from luthier.methods.freeze import FreezeConfig, LnConfig
from luthier.methods.full import FullConfig
from luthier.methods.ia3 import Ia3Config
from luthier.methods.lora import LoraConfig
from luthier.methods.peft import PeftConfig

METHODS: dict[str, type[Config]] = {
    "full": FullConfig,
    "freeze": FreezeConfig,
    "lora": LoraConfig,
    "adapter": AdapterConfig,
    "bitfit": BitfitConfig,
    "ia3": Ia3Config,
    "ln": LnConfig,
    "peft": PeftConfig,
}
