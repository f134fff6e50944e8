"""The formats: which columns they need, and how they convert rows to examples. Read `sources.py` first, then
`data/formats/text.py`.

The format of a file is the first of `FORMATS` that the objective can read and whose required columns a row has. Rows
of the
same file that do not match are rejected with a reason. If no format matches, a `DataError` names the columns and a
remedy.

All formats except prompts have an optional column `weight`: the weight of the whole row.
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
PATIENCE = 100  # rows without a matching format after which the file is an error
INSIDE = 4  # a file with fewer columns, one of them a list of objects, probably wraps its rows in that list
PAIR = ("chosen", "rejected")
OPTIONAL_COLUMNS = ("system", "tools", "margin", "weight")  # formats with compared answers


@dataclass(frozen=True)
class Format:
    """A row format: its columns, and the function that converts a row to an example.

    Args:
        kinds: names of the example types that it returns.
        also: alternative names of columns.
        unless: columns that together exclude this format.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    kinds: frozenset[str]
    convert: Callable[[Mapping[str, Any], Origin], Example]
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unless: tuple[str, ...] = ()

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Whether all required columns have a value."""
        mine = self.named(values)
        return (all(mine.get(column) is not None for column in self.required)
                and not (self.unless and all(values.get(column) is not None for column in self.unless)))

    def named(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with standard column names, as `convert` expects them."""
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
FORMATS: dict[str, Format] = {  # in order of precedence: a row that matches several formats has the first of them
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
    """Which types of examples an objective reads, and which types other objectives read.

    Args:
        kinds: names of example types; None: any.
        others: for each objective, the example types that it reads; used only in remedies.
        numbering: whether answer indices in the source start at 0 or at 1; None: read from each row alone.
    """

    kinds: frozenset[str] | None = None
    others: Mapping[str, Collection[str]] = field(default_factory=dict)
    numbering: Callable[[], Numbering] | None = None

    def formats(self) -> dict[str, bool]:
        """The formats that it can read, in order, and whether their examples are converted to prompts."""
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
            return RejectedRow(origin, f"no {missing[0]}", f"the format of the file is {format}, which needs {needed}")
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
    """One example or rejected row for each row of a file. Raises `DataError` if the columns match no format, or none
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
    """Finds from all rows of a source whether answer indices start at 0 or at 1."""
    known = FORMATS["choices"]
    renamed = (_rename_columns(row.values, columns) for row in rows if isinstance(row, Row))
    return find_numbering(known.named(values) for values in renamed if known.fits(values))


def _rename_columns(values: Mapping[str, Any], columns: Columns) -> Mapping[str, Any]:
    """The row with standard column names. A column that `columns` maps is not also available under its own name."""
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
                     + "map the columns with `columns:`")


def _build_no_format_error(row: Row, columns: Columns, readable: Iterable[str]) -> DataError:
    there = [name[:40] for name in row.values]
    wrong = [str(theirs) for theirs in columns.values() if str(theirs) not in row.values]
    if wrong:
        return DataError(f"{row.origin}: `columns` names {wrong[0]!r}, which is not a column of the file",
                         suggest_nearest(wrong[0], there))
    known = "; ".join(f"{name} ({', '.join(FORMATS[name].required)})" for name in readable)
    inside = next((name for name, value in row.values.items() if isinstance(value, list) and value
                   and all(isinstance(item, dict) for item in value)), None)
    return DataError(f"{row.origin}: the columns {', '.join(map(repr, there))} match no known format: {known}",
                     f"the rows seem to be inside the column {inside!r}: write that list to a separate file" if inside
                     and len(there) < INSIDE else
                     f"map the columns, as in `columns: {_guess_columns(list(row.values), readable)}`")


def _guess_columns(there: Sequence[str], readable: Iterable[str]) -> str:
    """A `columns` mapping for the remedy: columns that differ from a format's only by case and outer spaces, else an
    example."""
    plain = {name.strip().lower(): name for name in there}
    for format in readable:
        if all(column in plain for column in FORMATS[format].required):
            return "{" + ", ".join(f"{column}: {plain[column]!r}" for column in FORMATS[format].required) + "}"
    return "{prompt: question, completion: answer}"
