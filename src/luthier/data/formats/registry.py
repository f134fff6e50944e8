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

from luthier.core.errors import DataError, suggest_nearest
from luthier.core.examples import Example, Origin
from luthier.data.answer_choices import Numbering, find_numbering
from luthier.data.formats import labels, preferences, text
from luthier.data.row_values import InvalidRowError
from luthier.data.rows import RejectedRow, Row

Columns = Mapping[str, str | int]
PATIENCE = 100  # rows that fit no format before the whole file is given up
INSIDE = 4  # columns: a file with fewer and a list of objects among them is a wrapping around its rows
PAIR = ("chosen", "rejected")
OPTIONAL_COLUMNS = ("system", "tools", "margin", "weight")  # of answers that are compared


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


def _name_types(*names: str) -> frozenset[str]:
    return frozenset(f"{name}Example" for name in names)


FormatName = Literal[
    "pair", "sharegpt_pair", "rejected_response", "openai_pair", "implicit_prompt_preference", "ranking", "choices",
    "unpaired_preference", "unpaired_preference_chat", "score", "triplet", "label", "label_pair", "tags", "image",
    "messages", "sharegpt", "alpaca", "completion", "prompt", "text"]
FORMATS: dict[str, Format] = {  # in order of precedence: a row with `messages` and `prompt` is of the first
    "sharegpt_pair": Format(("conversations", *PAIR), OPTIONAL_COLUMNS, _name_types("Preference"),
                            preferences.convert_sharegpt_pair),
    "pair": Format(("prompt", *PAIR), OPTIONAL_COLUMNS, _name_types("Preference"), preferences.convert_pair),
    "implicit_prompt_preference": Format(PAIR, OPTIONAL_COLUMNS, _name_types("Preference"),
                                         preferences.convert_implicit_prompt),
    "rejected_response": Format(("messages", "rejected_response"), OPTIONAL_COLUMNS, _name_types("Preference"),
                                preferences.convert_rejected_response),
    "openai_pair": Format(("input", "preferred_output", "non_preferred_output"), OPTIONAL_COLUMNS,
                          _name_types("Preference"), preferences.convert_openai_pair),
    "ranking": Format(("prompt", "answers"), OPTIONAL_COLUMNS, _name_types("Preference"), preferences.convert_ranking),
    "choices": Format(("prompt", "choices", "answer"), ("system", "weight"), _name_types("Preference"),
                      preferences.convert_choices, {"prompt": ("question", "context", "ctx"), "choices": ("endings",),
                                                    "answer": ("answerKey", "label")}),
    "unpaired_preference": Format(("prompt", "completion", "label"), ("system", "tools", "weight"),
                                  _name_types("UnpairedPreference"), preferences.convert_unpaired),
    "unpaired_preference_chat": Format(("messages", "label"), ("system", "tools", "weight"),
                                       _name_types("UnpairedPreference"), preferences.convert_unpaired_chat),
    "score": Format(("sentence1", "sentence2", "score"), ("weight",), _name_types("Contrastive"), labels.convert_score),
    "triplet": Format(("anchor", "positive"), ("negative", "negatives", "weight"), _name_types("Contrastive"),
                      labels.convert_triplet),
    "label_pair": Format(("text", "second", "label"), ("weight",), _name_types("Classification"), labels.convert_label,
                         {"text": ("sentence1", "premise"), "second": ("sentence2", "hypothesis"),
                          "label": ("score",)}),
    "label": Format(("text", "label"), ("second", "weight"), _name_types("Classification"), labels.convert_label,
                    {"text": ("sentence",), "label": ("labels",)}),
    "tags": Format(("words", "tags"), ("weight",), _name_types("TokenClassification"), labels.convert_tags,
                   {"words": ("tokens",), "tags": ("ner_tags",)}),
    "image": Format(("pixels",), ("label", "weight"), _name_types("Image"), labels.convert_image,
                      {"pixels": ("image",)}),
    "messages": Format(("messages",), ("tools", "system", "weight"), _name_types("Chat"), text.convert_messages),
    "sharegpt": Format(("conversations",), ("tools", "system", "weight"), _name_types("Chat"), text.convert_sharegpt,
                       unless=PAIR),
    "alpaca": Format(("instruction", "output"), ("input", "system", "history", "tools", "weight"), _name_types("Chat"),
                     text.convert_alpaca),
    "completion": Format(("prompt", "completion"), ("system", "tools", "weight"), _name_types("Chat", "Completion"),
                         text.convert_completion),
    "prompt": Format(("prompt",), ("reference", "system", "tools"), _name_types("Prompt"), labels.convert_prompt,
                     {"reference": ("answer", "completion")}),
    "text": Format(("text",), ("weight",), _name_types("Text"), text.convert_text, unless=PAIR),
}
COLUMNS = frozenset(column for known in FORMATS.values()
                    for column in (*known.required, *known.optional, *known.also))


@dataclass(frozen=True)
class RowReader:
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
                         if name not in direct and known.kinds <= labels.PROMPT_TYPES}

    def convert(self, values: Mapping[str, Any], format: str, origin: Origin) -> Example | RejectedRow:
        """One row of a known format."""
        known = FORMATS[format]
        named = known.named(values)
        missing = [column for column in known.required if named.get(column) is None]
        if missing:
            needed = ", ".join(known.required)
            return RejectedRow(origin, f"no {missing[0]}", f"the file's format is {format}, which needs {needed}")
        try:
            example = (preferences.convert_choices(named, origin, self.numbering) if format == "choices"
                       else known.convert(named, origin))
            return labels.convert_to_prompt(example, named) if self.formats()[format] else example
        except InvalidRowError as unfit:
            return RejectedRow(origin, unfit.reason, unfit.detail)


ANY = RowReader()


# ---------------------------------------------------------------- a file's rows to examples


def read_examples(rows: Iterable[Row | RejectedRow], format: str = "auto", columns: Columns | None = None,
                  reader: RowReader = ANY) -> Iterator[Example | RejectedRow]:
    """One example or refusal for each row of one file. Raises `DataError` where the columns fit no format, or none
    that `reader` reads."""
    columns = columns or {}
    readable = reader.formats()
    found = None if format == "auto" else format
    if found and found not in readable:
        raise _build_unreadable_error(f"format: {found}", found, reader)
    strangers: list[Row] = []
    for row in rows:
        if isinstance(row, RejectedRow):
            yield row
            continue
        values = _rename_columns(row.values, columns)
        found = found or detect_format(values, readable)
        if found is None:
            strangers.append(row)
            if len(strangers) >= PATIENCE:
                break
            yield RejectedRow(row.origin, "columns of no known format")
        else:
            yield reader.convert(values, found, row.origin)
    if found is None and strangers:
        other = detect_format(_rename_columns(strangers[0].values, columns), FORMATS)
        raise _build_unreadable_error(str(strangers[0].origin), other,
                                      reader) if other else _build_no_format_error(strangers[0], columns, readable)


def detect_format(values: Mapping[str, Any], among: Iterable[str]) -> str | None:
    """The first format whose required columns all have a value."""
    return next((name for name in among if FORMATS[name].fits(values)), None)


def find_source_numbering(rows: Iterable[Row | RejectedRow], columns: Columns) -> Numbering:
    """How the answers of a source number choices, as all of its rows together show it."""
    known = FORMATS["choices"]
    renamed = (_rename_columns(row.values, columns) for row in rows if isinstance(row, Row))
    return find_numbering(known.named(values) for values in renamed if known.fits(values))


def _rename_columns(values: Mapping[str, Any], columns: Columns) -> Mapping[str, Any]:
    """The row under standard names. A column that `columns` claims is not also found under its own name."""
    if not columns:
        return values
    claimed = {str(theirs) for theirs in columns.values()}
    kept = {name: value for name, value in values.items() if name not in claimed}
    return {**kept, **{ours: values.get(str(theirs)) for ours, theirs in columns.items()}}


def _build_unreadable_error(where: str, format: str, reader: RowReader) -> DataError:
    known = FORMATS[format]
    able = [name for name, kinds in reader.others.items() if known.kinds & frozenset(kinds)]
    wanted = ", ".join(sorted(reader.kinds or ()))
    return DataError(f"{where}: rows with {', '.join(known.required)} are of the format {format!r} "
                     f"({', '.join(sorted(known.kinds))}), and the objective reads {wanted}",
                     (f"choose an objective that reads them: {', '.join(able)}; or " if able else "")
                     + "name the columns that you want with `columns:`")


def _build_no_format_error(row: Row, columns: Columns, readable: Iterable[str]) -> DataError:
    there = [name[:40] for name in row.values]
    wrong = [str(theirs) for theirs in columns.values() if str(theirs) not in row.values]
    if wrong:
        return DataError(f"{row.origin}: `columns` names {wrong[0]!r}, which the file has not",
                         suggest_nearest(wrong[0], there))
    known = "; ".join(f"{name} ({', '.join(FORMATS[name].required)})" for name in readable)
    inside = next((name for name, value in row.values.items() if isinstance(value, list) and value
                   and all(isinstance(item, dict) for item in value)), None)
    return DataError(f"{row.origin}: the columns {', '.join(map(repr, there))} fit no known format: {known}",
                     f"the rows seem to lie within {inside!r}: give that list as a file of its own" if inside
                     and len(there) < INSIDE else
                     f"say which column is which, as in `columns: {_guess_columns(list(row.values), readable)}`")


def _guess_columns(there: Sequence[str], readable: Iterable[str]) -> str:
    """Columns for the remedy: those that differ from a format's only by case and outer space, else an example."""
    plain = {name.strip().lower(): name for name in there}
    for format in readable:
        if all(column in plain for column in FORMATS[format].required):
            return "{" + ", ".join(f"{column}: {plain[column]!r}" for column in FORMATS[format].required) + "}"
    return "{prompt: question, completion: answer}"
