"""An answer depends on its prompt, its index and the settings: not on the batch, the padding or who finished first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.core.errors import BaseError, DataError, NotFinite
from luthier.core.protocols import GenerationOutput, SamplingParams
from luthier.models.decoding import build_requests, find_eos_tokens, run_requests
from luthier.models.families.causal import CausalLM
from luthier.models.hf_model import Layout
from luthier.models.padded_decoder import generate
from luthier.models.sampling import sample_tokens
from luthier.models.sequence_decoder import SequenceDecoder
from tiny import IM_END, KINDS, tiny, tiny_tokenizer

LENGTHS = (3, 17, 1, 30, 9, 12, 5)


def exact(kind: str) -> nn.Module:
    """In float64, but for gemma2: its softmax is float32 whatever the model's, where float64's mask is infinite."""
    return tiny(kind, dtype=torch.float32 if kind == "gemma2" else torch.float64)


def prompts(seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=source).tolist() for length in LENGTHS]


def answers(model: nn.Module, sampling: SamplingParams, eos: frozenset[int] = frozenset(), pad: int = 0,
            asked: list[list[int]] | None = None) -> list[GenerationOutput]:
    """The outputs of padded batches, which those of sequences that join and leave must equal."""
    given = asked or prompts()
    found = sorted(generate(model, given, sampling, eos, pad, "cpu"), key=lambda answer: answer.index)
    assert [answer.index for answer in found] == list(range(len(given)))
    other = deepcopy(model)
    assert sorted(by_sequences(other, given, sampling, eos), key=lambda answer: answer.index) == found
    return found


def by_sequences(model: nn.Module, given: list[list[int]], sampling: SamplingParams,
                 eos: Set[int]) -> Iterator[GenerationOutput]:
    """With an engine whose sequences join and leave at every step; some prompts are read in chunks."""
    engine = CausalLM(model, tiny_tokenizer(), "packed").build_engine(sampling.batch_size)
    assert isinstance(engine.decoder, SequenceDecoder)
    engine.stops, engine.prefill_chunk = eos, 7
    return run_requests(engine, build_requests(given, sampling))


def by_transformers(model: nn.Module, prompt: list[int], new: int) -> tuple[int, ...]:
    tokens = torch.tensor([prompt])
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new,
                          eos_token_id=None, pad_token_id=0)
    return tuple(made[0, len(prompt):].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_in_a_batch_is_greedy_alone_is_transformers_own(kind: str) -> None:
    model = exact(kind)
    reference = [by_transformers(model, prompt, 20) for prompt in prompts()]
    assert len(set(reference)) > 1, "the prompts must matter"
    for size in (1, 3, 16):
        assert [a.token_ids for a in answers(model, SamplingParams(max_new_tokens=20, batch_size=size), pad=7)] == reference


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "gemma3", "mixtral"])
def test_rows_that_leave_change_nothing_for_those_that_stay(kind: str) -> None:
    model = exact(kind)
    settings = {"max_new_tokens": 24, "temperature": 1.0}
    whole = [answer.token_ids for answer in answers(model, SamplingParams(batch_size=1, **settings))]
    stops = frozenset(token for token, _ in Counter(sum(whole, ())).most_common(8))
    expected = []
    for tokens in whole:
        at = next((i for i, token in enumerate(tokens) if token in stops), None)
        expected.append((tokens[:at], at is not None))
    assert len({len(tokens) for tokens, _ in expected}) > 3, "the rows must finish at different times"
    for size in (1, 3, 16):
        found = answers(model, SamplingParams(batch_size=size, **settings), stops)
        assert [(answer.token_ids, answer.finished) for answer in found] == expected
    split = sorted(stops)
    found = answers(model, SamplingParams(stop=tuple(split[:3]), **settings), frozenset(split[3:]))
    assert [(answer.token_ids, answer.finished) for answer in found] == expected


def test_answers_come_as_they_finish() -> None:
    model = tiny("llama")
    first = by_transformers(model, prompts()[2], 1)[0]
    found = list(generate(model, prompts(), SamplingParams(max_new_tokens=12), {first}, 0, "cpu"))
    assert found[0].token_ids == ()
    assert len(found[-1].token_ids) == 12


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9},
                                      {"temperature": 1.3, "top_k": 20}, {"temperature": 1.0, "top_k": 30, "top_p": 0.7}])
def test_sampling_does_not_depend_on_the_batch(settings: dict[str, float]) -> None:
    model = tiny("llama")
    stops = frozenset(range(20))
    found = [answers(model, SamplingParams(max_new_tokens=16, batch_size=size, seed=5, **settings), stops) for size in (1, 3, 16)]
    assert found[0] == found[1] == found[2]
    assert found[0] != answers(model, SamplingParams(max_new_tokens=16, seed=6, **settings), stops)


def test_the_same_prompt_gets_different_answers_at_different_places() -> None:
    asked = [prompts()[1]] * 6
    found = answers(tiny("llama"), SamplingParams(max_new_tokens=12, temperature=1.0), asked=asked)
    assert len({answer.token_ids for answer in found}) == 6


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_gives_the_tokens_of_generate(temperature: float, layout: Layout) -> None:
    family, prompt = CausalLM(tiny("qwen2"), tiny_tokenizer(), layout), prompts()[3]
    family.model.generation_config.eos_token_id = None
    family.tokenizer.eos_token = None
    sampling = SamplingParams(max_new_tokens=20, temperature=temperature, seed=3)
    whole = answers(deepcopy(family.model), sampling, asked=[prompt])[0].token_ids
    assert tuple(family.stream(prompt, sampling)) == whole
    stopped = replace(sampling, stop=(whole[9],))
    assert tuple(family.stream(prompt, stopped)) == whole[:whole.index(whole[9])]
    steps = family.stream(prompt, sampling)
    next(steps)
    assert not torch.is_inference_mode_enabled(), "between two tokens the caller is in his own mode"


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p", "vocabulary"), [
    (1.0, 0, 1.0, 0.0, 16), (0.7, 0, 1.0, 0.0, 16), (1.0, 5, 1.0, 0.0, 16), (1.0, 0, 0.6, 0.0, 16), (1.5, 8, 0.8, 0.0, 16),
    (1.0, 0, 1e-9, 0.0, 16), (1.0, 100, 0.9, 0.0, 16), (1.0, 0, 1.0, 0.2, 16), (1.0, 0, 0.8, 0.1, 16),
    (2.0, 0, 0.9, 0.0, 600), (0.5, 0, 0.5, 0.0, 600)])  # a nucleus of more tokens than are selected at first, and a small one
def test_choices_follow_the_distribution_of_transformers(temperature: float, top_k: int, top_p: float, min_p: float,
                                                         vocabulary: int) -> None:
    logits = torch.randn(1, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(None, logits).softmax(-1)[0]
    throws = 20000
    dice = [(i + 0.5) / throws for i in range(throws)]  # evenly, so that frequencies are exact to one throw
    picked = sample_tokens(logits.expand(throws, -1), SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p,
                                                                        min_p=min_p), dice)
    shares = torch.bincount(picked, minlength=vocabulary) / throws
    assert torch.allclose(shares.double(), expected, atol=2 / throws)
    assert (shares[expected == 0] == 0).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_context_ends_an_answer(kind: str) -> None:
    model = tiny(kind, **({"n_positions": 32} if kind == "gpt2" else {"max_position_embeddings": 32}))
    found = answers(model, SamplingParams(max_new_tokens=20))
    assert [len(answer.token_ids) for answer in found] == [min(20, 32 - length) for length in LENGTHS]
    assert not any(answer.finished for answer in found)


def test_prompts_that_cannot_be() -> None:
    model = tiny("llama", max_position_embeddings=16)
    with pytest.raises(BaseError, match="prompt 1 has 16 tokens, and the base's context of 16"):
        list(generate(model, [[1], [1] * 16], SamplingParams(), set(), 0, "cpu"))
    with pytest.raises(DataError, match="prompt 0 has no tokens"):
        list(generate(model, [[]], SamplingParams(), set(), 0, "cpu"))
    assert list(generate(model, [], SamplingParams(), set(), 0, "cpu")) == []


def test_a_model_in_training_mode_is_a_programmers_mistake() -> None:
    with pytest.raises(AssertionError, match="dropout"):
        list(generate(tiny("llama").train(), [[1]], SamplingParams(), set(), 0, "cpu"))


def test_no_token_is_made_of_what_is_not_a_number() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFinite, match="prompt 0"):
            list(generate(model, [[1]], SamplingParams(temperature=temperature), set(), 0, "cpu"))


def test_eos_is_the_models_and_the_tokenizers() -> None:
    model = tiny("llama")
    assert find_eos_tokens(model, SimpleNamespace(eos_token_id=None)) == {IM_END}
    assert find_eos_tokens(model, SimpleNamespace(eos_token_id=3)) == {IM_END, 3}
    model.generation_config.eos_token_id = [4, 5]
    assert find_eos_tokens(model, SimpleNamespace(eos_token_id=3)) == {3, 4, 5}
    model.generation_config.eos_token_id = None
    assert find_eos_tokens(model, SimpleNamespace(eos_token_id=None)) == set()
