"""Moves tensors, and dataclasses of tensors, to a device. Imports torch only."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies CPU tensors to CUDA asynchronously through pinned memory. All other copies are synchronous: an
    asynchronous copy from a GPU would be read before it is complete."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class DeviceMovable:
    """A frozen dataclass whose tensors move to a device together. All other fields stay unchanged."""

    def to(self, device: torch.device | str) -> Self:
        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return to_device(value, device)
            if isinstance(value, DeviceMovable):
                return value.to(device)
            return {key: move(inner) for key, inner in value.items()} if isinstance(value, dict) else value

        moved = {f.name: move(self.__dict__[f.name]) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]
