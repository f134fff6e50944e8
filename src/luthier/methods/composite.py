"""Several methods on one model: `method: [lora, bitfit]` in a recipe, or a method and an objective's heads.

Read `full.py` first. Each part keeps the names of its parameters, which must be distinct, and its own learning rate:
for a learning rate r and the first part's default d_1, part i is trained at r d_i / d_1.

Parts that change the same module act in the order of the list, except that LoRA and AdaLoRA always come first. They
change the linear layer itself, and the others then add to or scale the changed linear layer, so the parts can be
merged one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, SerializationInfo, SerializeAsAny, field_validator, model_serializer
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.config import Config
from luthier.core.errors import RecipeError, RunError
from luthier.core.optimizer_hook import OptimizerHook
from luthier.core.protocols import ModelStructure, Tuner
from luthier.methods import METHODS
from luthier.methods.adalora import AdaLoraConfig
from luthier.methods.full import Full
from luthier.methods.lora import LoraConfig
from luthier.methods.prompt import VirtualTokenConfig

OneMethod: TypeAlias = Annotated[reduce(or_, METHODS.values()), Field(discriminator="name")]  # type: ignore[valid-type]


class CompositeConfig(Config):
    """Settings of a list of methods."""

    name: Literal["composite"] = "composite"
    parts: tuple[SerializeAsAny[OneMethod], ...] = Field(min_length=2)

    @field_validator("parts", mode="before")
    @classmethod
    def _expand_names(cls, given: Any) -> Any:
        return [{"name": part} if isinstance(part, str) else part for part in given]

    @field_validator("parts")
    @classmethod
    def _check_parts(cls, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [part.name for part in parts]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{duplicates[0]} is in the list twice, and their parameters would have the same names; "
                             "use one with a larger size (rank)")
        virtual = [name for name, part in zip(names, parts, strict=True) if isinstance(part, VirtualTokenConfig)]
        if len(virtual) > 1:
            raise ValueError(f"{' and '.join(virtual)} all train virtual tokens, and a saved run can hold "
                             "only one kind")
        return parts

    @model_serializer
    def _as_list(self, info: SerializationInfo) -> list[Any]:
        return [part.model_dump(mode=info.mode) for part in self.parts]

    @property
    def default_learning_rate(self) -> float:
        """The first part's default."""
        return float(self.parts[0].default_learning_rate)

    def attach(self, structure: ModelStructure, *, seed: int) -> CompositeMethod:
        """Attach every part. Raises `RecipeError` if the result could not be saved."""
        tuners: list[Tuner] = []
        order = sorted(enumerate(self.parts), key=lambda pair: not isinstance(pair[1], LoraConfig | AdaLoraConfig))
        for i, part in order:
            tuners.append(part.attach(structure, seed=seed + i))
            if isinstance(tuners[-1], Full):
                raise RecipeError(f"{part.name} trains the base's own weights in place, so it cannot be combined with "
                                  "another method", f"use {part.name} alone, or remove it from the list")
            before = {name for earlier in tuners[:-1] for name in earlier.state()}
            if shared := sorted(before & tuners[-1].state().keys()):
                raise RecipeError(f"{part.name} and another method of the list both save {shared[0]!r}, and one file "
                                  "cannot hold both", "remove one of them")
        return CompositeMethod(tuners, [part.default_learning_rate / self.default_learning_rate for _, part in order])


def list_parts(method: Config) -> tuple[Any, ...]:
    """The methods of a list; for a single method, that method."""
    return method.parts if isinstance(method, CompositeConfig) else (method,)


class CompositeMethod:
    """Tuners that are trained, disabled, merged and saved together.

    Args:
        parts: tuners in the order in which they were attached.
        rates: factor on the learning rate of each part.
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
        merged: list[Tuner] = []
        try:
            for part in self.parts:
                part.merge()
                merged.append(part)
        except BaseException:
            for part in reversed(merged):
                part.unmerge()
            raise

    def unmerge(self) -> None:
        for part in reversed(self.parts):
            part.unmerge()

    def state(self) -> dict[str, Tensor]:
        return {name: tensor for part in self.parts for name, tensor in part.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load all parts, or none if one refuses."""
        names_of_parts = [set(part.state()) for part in self.parts]
        if unexpected := sorted(state.keys() - set().union(*names_of_parts)):
            raise RunError(f"the saved weights do not match these methods on this base: {len(unexpected)} unexpected, "
                           f"the first is {unexpected[0]!r}", "use the base and the settings they were trained with")
        before = [{n: t.clone() for n, t in part.state().items()} for part in self.parts]
        try:
            for part, names in zip(self.parts, names_of_parts, strict=True):
                part.load({name: state[name] for name in names & state.keys()})
        except RunError:
            for part, kept in zip(self.parts, before, strict=True):
                part.load(kept)
            raise

    def get_peft_config(self) -> dict[str, Any] | None:
        """One method's config with the heads as PEFT's `modules_to_save`; Luthier's own format for several methods."""
        forms = [form for part in self.parts if (form := part.get_peft_config()) is not None]
        if len(forms) != len(self.parts):
            return None
        kept = sorted({name for form in forms for name in form.get("modules_to_save") or ()})
        methods = [form for form in forms if form["peft_type"] is not None]
        tasks = [form["task_type"] for form in forms if form["peft_type"] is None]  # the task of the heads
        if len(methods) == 1:
            return {**methods[0], **({"task_type": tasks[0]} if tasks else {}),
                    **({"modules_to_save": kept} if kept else {})}
        return {"peft_type": "LUTHIER", "task_type": forms[0]["task_type"], "parts": methods,
                **({"modules_to_save": kept} if kept else {})}
