"""Writes an export atomically, and refuses settings that have no effect. No simpler file to read first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from luthier.core.errors import RunError
from luthier.core.locks import staging_folder

FORMS = ("merged", "bundle", "adapter", "gguf", "gguf-adapter")
FILES = {"gguf": "model.gguf", "gguf-adapter": "adapter.gguf"}  # the forms that are a single file
DTYPES = {"merged": ("float32", "bfloat16", "float16"), "bundle": ("float32", "bfloat16", "float16"),
          "gguf": ("float32", "float16", "q8_0")}


@contextmanager
def write_atomically(out: Path) -> Iterator[Path]:
    """A temporary path on the same disk, which is renamed to `out` on success and removed on failure.

    Raises:
        RunError: the folder that `out` is in cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(staging_folder(out.parent))
        except OSError as error:
            raise RunError(f"{str(out)!r} cannot be written: {error.strerror}",
                           "free some space, or name a place that can be written with --out") from error
        yield (temporary := folder / out.name)
        temporary.replace(out)


def check_form(form: str) -> None:
    """Raises `RunError` for a form that is not known."""
    if form not in FORMS:
        raise RunError(f"unknown export format {form!r}", f"one of: {', '.join(FORMS)}")


def check_dtype(dtype: str | None, form: str) -> None:
    """Raises `RunError` for a dtype that this form is not written in."""
    if dtype is not None and dtype not in DTYPES.get(form, ()):
        raise RunError(f"dtype {dtype!r} has no effect on {form!r}" if form not in DTYPES else
                       f"--to {form} does not write {dtype}", f"one of: {', '.join(DTYPES[form])}" if form in DTYPES
                       else "omit --dtype, or export with --to merged or --to gguf")


def check_rank(rank: int | str | None, form: str) -> None:
    """Raises `RunError` for a rank that has no effect or is not a positive integer."""
    if rank is not None and form != "adapter":
        raise RunError(f"lora_rank {rank} has no effect on {form!r}", "omit --lora-rank, or export with --to adapter")
    if rank is not None and rank != "auto" and (not isinstance(rank, int) or rank < 1):
        raise RunError(f"lora_rank is {rank!r}, and a rank is a whole number of at least 1", "give one, or auto")


def check_vacant(out: Path, form: str) -> None:
    """Raises `RunError` where `out` exists, or has the wrong suffix."""
    if form in FILES and out.suffix != ".gguf":
        raise RunError(f"--to {form} writes one file, and {str(out)!r} does not end in .gguf", f"--out {out}.gguf")
    if os.path.exists(out) and (form in FILES or not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{str(out)!r} already exists and is not empty; nothing is overwritten",
                       "remove it, or give another path with --out")
