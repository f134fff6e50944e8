"""The base class of every config: frozen, unknown keys rejected, all errors at once. Read `config_errors.py` first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.core.config_errors import translate_errors
from luthier.core.errors import RecipeError

NULL = object()  # a setting that is explicitly null; None means that the setting is not given


class Config(BaseModel):
    """A small frozen set of settings, defined in the module that it configures."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str = "") -> Self:
        """Validates `raw`. Raises one `RecipeError` that lists every fault with its setting."""
        try:
            return cls.model_validate(dict(raw))
        except ValidationError as error:
            raise RecipeError("\n".join(translate_errors(error, cls, where)),
                              "fix the settings named above; `luthier schema` prints every setting") from None
