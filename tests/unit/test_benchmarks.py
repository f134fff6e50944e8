"""The pure parts of `benchmarks/`: rows, arithmetic, and the results made from measurements. Nothing is trained."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import report, sft, workload  # noqa: E402
from benchmarks.workload import Job, Setting, Shape  # noqa: E402

CONFIG = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2,
          "intermediate_size": 16, "vocab_size": 100}
SETTING = Setting(batch_size=2, steps=2, warmup=1)
RATE = {"gflops": 10.0, "dtype": "float32", "shapes": {}}


def account(side: str, seconds: float, memory: int, loss: float = 2.0) -> dict[str, Any]:
    """What a side would have left behind: three steps of two documents, the first slow as a warm-up is."""
    steps = [{"seconds": seconds * (9 if i == 0 else 1), "user_seconds": seconds * 2, "system_seconds": None,
              "loss": loss - i / 10, "examples": 2, "tokens": 30, "trained": 12,
              "documents": [{"key": f"{i}{j}", "tokens": 10 + 10 * j, "trained": 6} for j in range(2)]} for i in range(3)]
    return {"side": side, "steps": steps, "setup_seconds": 3.0, "total_seconds": 20.0, "peak_bytes": memory,
            "resident_bytes": memory // 2, "cores_used_by_others": 0.0, "gpu_peak_bytes": None, "threads": 1, "versions": {"torch": "0"}}


@pytest.fixture
def accounts() -> dict[str, list[dict[str, Any]]]:
    return {"luthier": [account("luthier", 1.0, 400), account("luthier", 1.2, 400)],
            "trl": [account("trl", 4.0, 500), account("trl", 3.6, 500)],
            "trl-nockpt": [account("trl-nockpt", 2.0, 800), account("trl-nockpt", 3.0, 800)]}


# ---------------------------------------------------------------- rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    alpaca = [{"instruction": f"do {i}", "input": "with this" if i else "", "output": f"done {i}"} for i in range(3)]
    (tmp_path / "alpaca_en_demo.json").write_text(json.dumps(alpaca))
    gsm8k = [{"question": f"how many {i}", "answer": f"#### {i}"} for i in range(3)]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gsm8k))
    return tmp_path


def words(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    assert all([m["role"] for m in (*row["prompt"], *row["completion"])] == ["user", "assistant"] for row in rows)
    return [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]


def test_mix_alternates_between_the_two_sources_in_their_order(data: Path) -> None:
    assert words(workload.rows("mix", 4, data)) == [
        ("do 0", "done 0"), ("how many 0", "#### 0"), ("do 1\nwith this", "done 1"), ("how many 1", "#### 1")]


@pytest.mark.parametrize(("name", "first"), [("alpaca", "do 0"), ("gsm8k", "how many 0")])
def test_one_source_alone_keeps_its_order(data: Path, name: str, first: str) -> None:
    rows = words(workload.rows(name, 3, data))
    assert rows[0][0] == first
    assert [answer[-1] for _, answer in rows] == ["0", "1", "2"]


def test_too_few_rows_are_refused_with_both_numbers(data: Path) -> None:
    with pytest.raises(SystemExit, match="gsm8k has 3 rows, and 4 are needed"):
        workload.rows("gsm8k", 4, data)


def test_rows_of_the_real_files_are_whole() -> None:
    if not sft.ROWS_AT.is_dir():
        pytest.skip("the public data is not beside this checkout (../shared/data)")
    rows = words(workload.rows("mix", 64, sft.ROWS_AT))
    assert all(question and answer for question, answer in rows)
    assert all("####" in answer for _, answer in rows[1::2])


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = Job("trl", SETTING, "base", "rows", "work", "account", 1.5)
    job.write(tmp_path / "job.json")
    read = Job.read(str(tmp_path / "job.json"))
    assert (read.side, read.steps, read.started, read.setting.rank) == ("trl", 3, 1.5, SETTING.rank)


# ---------------------------------------------------------------- arithmetic


def test_flops_equal_the_products_counted_one_by_one() -> None:
    shape = Shape.read(CONFIG)
    documents = [(5, 3), (9, 4)]
    counted = 0
    for tokens, trained in documents:
        for _ in range(shape.layers):
            for inputs, outputs in ((8, 8), (8, 4), (8, 4), (8, 8), (8, 16), (8, 16), (16, 8)):
                counted += 2 * (2 * tokens * inputs * outputs)  # forward, and the gradient of the input
            for place in range(tokens):  # a query sees itself and what stands before it
                products = 2 + 4  # scores and values; in the backward pass two gradients of each
                counted += products * shape.heads * (place + 1) * 2 * shape.head_dim
        counted += 2 * (2 * trained * 8 * 100)
    assert workload.flops(shape, documents) == counted


def test_shape_of_the_embedded_base() -> None:
    smollm2 = Shape.read({"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "head_dim": 64,
                          "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152})
    norms = 576 * (2 * 30 + 1)
    assert smollm2.weights + norms + 576 * 49152 == 134_515_008  # SmolLM2-135M's parameters


def test_a_config_may_leave_out_what_has_a_usual_value() -> None:
    config = {key: value for key, value in CONFIG.items() if key not in ("head_dim", "num_key_value_heads")}
    shape = Shape.read(config)
    assert (shape.head_dim, shape.kv_heads) == (2, 4)


# ---------------------------------------------------------------- results


def test_warm_up_steps_count_for_nothing(accounts: dict[str, Any]) -> None:
    shape = Shape.read(CONFIG)
    figures = report.figures(accounts["luthier"][0], SETTING, shape, 10.0)
    assert figures["seconds"] == 2.0
    assert figures["tokens_per_second"] == 30.0
    assert figures["examples_per_second"] == 2.0
    assert figures["tokens_per_user_second"] == 15.0
    assert figures["gflops"] == pytest.approx(workload.flops(shape, [(10, 6), (20, 6)]) / 1e9)
    assert figures["share_of_machine"] == pytest.approx(figures["gflops"] / 10)
    assert (figures["peak_memory_bytes"], figures["step_memory_bytes"]) == (400, 200)
    assert figures["system_seconds"] is None


def test_the_ratio_is_against_the_peer_as_it_comes(accounts: dict[str, Any]) -> None:
    ratio = report.results(accounts, SETTING, CONFIG, RATE)["ratio"]
    assert ratio["against"] == "trl"
    assert ratio["tokens_per_second"] == pytest.approx((4.0 + 3.6 / 1.2) / 2)  # of pairs, not of medians
    assert ratio["user_cpu"] == pytest.approx((1 / 4 + 1.2 / 3.6) / 2)
    assert ratio["peak_memory"] == pytest.approx(0.8)


def test_results_keep_every_pair_and_survive_json(accounts: dict[str, Any]) -> None:
    found = json.loads(json.dumps(report.results(accounts, SETTING, CONFIG, RATE)))
    assert {"luthier", "trl", "trl-nockpt", "ratio", "ratios", "first_loss_difference", "rate", "setting"} == set(found)
    assert found["ratios"]["trl"]["tokens_per_second"]["pairs"] == pytest.approx([4.0, 3.0])
    assert found["ratios"]["trl-nockpt"]["peak_memory"]["median"] == pytest.approx(0.5)
    assert found["luthier"]["losses"] == pytest.approx([2.0, 1.9, 1.8])
    assert found["trl"]["steps"] == [{"examples": 2, "tokens": 30, "trained": 12}] * 3
    assert len(found["trl"]["repeats"]) == 2


def test_other_documents_are_refused(accounts: dict[str, Any]) -> None:
    other = copy.deepcopy(accounts["trl"][0])
    other["steps"][1]["documents"][0]["key"] = "another"
    with pytest.raises(report.NotComparable, match="step 2: luthier and trl did not train on the same tokens"):
        report.same_work(accounts["luthier"][0], other, SETTING)


@pytest.mark.parametrize("loss", [2.001, float("nan")])
def test_another_first_loss_is_refused(accounts: dict[str, Any], loss: float) -> None:
    other = copy.deepcopy(accounts["trl"][0])
    other["steps"][0]["loss"] = loss
    with pytest.raises(report.NotComparable, match="first loss"):
        report.same_work(accounts["luthier"][0], other, SETTING)


def test_the_table_and_the_chart_show_every_side(accounts: dict[str, Any], tmp_path: Path) -> None:
    from rich.console import Console

    found = report.results(accounts, SETTING, CONFIG, RATE)
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(report.table(found))
    shown = capture.get()
    assert all(side in shown for side in accounts)
    assert "2.25 (2.00-2.50)" in shown
    report.chart(found, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- the command line


def test_quick_is_three_steps_after_one_once(data: Path) -> None:
    args = sft.arguments(["--quick", "--rows", str(data), "--repeats", "5"])
    assert (args.steps, args.warmup, args.repeats) == (3, 1, 1)


@pytest.mark.parametrize("given", [["--peers", "unsloth"], ["--rows", "no/such/folder"], ["--steps", "0"], ["--warmup", "-1"]])
def test_what_cannot_be_measured_is_refused(data: Path, given: list[str]) -> None:
    with pytest.raises(SystemExit):
        sft.arguments(["--rows", str(data), *given])


def test_importing_the_launcher_brings_no_torch() -> None:
    import subprocess

    code = "import sys; sys.path.insert(0, '.'); import benchmarks.sft; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
