"""Training objectives: pure functions from model outputs and labels to a sum and its count.

Start with `cross_entropy.py`. A new objective is one file and one line here.
"""

from collections.abc import Mapping
from typing import Any

from luthier.objectives.base import ObjectiveConfig
from luthier.objectives.classify import ClassifyConfig
from luthier.objectives.contrastive import ContrastiveConfig
from luthier.objectives.cross_entropy import PretrainConfig, SftConfig
from luthier.objectives.grpo import GrpoConfig
from luthier.objectives.kto import KtoConfig
from luthier.objectives.multiple_choice import MultipleChoiceConfig
from luthier.objectives.ppo import PpoConfig
from luthier.objectives.preference import DPO_LOSSES, DpoConfig, OrpoConfig, SimpoConfig
from luthier.objectives.reward import RewardConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "sft": SftConfig,
    "pretrain": PretrainConfig,
    "classify": ClassifyConfig,
    "contrastive": ContrastiveConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "simpo": SimpoConfig,
    "orpo": OrpoConfig,
    "kto": KtoConfig,
    "multiple_choice": MultipleChoiceConfig,
    "ppo": PpoConfig,
    "grpo": GrpoConfig,
}

# Names that a recipe may give in place of `dpo` with a loss_type: `objective: ipo` is {name: dpo, loss_type: ipo}.
SHORT_FORMS: dict[str, dict[str, str]] = {
    loss_type: {"name": "dpo", "loss_type": loss_type} for loss_type in DPO_LOSSES if loss_type != "sigmoid"}


def expand_short_form(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an objective in which a name of `SHORT_FORMS` is written out.

    Raises:
        ValueError: if the settings have another loss_type than the short form.

    Example:
        >>> expand_short_form({"name": "ipo", "beta": 0.2})
        {'name': 'dpo', 'loss_type': 'ipo', 'beta': 0.2}
    """
    name = settings.get("name")
    if not isinstance(name, str) or name not in SHORT_FORMS:
        return dict(settings)
    if settings.get("loss_type", name) != name:
        raise ValueError(f"objective {name} is short for dpo with loss_type: {name}, and loss_type is "
                         f"{settings['loss_type']}: omit one of them")
    return {**SHORT_FORMS[name], **{key: value for key, value in settings.items() if key not in ("name", "loss_type")}}
