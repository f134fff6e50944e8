"""What a run keeps of the form of its conversations: the end of a turn, the template, and how it is asked afterwards.

A table of bases that differ in these alone; for each, what is written beside the weights is read by Transformers as it
was trained, and every command asks as the rows were written.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig

import luthier
from chat_templates import NOMARK, tokenizer_with
from luthier.api.chat import open_chat
from luthier.assembly.factory import encode_chat_prompt
from luthier.assembly.multi_adapter_loading import load_served_models
from luthier.core.errors import BaseError, RecipeError
from luthier.core.examples import Message
from luthier.data.templates import FALLBACK_TEMPLATE
from tiny import CHATML, tiny

CHATS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 8
PAIRS = [{"prompt": "hi", "completion": " yo"}] * 8
TRAINING = {"max_steps": 60, "batch_size": 8}


def make_base(folder: Path, template: Any = CHATML, eos: str = "<|im_end|>") -> Path:
    tokenizer = deepcopy(tokenizer_with("chatml", "merging"))
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    end = tokenizer.eos_token_id
    model = tiny("llama", dtype=torch.float32, eos_token_id=end, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(tmp_path: Path, base: Path, rows: list[Any], method: str = "lora", **settings: Any) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    luthier.train(model=str(base), data=str(tmp_path / "rows.jsonl"), method=method, output_dir=str(tmp_path / "run"), quiet=True,
                  **{"optimizer.learning_rate": 0.02, **{f"training.{k}": v for k, v in TRAINING.items()}, **settings})
    return tmp_path / "run"


def saved_stops(folder: Path) -> list[int]:
    found = GenerationConfig.from_pretrained(folder).eos_token_id
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("template", "eos", "end"), [
    (CHATML, "<|im_end|>", "<|im_end|>"), (CHATML, "<|endoftext|>", "<|im_end|>"), (NOMARK, "<|endoftext|>", "<|endoftext|>"),
    (None, "<|endoftext|>", "<|endoftext|>")], ids=["chatml", "other eos", "no mark", "no template"])
def test_the_end_of_a_turn_is_trained_saved_and_stopped_at(tmp_path: Path, template: Any, eos: str, end: str, method: str) -> None:
    run = train(tmp_path, make_base(tmp_path / "base", template, eos), CHATS, method)
    merged = luthier.export(run, "merged", tmp_path / "merged")
    luthier.export(run, "gguf", tmp_path / "model.gguf")
    for folder in (run, merged):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token == end
        assert saved_stops(folder)[0] == tokenizer.eos_token_id, folder
        asked = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=True)
        whole = tokenizer.apply_chat_template([*CHATS[0]["messages"]], return_dict=True)["input_ids"]
        assert tokenizer.decode(whole[len(asked["input_ids"]):]).startswith(f"yo{end}")
        (talk,) = open_chat(folder, max_new_tokens=20, quiet=True)
        assert "".join(talk.say("hi")) == "yo"  # it stopped by itself: 20 tokens would say more
        assert encode_chat_prompt(talk.base, [Message("user", "hi")], talk.form) == asked["input_ids"]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert int(reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0]) == tokenizer.eos_token_id
    assert reader.fields["tokenizer.chat_template"].contents() == AutoTokenizer.from_pretrained(merged).chat_template
    # The documents of the base end as they did: its own folder and eos are as they were.
    assert AutoTokenizer.from_pretrained(tmp_path / "base").eos_token == eos


def test_a_run_of_documents_keeps_the_bases_own_form(tmp_path: Path) -> None:
    """The control: where no conversation was trained, nothing of their form is written."""
    run = train(tmp_path, make_base(tmp_path / "base", CHATML, "<|endoftext|>"), [{"text": "one two"}] * 8, objective="pretrain",
                **{"training.max_steps": 1})
    assert not (run / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(run).eos_token == "<|endoftext|>"


def test_what_was_said_of_the_template_is_in_the_data_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, template, words in (("a", NOMARK, "no token at the end of a turn"), ("b", None, "has no chat template")):
        (tmp_path / name).mkdir()
        run = train(tmp_path / name, make_base(tmp_path / name / "base", template, "<|endoftext|>"), CHATS, **{"training.max_steps": 1})
        remarks = json.loads((run / "data_report.json").read_text())["parts"]["train"]["remarks"]
        assert [count for remark, count in remarks.items() if words in remark] == [8]


@pytest.mark.parametrize(("template", "settings"), [(None, {}), (CHATML, {"data.format": "completion"})])
def test_a_run_of_bare_prompts_is_asked_bare(tmp_path: Path, template: Any, settings: dict[str, Any]) -> None:
    run = train(tmp_path, make_base(tmp_path / "base", template), PAIRS, **settings)
    (talk,) = open_chat(run, max_new_tokens=20, quiet=True)
    assert "".join(talk.say("hi")) == " yo"
    with pytest.raises(RecipeError, match="trained on plain prompts"):
        list(talk.say("more"))
    served = load_served_models({"run": run})
    assert served.encode_chat("run", [Message("user", "hi")]) == served.encode_text("run", "hi")
    assert served.base.tokenizer.decode(served.encode_text("run", "hi")) == "hi"
    with pytest.raises(RecipeError, match="turns of system, user"):
        served.encode_chat("run", [Message("system", "s"), Message("user", "hi")])


def test_a_bank_of_runs_asks_each_in_its_own_form(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", None)
    for name, rows in (("chats", CHATS), ("pairs", PAIRS)):
        (tmp_path / name).mkdir()
        train(tmp_path / name, base, rows)
    served = load_served_models({name: tmp_path / name / "run" for name in ("chats", "pairs")})
    text = {name: served.base.tokenizer.decode(served.encode_chat(name, [Message("user", "hi")])) for name in ("chats", "pairs", "base")}
    assert text == {"chats": "### User:\nhi\n\n### Assistant:\n", "pairs": "hi", "base": "### User:\nhi\n\n### Assistant:\n"}
    assert "### " in FALLBACK_TEMPLATE


def test_a_token_that_the_embedding_has_no_row_for_is_refused_before_training_and_can_be_added(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(f"<new{i}>", special=True, normalized=False) for i in range(20)])
    tokenizer.save_pretrained(base)
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a<new9>b"}]}]
    said = {"data.chat.control_tokens": "token", "training.max_steps": 1}
    with pytest.raises(BaseError, match=r"rows.jsonl:1: the token '<new9>' has the id 334, .* 325 rows\n.*new_tokens"):
        train(tmp_path, base, rows, **said)
    assert not (tmp_path / "run").exists()
    assert train(tmp_path, base, rows, method="full", **said, **{"model.surgery": {"new_tokens": {"<new9>": "nine"}}}).exists()


def test_padding_of_a_table_is_no_data(tmp_path: Path) -> None:
    """Arrow gives every row of a struct all fields of all rows: those that a row has not are null, and are not trained."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from luthier.data.sources import read_source

    def chat(arguments: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": arguments}}]}, {"role": "tool", "content": "r"},
                    {"role": "assistant", "content": "a"}],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]}

    rows = [chat({"city": "Oslo"}, {"city": {"type": "string"}}), chat({"x": 1, "y": {"z": [1, 2]}}, {"x": {"type": "number"}})]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name in ("rows.parquet", "rows.jsonl"):
        ((_, lines),) = read_source(str(tmp_path / name))
        found[name] = [json.dumps(row.values, sort_keys=True).replace('"content": null, ', "") for row in lines]
    assert found["rows.parquet"] == found["rows.jsonl"]
    assert "null" in json.dumps(pq.read_table(tmp_path / "rows.parquet").to_pylist())  # the control: they are in the file
