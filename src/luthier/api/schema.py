"""The verb `schema`: all settings of a recipe, for editors and readers. Read `assembly/recipe.py` first."""

from __future__ import annotations

from typing import Any

from luthier.assembly.recipe import Recipe


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe: each setting with its type, default and meaning."""
    return Recipe.model_json_schema()
