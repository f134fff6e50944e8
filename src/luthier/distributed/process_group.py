"""Several processes that train one model: plain data parallelism, as much of it as the step needs.

Each rank takes its share of a step's micro-batches; counts and gradients are summed. Started by `torchrun`; alone,
every function here does nothing.
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
BUCKET = 2 ** 23  # gradients that are reduced together: 32 MB in float32


def init_process_group() -> None:
    """Join the group that `torchrun` describes in the environment, if it does."""
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what the device `cuda` then means in this process
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast_object(value: T) -> T:
    """The first rank's value, on all of them."""
    if get_world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def barrier() -> None:
    """Until every rank is here."""
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
    """The value of every rank, in the order of ranks, on all of them."""
    if get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_reduce_named(numbers: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The numbers under each name, summed over ranks in the order of ranks; a rank that had no micro-batch may lack
    names. One collective call, whatever the names."""
    found: dict[str, list[float]] = {}
    for own in all_gather_object({name: list(values) for name, values in numbers.items()}):
        for name, values in own.items():
            found[name] = [x + y for x, y in zip(found[name], values, strict=True)] if name in found else values
    return found


def map_shards(function: Callable[[Sequence[S], int], T], items: Sequence[S]) -> list[T]:
    """`function(shard, start)` of consecutive shards of `items`, one computed by each rank; all results, in the order
    of the items, on all ranks. `start` is the index of the shard's first item; empty shards give no result.

    Raises:
        LuthierError: the first that any rank raised, on all of them, so that none waits for the others.
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
    if told := next((failed for _, failed in gathered if failed), None):
        raise LuthierError(*told)
    return [result for i, (result, _) in enumerate(gathered) if bounds[i + 1] > bounds[i]]  # type: ignore[misc]


def all_reduce_gradients(parameters: Iterable[Tensor], bucket: int = BUCKET) -> None:
    """Add up the gradients of all ranks, in place. A rank that had no micro-batch adds zeros.

    Gradients are copied into flat buffers of about `bucket` numbers, so that there is one collective call for each
    buffer and not for each parameter. Larger gradients are reduced where they are, without a copy.
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
    """What the other ranks hold, in the order of ranks; tensors arrive on `device`."""
    if get_world_size() == 1:
        return []
    gathered: list[list[T]] = [[] for _ in range(get_world_size())]
    dist.all_gather_object(gathered, [_to_device(each, "cpu") for each in mine])
    return [_to_device(each, device) for i, found in enumerate(gathered) if i != get_rank() for each in found]


def _to_device(value: Any, device: torch.device | str) -> Any:
    """The same with every tensor inside on `device`."""
    if isinstance(value, Tensor | DeviceMovable):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to_device(inner, device) for inner in value)
    return {key: _to_device(inner, device) for key, inner in value.items()} if isinstance(value, dict) else value
