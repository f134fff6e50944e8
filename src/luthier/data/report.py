"""The data report: counts of rows that were kept, truncated or rejected, and statistics of the kept ones.

Read `tokenization.py` first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.examples import (
    Origin,
)
from luthier.core.types import TokenizedExample
from luthier.data.images import ImageInput
from luthier.data.overlap import Overlap
from luthier.data.rows import RejectedRow

if TYPE_CHECKING:
    pass

LISTED = 1000  # rejected rows that are listed; all of them are counted
PAIRS = 20  # duplicates and overlaps that are listed
LABELS = 20  # labels that are printed; the file has all of them
BINS = 20
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class PartReport:
    """Counts and statistics of the rows of one part: train, eval or test.

    Args:
        read: rows read. Each is kept or rejected.
        kept: rows that became examples.
        truncated: kept rows that were truncated to `max_length`.
        truncated_rows: file and line of the first of them.
        unmatched_columns: columns in `data.columns` that no row has.
        encoded: number of tokenized examples; more than `kept` if texts were split.
        reasons: number of rejected rows for each reason.
        refused: the first of them, with file, line and detail.
        duplicates: examples whose tokens and weights occurred before; they are kept.
        duplicate_pairs: file and line of the first of them, each with its earlier occurrence.
        trained: tokens with a loss weight, out of `tokens`.
        lengths: quantiles of the tokens of an encoded example.
        histogram: `edges` (one more than `counts`) and `counts` of the same.
        labels: how many rows (words, where words have tags) have each label.
        augmented: how many rows each augmentation changed or added; the added ones are not among `read` and `kept`.
        remarks: number of kept rows for which each rule of `conversation.py` was used.
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
    labels: Mapping[str, int] = field(default_factory=dict)
    augmented: Mapping[str, int] = field(default_factory=dict)
    truncated_rows: tuple[str, ...] = ()
    remarks: Mapping[str, int] = field(default_factory=dict)
    unmatched_columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataReport:
    """The parts by name, and the overlap of eval and test with train."""

    parts: Mapping[str, PartReport]
    overlaps: Mapping[str, Overlap] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain data for `data_report.json`."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def lines(self) -> list[str]:
        """The report in a few sentences."""
        said = []
        for name, part in self.parts.items():
            share = f", {100 * part.trained / part.tokens:.0f}% of {part.tokens} tokens trained" if part.trained else ""
            cut = f", first: {part.truncated_rows[0]}" if part.truncated_rows else ""
            said.append(f"{name}: {part.kept} of {part.read} rows kept, {part.truncated} truncated{cut}{share}")
            where = {r["reason"]: f", first: {r['file']}:{r['line']}" for r in reversed(part.refused)}
            said += [f"{name}: {count} rejected: {reason}{where.get(reason, '')}"
                     for reason, count in part.reasons.items()]
            said += [f"{name}: {count} of {part.kept} rows: {remark}" for remark, count in part.remarks.items()]
            said += [f"{name}: warning: data.columns maps {column!r}, which is in no row"
                     for column in part.unmatched_columns]
            if part.labels and len(part.labels) <= LABELS:
                told = sorted(part.labels.items(), key=lambda pair: (-pair[1], pair[0]))
                said.append(f"{name}: labels {', '.join(f'{label} {count}' for label, count in told)}")
            said += [f"{name}: {count} rows changed or added by {change}" for change, count in part.augmented.items()]
            if part.duplicates:
                first, second = part.duplicate_pairs[0]
                said.append(f"{name}: {part.duplicates} exact duplicates kept, first: {second} of {first}")
        said += [f"{name}: {o.count} prompts also in train, first: {o.pairs[0][0]} and {o.pairs[0][1]}"
                 for name, o in self.overlaps.items() if o.count]
        return said


class RowCounter:
    """Counts rows of one part while they are read."""

    def __init__(self) -> None:
        self.read = self.kept = self.truncated = 0
        self.reasons: Counter[str] = Counter()
        self.refused: list[RejectedRow] = []
        self.cut: list[str] = []
        self.remarks: Counter[str] = Counter()
        self.unmatched: list[str] = []

    def refuse(self, refusal: RejectedRow) -> None:
        self.read += 1
        self.reasons[refusal.reason] += 1
        if len(self.refused) < LISTED:
            self.refused.append(refusal)

    def keep(self, truncated: bool, origin: Origin, encoded: Sequence[TokenizedExample] = ()) -> None:
        """Count a row that became `encoded`."""
        self.remarks.update({remark for one in encoded for remark in one.remarks})
        self.read += 1
        self.kept += 1
        self.truncated += truncated
        if truncated and len(self.cut) < LISTED:
            self.cut.append(str(origin))

    def state(self) -> dict[str, Any]:
        """A JSON value, to continue counting after a resume."""
        return {**vars(self), "refused": [[r.origin.file, r.origin.line, r.reason, r.detail] for r in self.refused]}

    def load(self, state: Mapping[str, Any]) -> None:
        refused = [RejectedRow(Origin(file, line), reason, detail) for file, line, reason, detail in state["refused"]]
        vars(self).update(state, reasons=Counter(state["reasons"]), refused=refused, cut=list(state["cut"]),
                          remarks=Counter(state.get("remarks", {})), unmatched=list(state.get("unmatched", ())))

    def part(self, encoded: Sequence[TokenizedExample]) -> PartReport:
        """The counts so far, with statistics of `encoded`."""
        count, pairs = _count_duplicates(encoded)
        lengths = np.array([example.num_tokens for example in encoded] or [0])
        longest = int(lengths.max()) or 1
        counts, edges = np.histogram(lengths, bins=min(BINS, longest), range=(0, longest))
        return PartReport(
            self.read, self.kept, self.truncated, len(encoded), dict(self.reasons.most_common()),
            tuple({"file": r.origin.file, "line": str(r.origin.line), "reason": r.reason, "detail": r.detail}
                  for r in self.refused),
            count, pairs, int(lengths.sum()), sum(_count_trained(example) for example in encoded),
            {name: float(np.quantile(lengths, at)) for name, at in QUANTILES.items()},
            {"edges": [round(float(edge)) for edge in edges], "counts": counts.tolist()},
            truncated_rows=tuple(self.cut), remarks=dict(self.remarks.most_common()),
            unmatched_columns=tuple(self.unmatched))


def _count_trained(example: TokenizedExample) -> int:
    return sum(len(span.predicted) for span in example.spans)


def _count_duplicates(encoded: Sequence[TokenizedExample]) -> tuple[int, tuple[tuple[str, str], ...]]:
    seen: dict[Any, TokenizedExample] = {}
    count = 0
    pairs: list[tuple[str, str]] = []
    for example in encoded:
        images = tuple(image.digest if isinstance(image, ImageInput) else image for image in example.images)
        before = seen.setdefault((example.spans, example.labeled_spans, images), example)
        if before is not example:
            count += 1
            if len(pairs) < PAIRS:
                pairs.append((str(before.origin), str(example.origin)))
    return count, tuple(pairs)
