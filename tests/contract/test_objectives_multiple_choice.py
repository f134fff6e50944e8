"""Multiple choice against the formula written out, and against each answer asked alone. Read `cases.py` first."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from cases import answers
from luthier.api.evaluate import evaluate
from luthier.models import ModelConfig, open_family
from tiny import save_tiny

LABELS = [[0, 1], [1, 0, 1], [1, 1, 0, 1], [2, 0, 1]]


@pytest.mark.parametrize("per_token", [True, False])
def test_loss_and_gradient_equal_the_formula(per_token: bool) -> None:
    case = answers("multiple_choice", torch.Generator().manual_seed(5), LABELS, per_token=per_token)
    logps, target = case.outputs.token_logps, case.target
    wanted, right, chance = torch.zeros((), dtype=torch.float64), 0, 0.0
    for group, labels in enumerate(LABELS):
        own = [i for i in range(len(target.labeled_segments)) if target.groups[i] == group]
        scores = torch.stack([(logps[target.item_of == i].mean() if per_token else logps[target.item_of == i].sum()) for i in own])
        wanted = wanted - scores.log_softmax(0)[labels.index(0)]
        right += int(scores.argmax()) == labels.index(0)
        chance += 1 / len(own)
    found = case.loss()
    torch.testing.assert_close(found.total, wanted, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(x, logps)[0] for x in (found.total, wanted))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)
    assert float(found.count) == len(LABELS)
    assert float(found.metrics["accuracy"][0]) == right
    assert float(found.metrics["chance"][0]) == pytest.approx(chance)
    other = answers("multiple_choice", torch.Generator().manual_seed(5), LABELS, per_token=not per_token)
    assert abs(float(other.loss().total - found.total)) > 1e-2, "the control: the other score is another loss"


def test_ties_count_as_wrong() -> None:
    case = answers("multiple_choice", torch.Generator().manual_seed(5), [[0, 1]])
    with torch.no_grad():
        case.outputs.token_logps.fill_(-1.0)
    found = case.loss()
    assert float(found.metrics["accuracy"][0]) == 0
    assert float(found.total.detach()) == pytest.approx(math.log(2))


@pytest.mark.parametrize("shared", ["auto", True, False])
def test_accuracy_equals_scoring_one_answer_at_a_time(shared: object, tmp_path: Path) -> None:
    """Transformers' own forward pass, an answer at a time, in the order of the file, with the right one anywhere."""
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    rows = [{"context": f"What is {word} of many things?", "choices": [word, word * 2, "no", "x y z"][:2 + n], "answer": n}
            for n, word in enumerate(("one", "two", "six"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = evaluate(tmp_path / "base", data=str(tmp_path / "rows.jsonl"), objective="multiple_choice", quiet=True,
                     **{"data.share_prompt": shared})
    family = open_family(ModelConfig(name_or_path=str(tmp_path / "base")))
    total, right = 0.0, 0
    for row in rows:
        scores = []
        for answer in row["choices"]:
            messages = [{"role": "user", "content": row["context"]}, {"role": "assistant", "content": answer}]
            prompt_ids = family.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
            whole = family.tokenizer.apply_chat_template(messages, return_dict=False)[:-1]  # no line break behind the end
            with torch.no_grad():
                logps = family.structure.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(float(sum(logps[i - 1, whole[i]] for i in range(len(prompt_ids), len(whole)))) / (len(whole) - len(prompt_ids)))
        total -= float(torch.tensor(scores).log_softmax(0)[row["answer"]])
        right += scores.index(max(scores)) == row["answer"]
    assert found["loss"] == pytest.approx(total / len(rows), rel=1e-4)
    assert found["accuracy"] == pytest.approx(right / len(rows))
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


def test_evaluation_of_a_folder_uses_its_test_rows(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    row = {"question": "q", "choices": ["one", "two"], "answer": "one"}
    for name, count in (("train", 5), ("test", 3)):
        (tmp_path / "rows" / name).mkdir(parents=True)
        (tmp_path / "rows" / name / "a.jsonl").write_text((json.dumps(row) + "\n") * count)
    for folder, wanted in ((tmp_path / "rows", 3), (tmp_path / "rows" / "train", 5)):
        assert evaluate(tmp_path / "base", data=str(folder), objective="multiple_choice", quiet=True)["examples"] == wanted
