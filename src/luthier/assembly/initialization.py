"""Where a training starts from: the bare base, or a run that was tuned before. Read `factory.py` and `run_io.py` first.

With `init_from: RUN` in the recipe, that run's adapter is loaded twice: once to train on, and once, frozen, as the
reference of objectives that have one (DPO, PPO). Both stand on one base, in a bank. Without it, the reference is the
bare base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from luthier.assembly.factory import attach, with_heads
from luthier.assembly.peft_adapters import adapter_weights, without_base_weights
from luthier.assembly.provenance import base_conflict
from luthier.assembly.recipe import Recipe, changed, load_recipe, needs_reference, require_adapter
from luthier.assembly.run_io import renamed
from luthier.assembly.settings import fill_left_out
from luthier.core.errors import RecipeError
from luthier.core.protocols import Attached, Family
from luthier.methods.composite import scopes
from luthier.methods.multi_adapter import Bank
from luthier.training.run_folder import Run

Reference = Callable[[], AbstractContextManager[None]]
POLICY, REFERENCE = "policy", "reference"


def begin(made: Recipe, base: Family) -> tuple[Attached, Reference]:
    """What trains, with the heads of the objective; and what makes the context in which the model is the reference.

    Raises:
        RecipeError: the recipe starts from a run with another base or method than its own.
        RunError: that run, or what it trained, cannot be read.
    """
    policy = attach(base, made.method, made.seed)
    if made.init_from is not None:
        _load(policy, _fitting(made, Run(made.init_from), base), base, whole=not Run(made.init_from).recipe)
    reference = beside(made, base, policy)
    return with_heads(base, policy, made.objective, made.seed, made.method.default_rate), reference


def beside(made: Recipe, base: Family, policy: Attached) -> Reference:
    """What makes the context in which the model is the policy's reference: the bare base, or the run that the recipe
    starts from, put frozen and silent into a bank with the policy. Raises as `begin` does."""
    if made.init_from is None or (scopes(policy) is None and not needs_reference(made.objective)):
        return policy.disabled  # without a use for a reference, none is made of what cannot share its base
    bank, reference = Bank(base.anatomy), attach(base, made.method, made.seed)
    _load(reference, _fitting(made, Run(made.init_from), base), base, whole=not Run(made.init_from).recipe)
    bank.add(POLICY, policy)
    bank.add(REFERENCE, reference)
    bank.frozen(REFERENCE)
    bank.choose(POLICY)
    base.router = bank
    return partial(bank.using, REFERENCE)


def banked(base: Family, runs: Mapping[str, Run]) -> Bank:
    """The adapters of several runs on one base, silent until one is chosen. Heads stay behind: what answers needs none.

    Raises:
        RecipeError: a run holds a whole model, or was made on another base.
        RunError: a run's method cannot share its base.
    """
    bank = Bank(base.anatomy)
    for name, run in runs.items():
        found = load_recipe(require_adapter(run))
        attached = attach(base, found.method, found.seed)
        _load(attached, adapter_weights(run, base.anatomy), base, whole=not run.recipe)
        bank.add(name, attached)
    base.router = bank
    return bank


def _fitting(made: Recipe, start: Run, base: Family) -> dict[str, Tensor]:
    """What the run trained that the recipe starts from."""
    found = load_recipe(require_adapter(start))
    other = [line for line in changed(found, fill_left_out(made, found)) if line.startswith("method.")]
    if conflict := base_conflict(start, made.model):
        other.append(f"model.name_or_path: {found.model.name_or_path!r}, now {made.model.name_or_path!r}: {conflict}")
    if other:
        raise RecipeError(f"start: the run {str(start.path)!r} was made with another base or method:\n  "
                          + "\n  ".join(other),
                          "leave base and method out of the recipe: they are taken from that run; a base that was "
                          "moved is named by --base-model PATH (in Python: base_model=PATH)")
    return adapter_weights(start, base.anatomy)


def _load(attached: Attached, saved: dict[str, Tensor], base: Family, whole: bool = False) -> None:
    """Take the method's own; heads that the run's objective added stay behind. `whole`: there are none in the file."""
    names = attached.state().keys()
    named = renamed(saved, names, base)
    left = {name: tensor for name, tensor in named.items() if name not in names}
    if whole:  # PEFT's folder holds no heads of ours: whatever is left would be passed over
        left = without_base_weights(left, {}, base.anatomy.model)
    attached.load({**{name: tensor for name, tensor in named.items() if name in names}, **(left if whole else {})})
