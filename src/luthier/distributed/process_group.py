"""Data parallelism with torch.distributed: the collective calls that training needs. Reads nothing else first.

Each rank computes its share of a step's micro-batches; counts and gradients are summed. `torchrun` starts the
processes. In a single process every function here returns its input or does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from luthier.core.errors import LuthierError
from luthier.core.types import DeviceMovable

T = TypeVar("T")
S = TypeVar("S")
BUCKET = 2 ** 23  # gradient elements that are reduced in one call: 32 MB in float32


def init_process_group() -> None:
    """Join the process group that `torchrun` describes in the environment, if there is one."""
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # the device `cuda` of this process
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast_object(value: T) -> T:
    """The value of rank 0, on all ranks."""
    if get_world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def barrier() -> None:
    """Wait until every rank has called this."""
    if get_world_size() > 1:
        dist.barrier()


def all_reduce_sum(numbers: list[float], device: torch.device) -> list[float]:
    """Each number summed over all ranks."""
    if get_world_size() == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(x) for x in tensor.tolist()]


def all_gather_object(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks, on all ranks."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_reduce_named(numbers: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The numbers under each name, summed in the order of ranks. One collective call for all names.

    A rank without a micro-batch may lack names.
    """
    found: dict[str, list[float]] = {}
    for own in all_gather_object({name: list(values) for name, values in numbers.items()}):
        for name, values in own.items():
            found[name] = [x + y for x, y in zip(found[name], values, strict=True)] if name in found else values
    return found


def map_shards(function: Callable[[Sequence[S], int], T], items: Sequence[S]) -> list[T]:
    """`function(shard, start)` of consecutive shards of `items`, one shard per rank.

    `start` is the index of the shard's first item. All ranks get all results, in the order of the items; empty shards
    give none.

    Raises:
        LuthierError: the first error of any rank, on all ranks, so that none waits for the others.
    """
    bounds = [len(items) * i // get_world_size() for i in range(get_world_size() + 1)]
    start, stop = bounds[get_rank()], bounds[get_rank() + 1]
    error, found = None, None
    try:
        found = function(items[start:stop], start) if stop > start else None
    except LuthierError as raised:
        if get_world_size() == 1:
            raise
        error = raised
    gathered = all_gather_object((found, error and (error.what, error.remedy)))
    if error is not None:
        raise error
    if failure := next((failed for _, failed in gathered if failed), None):
        raise LuthierError(*failure)
    return [result for i, (result, _) in enumerate(gathered) if bounds[i + 1] > bounds[i]]  # type: ignore[misc]


def all_reduce_gradients(parameters: Iterable[Tensor], bucket: int = BUCKET) -> None:
    """Sum the gradients of all ranks, in place. A rank without a micro-batch adds zeros.

    Gradients are copied into flat buffers of about `bucket` elements, for one collective call per buffer instead of one
    per parameter. Larger gradients are reduced in place, without a copy.
    """
    if get_world_size() == 1:
        return
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        groups.setdefault((parameter.grad.dtype, parameter.grad.device), []).append(parameter.grad)
    for gradients in groups.values():
        held: list[Tensor] = []
        for gradient in gradients:
            if gradient.numel() >= bucket and gradient.is_contiguous():
                dist.all_reduce(gradient)
                continue
            if held and sum(each.numel() for each in held) + gradient.numel() > bucket:
                _all_reduce(held)
                held = []
            held.append(gradient)
        _all_reduce(held)


def _all_reduce(gradients: Sequence[Tensor]) -> None:
    """Sum over ranks in place, in one collective call."""
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def all_gather_others(mine: list[T], device: torch.device) -> list[T]:
    """The values of the other ranks, in the order of ranks, their tensors on `device`."""
    if get_world_size() == 1:
        return []
    gathered: list[list[T]] = [[] for _ in range(get_world_size())]
    dist.all_gather_object(gathered, [_to_device(each, "cpu") for each in mine])
    return [_to_device(each, device) for i, found in enumerate(gathered) if i != get_rank() for each in found]


def _to_device(value: Any, device: torch.device | str) -> Any:
    """The same value with every tensor inside it on `device`."""
    if isinstance(value, Tensor | DeviceMovable):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to_device(inner, device) for inner in value)
    return {key: _to_device(inner, device) for key, inner in value.items()} if isinstance(value, dict) else value
