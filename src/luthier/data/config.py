"""The `data:` part of a recipe. Read `data/formats/registry.py` first for the formats of the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from luthier.core.config import Config
from luthier.core.errors import suggest_nearest
from luthier.data.augmentation import Augment
from luthier.data.conversation import ChatConfig, RenderingRules
from luthier.data.formats.registry import COLUMNS, FormatName

LENGTH = 1024  # tokens, if the recipe does not set it


class Source(Config):
    """One source of rows."""

    path: str = Field(description="a file, a folder of files, or the hub id (owner/name) of a data set")
    weight: float = Field(1.0, gt=0, description="how often an epoch includes its rows: 2 is twice, 0.5 is half of "
                                                 "them")
    split: str | None = Field(None, description=(
        "split of a hub data set, a folder, or a data set saved by `datasets`; default: train for data.train, "
        "validation for data.eval, test for data.test; all: every file of a folder"))
    subset: str | None = Field(None, description="configuration of a hub data set or of a folder")
    format: Literal["auto"] | FormatName | None = Field(None, description=(
        "format of the rows of this source; default: data.format"))
    first_choice: Literal["auto", 0, 1] = Field("auto", description=(
        "index of the first choice, if answers to choices are indices; auto: 0 or 1, found from the rows"))
    columns: Mapping[str, str | int] | None = Field(None, description=(
        "standard column: column of this source; default: data.columns"))
    document: Literal["auto", "line", "file"] = Field("auto", description=(
        "what one document is in plain text: a line or the whole file; auto: a line in .txt, the file in .md"))

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: Mapping[str, str | int] | None) -> Mapping[str, str | int] | None:
        return None if columns is None else _normalize_columns(columns)


class DataConfig(Config):
    """What is trained and evaluated on, and how rows become tokens."""

    is_encoder_decoder: ClassVar[bool] = False

    train: tuple[Source, ...] = Field(description="training rows: a path, a hub id, or a list of sources")
    eval: float | Source | None = Field(None, description=(
        "validation rows, evaluated during training: a path, or the fraction of the training rows to hold out "
        "(selected by the seed)"))
    test: Source | None = Field(None, description="test rows, evaluated before and after training")
    format: Literal["auto"] | FormatName = Field("auto", description=(
        "format of the rows; auto: detected from the columns. prompt and completion are rendered with the base's chat "
        "template if it has one; the format `completion` concatenates them without a template"))
    columns: Mapping[str, str | int] = Field(default_factory=dict, description=(
        "standard column: column of the file, if they differ; numbers from 0 are the columns of a table without a "
        "header"))
    max_length: int | None = Field(None, ge=2, description=(
        "maximum number of tokens of one example; default: 1024, or the base's context if that is shorter"))
    truncation: Literal["truncate", "refuse", "split"] = Field("truncate", description=(
        "what happens to longer examples. Truncate: cut off the end; with several answers, cut the oldest words of "
        "the prompt's turns instead (never the opening token, a header or the system prompt). Split: divide a "
        "document into several examples, and reject other rows. Refuse: reject the row"))
    system: str | None = Field(None, description="system prompt for chats that have none")
    chat: ChatConfig = Field(ChatConfig(), description="how messages and prompts become text")
    loss_on: Literal["assistant", "all", "last"] = Field("assistant", description=(
        "which turns of a chat are trained: the assistant's, all, or the assistant's last; a turn's own weight "
        "overrides this"))
    share_prompt: Literal["auto"] | bool = Field("auto", description=(
        "whether a prompt is computed once for all its answers; the result is the same; auto: if that saves at least "
        "a sixth of the tokens"))
    score_scale: float | None = Field(None, gt=0, description=(
        "the maximum score, which means equal meaning; default: the first of 1, 5, 10 and 100 that no training row "
        "exceeds"))
    augment: tuple[Augment, ...] = Field((), description=(
        "augmentations of the input: deletion, swap and synonyms of words; crop, flip and noise of images; mixup of "
        "either, with their labels"))
    shuffle: bool = Field(True, description="whether the rows are shuffled again in every epoch")
    max_samples: int | None = Field(None, ge=1, description=(
        "maximum number of rows to read from every source, for a quick test"))
    streaming: bool = Field(False, description=(
        "read the training rows again in every epoch instead of keeping them in memory; they are shuffled in blocks"))

    @field_validator("train", mode="before")
    @classmethod
    def _several(cls, raw: Any) -> Any:
        return [_parse_source(item) for item in (raw if isinstance(raw, (list, tuple)) else [raw])]

    @field_validator("train")
    @classmethod
    def _some(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        if not sources:
            raise ValueError("give at least one file to train on")
        return sources

    @field_validator("eval", "test", mode="before")
    @classmethod
    def _one(cls, raw: Any) -> Any:
        return _parse_source(raw)

    @field_validator("eval")
    @classmethod
    def _fraction(cls, value: float | Source | None) -> float | Source | None:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError("the fraction to hold out must be between 0 and 1")
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
            raise ValueError("mixup may be given only once")
        return changes

    def for_source(self, source: Source) -> Self:
        """The settings with the format and the columns of one source, if it has its own."""
        own = {key: value for key, value in (("format", source.format), ("columns", source.columns))
               if value is not None}
        return self.model_copy(update=own) if own else self

    @property
    def rules(self) -> RenderingRules:
        """How messages are rendered."""
        return RenderingRules(self.chat, self.system)

    @property
    def token_limit(self) -> int:
        """Maximum number of tokens of one example."""
        return self.max_length or LENGTH

    @property
    def header(self) -> bool:
        """Whether tables have a header line."""
        return not any(isinstance(theirs, int) for theirs in self.columns.values())


class DividedConfig(DataConfig):
    """The same settings for encoder-decoder models: source and target have at most `max_length` tokens each."""

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
        raise ValueError("use names for all columns, or numbers for all columns of a table without a header")
    return columns


def _parse_source(raw: Any) -> Any:
    return {"path": raw} if isinstance(raw, str) else raw
