"""The verb `data check`: which rows of a file training would keep, truncate or refuse. Read `data/report.py` first.

Only the tokenizer of the base model is loaded, so the check takes seconds for any base.
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
    """The result of a data check, and the files that it wrote.

    Args:
        previews: examples as the model sees them; tokens with a loss are green.
    """

    report: assembly.rows.DataReport
    previews: tuple[Text, ...]
    report_file: Path
    plot_file: Path


def check_data(file: str, *, model: str | None = None, evaluated: str | None = None,
               settings: Mapping[str, Any] | None = None, out: Path | str | None = None, previews: int = 2,
               quiet: bool = False) -> DataCheck:
    """Read, encode and report the rows of `file`, and plot their lengths.

    Args:
        model: the base model whose tokenizer and chat template are used; default: the embedded one.
        evaluated: evaluation rows; those whose prompt also occurs in `file` are reported.
        settings: fields of a recipe's `data`, such as ``{"max_length": 512}`` or ``{"data.max_length": 512}``.
        out: folder for data_report.json and lengths.png; default: runs/check-<name of the file>.
    """
    overrides: dict[str, Any] = {"data.train": file, "data.eval": evaluated, "model.name_or_path": model}
    recipe = assembly.build_recipe(None, overrides | {f"data.{key.removeprefix('data.')}": value
                                       for key, value in (settings or {}).items()})
    with status("reading the data", quiet=quiet):
        tokenizer = load_base_tokenizer(recipe.model)
        most = recipe.data.max_length or min(recipe.data.token_limit, read_context_length(recipe.model))
        config = recipe.data.model_copy(update={"streaming": False, "max_length": most})
        datasets = assembly.rows.read_datasets(config, tokenizer, seed=recipe.seed)
    folder = Path(out) if out else Path("runs") / f"check-{Path(file).stem}"
    run = Run(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report_file = run.write("data_report.json", datasets.report.to_json())
        plot_lengths(datasets.report.parts, folder / "lengths.png")
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise RunError(f"the report cannot be written to {str(folder)!r}: {error.strerror}",
                       "give another folder with --out") from error
    shown = tuple(assembly.rows.format_preview(example, tokenizer, datasets.labels)
                  for example in datasets.train[:previews])
    return DataCheck(datasets.report, shown, report_file, folder / "lengths.png")
