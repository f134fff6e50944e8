"""A training that was killed and resumed ends with the same bits as one that was not, wherever the kill came.

Each trial is a process forked from this one, which has everything imported, so that a trial takes a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from luthier.api.train import Interrupted, train
from luthier.cli.main import main
from luthier.core.errors import RunError
from luthier.reporting.progress import Progress
from luthier.training import checkpoint, loop
from luthier.training import rng as states
from luthier.training.run_folder import Run
from tiny import save_tiny

STEPS, SAVE_EVERY = 12, 2
TIMES = ("step_seconds", "user_seconds", "tokens_per_second", "peak_memory_gb")
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork here")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base, rows of different lengths, a recipe, and the run that nobody killed."""
    folder = tmp_path_factory.mktemp("resume")
    save_tiny(folder / "base", "llama", dtype=torch.float32, num_hidden_layers=1)
    for name, count in (("train", 16), ("eval", 3)):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"prompt": f"{name} {'n' * (i % 5)} {i}?", "completion": f"yes {i % 3}{'!' * (i % 4)}"}) + "\n"
            for i in range(count)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, and their number changes the last bits
    train(recipe(folder), output_dir=str(folder / "whole"), quiet=True)  # here, so that all that is imported late is there too
    yield folder
    torch.set_num_threads(threads)


def recipe(folder: Path) -> dict[str, Any]:
    """Three epochs of four steps, each of several micro-batches; dropout, so that the random state matters."""
    return {
        "model": str(folder / "base"), "method": {"name": "lora", "rank": 2, "dropout": 0.3},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"),
                 "max_length": 96, "shuffle": True},
        "training": {"num_train_epochs": 3, "batch_size": 4, "max_tokens_per_micro_batch": 100, "save_steps": SAVE_EVERY, "eval_steps": 3,
                     "load_best_model_at_end": True},
        "optimizer": {"learning_rate": 0.05}, "evaluate": {"metrics": ["exact_match"], "max_new_tokens": 2}, "seed": 5}


def within(work: Callable[[], object]) -> int:
    """`work` in a forked process; minus the signal that killed it, or 0. What it raises is raised here too."""
    def run() -> None:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    child = FORK.Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode is not None, "it hangs"
    assert child.exitcode <= 0, "see the traceback above"
    return child.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def mortal(owner: Any, name: str, survive: int) -> None:
    """The process dies in its call number `survive` (from 0) of `owner.name`, before the call does anything."""
    call, left = getattr(owner, name), [survive]

    def counted(*given: Any, **named: Any) -> Any:
        if not left[0]:
            die()
        left[0] -= 1
        return call(*given, **named)
    setattr(owner, name, counted)


def begin(home: Path, folder: Path, before: Callable[[], None] = lambda: None, **named: Any) -> int:
    def work() -> None:
        before()
        train(recipe(home), output_dir=str(folder), quiet=True, **named)
    return within(work)


def go_on(home: Path, folder: Path) -> None:
    assert begin(home, folder, resume=True) == 0


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock says."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in Run(folder).metrics]


def equal(first: Path, second: Path) -> bool:
    return (first / "adapter_model.safetensors").read_bytes() == (second / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- the same bits


def test_the_run_is_such_that_a_fault_would_show(home: Path) -> None:
    whole = [line for line in lines(home / "whole") if "loss" in line]
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))
    assert min(line["micro_batches"] for line in whole) > 1
    assert whole[-1]["epoch"] == 3
    weights = load_file(home / "whole/adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in weights.values())
    assert Run(home / "whole").results["best"]["step"] % 3 == 0
    assert len({line["loss"] for line in whole}) == STEPS


def test_the_same_run_twice_is_the_same(home: Path, tmp_path: Path) -> None:
    begin(home, tmp_path / "again")
    assert equal(home / "whole", tmp_path / "again")
    assert lines(home / "whole") == lines(tmp_path / "again")


PLACES: tuple[tuple[Any, str, int], ...] = (  # what is called, and how often in a whole run
    (loop, "step", STEPS),  # between two steps
    (torch.optim.AdamW, "step", STEPS),  # in a step, its gradients made
    (loop, "_evaluate", 4),
    (loop, "_save_checkpoint", 7),
    (checkpoint, "_sync_path", 42),  # while a checkpoint is written
    (os, "rename", 14),  # beside it
    (os, "replace", 4),
    (os, "unlink", 20),  # while an old one is removed
)


@pytest.mark.parametrize(("owner", "name", "calls"), PLACES, ids=[name for _, name, _ in PLACES])
def test_killed_anywhere_it_ends_the_same(home: Path, tmp_path: Path, owner: Any, name: str, calls: int) -> None:
    """Each run is killed twice, at two random calls, and resumed twice."""
    dice = random.Random(name)
    killed = 0
    for trial in range(3):
        folder = tmp_path / str(trial)
        for _ in range(2):
            survive = dice.randrange(calls)
            started = (folder / "recipe.yaml").exists()
            code = begin(home, folder, lambda n=survive: mortal(owner, name, n), resume=started)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
        if (folder / "recipe.yaml").exists():
            go_on(home, folder)
        else:
            begin(home, folder)
        assert equal(home / "whole", folder), trial
        assert lines(home / "whole") == lines(folder), trial
        assert not list(folder.glob("checkpoints/.*")), trial
        assert (folder / "data_report.json").exists()
    assert killed >= 3


def test_killed_at_random_moments_it_ends_the_same(home: Path, tmp_path: Path) -> None:
    """No chosen places: a clock kills, again and again, until a run gets through."""
    dice = random.Random(3)
    folder = tmp_path / "run"
    kills = 0
    for _ in range(20):
        seconds = dice.uniform(0.05, 0.4)

        def clock(seconds: float = seconds) -> None:
            signal.signal(signal.SIGALRM, lambda *_: die())
            signal.setitimer(signal.ITIMER_REAL, seconds)
        code = begin(home, folder, clock, resume=(folder / "recipe.yaml").exists())
        if code == 0:
            break
        kills += 1
    else:
        go_on(home, folder)
    assert kills
    assert equal(home / "whole", folder)
    assert lines(home / "whole") == lines(folder)


def test_a_stream_goes_on_too(home: Path, tmp_path: Path) -> None:
    settings = {"data.streaming": True, "training.max_steps": 7}
    assert begin(home, tmp_path / "whole", **settings) == 0
    assert begin(home, tmp_path / "run", lambda: mortal(loop, "step", 5), **settings) == -signal.SIGKILL
    assert begin(home, tmp_path / "run", resume=True, **settings) == 0
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == list(range(1, 8))
    assert lines(tmp_path / "whole") == lines(tmp_path / "run")
    assert equal(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("forget", ["random", "optimizer", "feed"])
def test_a_resume_that_forgets_something_differs(home: Path, tmp_path: Path, forget: str) -> None:
    """The control: the equality above depends on everything that a checkpoint holds."""
    folder = tmp_path / "run"
    assert begin(home, folder, lambda: mortal(loop, "step", 7)) == -signal.SIGKILL

    def forgetful() -> None:
        if forget == "random":
            states.restore_rng_state = lambda state: []
        elif forget == "optimizer":
            loop.Optimizer.load = lambda self, state: None
        else:
            from luthier.data import InMemoryBatchSource
            InMemoryBatchSource.load = lambda self, state: None
    assert begin(home, folder, forgetful, resume=True) == 0
    assert lines(folder)[:7] == lines(home / "whole")[:7]
    assert lines(folder) != lines(home / "whole")


# ---------------------------------------------------------------- damage, signals, other recipes


def test_a_damaged_checkpoint_is_told_and_the_one_before_used(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert begin(home, folder, lambda: mortal(loop, "step", 9)) == -signal.SIGKILL
    newest = checkpoint.find_latest(folder / "checkpoints")[0].step
    before = max(n for path in folder.glob("checkpoints/step-*") if (n := int(path.name[5:])) < newest)
    file = folder / f"checkpoints/step-{newest}/optimizer.safetensors"
    spoilt = bytearray(file.read_bytes())
    spoilt[-1] ^= 1
    file.write_bytes(spoilt)
    capfd.readouterr()
    assert within(lambda: train(recipe(home), output_dir=str(folder), resume=True)) == 0
    said = capfd.readouterr().err
    assert f"step-{newest} is damaged: optimizer.safetensors has changed" in said
    assert f"step-{before} is used instead" in said
    assert equal(home / "whole", folder)
    assert lines(home / "whole") == lines(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", lambda self, step, **_: os.kill(os.getpid(), number) if step == 4 else None)
        with pytest.raises(Interrupted, match=f"{number.name} at step 5") as caught:
            train(recipe(home), output_dir=str(folder), quiet=True)
    assert caught.value.exit_code == 128 + number
    assert str(folder) in caught.value.remedy
    assert (folder / "checkpoints/step-5").is_dir()
    go_on(home, folder)
    assert equal(home / "whole", folder)
    assert lines(home / "whole") == lines(folder)


@pytest.mark.parametrize(("settings", "words"), [
    ({"training.num_train_epochs": 4}, ["training.num_train_epochs: 3.0, now 4.0"]),
    ({"training.max_steps": 20}, ["training.max_steps: None, now 20"]),
    ({"optimizer.learning_rate": 0.01, "method.rank": 3}, ["optimizer.learning_rate: 0.05, now 0.01", "method.rank: 2, now 3"]),
    ({"data.train": "other.jsonl"}, ["data.train", "other.jsonl"]),
    ({"method": "full"}, ["method.name: 'lora', now 'full'"]),
])
@pytest.mark.parametrize("ended", [False, True])
def test_another_recipe_is_refused(home: Path, tmp_path: Path, settings: dict[str, Any], words: list[str], ended: bool) -> None:
    folder = home / "whole" if ended else tmp_path / "run"
    if not ended:
        assert begin(home, folder, lambda: mortal(loop, "step", 5)) == -signal.SIGKILL
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="started with another recipe") as caught:
        train(recipe(home), output_dir=str(folder), resume=True, quiet=True, **settings)
    for part in words:
        assert part in caught.value.what
    assert f"--resume {folder}" in caught.value.remedy
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_other_rows_in_the_same_file_are_refused(home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_bytes((home / "train.jsonl").read_bytes())
    words = {"data.train": str(rows), "output_dir": str(tmp_path / "run"), "quiet": True}

    def work() -> None:
        mortal(loop, "step", 5)
        train(recipe(home), **words)
    assert within(work) == -signal.SIGKILL
    rows.write_text(rows.read_text().replace("yes 2", "no 2"))
    with pytest.raises(ValueError, match="whose content has changed since the run began"):
        train(recipe(home), resume=True, **words)


def test_what_decides_nothing_may_change(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert begin(home, folder, lambda: mortal(loop, "step", 5)) == -signal.SIGKILL
    assert begin(home, folder, resume=True, **{"training.save_steps": 5, "training.save_total_limit": 4, "evaluate.max_samples": 2}) == 0
    assert equal(home / "whole", folder)
    assert (folder / "checkpoints/step-10").is_dir()


# ---------------------------------------------------------------- the end


def test_a_finished_run_is_left_as_it_is(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = home / "whole"

    def never(*_: Any) -> None:
        raise AssertionError("a finished run needs no base")

    monkeypatch.setattr("luthier.api.train.load_family", never)
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(whole)]) == 0
    out, err = capsys.readouterr()
    assert f"{whole} is already finished after {STEPS} steps" in err
    assert "Traceback" not in err
    assert str(whole) in out
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["save_tuned", "plot_training", "build_model_card"])
def test_killed_at_the_end_it_is_finished_without_a_step(home: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    assert begin(home, folder, lambda: mortal(sys.modules["luthier.api.train"], name, 0)) == -signal.SIGKILL
    go_on(home, folder)
    assert equal(home / "whole", folder)
    assert lines(home / "whole") == lines(folder)
    assert (folder / "README.md").exists()


def test_the_best_weights_damaged_at_the_end_can_be_done_without(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"

    def ever_worse() -> None:
        losses = iter(range(9))
        loop.evaluate_batches = lambda *_: {"loss": float(next(losses))}
        mortal(sys.modules["luthier.api.train"], "save_tuned", 0)
    assert begin(home, folder, ever_worse) == -signal.SIGKILL
    best = int(checkpoint.find_latest(folder / "checkpoints")[0].state["summary"]["best"]["step"])
    assert best == 3
    (folder / f"checkpoints/step-{best}/method.safetensors").unlink()
    words = ["train", "--resume", str(folder), "--quiet"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"step-{best} is damaged: method.safetensors is missing" in error
    assert " ".join([*words[:-1], "training.load_best_model_at_end=false"]) in error
    assert main([*words, "training.load_best_model_at_end=false"]) == 0
    last = checkpoint.find_latest(folder / "checkpoints")[0].tensors["method"]
    assert all(torch.equal(tensor, last[name]) for name, tensor in load_file(folder / "adapter_model.safetensors").items())


def test_a_run_that_stopped_early_stays_stopped(home: Path, tmp_path: Path) -> None:
    """Killed after its patience ended but before it was finished, it does not train on."""
    folder, stopped = tmp_path / "run", {"training.early_stopping_patience": 1, "training.eval_steps": 1, "optimizer.learning_rate": 0.9}
    begin(home, tmp_path / "whole", **stopped)
    steps = Run(tmp_path / "whole").results["steps"]
    assert steps < STEPS
    assert begin(home, folder, lambda: mortal(sys.modules["luthier.api.train"], "save_tuned", 0), **stopped) == -signal.SIGKILL
    assert begin(home, folder, resume=True, **stopped) == 0
    assert Run(folder).results["steps"] == steps
    assert Run(folder).results["stopped"] == "evaluations without improvement: 1"
    assert equal(tmp_path / "whole", folder)


def test_random_states_that_fit_nothing_here_are_told(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"

    def far() -> None:
        mortal(loop, "step", 5)
        capture = states.capture_rng_state
        states.capture_rng_state = lambda device: {**capture(device), "cuda": ["AA=="] * 99}
    assert begin(home, folder, far) == -signal.SIGKILL
    capfd.readouterr()
    if torch.cuda.is_available():
        pytest.skip("this machine has a place for them")
    assert within(lambda: train(recipe(home), output_dir=str(folder), resume=True)) == 0
    assert "warning: random states of 99 CUDA devices were saved and 0 are here" in capfd.readouterr().err
