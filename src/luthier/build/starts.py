"""Where a training starts from: the bare base, or a run that was tuned before. Read `objects.py` and `runs.py` first.

With `start: RUN` in the recipe, that run's adapter is loaded twice: once to train on, and once, frozen, as the
reference of objectives that have one (DPO, PPO). Both stand on one base, in a bank. Without it, the reference is the
bare base.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from luthier.build.objects import attach, with_heads
from luthier.build.recipe import Recipe, adapted, changed, recorded
from luthier.build.runs import adapter_weights
from luthier.core.errors import RecipeError
from luthier.core.protocols import Attached, Family
from luthier.families import BaseConfig, folder
from luthier.methods.bank import Bank
from luthier.runtime.run import Run

POLICY, REFERENCE = "policy", "reference"


def begin(made: Recipe, base: Family) -> tuple[Attached, Callable[[], AbstractContextManager[None]]]:
    """What trains, with the heads of the objective; and what makes the context in which the model is the reference.

    Raises:
        RecipeError: the recipe starts from a run with another base or method than its own.
        RunError: that run, or what it trained, cannot be read.
    """
    def whole(attached: Attached) -> Attached:
        return with_heads(base, attached, made.objective, made.seed, made.method.default_rate)

    attached = attach(base, made.method, made.seed)
    if made.start is None:
        return whole(attached), attached.disabled
    bank = _started(made, base, attached, Run(made.start))
    return whole(attached), partial(bank.using, REFERENCE)


def _started(made: Recipe, base: Family, policy: Attached, start: Run) -> Bank:
    """A bank with the policy as the run left it, acting, and beside it the same once more, silent and frozen."""
    found = recorded(adapted(start))
    other = [line for line in changed(found, made) if line.startswith("method.")]
    if not same_base(found.base, made.base):
        other.append(f"base.name: {found.base.name!r}, now {made.base.name!r}")
    if other:
        raise RecipeError(f"start: the run {str(start.path)!r} was made with another base or method:\n  "
                          + "\n  ".join(other), "leave base and method out of the recipe: they are taken from that run")
    saved = adapter_weights(start)
    bank = Bank(base.anatomy)
    for name, attached in ((POLICY, policy), (REFERENCE, attach(base, made.method, made.seed))):
        # Heads that an objective added there stay behind: this one has its own.
        attached.load({name: saved[name] for name in attached.state() if name in saved})
        bank.add(name, attached)
    bank.frozen(REFERENCE)
    bank.choose(POLICY)
    base.router = bank
    return bank


def same_base(one: BaseConfig, other: BaseConfig) -> bool:
    """Whether both name the same weights; PEFT's files name the folder where others name an alias."""
    return one.revision == other.revision and (one.name == other.name or folder(one) == folder(other))
