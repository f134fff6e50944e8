"""The verb `schema`: every setting of a recipe, for editors and for reading. Read `build.py` (Recipe) first."""

from __future__ import annotations

from typing import Any

from luthier.assembly.recipe import Recipe


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe: each setting with its type, default and meaning."""
    return Recipe.model_json_schema()
