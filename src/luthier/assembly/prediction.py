"""Predictions of a run on rows that need no labels. Read `run_io.py` and `data/formats/registry.py` first.

| objective                      | prediction of a row                                                  |
|--------------------------------|----------------------------------------------------------------------|
| classify, single               | `label`, and `probabilities` of all classes                          |
| classify, multi                | `labels` with a probability above one half, and `probabilities`      |
| classify, regression           | `value`                                                              |
| classify, tokens               | `tags`, one for each word                                            |
| reward                         | `reward` of the row's completion or last answer                      |
| contrastive                    | `embedding`, of length 1                                             |
| all that generate text         | `answer`, and `finished`: whether it ended by itself                 |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luthier import data as rows
from luthier.assembly.factory import resolve_data_config, resolve_micro_batch_tokens
from luthier.assembly.recipe import Recipe
from luthier.core.errors import RecipeError
from luthier.core.examples import (
    ChatExample,
    CompletionExample,
    Example,
    Message,
    PreferenceExample,
    TokenClassificationExample,
)
from luthier.core.protocols import Family, SamplingParams
from luthier.core.types import Outputs, TokenizedExample
from luthier.data import RejectedRow, Row, RowReader
from luthier.data.formats.labels import get_prompt_and_reference
from luthier.objectives.classify import ClassifyConfig

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Predictor:
    """How the rows of one objective are read, and what is predicted for them.

    Args:
        read: a row of a file, whose label may be missing, as an example.
        predict: examples -> a prediction each, or why there is none.
    """

    read: Callable[[Iterable[Row | RejectedRow]], Iterator[Example | RejectedRow]]
    predict: Callable[[Sequence[Example]], list[Prediction | RejectedRow]]


def build_predictor(recipe: Recipe, base: Family, max_new_tokens: int) -> Predictor:
    """The predictor of a run. Raises `RecipeError` for an objective without one."""
    objective = recipe.objective
    if isinstance(objective, ClassifyConfig):
        fill: Mapping[str, Any] = ({} if objective.task == "tokens" else
                                   {"label": 0.0 if objective.task == "regression" else objective.labels[0]})
        kinds = objective.example_types
        score = "token_scores" if objective.task == "tokens" else "scores"
        return Predictor(lambda lines: _read(_fill_labels(lines, recipe, fill, objective), recipe, kinds),
                         lambda examples: _predict_items(examples, recipe, base, score,
                                                         lambda scores: _describe_classes(scores, objective)))
    if objective.name == "reward":
        return Predictor(lambda lines: map(_as_comparison, _read(lines, recipe, frozenset(
            {"ChatExample", "CompletionExample"}))),
            lambda examples: _predict_items(examples, recipe, base, "scores",
                                            lambda scores: [{"reward": float(s)} for s in scores[:, 0]]))
    if objective.required_outputs == frozenset({"pooled"}):
        return Predictor(lambda lines: _read(_fill_labels(lines, recipe, {"label": 0.0}, None), recipe,
                                             frozenset({"ClassificationExample", "ImageExample"})),
                         lambda examples: _predict_items(examples, recipe, base, "pooled", _describe_embeddings))
    if base.can_generate and objective.name != "multiple_choice":
        return Predictor(lambda lines: _read(lines, recipe, frozenset({"PromptExample"})),
                         lambda examples: _generate_answers(examples, recipe, base, max_new_tokens))
    raise RecipeError(f"objective {objective.name!r} has no prediction for a single row",
                      "measure it on rows with answers: luthier evaluate RUN --data FILE")


# ---------------------------------------------------------------- reading


def _read(lines: Iterable[Row | RejectedRow], recipe: Recipe, kinds: frozenset[str]) -> Iterator[Example | RejectedRow]:
    return rows.read_examples(lines, recipe.data.format if recipe.data.format in rows.FORMATS else "auto",
                              recipe.data.columns, RowReader(kinds))


def _fill_labels(lines: Iterable[Row | RejectedRow], recipe: Recipe, fill: Mapping[str, Any],
                 objective: ClassifyConfig | None) -> Iterator[Row | RejectedRow]:
    """Rows with a label in place of a missing one: formats are recognized by it, and no prediction depends on it."""
    names = {ours: str(recipe.data.columns.get(ours, ours)) for ours in ("label", "tags", "words")}
    for line in lines:
        if isinstance(line, RejectedRow):
            yield line
            continue
        values = dict(line.values)
        if objective is not None and objective.task == "tokens":
            words = values.get(names["words"], values.get("tokens"))
            if isinstance(words, list):
                values = {key: value for key, value in values.items() if key not in ("ner_tags", names["tags"])}
                values[names["tags"]] = [objective.labels[0]] * len(words)
        else:
            values = {key: value for key, value in values.items() if key not in ("labels", "score", names["label"])}
            values |= {names[name]: value for name, value in fill.items()}
        yield replace(line, values=values)


def _as_comparison(example: Example | RejectedRow) -> Example | RejectedRow:
    """A prompt with its answer as the only candidate, as reward models read them."""
    if not isinstance(example, ChatExample | CompletionExample):
        return example
    prompt, answer = get_prompt_and_reference(example)
    tools = example.tools if isinstance(example, ChatExample) else ()
    candidate: Any = (Message("assistant", answer),) if isinstance(prompt, tuple) else answer
    return PreferenceExample(prompt, (candidate,), (0,), example.origin, tools=tools)


# ---------------------------------------------------------------- predicting


def _predict_items(examples: Sequence[Example], recipe: Recipe, base: Family, output: str,
                   describe: Callable[[Tensor], list[Prediction]]) -> list[Prediction | RejectedRow]:
    """One prediction for each example, from one output of the model."""
    config = resolve_data_config(recipe, base)
    if isinstance(examples[0] if examples else None, PreferenceExample) and base.structure.task != "CAUSAL_LM" \
            and not base.is_encoder_decoder:
        config = config.model_copy(update={"share_prompt": False})
    found: list[Prediction | RejectedRow | None] = [None] * len(examples)
    encoded: list[TokenizedExample] = []
    places: list[int] = []
    for place, example in enumerate(examples):
        tokenized = rows.encode_example(example, base.tokenizer, config)
        if isinstance(tokenized, list):
            encoded.append(replace(tokenized[0], labeled_spans=tokenized[0].labeled_spans[:1]))
            places.append(place)
        else:
            found[place] = tokenized
    with torch.no_grad():
        for row in rows.assign_rows(encoded, resolve_micro_batch_tokens(recipe, base)):
            batch = rows.build_batch([encoded[i] for i in row]).to(base.device)
            outputs: Outputs = base.forward(batch.inputs, batch.target, frozenset({output}))
            values = outputs.tensors()[output].float().cpu()  # [A, C], or [P, C] of tagged words
            if output == "token_scores":
                for i, part in zip(row, _split_words(values, [examples[places[i]] for i in row]), strict=True):
                    found[places[i]] = {"tags": [one["label"] for one in describe(part)]}
            else:
                for i, prediction in zip(row, describe(values), strict=True):
                    found[places[i]] = prediction
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def _split_words(values: Tensor, examples: Sequence[Example]) -> list[Tensor]:
    """[P, C] as one part for each example; the words of an example may have been cut off at the end of a row's text."""
    counts = [len(example.words) for example in examples if isinstance(example, TokenClassificationExample)]
    if sum(counts) != len(values):
        raise RecipeError(f"{sum(counts)} words, and {len(values)} of them fit into data.max_length",
                          "raise data.max_length, or split the rows")
    return list(values.split(counts))


def _describe_classes(scores: Tensor, objective: ClassifyConfig) -> list[Prediction]:
    """[A, C] -> predictions."""
    if objective.task == "regression":
        return [{"value": float(score)} for score in scores[:, 0]]
    single = objective.task != "multi"
    probabilities = scores.softmax(-1) if single else scores.sigmoid()  # [A, C]
    described = [dict(zip(objective.labels, line, strict=True)) for line in probabilities.tolist()]
    if single:
        return [{"label": objective.labels[int(best)], "probabilities": line}
                for best, line in zip(probabilities.argmax(-1), described, strict=True)]
    return [{"labels": [name for name, value in line.items() if value > 0.5], "probabilities": line}
            for line in described]


def _describe_embeddings(states: Tensor) -> list[Prediction]:
    return [{"embedding": line} for line in (states / states.norm(dim=-1, keepdim=True)).tolist()]


def _generate_answers(examples: Sequence[Example], recipe: Recipe, base: Family,
                      max_new_tokens: int) -> list[Prediction | RejectedRow]:
    sampling = SamplingParams(max_new_tokens, batch_size=recipe.evaluate.batch_size)
    context = base.structure.sizes["context"]
    found: list[Prediction | RejectedRow] = []
    prompts: dict[int, Sequence[int]] = {}
    for place, example in enumerate(examples):
        ids, _ = rows.encode_prompt(example, base.tokenizer, recipe.data)
        prompts |= {place: ids} if 0 < len(ids) < context else {}
        found.append({} if place in prompts else RejectedRow(
            example.origin, f"a prompt of {len(ids)} tokens, and the model reads 1 to {context - 1}"))
    listed = list(prompts)
    for output in base.generate([prompts[place] for place in listed], sampling):
        found[listed[output.index]] = {
            "answer": base.tokenizer.decode(output.token_ids, skip_special_tokens=True), "finished": output.finished}
    return found


