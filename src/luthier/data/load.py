"""Loads the `data:` section of a recipe: tokenized examples and a report.

Read `encoding.py` and `label_encoding.py` first.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, islice

import numpy as np

from luthier.core.errors import DataError
from luthier.core.examples import ClassificationExample, Example, ImageExample, TokenClassificationExample
from luthier.core.protocols import Tokenizer
from luthier.core.types import TokenizedExample
from luthier.data import sources
from luthier.data.answer_choices import Numbering
from luthier.data.augmentation import MixupAugmentation, TextAugmentation, augment_examples
from luthier.data.batch_source import Mix
from luthier.data.config import DataConfig, Source
from luthier.data.encoding import encode_with_truncation
from luthier.data.formats.registry import RowReader, find_source_numbering, read_examples
from luthier.data.label_encoding import (
    LabelEncoder,
    add_mismatched_completions,
    count_classes,
    encode_labels,
    fit_label_encoder,
    sum_class_weights,
)
from luthier.data.masking import MaskingConfig
from luthier.data.mixup import draw_pairs, mix_examples
from luthier.data.overlap import Overlap, count_overlap
from luthier.data.report import DataReport, PartReport, RowCounter
from luthier.data.rows import RejectedRow, Row, Rows
from luthier.data.tokenization import is_conversation, uses_chat_template
from luthier.data.transforms import apply_fixed, disable_augmentation

Progress = Callable[[str, int], None]
TICK = 200  # rows between two progress reports
CLASSED = {ClassificationExample, TokenClassificationExample, ImageExample}  # kinds of example that have classes


@dataclass(frozen=True)
class DatasetSpec:
    """How an objective and a model use the rows.

    Args:
        reads: names of the example types that the objective reads; None: any.
        classes: see `fit_label_encoder`.
        flat: whether the model cannot compute a prompt once for several answers.
        reserved_tokens: number of tokens that a prompt must leave free for its answer.
        others: for each objective, the example types that it reads; used in the error if this one cannot read the rows.
        masking: how tokens of each document are masked; None: no masking.
    """

    reads: frozenset[str] | None = None
    classes: tuple[str, ...] | None = ()
    flat: bool = False
    reserved_tokens: int = 1
    others: Mapping[str, Collection[str]] = field(default_factory=dict)
    masking: MaskingConfig | None = None

    @property
    def reader(self) -> RowReader:
        return RowReader(self.reads, self.others)

    def adapt_config(self, config: DataConfig) -> DataConfig:
        """The settings, changed where the model requires it."""
        if self.flat and not config.is_encoder_decoder:
            return config.model_copy(update={"share_prompt": False})
        return config


ANY_DATASET = DatasetSpec()


@dataclass(frozen=True)
class Datasets:
    """The rows that a run trains and evaluates on.

    Args:
        train, eval, test: tokenized examples; a split text has several entries.
        eval_examples, test_examples: the examples before tokenization, to generate answers to their prompts.
        report: counts of kept, truncated and rejected rows.
        mix: for consecutive parts of `train`, the number of examples and how often an epoch includes them.
        labels: the classes of the training rows, in the order of their indices.
        counts: for each class, the number of labels of the training rows, multiplied by row weights and source weights.
        kinds: names of the types of all examples.
        use: how they are used, with the classes found; for `StreamingBatchSource`.
        conversations: whether any row uses the chat template; for streamed rows, whether one could.
    """

    train: list[TokenizedExample]
    eval: list[TokenizedExample]
    test: list[TokenizedExample]
    eval_examples: list[Example]
    test_examples: list[Example]
    report: DataReport
    mix: Mix = ()
    labels: tuple[str, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    kinds: frozenset[str] = frozenset()
    use: DatasetSpec = ANY_DATASET
    conversations: bool = False


def read_datasets(config: DataConfig, tokenizer: Tokenizer, *, seed: int, reads: frozenset[str] | None = None,
                  classes: tuple[str, ...] | None = (), flat: bool = False, reserved_tokens: int = 1,
                  others: Mapping[str, Collection[str]] | None = None, masking: MaskingConfig | None = None,
                  progress: Progress | None = None) -> Datasets:
    """Read, encode and report all sources of `config`. With `streaming`, `train` is empty: `StreamingBatchSource`
    reads it.

    Args:
        tokenizer: of the base; for images, the image processor.
        seed: selects the held-out rows if `eval` is a fraction, and the augmentations.
        reads, classes, flat, reserved_tokens, others, masking: see `DatasetSpec`.
        progress: called with (part, rows read so far) at intervals.
    """
    use = DatasetSpec(reads, classes, flat, reserved_tokens, others or {}, masking)
    config = use.adapt_config(config)
    reading = _DatasetReader(config, tokenizer, seed, use, progress)
    train, evaluated, tested = _PartReader("train"), _PartReader("eval"), _PartReader("test")
    if config.streaming and isinstance(config.eval, float):
        raise DataError(f"data.eval: the fraction {config.eval} of the training rows cannot be held out, because "
                        f"data.streaming is set",
                        "set data.eval to a file, or omit data.streaming")
    held = config.eval if isinstance(config.eval, float) else 0.0
    for number, source in enumerate(() if config.streaming else config.train):
        reading.take(source, number, train, evaluated, held, seed + number)
    if not config.streaming:
        if not train.kept and not train.tally.read:
            raise build_no_rows_error(config.train)
        reading.augment(train)
    for part, given in ((evaluated, config.eval), (tested, config.test)):
        if isinstance(given, Source):
            reading.take(given, 0, part, part, 0.0, seed)
            if not part.kept and not part.tally.read:
                raise build_no_rows_error([given])
    parts = {part.name: part for part in (train, evaluated, tested) if part.tally.read or part.kept}
    what = fit_label_encoder(train.examples or evaluated.examples + tested.examples, use.classes, config)
    everything = [example for part in parts.values() for example in part.examples]
    for part in parts.values():
        reading.encode_labels(part, what, everything)
        part.demand()
        part.tally.unmatched = [str(theirs) for theirs in config.columns.values()
                                if part.seen and str(theirs) not in part.seen]
    reading.mix(train, what)
    report = DataReport({name: part.report() for name, part in parts.items()},
                        _count_overlaps(train, evaluated, tested))
    kinds = {type(example) for part in parts.values() for example in part.examples}
    classes = what.classes or () if kinds & CLASSED else ()
    mix = [(sum(len(kept.encoded) for kept in train.kept if kept.source == number), source.weight)
           for number, source in enumerate(config.train)]
    conversations = any(is_conversation(example, tokenizer, config) for example in everything) or (
        config.streaming and "ChatExample" in (reads or ()) and uses_chat_template(tokenizer, config))
    return Datasets(train.encoded, evaluated.encoded, tested.encoded, evaluated.examples, tested.examples, report,
                    () if config.streaming else tuple(mix), classes, train.counts(classes, config.train),
                    frozenset(kind.__name__ for kind in kinds), replace(use, classes=what.classes), conversations)


def build_no_rows_error(sources: Sequence[Source]) -> DataError:
    """The error for files without rows."""
    return DataError(f"{', '.join(source.path for source in sources)}: the file has no rows",
                     "give a file with rows (in a table, below the header line)")


def check_sources(config: DataConfig) -> None:
    """Raises `DataError` if a file of `config` does not exist. Reads nothing."""
    for source in (*config.train, config.eval, config.test):
        if isinstance(source, Source):
            sources.check_source(source.path)


@dataclass(frozen=True)
class _KeptRow:
    """A kept row: its example and its tokens.

    Args:
        cut: whether it was truncated.
        source: the index of its source.
        change: the augmentation that changed it.
        added: whether it is a copy that an augmentation added.
    """

    example: Example
    encoded: list[TokenizedExample]
    cut: bool
    source: int
    change: str = ""
    added: bool = False


class _PartReader:
    """Reads one part: train, eval or test."""

    def __init__(self, name: str) -> None:
        self.name, self.tally = name, RowCounter()
        self.kept: list[_KeptRow] = []
        self.seen: set[str] = set()  # column names of the files

    @property
    def encoded(self) -> list[TokenizedExample]:
        return [one for kept in self.kept for one in kept.encoded]

    @property
    def examples(self) -> list[Example]:
        return [kept.example for kept in self.kept]

    def report(self) -> PartReport:
        """The report on its rows."""
        return replace(self.tally.part([apply_fixed(one) for one in self.encoded]),
                       labels=count_classes(kept.example for kept in self.kept if not kept.added),
                       augmented=dict(Counter(kept.change for kept in self.kept if kept.change)))

    def counts(self, classes: Sequence[str], sources: Sequence[Source]) -> dict[str, float]:
        """See `Datasets.counts`; empty if there are no classes."""
        return sum_class_weights(((one, sources[kept.source].weight) for kept in self.kept for one in kept.encoded),
                                 classes) if classes else {}

    def demand(self) -> None:
        if self.tally.refused and not self.kept:
            first = "\n".join(f"  {refusal}" for refusal in self.tally.refused[:3])
            raise DataError(f"none of the {self.tally.read} {self.name} rows can be used; the first:\n{first}",
                            "fix the rows, or set `format:` and `columns:`")


@dataclass(frozen=True)
class _DatasetReader:
    """Reads all parts of one `data:` section."""

    config: DataConfig
    tokenizer: Tokenizer
    seed: int
    use: DatasetSpec
    progress: Progress | None

    def take(self, source: Source, number: int, part: _PartReader, held_part: _PartReader, held: float,
             seed: int) -> None:
        """Read one source into `part`. The fraction `held` of its usable rows goes into `held_part` instead."""
        usable: list[_KeptRow] = []
        config = self.config.for_source(source)
        for count, example in enumerate(iterate_examples(source, self.config, self.use.reader, part.name, part.seen),
                                        1):
            if self.progress and count % TICK == 0:
                self.progress(part.name, count)
            if isinstance(example, RejectedRow):
                part.tally.refuse(example)
                continue
            found = self.encode(example, config)
            if isinstance(found, RejectedRow):
                part.tally.refuse(found)
            else:
                usable.append(_KeptRow(example, *found, number))
        out = _choose_held_out(len(usable), held, seed)
        for index, kept in enumerate(usable):
            (held_part if index in out else part).kept.append(kept)

    def encode(self, example: Example, config: DataConfig) -> tuple[list[TokenizedExample], bool] | RejectedRow:
        return encode_with_truncation(example, self.tokenizer, config, self.use.reserved_tokens, self.use.masking)

    def augment(self, part: _PartReader) -> None:
        """Augment the rows. If a changed row cannot be encoded, the original is kept; such a copy is not added."""
        changes = [change for change in self.config.augment if isinstance(change, TextAugmentation)]
        read, part.kept = part.kept, []
        for number, kept in enumerate(read):
            for index, (change, example) in enumerate(augment_examples(kept.example, number, changes, self.seed)):
                config = self.config.for_source(self.config.train[kept.source])
                found = self.encode(example, config) if change else None
                if found is None or (isinstance(found, RejectedRow) and not index):
                    part.kept.append(kept)
                elif not isinstance(found, RejectedRow):
                    part.kept.append(_KeptRow(example, *found, kept.source, change, added=index > 0))

    def mix(self, part: _PartReader, what: LabelEncoder) -> None:
        """Apply mixup. Labels are class indices at this point."""
        for number, change in enumerate(self.config.augment):
            if not isinstance(change, MixupAugmentation):
                continue
            read, part.kept = part.kept, []
            for kept, (own, *copies) in zip(read, draw_pairs([kept.example for kept in read], change, self.seed,
                                                             number),
                                            strict=True):
                made = [replace(kept, change=change.name, added=place > 0 or kept.added, encoded=[mix_examples(
                    kept.encoded[0], read[drawn.row].encoded[0], drawn.share, what)]) if drawn else kept
                    for place, drawn in enumerate((own, *copies))]
                part.kept += made

    def encode_labels(self, part: _PartReader, what: LabelEncoder, everything: Sequence[Example]) -> None:
        """Add the values that depend on all training rows, and count the rows."""
        beside = add_mismatched_completions(part.examples, everything, self.tokenizer, self.config)
        read, part.kept = part.kept, []
        for place, kept in enumerate(read):
            own = kept.encoded if part.name == "train" else [disable_augmentation(one) for one in kept.encoded]
            made = [encode_labels(kept.example, beside.get(place, one), what) for one in own]
            refused = next((one for one in made if isinstance(one, RejectedRow)), None)
            if refused is None:
                part.kept.append(replace(kept, encoded=[one for one in made if isinstance(one, TokenizedExample)]))
            if not kept.added:
                part.tally.refuse(refused) if refused else part.tally.keep(
                    kept.cut, kept.example.origin, kept.encoded)


def _choose_held_out(count: int, share: float, seed: int) -> set[int]:
    """The rows to hold out: the same for the same seed; at least one, never all."""
    if not share or count < 2:
        return set()
    chosen = np.random.default_rng([seed, 1]).permutation(count)[:min(max(1, round(share * count)), count - 1)]
    return set(chosen.tolist())


def iterate_examples(source: Source, config: DataConfig, reader: RowReader, part: str = "train",
                     seen: set[str] | None = None) -> Iterator[Example | RejectedRow]:
    """Every row of `source` as an example or a rejected row, in order, at most `max_samples`. The column names of the
    file are added to `seen`."""
    config = config.for_source(source)

    def files() -> Iterator[tuple[str, Rows]]:
        return sources.read_source(source.path, split=source.split, subset=source.subset, part=part,
                                   document=source.document,
                                   header=config.header, streaming=config.streaming)

    @cache
    def numbering() -> Numbering:  # reads the rows a second time, only if an answer is an index
        if source.first_choice != "auto":
            return Numbering(source.first_choice, given=True)
        return find_source_numbering(chain.from_iterable(lines for _, lines in files()), config.columns)

    reader = replace(reader, numbering=numbering)
    left = config.max_samples or sys.maxsize
    for _, lines in files():
        lines = lines if seen is None else _collect_columns(lines, seen)
        for example in read_examples(islice(lines, left), config.format, config.columns, reader):
            left -= 1
            yield example
        if not left:
            return


def _collect_columns(lines: Iterable[Row | RejectedRow], seen: set[str]) -> Iterator[Row | RejectedRow]:
    for row in lines:
        if not isinstance(row, RejectedRow):
            seen.update(row.values)
        yield row


def _count_overlaps(train: _PartReader, *others: _PartReader) -> dict[str, Overlap]:
    return {other.name: count_overlap(train.examples, other.examples)
            for other in others if train.examples and other.examples}
