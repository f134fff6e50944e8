"""What the tests of GGUF files share: llama.cpp opened with a file, its logits, and texts that are hard to split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import attach
from torch import Tensor

from luthier import assembly
from luthier.assembly.run_io import save_tuned
from luthier.models import CausalLM
from luthier.training.run_folder import Run

llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (extra: llama)")

CORPUS = ["I'll say it's 1234 of 12 things, 123 or 1999; they'll  see\n\n  the thing", "don't DON'T we'Ve ΩMEGA 日本語のテキスト",
          "x = [1, 22, 333]\r\n\treturn x  # end!!", "thé là où naïve 12345678 ½ ²³"]
TEXTS = [*CORPUS, "  leading", "trailing  ", "a\n\n\nb", "It's 2024-10-31 12:34:56.789!", "日本 語 12あ34", "I'LL'd 'tis",
         "🙂🙂 ok", "<|im_start|>user\nhi there<|im_end|>\n", "\t\t tabs \u00a0nbsp", "(((1)))..  ...\n ..."]


@contextmanager
def opened(file: Path, **options: Any) -> Iterator[Any]:
    """llama.cpp with the file, on one thread, all of it in float32."""
    import llama_cpp
    defaults = llama_cpp.llama_cpp.llama_model_default_params()
    defaults.use_extra_bufts = False  # weights repacked for matrix units of the processor, which some machines forbid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", lambda: defaults)
        found = llama_cpp.Llama(str(file), n_ctx=256, n_batch=256, n_threads=1, n_threads_batch=1, logits_all=True,
                                verbose=False, type_k=0, type_v=0, flash_attn=False, **options)
    try:
        yield found
    finally:
        found.close()


def theirs(file: Path, tokens: Sequence[int], **options: Any) -> Tensor:
    """[T, V] llama.cpp's logits of one document."""
    with opened(file, **options) as found:
        found.eval(list(tokens))
        return torch.tensor(found.scores[:len(tokens)])


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def saved(place: Path, base: CausalLM, method: dict[str, Any], objective: str = "sft") -> Run:
    """A run as `train` leaves it, on a base in a folder of its own, with its method on it, stirred."""
    base.save(place / "base")
    made = assembly.build_recipe({"model": str(place / "base"), "data": "-", "method": method, "objective": objective})
    attached = attach(base, method["name"], **{key: value for key, value in method.items() if key != "name"})
    run = Run(place / "run")
    run.create(assembly.dump_recipe(made), {})
    save_tuned(run, made, base, attached)
    return run
