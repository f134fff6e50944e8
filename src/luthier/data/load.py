"""From the `data:` part of a recipe to encoded examples and a report. Read `encode.py` and `report.py` first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from luthier.core.errors import DataError
from luthier.core.examples import Example, Worded
from luthier.core.protocols import Tokenizer
from luthier.core.types import Encoded
from luthier.data import sources
from luthier.data.config import DataConfig, Source
from luthier.data.encode import cut, spell
from luthier.data.formats import examples
from luthier.data.loader import Mix
from luthier.data.report import DataReport, Overlap, Tally, overlap
from luthier.data.sources import Refusal

Progress = Callable[[str, int], None]
TICK = 200  # rows between two words of progress


@dataclass(frozen=True)
class Datasets:
    """What a run trains and evaluates on.

    Args:
        train, eval, test: encoded; a split text has several entries.
        eval_examples, test_examples: what those were made of, to generate answers from their prompts.
        report: what became of every row.
        mix: for consecutive runs of `train`, how many and how often they are seen in an epoch; for `Loader`.
        labels: the classes of the train rows, by the order of their numbers.
        kinds: the names of the types of all examples.
    """

    train: list[Encoded]
    eval: list[Encoded]
    test: list[Encoded]
    eval_examples: list[Example]
    test_examples: list[Example]
    report: DataReport
    mix: Mix = ()
    labels: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset()


def load(config: DataConfig, tokenizer: Tokenizer, *, seed: int, progress: Progress | None = None) -> Datasets:
    """Read, encode and report all that `config` names. With `streaming`, `train` stays empty: `Stream` reads it.

    Args:
        seed: decides which rows are held out where `eval` is a fraction.
        progress: told (part, rows read so far) now and then.
    """
    train, evaluated, tested = _Part("train"), _Part("eval"), _Part("test")
    if config.streaming and isinstance(config.eval, float):
        raise DataError(f"eval: {config.eval} holds out a part of rows that are streamed, never known all at once",
                        "give a file to evaluate on, or do not stream")
    mix: list[tuple[int, float]] = []
    for source in () if config.streaming else config.train:
        before = len(train.encoded)
        held = config.eval if isinstance(config.eval, float) else 0.0
        _take(source, config, tokenizer, train, evaluated, held, seed + len(mix), progress)
        mix.append((len(train.encoded) - before, source.weight))
    for part, given in ((evaluated, config.eval), (tested, config.test)):
        if isinstance(given, Source):
            _take(given, config, tokenizer, part, part, 0.0, seed, progress)
    parts = {part.name: part for part in (train, evaluated, tested) if part.tally.read}
    for part in parts.values():
        part.demand()
    report = DataReport({name: part.tally.part(part.encoded) for name, part in parts.items()},
                        _overlaps(train, evaluated, tested))
    return Datasets(train.encoded, evaluated.encoded, tested.encoded, evaluated.examples, tested.examples,
                    report, tuple(mix), kinds=frozenset(type(example).__name__ for part in parts.values()
                                                        for example in part.examples))


def demand(config: DataConfig) -> None:
    """A `DataError` where a file that `config` names is not there; nothing is read."""
    for source in (*config.train, config.eval, config.test):
        if isinstance(source, Source):
            sources.demand(source.path)


class _Part:
    """Train, eval or test while it is read."""

    def __init__(self, name: str) -> None:
        self.name, self.tally = name, Tally()
        self.encoded: list[Encoded] = []
        self.examples: list[Example] = []

    def demand(self) -> None:
        if self.tally.refused and not self.encoded:
            first = "\n".join(f"  {refusal}" for refusal in self.tally.refused[:3])
            raise DataError(f"none of the {self.tally.read} {self.name} rows can be used; the first:\n{first}",
                            "mend the rows, or say with `format:` and `columns:` how they are written")


def _take(source: Source, config: DataConfig, tokenizer: Tokenizer, part: _Part, held_part: _Part, held: float,
          seed: int, progress: Progress | None) -> None:
    """Read one source into `part`; the share `held` of its usable rows goes into `held_part` instead."""
    usable: list[tuple[Example, list[Encoded], bool]] = []
    for count, example in enumerate(rows(source, config), 1):
        if progress and count % TICK == 0:
            progress(part.name, count)
        if isinstance(example, Refusal):
            part.tally.refuse(example)
            continue
        found = encoded(example, tokenizer, config)
        if isinstance(found, Refusal):
            part.tally.refuse(found)
        else:
            usable.append((example, *found))
    out = _held_out(len(usable), held, seed)
    for index, (example, pieces, truncated) in enumerate(usable):
        to = held_part if index in out else part
        to.tally.keep(truncated)
        to.examples.append(example)
        to.encoded += pieces


def _held_out(count: int, share: float, seed: int) -> set[int]:
    """Which rows to hold out: the same for the same seed; at least one, and never all."""
    if not share or count < 2:
        return set()
    chosen = np.random.default_rng([seed, 1]).permutation(count)[:min(max(1, round(share * count)), count - 1)]
    return set(chosen.tolist())


def rows(source: Source, config: DataConfig) -> Iterator[Example | Refusal]:
    """Every row of `source` as an example or a refusal, in order, at most `limit` of them."""
    files = sources.read(source.path, split=source.split, subset=source.subset, document=source.document,
                         header=config.header, streaming=config.streaming)
    found = (example for _, lines in files for example in examples(lines, config.format, config.columns))
    return islice(found, config.limit)


def encoded(example: Example, tokenizer: Tokenizer, config: DataConfig) -> tuple[list[Encoded], bool] | Refusal:
    """`encode`, and whether the end was cut off."""
    assert isinstance(example, Worded), "only words are predicted so far"
    texts = spell(example, tokenizer, config)
    if isinstance(texts, Refusal):
        return texts
    found: list[Encoded] = []
    for text in texts:
        pieces = cut(text, config, tokenizer.eos_token_id)
        if isinstance(pieces, Refusal):
            return pieces
        found += pieces
    return found, config.overlong == "truncate" and any(len(text.ids) > config.max_length for text in texts)


def _overlaps(train: _Part, *others: _Part) -> dict[str, Overlap]:
    return {other.name: overlap(train.examples, other.examples)
            for other in others if train.examples and other.examples}
