"""One writer for each run folder, and nothing left behind by those that were killed. Read `training/run_lock.py` first."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.api.compare import compare_methods
from luthier.api.export import export
from luthier.api.plan import plan
from luthier.api.train import train
from luthier.core.errors import RunError, StoppedAtOnce
from luthier.core.locks import Locked, hold_lock, staging_folder, sweep_staging
from luthier.training.interrupts import handle_interrupts
from luthier.training.run_folder import Run
from luthier.training.run_lock import create_numbered_folder, lock_run
from tiny import save_tiny

SOURCE = str(Path(__file__).parents[3] / "src")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    rows = [{"prompt": f"Say {word}.", "completion": word * 2} for word in ("one", "two", "six", "ten")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text("model: base\ndata: {train: rows.jsonl, test: rows.jsonl}\n"
                                        "training: {max_steps: 2, batch_size: 4, save_steps: 1}\n")
    return tmp_path


@pytest.fixture
def owner(home: Path) -> Iterator[Any]:
    """Starts processes that hold the lock of a folder until they are killed."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: str) -> subprocess.Popen[str]:
        code = ("import sys, time; from luthier.training.run_lock import lock_run; "
                "from luthier.training.run_folder import Run\n"
                f"with lock_run(Run({folder!r})): print('held', flush=True); time.sleep(600)")
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def small(**changed: Any) -> dict[str, Any]:
    return {"model": "base", "data": "rows.jsonl", "training": {"max_steps": 2, "save_steps": 1}, **changed}


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("verb", ["train", "resume", "compare", "plan"])
def test_a_folder_that_is_being_written_is_refused_with_the_pid(owner: Any, verb: str) -> None:
    if verb == "resume":
        train(small(output_dir="folder"), quiet=True)
        (Path("folder") / "README.md").unlink()  # as if it had been stopped before its end
    process = owner("folder")
    verbs = {"train": lambda: train(small(output_dir="folder"), quiet=True),
             "resume": lambda: train(small(output_dir="folder"), resume=True, quiet=True),
             "compare": lambda: compare_methods("task.yaml", ["lora"], out="folder", quiet=True),
             "plan": lambda: plan("task.yaml", ["lora"], out="folder", quiet=True)}
    with pytest.raises(RunError, match=f"process {process.pid} is writing it"):
        verbs[verb]()
    process.kill()
    process.wait()
    verbs[verb]()  # the kernel released the lock
    assert not (Path("folder") / ".lock").exists()


def test_a_finished_run_is_left_alone_also_where_nothing_can_be_written(home: Path) -> None:
    train(small(output_dir="folder"), quiet=True)
    Path("folder").chmod(0o555)
    assert train(small(output_dir="folder"), resume=True, quiet=True).results["steps"] == 2


def test_the_lock_is_released_on_success_and_on_failure(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(RunError, match="is not a run folder"), lock_run(run):
        Run(run.write("results.json", {}).parent).require_exists()
    with lock_run(run), pytest.raises(RunError, match=f"process {os.getpid()}"), lock_run(run):
        pass
    assert [path.name for path in run.path.iterdir()] == ["results.json"]


def test_a_folder_in_which_nothing_was_written_is_removed(home: Path) -> None:
    with lock_run(Run("empty")):
        pass
    assert not Path("empty").exists()
    with pytest.raises(ValueError, match="nowhere"):
        train(small(output_dir="refused", method={"name": "lora", "target_modules": ["nowhere"]}), quiet=True)
    assert not Path("refused").exists()


def _create(stem: str, names: Any) -> None:
    names.put([str(create_numbered_folder(Path(stem))) for _ in range(20)])


def test_runs_without_a_name_never_share_one(tmp_path: Path) -> None:
    context = get_context("spawn")
    names = context.Queue()
    processes = [context.Process(target=_create, args=(str(tmp_path / "runs" / "lora-base"), names)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [name for _ in processes for name in names.get(timeout=120)]
    for process in processes:
        process.join()
    assert len(set(found)) == 60 == len(list((tmp_path / "runs").iterdir()))


def _fight(file: str, counter: str) -> None:
    for _ in range(200):
        try:
            with hold_lock(Path(file)):
                number = int(Path(counter).read_text())
                Path(counter).write_text(str(number + 1))
                with open(f"{counter}.log", "a") as log:
                    log.write(f"{number}\n")
        except Locked:
            continue


def test_a_lock_whose_file_is_removed_and_made_again_still_has_one_owner(tmp_path: Path) -> None:
    """The count would repeat a number if two owners held the lock at once."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = get_context("spawn")
    processes = [context.Process(target=_fight, args=(str(tmp_path / "lock"), str(counter))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    numbers = (tmp_path / "counter.log").read_text().split()
    assert len(numbers) == len(set(numbers)) == int(counter.read_text()) > 100


# ---------------------------------------------------------------- leftovers


def test_what_killed_processes_left_is_swept(home: Path) -> None:
    run = train(small(output_dir="folder"), quiet=True)
    (run.path / "README.md").unlink()
    left = [run.path / ".results.json.4194000", run.path / ".metrics.jsonl.writing"]
    for file in left:
        file.write_text("half")
    folders = [run.checkpoints / ".dropped-step-1", run.checkpoints / ".writing-step-1-4194000",
               run.path / ".making-abc"]
    for folder in folders:
        folder.mkdir()
        (folder / "file").write_text("half")
    (run.path / ".making-abc" / ".lock").write_text("4194000")
    (run.path / ".mine").write_text("a user's own hidden file")
    train(small(output_dir="folder"), resume=True, quiet=True)
    assert not [path for path in [*left, *folders] if path.exists()]
    assert (run.path / ".mine").exists()


def test_staging_folders_of_living_processes_stay(tmp_path: Path) -> None:
    with staging_folder(tmp_path) as mine:
        (mine / "file").write_text("in progress")
        sweep_staging(tmp_path)
        assert (mine / "file").exists()
        fresh = tmp_path / ".making-fresh"  # of a process that has not locked it yet
        fresh.mkdir()
        sweep_staging(tmp_path)
        assert fresh.exists()
        os.utime(fresh, (0, 0))
        sweep_staging(tmp_path)
        assert not fresh.exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_place_is_named_as_another_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(RunError, match="Permission denied"), lock_run(Run(tmp_path / "run")):
        pass


@pytest.mark.parametrize("place", ["file/run", "x" * 300, "/proc/run"])
def test_a_place_that_cannot_be_written_is_named_before_the_base_is_loaded(
        home: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    run = train(small(output_dir="good"), quiet=True)
    Path("file").write_text("")
    monkeypatch.setattr("luthier.api.train.load_family", lambda *_: pytest.fail("the base was loaded"))
    monkeypatch.setattr("luthier.api.export.open_run", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(RunError, match="cannot be written"):
        train(small(output_dir=place), quiet=True)
    for form in ("merged", "adapter"):
        with pytest.raises(RunError, match="cannot be written"):
            export(run, form, out=f"{place}/model")  # type: ignore[arg-type]
    assert not list(Path().glob(".making-*"))


# ---------------------------------------------------------------- signals and parents


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_second_signal_of_a_kind_stops_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with handle_interrupts() as interruption:
        signal.raise_signal(number)
        assert interruption.requested == number.name
        with pytest.raises(StoppedAtOnce) as raised:
            signal.raise_signal(number)
    assert raised.value.exit_code == 128 + number
    assert signal.getsignal(number) is before


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_interrupts() as interruption:
            signal.raise_signal(signal.SIGHUP)
        assert interruption.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_training_with_a_checkpoint(home: Path, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen([sys.executable, "-m", "luthier", "train", "task.yaml", "output_dir=folder",
                                "training.max_steps=100000", "training.save_steps=1000"], stderr=subprocess.PIPE)
    wait_for(lambda: Path("folder/metrics.jsonl").exists() and Path("folder/metrics.jsonl").read_text().count("\n") > 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert list(Path("folder/checkpoints").glob("step-*"))
    assert not Path("folder/.lock").exists()


@pytest.mark.parametrize("verb", ["compare", "plan"])
def test_a_child_ends_with_its_parent(home: Path, verb: str) -> None:
    out = Path("folder")
    settings = ["training.max_steps=1000000"] if verb == "compare" else []
    if verb == "plan":  # a trial takes few steps, so it is caught while it loads
        settings = ["data.train=endless.jsonl"]
        os.mkfifo("endless.jsonl")
    process = subprocess.Popen([sys.executable, "-m", "luthier", verb, "task.yaml", "--methods", "lora", "--out", "folder",
                                *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        wait_for(lambda: children.read_text().split())
        child = children.read_text().split()[0]
        if verb == "compare":
            wait_for((out / "lora" / "metrics.jsonl").exists)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not Path(f"/proc/{child}").exists(), 40)


@pytest.mark.parametrize("state", ["empty folder", "no recipe", "recipe only", "first checkpoint", "last file missing"])
def test_a_comparison_continues_from_every_state_that_a_kill_leaves(home: Path, state: str) -> None:
    out = Path("folder")
    whole = compare_methods("task.yaml", ["lora"], out="whole", quiet=True)
    compare_methods("task.yaml", ["lora"], out=out, quiet=True)
    run = out / "lora"
    (run / "README.md").unlink()
    keep = {"empty folder": (), "no recipe": ("checkpoints",), "recipe only": ("recipe.yaml",),
            "first checkpoint": ("recipe.yaml", "checkpoints", "metrics.jsonl", "data_report.json", "results.json"),
            "last file missing": None}[state]
    for path in run.iterdir() if keep is not None else ():
        if path.name not in keep:
            path.unlink() if path.is_file() else shutil.rmtree(path)
    again = compare_methods("task.yaml", ["lora"], out=out, quiet=True)
    found, wanted = (json.loads((folder.path / "comparison.json").read_text())["methods"][0] for folder in (again, whole))
    assert found["after"] == wanted["after"]
