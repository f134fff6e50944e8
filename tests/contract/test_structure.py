"""A base with a changed structure is a base: what it says is known exactly, runs on it reopen, others load it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier import assembly
from luthier.api.export import export
from luthier.api.train import train
from luthier.assembly.factory import check_loaded_model
from luthier.assembly.run_io import open_run
from luthier.assembly.run_warnings import find_unused_settings
from luthier.core.errors import BaseError, RecipeError
from luthier.models import ModelConfig, prepare_folder
from luthier.models.surgery import SurgeryConfig, modify_model
from tiny import save_tiny, tiny, tiny_tokenizer

DECODERS = ("llama", "qwen2", "gpt2", "mistral", "gemma2", "gemma3")
# Equal weights at another place in memory: on some processors a product's last bits depend on where its numbers lie.
ELSEWHERE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
LAYERS = {"gemma3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}}
IDS = torch.randint(0, 250, (2, 19), generator=torch.Generator().manual_seed(0))
LINES = "".join(json.dumps({"text": text}) + "\n" for text in ("a crane lifts", "the crane stands", "a <crane> lifts"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def said(model: Any, ids: Tensor = IDS) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def deep(kind: str) -> dict[str, Any]:
    """The settings of a tiny model of three blocks."""
    return {"num_hidden_layers": 3, **LAYERS.get(kind, {})}


def changed(kind: str, **settings: Any) -> tuple[Any, Any, Any]:
    """The base, the changed base, and its tokenizer."""
    base, tokenizer = tiny(kind, **deep(kind)), tiny_tokenizer()
    found = deepcopy(base)
    modify_model(found, tokenizer, SurgeryConfig(**settings))
    return base, found, tokenizer


def reopened(path: Path, **structure: Any) -> tuple[Any, Any]:
    """The changed base of a folder, as Transformers alone loads it, and its tokenizer."""
    found = prepare_folder(ModelConfig(name_or_path=str(path), surgery=SurgeryConfig(**structure)))
    return AutoModelForCausalLM.from_pretrained(found, dtype="auto").eval(), AutoTokenizer.from_pretrained(found)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("kind", DECODERS)
def test_added_blocks_start_as_the_identity_and_learn(kind: str) -> None:
    base, found, _ = changed(kind, expand_layers=(0, 2))
    assert found.config.num_hidden_layers == 5
    assert torch.equal(said(found), said(base))
    found(input_ids=IDS, labels=IDS).loss.backward()
    block: Any = assembly.CausalLM(found, tiny_tokenizer()).structure.layers[1]
    gradients = {role: [p.grad for n, p in block.module.named_parameters() if n.rpartition(".")[0].endswith(role)]
                 for role in ("o_proj", "down_proj", "c_proj")}
    last = [g for found in gradients.values() for g in found]
    assert last
    assert all(g is not None and g.abs().max() > 0 for g in last)
    with torch.no_grad():
        block.mlp_out.weight.add_(0.01)
    assert not torch.equal(said(found), said(base))


@pytest.mark.parametrize("kind", [*DECODERS, "mixtral"])
def test_dropped_blocks_are_stepped_over(kind: str) -> None:
    """The oracle: the base, its dropped block made to hand on what comes in."""
    base, found, _ = changed(kind, drop_layers=(1,))
    handed = base.model.layers if kind != "gpt2" else base.transformer.h
    whole = said(base)
    handed[1].register_forward_hook(lambda module, args, kwargs, out: args[0] if args else kwargs["hidden_states"],
                                    with_kwargs=True)
    assert found.config.num_hidden_layers == 2
    assert torch.equal(said(found), said(base))
    assert not torch.allclose(said(found), whole)


def test_blocks_keep_what_the_config_says_of_each() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    base: Any = tiny("gemma2", num_hidden_layers=4, layer_types=types)
    modify_model(base, tiny_tokenizer(), SurgeryConfig(drop_layers=(0,), expand_layers=(1, 2)))
    assert base.config.layer_types == [types[i] for i in (1, 1, 2, 2, 3)]
    assert [block.self_attn.layer_idx for block in base.model.layers] == [0, 1, 2, 3, 4]


def test_order_of_blocks() -> None:
    spread = SurgeryConfig(expand_layers=2).list_layers(6)
    assert [block for block, copy in spread if copy] == [2, 5]
    assert SurgeryConfig(expand_layers=(1,), drop_layers=(0,)).list_layers(3) == [(1, False), (1, True), (2, False)]
    assert SurgeryConfig(expand_layers=3, drop_layers=(0,)).list_layers(4) == [(i, copy) for i in (1, 2, 3)
                                                                         for copy in (False, True)]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(("kind", "size"), [("llama", 264), ("qwen2", 264), ("gpt2", 264), ("llama", 259)])
def test_new_words_start_from_their_description(kind: str, size: int) -> None:
    """With rows to spare (264 for 259 tokens) and without."""
    tokenizer = tiny_tokenizer()
    base: Any = tiny(kind, vocab_size=size)
    old = deepcopy(base)
    modify_model(base, tokenizer, SurgeryConfig(new_tokens={"<crane>": "a bird", "<lift>": "up"}))
    assert tokenizer("x<crane><lift>")["input_ids"] == [ord("x"), 259, 260]
    assert tokenizer.decode([259]) == "<crane>"
    for get in ("get_input_embeddings", "get_output_embeddings"):
        rows, before = (getattr(model, get)().weight for model in (base, old))
        for place, words in ((259, "a bird"), (260, "up")):
            assert torch.equal(rows[place], before[list(words.encode())].mean(0))
        assert torch.equal(rows[:259], before[:259])
    assert rows.shape[0] == base.config.vocab_size == max(size, 261)
    torch.testing.assert_close(said(base)[..., :259], said(old)[..., :259], **ELSEWHERE)
    tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert tied == (old.get_input_embeddings().weight is old.get_output_embeddings().weight) == (kind != "llama")


# ---------------------------------------------------------------- folders and runs


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma3"])
def test_transformers_loads_the_changed_base(kind: str, tmp_path: Path) -> None:
    structure: dict[str, Any] = {"new_tokens": {"<crane>": "a bird"}, "expand_layers": (2,), "drop_layers": (0,)}
    path = save_tiny(tmp_path / "base", kind, **deep(kind))
    _, wanted, _ = changed(kind, **structure)
    model, tokenizer = reopened(path, **structure)
    assert all(torch.equal(mine, other) for mine, other in
               zip(model.state_dict().values(), wanted.state_dict().values(), strict=True))
    torch.testing.assert_close(said(model), said(wanted), **ELSEWHERE)
    assert tokenizer("<crane>")["input_ids"] == [259]
    plain = [model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=cached).tolist()
             for cached in (True, False)]
    assert plain[0] == plain[1]
    made = prepare_folder(ModelConfig(name_or_path=str(path), surgery=SurgeryConfig(**structure)))
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert prepare_folder(ModelConfig(name_or_path=str(path), surgery=SurgeryConfig(**structure))) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    assert prepare_folder(ModelConfig(name_or_path=str(path), surgery=SurgeryConfig(expand_layers=1))) != made


@pytest.mark.parametrize("method", ["lora", "full"])
def test_runs_on_a_changed_base_reopen(method: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(LINES)
    path = save_tiny(tmp_path / "base", "llama")
    settings: dict[str, Any] = {"model.name_or_path": str(path), "model.dtype": "float64", "data": str(tmp_path / "rows.jsonl"),
                "objective": "pretrain", "output_dir": str(tmp_path / "run"), "training.max_steps": 3, "training.batch_size": 2,
                "method": method, "optimizer.learning_rate": 0.01,
                "model.surgery": {"new_tokens": {"<crane>": "a bird"}, "expand_layers": 1, "drop_layers": [0]}}
    run = train(None, quiet=True, **settings)
    (tmp_path / "cache").rename(tmp_path / "lost")  # a run needs its recipe and the base, and nothing of the cache
    made, base, attached = open_run(run)
    assert base.structure.sizes["layers"] == 2
    assert made.model.surgery is not None
    tuned = said(base.structure.model)
    bare = said(reopened(path, **made.model.surgery.model_dump())[0])
    assert not torch.allclose(tuned, bare, atol=1e-4)
    if method == "lora":
        from peft import PeftModel
        assert attached is not None
        with attached.disabled():
            assert torch.equal(said(base.structure.model), bare)
        named = json.loads((run.path / "adapter_config.json").read_text())["base_model_name_or_path"]
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(named, dtype="auto"), run.path).eval()
        assert torch.allclose(said(peft), tuned, atol=1e-12)
    merged = AutoModelForCausalLM.from_pretrained(export(run, "merged"), dtype="auto").eval()
    assert torch.allclose(said(merged), tuned, atol=1e-12)
    assert train(None, quiet=True, resume=True, **settings).path == run.path


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("structure", "words"), [
    ({}, "nothing is changed"), ({"expand_layers": -1}, "above 0"), ({"drop_layers": (1, 1)}, "once"),
    ({"expand_layers": (1,), "drop_layers": (1,)}, "both copied and dropped"),
])
def test_faults_that_need_no_base(structure: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        assembly.build_recipe({"data": "-", "model": {"surgery": structure}})


@pytest.mark.parametrize(("structure", "words"), [
    ({"drop_layers": (3,)}, "0 to 2"), ({"drop_layers": (0, 1, 2)}, "no layer would be left"),
    ({"expand_layers": 4}, "at most one copy after each of 3"), ({"new_tokens": {"a": "b"}}, "already"), ({"new_tokens": {" ": "b"}}, "empty"),
    ({"new_tokens": {"<x>": ""}}, "no tokens"),
])
def test_faults_that_the_base_shows(structure: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base", "llama", num_hidden_layers=3)
    with pytest.raises(RecipeError, match=words):
        prepare_folder(ModelConfig(name_or_path=str(path), surgery=SurgeryConfig(**structure)))
    assert not list((tmp_path / "cache").glob("[!.]*"))


@pytest.mark.parametrize(("kind", "words"), [("mixtral", "no linear output projection"), ("bert", "plain causal language models only")])
def test_bases_that_are_not_changed(kind: str, words: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "base", kind)
    with pytest.raises(BaseError, match=words):
        prepare_folder(ModelConfig(name_or_path=str(path), surgery=SurgeryConfig(expand_layers=1)))


@pytest.mark.parametrize(("method", "words"), [({"name": "lora", "use_dora": True}, "divides by"), ("ia3", "stays zero"),
                                               ({"name": "lora", "init_lora_weights": "pissa"}, "singular vectors")])
def test_methods_that_cannot_train_a_silent_block(method: Any, words: str) -> None:
    family = assembly.CausalLM(tiny("llama"), tiny_tokenizer())
    structure = {"surgery": {"expand_layers": 1}}
    with pytest.raises(RecipeError, match=words):
        check_loaded_model(assembly.build_recipe({"data": "-", "model": structure, "method": ["bitfit", method]}), family)
    check_loaded_model(assembly.build_recipe({"data": "-", "method": method}), family)
    check_loaded_model(assembly.build_recipe({"data": "-", "model": structure, "method": "lora"}), family)


def test_words_that_do_not_train_are_told() -> None:
    words = {"surgery": {"new_tokens": {"<crane>": "a bird"}}}
    assert any("new_tokens" in line for line in find_unused_settings(assembly.build_recipe({"data": "-", "model": words})))
    assert not find_unused_settings(assembly.build_recipe({"data": "-", "model": words, "method": "full"}))


def test_added_blocks_share_the_config() -> None:
    """What is set of the whole model, such as how it attends, reaches them."""
    _, found, _ = changed("llama", expand_layers=1)
    assert {id(m.config) for m in found.modules() if isinstance(getattr(m, "config", None), type(found.config))} == {
        id(found.config)}


def test_a_block_that_is_not_silent_is_refused() -> None:
    """A block that adds something of its own after its last map (here by a hook that the copy has too)."""
    model: Any = tiny("llama")
    for block in model.model.layers:
        block.register_forward_hook(lambda module, args, out: out + 1.0)
    with pytest.raises(BaseError, match="do not become the identity"):
        modify_model(model, tiny_tokenizer(), SurgeryConfig(expand_layers=1))
