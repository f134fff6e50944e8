"""The verb `features`: a frozen base's state of every row, kept in a file, and a linear probe on top of it.

The base is run once, without a gradient; whatever stands on its states afterwards (a probe here, any model of
scikit-learn, a table) never calls it again. Read `api/evaluate.py` first.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from luthier import assembly
from luthier.assembly.factory import load_family, resolve_micro_batch_tokens
from luthier.assembly.provenance import open_recipe
from luthier.assembly.recipe import Recipe
from luthier.assembly.run_io import open_run
from luthier.core.digests import compute_path_sha256
from luthier.core.errors import MissingExtra, RecipeError, RunError
from luthier.core.examples import ClassificationExample, ImageExample
from luthier.core.labels import get_label_key
from luthier.core.types import TokenizedExample
from luthier.reporting.progress import Progress, print_line, status
from luthier.training.os_errors import translate_os_errors
from luthier.training.run_folder import Run

if TYPE_CHECKING:
    import numpy as np

Labels = list[Any]  # of each row a class's name, several of them, a number, or None for a picture without a label
KINDS = frozenset({"ClassificationExample", "ImageExample"})  # what has one state and one label


def features(model: Run | Path | str, data: str, *, out: Path | str | None = None, quiet: bool = False,
             base_model: str | None = None, **settings: Any) -> tuple[np.ndarray, Labels]:
    """The pooled state of every row, [N, D] float32, in the order of the rows, and the rows' labels.

    Args:
        model: an alias, a folder, a hub id, or a run folder (then with what it trained).
        data: rows of texts or pictures with a label: a class, several, or a number.
        out: a `.safetensors` file to keep them in, with their labels and settings in a `.json` beside it. Where it
            holds those of the same base, rows and settings already, it is read and nothing is computed.
        base_model: where the base of a run is now, if it was moved.
        settings: laid over the recipe, such as ``**{"model.pooling": "mean", "data.max_length": 128}``.

    Raises:
        RunError: `out` holds features of something else, or is no such file.
        LuthierError: the base or the rows cannot be read.
    """
    tell = partial(print_line, quiet=quiet)
    made, run = _build_feature_recipe(model.path if isinstance(model, Run) else Path(model), data, settings, base_model,
                                      tell)
    if out is None:
        return _compute_features(made, run, quiet, base_model)
    file = Path(out)
    if file.suffix != ".safetensors":
        raise RunError(f"features are kept in a .safetensors file, not in {str(file)!r}", "give its name that ending")
    beside, made_of = file.with_suffix(".json"), _describe_features(made, run)
    if file.exists():
        kept = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        if kept.get("made_of") != made_of:
            raise RunError(f"{str(file)!r} holds features of another base, other rows or other settings",
                           "remove it, or name another file with --out")
        return load_file(file)["features"].numpy(), kept["labels"]
    with translate_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    found, labels = _compute_features(made, run, quiet, base_model)
    Run(file.parent).write(beside.name, {"made_of": made_of, "pooling": made.model.pooling, "labels": labels})
    with translate_os_errors(file):
        save_file({"features": torch.from_numpy(found)}, file, metadata={"format": "pt"})
        file.chmod(beside.stat().st_mode)  # the library makes its files readable to their owner alone
    return found, labels


def fit_linear_probe(states: np.ndarray, labels: Labels, tested: np.ndarray, truth: Labels) -> dict[str, float]:
    """A logistic regression on standardised states: its accuracy on the rows that it learned from and on others.

    Raises: `MissingExtra` without scikit-learn; `RecipeError` where labels are no single classes, or are all the same.
    """
    if find_spec("sklearn") is None:
        raise MissingExtra("scikit-learn", "features", "a linear probe")
    strange = next((label for label in [*labels, *truth] if label is None or isinstance(label, tuple | list)), "")
    if strange != "":
        raise RecipeError(f"a linear probe learns one class for each row, and a row has {strange!r}",
                          "train a head on these rows instead: luthier train --objective classify")
    if len(set(labels)) < 2:
        raise RecipeError(f"all {len(labels)} rows have the label {labels[0]!r}", "give rows of two classes or more")
    named, wanted = ([get_label_key(label) for label in given] for given in (labels, truth))
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(states, named)
    most = max(sorted(set(named)), key=named.count)
    return {"train_accuracy": float(fitted.score(states, named)), "accuracy": float(fitted.score(tested, wanted)),
            "majority": wanted.count(most) / len(wanted), "examples": len(wanted)}


# ---------------------------------------------------------------- computing


def _build_feature_recipe(base: Path, data: str, settings: Mapping[str, Any], base_model: str | None,
                          report: Callable[[str], None]) -> tuple[Recipe, Run | None]:
    """How the rows are read and by which base; and the run, where it is one."""
    is_run = any((base / name).exists() for name in ("recipe.yaml", "adapter_config.json"))
    if base_model is not None and not is_run:
        raise RecipeError(f"{str(base)!r} is a base itself", "leave the base model out (--base-model)")
    raw: dict[str, Any] = (assembly.dump(open_recipe(Run(base), base_model, report)) if is_run
                           else {"model": {"name_or_path": str(base)}})
    if is_run and any(key.partition(".")[0] == "model" for key in settings):
        raise RecipeError(f"{str(base)!r} is a run, and its base is as it was trained", "omit the settings of model")
    raw["data"] = {**raw.get("data", {}), "train": data, "test": data, "eval": None, "augment": [], "streaming": True}
    return assembly.recipe({**raw, "objective": "classify"}, settings), Run(base) if is_run else None


def _describe_features(made: Recipe, run: Run | None) -> str:
    """A fingerprint of all that decides the features: weights, rows, settings."""
    data, base = made.data.test, made.model.model_dump_json(exclude={"name_or_path", "device"})
    assert data is not None
    weights = [compute_path_sha256(file) for file in sorted(run.path.glob("*.safetensors"))] if run else []
    if run is None or run.adapter is not None:
        weights.append(assembly.compute_fingerprint(assembly.prepare_folder(made.model)))
    rows = compute_path_sha256(Path(data.path)) if Path(data.path).exists() else data.path
    told = [weights, rows, base, made.data.model_dump_json(exclude={"train"})]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@torch.no_grad()
def _compute_features(made: Recipe, run: Run | None, quiet: bool, base_model: str | None) -> tuple[np.ndarray, Labels]:
    with status("loading the base", quiet=quiet):
        family = open_run(run, False, base_model)[1] if run else load_family(made.model)
    with status("reading the data", quiet=quiet):
        # Streamed, so that the rows are read once: as those of a test, which nothing changes.
        found = assembly.rows.read_datasets(made.data, family.tokenizer, seed=made.seed, reads=KINDS)
    for line in found.report.lines():
        print(line, file=sys.stderr) if not quiet else None
    rows: list[TokenizedExample] = [replace(row, labeled_spans=row.labeled_spans[:1]) for row in found.test]
    places = {row.origin: place for place, row in enumerate(rows)}
    states = torch.zeros(len(rows), family.structure.sizes["hidden"])
    batches = assembly.rows.build_eval_batches(rows, resolve_micro_batch_tokens(made, family))
    family.train(False)
    done = 0
    with Progress(len(rows), title="states", quiet=quiet) as bar:
        for batch in batches:
            batch = batch.to(family.device)
            pooled = family.forward(batch.inputs, batch.target, frozenset({"pooled"})).pooled
            assert pooled is not None
            states[[places[batch.origins[group]] for group in batch.target.groups.tolist()]] = pooled.float().cpu()
            bar.update(done := done + len(batch.origins))
    return states.numpy(), [example.label for example in found.test_examples
                            if isinstance(example, ClassificationExample | ImageExample)]
