"""Training on rows that do not fit in memory. Read `batch_source.py` first.

Every epoch reads the sources again, one row of each in turn. Examples are shuffled in blocks. The cursor is the number
of rows
before the current block and the number of examples taken from the block: resuming skips the former and reads the block
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from luthier.core.errors import DataError
from luthier.core.examples import Example, Origin
from luthier.core.protocols import Tokenizer
from luthier.core.types import Batch, TokenizedExample
from luthier.data.augmentation import MixupAugmentation, TextAugmentation
from luthier.data.batch_source import build_changed_data_error
from luthier.data.config import DataConfig, Source
from luthier.data.encoding import encode_with_truncation
from luthier.data.label_encoding import encode_labels, explain_no_streaming, fit_label_encoder
from luthier.data.load import ANY_DATASET, DatasetSpec, build_no_rows_error, iterate_examples
from luthier.data.packing import pack_examples
from luthier.data.report import DataReport, RowCounter
from luthier.data.rows import RejectedRow
from luthier.data.transforms import apply_random


class StreamingBatchSource:
    """An endless sequence of steps over rows that are read again in every epoch; a `core.protocols.BatchSource`.

    Args:
        block: examples that are shuffled together, and kept in memory.

    `steps_per_epoch` is 0, because the number of rows is unknown. `tally` counts the rows of the first epoch.
    """

    steps_per_epoch = 0

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, batch_size: int, max_tokens: int | None,
                 seed: int = 0, block: int = 4096, use: DatasetSpec = ANY_DATASET) -> None:
        if any(isinstance(change, TextAugmentation | MixupAugmentation) for change in config.augment):
            raise DataError("data.augment has no effect with data.streaming: streamed rows are not augmented",
                            "omit data.streaming")
        self.config, self.use = use.adapt_config(config), use
        self.tokenizer, self.seed, self.block = tokenizer, seed, block
        self.known = fit_label_encoder((), use.classes or None, config)
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.tally = RowCounter()
        self._begin(0, 0)

    @property
    def fingerprint(self) -> str:
        """A digest of the settings and of name and size of the files; their rows are not read."""
        sizes = [file.stat().st_size for source in self.config.train for file in sorted(Path(source.path).rglob("*"))
                 or [Path(source.path)] if file.is_file()]
        said = repr((self.config.model_dump_json(), sizes, self.seed, self.block))
        return hashlib.blake2b(said.encode(), digest_size=12).hexdigest()

    def _begin(self, epoch: int, row: int) -> None:
        """Move to row `row` of an epoch, with an empty block."""
        self.epoch, self.row, self.next_row, self.taken = epoch, row, row, 0
        self.queue: list[TokenizedExample] = []
        self._rows = islice(self._epoch(epoch), row, None)

    def _epoch(self, epoch: int) -> Iterator[tuple[Example | RejectedRow, DataConfig]]:
        """The rows of an epoch with their source's settings, one row of each source in turn, repeated by the source's
        weight."""
        open_ = [self._source(source, np.random.default_rng([self.seed, epoch, index]))
                 for index, source in enumerate(self.config.train)]
        while open_:
            for source in list(open_):
                row = next(source, None)
                if row is None:
                    open_.remove(source)
                else:
                    yield row

    def _source(self, source: Source, rng: np.random.Generator) -> Iterator[tuple[Example | RejectedRow,
                                                                                     DataConfig]]:
        whole, config = int(source.weight), self.config.for_source(source)
        for _ in range(whole):
            yield from ((row, config) for row in iterate_examples(source, self.config, self.use.reader))
        if source.weight > whole:
            again = iterate_examples(source, self.config, self.use.reader)
            yield from ((row, config) for row in again if rng.random() < source.weight - whole)

    def _refill(self) -> None:
        """The next block, shuffled by the seed and its position; empty at the end of the epoch."""
        self.row, self.taken, self.queue = self.next_row, 0, []
        for example, config in self._rows:
            self.next_row += 1
            found = example if isinstance(example, RejectedRow) else self._encoded(example, config)
            if isinstance(found, RejectedRow):
                self._count(found)
            else:
                self._count(found[1], example.origin, found[0])
                self.queue += found[0]
            if len(self.queue) >= self.block:
                break
        if self.config.shuffle:
            order = np.random.default_rng([self.seed, self.epoch, self.row]).permutation(len(self.queue))
            self.queue = [self.queue[i] for i in order]

    def _encoded(self, example: Example, config: DataConfig) -> tuple[list[TokenizedExample], bool] | RejectedRow:
        reason = explain_no_streaming(example, self.use.classes, self.config)
        if reason:
            raise DataError(f"{example.origin}: such rows cannot be streamed: {reason}", "omit data.streaming")
        made = encode_with_truncation(example, self.tokenizer, config, self.use.reserved_tokens, self.use.masking)
        if isinstance(made, RejectedRow):
            return made
        found = [encode_labels(example, one, self.known) for one in made[0]]
        refused = next((one for one in found if isinstance(one, RejectedRow)), None)
        return refused or ([one for one in found if isinstance(one, TokenizedExample)], made[1])

    def _count(self, outcome: RejectedRow | bool, origin: Origin | None = None,
               encoded: Sequence[TokenizedExample] = ()) -> None:
        if self.epoch == 0 and self.tally.read < self.next_row:
            if isinstance(outcome, RejectedRow):
                self.tally.refuse(outcome)
            elif origin:
                self.tally.keep(outcome, origin, encoded)

    def _batch(self) -> list[TokenizedExample]:
        """Returns up to `batch_size` examples of this epoch."""
        chosen: list[TokenizedExample] = []
        while len(chosen) < self.batch_size:
            if self.taken >= len(self.queue):
                self._refill()
                if not self.queue:
                    break
            more = self.queue[self.taken:self.taken + self.batch_size - len(chosen)]
            chosen += [apply_random(one, self.seed, self.epoch, self.row, self.taken + i) for i, one in enumerate(more)]
            self.taken += len(more)
        return chosen

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        chosen = self._batch()
        if not chosen:
            self._begin(self.epoch + 1, 0)
            chosen = self._batch()
        if not chosen and not self.tally.read:
            raise build_no_rows_error(self.config.train)
        if not chosen:
            first = "\n".join(f"  {refusal}" for refusal in self.tally.refused[:3])
            raise DataError(f"none of the train rows can be used; the first:\n{first}",
                            "fix the rows, or set `format:` and `columns:`")
        return pack_examples(chosen, self.max_tokens)

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "row": self.row, "taken": self.taken, "data": self.fingerprint,
                "tally": self.tally.state()}

    def report(self, others: DataReport) -> DataReport:
        """The report on the rows of the first epoch that were read so far, added to the report of other parts. It has
        no lengths and no duplicates, because rows are not kept."""
        return replace(others, parts={"train": replace(self.tally.part([]), lengths={}, histogram={}), **others.parts})

    def load(self, state: Mapping[str, Any]) -> None:
        if state["data"] != self.fingerprint:
            raise build_changed_data_error(state["data"], self.fingerprint)
        if "tally" in state:
            self.tally.load(state["tally"])
        self._begin(state["epoch"], state["row"])
        self._refill()
        self.taken = state["taken"]
