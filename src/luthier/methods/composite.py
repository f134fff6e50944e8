"""Several methods on one model as one: `method: [lora, bitfit]` in a recipe, or a method and an objective's heads.

Read `full.py` first. Every part keeps the names of its parameters, which must not meet, and its own learning rate: with
the first part's default d_1 and rate r, part i trains at r d_i / d_1.

Where parts change one module they do so in the order of the list, but for a LoRA, which comes first wherever it stands:
its change is one of the map itself, and what others add or scale is then the changed map's. So a list can be merged
part by part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, SerializationInfo, SerializeAsAny, field_validator, model_serializer
from torch import Tensor, nn

from luthier.core.config import Config
from luthier.core.errors import RecipeError, RunError
from luthier.core.optimizer_hook import OptimizerHook
from luthier.core.protocols import AdapterGate, Anatomy, Tuner
from luthier.methods import METHODS
from luthier.methods.adalora import AdaLoraConfig
from luthier.methods.lora import LoraConfig
from luthier.methods.prompt import VirtualTokenConfig

OneMethod: TypeAlias = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")]  # type: ignore[valid-type]


class CompositeConfig(Config):
    """A list of methods, as one."""

    name: Literal["composite"] = "composite"
    parts: tuple[SerializeAsAny[OneMethod], ...] = Field(min_length=2)

    @field_validator("parts", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return [{"name": part} if isinstance(part, str) else part for part in given]

    @field_validator("parts")
    @classmethod
    def _fitting(cls, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [part.name for part in parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} stands in the list twice, and their parameters would have the same names; "
                             "one with a larger size (rank) holds what two of them would")
        virtual = [name for name, part in zip(names, parts, strict=True) if isinstance(part, VirtualTokenConfig)]
        if len(virtual) > 1:
            raise ValueError(f"{' and '.join(virtual)} are all virtual tokens, and a saved run holds one kind of them")
        return parts

    @model_serializer
    def _as_list(self, info: SerializationInfo) -> list[Any]:
        return [part.model_dump(mode=info.mode) for part in self.parts]

    @property
    def default_learning_rate(self) -> float:
        """The first part's."""
        return float(self.parts[0].default_learning_rate)

    def attach(self, anatomy: Anatomy, *, seed: int) -> CompositeMethod:
        """Every part. Raises `RecipeError` where the result could not be saved."""
        found: list[Tuner] = []
        order = sorted(enumerate(self.parts), key=lambda pair: not isinstance(pair[1], LoraConfig | AdaLoraConfig))
        for i, part in order:
            found.append(part.attach(anatomy, seed=seed + i))
            if found[-1].get_peft_config() is None:
                raise RecipeError(f"{part.name} trains the base's own weights, and its run is a whole model without "
                                  "room for another method", f"use {part.name} alone, or leave it out of the list")
            before = {name for earlier in found[:-1] for name in earlier.state()}
            if meet := sorted(before & found[-1].state().keys()):
                raise RecipeError(f"{part.name} keeps what it trains as {meet[0]!r}, and so does another of the list: "
                                  "one file cannot hold both", "leave one of them out")
        return CompositeMethod(found, [part.default_learning_rate / self.default_learning_rate for _, part in order])


def list_parts(method: Config) -> tuple[Any, ...]:
    """The methods of a list, or the one."""
    return method.parts if isinstance(method, CompositeConfig) else (method,)


class CompositeMethod:
    """Parts that train, are switched and are saved together. Its gates are those of its parts.

    Args:
        parts: attached methods, in the order in which they were attached.
        rates: factor on the learning rate for each part.
    """

    def __init__(self, parts: Sequence[Tuner], rates: Sequence[float] | None = None) -> None:
        self.parts, self.rates = tuple(parts), tuple(rates or [1.0] * len(parts))
        names = [name for part in parts for name in part.parameters()]
        assert len(names) == len(set(names)), "two parts have parameters of one name"

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for part in self.parts for name, parameter in part.parameters().items()}

    def lr_multiplier(self, name: str) -> float:
        return next(rate * part.lr_multiplier(name) for part, rate in zip(self.parts, self.rates, strict=True)
                    if name in part.parameters())

    @property
    def gates(self) -> tuple[AdapterGate, ...] | None:
        gates: list[AdapterGate] = []
        for part in self.parts:
            if part.gates is None:
                return None
            gates += part.gates
        return tuple(gates)

    @property
    def optimizer_hooks(self) -> tuple[OptimizerHook, ...]:
        return tuple(hook for part in self.parts for hook in part.optimizer_hooks)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in reversed(self.parts):
                stack.enter_context(part.disabled())
            yield

    def merge(self) -> None:
        done: list[Tuner] = []
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

    def get_peft_config(self) -> dict[str, Any] | None:
        """The one part's form with the heads as PEFT's `modules_to_save`; a form of our own where that does not do."""
        forms = [form for part in self.parts if (form := part.get_peft_config()) is not None]
        if len(forms) != len(self.parts):
            return None
        kept = sorted({name for form in forms for name in form.get("modules_to_save") or ()})
        methods = [form for form in forms if form["peft_type"] is not None]
        tasks = [form["task_type"] for form in forms if form["peft_type"] is None]  # what heads are for
        if len(methods) == 1:
            return {**methods[0], **({"task_type": tasks[0]} if tasks else {}),
                    **({"modules_to_save": kept} if kept else {})}
        return {"peft_type": "LUTHIER", "task_type": forms[0]["task_type"], "parts": methods,
                **({"modules_to_save": kept} if kept else {})}
