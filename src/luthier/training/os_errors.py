"""Errors of the disk, translated to `RunError` with a remedy. Read `core/errors.py` first."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from luthier.core.errors import RunError

FULL = "free disk space, lower training.save_total_limit, or write the run to another disk; then resume"
DENIED = "give this user write permission, or write the run to another folder; then resume"
REMEDIES = {errno.ENOSPC: FULL, errno.EDQUOT: FULL, errno.EFBIG: FULL,
            errno.EACCES: DENIED, errno.EPERM: DENIED, errno.EROFS: DENIED}


@contextmanager
def translate_os_errors(place: Path) -> Iterator[None]:
    """Translate a full or read-only disk, while writing to `place`, to a `RunError`. Other errors are unchanged."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else parse_os_error(error)
        if number not in REMEDIES:
            raise
        raise RunError(f"cannot write {place}: {os.strerror(number or 0)}", REMEDIES[number or 0]) from error


def parse_os_error(error: SafetensorError) -> int | None:
    """The errno in the message of a safetensors error; None where it was not an error of the system."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
