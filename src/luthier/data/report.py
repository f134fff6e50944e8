"""What became of every row: kept, truncated or refused, and what the kept ones are like. Read `encode.py` first."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.examples import ChatExample, CompletionExample, Example, TextExample
from luthier.core.protocols import Tokenizer
from luthier.core.types import Encoded
from luthier.data.sources import Refusal

if TYPE_CHECKING:
    from rich.text import Text

LISTED = 1000  # refusals named one by one; all of them are counted
PAIRS = 20  # duplicates and overlaps named one by one
BINS = 20
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Part:
    """What became of the rows of one part: train, eval or test.

    Args:
        read: rows met. Each is kept or refused.
        kept: rows that became examples.
        truncated: of the kept, those that lost their end to `max_length`.
        encoded: examples that they became; more than `kept` where texts were split.
        reasons: how many rows were refused for each reason.
        refused: the first of them, with file, line and detail.
        duplicates: examples whose tokens and weights occurred before; they are kept.
        duplicate_pairs: where the first of them stand, each with where it occurred before.
        trained: tokens that are predicted with a weight, out of `tokens`.
        lengths: quantiles of the tokens of an encoded example.
        histogram: `edges` (one more than `counts`) and `counts` of the same.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    encoded: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[Mapping[str, str], ...] = ()
    duplicates: int = 0
    duplicate_pairs: tuple[tuple[str, str], ...] = ()
    tokens: int = 0
    trained: int = 0
    lengths: Mapping[str, float] = field(default_factory=dict)
    histogram: Mapping[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Overlap:
    """Examples of one part whose prompt, but for case, space and punctuation, is also in the train part."""

    count: int = 0
    pairs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DataReport:
    """The parts by name, and for eval and test how much of them is in train."""

    parts: Mapping[str, Part]
    overlaps: Mapping[str, Overlap] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data for `data_report.json`."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def lines(self) -> list[str]:
        """The report in a few sentences."""
        said = []
        for name, part in self.parts.items():
            share = f", {100 * part.trained / part.tokens:.0f}% of {part.tokens} tokens trained" if part.tokens else ""
            said.append(f"{name}: {part.kept} of {part.read} rows kept, {part.truncated} truncated{share}")
            where = {r["reason"]: f", the first {r['file']}:{r['line']}" for r in reversed(part.refused)}
            said += [f"{name}: {count} refused: {reason}{where.get(reason, '')}"
                     for reason, count in part.reasons.items()]
            if part.duplicates:
                first, second = part.duplicate_pairs[0]
                said.append(f"{name}: {part.duplicates} exact duplicates kept, the first {second} of {first}")
        said += [f"{name}: {o.count} prompts also in train, the first {o.pairs[0][0]} and {o.pairs[0][1]}"
                 for name, o in self.overlaps.items() if o.count]
        return said


class Tally:
    """Counts rows of one part while they are read."""

    def __init__(self) -> None:
        self.read = self.kept = self.truncated = 0
        self.reasons: Counter[str] = Counter()
        self.refused: list[Refusal] = []

    def refuse(self, refusal: Refusal) -> None:
        self.read += 1
        self.reasons[refusal.reason] += 1
        if len(self.refused) < LISTED:
            self.refused.append(refusal)

    def keep(self, truncated: bool) -> None:
        self.read += 1
        self.kept += 1
        self.truncated += truncated

    def part(self, encoded: Sequence[Encoded]) -> Part:
        """The counts so far, and what `encoded` is like."""
        count, pairs = _duplicates(encoded)
        lengths = np.array([example.tokens for example in encoded] or [0])
        longest = int(lengths.max()) or 1
        counts, edges = np.histogram(lengths, bins=min(BINS, longest), range=(0, longest))
        return Part(
            self.read, self.kept, self.truncated, len(encoded), dict(self.reasons.most_common()),
            tuple({"file": r.origin.file, "line": str(r.origin.line), "reason": r.reason, "detail": r.detail}
                  for r in self.refused),
            count, pairs, int(lengths.sum()), sum(_trained(example) for example in encoded),
            {name: float(np.quantile(lengths, at)) for name, at in QUANTILES.items()},
            {"edges": [round(float(edge)) for edge in edges], "counts": counts.tolist()})


def _trained(example: Encoded) -> int:
    return sum(1 for piece in example.pieces for i, weight in enumerate(piece.weights)
               if weight and (i or piece.parent >= 0))


def _duplicates(encoded: Sequence[Encoded]) -> tuple[int, tuple[tuple[str, str], ...]]:
    seen: dict[Any, Encoded] = {}
    count = 0
    pairs: list[tuple[str, str]] = []
    for example in encoded:
        before = seen.setdefault(example.pieces, example)
        if before is not example:
            count += 1
            if len(pairs) < PAIRS:
                pairs.append((str(before.origin), str(example.origin)))
    return count, tuple(pairs)


def overlap(train: Iterable[Example], other: Iterable[Example]) -> Overlap:
    """How many prompts of `other` are in `train` too."""
    asked: dict[str, Example] = {}
    for example in train:
        asked.setdefault(question(example), example)
    asked.pop("", None)
    met = [(asked[words], example) for example in other if (words := question(example)) in asked]
    return Overlap(len(met), tuple((str(a.origin), str(b.origin)) for a, b in met[:PAIRS]))


def question(example: Example) -> str:
    """What is asked, without case, punctuation and extra space: all but the system prompt before the last answer."""
    if isinstance(example, ChatExample):
        last = max((i for i, m in enumerate(example.messages) if m.role == "assistant"), default=len(example.messages))
        words = " ".join(m.content for m in example.messages[:last] if m.role != "system")
    else:
        words = example.prompt if isinstance(example, CompletionExample) else _words(example)
    return " ".join(re.sub(r"[^\w\s]", " ", words.casefold()).split())


def _words(example: Example) -> str:
    return example.text if isinstance(example, TextExample) else ""


# ---------------------------------------------------------------- pictures


def preview(encoded: Encoded, tokenizer: Tokenizer) -> Text:
    """The example's words as the model meets them: what is trained in green, the rest dim."""
    from rich.text import Text

    shown = Text()
    for index, piece in enumerate(encoded.pieces):
        if index:
            shown.append(f"\n--- continues piece {piece.parent}\n", style="dim italic")
        flags = [bool(weight) and (i > 0 or piece.parent >= 0) for i, weight in enumerate(piece.weights)]
        for trained, ids in _runs(piece.ids, flags):
            shown.append(tokenizer.decode(ids), style="green" if trained else "dim")
    return shown


def _runs(ids: Sequence[int], flags: Sequence[bool]) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for token, flag in zip(ids, flags, strict=True):
        if not runs or runs[-1][0] != flag:
            runs.append((flag, []))
        runs[-1][1].append(token)
    return runs


def length_picture(report: DataReport, path: str | Path) -> None:
    """The token lengths of every part as a PNG of histograms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(report.parts)), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, part) in enumerate(report.parts.items()):
        axes = figure.add_subplot(len(report.parts), 1, index + 1)
        axes.stairs(part.histogram["counts"], part.histogram["edges"], fill=True)
        axes.set(title=f"{name}: {part.encoded} examples, {part.tokens} tokens",
                 xlabel="tokens in an example", ylabel="examples")
        axes.axvline(part.lengths["median"], color="black", linewidth=1)
    figure.savefig(path, dpi=120)
