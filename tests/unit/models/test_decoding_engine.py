"""Sequences that come and go: each output is what the same request gives alone. Read `models/decoding.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from luthier.core.errors import BaseError, DataError, NotFinite
from luthier.core.generation import SamplingParams, SequenceRequest, TokenLogprob, TokenOutput
from luthier.models.attention.cached import BLOCK
from luthier.models.decoding import DecodingEngine
from luthier.models.families.causal import CausalLM
from luthier.models.sampling import SamplingState
from tiny import KINDS, tiny, tiny_tokenizer

GREEDY = SamplingParams(max_new_tokens=12)
SETTINGS = (  # as different as requests of different clients are
    GREEDY, replace(GREEDY, temperature=1.0, seed=3), replace(GREEDY, temperature=0.7, top_p=0.8, seed=4),
    replace(GREEDY, temperature=1.2, top_k=9, max_new_tokens=20), replace(GREEDY, temperature=1.0, min_p=0.1, seed=9),
    replace(GREEDY, presence_penalty=1.5), replace(GREEDY, frequency_penalty=0.7, temperature=0.5, seed=1),
    replace(GREEDY, repetition_penalty=1.3), replace(GREEDY, logit_bias={7: 100.0}, max_new_tokens=3),
    replace(GREEDY, logprobs=3))


def family(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> CausalLM:
    made = CausalLM(tiny(kind, dtype=dtype, **options), tiny_tokenizer(), "packed")
    made.tokenizer.eos_token = None
    made.model.generation_config.eos_token_id = None
    return made


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine: DecodingEngine, *requests: SequenceRequest) -> dict[SequenceRequest, list[TokenOutput]]:
    """All outputs of requests that are added at once."""
    for request in requests:
        engine.add(request)
    found: dict[SequenceRequest, list[TokenOutput]] = {request: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request, []).append(output)
    return found


def ids(outputs: Sequence[TokenOutput]) -> list[int | None]:
    return [output.token for output in outputs]


# ---------------------------------------------------------------- independence


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])  # its softmax is float32
def test_requests_of_all_settings_together_are_the_same_alone(kind: str) -> None:
    model = family(kind)
    requests = [SequenceRequest(tokens(3 + 11 * i, i), sampling, index=i) for i, sampling in enumerate(SETTINGS)]
    alone = [ids(run(model.build_engine(1), request)[request]) for request in requests]
    assert len({tuple(found) for found in alone}) == len(alone), "the requests must differ"
    engine = model.build_engine(4)
    engine.prefill_chunk = 16
    together: dict[SequenceRequest, list[TokenOutput]] = {}
    for number, request in enumerate(requests):  # they arrive one by one, while others are being decoded
        engine.add(request)
        for _ in range(number % 3):
            for output in engine.step():
                together.setdefault(output.request, []).append(output)
    for request, outputs in run(engine).items():
        together.setdefault(request, []).extend(outputs)
    assert [ids(together[request]) for request in requests] == alone
    assert engine.statistics["running"] == engine.statistics["waiting"] == engine.statistics["kv_cache_bytes"] == 0


def test_equal_prompts_are_read_once_and_decoded_apart() -> None:
    model = family()
    prompt = tokens(30)
    requests = [SequenceRequest(prompt, replace(GREEDY, temperature=1.0), index=i) for i in range(6)]
    alone = [ids(run(model.build_engine(1), request)[request]) for request in requests]
    rows: list[int] = []
    engine = model.build_engine(8)
    original = model._run_packed
    model._run_packed = lambda inputs, **options: (rows.append(len(inputs.tokens)), original(inputs, **options))[1]  # type: ignore[method-assign]
    together = run(engine, *requests)
    assert [ids(together[request]) for request in requests] == alone
    assert rows[0] == 30, "six equal prompts are one segment"
    assert rows[1] == 6


def test_a_long_prompt_is_read_in_parts_between_steps_of_others() -> None:
    model = family()
    short, long = SequenceRequest([5, 6], replace(GREEDY, max_new_tokens=40)), SequenceRequest(tokens(100), GREEDY)
    wanted = [ids(run(model.build_engine(1), request)[request]) for request in (short, long)]
    engine = model.build_engine(4)
    engine.prefill_chunk = 16
    engine.add(short)
    engine.step()
    engine.add(long)
    found: dict[SequenceRequest, list[TokenOutput]] = {short: [], long: []}
    for step in range(7):
        outputs = engine.step()
        assert [output.request for output in outputs].count(short) == 1, "no step leaves it out"
        assert (long in [output.request for output in outputs]) == (step >= 6)
        for output in outputs:
            found[output.request].append(output)
    rest = run(engine)
    for request in found:
        found[request] += rest[request]
    assert ids(found[long]) == wanted[1]
    assert ids(found[short]) == wanted[0][1:], "its first token came before the long prompt"


def test_long_prompts_together_are_read_within_the_budget_of_a_step() -> None:
    model = family()
    engine = model.build_engine(8)
    engine.prefill_chunk = 16
    engine.add(SequenceRequest([5, 6], replace(GREEDY, max_new_tokens=60)))
    engine.step()
    rows: list[int] = []
    original = model._run_packed
    model._run_packed = lambda inputs, **options: (rows.append(len(inputs.tokens)), original(inputs, **options))[1]  # type: ignore[method-assign]
    for seed in range(3):
        engine.add(SequenceRequest(tokens(60, seed), GREEDY))
    for _ in range(14):
        before = len(rows)
        engine.step()
        assert sum(rows[before:]) <= 1 + 16 + 15 + 3, "one new token each, one chunk, and the rest of a chunk"
    assert len(rows) > 14


def test_a_cancelled_request_leaves_at_once_and_changes_nothing() -> None:
    model = family()
    one, two = (SequenceRequest(tokens(9, i), replace(GREEDY, max_new_tokens=20)) for i in range(2))
    wanted = ids(run(model.build_engine(1), two)[two])
    engine = model.build_engine(2)
    engine.add(one)
    engine.add(two)
    first = [output for output in engine.step() if output.request is two]
    engine.cancel(one)
    assert engine.statistics["running"] == 1
    rest = run(engine)
    assert one not in rest
    assert ids([*first, *rest[two]]) == wanted
    engine.cancel(two)  # it has ended: nothing happens


def test_a_static_batch_admits_only_when_it_is_empty() -> None:
    model = family()
    engine = model.build_engine(4, is_continuous=False)
    long, late = SequenceRequest([1], replace(GREEDY, max_new_tokens=9)), SequenceRequest([2], GREEDY)
    engine.add(long)
    engine.step()
    engine.add(late)
    order = [output.request for _ in range(30) if engine.has_work for output in engine.step()]
    assert order == [long] * 8 + [late] * 12


def test_the_memory_of_keys_and_values_is_limited() -> None:
    model = family()
    requests = [SequenceRequest(tokens(20, i), GREEDY, index=i) for i in range(5)]
    alone = [ids(run(model.build_engine(1), request)[request]) for request in requests]
    probe = model.build_engine(1)
    probe.add(requests[0])
    probe.step()
    limit = 2 * 32 * int(probe.statistics["kv_cache_bytes"]) // (2 * BLOCK)  # two sequences of 32 tokens
    engine = model.build_engine(8, max_cache_bytes=limit)
    for request in requests:
        engine.add(request)
    found: dict[SequenceRequest, list[TokenOutput]] = {request: [] for request in requests}
    most = 0
    while engine.has_work:
        for output in engine.step():
            found[output.request].append(output)
        most = max(most, int(engine.statistics["running"]))
    assert most == 2
    assert [ids(found[request]) for request in requests] == alone


# ---------------------------------------------------------------- the prefix cache


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3"])
def test_the_prefix_cache_changes_no_output(kind: str) -> None:
    model = family(kind)
    start = tokens(2 * BLOCK + 5)
    first = SequenceRequest([*start, 1, 2, 3], GREEDY)
    others = [SequenceRequest([*start, *tokens(9, 7)], GREEDY), SequenceRequest(start[:BLOCK + 1], GREEDY),
              SequenceRequest([*start, 1, 2, 3], GREEDY), SequenceRequest(tokens(150, 8), GREEDY)]
    alone = [ids(run(model.build_engine(1), request)[request]) for request in others]
    engine = model.build_engine(4, prefix_cache_bytes=2**30)
    run(engine, first)
    found = run(engine, *others)
    assert [ids(found[request]) for request in others] == alone
    assert [found[request][0].cached_tokens for request in others] == [2 * BLOCK, BLOCK, 2 * BLOCK, 0]
    assert engine.statistics["prefix_cache_hits"] == 5 * BLOCK
    apart = SequenceRequest(first.prompt, GREEDY, use_prefix_cache=False)
    assert run(engine, apart)[apart][0].cached_tokens == 0


def test_the_prefix_cache_drops_what_was_not_used_longest() -> None:
    model = family()
    prompts = [tokens(BLOCK + 3, i) for i in range(3)]
    engine = model.build_engine(1, prefix_cache_bytes=2**30)
    run(engine, SequenceRequest(prompts[0], GREEDY))
    size = int(engine.statistics["prefix_cache_bytes"])
    engine = model.build_engine(1, prefix_cache_bytes=2 * size)
    for prompt in (*prompts[:2], prompts[0], prompts[2]):  # the second is the oldest when the third comes
        run(engine, SequenceRequest(prompt, GREEDY))
    assert engine.statistics["prefix_cache_bytes"] <= 2 * size
    hits = [run(engine, request)[request][0].cached_tokens
            for request in (SequenceRequest(prompts[0], GREEDY), SequenceRequest(prompts[2], GREEDY))]
    assert hits == [BLOCK, BLOCK]
    again = SequenceRequest(prompts[1], GREEDY)
    assert run(engine, again)[again][0].cached_tokens == 0


def test_an_adapter_that_was_loaded_again_has_a_cache_of_its_own() -> None:
    model, version = family(), [1]
    engine = model.build_engine(1, prefix_cache_bytes=2**30, versions=lambda adapter: version[0])
    prompt = tokens(BLOCK + 9)
    run(engine, SequenceRequest(prompt, GREEDY))
    version[0] = 2
    again = SequenceRequest(prompt, GREEDY)
    assert run(engine, again)[again][0].cached_tokens == 0


# ---------------------------------------------------------------- log-probabilities, penalties, grammars, errors


def test_log_probabilities_are_those_of_a_plain_forward_pass() -> None:
    model = family()
    request = SequenceRequest(tokens(9), replace(GREEDY, temperature=1.3, logprobs=4, presence_penalty=1.0))
    outputs = run(model.build_engine(2), request)[request]
    with torch.no_grad():
        whole = model.model(input_ids=torch.tensor([[*request.prompt, *ids(outputs)]])).logits[0].log_softmax(-1)
    for place, output in enumerate(outputs, len(request.prompt) - 1):
        found = output.logprob
        assert isinstance(found, TokenLogprob)
        assert found.token == output.token
        assert found.logprob == pytest.approx(float(whole[place, output.token]), abs=1e-9)
        values, order = whole[place].topk(4)
        assert [token for token, _ in found.top] == order.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_penalties_are_those_of_their_definitions() -> None:
    logits = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = SamplingState(SequenceRequest([1, 2], replace(GREEDY, repetition_penalty=1.7)))
    for token in (2, 5, 5):
        state.push(token)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[1, 2, 2, 5, 5]]), logits[None].clone())[0]
    assert torch.equal(state.adjust(logits), wanted)
    state = SamplingState(SequenceRequest([1, 2], replace(GREEDY, presence_penalty=0.5, frequency_penalty=0.25,
                                                          logit_bias={3: -2.0, 5: 1.0})))
    for token in (2, 5, 5):
        state.push(token)
    wanted = logits.clone()  # OpenAI: mu_j - c_j * frequency - (c_j > 0) * presence; the prompt does not count
    wanted[2] -= 0.75
    wanted[5] -= 1.0 - 1.0
    wanted[3] -= 2.0
    assert torch.allclose(state.adjust(logits), wanted, atol=1e-15)


def test_only_allowed_tokens_follow() -> None:
    model = family()

    def allow(generated: Sequence[int]) -> Tensor | None:
        if len(generated) > 5:
            return None
        allowed = torch.zeros(model.structure.sizes["vocabulary"], dtype=torch.bool)
        allowed[[10 + len(generated), 40 + len(generated)]] = True
        return allowed

    for sampling in (GREEDY, replace(GREEDY, temperature=2.0)):
        request = SequenceRequest(tokens(4), sampling, allowed_tokens=allow)
        found = ids(run(model.build_engine(2), request, SequenceRequest([1], GREEDY))[request])
        assert all(token in (10 + i, 40 + i) for i, token in enumerate(found[:6]))
        assert len(found) == 12


def test_a_row_that_is_not_finite_fails_alone() -> None:
    model = family(dtype=torch.float32)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[200] = float("nan")
    good, bad = SequenceRequest([1, 2, 3], GREEDY), SequenceRequest([1, 200, 3], GREEDY)
    wanted = ids(run(model.build_engine(1), good)[good])
    if 200 in wanted:
        pytest.skip("the good prompt meets the broken token")
    found = run(model.build_engine(2), good, bad)
    assert ids(found[good]) == wanted
    assert [output.finish_reason for output in found[bad]] == ["error"]
    assert isinstance(found[bad][0].error, NotFinite)


def test_prompts_that_cannot_be_read_are_refused_when_they_are_added() -> None:
    engine = family(max_position_embeddings=16).build_engine(2)
    with pytest.raises(BaseError, match="16 tokens, and the base's context of 16"):
        engine.add(SequenceRequest([1] * 16, GREEDY))
    with pytest.raises(DataError, match="has no tokens"):
        engine.add(SequenceRequest([], GREEDY))
    assert not engine.has_work
