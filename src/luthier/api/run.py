"""The object that verbs return: a run folder whose model can also be used. Read `training/run_folder.py` first.

    run = luthier.train(model="smollm2", data=rows)
    run.generate("2 + 2 =")
    run.metrics[-1]["loss"]

It is no verb, so every verb may import it; it calls `chat` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.core.consent import accepts_consent
from luthier.training import run_folder


class Run(run_folder.Run):
    """A run folder. The model is loaded at the first call of `generate` or `chat`, and kept until `unload`."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._loaded: Any = None

    @accepts_consent
    def generate(self, prompts: str | Sequence[str], *, max_new_tokens: int = 256, temperature: float = 0.0,
                 top_p: float = 1.0, seed: int = 0, system: str | None = None, base_model: Path | str | None = None,
                 allow_code: Sequence[str] = ()) -> Any:
        """The answer to each prompt, computed in batches: a text for one text, a list for a list.

        Prompts are rendered as the run's training rows were, with the chat template where they had one.

        Args:
            temperature: 0 is greedy decoding.
            top_p: sample among the most probable tokens that together have this probability.
            system: system prompt; default: that of the run's training data, if any.
            base_model: where the base is now, if it was moved.
            allow_code: base models whose own code may run (`core/consent.py`).
        """
        from luthier.api.chat import generate_answers
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = generate_answers(self._load(base_model), listed, system=system, max_new_tokens=max_new_tokens,
                                   temperature=temperature, top_p=top_p, seed=seed)
        return answers[0] if isinstance(prompts, str) else answers

    @accepts_consent
    def chat(self, *, system: str | None = None, temperature: float = 0.0, max_new_tokens: int = 256,
             base_model: Path | str | None = None, allow_code: Sequence[str] = ()) -> Any:
        """A conversation (`ChatSession`): `say(text)` yields the answer as it is generated, and keeps the history.

        Args: as of `generate`.
        """
        from luthier.api.chat import start_session
        return start_session(self._load(base_model), system=system, temperature=temperature,
                             max_new_tokens=max_new_tokens)

    def unload(self) -> None:
        """Free the memory of the model that `generate` or `chat` has loaded."""
        self._loaded = None

    def _load(self, base_model: Path | str | None) -> Any:
        from luthier.api.chat import load_for_chat
        if self._loaded is None:
            self._loaded = load_for_chat(self, base_model, quiet=True)
        return self._loaded
