"""What a run gives is what Transformers, PEFT and Sentence Transformers give when they load its folder.

The table: every kind of base, times every task, times adapter and merged model, on padded texts of unequal length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

import luthier
from interop.table import DECODER_KINDS, ENCODER_KINDS, OBJECTIVES, TEXTS, Made, make_run
from luthier.api.export import export
from luthier.assembly.run_io import open_run
from tiny import save_tiny

SAME, FAR = 1e-5, 1e-3
HEADED = ("single", "multi", "regression", "tags", "reward")
AUTO: dict[str, Any] = {"tags": AutoModelForTokenClassification}
PROBLEMS = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression",
            "reward": "regression", "tags": None}


def loaded(made: Made, form: str) -> tuple[Any, Any]:
    """Model and tokenizer of the run as an adapter on its base, or merged, by Transformers and PEFT alone."""
    auto = AUTO.get(made.task, AutoModelForSequenceClassification)
    if form == "merged":
        folder = export(made.run, "merged")
        return auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    head, = made.recipe.objective.heads
    bare = auto.from_pretrained(made.recipe.model.name_or_path, num_labels=head.width)
    tokenizer = AutoTokenizer.from_pretrained(made.run.path)
    bare.config.pad_token_id = tokenizer.pad_token_id
    return PeftModel.from_pretrained(bare, made.run.path).eval(), tokenizer


@torch.no_grad()
def theirs(model: Any, tokenizer: Any, ids: list[list[int]], tags: bool) -> Tensor:
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[batch["attention_mask"].bool()] if tags else logits


def rows(kinds: tuple[str, ...]) -> list[tuple[str, str, str]]:
    return [(kind, task, form) for kind in kinds for task in HEADED for form in ("adapter", "merged")]


@pytest.mark.parametrize(("kind", "task", "form"), rows((*ENCODER_KINDS, *DECODER_KINDS)))
def test_scores_are_those_of_transformers_own_class(kind: str, task: str, form: str, tmp_path: Path) -> None:
    made = make_run(tmp_path, kind, task)
    assert made.base.heads.task_head is not None, made.base.heads.no_task_head_reason
    ids = made.ids(end=task == "reward" and kind in DECODER_KINDS)
    wanted = made.outputs(ids)
    model, tokenizer = loaded(made, form)
    found = theirs(model, tokenizer, ids, task == "tags")
    assert (found - wanted).abs().max() < SAME * wanted.abs().max().clamp(min=1)
    with torch.no_grad():
        for parameter in made.base.heads.parameters().values():
            parameter.mul_(1.1)  # the control
    assert (found - made.outputs(ids)).abs().max() > FAR * wanted.abs().max()
    if form == "merged":
        labels = made.recipe.objective.heads[0].labels
        if labels:
            assert model.config.id2label == dict(enumerate(labels))
            assert model.config.label2id == {name: i for i, name in enumerate(labels)}
        assert model.config.num_labels == made.recipe.objective.heads[0].width
        assert model.config.problem_type == PROBLEMS[task]
        assert model.config.architectures == [type(model).__name__]


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("task", ["embedding", "embedding-learned"])
@pytest.mark.parametrize("kind", [*ENCODER_KINDS, *DECODER_KINDS])
def test_vectors_are_those_of_sentence_transformers(kind: str, task: str, form: str, tmp_path: Path) -> None:
    made = make_run(tmp_path, kind, task)
    wanted = made.outputs(made.ids())
    folder = made.run.path if form == "adapter" else export(made.run, "merged")
    model = SentenceTransformer(str(folder), device="cpu")
    found = torch.from_numpy(model.encode(list(TEXTS)))
    assert (found - wanted).abs().max() < SAME
    assert model.max_seq_length == build_length(made)
    made.base.pooling = "mean" if made.base.pooling != "mean" else "last"  # the control
    assert (found - made.outputs(made.ids())).abs().max() > FAR


def build_length(made: Made) -> int:
    from luthier.assembly.factory import resolve_data_config
    return int(resolve_data_config(made.recipe, made.base).max_length or 0)


@pytest.mark.parametrize(("kind", "task"), [("bert", "single"), ("llama", "single"), ("gpt2", "multi"), ("llama", "regression"),
                                            ("qwen2", "reward"), ("distilbert", "regression")])
def test_a_pipeline_gives_the_same_by_the_names_of_the_classes(kind: str, task: str, tmp_path: Path) -> None:
    """From the texts on: the tokenizer that is saved makes the same tokens, and pads them so that nothing changes."""
    made = make_run(tmp_path, kind, task)
    judge = pipeline("text-classification", str(export(made.run, "merged")))
    answers = judge(list(TEXTS), batch_size=3, top_k=None, function_to_apply="none")
    wanted = made.outputs(made.ids())
    labels = made.recipe.objective.heads[0].labels or ("LABEL_0",)
    for row, scores in zip(wanted, answers, strict=True):
        found = {score["label"]: score["score"] for score in scores}
        assert set(found) == set(labels)
        assert max(abs(found[name] - float(row[i])) for i, name in enumerate(labels)) < SAME
    assert judge(TEXTS[0])[0]["label"] == labels[int(wanted[0].argmax())]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_pipeline_tags_the_words(kind: str, tmp_path: Path) -> None:
    made = make_run(tmp_path, kind, "tags")
    found = pipeline("token-classification", str(export(made.run, "merged")), ignore_labels=[])(TEXTS[1])
    scores = made.outputs(made.ids()[1:2])
    marks = len(made.ids()[1]) - len(found)  # [CLS] and [SEP]
    names = [OBJECTIVES["tags"]["labels"][i] for i in scores.argmax(-1).tolist()]
    assert [word["entity"] for word in found] == (names[1:-1] if marks else names)


def test_a_pipeline_sees_images(tmp_path: Path) -> None:
    made = make_run(tmp_path, "vit", "single")
    pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    judge = pipeline("image-classification", str(export(made.run, "merged")))
    found = {score["label"]: score["score"] for score in judge(Image.fromarray(pixels.numpy()))}
    wanted = made.of_images(made.base.tokenizer(pixels)[None])[0].softmax(-1)
    assert max(abs(found[name] - float(wanted[i])) for i, name in enumerate(OBJECTIVES["single"]["labels"])) < SAME


METHODS: dict[str, Any] = {
    "ia3": "ia3", "adalora": "adalora", "dora": {"name": "lora", "use_dora": True}, "pissa": {"name": "lora", "init_lora_weights": "pissa"},
    "patterns": {"name": "lora", "target_modules": ["q", "v"], "rank_pattern": {"q": 4}, "alpha_pattern": {"v": 3.0}},
    "loha": {"name": "peft", "type": "LOHA", "config": {"r": 2}},
}


OTHERWISE = {("patterns", "gpt2"), ("loha", "gpt2")}  # GPT-2 has no map of q alone, and PEFT's LoHa knows no Conv1D


@pytest.mark.parametrize(("method", "task", "kind"), [
    (method, task, kind) for method in METHODS for task in ("single", "embedding") for kind in ("bert", "llama", "gpt2")
    if (method, kind) not in OTHERWISE])
def test_every_format_of_peft_carries_heads_and_vectors(method: str, task: str, kind: str, tmp_path: Path) -> None:
    made = make_run(tmp_path, kind, task, METHODS[method])
    wanted = made.outputs(made.ids())
    if task == "embedding" and method in ("dora", "adalora"):
        assert not (made.run.path / "modules.json").exists(), "it would be read without a part of its weights"
        found = torch.from_numpy(SentenceTransformer(str(export(made.run)), device="cpu").encode(list(TEXTS)))
    elif task == "embedding":
        found = torch.from_numpy(SentenceTransformer(str(made.run.path), device="cpu").encode(list(TEXTS)))
    else:
        found = theirs(*loaded(made, "adapter"), made.ids(), False)
    assert (found - wanted).abs().max() < SAME * wanted.abs().max().clamp(min=1)
    again = open_run(made.run)[1]
    assert (Made(made.run, made.recipe, again, task).outputs(made.ids()) - wanted).abs().max() < SAME


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("task", ["single", "tags"])
@pytest.mark.parametrize("method", ["bitfit", "full", "adapter", "lists"])
def test_every_method_merges_with_its_head_or_is_opened_here(method: str, task: str, kind: str, tmp_path: Path) -> None:
    made = make_run(tmp_path, kind, task, ["bitfit", "lora"] if method == "lists" else method)
    wanted = made.outputs(made.ids())
    again = open_run(made.run)[1]
    assert (Made(made.run, made.recipe, again, task).outputs(made.ids()) - wanted).abs().max() < SAME
    if method != "adapter":
        found = theirs(*loaded(made, "merged"), made.ids(), task == "tags")
        assert (found - wanted).abs().max() < 5 * SAME * wanted.abs().max().clamp(min=1)


def test_the_padding_of_a_decoder_ends_no_text(tmp_path: Path) -> None:
    """The control of the table's reward rows: padded with the end mark, the class reads another token."""
    made = make_run(tmp_path, "llama", "reward")
    ids = made.ids(end=True)
    wanted = made.outputs(ids)
    model, tokenizer = loaded(made, "merged")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (theirs(model, tokenizer, ids, False) - wanted).abs().max() < SAME
    tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    assert (theirs(model, tokenizer, ids, False) - wanted).abs().max() > FAR


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("task", ["single", "regression"])
def test_images_too(task: str, form: str, tmp_path: Path) -> None:
    made = make_run(tmp_path, "vit", task)
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = made.of_images(pixels)
    if form == "merged":
        model: Any = AutoModelForImageClassification.from_pretrained(export(made.run, "merged"))
        assert task == "regression" or model.config.id2label == dict(enumerate(made.recipe.objective.classes or ()))
    else:
        head, = made.recipe.objective.heads
        model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(
            made.recipe.model.name_or_path, num_labels=head.width), made.run.path)
    with torch.no_grad():
        assert (model.eval()(pixel_values=pixels).logits - wanted).abs().max() < SAME


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("objective", ["classify", "reward"])
def test_a_run_on_an_encoder_that_pools_by_mean_opens_again(objective: str, method: str, tmp_path: Path) -> None:
    """A sentence encoder's folder names the mean; the head is its class's, and pools as the class does, then and later."""
    base = save_tiny(tmp_path / "base", "bert", dtype=torch.float32)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}))
    rows = ([{"text": f"{word} thing", "label": label} for word, label in (("good", "up"), ("bad", "down"), ("odd", "down"))]
            if objective == "classify" else [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": "no"} for i in range(3)])
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = luthier.train(model=str(base), data=str(tmp_path / "rows.jsonl"), method=method, objective=objective,
                        training={"max_steps": 2, "batch_size": 3}, output_dir=str(tmp_path / "run"), quiet=True,
                        **{"data.test": str(tmp_path / "rows.jsonl")})
    found = luthier.evaluate(run, quiet=True)
    assert found["loss"] == pytest.approx(run.results["test"]["loss"], rel=1e-5)
    merged = export(run, "merged", tmp_path / "merged")
    assert AutoModelForSequenceClassification.from_pretrained(merged).config.architectures == ["BertForSequenceClassification"]
