"""Converts rows with labels, tags, similarity scores and images, and prompts. Read `row_values.py` first."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.examples import (
    ChatExample,
    ClassificationExample,
    CompletionExample,
    ContrastiveExample,
    Example,
    ImageExample,
    Message,
    Origin,
    PreferenceExample,
    PromptExample,
    TokenClassificationExample,
    UnpairedPreferenceExample,
)
from luthier.data.formats.text import SYSTEM, read_turns
from luthier.data.images import ImageFile, open_image
from luthier.data.row_values import (
    InvalidRowError,
    Values,
    check_finite,
    read_label,
    read_list,
    read_nonempty_string,
    read_number,
    read_row_weight,
    read_string,
    read_tools,
)


def convert_label(values: Values, origin: Origin) -> Example:
    """A text or a pair of texts, with a class, several classes, or a number."""
    second = read_nonempty_string(values, "second") if values.get("second") is not None else None
    return ClassificationExample(read_nonempty_string(values, "text"), read_label(values["label"]), origin, second,
                                 read_row_weight(values))


def convert_tags(values: Values, origin: Origin) -> Example:
    said, tags = read_list(values, "words"), read_list(values, "tags")
    if not all(isinstance(word, str) and word.strip() for word in said):
        raise InvalidRowError("a word is empty or not a string")
    if len(said) != len(tags):
        raise InvalidRowError("words and tags differ in number", f"{len(said)} words, {len(tags)} tags")
    names = read_label(tags, "tag")
    assert isinstance(names, tuple), "a list of tags"
    return TokenClassificationExample(tuple(said), names, origin, read_row_weight(values))


def convert_score(values: Values, origin: Origin) -> Example:
    """Two texts and their similarity score; `label_encoding.py` scales the scores to [0, 1]."""
    score = read_number(values["score"], "score")
    if score < 0:
        raise InvalidRowError("score is below 0", repr(values["score"]))
    return ContrastiveExample((read_nonempty_string(values, "sentence1"), read_nonempty_string(values, "sentence2")),
                              origin, score,
                              read_row_weight(values))


NEGATIVE = re.compile(r"negatives?(_?\d+)?")


def convert_triplet(values: Values, origin: Origin) -> Example:
    """An anchor, its positive, and its negatives: `negative`, `negative_1`, ..., or a list `negatives`."""
    found = [read_nonempty_string(values, "anchor"), read_nonempty_string(values, "positive")]
    for column, value in values.items():
        if NEGATIVE.fullmatch(column) and value is not None:
            found += [read_nonempty_string({column: inner}, column)
                      for inner in (value if isinstance(value, list) else [value])]
    return ContrastiveExample(tuple(found), origin, weight=read_row_weight(values))


def convert_image(values: Values, origin: Origin) -> Example:
    """An image as pixels, as the bytes of a file, or as a path; with its class if it has one."""
    named = values.get("label")
    found = None if named is None else read_label(named)
    if isinstance(found, tuple):
        raise InvalidRowError("an image has several labels", "one class, or none")
    return ImageExample(_read_pixels(values["pixels"], origin), origin, found, read_row_weight(values))


def _read_pixels(raw: Any, origin: Origin) -> Any:
    if isinstance(raw, dict):  # the form in which `datasets` keeps images that it has not decoded
        raw = io.BytesIO(raw["bytes"]) if raw.get("bytes") else raw.get("path")
    if isinstance(raw, str):
        return ImageFile(Path(origin.file).parent / raw).checked()
    if isinstance(raw, io.BytesIO):
        return open_image(raw)
    if isinstance(raw, ImageFile):
        return raw.checked()
    try:
        found = np.asarray(raw)
    except ValueError as fault:
        raise InvalidRowError("pixels are not an array of bytes", str(fault)) from fault
    if not np.issubdtype(found.dtype, np.integer) or found.size == 0 or found.min() < 0 or found.max() > 255:
        raise InvalidRowError("pixels are not an array of bytes", "give whole numbers from 0 to 255")
    if found.ndim not in (2, 3) or (found.ndim == 3 and found.shape[2] not in (1, 3)):
        raise InvalidRowError("pixels are not [height, width] or [height, width, 3]", f"their shape is {found.shape}")
    return found.astype(np.uint8, copy=False)


# ---------------------------------------------------------------- prompts


def convert_prompt(values: Values, origin: Origin) -> Example:
    """A prompt for rollouts. All other columns are metadata for the reward function."""
    raw = values["prompt"]
    prompt: tuple[Message, ...] | str = (tuple(read_turns(raw, "prompt")) if isinstance(raw, list)
                                         else read_nonempty_string(values, "prompt"))
    system = read_string(values, "system", "")
    if system.strip():
        asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        prompt = asked if asked[0].role in SYSTEM else (Message("system", system), *asked)
    return PromptExample(prompt, origin, _collect_metadata(values), read_tools(values))


def _collect_metadata(values: Values) -> dict[str, Any]:
    if isinstance(values.get("reference"), float):
        check_finite(values["reference"], "reference")
    return {column: value for column, value in values.items() if column not in ("prompt", "messages", "conversations")}


def convert_to_prompt(example: Example, values: Values) -> PromptExample:
    """The prompt of an example, with the answer in the data as the metadata column `reference`."""
    prompt, reference = get_prompt_and_reference(example)
    if not prompt:
        raise InvalidRowError("there is no prompt before the answer")
    return PromptExample(prompt, example.origin, _collect_metadata(values)
                         | ({"reference": reference} if reference else {}),
                         get_tools(example))


def get_prompt_and_reference(example: Example) -> tuple[tuple[Message, ...] | str, str]:
    """The prompt of an example, and the text of the answer in the data (empty if there is none)."""
    if isinstance(example, ChatExample):
        last = max(i for i, said in enumerate(example.messages) if said.role == "assistant")
        return example.messages[:last], example.messages[last].content
    if isinstance(example, CompletionExample):
        return example.prompt, example.completion
    if isinstance(example, PreferenceExample):
        return example.prompt, get_answer_text(example.answers[0])
    if isinstance(example, PromptExample):
        return example.prompt, str(example.metadata.get("reference", ""))
    assert isinstance(example, UnpairedPreferenceExample), f"{type(example).__name__} has no prompt"
    return example.prompt, get_answer_text(example.answer) if example.good else ""


def get_tools(example: Example) -> tuple[Mapping[str, Any], ...]:
    """The tools of an example."""
    return example.tools if isinstance(example, ChatExample | PreferenceExample | UnpairedPreferenceExample
                                       | PromptExample) else ()


def get_answer_text(answer: tuple[Message, ...] | str) -> str:
    """The text of an answer's last turn."""
    return answer if isinstance(answer, str) else answer[-1].content


PROMPT_TYPES = frozenset({"ChatExample", "CompletionExample", "PreferenceExample",
                          "UnpairedPreferenceExample"})  # types that `convert_to_prompt` accepts
# types of examples that have a prompt to answer
TYPES_WITH_ANSWER = PROMPT_TYPES | {"PromptExample", "TextExample"}
