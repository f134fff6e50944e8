"""What is minimised: pure functions from outputs and target to a sum and its count. Start with `cross_entropy.py`.

A new objective is one file and one line here.
"""

from luthier.objectives.base import ObjectiveConfig
from luthier.objectives.classify import ClassifyConfig
from luthier.objectives.contrastive import ContrastiveConfig
from luthier.objectives.cross_entropy import PretrainConfig, SftConfig
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.kto import KtoConfig
from luthier.objectives.multiple_choice import ChoiceConfig
from luthier.objectives.ppo import PpoConfig
from luthier.objectives.preference import (
    CdpoConfig,
    DpoConfig,
    HingeConfig,
    IpoConfig,
    OrpoConfig,
    RobustConfig,
    SimpoConfig,
)
from luthier.objectives.reward import RewardConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "sft": SftConfig,
    "pretrain": PretrainConfig,
    "classify": ClassifyConfig,
    "contrastive": ContrastiveConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "ipo": IpoConfig,
    "cdpo": CdpoConfig,
    "robust": RobustConfig,
    "hinge": HingeConfig,
    "simpo": SimpoConfig,
    "orpo": OrpoConfig,
    "kto": KtoConfig,
    "choice": ChoiceConfig,
    "ppo": PpoConfig,
    "grpo": GrpoConfig,
}
