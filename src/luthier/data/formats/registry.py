"""Rows to examples: which columns mean what. Read `sources.py` first, then `data/formats/text.py`.

The format of a file is the first of `FORMATS` that the objective can read and whose required columns a row has. Rows of
the same file that do not fit are refused, each with its reason. Where nothing fits, one `DataError` names the columns
found and the remedy.

All but prompts also take a `weight` column: the weight of the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.core.errors import DataError, nearest
from luthier.core.examples import Example, Origin
from luthier.data.answer_choices import Numbering, find_numbering
from luthier.data.formats import labels, preferences, text
from luthier.data.row_values import UnfitError
from luthier.data.rows import Refusal, Row

Columns = Mapping[str, str | int]
PATIENCE = 100  # rows that fit no format before the whole file is given up
INSIDE = 4  # columns: a file with fewer and a list of objects among them is a wrapping around its rows
PAIR = ("chosen", "rejected")
BESIDE = ("system", "tools", "margin", "weight")  # of answers that are compared


@dataclass(frozen=True)
class Format:
    """A way to write examples as rows: its columns, and how a row becomes an example.

    Args:
        kinds: the types of example that it gives, by name.
        also: other names that a column is found under.
        unless: columns that together say that the row means something else.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    kinds: frozenset[str]
    convert: Callable[[Mapping[str, Any], Origin], Example]
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unless: tuple[str, ...] = ()

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether all that it requires has a value."""
        mine = self.named(values)
        return (all(mine.get(column) is not None for column in self.required)
                and not (self.unless and all(values.get(column) is not None for column in self.unless)))

    def named(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row under the names that `convert` knows."""
        found = {ours: theirs for ours, names in self.also.items() if values.get(ours) is None
                 for theirs in names if values.get(theirs) is not None}
        moved = set(found.values())
        kept = {column: value for column, value in values.items() if column not in moved} if moved else values
        return {**kept, **{ours: values[theirs] for ours, theirs in found.items()}} if found else values


def _kinds(*names: str) -> frozenset[str]:
    return frozenset(f"{name}Example" for name in names)


FormatName = Literal[
    "pair", "sharegpt_pair", "rejected_response", "openai_pair", "transcripts", "ranking", "choices", "judged",
    "judged_chat", "score", "triplet", "label", "label_pair", "tags", "picture", "messages", "sharegpt", "alpaca",
    "completion", "prompt", "text"]
FORMATS: dict[str, Format] = {  # in order of precedence: a row with `messages` and `prompt` is of the first
    "sharegpt_pair": Format(("conversations", *PAIR), BESIDE, _kinds("Compared"),
                            preferences.from_sharegpt_pair),
    "pair": Format(("prompt", *PAIR), BESIDE, _kinds("Compared"), preferences.from_pair),
    "transcripts": Format(PAIR, BESIDE, _kinds("Compared"), preferences.from_transcripts),
    "rejected_response": Format(("messages", "rejected_response"), BESIDE, _kinds("Compared"),
                                preferences.from_rejected_response),
    "openai_pair": Format(("input", "preferred_output", "non_preferred_output"), BESIDE,
                          _kinds("Compared"), preferences.from_openai_pair),
    "ranking": Format(("prompt", "answers"), BESIDE, _kinds("Compared"), preferences.from_ranking),
    "choices": Format(("prompt", "choices", "answer"), ("system", "weight"), _kinds("Compared"),
                      preferences.from_choices, {"prompt": ("question", "context", "ctx"), "choices": ("endings",),
                                                 "answer": ("answerKey", "label")}),
    "judged": Format(("prompt", "completion", "label"), ("system", "tools", "weight"), _kinds("UnpairedPreference"),
                     preferences.from_judged),
    "judged_chat": Format(("messages", "label"), ("system", "tools", "weight"), _kinds("UnpairedPreference"),
                          preferences.from_judged_chat),
    "score": Format(("sentence1", "sentence2", "score"), ("weight",), _kinds("Texts"), labels.from_score),
    "triplet": Format(("anchor", "positive"), ("negative", "negatives", "weight"), _kinds("Texts"),
                      labels.from_triplet),
    "label_pair": Format(("text", "second", "label"), ("weight",), _kinds("Labelled"), labels.from_label,
                         {"text": ("sentence1", "premise"), "second": ("sentence2", "hypothesis"),
                          "label": ("score",)}),
    "label": Format(("text", "label"), ("second", "weight"), _kinds("Labelled"), labels.from_label,
                    {"text": ("sentence",), "label": ("labels",)}),
    "tags": Format(("words", "tags"), ("weight",), _kinds("Tagged"), labels.from_tags,
                   {"words": ("tokens",), "tags": ("ner_tags",)}),
    "picture": Format(("pixels",), ("label", "weight"), _kinds("Image"), labels.from_picture, {"pixels": ("image",)}),
    "messages": Format(("messages",), ("tools", "system", "weight"), _kinds("Chat"), text.from_messages),
    "sharegpt": Format(("conversations",), ("tools", "system", "weight"), _kinds("Chat"), text.from_sharegpt,
                       unless=PAIR),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools", "weight"), _kinds("Chat"),
                     text.from_alpaca),
    "completion": Format(("prompt", "completion"), ("system", "tools", "weight"), _kinds("Chat", "Completion"),
                         text.from_completion),
    "prompt": Format(("prompt",), ("reference", "system", "tools"), _kinds("Prompt"), labels.from_prompt,
                     {"reference": ("answer", "completion")}),
    "text": Format(("text",), ("weight",), _kinds("Text"), text.from_text, unless=PAIR),
}
COLUMNS = frozenset(column for known in FORMATS.values()
                    for column in (*known.required, *known.optional, *known.also))


@dataclass(frozen=True)
class Reader:
    """Which kinds of example are wanted, and by whom others would be.

    Args:
        kinds: names of types of example; None for any.
        others: for each objective, the kinds that it reads; for the remedy alone.
        numbering: how the answers of the source number choices; None: as each row alone shows it.
    """

    kinds: frozenset[str] | None = None
    others: Mapping[str, Collection[str]] = field(default_factory=dict)
    numbering: Callable[[], Numbering] | None = None

    def formats(self) -> dict[str, bool]:
        """The formats it can read, in the order to try them, and whether what they give is turned into a prompt."""
        direct = {name: False for name, known in FORMATS.items() if self.kinds is None or known.kinds & self.kinds}
        if self.kinds is None or "PromptExample" not in self.kinds:
            return direct
        return direct | {name: True for name, known in FORMATS.items()
                         if name not in direct and known.kinds <= labels.ASKED}

    def convert(self, values: Mapping[str, Any], format: str, origin: Origin) -> Example | Refusal:
        """One row of a known format."""
        known = FORMATS[format]
        named = known.named(values)
        missing = [column for column in known.required if named.get(column) is None]
        if missing:
            needed = ", ".join(known.required)
            return Refusal(origin, f"no {missing[0]}", f"the file's format is {format}, which needs {needed}")
        try:
            example = (preferences.from_choices(named, origin, self.numbering) if format == "choices"
                       else known.convert(named, origin))
            return labels.as_prompt(example, named) if self.formats()[format] else example
        except UnfitError as unfit:
            return Refusal(origin, unfit.reason, unfit.detail)


ANY = Reader()


# ---------------------------------------------------------------- a file's rows to examples


def examples(rows: Iterable[Row | Refusal], format: str = "auto", columns: Columns | None = None,
             reader: Reader = ANY) -> Iterator[Example | Refusal]:
    """One example or refusal for each row of one file. Raises `DataError` where the columns fit no format, or none
    that `reader` reads."""
    columns = columns or {}
    readable = reader.formats()
    found = None if format == "auto" else format
    if found and found not in readable:
        raise _unread(f"format: {found}", found, reader)
    strangers: list[Row] = []
    for row in rows:
        if isinstance(row, Refusal):
            yield row
            continue
        values = _renamed(row.values, columns)
        found = found or recognise(values, readable)
        if found is None:
            strangers.append(row)
            if len(strangers) >= PATIENCE:
                break
            yield Refusal(row.origin, "columns of no known format")
        else:
            yield reader.convert(values, found, row.origin)
    if found is None and strangers:
        other = recognise(_renamed(strangers[0].values, columns), FORMATS)
        raise _unread(str(strangers[0].origin), other, reader) if other else _no_format(strangers[0], columns, readable)


def recognise(values: Mapping[str, Any], among: Iterable[str]) -> str | None:
    """The first format whose required columns all have a value."""
    return next((name for name in among if FORMATS[name].fits(values)), None)


def numbering_of(rows: Iterable[Row | Refusal], columns: Columns) -> Numbering:
    """How the answers of a source number choices, as all of its rows together show it."""
    known = FORMATS["choices"]
    renamed = (_renamed(row.values, columns) for row in rows if isinstance(row, Row))
    return find_numbering(known.named(values) for values in renamed if known.fits(values))


def _renamed(values: Mapping[str, Any], columns: Columns) -> Mapping[str, Any]:
    """The row under standard names. A column that `columns` claims is not also found under its own name."""
    if not columns:
        return values
    claimed = {str(theirs) for theirs in columns.values()}
    kept = {name: value for name, value in values.items() if name not in claimed}
    return {**kept, **{ours: values.get(str(theirs)) for ours, theirs in columns.items()}}


def _unread(where: str, format: str, reader: Reader) -> DataError:
    known = FORMATS[format]
    able = [name for name, kinds in reader.others.items() if known.kinds & frozenset(kinds)]
    wanted = ", ".join(sorted(reader.kinds or ()))
    return DataError(f"{where}: rows with {', '.join(known.required)} are of the format {format!r} "
                     f"({', '.join(sorted(known.kinds))}), and the objective reads {wanted}",
                     (f"choose an objective that reads them: {', '.join(able)}; or " if able else "")
                     + "name the columns that you want with `columns:`")


def _no_format(row: Row, columns: Columns, readable: Iterable[str]) -> DataError:
    there = [name[:40] for name in row.values]
    wrong = [str(theirs) for theirs in columns.values() if str(theirs) not in row.values]
    if wrong:
        return DataError(f"{row.origin}: `columns` names {wrong[0]!r}, which the file has not",
                         nearest(wrong[0], there))
    known = "; ".join(f"{name} ({', '.join(FORMATS[name].required)})" for name in readable)
    inside = next((name for name, value in row.values.items() if isinstance(value, list) and value
                   and all(isinstance(item, dict) for item in value)), None)
    return DataError(f"{row.origin}: the columns {', '.join(map(repr, there))} fit no known format: {known}",
                     f"the rows seem to lie within {inside!r}: give that list as a file of its own" if inside
                     and len(there) < INSIDE else
                     f"say which column is which, as in `columns: {_guessed(list(row.values), readable)}`")


def _guessed(there: Sequence[str], readable: Iterable[str]) -> str:
    """Columns for the remedy: those that differ from a format's only by case and outer space, else an example."""
    plain = {name.strip().lower(): name for name in there}
    for format in readable:
        if all(column in plain for column in FORMATS[format].required):
            return "{" + ", ".join(f"{column}: {plain[column]!r}" for column in FORMATS[format].required) + "}"
    return "{prompt: question, completion: answer}"
