"""Quantizes a frozen base to 4 or 8 bits (QLoRA). Read `structure.py` first. The only file that imports bitsandbytes.

    nf4    each block of 64 weights of a linear layer as one absolute maximum and 64 indices into the 16 quantiles of a
           normal distribution; the maxima are quantized to 8 bits as well: about 4.13 bits per weight
    int8   each row as one absolute maximum and 8-bit integers

Dettmers et al. 2023 (arXiv:2305.14314), sections 3 (NF4) and 3.1 (double quantization); Dettmers et al. 2022
(arXiv:2208.07339), section 2.1 (rows). Only the linear layers of the backbone are replaced: the embedding, the head and
the norms are unchanged. Every matrix product dequantizes the weights, forward and backward. So methods that add to a
frozen layer work, and methods that change the layer's own weights do not.

Shapes: W and `weight` are [out, in] of a linear map, x is [..., in].
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.core.errors import BaseError, MissingExtra
from luthier.models.hf_attributes import get_optional

QuantizationType = Literal["none", "nf4", "int8"]
MADV_DONTNEED = 4  # from mman.h
CHUNK_WEIGHTS = 1 << 18  # weights


def quantize(model: Any, bits: QuantizationType, dtype: torch.dtype | None = None,
             device: torch.device | str | None = None) -> None:
    """Quantize every linear layer except the head, and move the rest to its dtype and device. Layers are converted one
    by one, so that at most one of them is in memory unquantized.

    Args:
        dtype: of dequantized weights and of the rest of the model; None: that of the model.
        device: None: that of the model.

    Raises:
        BaseError: the base is in float64, which is not supported; or most of its weights cannot be quantized.
        MissingExtra: bitsandbytes is not installed.
    """
    if bits == "none":
        return
    dtype, device = dtype or model.dtype, device or model.device
    if dtype == torch.float64:
        raise BaseError(f"model.quantize {bits!r}: quantized weights dequantize to 32 or 16 bits, but model.dtype is "
                        "float64",
                        "set model.dtype to float32 or bfloat16")
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quant", f"model.quantize {bits!r}")
    head = model.get_output_embeddings()
    files = _MappedFiles()
    # Of the backbone only: the head of an encoder consists of several linear layers outside of it.
    places = [(parent, name) for parent in model.base_model.modules() for name, child in parent.named_children()
              if type(child) is nn.Linear and child is not head]
    _check_quantizable(model, sum(parent.get_submodule(name).weight.numel() for parent, name in places), bits)
    for parent, name in places:
        linear = parent.get_submodule(name)
        setattr(parent, name, _quantize_linear(linear, bits, dtype, device))
        files.forget(linear.weight)
        del linear
        _trim_heap()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            original, parameter.data = parameter.data, parameter.data.to(device, dtype)
            if parameter.data_ptr() != original.data_ptr():
                files.forget(original)
    model.config.dtype = dtype


def _check_quantizable(model: Any, quantizable: int, bits: QuantizationType) -> None:
    """Raise `BaseError` if at least as many weights cannot be quantized as can: Conv1D (GPT-2) and fused experts."""
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
                  and isinstance(get_optional(m, "weight"), Tensor)}
    unquantized = sum(p.numel() for module in model.base_model.modules() if type(module) is not nn.Linear
                and not isinstance(module, nn.Embedding | nn.Conv2d)
                for p in module.parameters(recurse=False) if p.ndim > 1 and id(p) not in embeddings)
    if unquantized >= quantizable:
        raise BaseError(f"model.quantize {bits!r}: only {quantizable:,} weights of this {type(model).__name__} are "
                        f"nn.Linear and can be quantized; {unquantized:,} are Conv1D or fused experts, "
                        "which are not supported",
                        "omit model.quantize, or choose another base")


def _quantize_linear(linear: nn.Linear, bits: QuantizationType, dtype: torch.dtype,
                     device: torch.device | str) -> nn.Module:
    """The quantized layer."""
    import bitsandbytes as bnb
    # [out, in], [out]
    weight, bias, quantized = linear.weight.detach().to(dtype), linear.bias, None
    shape: dict[str, Any] = {"input_features": linear.in_features, "output_features": linear.out_features,
                             "bias": bias is not None, "device": "meta"}  # avoids random initialization
    if bits == "nf4":
        quantized = bnb.nn.Linear4bit(**shape, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        quantized.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4",
                                        module=quantized)
        # Otherwise some CPUs repack the weights for evaluation and use bfloat16: a different model than in training.
        quantized.support_avx512bf16_for_cpu = False
    else:
        quantized = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=0.0)
        quantized.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        quantized.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    moved: Any = quantized.to(device)  # `to` performs the quantization, on a CPU as well
    moved.forward = partial(_quantized_forward, moved)
    # Methods may modify a layer's output in place, which autograd forbids for a view made by a custom function.
    moved.register_forward_hook(lambda _module, _args, output: output.clone() if output._is_view() else None)
    found: nn.Module = moved.train(linear.training)
    return found


def _trim_heap() -> None:
    """Return free heap memory to the system. Quantizing a layer leaves free blocks several times its size, which the
    next layer of another size cannot use."""
    if sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        ctypes.CDLL(None).malloc_trim(0)


class _MappedFiles:
    """The memory-mapped weight files. Pages that were read count as used memory until they are released."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
        ends = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
        self.ranges = [(int(start, 16), int(end, 16)) for start, end in ends]

    def forget(self, weight: Tensor) -> None:
        """Release the pages of a weight in a mapped file. Reading it again reads the file."""
        first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
        if not any(start <= first and last <= end for start, end in self.ranges):
            return
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        length = last // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_DONTNEED)


# ---------------------------------------------------------------- matrix product


def _quantized_forward(module: Any, x: Tensor) -> Tensor:
    """On a CPU the product below; on other devices bitsandbytes is faster."""
    on_cpu = x.device.type == "cpu"
    found: Tensor = _DequantizedProduct.apply(x, module.bias, module) if on_cpu else type(module).forward(module, x)
    return found


class _DequantizedProduct(torch.autograd.Function):
    """x W^T + c, with the weight dequantized only during the product, forward and backward.

    Neither W nor x is saved: W is frozen, so it has no gradient, and the gradient of x needs only W. (bitsandbytes' own
    int8 product saves x, and rounds it to 8 bits in evaluation: a different model than in training.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: Any) -> Tensor:
        ctx.module = module
        result = _multiply(x, module.out_features, module, transposed=True)  # [..., out]
        return result if bias is None else result.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, bias, _ = ctx.needs_input_grad
        return (_multiply(grad, ctx.module.in_features, ctx.module, transposed=False) if x else None,
                grad.flatten(0, -2).sum(0) if bias else None, None)  # [out]


def _multiply(x: Tensor, width: int, module: Any, transposed: bool) -> Tensor:
    """x W^T or x W as a new tensor, not a view, so that methods may modify it in place."""
    result = x.new_empty((*x.shape[:-1], width))  # [..., out], or [..., in] backward
    weight = _buffer((module.out_features, module.in_features), x.dtype)  # [out, in]
    DEQUANTIZERS[type(module.weight).__name__](module, weight)
    torch.mm(x.reshape(-1, x.shape[-1]), weight.T if transposed else weight, out=result.view(-1, width))
    return result


class _DequantBuffers(threading.local):
    """One buffer for all dequantized weights, as large as the largest so far; one per thread and dtype.

    Allocating each dequantized weight would fragment the heap: freed blocks do not fit the next weight. That took
    0.15 GB at the peak of a step of SmolLM2-135M.
    """

    def __init__(self) -> None:
        self.of: dict[torch.dtype, Tensor] = {}


DEQUANT_BUFFER = _DequantBuffers()


def _buffer(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    size = shape[0] * shape[1]
    if dtype not in DEQUANT_BUFFER.of or DEQUANT_BUFFER.of[dtype].numel() < size:
        DEQUANT_BUFFER.of[dtype] = torch.empty(size, dtype=dtype)
    return DEQUANT_BUFFER.of[dtype][:size].view(shape)  # [out, in]


# ---------------------------------------------------------------- dequantization


def get_dequantizer(module: Any) -> Callable[[], Tensor] | None:
    """A function that returns the dequantized weight [out, in]; None for a layer that is not quantized.

    It differs from the original weight by rounding: in 4 bits about 8 % of the weights' mean magnitude.
    """
    return partial(_dequantize, module) if type(module.weight).__name__ in DEQUANTIZERS else None


def _dequantize(module: Any) -> Tensor:
    weight, name = module.weight, type(module.weight).__name__
    dtype = weight.quant_state.dtype if name == "Params4bit" else torch.float32
    # [out, in]
    found = torch.empty((module.out_features, module.in_features), dtype=dtype, device=weight.device)
    DEQUANTIZERS[name](module, found)
    return found


def _dequantize_nf4(module: Any, out: Tensor) -> None:
    """In chunks of rows, if rows consist of whole blocks: bitsandbytes allocates its result, which so stays small."""
    from bitsandbytes import functional as bnb
    packed, state = module.weight.data.view(-1, 1), module.weight.quant_state  # [out * in / 2, 1] bytes
    maxima = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset  # [blocks] float32
    count, width = out.shape
    rows = max(1, CHUNK_WEIGHTS // width) if width % (2 * state.blocksize) == 0 else count
    for start in range(0, count, rows):
        stop = min(count, start + rows)
        part = bnb.QuantState(maxima[start * width // state.blocksize:-(-stop * width // state.blocksize)],
                              (stop - start, width), state.code, state.blocksize, state.quant_type, state.dtype)
        # [stop - start, in] A byte holds two weights.
        out[start:stop] = bnb.dequantize_4bit(packed[start * width // 2:-(-stop * width // 2)], part)


def _dequantize_int8(module: Any, out: Tensor) -> None:
    state, weight = module.state, module.weight  # bitsandbytes' forward moves both from the weight to the state
    # [out, in] int8, [out] absolute maxima
    rows, scales = (weight.CB, weight.SCB) if state.CB is None else (state.CB, state.SCB)
    # a product of two dtypes would allocate a wider copy
    out.copy_(rows).mul_((scales.to(torch.float32) / 127)[:, None])


DEQUANTIZERS: dict[str, Callable[[Any, Tensor], None]] = {"Params4bit": _dequantize_nf4, "Int8Params": _dequantize_int8}
