"""A frozen base in four or eight bits (QLoRA). Read `structure.py` first. The only file that imports bitsandbytes.

    nf4    each run of 64 weights of a linear map as one absolute maximum and 64 indices into the 16 quantiles of a
           normal distribution; the maxima are quantised to eight bits in turn: about 4.13 bits a weight
    int8   each row as one absolute maximum and eight-bit numbers

Dettmers et al. 2023 (arXiv:2305.14314), sections 3 (NF4) and 3.1 (double quantisation); Dettmers et al. 2022
(arXiv:2208.07339), section 2.1 (rows). The linear maps inside the blocks are exchanged, nothing else: the embedding,
the head and the norms stay as they are. A product expands the weights anew each time, forward and backward, so any
method that adds to a frozen map works beside it, and none that changes the map's own weights does.
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

QuantizationType = Literal["none", "nf4", "int8"]
MADV_DONTNEED = 4  # from mman.h
CHUNK_WEIGHTS = 1 << 18  # weights


def quantize(model: Any, bits: QuantizationType, dtype: torch.dtype | None = None,
             device: torch.device | str | None = None) -> None:
    """Exchange every linear map but the head, and bring the rest to its type and device: one after another, so that
    beside the few bits no more than one map is there whole.

    Args:
        dtype: what the maps expand to, and what the rest is held in; left out: as the model is held.
        device: where the model is to be; left out: where it is.

    Raises:
        BaseError: the base is to be held in float64, which no expansion gives; or most of it would stay whole.
        MissingExtra: bitsandbytes is not installed.
    """
    if bits == "none":
        return
    dtype, device = dtype or model.dtype, device or model.device
    if dtype == torch.float64:
        raise BaseError(f"model.quantize {bits!r}: maps in few bits expand to 32 or 16 bits, "
                        "and model.dtype is float64",
                        "set model.dtype to float32 or bfloat16")
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "quant", f"model.quantize {bits!r}")
    head = model.get_output_embeddings()
    files = _MappedFiles()
    # Of the stack alone: the head of an encoder is several maps, and stands beside it.
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
            whole, parameter.data = parameter.data, parameter.data.to(device, dtype)
            if parameter.data_ptr() != whole.data_ptr():
                files.forget(whole)
    model.config.dtype = dtype


def _check_quantizable(model: Any, few: int, bits: QuantizationType) -> None:
    """Raises `BaseError` where as many weights as those `few` or more would stay whole for their kind: maps of another
    class (GPT-2's, transposed), experts that are one parameter together."""
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
                  and isinstance(getattr(m, "weight", None), Tensor)}
    whole = sum(p.numel() for module in model.base_model.modules() if type(module) is not nn.Linear
                and not isinstance(module, nn.Embedding | nn.Conv2d)
                for p in module.parameters(recurse=False) if p.ndim > 1 and id(p) not in embeddings)
    if whole >= few:
        raise BaseError(f"model.quantize {bits!r}: of the maps of this {type(model).__name__} {few:,} weights can be "
                        f"kept in few bits, and {whole:,} stay as they are (transposed maps, or experts)",
                        "leave model.quantize out, or choose another base")


def _quantize_linear(linear: nn.Linear, bits: QuantizationType, dtype: torch.dtype,
                     device: torch.device | str) -> nn.Module:
    """The map in few bits."""
    import bitsandbytes as bnb
    weight, bias, made = linear.weight.detach().to(dtype), linear.bias, None
    shape: dict[str, Any] = {"input_features": linear.in_features, "output_features": linear.out_features,
                             "bias": bias is not None, "device": "meta"}  # so that no weights are drawn at random
    if bits == "nf4":
        made = bnb.nn.Linear4bit(**shape, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4",
                                        module=made)
        # Or some CPUs would lay the weights out anew for evaluation and use bfloat16: not the model that was trained.
        made.support_avx512bf16_for_cpu = False
    else:
        made = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False, threshold=0.0)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    moved: Any = made.to(device)  # moving is what quantises, on a CPU too
    moved.forward = partial(_quantized_forward, moved)
    # Methods may write into a map's output; a view that a custom function made would not let them.
    moved.register_forward_hook(lambda _module, _args, output: output.clone() if output._is_view() else None)
    found: nn.Module = moved.train(linear.training)
    return found


def _trim_heap() -> None:
    """Give back what the making of a map left free among what it keeps: it is several times the map, each of another
    size, so the next does not fit into it."""
    if sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        ctypes.CDLL(None).malloc_trim(0)


class _MappedFiles:
    """The weight files that are mapped into memory. What was read of them counts as held until it is given back."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = maps.read_text(encoding="utf-8").splitlines() if maps.exists() else []
        ends = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
        self.ranges = [(int(start, 16), int(end, 16)) for start, end in ends]

    def forget(self, weight: Tensor) -> None:
        """Give back the pages of a weight that lies in one of them. Whoever reads it again reads the file."""
        first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
        if not any(start <= first and last <= end for start, end in self.ranges):
            return
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        length = last // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_DONTNEED)


# ---------------------------------------------------------------- a product


def _quantized_forward(module: Any, x: Tensor) -> Tensor:
    """On a CPU by the product below; elsewhere the library has faster ones."""
    on_cpu = x.device.type == "cpu"
    found: Tensor = _DequantizedProduct.apply(x, module.bias, module) if on_cpu else type(module).forward(module, x)
    return found


class _DequantizedProduct(torch.autograd.Function):
    """x W^T + c with the weight expanded for the product alone, forward and backward.

    Neither W nor x is kept: W is frozen, so its gradient is not wanted, and x's needs W only. (The library's own
    product of eight bits keeps x, and rounds it to eight bits where nothing trains: another model than what trains.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: Any) -> Tensor:
        ctx.module = module
        made = _multiply(x, module.out_features, module, transposed=True)
        return made if bias is None else made.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, bias, _ = ctx.needs_input_grad
        return (_multiply(grad, ctx.module.in_features, ctx.module, transposed=False) if x else None,
                grad.flatten(0, -2).sum(0) if bias else None, None)


def _multiply(x: Tensor, width: int, module: Any, transposed: bool) -> Tensor:
    """x W^T or x W: no view of anything, so that methods may write into it."""
    made = x.new_empty((*x.shape[:-1], width))
    weight = _buffer((module.out_features, module.in_features), x.dtype)
    DEQUANTIZERS[type(module.weight).__name__](module, weight)
    torch.mm(x.reshape(-1, x.shape[-1]), weight.T if transposed else weight, out=made.view(-1, width))
    return made


class _DequantBuffers(threading.local):
    """One place for every expanded weight in turn, as large as the largest so far: each thread has its own.

    A weight with memory of its own would leave a hole among what a step keeps when it is let go, and the next would not
    fit into it: that took 0.15 GB at the peak of a step of SmolLM2-135M.
    """

    def __init__(self) -> None:
        self.of: dict[torch.dtype, Tensor] = {}


DEQUANT_BUFFER = _DequantBuffers()


def _buffer(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    size = shape[0] * shape[1]
    if dtype not in DEQUANT_BUFFER.of or DEQUANT_BUFFER.of[dtype].numel() < size:
        DEQUANT_BUFFER.of[dtype] = torch.empty(size, dtype=dtype)
    return DEQUANT_BUFFER.of[dtype][:size].view(shape)


# ---------------------------------------------------------------- the weight that the bits stand for


def get_dequantizer(module: Any) -> Callable[[], Tensor] | None:
    """What gives [out, in] the weight that a quantised map multiplies by; None for a map that is as it was.

    The differences from the weight that was quantised are rounding: in four bits some eight per cent of its mean size.
    """
    return partial(_dequantize, module) if type(module.weight).__name__ in DEQUANTIZERS else None


def _dequantize(module: Any) -> Tensor:
    weight, name = module.weight, type(module.weight).__name__
    dtype = weight.quant_state.dtype if name == "Params4bit" else torch.float32
    found = torch.empty((module.out_features, module.in_features), dtype=dtype, device=weight.device)
    DEQUANTIZERS[name](module, found)
    return found


def _dequantize_nf4(module: Any, out: Tensor) -> None:
    """Some rows at a time, where a row is whole blocks: the library expands into new memory, which so stays small."""
    from bitsandbytes import functional as bnb
    packed, state = module.weight.data.view(-1, 1), module.weight.quant_state
    maxima = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    count, width = out.shape
    rows = max(1, CHUNK_WEIGHTS // width) if width % (2 * state.blocksize) == 0 else count
    for start in range(0, count, rows):
        stop = min(count, start + rows)
        part = bnb.QuantState(maxima[start * width // state.blocksize:-(-stop * width // state.blocksize)],
                              (stop - start, width), state.code, state.blocksize, state.quant_type, state.dtype)
        out[start:stop] = bnb.dequantize_4bit(packed[start * width // 2:-(-stop * width // 2)], part)


def _dequantize_int8(module: Any, out: Tensor) -> None:
    state, weight = module.state, module.weight  # the library's forward pass moves both from the weight to the state
    rows, scales = (weight.CB, weight.SCB) if state.CB is None else (state.CB, state.SCB)
    out.copy_(rows).mul_((scales.to(torch.float32) / 127)[:, None])  # a product of two types would widen a copy


DEQUANTIZERS: dict[str, Callable[[Any, Tensor], None]] = {"Params4bit": _dequantize_nf4, "Int8Params": _dequantize_int8}
