"""Saving a model whose linear layers got biases that its architecture did not have. Read `families/causal.py` first.

Transformers builds a model from its config, so a bias without a config switch would not be loaded. Many architectures
have such switches (`attention_bias`, `mlp_bias`). They are found by trial: the fewest switches are set with which a
model built from the config has all biases of this model.
"""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import torch
from torch import nn

from luthier.core.errors import NotMergeable


def sync_bias_config(model: Any) -> None:
    """Set the config's switches for biases that were added to the model, and add zero biases to the other linear layers
    that these switches affect. Does nothing if no bias was added.

    Raises:
        NotMergeable: the architecture has no switch for an added bias.
    """
    built = _build_parameter_shapes(model.config, model)
    mine = {name for name, _ in model.named_parameters()}
    grown = {name for name in mine - built.keys() if _is_bias(name) and name.removesuffix("bias") + "weight" in built}
    if not grown:
        return
    switches = [key for key, value in model.config.to_dict().items() if value is False and key.endswith("bias")]
    for count in range(1, len(switches) + 1):
        for chosen in combinations(switches, count):
            config = copy.deepcopy(model.config)
            for key in chosen:
                setattr(config, key, True)
            wanted = _build_parameter_shapes(config, model)
            if grown <= wanted.keys():
                for key in chosen:
                    setattr(model.config, key, True)
                _add_zero_biases(model,
                                 {name: shape for name,
                                         shape in wanted.items() if name not in mine and _is_bias(name)})
                return
    first = min(grown)
    raise NotMergeable(f"{first!r} is a bias that {type(model).__name__} cannot keep: its config has no switch for it, "
                       "so the saved model would be loaded without it",
                       "use the adapter with its base, or train only biases that the model has (method.bias_scope)")


def _is_bias(name: str) -> bool:
    return name.endswith(".bias")


def _build_parameter_shapes(config: Any, model: Any) -> dict[str, torch.Size]:
    """The names and shapes of the parameters of a model built from the config, on the meta device."""
    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(config))
    return {name: parameter.shape for name, parameter in bare.named_parameters()}


def _add_zero_biases(model: nn.Module, missing: dict[str, torch.Size]) -> None:
    for name, shape in missing.items():
        module = model.get_submodule(name.removesuffix(".bias"))
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        module.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))
