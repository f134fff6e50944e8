"""Copies of examples with their text rewritten by a model. Read `augmentation.py` first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.core.examples import Example
from luthier.data.augmentation import TEXT_EDITORS


def paraphrase_examples(examples: Sequence[Example], generate: Callable[[list[str]], list[str]],
                        ask: str = "Say this in other words, in the same language:\n{text}") -> list[Example]:
    """A copy of every example with its text paraphrased by a model.

    Args:
        generate: prompts to answers, in order. For back-translation: a function that translates there and back.
        ask: the prompt template, with `{text}` in place of the text.
    """
    texts: list[str] = []
    for example in examples:
        TEXT_EDITORS[type(example)](example, lambda text: texts.append(text) or text)  # type: ignore[func-returns-value]
    answers = iter(generate([ask.replace("{text}", text) for text in texts]))
    return [TEXT_EDITORS[type(example)](example, lambda text: next(answers).strip() or text) for example in examples]
