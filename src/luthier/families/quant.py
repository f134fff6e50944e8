"""A frozen base in four or eight bits (QLoRA). Read `anatomy.py` first. The only file that imports bitsandbytes.

    nf4    each run of 64 weights of a linear map as one absolute maximum and 64 indices into the 16 quantiles of a
           normal distribution; the maxima are quantised to eight bits in turn: about 4.13 bits a weight
    int8   each row as one absolute maximum and eight-bit numbers

Dettmers et al. 2023 (arXiv:2305.14314), sections 3 (NF4) and 3.1 (double quantisation); Dettmers et al. 2022
(arXiv:2208.07339), section 2.1 (rows). The linear maps inside the blocks are exchanged, nothing else: the embedding,
the head and the norms stay as they are. A product expands the weights anew each time, forward and backward, so any
method that adds to a frozen map works beside it, and none that changes the map's own weights does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.core.errors import BaseError, MissingExtra

Bits = Literal["none", "nf4", "int8"]


def quantize(model: Any, bits: Bits) -> None:
    """Exchange every linear map but the head, one after another, so that the whole is never there twice.

    Raises:
        BaseError: the base is held in float64, which no expansion gives.
        MissingExtra: bitsandbytes is not installed.
    """
    if bits == "none":
        return
    if model.dtype == torch.float64:
        raise BaseError(f"base.quantize {bits!r}: maps in few bits expand to 32 or 16 bits, and base.dtype is float64",
                        "set base.dtype to float32 or bfloat16")
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quant", f"base.quantize {bits!r}")
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, _nf4(child) if bits == "nf4" else _int8(child))
    for parameter in model.parameters():  # what is left moves out of the mapped file, so that the rest of it can go
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb
    weight = linear.weight.detach()
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None,
                             compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4",
                                    module=made)
    # Or some CPUs would lay the weights out anew for evaluation and use bfloat16: not the model that was trained.
    made.support_avx512bf16_for_cpu = False
    return _with_bias(made, linear)


def _int8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=linear.bias is not None,
                               has_fp16_weights=False, threshold=0.0)
    made.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    return _with_bias(made, linear)


def _with_bias(made: Any, linear: nn.Linear) -> nn.Module:
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    moved: nn.Module = made.to(linear.weight.device)  # moving is what quantises, on a CPU too
    # Methods may write into a map's output; a view that a custom function made would not let them.
    moved.register_forward_hook(lambda _module, _args, output: output.clone() if output._is_view() else None)
    return moved.train(linear.training)


def expander(module: Any) -> Callable[[], Tensor] | None:
    """What gives [out, in] the weight that a quantised map multiplies by; None for a map that is as it was.

    The differences from the weight that was quantised are rounding: in four bits some eight per cent of its mean size.
    """
    return {"Params4bit": partial(_from_nf4, module), "Int8Params": partial(_from_int8, module)}.get(
        type(module.weight).__name__)


def _from_nf4(module: Any) -> Tensor:
    import bitsandbytes as bnb
    return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def _from_int8(module: Any) -> Tensor:
    state, weight = module.state, module.weight  # the first forward pass moves both from the weight to the state
    rows, scales = (weight.CB, weight.SCB) if state.CB is None else (state.CB, state.SCB)
    return rows.to(torch.float32) * (scales.to(torch.float32) / 127)[:, None]
