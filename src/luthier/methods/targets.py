"""Which linear layers of a model `target_modules` selects. Read `core/protocols.py` (TargetLinear) first."""

from __future__ import annotations

import re
from collections.abc import Sequence

from luthier.core.errors import RecipeError
from luthier.core.expert_layers import ExpertLinears
from luthier.core.protocols import TargetLinear


def matches_target(linear: TargetLinear, pattern: str) -> bool:
    """Whether `pattern` is the linear layer's role, the end of its path, or a regular expression for its whole path."""
    return (pattern == linear.role or linear.name == pattern or linear.name.endswith("." + pattern)
            or re.fullmatch(pattern, linear.name) is not None)


def select_targets(linears: tuple[TargetLinear, ...], targets: str | tuple[str, ...]) -> list[TargetLinear]:
    """The linear layers that `targets` selects. Raises `RecipeError` for a target that matches nothing."""
    if targets == "all-linear":
        return [linear for linear in linears if linear.role != "router"]
    assert not isinstance(targets, str)
    for target in targets:
        if not any(matches_target(linear, target) for linear in linears):
            roles = sorted({linear.role for linear in linears} | {linear.name.rsplit(".", 1)[-1] for linear in linears})
            raise RecipeError(f"method.target_modules: {target!r} matches no linear layer of this model",
                              f"use all-linear, or any of: {', '.join(roles)}")
    return [linear for linear in linears if any(matches_target(linear, target) for target in targets)]


# ---------------------------------------------------------------- experts


def is_target(target: str, experts: ExpertLinears) -> bool:
    """Whether a target selects these experts: `experts` (all of them), or a suffix such as `experts.down_proj`."""
    return target == "experts" or ("experts." in target and f".{experts.name}".endswith(f".{target}"))


def matches_pattern(pattern: str, experts: ExpertLinears) -> bool:
    """Whether a key of `rank_pattern` selects these experts: as a target, or as an expression for their whole path."""
    return is_target(pattern, experts) or re.fullmatch(pattern, experts.name) is not None


def select_experts(experts: Sequence[ExpertLinears], targets: str | Sequence[str]) -> list[ExpertLinears]:
    """The experts that `targets` selects. `all-linear` excludes them: they are most of a model's weights."""
    return [] if targets == "all-linear" else [e for e in experts if any(is_target(target, e) for target in targets)]
