"""Documents with a part hidden: an encoder's own head and T5 guess it as Transformers' own loss has it, in runs that resume.

What is hidden stands in `tests/unit/data/test_masking.py`; read `lab.py` and `lab_t5.py` first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import apart, attach, measured
from lab_t5 import FAR, SAME, base, padded, t5, tokenizer, widen
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from luthier import assembly
from luthier.api.evaluate import evaluate
from luthier.api.train import train
from luthier.assembly.factory import load_family
from luthier.assembly.recipe import Recipe
from luthier.assembly.rl_setup import init_rl_policy
from luthier.assembly.run_io import open_run
from luthier.core.errors import BaseError, DataError, LuthierError, RecipeError
from luthier.core.examples import Origin, TextExample
from luthier.core.types import TokenizedExample
from luthier.data import DataConfig, DividedConfig, MaskingConfig, encode_example
from luthier.data.packing import build_batch, pack_examples
from luthier.data.transforms import apply_random
from luthier.models import Encoder
from luthier.models.ops import fused_logprobs
from luthier.objectives import OBJECTIVES
from luthier.training.run_folder import Run
from tiny import ENCODERS, PAD, VOCABULARY, pair_tokenizer, save_tiny, tiny, with_sentinels

KIND = pytest.mark.parametrize("kind", ENCODERS)
METHOD = pytest.mark.parametrize("method", ["full", "lora"])
PRETRAIN = OBJECTIVES["pretrain"]()
WORDS = pair_tokenizer()
SPANS = with_sentinels(tokenizer())
TEXTS = tuple(f"{'the fox and the dog ' * n}went {'on and ' * (5 - n)}home" for n in range(1, 5))


def examples(how: Any, texts: Sequence[str] = TEXTS) -> list[TokenizedExample]:
    """Documents as they go into a batch, each with something hidden."""
    told = SPANS if how == "spans" else WORDS
    config = DataConfig.parse({"train": "-"})
    found: list[TokenizedExample] = []
    for row, text in enumerate(texts):
        made = encode_example(TextExample(text, Origin("lab", row)), told, DividedConfig.of(config) if how == "spans" else config,
                              masking=MaskingConfig.of(told, how, "lab", span=9.0))
        assert isinstance(made, list)
        found += [apply_random(one, 0, 0, row) for one in made]
    return found


def encoder(kind: str, layout: Any = None, **overrides: Any) -> Encoder:
    return Encoder(tiny(kind, words=True, **overrides), WORDS, layout)


def theirs(model: Any, found: Sequence[TokenizedExample], shift: int = 0) -> Any:
    """Transformers' own loss of the same rows: the mean over what was hidden."""
    width = max(one.num_tokens for one in found)
    ids, mask = torch.full((len(found), width), PAD), torch.zeros(len(found), width, dtype=torch.int64)
    labels = torch.full((len(found), width), -100)
    for i, one in enumerate(found):
        span, = one.spans
        ids[i, :one.num_tokens], mask[i, :one.num_tokens] = torch.tensor(span.ids), 1
        for place in span.predicted:
            labels[i, place + shift] = span.tags[place]
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def grown(model: Any, loss: Tensor, names: dict[str, str]) -> dict[str, Tensor]:
    """The loss, and its gradient of each named parameter; `names`: ours -> theirs."""
    model.zero_grad()
    loss.backward()
    there = dict(model.named_parameters())
    return {"loss": loss.detach(), **{mine: there[own].grad for mine, own in names.items()}}


# ---------------------------------------------------------------- Transformers' own loss


@KIND
@pytest.mark.usefixtures("double")
def test_masked_words_cost_what_they_cost_in_transformers(kind: str) -> None:
    """Values and every gradient: embedding, stack, the head's transform and bias."""
    found, family = examples("words"), encoder(kind)
    attached = attach(family, "full")  # type: ignore[arg-type]
    mine = measured(family, attached, [build_batch(found)])  # type: ignore[arg-type]
    other = tiny(kind, words=True)
    other.load_state_dict(family.model.state_dict())  # `attach` stirs
    names = {name: name for name in attached.parameters()}
    assert names.keys() == dict(other.named_parameters()).keys()
    assert apart(mine, grown(other, theirs(other, found), names)) < SAME
    outside = [name for name in names if not name.startswith(family.model.base_model_prefix)]
    assert len(outside) == 5  # map and bias, norm and bias, and a bias for each word: all of them are learned
    assert all(float(mine[name].abs().max()) > FAR for name in outside)
    # The controls: the state before the hidden word guesses it, as in a decoder; nothing was hidden.
    assert apart(mine, grown(other, theirs(other, found, shift=-1), names)) > FAR
    bare = [TokenizedExample((p.__class__(tuple(t if t >= 0 else i for i, t in zip(p.ids, p.tags, strict=True)), p.weights, tags=p.tags),),
                             e.origin) for e in found for p in e.spans]
    assert apart(mine, grown(other, theirs(other, bare), names)) > FAR


@KIND
@pytest.mark.usefixtures("double")
def test_rows_and_chunks_do_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examples("words")
    for method in ("full", "lora"):
        family = encoder(kind, "packed")
        attached = attach(family, method)  # type: ignore[arg-type]
        wanted = measured(family, attached, [build_batch(found)])  # type: ignore[arg-type]
        assert apart(measured(family, attached, pack_examples(found, 90)), wanted) < SAME  # type: ignore[arg-type]
        with monkeypatch.context() as patched:
            patched.setattr(fused_logprobs, "CHUNK_LOGITS", 1)
            assert len(fused_logprobs._split_positions(40, VOCABULARY, torch.device("cpu"))) == 3
            assert apart(measured(family, attached, [build_batch(found)]), wanted) < SAME  # type: ignore[arg-type]
        slow = encoder(kind, "padded")
        assert apart(measured(slow, attach(slow, method), [build_batch(found)]), wanted) < SAME  # type: ignore[arg-type]
        assert apart(measured(family, attached, [build_batch(found[1:])]), wanted) > FAR  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["relu", "gated"])
@METHOD
def test_spans_cost_what_they_cost_in_transformers(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    widen(monkeypatch)
    found = examples("spans")
    family = base(kind)
    attached = attach(family, method)  # type: ignore[arg-type]
    mine = measured(family, attached, [build_batch(found)])  # type: ignore[arg-type]
    assert apart(measured(family, attached, pack_examples(found, 60)), mine) < SAME  # type: ignore[arg-type]
    attached.merge() if method == "lora" else None
    other = t5(kind)
    other.load_state_dict(family.model.state_dict())
    names = {name: name for name in attached.parameters()} if method == "full" else {}
    wanted = grown(other, other(**padded(found)).loss, names)
    assert apart({name: mine[name] for name in wanted}, wanted) < SAME
    other_rows = examples("spans", [text[1:] for text in TEXTS])
    assert apart({name: mine[name] for name in wanted}, grown(other, other(**padded(other_rows)).loss, names)) > FAR


LIKE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": PAD, "initializer_range": 0.15}
OTHERS: dict[str, dict[str, Any]] = {
    "albert": {**LIKE, "embedding_size": 16}, "electra": {**LIKE, "embedding_size": 16}, "deberta-v2": LIKE,
    "modernbert": {**LIKE, "cls_token_id": 256, "sep_token_id": 257, "bos_token_id": None, "eos_token_id": None,
                   "global_attn_every_n_layers": 2, "local_attention": 8}}


@pytest.mark.parametrize("kind", OTHERS)
def test_heads_of_other_architectures_are_found(kind: str) -> None:
    config = AutoConfig.for_model(kind, **OTHERS[kind])
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float64).eval()
    found = examples("words", [text[:40] for text in TEXTS])
    family = Encoder(model, WORDS)
    row = build_batch(found)
    with torch.no_grad():
        loss = PRETRAIN(family.forward(row.inputs, row.target, PRETRAIN.required_outputs), row.target)
        assert abs(loss.total / loss.count - theirs(model, found)) < 1e-5
        assert abs(loss.total / loss.count - theirs(model, found, shift=-1)) > FAR


def test_a_head_that_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert", words=True)
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda **named: [out := own(**named), setattr(out, "logits", out.logits.tanh())][0])
    with pytest.raises(BaseError, match="BertForMaskedLM computes its logits in an unsupported way"):
        Encoder(model, WORDS)


# ---------------------------------------------------------------- runs


def home(path: Path, kind: str) -> Path:
    if kind == "t5":
        t5("gated", torch.float32, num_decoder_layers=2, dropout_rate=0.1).save_pretrained(path / "base")
        SPANS.save_pretrained(path / "base")
    else:
        save_tiny(path / "base", kind, dtype=torch.float32, words=True, **(
            {"dropout": 0.1} if kind == "distilbert" else {"hidden_dropout_prob": 0.1}))
    (path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def recipe(path: Path, **settings: Any) -> dict[str, Any]:
    rows = str(path / "rows.jsonl")
    return {"model": str(path / "base"), "objective": "pretrain", "data": {"train": rows, "test": rows, "eval": rows},
            "training": {"max_steps": 6, "batch_size": 2, "save_steps": 2, "save_total_limit": 9, "eval_steps": 3, "load_best_model_at_end": False},
            "optimizer": {"learning_rate": 3e-3, "lr_scheduler_type": "constant"}, "seed": 4, **settings}


def outcome(run: Run) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    timed = ("seconds", "per_second", "memory")
    weights, = run.path.glob("*.safetensors")
    return load_file(weights), [{k: v for k, v in line.items() if not any(w in k for w in timed)} for line in run.metrics]


@METHOD
@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5"])
def test_a_run_learns_resumes_and_opens_again(kind: str, method: str, tmp_path: Path) -> None:
    """With dropout: twice the same to the bit, gone on from step 2 the same to the bit, opened again the same measures."""
    made = recipe(home(tmp_path, kind), method=method)
    run = train(made, output_dir=str(tmp_path / "run"), quiet=True)
    tensors, lines = outcome(run)
    assert run.results["test"]["nll"] < run.results["test_before"]["nll"]
    assert run.results["metric"] == "perplexity"
    assert "bits_per_byte" not in run.results["test"]
    again = train(made, output_dir=str(tmp_path / "again"), quiet=True)
    assert all(torch.equal(tensors[name], other) for name, other in outcome(again)[0].items())
    killed = tmp_path / "killed"
    shutil.copytree(run.path, killed)
    (killed / "README.md").unlink()
    for folder in ("step-4", "step-6"):
        shutil.rmtree(killed / "checkpoints" / folder)
    gone_on = outcome(train(made, output_dir=str(killed), resume=True, quiet=True))
    assert all(torch.equal(tensors[name], other) for name, other in gone_on[0].items())
    assert gone_on[1] == lines
    other = outcome(train({**made, "seed": 5}, output_dir=str(tmp_path / "other"), quiet=True))  # the control
    assert any(not torch.equal(tensors[name], found) for name, found in other[0].items())
    assert evaluate(run, quiet=True)["nll"] == pytest.approx(run.results["test"]["nll"], rel=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_the_head_is_saved_tied_and_other_objectives_go_on_from_the_run(kind: str, tmp_path: Path) -> None:
    made = recipe(home(tmp_path, kind), method="full")
    run = train(made, output_dir=str(tmp_path / "run"), quiet=True)
    assert "AutoModelForMaskedLM" in (run.path / "README.md").read_text()
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(run.path / "model.safetensors")
    assert before.keys() == after.keys()
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert {name.split(".")[0] for name in moved} == {name.split(".")[0] for name in after}
    _, family, _ = open_run(run)
    assert family.structure.tied
    assert family.structure.head is not None
    plain = AutoModelForMaskedLM.from_pretrained(run.path).eval()
    ids = torch.tensor([[256, *b"hello", 257]])
    family.train(False)
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, family.structure.model(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(plain(input_ids=ids).logits, AutoModelForMaskedLM.from_pretrained(
            tmp_path / "base").eval()(input_ids=ids).logits, atol=1e-2)
        assert AutoModel.from_pretrained(run.path)(input_ids=ids).last_hidden_state.shape == (1, 7, 32)
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps({"text": t, "label": t[0]}) + "\n" for t in ("ab", "cd")))
    tuned = train(model=str(run.path), method="lora", objective="classify", data=str(tmp_path / "labels.jsonl"), quiet=True,
                  output_dir=str(tmp_path / "classify"), training={"max_steps": 1, "batch_size": 2})
    assert tuned.results["steps"] == 1
    _, bare, _ = open_run(tuned)
    assert bare.structure.head is None  # whoever does not guess words has no head in memory


def test_an_adapter_is_pefts_on_the_model_with_its_head(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = train(recipe(home(tmp_path, "bert"), method="lora"), output_dir=str(tmp_path / "run"), quiet=True)
    _, family, _ = open_run(run)
    family.train(False)
    plain = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    bare = plain(input_ids=torch.tensor([[256, *b"hello", 257]])).logits
    other = peft.PeftModel.from_pretrained(plain, run.path).eval()
    with torch.no_grad():
        ids = torch.tensor([[256, *b"hello", 257]])
        assert torch.allclose(other(input_ids=ids).logits, family.structure.model(input_ids=ids).logits, atol=1e-5)
        assert not torch.allclose(other(input_ids=ids).logits, bare, atol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_another_objective_starts_from_what_an_adapter_learned(kind: str, tmp_path: Path) -> None:
    """The stack has other names without its head; its adapter goes along, there and back."""
    run = train(recipe(home(tmp_path, kind), method="lora"), output_dir=str(tmp_path / "run"), quiet=True)
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps({"text": t, "label": t[0]}) + "\n" for t in ("ab", "cd")))
    row = build_batch(examples("words"))

    def states(started: Recipe) -> Tensor:
        family = load_family(started.model, started.objective.uses_masking)
        init_rl_policy(started, family)
        family.train(False)
        with torch.no_grad():
            return family.forward(row.inputs, row.target, frozenset({"states"})).states  # type: ignore[return-value]

    _, tuned, _ = open_run(run)
    tuned.train(False)
    with torch.no_grad():
        wanted = tuned.forward(row.inputs, row.target, frozenset({"states"})).states
    made = assembly.build_recipe({"init_from": str(run.path), "objective": {"name": "classify", "labels": ["a", "c"]},
                         "data": str(tmp_path / "labels.jsonl"), "training": {"max_steps": 1, "batch_size": 2}})
    assert torch.allclose(states(made), wanted, atol=1e-6)
    assert not torch.allclose(states(made.model_copy(update={"init_from": None})), wanted, atol=1e-3)
    on = train(made, output_dir=str(tmp_path / "on"), quiet=True)
    back = assembly.build_recipe({"init_from": str(on.path), "objective": "pretrain", "data": str(tmp_path / "rows.jsonl")})
    assert torch.allclose(states(back), wanted, atol=1e-1)
    assert not torch.equal(states(back), wanted)


# ---------------------------------------------------------------- what cannot be


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    home(tmp_path, "bert")
    save_tiny(tmp_path / "bare", "bert", dtype=torch.float32)
    save_tiny(tmp_path / "llama", "llama", dtype=torch.float32)
    t5("gated", torch.float32).save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    made = recipe(tmp_path)

    def refused(kind: type[LuthierError], words: str, **settings: Any) -> None:
        with pytest.raises(kind, match=words):
            train({**made, **settings}, output_dir=str(tmp_path / "run"), quiet=True)

    refused(BaseError, r"bare'.* its files hold no masked-language-modeling head \(cls\.", model=str(tmp_path / "bare"))
    refused(BaseError, r"t5' has no sentinels", model=str(tmp_path / "t5"))
    refused(RecipeError, "does not predict them", objective="sft")
    refused(RecipeError, r"objective.mean_noise_span_length 5.0 has no effect on .*base': models of this kind do not use", objective={"name": "pretrain", "mean_noise_span_length": 5})
    refused(RecipeError, r"objective.mlm_probability 0.3 has no effect on .*llama': causal language models do not use", model=str(tmp_path / "llama"),
            objective={"name": "pretrain", "mlm_probability": 0.3})
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    refused(DataError, r"reads TextExample\n.*reads them: sft;")
