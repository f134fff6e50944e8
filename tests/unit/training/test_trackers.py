"""Trackers: lines that survive a kill, and packages that are missed before any work."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from luthier.core.errors import MissingExtra, RecipeError, RunError
from luthier.training import trackers as track
from luthier.training.trackers import JsonLines, MLflow, TensorBoard, Trackio, WandB, open_trackers


def written(path: Path, last: int) -> Path:
    lines = JsonLines(path)
    for step in range(1, last + 1):
        lines.log(step, {"loss": 1 / step})
    lines.close()
    return path


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_line_is_there_when_log_returns(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m")
    lines.log(1, {"loss": 0.1 + 0.2, "note": "µ"})
    assert json.loads((tmp_path / "m").read_text()) == {"step": 1, "loss": 0.1 + 0.2, "note": "µ"}
    lines.close()


def test_resuming_drops_what_came_later(tmp_path: Path) -> None:
    path = written(tmp_path / "m", 6)
    first = path.read_bytes().splitlines(keepends=True)
    lines = JsonLines(path, resume_at=4)
    assert path.read_bytes() == b"".join(first[:4])
    lines.log(5, {"loss": 9.0})
    assert steps(path) == [1, 2, 3, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_an_untouched_file_is_not_written_again(tmp_path: Path) -> None:
    path = written(tmp_path / "m", 3)
    before = path.stat().st_ino
    JsonLines(path, resume_at=3).close()
    assert path.stat().st_ino == before


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    path = written(tmp_path / "m", 3)
    JsonLines(path).close()
    assert path.read_bytes() == b""
    JsonLines(tmp_path / "none", resume_at=3).close()
    assert (tmp_path / "none").read_bytes() == b""


def test_a_line_torn_anywhere_is_dropped(tmp_path: Path) -> None:
    whole = written(tmp_path / "m", 3).read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole) + 1):
        path = tmp_path / "torn"
        path.write_bytes(whole[:cut])
        lines = JsonLines(path, resume_at=9)
        lines.log(10, {})
        lines.close()
        assert steps(path) == ([1, 2, 3, 10] if cut >= len(whole) - 1 else [1, 2, 10])
    path.write_bytes(whole + b"\0" * 50)  # what a power cut may leave
    JsonLines(path, resume_at=9).close()
    assert path.read_bytes() == whole


def test_a_spoilt_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "m", 3)
    path.write_text(path.read_text().replace('{"step": 2', '{"st'))
    with pytest.raises(RunError, match="m:2 is not a line of metrics"):
        JsonLines(path, resume_at=3)


def test_unknown_trackers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        open_trackers(["tensorbord"], tmp_path, {})


@pytest.mark.parametrize("name", sorted(track.TRACKERS))
def test_a_missing_package_is_told_before_any_work(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "find_spec", lambda package: None)
    with pytest.raises(MissingExtra, match=rf"luthier\[{name}\]"):
        open_trackers([name], tmp_path / "run", {})
    with pytest.raises(MissingExtra):
        track.TRACKERS[name](tmp_path, {}, None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "wandb" in sys.modules or find_spec("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("wandb") is not None
    with pytest.raises(MissingExtra):
        WandB(tmp_path, {}, None)


class FakeRun:
    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.finished = given, [], False

    def log(self, metrics: dict, step: int) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Stand-ins that record what they are told, for packages that are not among the tests' own."""
    runs: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        runs.append(FakeRun(**given))
        return runs[-1]

    class Writer:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            runs.append(FakeRun(folder=folder, purge_step=purge_step))

        def add_text(self, name: str, text: str) -> None:
            runs[-1].given[name] = text

        def add_scalar(self, name: str, value: float, step: int) -> None:
            runs[-1].log({name: value}, step)

        def flush(self) -> None: ...

        def close(self) -> None:
            runs[-1].finish()

    class Client:
        """As `mlflow.MlflowClient`: every call names the run by its id."""

        def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
            return SimpleNamespace(experiment_id=f"id of {name}") if name == "there" else None

        def create_experiment(self, name: str) -> str:
            return f"new {name}"

        def create_run(self, experiment_id: str, run_name: str) -> SimpleNamespace:
            runs.append(FakeRun(experiment=experiment_id, name=run_name))
            return SimpleNamespace(info=SimpleNamespace(run_id=str(len(runs) - 1)))

        def log_batch(self, run_id: str, params: list[tuple[str, str]]) -> None:
            assert len(params) <= 100
            runs[int(run_id)].given |= dict(params)

        def log_metric(self, run_id: str, name: str, value: float, step: int) -> None:
            assert isinstance(value, float)
            runs[int(run_id)].log({name: value}, step)

        def update_run(self, run_id: str, status: str) -> None:
            assert status == "RUNNING"
            runs[int(run_id)].finished = False

        def set_terminated(self, run_id: str) -> None:
            runs[int(run_id)].finish()

    for name in ("wandb", "trackio", "tensorboard", "torch.utils.tensorboard", "mlflow", "mlflow.entities"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, origin="fake")
        module.init, module.SummaryWriter, module.MlflowClient = init, Writer, Client
        module.Param = lambda key, value: (key, value)
        monkeypatch.setitem(sys.modules, name, module)
    return runs


@pytest.mark.parametrize("kind", [TensorBoard, WandB, Trackio, MLflow])
def test_metrics_reach_the_tracker(tmp_path: Path, kind: type, fakes: list[FakeRun]) -> None:
    tracker = kind(tmp_path, {"seed": 1}, None)
    tracker.log(3, {"loss": 0.5})
    tracker.close()
    assert fakes[0].logged == [(3, {"loss": 0.5})]
    assert fakes[0].finished
    assert "seed" in str(fakes[0].given)


def test_wandb_goes_on_under_its_id(tmp_path: Path, fakes: list[FakeRun]) -> None:
    for resume_at in (None, 4, None):
        WandB(tmp_path, {}, resume_at)
    first, resumed, fresh = (run.given["id"] for run in fakes)
    assert first == resumed != fresh


def test_mlflow_goes_on_under_its_id(tmp_path: Path, fakes: list[FakeRun]) -> None:
    for resume_at, step in ((None, 1), (4, 5), (None, 1)):
        tracker = MLflow(tmp_path, {}, resume_at)
        assert not fakes[-1].finished
        tracker.log(step, {"loss": 1, "note": "text"})
        tracker.close()
    assert [run.logged for run in fakes] == [[(1, {"loss": 1.0}), (5, {"loss": 1.0})], [(1, {"loss": 1.0})]]
    assert all(run.finished for run in fakes)


def test_mlflow_has_every_setting_as_a_parameter(tmp_path: Path, fakes: list[FakeRun],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    many = {"method": {"name": "lora", "rank": 8}, "system": "x" * 900} | {f"s{i}": i for i in range(250)}
    MLflow(tmp_path / "..", many, None)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "there")
    MLflow(tmp_path, {}, None)
    assert fakes[0].given["experiment"] == "new luthier"
    assert fakes[1].given["experiment"] == "id of there"
    assert fakes[0].given["method.rank"] == "8"
    assert fakes[0].given["s249"] == "249"
    assert fakes[0].given["system"] == "x" * 500


def test_tensorboard_forgets_what_came_later(tmp_path: Path, fakes: list[FakeRun]) -> None:
    TensorBoard(tmp_path, {}, 4)
    assert fakes[0].given["purge_step"] == 5


def test_each_named_tracker_is_opened_once(tmp_path: Path, fakes: list[FakeRun]) -> None:
    trackers = open_trackers(["trackio", "wandb", "trackio"], tmp_path / "run", {})
    assert [type(tracker) for tracker in trackers] == [Trackio, WandB]
    assert open_trackers([], tmp_path / "none", {}) == []
    assert not (tmp_path / "none").exists()
