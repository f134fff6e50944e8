"""The verb `features`: the pooled states of a frozen model for every row, cached in a file, and a linear probe on them.

The model is called once per row, without a gradient; what is trained on the states afterwards never calls it again.
Read `api/evaluate.py` first.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
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
from luthier.assembly.python_rows import accepts_python_values
from luthier.assembly.recipe import Recipe
from luthier.assembly.run_io import open_run
from luthier.core.consent import accepts_consent
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

Labels = list[Any]  # for each row: a class name, several of them, a number, or None for an image without a label
KINDS = frozenset({"ClassificationExample", "ImageExample"})  # examples with one state and one label


@accepts_python_values
@accepts_consent
def extract_features(model: Run | Path | str, data: Any, *, out: Path | str | None = None, quiet: bool = False,
                     base_model: Path | str | None = None, allow_code: Sequence[str] = (),
                     **settings: Any) -> tuple[np.ndarray, Labels]:
    """The pooled state of every row, [N, D] float32, in the order of the rows, and the rows' labels.

    Args:
        model: an alias, a folder, a hub id, or a run folder (then with what it trained).
        data: rows of texts or images with a label: a class, several, or a number. A path, a list of dictionaries, a
            `datasets.Dataset` or a pandas DataFrame.
        allow_code: files, modules, URLs or base models whose code the run may use (`core/consent.py`).
        out: a `.safetensors` file to cache them in; labels and settings go to a `.json` file of the same name. If the
            file holds the features of the same base, rows and settings, it is read and nothing is computed.
        base_model: where the base of a run is now, if it was moved.
        settings: they override the recipe, such as ``**{"model.pooling": "mean", "data.max_length": 128}``.

    Raises:
        RunError: `out` holds other features, or is not a .safetensors file.
        LuthierError: the base or the rows cannot be read.
    """
    report = partial(print_line, quiet=quiet)
    recipe, run = _build_feature_recipe(model.path if isinstance(model, Run) else Path(model), data, settings,
                                        base_model,
                                      report)
    if out is None:
        return _compute_features(recipe, run, quiet, base_model)
    file = Path(out)
    if file.suffix != ".safetensors":
        raise RunError(f"features are written to a .safetensors file, not to {str(file)!r}", "use the suffix "
                                                                                             ".safetensors")
    sidecar, fingerprint = file.with_suffix(".json"), _describe_features(recipe, run)
    if file.exists():
        saved = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.exists() else {}
        if saved.get("made_of") != fingerprint:
            raise RunError(f"{str(file)!r} holds features of another base, other rows or other settings",
                           "remove it, or give another file with --out")
        return load_file(file)["features"].numpy(), saved["labels"]
    with translate_os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    states, labels = _compute_features(recipe, run, quiet, base_model)
    Run(file.parent).write(sidecar.name, {"made_of": fingerprint, "pooling": recipe.model.pooling, "labels": labels})
    with translate_os_errors(file):
        save_file({"features": torch.from_numpy(states)}, file, metadata={"format": "pt"})
        file.chmod(sidecar.stat().st_mode)  # safetensors makes its files readable to their owner only
    return states, labels


def fit_linear_probe(states: np.ndarray, labels: Labels, tested: np.ndarray, truth: Labels) -> dict[str, float]:
    """A logistic regression on standardized states: its accuracy on the training rows and on other rows.

    Raises: `MissingExtra` without scikit-learn; `RecipeError` if labels are not single classes, or are all equal.
    """
    if find_spec("sklearn") is None:
        raise MissingExtra("scikit-learn", "features", "a linear probe")
    unusable = next((label for label in [*labels, *truth] if label is None or isinstance(label, tuple | list)), "")
    if unusable != "":
        raise RecipeError(f"a linear probe needs one class per row, and a row has the label {unusable!r}",
                          "train a head on these rows instead: luthier train --objective classify")
    if len(set(labels)) < 2:
        raise RecipeError(f"all {len(labels)} rows have the label {labels[0]!r}", "give rows of two classes or more")
    train_names, test_names = ([get_label_key(label) for label in group] for group in (labels, truth))
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(states, train_names)
    majority = max(sorted(set(train_names)), key=train_names.count)
    return {"train_accuracy": float(fitted.score(states, train_names)),
            "accuracy": float(fitted.score(tested, test_names)),
            "majority": test_names.count(majority) / len(test_names), "examples": len(test_names)}


# ---------------------------------------------------------------- computing


def _build_feature_recipe(base: Path, data: str, settings: Mapping[str, Any], base_model: Path | str | None,
                          report: Callable[[str], None]) -> tuple[Recipe, Run | None]:
    """The recipe that reads the rows and names the model; and the run, if `base` is one."""
    is_run = any((base / name).exists() for name in ("recipe.yaml", "adapter_config.json"))
    if base_model is not None and not is_run:
        raise RecipeError(f"{str(base)!r} is a base model, not a run", "omit --base-model")
    raw: dict[str, Any] = (assembly.dump_recipe(open_recipe(Run(base), base_model, report)) if is_run
                           else {"model": {"name_or_path": str(base)}})
    if is_run and any(key.partition(".")[0] == "model" for key in settings):
        raise RecipeError(f"{str(base)!r} is a run, and its base cannot be changed", "omit the settings of model")
    raw["data"] = {**raw.get("data", {}), "train": data, "test": data, "eval": None, "augment": [], "streaming": True}
    return assembly.build_recipe({**raw, "objective": "classify"}, settings), Run(base) if is_run else None


def _describe_features(recipe: Recipe, run: Run | None) -> str:
    """A digest of everything that decides the features: weights, rows, settings."""
    data, base = recipe.data.test, recipe.model.model_dump_json(exclude={"name_or_path", "device"})
    assert data is not None
    weights = [compute_path_sha256(file) for file in sorted(run.path.glob("*.safetensors"))] if run else []
    if run is None or run.adapter is not None:
        weights.append(assembly.compute_fingerprint(assembly.prepare_folder(recipe.model)))
    rows = compute_path_sha256(Path(data.path)) if Path(data.path).exists() else data.path
    parts = [weights, rows, base, recipe.data.model_dump_json(exclude={"train": True, "test": {"path"}})]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@torch.no_grad()
def _compute_features(recipe: Recipe, run: Run | None, quiet: bool,
                      base_model: Path | str | None) -> tuple[np.ndarray, Labels]:
    with status("loading the base", quiet=quiet):
        family = open_run(run, False, base_model)[1] if run else load_family(recipe.model)
    with status("reading the data", quiet=quiet):
        # Streamed, so that the rows are read once, as test rows: these are neither augmented nor shuffled.
        datasets = assembly.rows.read_datasets(recipe.data, family.tokenizer, seed=recipe.seed, reads=KINDS)
    for line in datasets.report.lines():
        print(line, file=sys.stderr) if not quiet else None
    rows: list[TokenizedExample] = [replace(row, labeled_spans=row.labeled_spans[:1]) for row in datasets.test]
    positions = {row.origin: position for position, row in enumerate(rows)}
    states = torch.zeros(len(rows), family.structure.sizes["hidden"])
    batches = assembly.rows.build_eval_batches(rows, resolve_micro_batch_tokens(recipe, family))
    family.train(False)
    done = 0
    with Progress(len(rows), title="states", quiet=quiet) as bar:
        for batch in batches:
            batch = batch.to(family.device)
            pooled = family.forward(batch.inputs, batch.target, frozenset({"pooled"})).pooled
            assert pooled is not None
            states[[positions[batch.origins[group]] for group in batch.target.groups.tolist()]] = pooled.float().cpu()
            bar.update(done := done + len(batch.origins))
    return states.numpy(), [example.label for example in datasets.test_examples
                            if isinstance(example, ClassificationExample | ImageExample)]
