"""Attention over a packed row that is a segment tree. Read `core/types.py` first.

A segment attends causally to itself and to all tokens of its ancestors. If the model's attention is not causal
(encoders), a segment attends to all of itself as well. The function is registered in Transformers' attention and mask
registries; a model passes `segment_tree=` with its other keyword arguments to this function. Calls without a segment
tree (generation, padded batches) use fused attention with the ordinary mask.

There are three implementations, two fast ones and a slow reference for the tests:
    per segment  fused attention for each segment (CPU, MPS: no wasted work, no mask for roots)
    one kernel   variable-length attention for plain packing, flex attention for trees (CUDA)
    padded       one row per segment with a mask, in `hf_model.py`

Shapes: query [1, H, T, d], key and value [1, G, T, d] with H heads, G key-value heads of width d; result [1, T, H, d].
B rows of a padded batch, L its tokens, N virtual keys, S segments, Q queries and K keys of one product.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from luthier.core.errors import BaseError
from luthier.core.types import SegmentTree, to_device

NAME = "luthier"
CHAIN_LENGTH = 96  # tokens; see `_split_long_segments`
# further arguments that some models pass to attention
UNSUPPORTED_ARGUMENTS = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
MIN_FLEX_HEAD_DIM = 16  # heads that flex attention knows
KeyValue = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True)
class VirtualKeyValues:
    """Virtual keys and values before those of a call, for each segment or row.

    Args:
        pairs: the distinct ones, [1, G, N, d] each; N may differ.
        assignment: for each segment of a packed row, or row of a batch, the index of its pair; -1: none. Empty: all
            use the first.
    """

    pairs: Sequence[KeyValue]
    assignment: tuple[int, ...] = ()

    def get(self, segment: int) -> KeyValue | None:
        found = self.assignment[segment] if self.assignment else 0
        return None if found < 0 else self.pairs[found]


# Returns the virtual keys and values of a call; implemented in `soft_prompts/causal.py`.
VirtualKeyValueSource = Callable[[nn.Module, Tensor, Tensor], VirtualKeyValues | None]


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, segment_tree: SegmentTree | None = None,
              sliding_window: int | None = None, softcap: float | None = None,
              virtual: VirtualKeyValueSource | None = None,
              is_causal: bool | None = None, attention_cache: Any = None, **rest: Any) -> tuple[Tensor, None]:
    """The attention function that Transformers' attention modules call. Raises `BaseError` for an additional term of
    the scores, which would otherwise be ignored. `attention_cache`: an `AttentionCache` (`cached.py`)."""
    if unknown := [name for name in UNSUPPORTED_ARGUMENTS if rest.get(name) is not None]:
        raise BaseError(f"the attention of {type(module).__name__} has an additional term ({unknown[0]}), which is not "
                        "supported", "choose a base without it")
    query, key, value = _cast_to_autocast(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    before = None if virtual is None else virtual(module, key, value)
    if segment_tree is None:
        causal = causal and attention_mask is None and query.shape[2] > 1
        if before is not None:
            key, value, attention_mask = _prepend_rows(before, key, value, attention_mask,
                                                      query.shape[2] if causal else 0)
            causal = False
        out = attend(query, key, value, attention_mask, causal, scale, dropout, softcap)  # [B, H, L, d]
    elif attention_cache is not None:
        out = attention_cache.attend(query, key, value, segment_tree, before, scale, sliding_window, softcap)
    elif sliding_window is not None and not causal:
        raise NotImplementedError("a bidirectional sliding window is not supported in packed rows")
    elif query.is_cuda and softcap is None and dropout == 0 and before is None and query.shape[-1] >= MIN_FLEX_HEAD_DIM:
        out = _attend_one_kernel(query, key, value, segment_tree, scale, sliding_window, causal)
    else:
        out = _attend_per_segment(query, key, value, segment_tree, scale, dropout, sliding_window, softcap, causal,
                                  before)
    return out.transpose(1, 2).contiguous(), None  # [1 or B, T or L, H, d]


def _cast_to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype, if autocast is on. Rotary embeddings in float32 make queries and keys float32, but not
    values. Fused attention casts by itself; flex and variable-length attention would fail, or compute in float32."""
    kind = tensors[0].device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not mixed or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def prepend(before: KeyValue, key: Tensor, value: Tensor, mask: Tensor | None,
            last: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys [B, G, N + L, d], values and mask of a batch with virtual keys before every row. Without a mask, the `last`
    tokens attend causally; 0: all tokens attend to all."""
    n = before[0].shape[2]
    key, value = (torch.cat([b.expand(len(x), -1, -1, -1), x], 2) for b, x in zip(before, (key, value), strict=True))
    if mask is None:
        return key, value, causal_mask(last, key.shape[2], None, key.device) if last else None
    return key, value, F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)


def _prepend_rows(before: VirtualKeyValues, key: Tensor, value: Tensor, mask: Tensor | None,
                 last: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """`prepend` for rows with different virtual keys: shorter ones are padded, and the padding is masked."""
    if len(set(before.assignment)) < 2 and (one := before.get(0)) is not None:
        return prepend(one, key, value, mask, last)
    sizes = tuple(k.shape[2] for k, _ in before.pairs)
    most, device = max(sizes), key.device
    index, seen = _index_pairs(before.assignment, sizes, device)  # [B], [B, N]
    joined = []
    for each in zip(*before.pairs, strict=True):  # all keys, all values
        padded = [F.pad(x, (0, 0, 0, most - x.shape[2])) for x in each]  # [1, G, N, d] each, N the most
        # [B, G, N, d] The entry of zeros behind the last pair is for rows without virtual keys.
        joined.append(torch.cat([*padded, torch.zeros_like(padded[0])]).index_select(0, index))
    own = key.shape[2]
    key, value, mask = prepend((joined[0], joined[1]), key, value, mask, last)
    seen = F.pad(seen, (0, own), value=True)[:, None, None]  # [B, 1, 1, N + L]
    if mask is None or mask.dtype == torch.bool:
        return key, value, seen if mask is None else mask & seen
    return key, value, mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


@lru_cache(maxsize=4)  # all layers of a step use the same arguments
def _index_pairs(assignment: tuple[int, ...], sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[B] the index of each row's pair (one past the last: none), and [B, N] the mask of its virtual keys."""
    index = torch.tensor([found if found >= 0 else len(sizes) for found in assignment])  # [B]
    seen = torch.arange(max(sizes)) < torch.tensor((*sizes, 0))[index][:, None]  # [B, N]
    return index.to(device), seen.to(device)


def _attend_per_segment(query: Tensor, key: Tensor, value: Tensor, segment_tree: SegmentTree, scale: float,
                        dropout: float,
                 window: int | None, softcap: float | None, causal: bool,
                 before: VirtualKeyValues | None = None) -> Tensor:
    if causal and before is None:  # virtual keys are assigned by segment index
        segment_tree = _split_long_segments(segment_tree)
    # `split`, not slices: its backward is one concatenation; that of each slice would allocate a full row of zeros.
    # [1, H or G, L_i, d] for each segment of L_i tokens.
    queries, keys, values = (x.split(segment_tree.lengths, dim=2) for x in (query, key, value))
    outs = []
    for i, q in enumerate(queries):
        path = segment_tree.find_path(i)
        k, v = (keys[i], values[i]) if len(path) == 1 else (torch.cat([keys[a] for a in path], 2),
                                                           torch.cat([values[a] for a in path], 2))  # [1, G, path, d]
        mask = causal_mask(q.shape[2], k.shape[2], window, q.device) if causal else None
        own = None if before is None else before.get(i)
        if own is not None:
            k, v, mask = prepend(own, k, v, mask, q.shape[2] if causal else 0)
        outs.append(attend(q, k, v, mask, causal and mask is None, scale, dropout, softcap))  # [1, H, L_i, d]
    # The fused kernel writes [L, H, d] and returns it as a view [H, L, d]; concatenating along L avoids a second copy.
    return outs[0] if len(outs) == 1 else torch.cat([out.transpose(1, 2) for out in outs], dim=1).transpose(1, 2)


@lru_cache(maxsize=64)  # all layers of a row use the same tree
def _split_long_segments(segment_tree: SegmentTree) -> SegmentTree:
    """The segment tree with long segments split into chains of shorter ones, which attend to the same tokens. The fused
    kernel computes the whole square of a causal segment and discards half of it; a chain avoids most of that work."""
    lengths: list[int] = []
    parents: list[int] = []
    ends: list[int] = []  # of each segment, the index of its chain's last link
    for length, parent in zip(segment_tree.lengths, segment_tree.parents, strict=True):
        links = max(1, round(length / CHAIN_LENGTH))
        for link in range(links):
            parents.append(len(lengths) - 1 if link else ends[parent] if parent >= 0 else -1)
            lengths.append(length * (link + 1) // links - length * link // links)
        ends.append(len(lengths) - 1)
    return SegmentTree(tuple(lengths), tuple(parents))


@lru_cache(maxsize=256)
def causal_mask(q: int, k: int, window: int | None, device: torch.device) -> Tensor | None:
    """[q, k] The causal mask of the last q of k tokens, with a sliding window; None if the causal flag is enough."""
    if q == k and (window is None or k <= window):
        return None
    with torch.inference_mode(False):  # generation may create the cached mask that a backward pass saves later
        # [q, k] how far a key lies before its query; negative: after it
        behind = torch.arange(k - q, k, device=device)[:, None] - torch.arange(k, device=device)[None, :]
        seen = behind >= 0  # [q, k]
        return seen if window is None else seen & (behind < window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float,
            softcap: float | None) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal,
                                              scale=scale, enable_gqa=grouped)
    if grouped:  # no fused kernel supports Gemma 2's soft cap
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # [1 or B, H, K, d]
    scores = torch.tanh(q @ k.transpose(2, 3) * (scale / softcap)) * softcap  # [1 or B, H, Q, K]
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()  # [Q, K]
    if mask is not None:
        # Not minus infinity: a padding token outside of every window attends to nothing and would become NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    # In float32: in 16 bits the weights of many keys would not sum to 1.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights, dropout) @ v  # [1 or B, H, Q, d]


def _attend_one_kernel(query: Tensor, key: Tensor, value: Tensor, segment_tree: SegmentTree, scale: float,
                       window: int | None,
                causal: bool) -> Tensor:
    varlen_attn = _get_varlen_attention()
    if (varlen_attn is not None and segment_tree.is_flat and query.dtype in (torch.bfloat16, torch.float16)
            and _has_flash(query.device)):
        bounds = _cumulative_lengths(segment_tree.lengths, query.device)  # [S + 1]
        longest = max(segment_tree.lengths)
        repeat = query.shape[1] // key.shape[1]
        # [1, H, T, d]
        k, v = (x if repeat == 1 else x.repeat_interleave(repeat, dim=1) for x in (key, value))
        q, k, v = (x[0].transpose(0, 1) for x in (query, k, v))  # [T, H, d]
        # (window - 1, 0): that many keys to the left of the token and none to its right; (-1, 0) is causal, (-1, -1) is
        # full attention.
        left, right = -1 if window is None else window - 1, 0 if causal else -1
        out: Tensor = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(left, right))
        return out.transpose(0, 1)[None]  # [1, H, T, d]
    from torch.nn.attention.flex_attention import flex_attention
    compiled = _compile_flex(flex_attention)
    mask = _block_mask(segment_tree, window, causal, query.device)
    return compiled(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


@lru_cache(maxsize=1)
def _compile_flex(flex: Any) -> Any:
    return torch.compile(flex, dynamic=True)


def _get_varlen_attention() -> Callable[..., Any] | None:
    """torch's variable-length attention if it supports a scale and a window (torch 2.11 or later). Otherwise None: the
    slower flex attention is used."""
    from torch.nn.attention import varlen
    return varlen.varlen_attn if _takes_window(varlen.varlen_attn) else None


@lru_cache(maxsize=2)
def _takes_window(function: Callable[..., Any]) -> bool:
    known = inspect.signature(function).parameters
    return {"scale", "window_size"} <= known.keys() or any(p.kind is p.VAR_KEYWORD for p in known.values())


@lru_cache(maxsize=8)
def _has_flash(device: torch.device) -> bool:
    """Variable-length attention uses Flash Attention, which needs compute capability 8.0 (Ampere) or higher."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=4)  # all layers of a step use the same arguments
def _cumulative_lengths(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    # [S + 1] The kernel takes int32 only.
    edges = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return to_device(edges, device)


@lru_cache(maxsize=4)
def _block_mask(segment_tree: SegmentTree, window: int | None, causal: bool, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask
    segment, place, related = (to_device(x, device) for x in describe_segments(segment_tree))

    def sees(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        kept = related[segment[q], segment[k]]
        if causal:
            kept = kept & (place[k] <= place[q])
        return kept if window is None else kept & (place[q] - place[k] < window)

    total = segment.shape[0]
    return create_block_mask(sees, None, None, total, total, device=device)


def describe_segments(segment_tree: SegmentTree) -> tuple[Tensor, Tensor, Tensor]:
    """A segment tree as tensors: [T] each token's segment, [T] its position in its document, [S, S] whether segment i
    attends to segment j."""
    count = len(segment_tree.lengths)
    related = torch.zeros(count, count, dtype=torch.bool)  # [S, S]
    offsets = [0] * count  # of each segment: the tokens of its ancestors
    for i in range(count):
        path = segment_tree.find_path(i)
        related[i, list(path)] = True
        offsets[i] = sum(segment_tree.lengths[a] for a in path[:-1])
    segment = torch.repeat_interleave(torch.arange(count), torch.tensor(segment_tree.lengths))  # [T]
    # [T]
    place = torch.cat([torch.arange(offset, offset + n) for offset,
                       n in zip(offsets, segment_tree.lengths, strict=True)])
    return segment, place, related


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
