"""Log-probabilities of given tokens without materializing [positions, vocabulary]. Read `core/types.py` first.

For one position with state h, head W and next token t, with z = W h::

    log p(t) = z_t - log sum_v exp(z_v)          d log p(t) / dh = W_t - sum_v p_v W_v

The derivative of a position depends on that position alone. So with a frozen head the forward pass computes it in
chunks, together with the logits, and saves [P, D]; the backward pass multiplies it by the incoming gradient. That takes
two matrix products; recomputing the logits would take three.

If the head itself trains (or is tied to a training embedding), its gradient needs the incoming one. The logits are then
recomputed in the backward pass under the autocast of the forward pass: both use the same logits, and the backward
products run in the same dtype.

Shape letters: P positions, D hidden size, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2 ** 21  # logits in memory at once: 8 MB in float32, small compared with a row's activations
# a GPU needs large matrix products: 128 MB, 682 positions of a vocabulary of 49,152 instead of 42
CHUNK_LOGITS_GPU = 2 ** 25


class _FusedLogProbs(torch.autograd.Function):
    """(states [P, D], weight [V, D], tokens [P]) -> (log-probabilities [P], hits [P], entropies [P], which have no
    gradient, or [0] if not requested). Logits are divided by the temperature in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, tokens: Tensor, with_entropies: bool,
                temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        kind = states.device.type
        mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        # The backward pass is called outside of autocast, so it is entered again there.
        ctx.temperature, ctx.autocast = temperature, (kind, torch.get_autocast_dtype(kind) if mixed else None)
        wide = torch.promote_types(states.dtype, torch.float32)
        logps = torch.empty(states.shape[0], dtype=wide, device=states.device)  # [P]
        hits = torch.empty(states.shape[0], dtype=torch.bool, device=states.device)  # [P]
        # [P] or [0]
        entropies = torch.empty(states.shape[0] if with_entropies else 0, dtype=wide, device=states.device)
        needs_state, needs_weight = ctx.needs_input_grad[:2]
        state_grads = torch.empty_like(states) if needs_state and not needs_weight else None  # [P, D]
        for rows in _split_positions(states.shape[0], weight.shape[0], states.device):
            target = tokens[rows]  # [C]
            logits = _divide_by_temperature((states[rows] @ weight.T).to(wide), temperature)  # [C, V]
            max_logits = logits.amax(-1, keepdim=True)  # [C, 1]
            chosen = logits.gather(1, target[:, None])  # [C, 1]
            hits[rows] = (chosen >= max_logits)[:, 0]
            mass = logits.sub_(max_logits).exp_()  # [C, V] in place of the logits, at most 1 each
            total = mass.sum(-1, keepdim=True)  # [C, 1]
            logps[rows] = (chosen - max_logits - total.log())[:, 0]  # [C]
            if with_entropies:  # with m = e^(z - max z): log sum m - sum m log m / sum m
                entropies[rows] = (total.log() + torch.special.entr(mass).sum(-1, keepdim=True) / total)[:, 0]
            if state_grads is not None:
                # [C, D] Divided by the total after the product: [C, D] is smaller than [C, V].
                state_grad = weight[target] - ((mass.to(weight.dtype) @ weight).to(wide) / total).to(weight.dtype)
                state_grads[rows] = _divide_by_temperature(state_grad, temperature)
        if state_grads is not None:
            ctx.save_for_backward(state_grads)  # [P, D]
        else:
            ctx.save_for_backward(states, weight, tokens, logps)  # [P, D], [V, D], [P], [P]
        ctx.mark_non_differentiable(hits, entropies)
        return logps, hits, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_unmoved: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if len(ctx.saved_tensors) == 1:
            (state_grads,) = ctx.saved_tensors
            # [P, D]
            return (grad[:, None] * state_grads).to(state_grads.dtype), None, None, None, None
        states, weight, tokens, _ = ctx.saved_tensors  # [P, D], [V, D], [P]
        kind, mixed = ctx.autocast
        with nullcontext() if mixed is None else torch.autocast(kind, mixed):
            found = _recompute_gradients(states, weight, tokens, grad, ctx.temperature, ctx.needs_input_grad[0], mixed)
        return *found, None, None, None


def _recompute_gradients(states: Tensor, weight: Tensor, tokens: Tensor, grad: Tensor, temperature: float,
                         needs_states: bool,
                mixed: torch.dtype | None) -> tuple[Tensor | None, Tensor]:
    """The gradients of states [P, D] (if `needs_states`) and weight [V, D]. The latter is summed over chunks in float32
    or wider, because the sum has one term per position.

    Args:
        mixed: autocast's dtype, None without autocast.
    """
    grad_states = torch.empty_like(states) if needs_states else None  # [P, D]
    # [V, D]
    grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    product_dtype = weight.dtype if mixed is None or weight.dtype == torch.float64 else mixed
    for rows in _split_positions(states.shape[0], weight.shape[0], states.device):
        # [C, V]
        logits = _divide_by_temperature((states[rows] @ weight.T).to(grad.dtype), temperature)
        logit_grads = logits.softmax(-1).mul_(-grad[rows, None])  # [C, V] minus g p_v
        logit_grads.scatter_add_(1, tokens[rows, None], grad[rows, None])  # plus g at v = t
        logit_grads = _divide_by_temperature(logit_grads, temperature).to(product_dtype)  # [C, V]
        if grad_states is not None:
            grad_states[rows] = logit_grads @ weight  # [C, D]
        if product_dtype == grad_weight.dtype == states.dtype:
            grad_weight.addmm_(logit_grads.T, states[rows])  # in place, without a temporary [V, D]
        else:
            grad_weight += logit_grads.T @ states[rows]  # [V, D]
    return grad_states, grad_weight.to(weight.dtype)


def _divide_by_temperature(values: Tensor, temperature: float) -> Tensor:
    return values if temperature == 1 else values.div_(temperature)


def compute_logprobs(head: Any, states: Tensor, tokens: Tensor, softcap: float | None = None, scale: float = 1.0,
              entropies: bool = False, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """log p(tokens | states), whether each was the most probable token, and on request the entropy of each prediction,
    - sum_v p_v log p_v; all [P]. See the formula in the module docstring.

    Args:
        head: maps [P, D] to logits [P, V].
        states: [P, D].
        tokens: [P] token ids.
        softcap: Gemma 2's c in z <- c tanh(z / c).
        scale: factor on the logits (Cohere, Granite).
        temperature: the logits are divided by it, so the probabilities are those of sampling at this temperature.
    """
    plain = type(head) is nn.Linear and head.bias is None and softcap is None and scale == 1.0 and not _has_hooks(head)
    if plain and not (entropies and torch.is_grad_enabled()):
        logps, hits, spread = _FusedLogProbs.apply(states, head.weight, tokens, entropies, temperature)
        return logps, hits, spread if entropies else None
    # With gradients each chunk is recomputed in the backward pass, so [P, V] is never saved.
    parts = [_compute_chunk(head, states[rows], tokens[rows], softcap, scale,
                            temperature)
             if not torch.is_grad_enabled() else
             checkpoint(_compute_chunk, head, states[rows], tokens[rows], softcap, scale, temperature,
                        use_reentrant=False)
             for rows in _split_positions(states.shape[0], head.weight.shape[0], states.device)]
    # [P] each
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])


def _compute_chunk(head: nn.Module, states: Tensor, tokens: Tensor, softcap: float | None,
           scale: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = head(states)  # [C, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if temperature != 1:
        logits = logits / temperature
    every = logits.log_softmax(-1)  # [C, V]
    hits = logits.gather(1, tokens[:, None])[:, 0] >= logits.amax(-1)  # [C]
    # [C] each
    return every.gather(1, tokens[:, None])[:, 0], hits, -(every.exp() * every).sum(-1)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _split_positions(positions: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = max(16, (CHUNK_LOGITS_GPU if device.type == "cuda" else CHUNK_LOGITS) // vocabulary)
    # Without positions one empty chunk, since `torch.cat` needs an argument.
    return [slice(i, min(i + size, positions)) for i in range(0, positions, size)] or [slice(0, 0)]
