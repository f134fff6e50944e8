"""Optional attributes of Transformers' configs and modules, which differ between architectures. Read this before
`architectures.py`; it depends on nothing else."""

from __future__ import annotations

from typing import Any


def get_optional(owner: Any, name: str) -> Any:
    """The attribute `name` of a config, model, module or output; None if it has no such attribute."""
    return getattr(owner, name, None)
