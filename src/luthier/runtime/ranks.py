"""Several processes that train one model: plain data parallelism, as much of it as the step needs.

Each rank takes its share of a step's micro-batches; counts and gradients are summed. Started by `torchrun`; alone,
every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.core.types import Movable

T = TypeVar("T")


def start() -> None:
    """Join the group that `torchrun` describes in the environment, if it does."""
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what the device `cuda` then means in this process
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(value: T) -> T:
    """The first rank's value, on all of them."""
    if world() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def wait() -> None:
    """Until every rank is here."""
    if world() > 1:
        dist.barrier()


def total(numbers: list[float], device: torch.device) -> list[float]:
    """Each number summed over all ranks."""
    if world() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(x) for x in tensor.tolist()]


def union(names: Iterable[str]) -> list[str]:
    """The names that any rank has, in one order on all of them; a rank that had no micro-batch has none of its own."""
    if world() == 1:
        return list(names)
    gathered: list[list[str]] = [[] for _ in range(world())]
    dist.all_gather_object(gathered, list(names))
    return list(dict.fromkeys(name for found in gathered for name in found))


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all ranks, in place. A rank that had no micro-batch adds zeros."""
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def others(mine: list[T], device: torch.device) -> list[T]:
    """What the other ranks hold, in the order of ranks; tensors arrive on `device`."""
    if world() == 1:
        return []
    gathered: list[list[T]] = [[] for _ in range(world())]
    dist.all_gather_object(gathered, [_moved(each, "cpu") for each in mine])
    return [_moved(each, device) for i, found in enumerate(gathered) if i != rank() for each in found]


def _moved(value: Any, device: torch.device | str) -> Any:
    """The same with every tensor inside on `device`."""
    if isinstance(value, Tensor | Movable):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(inner, device) for inner in value)
    return {key: _moved(inner, device) for key, inner in value.items()} if isinstance(value, dict) else value
