"""Random states of a process: seed all of them, save and restore them exactly. Reads nothing else first.

Covers Python's `random`, NumPy's global generator, and torch on the CPU, every CUDA device and MPS. Generators that
other code creates are not included.
"""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed every global generator; torch seeds all of its devices at once."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)  # NumPy takes 32 bits
    torch.manual_seed(seed)


def capture_rng_state(device: torch.device | str) -> dict[str, Any]:
    """Every global random state that a run on `device` uses, as a JSON value."""
    version, words, normal = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), normal], "cpu": _encode_state(torch.get_rng_state())}
    if numpy := sys.modules.get("numpy"):
        name, words, *rest = numpy.random.get_state(legacy=True)
        state["numpy"] = [name, words.tolist(), *rest]
    if torch.device(device).type == "cuda":
        state["cuda"] = [_encode_state(each) for each in torch.cuda.get_rng_state_all()]
    if torch.device(device).type == "mps":
        state["mps"] = _encode_state(torch.mps.get_rng_state())
    return state


def restore_rng_state(state: Mapping[str, Any]) -> list[str]:
    """Restore what `capture_rng_state` returned. Returns a sentence for each state without a device here.

    A run may move from a GPU to a CPU, but then uses other random numbers than an uninterrupted run.
    """
    version, words, normal = state["python"]
    random.setstate((version, tuple(words), normal))
    torch.set_rng_state(_decode_state(state["cpu"]))
    if "numpy" in state:
        import numpy  # used when the state was saved, so it will be used again

        name, words, *rest = state["numpy"]
        numpy.random.set_state((name, numpy.array(words, dtype=numpy.uint32), *rest))
    lost = []
    saved, here = state.get("cuda", []), torch.cuda.device_count()
    for index, text in enumerate(saved[:here]):
        torch.cuda.set_rng_state(_decode_state(text), index)
    if len(saved) > here:
        lost.append(f"random states of {len(saved)} CUDA devices were saved and {here} are here: "
                    "the run continues with other random numbers than an uninterrupted one")
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_decode_state(state["mps"]))
    elif "mps" in state:
        lost.append("a random state of MPS was saved and there is none here: "
                    "the run continues with other random numbers than an uninterrupted one")
    return lost


def _encode_state(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode("ascii")


def _decode_state(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
