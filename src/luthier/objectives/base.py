"""What most objectives have in common, as defaults. Read `core/protocols.py` (Objective) first, then `tokens.py`."""

from __future__ import annotations

from typing import ClassVar, Self

from luthier.core.config import Config
from luthier.core.protocols import Head
from luthier.core.types import Outputs, Target


class ObjectiveConfig(Config):
    """Settings of an objective, which is itself a pure function of outputs and target."""

    reads: ClassVar[frozenset[str]]
    needs: ClassVar[frozenset[str]]
    coupled: ClassVar[bool] = False
    judged: ClassVar[bool] = False

    @property
    def heads(self) -> tuple[Head, ...]:
        return ()

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None

    def fitted(self, labels: tuple[str, ...]) -> Self:
        return self

    def quality(self, outputs: Outputs, target: Target) -> dict[str, float]:
        return {}
