"""The `data:` part of a recipe. Read `data/formats/registry.py` first for what the files may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from luthier.core.config import Config
from luthier.core.errors import suggest_nearest
from luthier.data.augmentation import Augment
from luthier.data.conversation import ChatConfig, RenderingRules
from luthier.data.formats.registry import COLUMNS, FormatName

LENGTH = 1024  # tokens, where nobody says


class Source(Config):
    """One place that rows come from."""

    path: str = Field(description="a file, a folder of files, or the owner/name of a data set on the hub")
    weight: float = Field(1.0, gt=0, description="times that its rows are seen in an epoch: 2 twice, 0.5 half of them")
    split: str | None = Field(None, description=(
        "which split of a data set on the hub, a folder, or what `datasets` saved; left out: train for data.train, "
        "validation for data.eval, test for data.test; all: every file of a folder"))
    subset: str | None = Field(None, description="which configuration of a data set on the hub or of a folder")
    format: Literal["auto"] | FormatName | None = Field(None, description=(
        "how the rows of this source are written; left out: as data.format says"))
    first_choice: Literal["auto", 0, 1] = Field("auto", description=(
        "the number of the first choice, where the answers to choices are numbers; auto: 0 or 1 as the rows show it"))
    columns: Mapping[str, str | int] | None = Field(None, description=(
        "standard column: this source's own column; left out: as data.columns says"))
    document: Literal["auto", "line", "file"] = Field("auto", description=(
        "what one document is in plain text: a line or the whole file; auto: a line in .txt, the file in .md"))

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: Mapping[str, str | int] | None) -> Mapping[str, str | int] | None:
        return None if columns is None else _normalize_columns(columns)


class DataConfig(Config):
    """What is trained and evaluated on, and how rows become tokens."""

    is_encoder_decoder: ClassVar[bool] = False

    train: tuple[Source, ...] = Field(description="what to train on: a path, a hub name, or a list of them")
    eval: float | Source | None = Field(None, description=(
        "what to evaluate on while training: a path, or a fraction of the train rows to hold out by the seed"))
    test: Source | None = Field(None, description="what to evaluate on at the end")
    format: Literal["auto"] | FormatName = Field("auto", description=(
        "how rows are written; auto goes by the columns. prompt and completion are put into the base's chat template "
        "if it has one, unless the format is `completion`, which joins them bare"))
    columns: Mapping[str, str | int] = Field(default_factory=dict, description=(
        "standard column: the file's own column, where they differ; numbers from 0 mean a table without a header"))
    max_length: int | None = Field(None, ge=2, description=(
        "the most tokens that one example may have; left out: 1024, or the base's context where that is shorter"))
    truncation: Literal["truncate", "refuse", "split"] = Field("truncate", description=(
        "what happens to longer examples. Truncate: cut the end off, or of a prompt with compared answers the oldest "
        "words of its turns (never the opening token, a header or the system prompt). Split: cut a document into "
        "several examples without loss; refuse all else"))
    system: str | None = Field(None, description="system prompt for the chats that have none")
    chat: ChatConfig = Field(ChatConfig(), description="how messages and prompts become text")
    loss_on: Literal["assistant", "all", "last"] = Field("assistant", description=(
        "which turns of a chat are trained: the assistant's, all, or the assistant's last; a turn's own weight wins"))
    share_prompt: Literal["auto"] | bool = Field("auto", description=(
        "whether a prompt is computed once for all its answers; the result is the same; auto: where that saves much"))
    score_scale: float | None = Field(None, gt=0, description=(
        "the score of texts that mean the same; left out: 1, 5, 10 or 100, the first that no training row exceeds"))
    augment: tuple[Augment, ...] = Field((), description=(
        "changes to what is read: deletion, swap and synonyms of words; crop, flip and noise of pictures; mixup of "
        "either, with their labels"))
    shuffle: bool = Field(True, description="whether every epoch has its own order")
    max_samples: int | None = Field(None, ge=1, description=(
        "read at most this many rows of every source, for a quick try"))
    streaming: bool = Field(False, description=(
        "read the train rows anew in every epoch instead of keeping them; shuffled in blocks, not as a whole"))

    @field_validator("train", mode="before")
    @classmethod
    def _several(cls, raw: Any) -> Any:
        return [_parse_source(item) for item in (raw if isinstance(raw, (list, tuple)) else [raw])]

    @field_validator("train")
    @classmethod
    def _some(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        if not sources:
            raise ValueError("name at least one file to train on")
        return sources

    @field_validator("eval", "test", mode="before")
    @classmethod
    def _one(cls, raw: Any) -> Any:
        return _parse_source(raw)

    @field_validator("eval")
    @classmethod
    def _fraction(cls, value: float | Source | None) -> float | Source | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("a fraction to hold out lies between 0 and 1")
        return value

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: Mapping[str, str | int]) -> Mapping[str, str | int]:
        return _normalize_columns(columns)

    @field_validator("augment", mode="before")
    @classmethod
    def _changes(cls, raw: Any) -> Any:
        listed = raw if isinstance(raw, (list, tuple)) else [raw]
        return [{"name": change} if isinstance(change, str) else change for change in listed]

    @field_validator("augment")
    @classmethod
    def _mixed_once(cls, changes: tuple[Augment, ...]) -> tuple[Augment, ...]:
        if sum(change.name == "mixup" for change in changes) > 1:
            raise ValueError("mixup is named once: a mixture is not mixed again")
        return changes

    def for_source(self, source: Source) -> Self:
        """The settings with the format and the columns of one source, where it has its own."""
        own = {key: value for key, value in (("format", source.format), ("columns", source.columns))
               if value is not None}
        return self.model_copy(update=own) if own else self

    @property
    def rules(self) -> RenderingRules:
        """How messages are rendered."""
        return RenderingRules(self.chat, self.system)

    @property
    def token_limit(self) -> int:
        """Tokens that one example may have."""
        return self.max_length or LENGTH

    @property
    def header(self) -> bool:
        """Whether tables have a header line."""
        return not any(isinstance(theirs, int) for theirs in self.columns.values())


class DividedConfig(DataConfig):
    """The same settings, for a base that reads a source and writes its answer, each of at most `max_length` tokens."""

    is_encoder_decoder: ClassVar[bool] = True

    @classmethod
    def of(cls, config: DataConfig) -> DividedConfig:
        """Several answers always share their source."""
        return cls.model_construct(config.model_fields_set, **{**dict(config), "share_prompt": True})


def _normalize_columns(columns: Mapping[str, str | int]) -> Mapping[str, str | int]:
    for column in columns:
        if column not in COLUMNS:
            raise ValueError(f"unknown standard column {column!r}: {suggest_nearest(column, COLUMNS)}")
    if len({isinstance(theirs, int) for theirs in columns.values()}) > 1:
        raise ValueError("give names for all columns, or numbers for all of a table without a header")
    return columns


def _parse_source(raw: Any) -> Any:
    return {"path": raw} if isinstance(raw, str) else raw
