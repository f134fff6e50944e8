"""Every fast path against its slow twin: loss and all gradients, in float64. Read `lab.py` first.

Beside each equality stands a control: the same comparison with the thing broken must come out far apart.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lab import SFT, TREES, apart, attach, base, documents, measured, paths, trees
from torch import nn
from transformers import AttentionInterface

from luthier.core.examples import Origin
from luthier.core.types import SegmentTree, TokenizedExample, TokenSpan
from luthier.data.packing import build_batch, pack_examples
from luthier.models.attention import packed as segment_tree
from luthier.models.ops import fused_logprobs
from tiny import KINDS

pytestmark = pytest.mark.usefixtures("double")

SAME, FAR = 1e-9, 1e-3
METHOD = pytest.mark.parametrize("method", ["full", "lora"])
KIND = pytest.mark.parametrize("kind", KINDS)


def merged_documents(examples: list[TokenizedExample]) -> TokenizedExample:
    """The control for packing: all tokens as one document, with the weight of each document's first token at 0."""
    spans = [span for example in examples for span in example.spans]
    return TokenizedExample((TokenSpan(tuple(i for p in spans for i in p.ids),
                                       tuple(w for p in spans for w in (0.0, *p.weights[1:]))),), Origin("lab", 0), 1)


# ---------------------------------------------------------------- packed rows


@KIND
def test_every_kind_proves_itself_packed(kind: str) -> None:
    assert base(kind).layout == "packed"


@pytest.mark.parametrize("how", ["sees everything before it", "cannot"])
def test_a_model_that_leaks_or_cannot_falls_to_padded(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(module, query, key, value, attention_mask, segment_tree=None, **options):
        mask = attention_mask if segment_tree is None or how == "cannot" else None
        return real(module, query, key, value, mask, **options)

    real = segment_tree.packed_attention
    monkeypatch.setitem(AttentionInterface._global_mapping, segment_tree.NAME, leaks)
    assert base("llama").layout == "padded"


@KIND
@METHOD
def test_packed_is_padded(kind: str, method: str) -> None:
    examples = [*documents(), *trees()]
    rows = [build_batch(examples)]
    packed = base(kind, "packed")
    found = measured(packed, attach(packed, method), rows)
    padded = base(kind, "padded")
    wanted = measured(padded, attach(padded, method), rows)
    assert apart(found, wanted) < SAME

    one_root = measured(packed, attach(packed, method, stirred=False), [build_batch([merged_documents(documents())])])
    apart_roots = measured(packed, attach(packed, method, stirred=False), [build_batch(documents())])
    assert apart(one_root, apart_roots) > FAR


@KIND
@METHOD
def test_a_tree_is_each_of_its_paths_alone(kind: str, method: str) -> None:
    family = base(kind, "packed")
    attached = attach(family, method)
    for tree in trees():
        whole, alone = [build_batch([tree])], [build_batch([path]) for path in paths(tree)]
        assert apart(measured(family, attached, whole), measured(family, attached, alone)) < SAME
        assert (log_probs(family, whole) - log_probs(family, alone)).abs().max() < SAME

    siblings = TokenizedExample(tuple(TokenSpan(p.ids, p.weights, i - 1) for i, p in enumerate(trees()[0].spans)), Origin("lab", 0))
    assert apart(measured(family, attached, [build_batch([siblings])]), measured(family, attached, [build_batch(trees()[:1])])) > FAR


@KIND
@METHOD
def test_a_chopped_segment_is_the_whole(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of links of 4 tokens against rows that are not chopped at all; beside them links that have lost theirs."""
    def found(link: int, cut: bool = False) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(segment_tree, "CHAIN_LENGTH", link)
        segment_tree._split_long_segments.cache_clear()
        row = build_batch([*documents(), *trees()])
        chain = segment_tree._split_long_segments(row.inputs.segment_tree)
        links.append(len(chain.lengths))
        if cut:
            monkeypatch.setattr(segment_tree, "_split_long_segments", lambda f: SegmentTree(chain.lengths, (-1,) * len(chain.lengths)))
        family = base(kind, "packed")
        return measured(family, attach(family, method), [row])

    links: list[int] = []
    whole = found(1000)
    assert apart(found(4), whole) < SAME
    assert links[1] > 2 * links[0]
    assert apart(found(4, cut=True), whole) > FAR
    monkeypatch.undo()
    segment_tree._split_long_segments.cache_clear()


def log_probs(family, rows) -> torch.Tensor:
    """Log-probabilities in the order of their weights, each of which is another one."""
    found = [(float(w), lp) for row in rows
             for w, lp in zip(row.target.weights, family.forward(row.inputs, row.target, SFT.required_outputs).token_logps, strict=True)]
    assert len({w for w, _ in found}) == len(found) > 20
    return torch.stack([lp for _, lp in sorted(found, key=lambda pair: pair[0])])


def test_the_trees_are_trees() -> None:
    depths = [max(len(build_batch([tree]).inputs.segment_tree.find_path(i)) for i in range(len(tree.spans))) for tree in trees()]
    assert len(TREES) == len(depths)
    assert max(depths) == 3
    assert any(len(paths(tree)) > 2 for tree in trees())


@KIND
def test_packed_is_transformers_own_model_one_document_at_a_time(kind: str) -> None:
    """The loss and every gradient of the untouched model, eager attention, whole logits and torch's cross-entropy."""
    family = base(kind)
    found = measured(family, attach(family, "full", stirred=False), [build_batch(documents())])

    plain = base(kind).model
    plain.set_attn_implementation("eager")
    weight = sum(sum(e.spans[0].weights[1:]) for e in documents())
    for flat in (False, True):  # flat: the control, in which every token has the same weight
        plain.zero_grad()
        loss = 0.0
        for example in documents():
            ids, weights = torch.tensor(example.spans[0].ids), torch.tensor(example.spans[0].weights).double()
            each = F.cross_entropy(plain(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            loss = loss + (each * (weights[1:] > 0 if flat else weights[1:])).sum() / weight
        loss.backward()
        wanted = {"loss": loss.detach(), **{n: p.grad for n, p in plain.named_parameters()}}
        assert (apart(found, wanted) > FAR) if flat else (apart(found, wanted) < SAME)


# ---------------------------------------------------------------- cutting a batch


@METHOD
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_how_a_batch_is_cut_changes_nothing(kind: str, method: str) -> None:
    family, examples = base(kind), [*documents(), *trees()]
    attached = attach(family, method)
    whole = measured(family, attached, pack_examples(examples, None))
    for max_tokens in (1, 16, 40, 100):
        rows = pack_examples(examples, max_tokens)
        assert apart(measured(family, attached, rows), whole) < SAME
        if max_tokens == 1:
            assert len(rows) == len(examples)

    means = [measured(family, attached, [row])["loss"] for row in pack_examples(examples, 1)]
    assert abs(float(sum(means) / len(means) / whole["loss"]) - 1) > FAR  # dividing each micro-batch by its own count


# ---------------------------------------------------------------- the head where it is needed

HEADS = {
    "frozen": {},
    "training": {"trains": True},
    "bias": {"bias": True, "trains": True},
    "soft cap": {"softcap": 3.0, "trains": True},
    "scale": {"scale": 0.3},
    "hooked": {"hook": True},
}


@pytest.mark.parametrize("case", HEADS)
def test_log_probs_are_those_of_the_whole_logits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = HEADS[case]
    softcap, scale = settings.get("softcap"), settings.get("scale", 1.0)
    generator = torch.Generator().manual_seed(0)
    positions, width, vocabulary = 70, 12, 50
    monkeypatch.setattr(fused_logprobs, "CHUNK_LOGITS", 16 * vocabulary)  # five chunks, the last of them short
    linear = nn.Linear(width, vocabulary, bias=settings.get("bias", False), dtype=torch.float64)
    linear.requires_grad_(settings.get("trains", False))
    if settings.get("hook"):
        linear.register_forward_hook(lambda module, args, output: output + args[0].sum(-1, keepdim=True) * output)
    states = torch.randn(positions, width, generator=generator, dtype=torch.float64).requires_grad_(True)
    tokens = torch.randint(vocabulary, (positions,), generator=generator)
    slope = torch.randn(positions, generator=generator, dtype=torch.float64)

    def whole() -> torch.Tensor:
        z = linear(states) * scale
        return z if softcap is None else torch.tanh(z / softcap) * softcap

    tokens[::3] = whole().argmax(-1)[::3]  # some hits

    def outcome(logps: torch.Tensor) -> dict[str, torch.Tensor]:
        trained = {"states": states, **{n: p for n, p in linear.named_parameters() if p.requires_grad}}
        slopes = torch.autograd.grad((logps * slope).sum(), list(trained.values()))
        return {"loss": logps.detach(), **dict(zip(trained, slopes, strict=True))}

    logps, hits, _ = fused_logprobs.compute_logprobs(linear, states, tokens, softcap, scale)
    found, best = outcome(logps), whole().argmax(-1)
    assert torch.equal(hits, best == tokens)
    assert 0 < int(hits.sum()) < positions
    assert ("weight" in found) == settings.get("trains", False)
    assert apart(found, outcome(-F.cross_entropy(whole(), tokens, reduction="none"))) < 1e-12
    assert apart(found, outcome(-F.cross_entropy(whole(), tokens.roll(1), reduction="none"))) > FAR


def test_the_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of the head's is larger than a chunk, on either path."""
    family = base("llama")
    largest = []

    def watched(size: slice) -> slice:
        largest.append(size.stop - size.start)
        return size

    real = fused_logprobs._split_positions
    monkeypatch.setattr(fused_logprobs, "CHUNK_LOGITS", 16 * 264)
    monkeypatch.setattr(fused_logprobs, "_split_positions", lambda *given: [watched(s) for s in real(*given)])
    for method in ("lora", "full"):
        largest.clear()
        row = build_batch(documents())
        measured(family, attach(family, method), [row])
        assert max(largest) <= 16 < len(row.target.state_index)


def test_a_prediction_without_weight_is_not_computed() -> None:
    examples = documents()
    wanted = sum(w > 0 for e in examples for w in e.spans[0].weights[1:])
    assert len(build_batch(examples).target.state_index) == wanted < sum(len(e.spans[0].ids) for e in examples) - len(examples)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_weights_of_tokens_are_factors_of_their_log_probs(kind: str) -> None:
    family = base(kind)
    row = build_batch(documents())
    with torch.no_grad():
        logps = family.forward(row.inputs, row.target, SFT.required_outputs).token_logps
        total = SFT(family.forward(row.inputs, row.target, SFT.required_outputs), row.target).total
    weights = row.target.weights.double()
    assert float(total) == pytest.approx(float(-(weights * logps).sum()), rel=1e-12)
    assert float(total) != pytest.approx(float(-logps.sum() * weights.mean()), rel=FAR)


# ---------------------------------------------------------------- memory for time


@KIND
@METHOD
def test_gradient_checkpointing_changes_nothing_but_the_work(kind: str, method: str) -> None:
    calls, rows = [], [build_batch([*documents(), *trees()])]

    def run(checkpointing: bool) -> dict[str, torch.Tensor]:
        family = base(kind)
        family.train(True)
        if checkpointing:
            family.enable_gradient_checkpointing()
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        family.structure.layers[0].attention.register_forward_hook(count)
        return measured(family, attach(family, method), rows)

    without = run(False)
    assert apart(run(True), without) < SAME
    assert calls == [1, 2]  # a block is computed again in the backward pass: it was really on


@METHOD
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_long_row_keeps_the_blocks_that_fit(kind: str, method: str) -> None:
    """Of three blocks, the row of which is half as long again as what memory is meant for, two are kept."""
    row = build_batch(documents())
    over = row.inputs.tokens.shape[0] * 2 // 3 + 1

    def run(over: int | None) -> tuple[dict[str, torch.Tensor], list[int]]:
        family = base(kind, num_hidden_layers=3)
        family.train(True)
        if over is not None:
            family.enable_gradient_checkpointing(over)
        calls = [0] * 3
        for i, block in enumerate(family.structure.layers):
            block.attention.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        return measured(family, attach(family, method), [row]), calls

    whole, once = run(None)
    part, calls = run(over)
    assert once == [1, 1, 1]
    assert calls == [2, 1, 1]
    assert apart(part, whole) < SAME


def test_a_block_that_is_recomputed_leaves_no_notes() -> None:
    """What makes a kept tensor again holds tensors itself: of a block that keeps nothing it would keep them all."""
    family = base("llama", num_hidden_layers=3)
    family.train(True)
    attach(family, "lora")
    noted: list[bool] = []
    family._recomputer.record, real = lambda *given: noted.append(family._recomputer._open) or real(*given), family._recomputer.record
    row = build_batch(documents())
    family.forward(row.inputs, row.target, SFT.required_outputs)
    every = len(noted)
    assert every == sum(noted) > 6
    noted.clear()
    family.enable_gradient_checkpointing(row.inputs.tokens.shape[0] * 2 // 3 + 1)
    family.forward(row.inputs, row.target, SFT.required_outputs)
    assert len(noted) == every
    assert sum(noted) * 3 == every * 2
