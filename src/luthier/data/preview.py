"""An example as colored text: which tokens are trained, and the label of each span. Read `core/types.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from luthier.core.protocols import Tokenizer
from luthier.core.types import LabeledSpan, TokenizedExample, TokenSpan

if TYPE_CHECKING:
    from rich.text import Text


def format_preview(encoded: TokenizedExample, tokenizer: Tokenizer, labels: Sequence[str] = ()) -> Text:
    """The example as the model reads it: trained text in green, other text dim. Each span starts with its parent and
    its label; each tagged word is followed by its tag.

    Args:
        labels: the names of the classes.
    """
    from rich.text import Text

    shown = Text()
    judged = {item.span_index: item for item in encoded.labeled_spans}
    for index, span in enumerate(encoded.spans):
        item = judged.get(index)
        said = [*([f"continues span {span.parent}"] if span.parent >= 0 else []),
                *([f"span {index}"] if index and span.parent < 0 else []),
                *([_format_label(item, labels)] if item else [])]
        if said:
            shown.append(("\n" if index else "") + f"--- {', '.join(said)}\n", style="dim italic")
        if encoded.images:
            shown.append(f"[image, {' x '.join(map(str, encoded.images[index].shape))}]", style="dim")
            continue
        for trained, start, stop in _find_token_runs(span):
            shown.append(tokenizer.decode(span.ids[start:stop]), style="green" if trained else "dim")
            if trained and span.tags:
                shown.append(f"/{_format_class(span.tags[start], labels)}", style="italic")
    return shown


def _format_label(item: LabeledSpan, labels: Sequence[str]) -> str:
    """The label of a span as text."""
    if item.soft_label:
        shares = [f"{share:.2f} {_format_class(i, labels)}" for i, share in enumerate(item.soft_label) if share]
        return f"label {', '.join(shares)}"
    if isinstance(item.label, tuple):
        flagged = [_format_class(i, labels) for i, flag in enumerate(item.label) if flag]
        return f"labels {', '.join(flagged) or 'none'}"
    return (f"label {_format_class(item.label, labels)}" + (f", better by {item.margin:g}" if item.margin else "")
            + (f", weight {item.weight:g}" if item.weight != 1 else ""))


def _format_class(number: float, labels: Sequence[str]) -> str:
    return labels[int(number)] if labels else f"{number:g}"


def _find_token_runs(span: TokenSpan) -> list[tuple[bool, int, int]]:
    """Start and end of consecutive tokens that are all predicted or all not predicted. A tag is a separate range."""
    predicted = set(span.predicted)
    starts = [i for i in range(len(span.ids))
              if not i or (i in predicted) != (i - 1 in predicted) or (span.tags and i in predicted)]
    return [(start in predicted, start, stop) for start, stop in pairwise([*starts, len(span.ids)])]
