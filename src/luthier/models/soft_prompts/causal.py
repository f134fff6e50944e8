"""Virtual tokens of decoders and encoders: trained vectors before a text. Read `attention/packed.py`,
`soft_prompts/injection.py` and `soft_prompts/layout.py` first.

The model's own code is not changed. A *prompt* is N additional embeddings: one hook inserts them before the backbone
runs, another removes their states from the result. A *prefix* is N additional keys and values of every layer, passed as
a keyword argument through the backbone to the attention function. Every caller of the model, with a packed row, a
padded batch or a cache, gets the states of its own tokens only.

    packed, causal          an adapter's virtual tokens are one additional root, computed once per row
    packed, bidirectional   each root has its own virtual tokens, because they attend to what follows
    padded                  they precede each row's first token, after its padding
    with a cache            the first call inserts them; later calls only shift positions

Documents of one row, or rows of one batch, may use different adapters. Each document then has the virtual tokens of its
own adapter, and its positions are shifted by their number.

Shape letters: B rows, L tokens of a row as the caller knows it, L' with the virtual ones, N virtual tokens, G key-value
heads of width d, D hidden size, T tokens of a packed row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from luthier.core.adapter_gate import AdapterGate
from luthier.core.errors import BaseError, RunError
from luthier.core.protocols import ModelStructure, Router
from luthier.core.soft_prompts import SoftPromptKind
from luthier.core.types import SegmentTree
from luthier.models.adapter_routing import route_segments
from luthier.models.attention.packed import KeyValue, VirtualKeyValues
from luthier.models.hf_attributes import get_optional
from luthier.models.soft_prompts.injection import Injection, InjectionPlan, compute_injected, plan_injections
from luthier.models.soft_prompts.layout import VirtualTokenLayout, layout_packed, layout_padded, repeat_per_token

ROW_ARGUMENTS = ("position_ids", "token_type_ids")  # arguments of a backbone, [B, L] each


def attach_injector(structure: ModelStructure, first: int = 0,
                    router: Callable[[], Router | None] = lambda: None) -> ModelStructure:
    """The structure with an `injector`. Hooks are registered when the first method uses it.

    Args:
        first: the model's first position id.
        router: returns the router of segments, if there is one.
    """
    injector = CausalInjector(structure, first, router)
    _INJECTORS[structure.model] = ref(injector)
    return replace(structure, injector=injector)


def suspend_injection(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a model's calls insert no virtual tokens: their keys and values are in a cache already."""
    injector = _INJECTORS[model]() if model in _INJECTORS else None
    return nullcontext() if injector is None else injector.suspended()


def has_sliding_window(model: Any, context: int) -> bool:
    """Whether some layer has a sliding window shorter than the context."""
    config = model.config.get_text_config()
    kinds = get_optional(config, "layer_types")
    windows = [get_optional(config, name) for name, kind in (
        ("sliding_window", "sliding"), ("attention_chunk_size", "chunked"), ("local_attention", "sliding"))
        if kinds is None or any(kind in str(layer) for layer in kinds)]
    return any(isinstance(window, int) and 0 < window < context for window in windows)


def count_virtual_tokens(model: nn.Module, rows: int) -> list[int]:
    """The number of positions of the context that virtual tokens use now, for each row of a batch."""
    injector = _INJECTORS[model]() if model in _INJECTORS else None
    found = None if injector is None else plan_injections(injector.injections, None, rows)
    return [0] * rows if found is None else [found.count_tokens_at(i) for i in range(rows)]


class InjectedKeyValues:
    """The virtual keys and values of one call, passed to its attention functions and to the end of the backbone.

    It holds its own tensors, so that layers that are recomputed in the backward pass use those of their forward pass.

    Args:
        pairs: keys and values, [G, N, d] each, by the module that they are for: all the different ones.
        whose: for each segment or row, the index of its pair; -1: none; empty: all use the first.
        own: [B, L] the new index of each original token.
    """

    def __init__(self, pairs: dict[nn.Module, list[KeyValue]], assignment: tuple[int, ...] = (),
                 own: Tensor | None = None) -> None:
        self.pairs, self.assignment, self.own = pairs, assignment, own
        self.open = ExitStack()  # contexts that last until the backbone ends

    def __call__(self, module: nn.Module, key: Tensor, value: Tensor) -> VirtualKeyValues | None:
        """The virtual keys and values for a module with keys and values [B, G, L, d]; None if there are none."""
        found = self.pairs.get(module)
        if found is None:
            return None
        # [1, G, N, d] each
        return VirtualKeyValues([(k[None].to(key), v[None].to(value)) for k, v in found], self.assignment)


class RecordingComplete(Exception):
    """Stops a forward pass when all needed keys and values are recorded."""


class KeyValueRecorder:
    """Is passed like `InjectedKeyValues`, and records the keys and values of each attention."""

    def __init__(self, max_modules: int | None = None) -> None:
        self.max_modules = max_modules
        self.recorded: dict[nn.Module, KeyValue] = {}

    def __call__(self, module: nn.Module, key: Tensor, value: Tensor) -> VirtualKeyValues | None:
        self.recorded[module] = (key, value)
        if len(self.recorded) == self.max_modules:
            raise RecordingComplete
        return None


class CausalInjector:
    """See `core.soft_prompts.SoftPromptInjector`. There is one for each loaded model."""

    typical_embeddings: Callable[[int, int], Tensor] | None = None

    def __init__(self, structure: ModelStructure, first: int, router: Callable[[], Router | None]) -> None:
        self._first, self._router = first, router
        self._backbone, self._embedding = structure.backbone, structure.embedding
        self._layers, self._context = len(structure.layers), structure.sizes["context"]
        self._both_ways = structure.task == "FEATURE_EXTRACTION"
        # PEFT stores a prefix in the cache, where a sliding window excludes it; here every token attends to it.
        windowed = has_sliding_window(structure.model, self._context)
        self.peft_kinds: frozenset[SoftPromptKind] = frozenset({"prompt"} if windowed else {"prompt", "prefix"})
        arguments = inspect.signature(type(structure.backbone).forward).parameters
        self._names = list(arguments)[1:]
        self._accepts_kwargs = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
        self._suspended = False
        self.injections: list[Injection] = []

    @property
    def _device(self) -> torch.device:
        return next(self._embedding.parameters()).device

    # ------------------------------------------------------------ called by methods

    def add_prompt(self, make: Callable[[], Tensor], gate: AdapterGate) -> None:
        self._add_injection(Injection("prompt", make, gate, make().shape[0]))  # [N, D]

    def add_prefix(self, make: Callable[[], Sequence[KeyValue]], gate: AdapterGate) -> None:
        self._add_injection(Injection("prefix", make, gate, make()[0][0].shape[1]))  # [G, N, d]

    def _add_injection(self, injection: Injection) -> None:
        if not self._accepts_kwargs:
            raise BaseError(f"{type(self._backbone).__name__} accepts no keyword arguments for its attention, so a "
                            f"prefix is not supported",
                            "use a method that changes its layers, such as lora, or another base")
        if not self.injections:
            self._modules = list(self._record_keys_values([0]).recorded)
            self._backbone.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            self._backbone.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True)
        if injection.kind == "prefix" and len(self._modules) != self._layers:
            raise self._unreachable_error()
        self.injections.append(injection)

    def _unreachable_error(self) -> BaseError:
        return BaseError(f"{type(self._backbone).__name__} does not expose the keys and values of its layers, so a "
                         "prefix is not supported", "use the method prompt, or another base")

    def compute_keys_values(self, start: Sequence[int] | Tensor) -> list[KeyValue]:
        assert not isinstance(start, Tensor), "a base with a vocabulary is initialized from tokens"
        recorded = self._record_keys_values([start]).recorded
        if len(recorded) != self._layers:
            raise self._unreachable_error()
        return [(k[0], v[0]) for k, v in recorded.values()]  # [1, G, N, d] -> [G, N, d] each

    def compute_first_layer_keys(self, ids: Sequence[int], place: int) -> Tensor:
        recorded = self._record_keys_values([[token] for token in ids], place, max_modules=1).recorded
        if not recorded:
            raise self._unreachable_error()
        (key, _), = recorded.values()
        return key.flatten(1)  # [n, G, 1, d] -> [n, G * d] for n token ids

    @torch.no_grad()
    def _record_keys_values(self, rows: Sequence[Any], place: int = 0,
                            max_modules: int | None = None) -> KeyValueRecorder:
        """The base's keys and values of rows that begin at position `place`."""
        device = self._device
        # [B, L]
        tokens = torch.tensor(rows if isinstance(rows[0], Sequence) else [rows], device=device)
        recorder, was_training = KeyValueRecorder(max_modules), self._backbone.training
        start = self._first + place
        # [B, L]
        positions = torch.arange(start, start + tokens.shape[1], device=device).expand(tokens.shape)
        self._backbone.eval()
        try:
            with self.suspended():
                self._backbone(input_ids=tokens, position_ids=positions, virtual=recorder)
        except RecordingComplete:
            pass  # not an error, but the signal that all is recorded
        finally:
            self._backbone.train(was_training)
        return recorder

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A context in which no virtual tokens are inserted."""
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False

    # ------------------------------------------------------------ the two hooks

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._suspended:
            return None
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache, mask, (rows, width) = kwargs.get("past_key_values"), kwargs.get("attention_mask"), _get_shape(kwargs)
        seen = cache.get_seq_length() if cache is not None else 0  # tokens of the earlier calls
        plan = plan_injections(self.injections, kwargs.get("segment_tree"), rows)
        # Virtual tokens in the cache that the caller's mask does not include; their rows may have left the batch since.
        held = max(seen + width - mask.shape[1], 0) if seen and isinstance(mask, Tensor) and mask.ndim == 2 else 0
        if plan is None and not held:
            return None
        plan = plan or InjectionPlan(((),), (0,) * rows)
        before, behind = plan.count_tokens("prompt"), plan.count_tokens("prefix")
        places = max(held, *before)
        uneven = kwargs.get("segment_tree") is None and {*before, places} != {places}
        if uneven and cache is not None and mask is None:
            raise RunError("rows with different virtual tokens have different lengths, so calls with a cache need a "
                           "mask",
                           "pass an attention_mask of [rows, tokens] with every call")
        if not seen:
            self._check_length(kwargs, plan)
        # In the first call the layout shifts positions behind the prompt; later calls shift them here.
        moved = [x + y * bool(seen) for x, y in zip(behind, before, strict=True)]
        if uneven or any(behind) or kwargs.get("position_ids") is not None:
            kwargs = self._shift_positions(kwargs, [moved[combination] for combination in plan.assignment],
                                          max(seen - places, 0))
        layout = None
        if places and seen and mask is not None:
            layout = layout_padded(_find_first_token(mask, mask), mask.shape[1], before, plan.assignment, places)
            kwargs = {**kwargs, "attention_mask": self._extend_mask(mask, layout)}
        elif places and not seen:
            kwargs, layout = self._insert_prompts(kwargs, plan)
        owners = plan.assignment if layout is None or layout.segment_tree is None else layout.assignment
        pairs, assignment = self._compute_pairs(plan, owners)
        carried = InjectedKeyValues(pairs, assignment, None if seen or layout is None else layout.own_index)
        if layout is not None and layout.segment_tree is not None:  # other parts of these adapters see the longer row
            carried.open.enter_context(route_segments(self._router(), layout.segment_tree, packed=True))
        return (), {**kwargs, "virtual": carried}

    def _after_forward(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        carried = kwargs.get("virtual")
        if not isinstance(carried, InjectedKeyValues):
            return None
        carried.open.close()
        if carried.own is None or result is None:  # None: the backbone raised an error
            return None
        if isinstance(result, tuple):
            return _gather_tokens(result[0], carried.own), *result[1:]
        result.last_hidden_state = _gather_tokens(result.last_hidden_state, carried.own)
        if get_optional(result, "hidden_states") is not None:
            result.hidden_states = tuple(_gather_tokens(states, carried.own) for states in result.hidden_states)
        return result

    def _compute_pairs(self, plan: InjectionPlan, assignment: Sequence[int]) -> tuple[dict[nn.Module, list[KeyValue]],
                                                                                      tuple[int, ...]]:
        """The keys and values of every combination that has a prefix, by attention module; and for each segment or row
        the index of its pair, -1 for none."""
        computed = compute_injected(plan, "prefix")
        found: dict[int, list[KeyValue]] = {}
        for i, combination in enumerate(plan.combinations):
            layers = zip(*(computed[injection] for injection in combination if injection.kind == "prefix"), strict=True)
            # [G, sum of all N, d] each
            if joined := [tuple(torch.cat(parts, 1) for parts in zip(*layer, strict=True)) for layer in layers]:
                found[i] = joined  # type: ignore[assignment]
        order = list(found)
        return ({module: [pairs[i] for pairs in found.values()] for i, module in enumerate(self._modules)} if found
                else {}, tuple(order.index(combination) if combination in found else -1 for combination in assignment))

    def _check_length(self, kwargs: dict[str, Any], plan: InjectionPlan) -> None:
        """Raise `BaseError` if a text and its virtual tokens exceed the context."""
        segment_tree, mask, (rows, width) = kwargs.get("segment_tree"), kwargs.get("attention_mask"), _get_shape(kwargs)
        extra = [plan.count_tokens_at(i) for i in range(len(plan.assignment))]
        widths = [width] * rows
        if segment_tree is not None:
            widths = _path_lengths(segment_tree)
        elif width + max(extra) > self._context and isinstance(mask, Tensor) and mask.ndim == 2:
            widths = mask.sum(1).tolist()  # of rows without their padding
        width, n = max(zip(widths, extra, strict=True), key=sum)
        if width + n > self._context:
            raise BaseError(f"a text of {width} tokens and {n} virtual ones do not fit into the base's context of "
                            f"{self._context} tokens", f"set data.max_length to {self._context - n} or less, or use "
                            "fewer virtual tokens (method.num_virtual_tokens)")

    def _shift_positions(self, kwargs: dict[str, Any], by: Sequence[int], seen: int) -> dict[str, Any]:
        """The call with shifted positions of every segment or row; without position ids, they begin at `seen`."""
        rows, width = _get_shape(kwargs)
        positions, segment_tree = kwargs.get("position_ids"), kwargs.get("segment_tree")
        if positions is None:
            start = self._first + seen
            # [B, L]
            positions = torch.arange(start, start + width, device=self._device).expand(rows, -1)
        if len(set(by)) == 1:
            return {**kwargs, "position_ids": positions + by[0]}
        # [B, 1], or [1, T] in a packed row
        further = torch.tensor(by)[:, None] if segment_tree is None else repeat_per_token(by,
                                                                                          segment_tree.lengths)[None]
        return {**kwargs, "position_ids": positions + further.to(self._device, non_blocking=True)}

    def _insert_prompts(self, kwargs: dict[str, Any], plan: InjectionPlan) -> tuple[dict[str, Any], VirtualTokenLayout]:
        """The call with the virtual tokens inserted."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self._embedding(kwargs["input_ids"])  # [B, L, D]
        segment_tree, mask = kwargs.get("segment_tree"), kwargs.get("attention_mask")
        sizes = plan.count_tokens("prompt")
        layout = (layout_padded(_find_first_token(mask, embeds), embeds.shape[1], sizes, plan.assignment)
                  if segment_tree is None else
                  layout_packed(segment_tree, sizes, plan.assignment, self._both_ways, embeds.device))
        computed = compute_injected(plan, "prompt")
        # [all N, D]
        virtual = torch.cat([computed[injection] for combination in plan.combinations for injection in combination
                             if injection in computed])
        table = torch.cat([virtual.to(embeds).expand(len(embeds), -1, -1), embeds], dim=1)  # [B, all N + L, D]
        # [B, L', D]
        kwargs = {**kwargs, "input_ids": None, "inputs_embeds": _gather_tokens(table, layout.source_index)}
        for name in ROW_ARGUMENTS:
            if (column := kwargs.get(name)) is not None:
                kwargs[name] = column.expand(embeds.shape[:2]).gather(1, layout.template)  # [B, L']
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + layout.position_shift
        if segment_tree is not None:
            return {**kwargs, "segment_tree": layout.segment_tree}, layout
        return {**kwargs, "attention_mask": self._extend_mask(mask, layout)}, layout

    def _extend_mask(self, mask: Any, layout: VirtualTokenLayout) -> Tensor | None:
        """The mask of the longer rows, in which a virtual token has the mask of the text's first token."""
        like, live = layout.template, layout.is_token
        if mask is None:
            return None if live is None else live.long()
        if mask.ndim == 2:
            longer: Tensor = mask.gather(1, like)  # [B, L']
            return longer if live is None else longer * live
        if not (isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.bool and self._both_ways):
            raise RunError("virtual tokens cannot be inserted into a mask that was precomputed for every layer",
                           "pass a mask of [rows, tokens], and use cache_implementation='dynamic'")
        # [B, heads or 1, L, L] -> [B, heads or 1, L', L'], first the queries and then the keys.
        mask = mask.gather(2, like[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        longer = mask.gather(3, like[:, None, None, :].expand(*mask.shape[:3], -1))
        return longer if live is None else longer & live[:, None, None]


def _find_first_token(mask: Tensor | None, rows: Tensor) -> Tensor:
    """[B, 1] The index of each row's first token after padding on its left."""
    if mask is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return torch.zeros(rows.shape[0], 1, dtype=torch.int64, device=rows.device)
    return mask.ne(0).int().argmax(1, keepdim=True)  # the first maximum, so the first token that is not masked


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, K, D] at index [B, L]: [B, L, D]."""
    return x.gather(1, index[..., None].expand(*index.shape, x.shape[-1]))


def _get_shape(kwargs: dict[str, Any]) -> torch.Size:
    """The shape [B, L] of a call."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    shape = ids.shape if ids is not None else embeds.shape[:2]  # type: ignore[union-attr]
    assert isinstance(shape, torch.Size)
    return shape


def _path_lengths(segment_tree: SegmentTree) -> list[int]:
    """The number of tokens of each segment's path."""
    depths: list[int] = []
    for size, parent in zip(segment_tree.lengths, segment_tree.parents, strict=True):
        depths.append(size + (depths[parent] if parent >= 0 else 0))
    return depths


_INJECTORS: WeakKeyDictionary[nn.Module, ref[CausalInjector]] = WeakKeyDictionary()
