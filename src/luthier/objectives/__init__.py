"""What is minimised: pure functions from outputs and target to a sum and its count. Start with `tokens.py`.

A new objective is one file and one line here.
"""

from luthier.objectives.tokens import PretrainConfig, SftConfig

OBJECTIVES: dict[str, type[SftConfig] | type[PretrainConfig]] = {
    "sft": SftConfig,
    "pretrain": PretrainConfig,
}
