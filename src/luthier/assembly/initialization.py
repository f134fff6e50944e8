"""Initializes the policy and the reference model, from the base or from an earlier run. Read `factory.py` and
`run_io.py` first.

With `init_from: RUN` in the recipe, that run's adapter is loaded twice: once to train, and once, frozen, as the
reference of objectives that need one (DPO, PPO). Both share one base. Without it, the reference is the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor

from luthier.assembly.factory import attach_heads, attach_method
from luthier.assembly.peft_adapters import drop_base_weights, load_adapter_weights
from luthier.assembly.provenance import describe_model_conflict
from luthier.assembly.recipe import Recipe, diff_recipes, load_recipe, needs_reference, require_adapter
from luthier.assembly.run_io import rename_weights
from luthier.assembly.settings import fill_left_out
from luthier.core.errors import RecipeError
from luthier.core.protocols import Family, Tuner
from luthier.methods.full import PartOfBase
from luthier.methods.multi_adapter import AdapterManager
from luthier.training.run_folder import Run

Reference = Callable[[], AbstractContextManager[None]]
POLICY, REFERENCE = "policy", "reference"


def init_policy(recipe: Recipe, base: Family) -> tuple[Tuner, Reference]:
    """The trainable method with the objective's heads, and a context manager in which the model is the reference.

    Raises:
        RecipeError: the run to start from has another base or method than the recipe.
        RunError: that run or its weights cannot be read.
    """
    policy = attach_method(base, recipe.method, recipe.seed)
    if recipe.init_from is not None:
        _load_method_weights(policy, _read_compatible_weights(recipe, Run(recipe.init_from), base), base,
                             whole=not Run(recipe.init_from).recipe)
    reference = reference_context(recipe, base, policy)
    return attach_heads(base, policy, recipe.objective, recipe.seed, recipe.method.default_learning_rate), reference


def reference_context(recipe: Recipe, base: Family, policy: Tuner) -> Reference:
    """The context manager in which the model is the reference: the base model, or the run that the recipe starts from,
    loaded frozen and inactive next to the policy. Raises as `init_policy` does."""
    if recipe.init_from is not None and isinstance(policy, PartOfBase):  # trained in place: the start is swapped in
        start = _read_compatible_weights(recipe, Run(recipe.init_from), base)
        own = policy.state().keys()
        return partial(policy.replaced_by, {name: tensor for name, tensor in rename_weights(start, own, base).items()
                                            if name in own})
    if recipe.init_from is None or (policy.gates is None and not needs_reference(recipe.objective)):
        return policy.disabled  # methods that cannot share a base get no second copy unless the objective needs it
    manager, reference = AdapterManager(base.structure), attach_method(base, recipe.method, recipe.seed)
    _load_method_weights(reference, _read_compatible_weights(recipe, Run(recipe.init_from), base), base,
                         whole=not Run(recipe.init_from).recipe)
    manager.add(POLICY, policy)
    manager.add(REFERENCE, reference)
    manager.freeze(REFERENCE)
    manager.set_adapter(POLICY)
    base.router = manager
    return partial(manager.use_adapter, REFERENCE)


def attach_runs(base: Family, runs: Mapping[str, Run]) -> AdapterManager:
    """The adapters of several runs on one base, none of them active. Heads are not loaded: generation needs none.

    Raises:
        RecipeError: a run holds a full model, or was trained on another base.
        RunError: a run's method cannot share its base.
    """
    manager = AdapterManager(base.structure)
    for name, run in runs.items():
        recipe = load_recipe(require_adapter(run))
        tuner = attach_method(base, recipe.method, recipe.seed)
        _load_method_weights(tuner, load_adapter_weights(run, base.structure), base, whole=not run.recipe)
        manager.add(name, tuner)
    base.router = manager
    return manager


def _read_compatible_weights(recipe: Recipe, start: Run, base: Family) -> dict[str, Tensor]:
    """The weights of the run that the recipe starts from. Raises `RecipeError` if base or method differ."""
    start_recipe = load_recipe(require_adapter(start))
    other = [line for line in diff_recipes(start_recipe, fill_left_out(recipe, start_recipe))
             if line.startswith("method.")]
    if conflict := describe_model_conflict(start, recipe.model):
        other.append(f"model.name_or_path: {start_recipe.model.name_or_path!r}, now {recipe.model.name_or_path!r}: "
                     f"{conflict}")
    if other:
        raise RecipeError(f"init_from: the run {str(start.path)!r} was trained with another base or method:\n  "
                          + "\n  ".join(other),
                          "omit model and method in the recipe, which are then taken from that run; if the base was "
                          "moved, give --base-model PATH (in Python: base_model=PATH)")
    return load_adapter_weights(start, base.structure)


def _load_method_weights(tuner: Tuner, saved: dict[str, Tensor], base: Family, whole: bool = False) -> None:
    """Load the method's weights without the heads of the run's objective. `whole`: the file has no heads."""
    names = tuner.state().keys()
    named = rename_weights(saved, names, base)
    left = {name: tensor for name, tensor in named.items() if name not in names}
    if whole:  # a PEFT folder has no heads of Luthier: no tensor in it may be ignored
        left = drop_base_weights(left, {}, base.structure.model)
    tuner.load({**{name: tensor for name, tensor in named.items() if name in names}, **(left if whole else {})})
