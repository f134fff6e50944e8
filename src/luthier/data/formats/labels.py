"""What is judged as a whole, out of rows: labels, tags, likeness, pictures; and prompts. Read `row_values.py` first."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.examples import (
    ChatExample,
    ComparedExample,
    CompletionExample,
    Example,
    ImageExample,
    LabelledExample,
    Message,
    Origin,
    PromptExample,
    TaggedExample,
    TextsExample,
    UnpairedPreferenceExample,
)
from luthier.data.formats.text import SYSTEM, turns
from luthier.data.images import PictureFile, opened_picture
from luthier.data.row_values import (
    UnfitError,
    Values,
    demand_finite,
    label,
    listed,
    number,
    row_weight,
    text,
    tools,
    words,
)


def from_label(values: Values, origin: Origin) -> Example:
    """A text, or two, and a class, several classes, or a number."""
    second = words(values, "second") if values.get("second") is not None else None
    return LabelledExample(words(values, "text"), label(values["label"]), origin, second, row_weight(values))


def from_tags(values: Values, origin: Origin) -> Example:
    said, tags = listed(values, "words"), listed(values, "tags")
    if not all(isinstance(word, str) and word.strip() for word in said):
        raise UnfitError("a word is empty or not text")
    if len(said) != len(tags):
        raise UnfitError("words and tags differ in number", f"{len(said)} words, {len(tags)} tags")
    names = label(tags, "tag")
    assert isinstance(names, tuple), "a list of tags"
    return TaggedExample(tuple(said), names, origin, row_weight(values))


def from_score(values: Values, origin: Origin) -> Example:
    """Two texts and how alike they are; `label_encoding.py` scales the scores to [0, 1]."""
    score = number(values["score"], "score")
    if score < 0:
        raise UnfitError("score is below 0", repr(values["score"]))
    return TextsExample((words(values, "sentence1"), words(values, "sentence2")), origin, score,
                        row_weight(values))


NEGATIVE = re.compile(r"negatives?(_?\d+)?")


def from_triplet(values: Values, origin: Origin) -> Example:
    """An anchor, what belongs to it, and what does not: `negative`, `negative_1`, ..., or a list of them."""
    found = [words(values, "anchor"), words(values, "positive")]
    for column, value in values.items():
        if NEGATIVE.fullmatch(column) and value is not None:
            found += [words({column: inner}, column) for inner in (value if isinstance(value, list) else [value])]
    return TextsExample(tuple(found), origin, weight=row_weight(values))


def from_picture(values: Values, origin: Origin) -> Example:
    """Pixels, or bytes or the path of a picture file; its class where it has one."""
    named = values.get("label")
    found = None if named is None else label(named)
    if isinstance(found, tuple):
        raise UnfitError("a picture has several labels", "one class, or none")
    return ImageExample(_pixels(values["pixels"], origin), origin, found, row_weight(values))


def _pixels(raw: Any, origin: Origin) -> Any:
    if isinstance(raw, dict):  # as `datasets` keeps pictures that it has not decoded
        raw = io.BytesIO(raw["bytes"]) if raw.get("bytes") else raw.get("path")
    if isinstance(raw, str):
        return PictureFile(Path(origin.file).parent / raw).checked()
    if isinstance(raw, io.BytesIO):
        return opened_picture(raw)
    if isinstance(raw, PictureFile):
        return raw.checked()
    try:
        found = np.asarray(raw)
    except ValueError as fault:
        raise UnfitError("pixels are no table of bytes", str(fault)) from fault
    if not np.issubdtype(found.dtype, np.integer) or found.size == 0 or found.min() < 0 or found.max() > 255:
        raise UnfitError("pixels are no table of bytes", "give whole numbers from 0 to 255")
    if found.ndim not in (2, 3) or (found.ndim == 3 and found.shape[2] not in (1, 3)):
        raise UnfitError("pixels are not [height, width] or [height, width, 3]", f"their shape is {found.shape}")
    return found.astype(np.uint8, copy=False)


# ---------------------------------------------------------------- prompts


def from_prompt(values: Values, origin: Origin) -> Example:
    """A prompt for rollouts to answer. All other columns are facts, which a reward function is told."""
    raw = values["prompt"]
    prompt: tuple[Message, ...] | str = (tuple(turns(raw, "prompt")) if isinstance(raw, list)
                                         else words(values, "prompt"))
    system = text(values, "system", "")
    if system.strip():
        asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        prompt = asked if asked[0].role in SYSTEM else (Message("system", system), *asked)
    return PromptExample(prompt, origin, _facts(values), tools(values))


def _facts(values: Values) -> dict[str, Any]:
    if isinstance(values.get("reference"), float):
        demand_finite(values["reference"], "reference")
    return {column: value for column, value in values.items() if column not in ("prompt", "messages", "conversations")}


def as_prompt(example: Example, values: Values) -> PromptExample:
    """What was asked, with the answer that the data give as the fact `reference`."""
    prompt, reference = asked_of(example)
    if not prompt:
        raise UnfitError("nothing was asked")
    return PromptExample(prompt, example.origin, _facts(values) | ({"reference": reference} if reference else {}),
                         tools_of(example))


def asked_of(example: Example) -> tuple[tuple[Message, ...] | str, str]:
    """The prompt of an example that has one, and the words of the answer that the data give; none: empty."""
    if isinstance(example, ChatExample):
        last = max(i for i, said in enumerate(example.messages) if said.role == "assistant")
        return example.messages[:last], example.messages[last].content
    if isinstance(example, CompletionExample):
        return example.prompt, example.completion
    if isinstance(example, ComparedExample):
        return example.prompt, said(example.answers[0])
    if isinstance(example, PromptExample):
        return example.prompt, str(example.facts.get("reference", ""))
    assert isinstance(example, UnpairedPreferenceExample), f"{type(example).__name__} holds no prompt"
    return example.prompt, said(example.answer) if example.good else ""


def tools_of(example: Example) -> tuple[Mapping[str, Any], ...]:
    """The functions that the assistant of an example may call."""
    return example.tools if isinstance(example, ChatExample | ComparedExample | UnpairedPreferenceExample
                                       | PromptExample) else ()


def said(answer: tuple[Message, ...] | str) -> str:
    """The words of an answer's last turn."""
    return answer if isinstance(answer, str) else answer[-1].content


ASKED = frozenset({"ChatExample", "CompletionExample", "ComparedExample",
                   "UnpairedPreferenceExample"})  # what `as_prompt` takes
ANSWERED = ASKED | {"PromptExample", "TextExample"}  # kinds of example that an answer can be generated to
