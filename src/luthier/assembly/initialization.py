"""Where a training starts from: the bare base, or a run that was tuned before. Read `factory.py` and `run_io.py` first.

With `init_from: RUN` in the recipe, that run's adapter is loaded twice: once to train on, and once, frozen, as the
reference of objectives that have one (DPO, PPO). Both stand on one base, in a manager. Without it, the reference is the
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
from luthier.assembly.recipe import Recipe, changed, load_recipe, needs_reference, require_adapter
from luthier.assembly.run_io import rename_weights
from luthier.assembly.settings import fill_left_out
from luthier.core.errors import RecipeError
from luthier.core.protocols import Family, Tuner
from luthier.methods.multi_adapter import AdapterManager
from luthier.training.run_folder import Run

Reference = Callable[[], AbstractContextManager[None]]
POLICY, REFERENCE = "policy", "reference"


def init_policy(made: Recipe, base: Family) -> tuple[Tuner, Reference]:
    """What trains, with the heads of the objective; and what makes the context in which the model is the reference.

    Raises:
        RecipeError: the recipe starts from a run with another base or method than its own.
        RunError: that run, or what it trained, cannot be read.
    """
    policy = attach_method(base, made.method, made.seed)
    if made.init_from is not None:
        _load_method_weights(policy, _read_compatible_weights(made, Run(made.init_from), base), base,
                             whole=not Run(made.init_from).recipe)
    reference = reference_context(made, base, policy)
    return attach_heads(base, policy, made.objective, made.seed, made.method.default_learning_rate), reference


def reference_context(made: Recipe, base: Family, policy: Tuner) -> Reference:
    """What makes the context in which the model is the policy's reference: the bare base, or the run that the recipe
    starts from, put frozen and silent into a manager with the policy. Raises as `begin` does."""
    if made.init_from is None or (policy.gates is None and not needs_reference(made.objective)):
        return policy.disabled  # without a use for a reference, none is made of what cannot share its base
    manager, reference = AdapterManager(base.structure), attach_method(base, made.method, made.seed)
    _load_method_weights(reference, _read_compatible_weights(made, Run(made.init_from), base), base,
                         whole=not Run(made.init_from).recipe)
    manager.add(POLICY, policy)
    manager.add(REFERENCE, reference)
    manager.freeze(REFERENCE)
    manager.set_adapter(POLICY)
    base.router = manager
    return partial(manager.use_adapter, REFERENCE)


def attach_runs(base: Family, runs: Mapping[str, Run]) -> AdapterManager:
    """The adapters of several runs on one base, silent until one is chosen. Heads stay behind: what answers needs none.

    Raises:
        RecipeError: a run holds a whole model, or was made on another base.
        RunError: a run's method cannot share its base.
    """
    manager = AdapterManager(base.structure)
    for name, run in runs.items():
        found = load_recipe(require_adapter(run))
        attached = attach_method(base, found.method, found.seed)
        _load_method_weights(attached, load_adapter_weights(run, base.structure), base, whole=not run.recipe)
        manager.add(name, attached)
    base.router = manager
    return manager


def _read_compatible_weights(made: Recipe, start: Run, base: Family) -> dict[str, Tensor]:
    """What the run trained that the recipe starts from."""
    found = load_recipe(require_adapter(start))
    other = [line for line in changed(found, fill_left_out(made, found)) if line.startswith("method.")]
    if conflict := describe_model_conflict(start, made.model):
        other.append(f"model.name_or_path: {found.model.name_or_path!r}, now {made.model.name_or_path!r}: {conflict}")
    if other:
        raise RecipeError(f"start: the run {str(start.path)!r} was made with another base or method:\n  "
                          + "\n  ".join(other),
                          "leave base and method out of the recipe: they are taken from that run; a base that was "
                          "moved is named by --base-model PATH (in Python: base_model=PATH)")
    return load_adapter_weights(start, base.structure)


def _load_method_weights(attached: Tuner, saved: dict[str, Tensor], base: Family, whole: bool = False) -> None:
    """Take the method's own; heads that the run's objective added stay behind. `whole`: there are none in the file."""
    names = attached.state().keys()
    named = rename_weights(saved, names, base)
    left = {name: tensor for name, tensor in named.items() if name not in names}
    if whole:  # PEFT's folder holds no heads of ours: whatever is left would be passed over
        left = drop_base_weights(left, {}, base.structure.model)
    attached.load({**{name: tensor for name, tensor in named.items() if name in names}, **(left if whole else {})})
