"""Labels that depend on all training rows: class indices, the scale of scores, completions of other rows (KTO).

Read `encoding.py` first, which leaves these values open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from luthier.core.errors import DataError, suggest_nearest
from luthier.core.examples import (
    ClassificationExample,
    ContrastiveExample,
    Example,
    ImageExample,
    TokenClassificationExample,
    UnpairedPreferenceExample,
)
from luthier.core.labels import collect_label_names, get_label_key, parse_number, sort_labels
from luthier.core.protocols import Tokenizer
from luthier.core.types import TokenizedExample
from luthier.data.config import DataConfig
from luthier.data.preference_encoding import encode_unpaired
from luthier.data.row_values import InvalidRowError, Label, format_class_name, read_number
from luthier.data.rows import RejectedRow

SCALES = (1.0, 5.0, 10.0, 100.0)
SHOWN = 12  # classes named in a message


@dataclass(frozen=True)
class LabelEncoder:
    """Class indices and the scale of scores, fitted on the training rows.

    Args:
        classes: names in the order of their indices; None for regression.
        several: whether rows may have several classes; each label is then one flag per class.
        scale: divisor of scores.
    """

    classes: tuple[str, ...] | None = None
    several: bool = False
    scale: float = 1.0

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Index of each class by the value of its name."""
        return {get_label_key(one): place for place, one in enumerate(self.classes or ())}


def fit_label_encoder(examples: Sequence[Example], classes: tuple[str, ...] | None, config: DataConfig) -> LabelEncoder:
    """Fits on the training rows. `classes` are those of the objective: None, names, or () to collect them."""
    labels = [label for example in examples for label in _get_labels(example)]
    if classes == ():
        if not config.streaming:  # a regression's features are read so, too
            _check_spellings(examples)
        classes = sort_labels(collect_label_names(_iterate_labels(labels)).values())
    scores = [e.score for e in examples if isinstance(e, ContrastiveExample) and e.score is not None]
    scale = config.score_scale or next((s for s in SCALES if s >= max(scores, default=0.0)), max(scores, default=1.0))
    return LabelEncoder(classes, any(isinstance(label, tuple) for label in labels), scale)


def _iterate_labels(labels: Iterable[Label]) -> Iterator[str | float]:
    for label in labels:
        yield from label if isinstance(label, tuple) else (label,)


def _check_spellings(examples: Sequence[Example]) -> None:
    """Raises `DataError` if one decimal number is written in two ways: 1.1 and 1.10 are equal as numbers, but may be
    two classes as text (such as section numbers)."""
    spelled: dict[str, str] = {}
    for example in examples:
        for one in _iterate_labels(_get_labels(example)):
            if isinstance(one, str) and isinstance(parse_number(one), float):
                first = spelled.setdefault(get_label_key(one), one)
                if first != one:
                    raise DataError(f"{example.origin}: the label {one!r} is written {first!r} in another row: as "
                                    f"numbers they are one class, as text they are two",
                                    "write one class the same way everywhere, or give the classes names that are not "
                                    "numbers, such as "
                                    f"'v{one}'")


def _get_labels(example: Example) -> tuple[Label, ...]:
    if isinstance(example, TokenClassificationExample):
        return example.tags
    labeled = isinstance(example, ClassificationExample | ImageExample) and example.label is not None
    return (example.label,) if labeled else ()  # type: ignore[union-attr,return-value]


def encode_labels(example: Example, encoded: TokenizedExample, what: LabelEncoder) -> TokenizedExample | RejectedRow:
    """The example with encoded labels, or the rejected row."""
    try:
        if isinstance(example, TokenClassificationExample):
            return _encode_tags(example, encoded, what)
        labels = _get_labels(example)
        if labels:
            told = _encode_label(labels[0], what)
        elif isinstance(example, ContrastiveExample) and example.score is not None:
            told = _scale_score(example.score, what.scale)
        else:
            return encoded
    except InvalidRowError as unfit:
        return RejectedRow(example.origin, unfit.reason, unfit.detail)
    return replace(encoded, labeled_spans=tuple(replace(item, label=told) for item in encoded.labeled_spans))


def _encode_tags(example: TokenClassificationExample, encoded: TokenizedExample,
                 what: LabelEncoder) -> TokenizedExample:
    (span,) = encoded.spans
    numbers = [_encode_class(tag, what) for tag in example.tags]
    tags = tuple(int(numbers[word]) if word >= 0 else -1 for word in span.tags)
    return replace(encoded, spans=(replace(span, tags=tags),))


def _scale_score(score: float, scale: float) -> float:
    if score > scale:
        raise InvalidRowError("score above the scale", f"{score:g}, and {scale:g} means the same (data.score_scale)")
    return score / scale


def _encode_label(label: Label, what: LabelEncoder) -> float | tuple[float, ...]:
    """A class index, one flag for each class, or the number itself."""
    if what.classes is None and isinstance(label, tuple):
        raise InvalidRowError("several labels instead of one number", ", ".join(label))
    if what.classes is None or not what.several:
        assert not isinstance(label, tuple), "`several` is set if any row has several labels"
        return _encode_class(label, what)
    flagged = {_encode_class(one, what) for one in (label if isinstance(label, tuple) else (label,))}
    return tuple(float(i in flagged) for i in range(len(what.classes)))


def _encode_class(label: str | float, what: LabelEncoder) -> float:
    """Index of the class whose name has the value of the label; for regression the value itself."""
    if what.classes is None:
        return read_number(label, "label")
    found = what.places.get(get_label_key(label))
    if found is not None:
        return float(found)
    named = format_class_name(label)
    position = "; a number is not an index of a class: write the name of the class"
    there = what.classes if len(what.classes) <= SHOWN else ()
    positions = parse_number(label) is not None and all(parse_number(one) is None for one in what.classes)
    raise InvalidRowError("a label that is not one of the classes",
                          f"{named!r}; " + (f"known: {', '.join(there)}" if there
                                            else suggest_nearest(named, what.classes))
                          + (position if positions else ""))


def add_mismatched_completions(examples: Sequence[Example], everything: Sequence[Example], tokenizer: Tokenizer,
                               config: DataConfig) -> dict[int, TokenizedExample]:
    """The rows of KTO by index, each with a mismatched completion: the answer of the next row with a different answer,
    after this
    row's prompt. If no row of `examples` has a different answer, the first such row of `everything` is used.

    Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1, estimate the KL divergence from the reference on such
    pairs. Raises `DataError` if all answers are the same.
    """
    rows = [(place, example) for place, example in enumerate(examples)
            if isinstance(example, UnpairedPreferenceExample)]
    found = {}
    for turn, (place, example) in enumerate(rows):
        near = (rows[(turn + step) % len(rows)][1] for step in range(1, len(rows)))
        far = (one for one in everything if isinstance(one, UnpairedPreferenceExample))
        other = next((one.answer for one in chain(near, far) if one.answer != example.answer), None)
        if other is None:
            raise DataError(f"{example.origin}: an unpaired preference needs a different answer of another row, and "
                            f"all answers are the same", "give at least two rows with different answers")
        made = encode_unpaired(example, tokenizer, config, other)
        assert not isinstance(made, RejectedRow), f"{example.origin} was encoded before"
        found[place] = made[0][0]
    return found


def explain_no_streaming(example: Example, what: tuple[str, ...] | None, config: DataConfig) -> str:
    """Why this kind of example cannot be streamed; empty if it can."""
    if isinstance(example, UnpairedPreferenceExample):
        return "unpaired preferences need another row's answer"
    if _get_labels(example) and what == ():
        return "the classes are collected from all training rows (or set objective.labels)"
    if any(isinstance(label, tuple) for label in _get_labels(example)):
        return "all training rows are needed to find whether a row has several classes"
    if isinstance(example, ContrastiveExample) and example.score is not None and config.score_scale is None:
        return "the scale of the scores is found from all training rows (or set data.score_scale)"
    return ""


def sum_class_weights(encoded: Iterable[tuple[TokenizedExample, float]], classes: Sequence[str]) -> dict[str, float]:
    """For each class, the sum of its labels' weights, each times the factor of its example."""
    sums = [0.0] * len(classes)
    for example, times in encoded:
        for item in example.labeled_spans:
            told = item.soft_label or item.label
            shares = enumerate(told) if isinstance(told, tuple) else [(int(told), 1.0)]
            for index, share in shares:
                sums[index] += share * item.weight * times
        for span in example.spans:
            for tag, weight in zip(span.tags, span.weights, strict=False):
                sums[tag] += weight * times  # tokens without a tag have weight 0
    return dict(zip(classes, sums, strict=True))


def count_classes(examples: Iterable[Example]) -> dict[str, int]:
    """How many rows, or words, have each label."""
    labels = [one for example in examples for one in _iterate_labels(_get_labels(example))]
    counts = Counter(map(get_label_key, labels))
    return {known: counts[key] for key, known in collect_label_names(labels).items()}
