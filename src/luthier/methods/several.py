"""Several methods on one model as one: `method: [lora, bitfit]` in a recipe, or a method and an objective's heads.

Read `full.py` first. Every part keeps the names of its parameters, which must not meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from luthier.core.errors import RunError
from luthier.core.protocols import Attached, Scope


class Several:
    """Parts that train, are switched and are saved together. It has no switch of its own: see `scopes`.

    Args:
        parts: attached methods, in the order in which they were attached.
        rates: factor on the learning rate for each part.
    """

    scope = None

    def __init__(self, parts: Sequence[Attached], rates: Sequence[float] | None = None) -> None:
        self.parts, self.rates = tuple(parts), tuple(rates or [1.0] * len(parts))
        names = [name for part in parts for name in part.parameters()]
        assert len(names) == len(set(names)), "two parts have parameters of one name"

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for part in self.parts for name, parameter in part.parameters().items()}

    def rate(self, name: str) -> float:
        return next(rate * part.rate(name) for part, rate in zip(self.parts, self.rates, strict=True)
                    if name in part.parameters())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in reversed(self.parts):
                stack.enter_context(part.disabled())
            yield

    def merge(self) -> None:
        done: list[Attached] = []
        try:
            for part in self.parts:
                part.merge()
                done.append(part)
        except BaseException:
            for part in reversed(done):
                part.unmerge()
            raise

    def unmerge(self) -> None:
        for part in reversed(self.parts):
            part.unmerge()

    def state(self) -> dict[str, Tensor]:
        return {name: tensor for part in self.parts for name, tensor in part.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """All parts or none."""
        wanted = [set(part.state()) for part in self.parts]
        if unknown := sorted(state.keys() - set().union(*wanted)):
            raise RunError(f"the saved weights do not fit these methods on this base: {len(unknown)} unknown, "
                           f"the first {unknown[0]!r}", "use the base and the settings that they were trained with")
        before = [{n: t.clone() for n, t in part.state().items()} for part in self.parts]
        try:
            for part, names in zip(self.parts, wanted, strict=True):
                part.load({name: state[name] for name in names & state.keys()})
        except RunError:
            for part, kept in zip(self.parts, before, strict=True):
                part.load(kept)
            raise

    def peft(self) -> dict[str, Any] | None:
        """The one part's form with the heads as PEFT's `modules_to_save`; a form of our own where that does not do."""
        forms = [form for part in self.parts if (form := part.peft()) is not None]
        if len(forms) != len(self.parts):
            return None
        kept = sorted({name for form in forms for name in form.get("modules_to_save") or ()})
        methods = [form for form in forms if form["peft_type"] is not None]
        if len(methods) == 1:
            return {**methods[0], **({"modules_to_save": kept} if kept else {})}
        return {"peft_type": "LUTHIER", "task_type": forms[0]["task_type"], "parts": methods,
                **({"modules_to_save": kept} if kept else {})}


def scopes(attached: Attached) -> tuple[Scope, ...] | None:
    """The switches of an attached method and of all its parts; None where one of them has none."""
    if not isinstance(attached, Several):
        return None if attached.scope is None else (attached.scope,)
    found = [scopes(part) for part in attached.parts]
    return None if None in found else tuple(scope for inner in found if inner for scope in inner)
