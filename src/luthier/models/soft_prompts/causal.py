"""Virtual tokens: trained vectors that stand before a text, seen by all of it. Read `models/attention/packed.py`,
`models/soft_prompts/injection.py` and `models/soft_prompts/layout.py` first.

Two doors, the model's own code untouched. A *prompt* enters as N more embeddings: one hook puts them in before the
backbone runs, another takes their states out of its result. A *prefix* enters as N more keys and values of every
layer: they travel with the call, as its forest does, to the place where the attention function is called. Whoever
calls the model, with a packed row, a padded batch or a cache, gets the states of its own tokens and no others.

    packed, causal      an adapter's virtual tokens are one more root, computed once a row, and its documents children
    packed, both ways   each root has its own, since they see what follows them
    padded              they stand before each row's first token, behind its padding
    with a cache        the first call puts them in; later calls only move on

Documents of one row, or rows of one batch, may go through different adapters of a manager: each then stands behind the
virtual tokens of its own, and its positions move on by their number alone.

Shape letters: B rows, L tokens of a row as the caller knows it, N virtual tokens, G key-value heads of width d.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from luthier.core.errors import BaseError, RunError
from luthier.core.protocols import AdapterGate, Anatomy, Router
from luthier.core.soft_prompts import Kind
from luthier.core.types import Forest
from luthier.models.adapter_routing import routed
from luthier.models.attention.packed import Before, Pair
from luthier.models.soft_prompts.injection import Door, Shares, made_by, shares_of
from luthier.models.soft_prompts.layout import Room, packed_room, padded_room, spread

ROW_ARGUMENTS = ("position_ids", "token_type_ids")  # of a backbone, [B, L] each


def installed(anatomy: Anatomy, first: int = 0, router: Callable[[], Router | None] = lambda: None) -> Anatomy:
    """The anatomy with `ports`, of a model that counts positions from `first`. Nothing is hung into the model before a
    method asks for it. `router()`: who sends segments through adapters of their own."""
    ports = VirtualPorts(anatomy, first, router)
    _PORTS[anatomy.model] = ref(ports)
    return replace(anatomy, ports=ports)


def has_window(model: Any, context: int) -> bool:
    """Whether some layer lets a token see only the last ones before it, fewer than the context holds."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    windows = [getattr(config, name, None) for name, kind in (
        ("sliding_window", "sliding"), ("attention_chunk_size", "chunked"), ("local_attention", "sliding"))
        if kinds is None or any(kind in str(layer) for layer in kinds)]
    return any(isinstance(window, int) and 0 < window < context for window in windows)


def lengths(model: nn.Module, rows: int) -> list[int]:
    """How many places of the model's context virtual tokens take now, in each of the rows of a batch."""
    ports = _PORTS[model]() if model in _PORTS else None
    found = None if ports is None else shares_of(ports.doors, None, rows)
    return [0] * rows if found is None else [found.size(i) for i in range(rows)]


class Carried:
    """Travels with one call down to its attention functions, which call it, and to the end of the backbone.

    It holds its own tensors, so that blocks that are recomputed in the backward pass meet those of their forward pass.

    Args:
        pairs: keys and values, [G, N, d] each, by the module that they are for: all the different ones.
        whose: for each segment or row which of them it sees, -1 for none; empty: the first, all of them.
        own: [B, L] where each own token went.
    """

    def __init__(self, pairs: dict[nn.Module, list[Pair]], whose: tuple[int, ...] = (),
                 own: Tensor | None = None) -> None:
        self.pairs, self.whose, self.own = pairs, whose, own
        self.open = ExitStack()  # what lasts until the backbone ends

    def __call__(self, module: nn.Module, key: Tensor, value: Tensor) -> Before | None:
        """What stands before keys and values [B, G, L, d]; None for nothing."""
        found = self.pairs.get(module)
        if found is None:
            return None
        return Before([(k[None].to(key), v[None].to(value)) for k, v in found], self.whose)


class Enough(Exception):
    """The catch is complete: nothing more need be computed."""


class Catch:
    """Travels like `Carried`, and keeps the keys and values that it meets."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.caught: dict[nn.Module, Pair] = {}

    def __call__(self, module: nn.Module, key: Tensor, value: Tensor) -> Before | None:
        self.caught[module] = (key, value)
        if len(self.caught) == self.most:
            raise Enough
        return None


class VirtualPorts:
    """See `core.ports.Ports`. One for each loaded model."""

    usual: Callable[[int, int], Tensor] | None = None

    def __init__(self, anatomy: Anatomy, first: int, router: Callable[[], Router | None]) -> None:
        self._first, self._router = first, router
        self._backbone, self._embedding = anatomy.backbone, anatomy.embedding
        self._layers, self._context = len(anatomy.blocks), anatomy.sizes["context"]
        self._both_ways = anatomy.task == "FEATURE_EXTRACTION"
        # PEFT puts a prefix into the cache, where a layer with a window loses sight of it; here every token sees it.
        windowed = has_window(anatomy.model, self._context)
        self.peft: frozenset[Kind] = frozenset({"prompt"} if windowed else {"prompt", "prefix"})
        arguments = inspect.signature(type(anatomy.backbone).forward).parameters
        self._names = list(arguments)[1:]
        self._carries = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
        self._suspended = False
        self.doors: list[Door] = []

    @property
    def _device(self) -> torch.device:
        return next(self._embedding.parameters()).device

    # ------------------------------------------------------------ what methods call

    def prompt(self, make: Callable[[], Tensor], gate: AdapterGate) -> None:
        self._open(Door("prompt", make, gate, make().shape[0]))

    def prefix(self, make: Callable[[], Sequence[Pair]], gate: AdapterGate) -> None:
        self._open(Door("prefix", make, gate, make()[0][0].shape[1]))

    def _open(self, door: Door) -> None:
        if not self._carries:
            raise BaseError(f"{type(self._backbone).__name__} takes no more arguments than it knows, so nothing can be "
                            "handed through it", "use a method that changes its layers, such as lora, or another base")
        if not self.doors:
            self._modules = list(self._caught([0]).caught)
            self._backbone.register_forward_pre_hook(self._enter, with_kwargs=True)
            self._backbone.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
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
        except Enough:
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
        if self._suspended:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **given}
        cache, mask, (rows, width) = given.get("past_key_values"), given.get("attention_mask"), _shape(given)
        seen = cache.get_seq_length() if cache is not None else 0
        shares = shares_of(self.doors, given.get("forest"), rows)
        # What the cache holds and its caller does not know of; rows that had virtual tokens may have left it since.
        held = max(seen + width - mask.shape[1], 0) if seen and isinstance(mask, Tensor) and mask.ndim == 2 else 0
        if shares is None and not held:
            return None
        shares = shares or Shares(((),), (0,) * rows)
        before, behind = shares.sizes("prompt"), shares.sizes("prefix")
        places = max(held, *before)
        uneven = given.get("forest") is None and {*before, places} != {places}
        if uneven and cache is not None and mask is None:
            raise RunError("rows with different virtual tokens are of different lengths, and no mask says so to the "
                           "calls with their cache", "give an attention_mask of [rows, tokens] with every call")
        if not seen:
            self._refuse_too_long(given, shares)
        moved = [x + y * bool(seen) for x, y in zip(behind, before, strict=True)]
        if uneven or any(behind) or given.get("position_ids") is not None:
            given = self._moved_on(given, [moved[share] for share in shares.whose], max(seen - places, 0))
        room = None
        if places and seen and mask is not None:
            room = padded_room(_first(mask, mask), mask.shape[1], before, shares.whose, places)
            given = {**given, "attention_mask": self._spread(mask, room)}
        elif places and not seen:
            given, room = self._put_in(given, shares)
        pairs, whose = self._pairs(shares, shares.whose if room is None or room.forest is None else room.whose)
        carried = Carried(pairs, whose, None if seen or room is None else room.own)
        if room is not None and room.forest is not None:  # the other parts of these adapters meet the longer row
            carried.open.enter_context(routed(self._router(), room.forest, packed=True))
        return (), {**given, "virtual": carried}

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any], result: Any) -> Any:
        carried = given.get("virtual")
        if not isinstance(carried, Carried):
            return None
        carried.open.close()
        if carried.own is None or result is None:  # None: the backbone has raised
            return None
        if isinstance(result, tuple):
            return _taken(result[0], carried.own), *result[1:]
        result.last_hidden_state = _taken(result.last_hidden_state, carried.own)
        if getattr(result, "hidden_states", None) is not None:
            result.hidden_states = tuple(_taken(states, carried.own) for states in result.hidden_states)
        return result

    def _pairs(self, shares: Shares, whose: Sequence[int]) -> tuple[dict[nn.Module, list[Pair]], tuple[int, ...]]:
        """The keys and values of every share that has a prefix, by the module that they are for; and for each segment
        or row its number among these, -1 for none."""
        made = made_by(shares, "prefix")
        found: dict[int, list[Pair]] = {}
        for i, share in enumerate(shares.doors):
            layers = zip(*(made[door] for door in share if door.kind == "prefix"), strict=True)
            if joined := [tuple(torch.cat(parts, 1) for parts in zip(*layer, strict=True)) for layer in layers]:
                found[i] = joined  # type: ignore[assignment]
        order = list(found)
        return ({module: [pairs[i] for pairs in found.values()] for i, module in enumerate(self._modules)} if found
                else {}, tuple(order.index(share) if share in found else -1 for share in whose))

    def _refuse_too_long(self, given: dict[str, Any], shares: Shares) -> None:
        """Raises `BaseError` where a text and its virtual tokens are more than the context holds."""
        forest, mask, (rows, width) = given.get("forest"), given.get("attention_mask"), _shape(given)
        extra = [shares.size(i) for i in range(len(shares.whose))]
        widths = [width] * rows
        if forest is not None:
            widths = _depths(forest)
        elif width + max(extra) > self._context and isinstance(mask, Tensor) and mask.ndim == 2:
            widths = mask.sum(1).tolist()  # of rows without their padding
        width, n = max(zip(widths, extra, strict=True), key=sum)
        if width + n > self._context:
            raise BaseError(f"a text of {width} tokens and {n} virtual ones do not fit into the base's context of "
                            f"{self._context} tokens", f"set data.max_length to {self._context - n} or less, or use "
                            "fewer virtual tokens (method.num_virtual_tokens)")

    def _moved_on(self, given: dict[str, Any], by: Sequence[int], seen: int) -> dict[str, Any]:
        """The call with the positions of every segment or row moved on; without any, they count from `seen`."""
        rows, width = _shape(given)
        positions, forest = given.get("position_ids"), given.get("forest")
        if positions is None:
            start = self._first + seen
            positions = torch.arange(start, start + width, device=self._device).expand(rows, -1)
        if len(set(by)) == 1:
            return {**given, "position_ids": positions + by[0]}
        further = torch.tensor(by)[:, None] if forest is None else spread(by, forest.lengths)[None]
        return {**given, "position_ids": positions + further.to(self._device, non_blocking=True)}

    def _put_in(self, given: dict[str, Any], shares: Shares) -> tuple[dict[str, Any], Room]:
        """The call with the virtual tokens in their places."""
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self._embedding(given["input_ids"])
        forest, mask, sizes = given.get("forest"), given.get("attention_mask"), shares.sizes("prompt")
        room = (padded_room(_first(mask, embeds), embeds.shape[1], sizes, shares.whose) if forest is None
                else packed_room(forest, sizes, shares.whose, self._both_ways, embeds.device))
        made = made_by(shares, "prompt")
        virtual = torch.cat([made[door] for share in shares.doors for door in share if door in made])
        table = torch.cat([virtual.to(embeds).expand(len(embeds), -1, -1), embeds], dim=1)
        given = {**given, "input_ids": None, "inputs_embeds": _taken(table, room.source)}
        for name in ROW_ARGUMENTS:
            if (column := given.get(name)) is not None:
                given[name] = column.expand(embeds.shape[:2]).gather(1, room.like)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + room.shift
        if forest is not None:
            return {**given, "forest": room.forest}, room
        return {**given, "attention_mask": self._spread(mask, room)}, room

    def _spread(self, mask: Any, room: Room) -> Tensor | None:
        """The mask of the longer rows, in which a virtual token counts as the text's first token does."""
        like, live = room.like, room.live
        if mask is None:
            return None if live is None else live.long()
        if mask.ndim == 2:
            longer: Tensor = mask.gather(1, like)
            return longer if live is None else longer * live
        if not (isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool and self._both_ways):
            raise RunError("virtual tokens cannot be put into a mask that was made for every layer in advance",
                           "give a mask of [rows, tokens], and a cache that grows (cache_implementation='dynamic')")
        mask = mask.gather(2, like[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        longer = mask.gather(3, like[:, None, None, :].expand(*mask.shape[:3], -1))
        return longer if live is None else longer & live[:, None, None]


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


def _depths(forest: Forest) -> list[int]:
    """Tokens of each segment's path."""
    depths: list[int] = []
    for size, parent in zip(forest.lengths, forest.parents, strict=True):
        depths.append(size + (depths[parent] if parent >= 0 else 0))
    return depths


_PORTS: WeakKeyDictionary[nn.Module, ref[VirtualPorts]] = WeakKeyDictionary()
