"""Where a training starts from: the bare base, or a run that was tuned before. Read `factory.py` and `run_io.py` first.

With `start: RUN` in the recipe, that run's adapter is loaded twice: once to train on, and once, frozen, as the
reference of objectives that have one (DPO, PPO). Both stand on one base, in a bank. Without it, the reference is the
bare base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from luthier.assembly.factory import attach_heads, attach_method
from luthier.assembly.peft_adapters import drop_base_weights, load_adapter_weights
from luthier.assembly.provenance import describe_model_conflict
from luthier.assembly.recipe import Recipe, adapted, changed, recorded, referred
from luthier.assembly.run_io import rename_weights
from luthier.assembly.settings import fill_left_out
from luthier.core.errors import RecipeError
from luthier.core.protocols import Family, Tuner
from luthier.methods.composite import scopes
from luthier.methods.multi_adapter import Bank
from luthier.training.run_folder import Run

Reference = Callable[[], AbstractContextManager[None]]
POLICY, REFERENCE = "policy", "reference"


def init_policy(recipe: Recipe, base: Family) -> tuple[Tuner, Reference]:
    """What trains, with the heads of the objective; and what makes the context in which the model is the reference.

    Raises:
        RecipeError: the recipe starts from a run with another base or method than its own.
        RunError: that run, or what it trained, cannot be read.
    """
    policy = attach_method(base, recipe.method, recipe.seed)
    if recipe.start is not None:
        _load_method_weights(policy, _read_compatible_weights(recipe, Run(recipe.start), base), base,
                             whole=not Run(recipe.start).recipe)
    reference = reference_context(recipe, base, policy)
    return attach_heads(base, policy, recipe.objective, recipe.seed, recipe.method.default_rate), reference


def reference_context(recipe: Recipe, base: Family, policy: Tuner) -> Reference:
    """What makes the context in which the model is the policy's reference: the bare base, or the run that the recipe
    starts from, put frozen and silent into a bank with the policy. Raises as `begin` does."""
    if recipe.start is None or (scopes(policy) is None and not referred(recipe.objective)):
        return policy.disabled  # without a use for a reference, none is made of what cannot share its base
    bank, reference = Bank(base.structure), attach_method(base, recipe.method, recipe.seed)
    _load_method_weights(reference, _read_compatible_weights(recipe, Run(recipe.start), base), base,
                         whole=not Run(recipe.start).recipe)
    bank.add(POLICY, policy)
    bank.add(REFERENCE, reference)
    bank.frozen(REFERENCE)
    bank.choose(POLICY)
    base.router = bank
    return partial(bank.using, REFERENCE)


def attach_runs(base: Family, runs: Mapping[str, Run]) -> Bank:
    """The adapters of several runs on one base, silent until one is chosen. Heads stay behind: what answers needs none.

    Raises:
        RecipeError: a run holds a whole model, or was made on another base.
        RunError: a run's method cannot share its base.
    """
    bank = Bank(base.structure)
    for name, run in runs.items():
        recipe = recorded(adapted(run))
        tuner = attach_method(base, recipe.method, recipe.seed)
        _load_method_weights(tuner, load_adapter_weights(run, base.structure), base, whole=not run.recipe)
        bank.add(name, tuner)
    base.router = bank
    return bank


def _read_compatible_weights(recipe: Recipe, start: Run, base: Family) -> dict[str, Tensor]:
    """What the run trained that the recipe starts from."""
    start_recipe = recorded(adapted(start))
    other = [line for line in changed(start_recipe, fill_left_out(recipe, start_recipe)) if line.startswith("method.")]
    if conflict := describe_model_conflict(start, recipe.base):
        other.append(f"base.name: {start_recipe.base.name!r}, now {recipe.base.name!r}: {conflict}")
    if other:
        raise RecipeError(f"start: the run {str(start.path)!r} was made with another base or method:\n  "
                          + "\n  ".join(other),
                          "leave base and method out of the recipe: they are taken from that run; a base that was "
                          "moved is named by --base-model PATH (in Python: base_model=PATH)")
    return load_adapter_weights(start, base.structure)


def _load_method_weights(tuner: Tuner, saved: dict[str, Tensor], base: Family, whole: bool = False) -> None:
    """Take the method's own; heads that the run's objective added stay behind. `whole`: there are none in the file."""
    names = tuner.state().keys()
    named = rename_weights(saved, names, base)
    left = {name: tensor for name, tensor in named.items() if name not in names}
    if whole:  # PEFT's folder holds no heads of ours: whatever is left would be passed over
        left = drop_base_weights(left, {}, base.structure.model)
    tuner.load({**{name: tensor for name, tensor in named.items() if name in names}, **(left if whole else {})})
