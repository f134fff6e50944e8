"""Compared and judged answers: every way to write them, every bad row, and two forms of tokens that train the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.core.examples import Message, Origin, PreferenceExample, PromptExample, UnpairedPreferenceExample
from luthier.core.types import TokenizedExample
from luthier.data import DataConfig, RejectedRow, Row, RowReader, encode_example, read_datasets, read_examples
from luthier.data.packing import build_batch
from luthier.models import CausalLM
from tiny import tiny

SHARED = Path(__file__).parents[4] / "shared" / "data"
HERE = Origin("f", 1)
ASK, GOOD, BAD = Message("user", "q"), Message("assistant", "a"), Message("assistant", "b")
PAIR = PreferenceExample((ASK,), ((GOOD,), (BAD,)), (0, 1), HERE)


def become(*rows: dict, kinds: str | None = None, **options: object) -> list:
    reader = RowReader(frozenset({f"{kinds}Example"}) if kinds else None)
    return list(read_examples([Row(row, Origin("f", line)) for line, row in enumerate(rows, 1)], reader=reader, **options))


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def config(**options: object) -> DataConfig:
    return DataConfig.parse({"train": "x", **options})


CASES = {
    "strings": ({"prompt": "q", "chosen": "a", "rejected": "b"}, PreferenceExample("q", ("a", "b"), (0, 1), HERE)),
    "margin": ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "0.5"}, PreferenceExample("q", ("a", "b"), (0, 1), HERE, 0.5)),
    "turns": ({"prompt": [turn("user", "q")], "chosen": [turn("assistant", "a")], "rejected": "b"}, PAIR),
    "a system prompt": ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"},
                        PreferenceExample((Message("system", "s"), ASK), ((GOOD,), (BAD,)), (0, 1), HERE)),
    "whole chats behind a prompt": ({"prompt": "q", "chosen": [turn("user", "q"), turn("assistant", "a")],
                                     "rejected": [turn("user", "q"), turn("assistant", "b")]}, PAIR),
    "whole chats": ({"chosen": [turn("user", "q"), turn("assistant", "a")], "rejected": [turn("user", "q"), turn("assistant", "b")]}, PAIR),
    "implicit_prompt_preference": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, PAIR),
    "transcripts that part early": ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
                                    PreferenceExample((ASK,), ((GOOD, Message("user", "r"), GOOD), (BAD,)), (0, 1), HERE)),
    "a rejected response": ({"messages": [turn("user", "q"), turn("assistant", "a")], "rejected_response": "b"}, PAIR),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}, PAIR),
    "openai": ({"input": {"messages": [turn("user", "q")]}, "preferred_output": [turn("assistant", "a")],
                "non_preferred_output": [turn("assistant", "b")]}, PAIR),
    "ranks": ({"prompt": "q", "answers": [{"text": "c", "rank": 3}, {"content": "a", "rank": 1}, {"text": "b", "rank": 2}]},
              PreferenceExample("q", ("a", "b", "c"), (0, 1, 2), HERE)),
    "ranks from 0 as JSON": ({"prompt": "q", "answers": '[{"text": "b", "rank": 1}, {"text": "a", "rank": 0}]'}, PreferenceExample("q", ("a", "b"), (0, 1), HERE)),
    "best first": ({"prompt": "q", "answers": ["a", "b"]}, PreferenceExample("q", ("a", "b"), (0, 1), HERE)),
    "the number of a choice": ({"prompt": "q", "choices": ["b", "a"], "answer": 0}, PreferenceExample("q", ("b", "a"), (0, 1), HERE)),
    "a number in a table's cell": ({"question": "q", "choices": '["b", "a", "c"]', "answer": "3"}, PreferenceExample("q", ("c", "b", "a"), (0, 1, 1), HERE)),
    "the letter of a choice": ({"context": "q", "choices": ["x", "y", "z"], "answer": "C"}, PreferenceExample("q", ("z", "x", "y"), (0, 1, 1), HERE)),
    "a choice's own words come before its number": ({"prompt": "q", "choices": ["1", "0"], "answer": "0"}, PreferenceExample("q", ("0", "1"), (0, 1), HERE)),
    "choices of numbers": ({"prompt": "q", "choices": [4, 2.5], "answer": "2.50"}, PreferenceExample("q", ("2.5", "4"), (0, 1), HERE)),
    "choices with labels": ({"question": "q", "choices": {"text": ["b", "a"], "label": ["1", "2"]}, "answerKey": "2"},
                            PreferenceExample("q", ("a", "b"), (0, 1), HERE)),
    "endings": ({"ctx": "q", "endings": ["a", "b"], "label": "0"}, PreferenceExample("q", ("a", "b"), (0, 1), HERE)),
    "a verdict": ({"prompt": "q", "completion": "a", "label": "true"}, UnpairedPreferenceExample("q", "a", True, HERE)),
    "a judged chat": ({"messages": [turn("user", "q"), turn("assistant", "b")], "label": False}, UnpairedPreferenceExample((ASK,), (BAD,), False, HERE)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_its_example(name) -> None:
    row, expected = CASES[name]
    assert become(row) == [expected]


REFUSED = {
    "tied ranks": ({"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b", "rank": 1}]}, "ranks are tied"),
    "a gap": ({"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b", "rank": 3}]}, "ranks have a gap"),
    "ranks from 2": ({"prompt": "q", "answers": [{"text": "a", "rank": 2}, {"text": "b", "rank": 3}]}, "ranks have a gap"),
    "half a rank": ({"prompt": "q", "answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": 0.5}]}, "ranks have a gap"),
    "one without a rank": ({"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b"}]}, "an answer has no rank"),
    "one answer": ({"prompt": "q", "answers": ["a"]}, "a single answer cannot be compared"),
    "no answers": ({"prompt": "q", "answers": []}, "answers is empty"),
    "a rank in words": ({"prompt": "q", "answers": [{"text": "a", "rank": "best"}, {"text": "b", "rank": "1"}]}, "rank is not a number"),
    "the same twice": ({"prompt": "q", "chosen": "a", "rejected": "a \n"}, "chosen and rejected are the same"),
    "the same transcript": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: a"}, "chosen and rejected are the same"),
    "two alike of three": ({"prompt": "q", "answers": ["a", "b", "a"]}, "two answers are the same"),
    "an empty answer": ({"prompt": "q", "chosen": " ", "rejected": "b"}, "empty chosen"),
    "an empty turn": ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: a"}, "a turn of the transcript is empty"),
    "no transcript": ({"chosen": "a", "rejected": "b"}, "chosen is not a transcript"),
    "the user answers": ({"prompt": "q", "chosen": [turn("assistant", "a"), turn("user", "x")], "rejected": "b"}, "an answer does not end with an assistant turn"),
    "a choice too many": ({"prompt": "q", "choices": ["a", "b"], "answer": 3}, "answer is an index, and no row shows whether indices start at 0 or at 1"),
    "a number below 0": ({"prompt": "q", "choices": ["a", "b"], "answer": "-1"}, "answer matches no choice"),
    "no choice's words": ({"prompt": "q", "choices": ["a", "b"], "answer": "c"}, "answer matches no choice"),
    "a number where choices have labels": ({"prompt": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": 0}, "answer matches no choice"),
    "one choice": ({"prompt": "q", "choices": ["a"], "answer": 0}, "a single answer cannot be compared"),
    "the same choice twice": ({"prompt": "q", "choices": ["a", "b", "b"], "answer": 0}, "two answers are the same"),
    "an empty choice": ({"prompt": "q", "choices": ["a", ""], "answer": 0}, "empty choice"),
    "choices that are no list": ({"prompt": "q", "choices": "a or b", "answer": 0}, "choices is not JSON"),
    "an odd verdict": ({"prompt": "q", "completion": "a", "label": "so-so"}, "label is not desirable or undesirable"),
    "nothing answered": ({"messages": [turn("user", "q")], "label": True}, "the last turn is not an assistant turn"),
    "a margin in words": ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is not a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_row_is_refused_with_its_reason(name) -> None:
    row, reason = REFUSED[name]
    (found,) = become(row)
    assert isinstance(found, RejectedRow)
    assert (found.reason, str(found.origin)) == (reason, "f:1")


PROMPTS = {
    "alone": ({"prompt": "q"}, "q", {}),
    "with metadata": ({"prompt": "q", "answer": "4", "tests": ["x"]}, "q", {"reference": "4", "tests": ["x"]}),
    "completion": ({"prompt": "q", "completion": "a"}, "q", {"reference": "a"}),
    "a pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", {"chosen": "a", "rejected": "b"}),
    "implicit_prompt_preference": ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, (ASK,), {"reference": "a"}),
    "a chat": ({"messages": [turn("user", "q"), turn("assistant", "a")], "id": 3}, (ASK,), {"reference": "a", "id": 3}),
    "a bad answer is no reference": ({"messages": [turn("user", "q"), turn("assistant", "b")], "label": 0}, (ASK,), {"label": 0}),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_whoever_reads_prompts_gets_them_from_any_row_that_holds_one(name) -> None:
    row, prompt, metadata = PROMPTS[name]
    (found,) = become(row, kinds="Prompt")
    assert isinstance(found, PromptExample)
    assert found.prompt == prompt
    assert metadata.items() <= found.metadata.items()
    assert ("reference" in found.metadata) == ("reference" in metadata)


def test_the_kinds_that_are_read_decide_between_formats() -> None:
    row = {"messages": [turn("user", "q"), turn("assistant", "a")], "label": True}
    assert [type(become(row, kinds=kind)[0]).__name__ for kind in ("Chat", "UnpairedPreference")] == ["ChatExample", "UnpairedPreferenceExample"]
    with pytest.raises(DataError, match=r"of the format 'text' \(TextExample\), and the objective reads PreferenceExample"):
        become({"text": "t"}, kinds="Preference")
    with pytest.raises(DataError, match="format: pair: rows with prompt, chosen, rejected"):
        become({"prompt": "q", "chosen": "a", "rejected": "b"}, kinds="Text", format="pair")


# ---------------------------------------------------------------- tokens


def paths(encoded: TokenizedExample) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of each answer from its root down."""
    found = []
    for item in encoded.labeled_spans:
        span = encoded.spans[item.span_index]
        above = [encoded.spans[span.parent]] if span.parent >= 0 else []
        found.append(([t for p in (*above, span) for t in p.ids], [w for p in (*above, span) for w in p.weights]))
    return found


ANSWERS = st.lists(st.text(st.sampled_from("ab ö"), min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=4, unique_by=str.strip)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("ab ö"), max_size=20), ANSWERS, st.booleans(), st.integers(40, 120))
def test_both_forms_hold_the_same_tokens(letters, words, prompt, answers, bare, most) -> None:
    for tokenizer in (letters, words):
        given_ = PreferenceExample("q" + prompt, tuple(answers), tuple(range(len(answers))), HERE, 0.5)
        options = {"max_length": most, **({"format": "completion"} if bare else {})}
        shared, repeated = (encode_example(given_, tokenizer, config(share_prompt=share, **options)) for share in (True, False))
        assert isinstance(shared, RejectedRow) == isinstance(repeated, RejectedRow)
        if isinstance(shared, RejectedRow):
            continue
        (tree,), (roots,) = shared, repeated
        assert paths(tree) == paths(roots)
        assert tree.num_bytes == roots.num_bytes
        assert [p.parent for p in tree.spans] == [-1] + [0] * len(answers)
        assert not any(tree.spans[0].weights)
        assert all(p.parent == -1 and len(p.ids) <= most for p in roots.spans)
        assert [(i.label, i.margin) for i in tree.labeled_spans] == [(i.label, i.margin) for i in roots.labeled_spans] == \
            [(float(rank), 0.5 if rank == 0 else 0.0) for rank in range(len(answers))]


def test_both_forms_give_the_same_loss_and_gradients(letters) -> None:
    family = CausalLM(tiny("gpt2"), letters)  # its norms are of float64, Llama's are not
    example = PreferenceExample("a long question", ("aab", "aac and more", "z"), (0, 1, 2), HERE)
    sums, grads = [], []
    for change in ({"share_prompt": True}, {"share_prompt": False}, {"share_prompt": False, "system": "other"}):
        one = build_batch(encode_example(example, letters, config(max_length=200, **change)))
        family.model.zero_grad()
        out = family.forward(one.inputs, one.target, frozenset({"token_logps"}))
        each = torch.zeros(3, dtype=torch.float64).index_add(0, one.target.item_of, out.token_logps.double())
        (each * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        sums.append(each.detach())
        grads.append(torch.cat([p.grad.flatten() for p in family.model.parameters()]).clone())
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)
    assert (sums[0] - sums[2]).abs().max() > 1e-3


def test_a_prompt_is_shared_where_that_saves_a_sixth(letters) -> None:
    def spans(prompt: int, answer: int) -> int:
        given_ = PreferenceExample("q" * prompt, ("a" * answer, "b" * answer), (0, 1), HERE)
        (found,) = encode_example(given_, letters, config(format="completion", max_length=10**4))
        return len(found.spans)

    assert spans(128, 64) == 3
    assert spans(32, 128) == 2


def test_too_long_loses_the_prompts_beginning_for_all_answers_alike(letters) -> None:
    example = PreferenceExample("0123456789", ("aaa", "b"), (0, 1), HERE)
    bare = {"format": "completion", "max_length": 8}
    (found,) = encode_example(example, letters, config(**bare, share_prompt=True))
    end = letters.eos_token_id
    assert [bytes(ids[:-1]) for ids, _ in paths(found)] == [b"6789aaa", b"6789b"]
    assert all(ids[-1] == end for ids, _ in paths(found))
    refused = encode_example(example, letters, config(**bare, truncation="refuse"))
    assert (refused.reason, refused.detail) == ("longer than max_length", "14 tokens, at most 8")
    assert encode_example(PreferenceExample("q", ("a" * 20, "b"), (0, 1), HERE), letters, config(**bare)).reason == "an answer leaves no space for its prompt"


def test_a_verdict_stands_beside_another_rows_answer(write, letters) -> None:
    rows = [{"prompt": "p1", "completion": "a", "label": True}, {"prompt": "p2", "completion": "a", "label": False},
            {"prompt": "p3", "completion": "c", "label": True}]
    path = write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = read_datasets(config(train=path, format="unpaired_preference", share_prompt=False), letters, seed=0).train
    said = [[letters.decode(ids).split("assistant\n")[1].split("<|")[0] for ids, _ in paths(one)] for one in found]
    asked = [{letters.decode(ids).split("user\n")[1].split("<|")[0] for ids, _ in paths(one)} for one in found]
    assert said == [["a", "c"], ["a", "c"], ["c", "a"]]
    assert asked == [{"p1"}, {"p2"}, {"p3"}]
    assert [[i.label for i in one.labeled_spans] for one in found] == [[1.0, -1.0], [0.0, -1.0], [1.0, -1.0]]
    alone = read_datasets(config(train=path, test=write("c.jsonl", json.dumps(rows[2])), share_prompt=False), letters, seed=0).test
    assert letters.decode(paths(alone[0])[1][0]).endswith("p3<|im_end|>\n<|im_start|>assistant\na<|im_end|>")
    with pytest.raises(DataError, match="at least two rows"):
        read_datasets(config(train=write("b.jsonl", json.dumps(rows[0]))), letters, seed=0)


def test_a_prompt_keeps_its_metadata_and_must_leave_room(letters) -> None:
    example = PromptExample("ab", HERE, {"reference": "4"})
    (found,) = encode_example(example, letters, config())
    assert letters.decode(found.spans[0].ids) == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert found.metadata == {"prompt": "ab", "reference": "4"}
    assert found.spans[0].predicted == ()
    size = len(found.spans[0].ids)
    assert encode_example(example, letters, config(max_length=size + 5), 5) == [found]
    refused = encode_example(example, letters, config(max_length=size + 4), 5)
    assert refused.reason == "the prompt leaves no space for the answer"


REAL = {"hh_rlhf_harmless.jsonl": ("Preference", 40, {}), "dpo_en_demo.json": ("Preference", 40, {}),
        "kto_en_demo.json": ("UnpairedPreference", 40, {})}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read(name, letters) -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    kind, count, reasons = REAL[name]
    found = read_datasets(config(train=str(SHARED / name), max_length=10**6, max_samples=40), letters, seed=0, reads=frozenset({f"{kind}Example"}))
    part = found.report.parts["train"]
    assert (part.read, part.kept, part.reasons) == (count, count - sum(reasons.values()), reasons)
    assert found.kinds == {f"{kind}Example"}
