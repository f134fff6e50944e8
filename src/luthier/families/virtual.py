"""Virtual tokens: trained vectors that stand before every text, seen by all of it. Read `forest.py` first.

Two doors, the model's own code untouched. A *prompt* enters as N more embeddings: one hook puts them in before the
backbone runs, another takes their states out of its result. A *prefix* enters as N more keys and values of every
layer: they travel with the call, as its forest does, to the place where the attention function is called. Whoever
calls the model, with a packed row, a padded batch or a cache, gets the states of its own tokens and no others.

    packed, causal      the virtual tokens are one more root, computed once a row, and every former root its child
    packed, both ways   each root has its own, since they see what follows them
    padded              they stand before each row's first token, behind its padding
    with a cache        the first call puts them in; later calls only move on

Shape letters: B rows, L tokens of a row as the caller knows it, N virtual tokens, G key-value heads of width d.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from luthier.core.errors import BaseError, RunError
from luthier.core.ports import Kind
from luthier.core.protocols import Anatomy, Scope
from luthier.core.types import Forest

Pair = tuple[Tensor, Tensor]
ROW_ARGUMENTS = ("position_ids", "token_type_ids")  # of a backbone, [B, L] each


def installed(anatomy: Anatomy, first: int = 0) -> Anatomy:
    """The anatomy with `ports`, of a model that counts positions from `first`. Nothing is hung into the model before a
    method asks for it."""
    ports = VirtualPorts(anatomy, first)
    _PORTS[anatomy.model] = ref(ports)
    return replace(anatomy, ports=ports)


def length(model: nn.Module) -> int:
    """How many places of the model's context its virtual tokens take now."""
    ports = _PORTS[model]() if model in _PORTS else None
    return 0 if ports is None else sum(door.n for door in ports.doors if acts(door.scope))


def acts(scope: Scope) -> bool:
    """Whether a scope lets virtual tokens act. Raises `RunError` where it asks for a part of them."""
    if scope.off or scope.weight == 0:
        return False
    if scope.weight != 1:
        raise RunError(f"virtual tokens cannot be there by a weight of {scope.weight}: they are there or not",
                       "give them weight 1 or 0")
    if scope.part is not None and scope.part[1].numel() != scope.among:
        raise RunError("virtual tokens move every position of a row, so its segments cannot have several adapters",
                       "run the rows of this adapter by themselves (bank.using)")
    return True


@dataclass(frozen=True)
class Door:
    """What one method puts in."""

    kind: Kind
    make: Callable[[], Any]
    scope: Scope
    n: int


class Carried:
    """Travels with one call down to its attention functions, which call it, and to the end of the backbone.

    It holds its own tensors, so that blocks that are recomputed in the backward pass meet those of their forward pass.
    """

    def __init__(self, pairs: dict[nn.Module, Pair], own: Tensor | None = None) -> None:
        self.pairs, self.own = pairs, own

    def __call__(self, module: nn.Module, key: Tensor, value: Tensor) -> Pair | None:
        """The keys and values, [1, G, N, d] each, that stand before these, [B, G, L, d]; None for none."""
        found = self.pairs.get(module)
        return None if found is None else (found[0][None].to(key), found[1][None].to(value))


class _Enough(Exception):
    """The catch is complete: nothing more need be computed."""


class Catch:
    """Travels like `Carried`, and keeps the keys and values that it meets."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.caught: dict[nn.Module, Pair] = {}

    def __call__(self, module: nn.Module, key: Tensor, value: Tensor) -> Pair | None:
        self.caught[module] = (key, value)
        if len(self.caught) == self.most:
            raise _Enough
        return None


class VirtualPorts:
    """See `core.ports.Ports`. One for each loaded model."""

    usual: Callable[[int, int], Tensor] | None = None
    peft: frozenset[Kind] = frozenset({"prompt", "prefix"})

    def __init__(self, anatomy: Anatomy, first: int) -> None:
        self._first = first
        self._backbone, self._embedding = anatomy.backbone, anatomy.embedding
        self._layers, self._context = len(anatomy.blocks), anatomy.sizes["context"]
        self._both_ways = anatomy.task == "FEATURE_EXTRACTION"
        arguments = inspect.signature(type(anatomy.backbone).forward).parameters
        self._names = list(arguments)[1:]
        self._carries = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
        self._suspended = False
        self.doors: list[Door] = []

    @property
    def _device(self) -> torch.device:
        return next(self._embedding.parameters()).device

    # ------------------------------------------------------------ what methods call

    def prompt(self, make: Callable[[], Tensor], scope: Scope) -> None:
        self._open(Door("prompt", make, scope, make().shape[0]))

    def prefix(self, make: Callable[[], Sequence[Pair]], scope: Scope) -> None:
        self._open(Door("prefix", make, scope, make()[0][0].shape[1]))

    def _open(self, door: Door) -> None:
        if not self._carries:
            raise BaseError(f"{type(self._backbone).__name__} takes no more arguments than it knows, so nothing can be "
                            "handed through it", "use a method that changes its layers, such as lora, or another base")
        if not self.doors:
            self._modules = list(self._caught([0]).caught)
            self._backbone.register_forward_pre_hook(self._enter, with_kwargs=True)
            self._backbone.register_forward_hook(self._leave, with_kwargs=True)
        if door.kind == "prefix" and len(self._modules) != self._layers:
            raise self._unreachable()
        self.doors.append(door)

    def _unreachable(self) -> BaseError:
        return BaseError(f"{type(self._backbone).__name__} keeps the keys and values of its layers out of reach, so no "
                         "prefix can stand before them", "use the method prompt, or another base")

    def keys_values(self, start: Sequence[int] | Tensor) -> list[Pair]:
        assert not isinstance(start, Tensor), "there are words"
        caught = self._caught([start]).caught
        if len(caught) != self._layers:
            raise self._unreachable()
        return [(k[0], v[0]) for k, v in caught.values()]

    def first_keys(self, ids: Sequence[int], place: int) -> Tensor:
        caught = self._caught([[token] for token in ids], place, most=1).caught
        if not caught:
            raise self._unreachable()
        (key, _), = caught.values()
        return key.flatten(1)

    @torch.no_grad()
    def _caught(self, rows: Sequence[Any], place: int = 0, most: int | None = None) -> Catch:
        """The bare base's keys and values of rows that begin at `place`."""
        device = self._device
        tokens = torch.tensor(rows if isinstance(rows[0], Sequence) else [rows], device=device)
        catch, was = Catch(most), self._backbone.training
        start = self._first + place
        positions = torch.arange(start, start + tokens.shape[1], device=device).expand(tokens.shape)
        self._backbone.eval()
        try:
            with self._alone():
                self._backbone(input_ids=tokens, position_ids=positions, virtual=catch)
        except _Enough:
            pass  # a signal, no error
        finally:
            self._backbone.train(was)
        return catch

    @contextmanager
    def _alone(self) -> Any:
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    # ------------------------------------------------------------ the two hooks

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        doors = [] if self._suspended else [door for door in self.doors if acts(door.scope)]
        if not doors:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **given}
        cache = given.get("past_key_values")
        seen = cache.get_seq_length() if cache is not None else 0
        behind, before = (sum(d.n for d in doors if d.kind == kind) for kind in ("prefix", "prompt"))
        if not seen:
            self._refuse_too_long(given, behind + before)
        if behind:
            given = self._moved_on(given, behind, max(seen - before, 0))
        own = None
        if before and seen:
            given = self._gone_on(given, before)
        elif before:
            given, own = self._put_in(given, torch.cat([d.make() for d in doors if d.kind == "prompt"]))
        return (), {**given, "virtual": Carried(self._pairs(doors), own)}

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any], result: Any) -> Any:
        carried = given.get("virtual")
        if not isinstance(carried, Carried) or carried.own is None:
            return None
        if isinstance(result, tuple):
            return _taken(result[0], carried.own), *result[1:]
        result.last_hidden_state = _taken(result.last_hidden_state, carried.own)
        if getattr(result, "hidden_states", None) is not None:
            result.hidden_states = tuple(_taken(states, carried.own) for states in result.hidden_states)
        return result

    def _pairs(self, doors: Sequence[Door]) -> dict[nn.Module, Pair]:
        """The keys and values of all open prefixes, by the module that they are for."""
        made = [door.make() for door in doors if door.kind == "prefix"]
        if not made:
            return {}
        joined = [tuple(torch.cat(parts, 1) for parts in zip(*layer, strict=True)) for layer in zip(*made, strict=True)]
        return {module: (key, value) for module, (key, value) in zip(self._modules, joined, strict=True)}

    def _refuse_too_long(self, given: dict[str, Any], n: int) -> None:
        """Raises `BaseError` where a row and its virtual tokens are more than the context holds."""
        forest, mask, width = given.get("forest"), given.get("attention_mask"), _shape(given)[1]
        if forest is not None:
            width = _longest(forest)
        elif width + n > self._context and isinstance(mask, Tensor) and mask.ndim == 2:
            width = int(mask.sum(1).max())  # of a row without its padding
        if width + n > self._context:
            raise BaseError(f"a text of {width} tokens and {n} virtual ones do not fit into the base's context of "
                            f"{self._context} tokens", f"set data.max_length to {self._context - n} or less, or use "
                            "fewer virtual tokens (method.tokens)")

    # ------------------------------------------------------------ a prefix

    def _moved_on(self, given: dict[str, Any], n: int, seen: int) -> dict[str, Any]:
        """The call with every position moved on by the prefix; without any, they count from what the cache holds."""
        rows, width = _shape(given)
        positions = given.get("position_ids")
        if positions is None:
            start = self._first + seen
            positions = torch.arange(start, start + width, device=self._device).expand(rows, -1)
        return {**given, "position_ids": positions + n}

    # ------------------------------------------------------------ a prompt

    def _put_in(self, given: dict[str, Any], virtual: Tensor) -> tuple[dict[str, Any], Tensor]:
        """The call with the virtual tokens in their places, and where each own token went, [B, L]."""
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self._embedding(given["input_ids"])
        forest, mask = given.get("forest"), given.get("attention_mask")
        room = (_padded_room(_first(mask, embeds), embeds.shape[1], len(virtual)) if forest is None
                else _packed_room(forest, len(virtual), self._both_ways, embeds.device))
        table = torch.cat([virtual.to(embeds).expand(len(embeds), -1, -1), embeds], dim=1)
        given = {**given, "input_ids": None, "inputs_embeds": _taken(table, room.source)}
        for name in ROW_ARGUMENTS:
            if (column := given.get(name)) is not None:
                given[name] = column.expand(embeds.shape[:2]).gather(1, room.like)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + room.source.clamp(max=len(virtual))
        if forest is not None:
            return {**given, "forest": room.forest}, room.own
        return {**given, "attention_mask": self._spread(mask, room.like)}, room.own

    def _spread(self, mask: Any, like: Tensor) -> Tensor | None:
        """The mask of the longer rows, in which a virtual token counts as the text's first token does."""
        if mask is None or mask.ndim == 2:
            return None if mask is None else mask.gather(1, like)
        if not (isinstance(mask, Tensor) and mask.ndim == 4 and self._both_ways):
            raise RunError("virtual tokens cannot be put into a mask that was made for every layer in advance",
                           "give a mask of [rows, tokens], and a cache that grows (cache_implementation='dynamic')")
        mask = mask.gather(2, like[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return mask.gather(3, like[:, None, None, :].expand(*mask.shape[:3], -1))

    def _gone_on(self, given: dict[str, Any], n: int) -> dict[str, Any]:
        """A later call with a cache: it holds the virtual tokens already, and the caller's mask does not know them."""
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            assert isinstance(mask, Tensor)
            room = _padded_room(_first(mask, mask), mask.shape[1], n)
            given = {**given, "attention_mask": self._spread(mask, room.like)}
        return given if positions is None else {**given, "position_ids": positions + n}


@dataclass(frozen=True)
class Room:
    """Rows of L tokens with N virtual ones among them, L' in all.

    Args:
        source: [B, L'] what stands where: an index into the virtual tokens (below N) and the own ones behind them.
        like: [B, L'] the own token whose mask and type it has: itself, or the first of its text.
        own: [B, L] where each own token went.
        forest: of the longer row.
    """

    source: Tensor
    like: Tensor
    own: Tensor
    forest: Forest | None = None


def _padded_room(first: Tensor, width: int, n: int) -> Room:
    """Virtual tokens before the first token of each row, which stands at `first` [B, 1]."""
    at, own = (torch.arange(size, device=first.device) for size in (width + n, width))
    virtual = (at >= first) & (at < first + n)
    own_index = torch.where(at < first, at, at - n)
    return Room(torch.where(virtual, at - first, own_index + n), torch.where(virtual, first, own_index),
                torch.where(own < first, own, own + n))


def _packed_room(forest: Forest, n: int, both_ways: bool, device: torch.device) -> Room:
    """One root before all others, or, where texts are seen both ways, N places at the head of every root."""
    total, new = sum(forest.lengths), torch.arange(n)
    if not both_ways:
        longer = Forest((n, *forest.lengths), (-1, *(parent + 1 for parent in forest.parents)))
        source, own = torch.arange(total + n), torch.arange(n, total + n)
        like = (source - n).clamp(min=0)
        return Room(source[None].to(device), like[None].to(device), own[None].to(device), longer)
    added = [n if parent < 0 else 0 for parent in forest.parents]
    longer = replace(forest, lengths=tuple(x + y for x, y in zip(forest.lengths, added, strict=True)))
    spans = [torch.arange(start, start + size) for start, size in zip(forest.starts, forest.lengths, strict=True)]
    source = torch.cat([torch.cat([new[:more], span + n]) for more, span in zip(added, spans, strict=True)])
    like = torch.cat([torch.cat([span[:1].expand(more), span]) for more, span in zip(added, spans, strict=True)])
    own = torch.cat([span + shift for span, shift in zip(spans, accumulate(added), strict=True)])
    return Room(source[None].to(device), like[None].to(device), own[None].to(device), longer)


def _first(mask: Tensor | None, rows: Tensor) -> Tensor:
    """[B, 1] where each row's first token stands, behind padding on its left."""
    if mask is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return torch.zeros(rows.shape[0], 1, dtype=torch.int64, device=rows.device)
    return mask.ne(0).int().argmax(1, keepdim=True)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """x [B, K, D] at index [B, L]: [B, L, D]."""
    return x.gather(1, index[..., None].expand(*index.shape, x.shape[-1]))


def _shape(given: dict[str, Any]) -> torch.Size:
    """[B, L] of a call."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    shape = ids.shape if ids is not None else embeds.shape[:2]  # type: ignore[union-attr]
    assert isinstance(shape, torch.Size)
    return shape


def _longest(forest: Forest) -> int:
    """Tokens of the longest path."""
    depths: list[int] = []
    for size, parent in zip(forest.lengths, forest.parents, strict=True):
        depths.append(size + (depths[parent] if parent >= 0 else 0))
    return max(depths)


_PORTS: WeakKeyDictionary[nn.Module, ref[VirtualPorts]] = WeakKeyDictionary()
