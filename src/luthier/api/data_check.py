"""The verb `data check`: what would become of every row of a file, before any training. Read `data/report.py` first.

Only the base's tokenizer is loaded, so it takes seconds however large the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import assembly
from luthier.assembly.factory import load_base_tokenizer, read_context_length
from luthier.core.errors import RunError
from luthier.reporting.plots import plot_lengths
from luthier.reporting.progress import status
from luthier.training.run_folder import Run

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True)
class DataCheck:
    """What a data check found, and the files that it wrote.

    Args:
        previews: examples as the model meets them, what is trained in green.
    """

    report: assembly.rows.DataReport
    previews: tuple[Text, ...]
    report_file: Path
    picture: Path


def check_data(file: str, *, model: str | None = None, evaluated: str | None = None,
               settings: Mapping[str, Any] | None = None, out: Path | str | None = None, previews: int = 2,
               quiet: bool = False) -> DataCheck:
    """Read, encode and report the rows of `file`, and draw their lengths.

    Args:
        model: the base whose tokenizer and chat template are used; left out: the embedded one.
        evaluated: rows that will be evaluated on; those whose prompt is in `file` too are reported.
        settings: of a recipe's `data`, such as ``{"max_length": 512}``; ``data.max_length`` is the same.
        out: folder for data_report.json and lengths.png; left out: runs/check-<name of the file>.
    """
    overrides: dict[str, Any] = {"data.train": file, "data.eval": evaluated, "base.name": model}
    recipe = assembly.recipe(None, overrides | {f"data.{key.removeprefix('data.')}": value
                                       for key, value in (settings or {}).items()})
    with status("reading the data", quiet=quiet):
        tokenizer = load_base_tokenizer(recipe.base)
        most = recipe.data.max_length or min(recipe.data.most, read_context_length(recipe.base))
        config = recipe.data.model_copy(update={"streaming": False, "max_length": most})
        datasets = assembly.rows.load(config, tokenizer, seed=recipe.seed)
    folder = Path(out) if out else Path("runs") / f"check-{Path(file).stem}"
    run = Run(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report_file = run.write("data_report.json", datasets.report.to_json())
        plot_lengths(datasets.report.parts, folder / "lengths.png")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise RunError(f"the report cannot be written to {str(folder)!r}: {error.strerror}",
                       "name another folder with --out") from error
    shown = tuple(assembly.rows.preview(example, tokenizer, datasets.labels) for example in datasets.train[:previews])
    return DataCheck(datasets.report, shown, report_file, folder / "lengths.png")
