"""GGUF files say what the run says: llama.cpp, through llama-cpp-python, computes from them what Transformers computes.

Everything is in float32, the cache too, so that a row out of order or a bias forgotten cannot hide behind rounding.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from lab import attach, logits, stir
from lab_gguf import CORPUS, TEXTS, distance, llama, opened, saved, theirs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier import assembly
from luthier.api.export import export
from luthier.assembly.factory import load_family
from luthier.assembly.gguf_export import export_gguf_adapter, export_gguf_model
from luthier.assembly.run_io import save_tuned
from luthier.cli.main import main
from luthier.core.errors import BaseError, LuthierError, RunError
from luthier.core.protocols import SamplingParams
from luthier.models import CausalLM, ModelConfig
from luthier.models.gguf import writer as out
from luthier.models.gguf.bpe import CONTRACTIONS, DIGITS, GPT2, PRETOKENIZERS, get_pretokenizer_name
from luthier.training.run_folder import Run
from tiny import CHATML, KINDS, tiny, tiny_tokenizer

VOCABULARY = 480  # the tokenizers below have fewer words, so some rows of the embedding are unused
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
QWEN3: dict[str, Any] = {**KINDS["qwen2"], "model_type": "qwen3"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"head_dim": 16}),
    "llama3 angles": ("llama", {"rope_parameters": LLAMA3}),
    "linear angles": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
}


def tokenizer(splits: Sequence[str] = (GPT2,), whole: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges of its own, that splits text as `splits` says."""
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    steps = {GPT2: pre_tokenizers.ByteLevel(add_prefix_space=False), DIGITS: pre_tokenizers.Digits(individual_digits=True)}
    chain = [steps.get(split) or pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    if GPT2 not in splits:
        chain.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.decoder = decoders.ByteLevel()
    # Merges across every border, so that a text split in the wrong place comes out in other tokens.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(
        vocab_size=460, min_frequency=1, initial_alphabet=ALPHABET, special_tokens=words, show_progress=False))
    backend.pre_tokenizer = chain[0] if len(chain) == 1 else pre_tokenizers.Sequence(chain)
    backend.add_tokens(["<tool>"])  # a word of its own that is not special
    found = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>" if bos else None)
    found.chat_template = CHATML
    return found


TOKENIZER = tokenizer()


def family(name: str, words: Any = TOKENIZER, **overrides: Any) -> CausalLM:
    kind, settings = MODELS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "qwen3", QWEN3)
        model = tiny(kind, dtype=torch.float32, vocab_size=VOCABULARY, eos_token_id=2, **settings, **overrides)
    return CausalLM(model, words)


def ours_ids(length: int = 40) -> list[int]:
    return list(itertools.islice(itertools.cycle(TOKENIZER("I'll see 12 things or 日本, they'll return x").input_ids), length))


# ---------------------------------------------------------------- whole models


@llama
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    base, file = family(name), tmp_path / "a.gguf"
    out.write_gguf(base, file, "float32", name="a name")
    tokens = ours_ids(8 if name == "mistral" else 40)  # its window
    assert distance(theirs(file, tokens), logits(base, tokens)) < 2e-5


@llama
@pytest.mark.parametrize(("name", "forgotten"), [("llama", "order"), ("biases", "order"), ("llama3 angles", "factors")])
def test_the_comparison_would_see_a_mistake(name: str, forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, file = family(name), tmp_path / "a.gguf"
    if forgotten == "order":
        monkeypatch.setattr(out.Names, "ordered", lambda self, name, rows: rows)
    else:
        base.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    wanted = logits(base, ours_ids())
    out.write_gguf(base, file, "float32")
    assert distance(theirs(file, ours_ids()), wanted) > 1e-2


@llama
@pytest.mark.parametrize(("numbers", "close"), [("float16", 1e-2), ("q8_0", 0.2)])
def test_smaller_numbers_are_close_and_small(numbers: Any, close: float, tmp_path: Path) -> None:
    base = family("llama")
    for kind in ("float32", numbers):
        out.write_gguf(base, tmp_path / f"{kind}.gguf", kind)
    tokens = ours_ids()
    found = distance(theirs(tmp_path / f"{numbers}.gguf", tokens), logits(base, tokens))
    assert 1e-5 < found < close
    reader = gguf.GGUFReader(tmp_path / f"{numbers}.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == {"float16": "F16", "q8_0": "Q8_0"}[numbers]
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # rows of 48 are not blocks of 32
    assert kinds["output_norm.weight"] == "F32"
    assert (tmp_path / f"{numbers}.gguf").stat().st_size < (tmp_path / "float32.gguf").stat().st_size


@llama
def test_the_same_answers_word_for_word(tmp_path: Path) -> None:
    base, file = family("llama", initializer_range=0.3), tmp_path / "a.gguf"
    out.write_gguf(base, file, "float32")
    prompts = [TOKENIZER(text).input_ids for text in ("I'll say", "x = [1,", "日本")]
    mine = {answer.index: list(answer.token_ids) for answer in base.generate(prompts, SamplingParams(max_new_tokens=24))}
    with opened(file) as found:
        for i, prompt in enumerate(prompts):
            found.reset()
            answer = itertools.takewhile(lambda token: token != 2, found.generate(prompt, temp=0.0, repeat_penalty=1.0))
            assert list(itertools.islice(answer, 24)) == mine[i]
    assert len({tuple(answer) for answer in mine.values()}) == 3


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    out.write_gguf(family("mistral", tokenizer(bos=True)), file, "float32", name="a name")
    fields = gguf.GGUFReader(file).fields
    said = {key: fields[key].contents() for key in (
        "general.name", "general.type", "llama.context_length", "llama.attention.key_length", "tokenizer.ggml.pre",
        "tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template")}
    assert list(said.values()) == ["a name", "model", 8, 8, "gpt-2", 2, 1, False, CHATML]
    words, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(words) == len(kinds) == VOCABULARY
    assert [kinds[i] for i in (0, 3, words.index("<tool>"), VOCABULARY - 1)] == [3, 1, 4, 5]


# ---------------------------------------------------------------- words


@llama
@pytest.mark.parametrize(("splits", "whole"), PRETOKENIZERS)
def test_text_becomes_the_same_tokens(splits: tuple[str, ...], whole: bool, tmp_path: Path) -> None:
    words = tokenizer(splits, whole)
    out.write_gguf(family("llama", words), tmp_path / "a.gguf", "float32")
    with opened(tmp_path / "a.gguf") as found:
        for text in TEXTS:
            assert found.tokenize(text.encode(), add_bos=True, special=True) == words(text).input_ids, text
    if splits != (GPT2,):  # the texts tell ways of splitting apart
        out.write_gguf(family("llama"), tmp_path / "b.gguf", "float32")
        with opened(tmp_path / "b.gguf") as found:
            assert any(found.tokenize(t.encode(), add_bos=True, special=True) != words(t).input_ids for t in TEXTS)


@llama
def test_a_name_changes_no_token(tmp_path: Path) -> None:
    text = "<|im_start|> hi<|im_end|> there"
    out.write_gguf(family("llama"), tmp_path / "a.gguf", "float32", name="My-Phi-3-tuned")
    with opened(tmp_path / "a.gguf") as found:
        assert found.tokenize(text.encode(), add_bos=True, special=True) == TOKENIZER(text).input_ids


def described(**changes: Any) -> dict[str, Any]:
    found = json.loads(TOKENIZER.backend_tokenizer.to_str())
    for key, value in changes.items():
        place = found["model"] if key in found["model"] else found
        place[key] = value
    return found


@pytest.mark.parametrize(("changes", "said"), [
    ({"merges": []}, "no merges"), ({"byte_fallback": True}, "byte_fallback"), ({"type": "Unigram"}, "Unigram"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizes text"), ({"ignore_merges": True}, "no name for the tokenizer"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"), ({"pre_tokenizer": None}, "no split"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
    ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": CONTRACTIONS}, "behavior": "Isolated"}}, "ll"),
])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(changes: dict[str, Any], said: str) -> None:
    assert get_pretokenizer_name(described()) == "gpt-2"
    with pytest.raises(BaseError, match=said):
        get_pretokenizer_name(described(**changes))


# ---------------------------------------------------------------- runs


def tuned(place: Path, name: str, method: dict[str, Any], objective: str = "sft") -> tuple[Run, CausalLM]:
    base = family(name)
    return saved(place, base, method, objective), base


LORAS: dict[str, dict[str, Any]] = {
    "plain": {}, "rslora": {"use_rslora": True, "rank": 4}, "pissa": {"init_lora_weights": "pissa", "rank": 2}, "some maps": {"target_modules": ["k", "down"]},
    "odd ranks and alphas": {"rank_pattern": {"q": 3, "up": 1}, "alpha_pattern": {"k": 5.0, "o": 40.0}},
}


@llama
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("lora", LORAS)
def test_a_lora_on_the_base_is_the_run(name: str, lora: str, tmp_path: Path) -> None:
    run, base = tuned(tmp_path, name, {"name": "lora", **LORAS[lora]})
    bare = family(name)
    out.write_gguf(bare, tmp_path / "base.gguf", "float32")
    adapter, merged = export(run, "gguf-adapter"), export(run, "gguf", dtype="float32")
    assert (adapter.name, merged.name) == ("adapter.gguf", "model.gguf")
    wanted = logits(base, ours_ids())
    assert distance(theirs(tmp_path / "base.gguf", ours_ids(), lora_path=str(adapter)), wanted) < 1e-4
    assert distance(theirs(merged, ours_ids()), wanted) < 1e-4
    assert distance(theirs(tmp_path / "base.gguf", ours_ids()), wanted) > 1e-2
    assert sorted(p.name for p in run.path.iterdir() if p.name.startswith(".")) == []


@llama
@pytest.mark.parametrize("method", [{"name": "bitfit"}, {"name": "full"}, {"name": "lora", "use_dora": True}])
def test_other_methods_are_merged_into_the_file(method: dict[str, Any], tmp_path: Path) -> None:
    run, base = tuned(tmp_path, "llama", method)
    merged = export(run, "gguf", tmp_path / "new/tuned.gguf", "float32")
    assert distance(theirs(merged, ours_ids()), logits(base, ours_ids())) < 1e-4
    with pytest.raises(RunError, match="DoRA" if "dora" in method else "supports only LoRA adapters"):
        export(run, "gguf-adapter")
    assert not list(run.path.glob("*.gguf"))


def test_what_cannot_be_is_refused_before_a_file_is_there(tmp_path: Path) -> None:
    run, _ = tuned(tmp_path, "llama", {"name": "lora"})
    with pytest.raises(RunError, match="does not end in"):
        export(run, "gguf", tmp_path / "folder")
    with pytest.raises(RunError, match="does not write q8_0"):
        export(run, "merged", dtype="q8_0")
    with pytest.raises(RunError, match="does not write int4"):
        export(run, "gguf", dtype="int4")  # type: ignore[arg-type]
    (tmp_path / "taken.gguf").write_text("mine")
    with pytest.raises(RunError, match="already exists"):
        export(run, "gguf-adapter", tmp_path / "taken.gguf")
    assert (tmp_path / "taken.gguf").read_text() == "mine"
    assert not list(run.path.glob("*.gguf"))


def test_the_command_line_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = tuned(tmp_path, "llama", {"name": "lora"})
    assert main(["export", str(run.path), "--to", "gguf", "--dtype", "q8_0", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written == {"file": str(run.path / "model.gguf")}
    fields = gguf.GGUFReader(written["file"]).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.name"].contents() == "model"


def test_heads_have_no_place_in_the_file(tmp_path: Path) -> None:
    made = assembly.build_recipe({"model": "smollm2", "data": "-", "objective": "reward"})
    with pytest.raises(RunError, match="the run has task heads"):
        export_gguf_model(made, family("llama"), tmp_path / "a.gguf", "float32")
    with pytest.raises(RunError, match="the run has task heads"):
        export_gguf_adapter(made, family("llama"), None, tmp_path / "a.gguf")


@pytest.mark.parametrize(("name", "overrides", "said"), [
    ("llama", {"hidden_act": "gelu"}, "gelu"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
    ("qwen2", {"rope_parameters": LLAMA3}, "llama3"), ("qwen3", {"attention_bias": True}, "does not add"),
])
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(name: str, overrides: dict[str, Any], said: str, tmp_path: Path) -> None:
    kind, settings = MODELS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, name, (kind, settings | overrides))
        base = family(name)
    with pytest.raises(BaseError, match=said):
        out.write_gguf(base, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_another_architecture_is_refused_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="'mixtral' cannot be written as GGUF here; those that can: llama, mistral, qwen2"):
        out.write_gguf(CausalLM(tiny("mixtral", dtype=torch.float32), tiny_tokenizer()), tmp_path / "a.gguf")


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    base = family("llama")
    with torch.no_grad():
        base.model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = 1e5
    with pytest.raises(BaseError, match=r"blk.1.ffn_up.weight holds 1e\+05"):
        out.write_gguf(base, tmp_path / "a.gguf", "float16")
    out.write_gguf(base, tmp_path / "b.gguf", "float32")


# ---------------------------------------------------------------- a real model


@llama
@pytest.mark.slow
def test_a_lora_of_smollm2_answers_in_llama_cpp_as_here(tmp_path: Path) -> None:
    base = load_family(ModelConfig(name_or_path="smollm2", device="cpu"))
    out.write_gguf(base, tmp_path / "base.gguf", "float32")
    made = assembly.build_recipe({"model": "smollm2", "data": "-", "method": {"name": "lora", "use_rslora": True}})
    attached = attach(base, "lora", stirred=False, use_rslora=True)
    stir(attached, 0.01)
    run = Run(tmp_path / "run")
    run.create(assembly.dump_recipe(made), {})
    save_tuned(run, made, base, attached)
    prompts = [base.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True).input_ids
               for text in ("Why is the sky blue?", "Write one line about rain.")]
    answers = {a.index: list(a.token_ids) for a in base.generate(prompts, SamplingParams(max_new_tokens=16))}
    wanted = logits(base, prompts[0])
    with attached.disabled():
        assert distance(logits(base, prompts[0]), wanted) > 1  # the run says something else than its base
    assert distance(theirs(tmp_path / "base.gguf", prompts[0], lora_path=str(export(run, "gguf-adapter"))), wanted) < 1e-3
    (tmp_path / "base.gguf").unlink()
    file = export(run, "gguf", dtype="float32")
    with opened(file) as found:
        for text in TEXTS:
            assert found.tokenize(text.encode(), add_bos=True, special=True) == base.tokenizer(text).input_ids, text
        found.eval(prompts[0])
        assert distance(torch.tensor(found.scores[:len(prompts[0])]), wanted) < 1e-3
        for i, prompt in enumerate(prompts):
            found.reset()
            answer = itertools.takewhile(lambda token: token != 2, found.generate(prompt, temp=0.0, repeat_penalty=1.0))
            assert list(itertools.islice(answer, 16)) == answers[i]
    file.unlink()
