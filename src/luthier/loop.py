"""Four functions for your own training loop: `forward_backward`, `optimizer_step`, `sample`, `save`.

    from luthier import loop

    session = loop.start(model="smollm2", method="lora", objective="sft")
    for _ in range(3):
        metrics = session.forward_backward([{"prompt": "Who may sue?", "completion": "Whoever was harmed."}])
        session.optimizer_step(learning_rate=5e-4)
    print(session.sample(["Who may sue?"]))
    session.save("runs/mine")

`luthier.train` does the same with a schedule, checkpoints and evaluation. Read `training/step.py` first: what this file
splits into two calls is one function there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from luthier import assembly
from luthier.assembly.factory import (
    PromptFormat,
    check_loaded_model,
    encode_chat_prompt,
    fit_objective,
    load_datasets,
    load_family,
    resolve_micro_batch_tokens,
    set_chat_format,
)
from luthier.assembly.initialization import init_policy
from luthier.assembly.provenance import record_start
from luthier.assembly.recipe import Recipe, compute_default_learning_rate, dump_recipe
from luthier.assembly.run_io import save_tuned
from luthier.assembly.settings import resolve_settings
from luthier.core.errors import DataError, RecipeError
from luthier.core.examples import Message
from luthier.core.protocols import Family, SamplingParams, Tuner
from luthier.core.types import Batch
from luthier.training.grad_cache import backward
from luthier.training.optimizer import Optimizer
from luthier.training.rng import seed_everything
from luthier.training.run_folder import Run
from luthier.training.step import Reference, forward_objective

Rows = Sequence[Mapping[str, Any]]


def start(**settings: Any) -> Session:
    """Load a model and attach a method.

    Args:
        settings: those of a recipe without data: ``model``, ``method``, ``objective``, ``optimizer``, ``seed``.

    Raises:
        RecipeError: a wrong setting, or an objective that samples its own data (ppo, grpo).
    """
    recipe = assembly.build_recipe({"data": "-"}, {key: value for key, value in settings.items() if value is not None})
    if recipe.objective.is_online:
        raise RecipeError(f"objective {recipe.objective.name!r} samples its own training data, which luthier.loop "
                          f"does not support", "use luthier.train for it")
    seed_everything(recipe.seed)
    family = load_family(recipe.model, recipe.objective.uses_masking)
    check_loaded_model(recipe, family)
    return Session(recipe, family)


class Session:
    """A model in training, one call at a time. Create it with `start`.

    Attributes:
        recipe: its settings.
        family: the model.
        tuner: the attached method.
        steps: optimizer steps so far.
    """

    def __init__(self, recipe: Recipe, family: Family) -> None:
        self.recipe, self.family, self.steps = recipe, family, 0
        self._count = 0.0
        self._tuner: Tuner | None = None
        self._reference: Reference | None = None
        self._optimizer: Optimizer | None = None
        self._has_conversations = True

    @property
    def tuner(self) -> Tuner:
        if self._tuner is None:
            raise RecipeError("there is no tuner before the first rows, because their classes decide the heads of "
                              "some objectives",
                              "call forward_backward first")
        return self._tuner

    def forward_backward(self, rows: Rows) -> dict[str, float]:
        """Add the gradient of the summed loss of `rows`; returns the mean loss and the metrics of these rows.

        Several calls before `optimizer_step` give the gradient of one call with all rows. Exception: for objectives
        whose rows depend on each other (contrastive, kto), each call is a separate batch.

        Args:
            rows: in any format of docs/data.md, all in the same one. For `classify`, list all classes in
            ``objective.labels``, or
                include all of them in the first call.

        Raises:
            DataError: a row cannot be used; the message has its number and the reason.
        """
        batches = self._encode(rows)
        self.family.train(True)
        totals: dict[str, tuple[float, float]] = {}
        objective = self.recipe.objective
        count = sum(objective.count(batch.target) for batch in batches)
        forward = partial(forward_objective, self.family, objective, reference=self._reference)
        loss = 0.0
        for part in [batches] if objective.needs_full_batch else [[batch] for batch in batches]:
            total, metrics = backward(forward, objective, part, 1.0, self.family.device, torch.enable_grad)
            loss += float(total)
            for name, (value, number) in metrics.items():
                old = totals.get(name, (0.0, 0.0))
                totals[name] = (old[0] + float(value), old[1] + float(number))
        self._count += count
        return {"loss": loss / count, **{name: value / number for name, (value, number) in totals.items() if number}}

    def optimizer_step(self, learning_rate: float | None = None) -> dict[str, float]:
        """Divide the gradient by the count of all rows since the last step, clip it, and update.

        Args:
            learning_rate: of this step; default: optimizer.learning_rate, else the method's own.

        Returns:
            ``grad_norm`` before clipping, and ``learning_rate``.
        """
        if self._optimizer is None or not self._count:
            raise RecipeError("optimizer_step was called without a gradient", "call forward_backward first")
        optimizer = self._optimizer
        for parameter in optimizer.parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(self._count)
        if learning_rate is not None:
            optimizer.peak = learning_rate
        rate = optimizer.set_learning_rate(self.steps)
        optimizer.run_pre_step_hook()
        norm = optimizer.clip_grad_norm()
        optimizer.step(norm)
        self.steps += 1
        self._count = 0.0
        return {"grad_norm": float(norm), "learning_rate": rate}

    def sample(self, prompts: Sequence[str | Sequence[Mapping[str, str]]], sampling: SamplingParams | None = None
               ) -> list[str]:
        """Completions of the current model.

        Args:
            prompts: user messages, or conversations as lists of ``{"role": ..., "content": ...}``.
            sampling: default: greedy, at most 256 tokens.

        Raises:
            RecipeError: the model does not generate text.
        """
        if not self.family.can_generate:
            raise RecipeError("this model does not generate text", "use a causal or a sequence-to-sequence model")
        form = PromptFormat(self.recipe.data, self._has_conversations)
        ids = [encode_chat_prompt(self.family, _read_messages(prompt), form) for prompt in prompts]
        self.family.train(False)
        outputs = {output.index: output.token_ids for output in self.family.generate(ids, sampling or SamplingParams())}
        return [self.family.tokenizer.decode(outputs[i], skip_special_tokens=True) for i in range(len(prompts))]

    def save(self, folder: Path | str) -> Run:
        """Write a run folder: the adapter in PEFT's format (or the whole model) and the recipe. `luthier evaluate`,
        `chat`, `serve` and `export` take it.

        Raises:
            RunError: the folder holds a run already, or cannot be written.
        """
        run = Run(folder)
        identity = assembly.identify_base(self.recipe.model)
        rate = self.recipe.optimizer.learning_rate or compute_default_learning_rate(self.recipe)
        recipe = resolve_settings(self.recipe, self.family, identity, rate, run.path)
        tuner = self.tuner
        run.create(dump_recipe(recipe), record_start(recipe, identity, []))
        save_tuned(run, recipe, self.family, tuner)
        return run

    def _encode(self, rows: Rows) -> list[Batch]:
        """The rows as micro-batches. The first call fits the objective to the classes and attaches the method."""
        with TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            file.write_text("".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
            sources = assembly.rows.DataConfig.parse({"train": str(file)}).train
            data = self.recipe.data.model_copy(update={"train": sources})
            datasets = load_datasets(self.recipe.model_copy(update={"data": data}), self.family)
        rejected = datasets.report.parts["train"].refused
        if rejected:
            first = f"row {rejected[0]['line']}: {rejected[0]['reason']}"
            raise DataError(f"{len(rejected)} of {len(rows)} rows cannot be used; {first}", "fix or remove them")
        if self._tuner is None:
            self._attach(datasets)
        return assembly.rows.pack_examples(datasets.train, resolve_micro_batch_tokens(self.recipe, self.family))

    def _attach(self, datasets: Any) -> None:
        self.recipe = fit_objective(self.recipe, datasets)
        set_chat_format(self.family, datasets)
        self._has_conversations = datasets.conversations
        self._tuner, self._reference = init_policy(self.recipe, self.family)
        rate = self.recipe.optimizer.learning_rate or compute_default_learning_rate(self.recipe)
        config = self.recipe.optimizer.model_copy(update={"lr_scheduler_type": "constant", "warmup_ratio": 0.0})
        self._optimizer = Optimizer(self._tuner.parameters(), self._tuner.lr_multiplier, rate, config, 1,
                                    self._tuner.optimizer_hooks)


def _read_messages(prompt: str | Sequence[Mapping[str, str]]) -> list[Message]:
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    return [Message(turn["role"], turn["content"]) for turn in prompt]
