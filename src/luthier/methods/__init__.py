"""Which parameters train and how they enter the forward pass. One file a method; start with `full.py`, then `lora.py`.

A new method is one file and one line here; the recipe, the command line and the contract tests read this table.
"""

from luthier.methods.full import FullConfig
from luthier.methods.lora import LoraConfig

METHODS: dict[str, type[FullConfig] | type[LoraConfig]] = {
    "full": FullConfig,
    "lora": LoraConfig,
}
