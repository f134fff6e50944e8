"""Metric loggers: metrics.jsonl, TensorBoard, Weights & Biases, Trackio, MLflow. Read `core/errors.py` first."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from luthier.core.errors import MissingExtra, RecipeError, RunError, suggest_nearest
from luthier.training.os_errors import translate_os_errors


class Tracker(Protocol):
    """Logs the metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One line of JSON per call of `log`, given to the system when `log` returns. NaN is written as `NaN`.

    Args:
        path: the file; its folder exists.
        resume_at: None: start an empty file. A step: keep the lines up to it, so that steps after the last checkpoint
            of a killed run are not logged twice. An incomplete last line is removed too.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        self._path = path
        with translate_os_errors(path):
            _truncate_log(path, resume_at)
            self._file = path.open("ab", buffering=0)  # so close() does not retry a write that the disk refused

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        assert "step" not in metrics
        line = (json.dumps({"step": step, **metrics}) + "\n").encode()
        with translate_os_errors(self._path):
            while line:
                line = line[self._file.write(line):]

    def close(self) -> None:
        self._file.close()


def _truncate_log(path: Path, resume_at: int | None) -> None:
    """Truncate `path` to the lines up to `resume_at`, atomically."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        if resume_at is None:
            break
        try:
            step = json.loads(line)["step"]
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines):
                continue
            raise RunError(f"{path}:{number} is not a line of metrics ({error})",
                           "delete that line, then resume") from error
        if step <= resume_at:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    if kept != lines:
        temporary = path.with_name(f".{path.name}.writing")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class TensorBoard:
    """Event files in `folder/tensorboard`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        _check_package("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_at is None else resume_at + 1  # hides what a killed run logged after its last checkpoint
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self._writer.add_text("recipe", f"```json\n{json.dumps(config, indent=1, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, in the project of `WANDB_PROJECT`, else `luthier`.

    A resumed run continues under the id stored in the folder. Steps that the service already has are unchanged.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        _check_package("wandb")
        import wandb

        file = folder / "wandb" / "run-id"
        if resume_at is None or not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", "luthier"), name=folder.name, dir=str(folder),
                               id=file.read_text(), resume="allow", config=dict(config))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio, in the project of `TRACKIO_PROJECT`, else `luthier`; its database is in the user's home folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        _check_package("trackio")
        import trackio

        self._run = trackio.init(project=os.environ.get("TRACKIO_PROJECT", "luthier"), name=folder.name,
                                 config=dict(config), resume="never" if resume_at is None else "allow")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, at `MLFLOW_TRACKING_URI`, in the experiment of `MLFLOW_EXPERIMENT_NAME`, else `luthier`.

    A resumed run continues under the id stored in the folder; steps after the last checkpoint are then logged a second
    time, and the service keeps both. Parameters are text of at most `PARAM_LENGTH`
    characters, the limit of older servers; longer ones are cut.
    """

    PARAM_LENGTH = 500
    PARAMS_PER_CALL = 100  # the service refuses more at once

    def __init__(self, folder: Path, config: Mapping[str, Any], resume_at: int | None) -> None:
        _check_package("mlflow")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        file = folder / "mlflow" / "run-id"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "luthier")
        self._client = MlflowClient()
        self._id = file.read_text(encoding="utf-8") if resume_at is not None and file.exists() else ""
        if self._id:
            self._client.update_run(self._id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(experiment_id, run_name=folder.name).info.run_id
        file.parent.mkdir(exist_ok=True)
        file.write_text(self._id, encoding="utf-8")
        params = [Param(key, value[:self.PARAM_LENGTH]) for key, value in _flatten(config)]
        for start in range(0, len(params), self.PARAMS_PER_CALL):
            self._client.log_batch(self._id, params=params[start:start + self.PARAMS_PER_CALL])

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._client.log_metric(self._id, name, float(value), step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and text of every setting.

    >>> list(_flatten({"seed": 0, "method": {"name": "lora", "targets": ["q", "v"]}}))
    [('seed', '0'), ('method.name', 'lora'), ('method.targets', "['q', 'v']")]
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int | None], Tracker]] = {  # name = package = extra
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_trackers(names: Iterable[str]) -> None:
    """Raises an error for an unknown tracker or a package that is not installed. Opens nothing."""
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"unknown tracker {name!r}: {suggest_nearest(name, TRACKERS)}",
                              "metrics.jsonl is always written and need not be listed")
        _check_package(name)


def open_trackers(names: Iterable[str], folder: Path, config: Mapping[str, Any],
                  resume_at: int | None = None) -> list[Tracker]:
    """The named trackers, without `JsonLines`. All names and packages are checked before any is opened."""
    names = list(dict.fromkeys(names))
    check_trackers(names)
    if names:
        folder.mkdir(parents=True, exist_ok=True)
    return [TRACKERS[name](folder, config, resume_at) for name in names]


def _check_package(package: str) -> None:
    # A spec without an origin is a plain folder of that name, such as the `wandb/` that wandb writes.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtra(package, package, f"the tracker {package!r}")


def log_to_all(*trackers: Tracker) -> Callable[[int, Mapping[str, float]], None]:
    """One function that logs to all of them."""
    def log(step: int, metrics: Mapping[str, float]) -> None:
        for tracker in trackers:
            tracker.log(step, metrics)
    return log
