"""The saved format of methods that PEFT does not have: the same two files, with Luthier's settings inside.

    adapter_config.json         {"peft_type": "LUTHIER", "task_type": ..., "method": {settings, as in the recipe}}
    adapter_model.safetensors   the trained tensors, named `base_model.model.` + path of the changed module + suffix
"""

from __future__ import annotations

from typing import Any

from luthier.core.config import Config

NATIVE_TYPE = "LUTHIER"
PEFT_PREFIX = "base_model.model."  # PEFT's files put this before a module's path


def build_native_config(config: Config, task: str) -> dict[str, Any]:
    """The content of adapter_config.json for these settings; `task` is PEFT's task_type."""
    return {"peft_type": NATIVE_TYPE, "task_type": task, "method": config.model_dump(mode="json"),
            "inference_mode": True}
