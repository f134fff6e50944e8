"""The verb `export`: a run as a folder or a file that other tools load. Read `build.py` (open_run) first."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from luthier import assembly
from luthier.assembly.gguf_export import export_gguf_adapter, export_gguf_model
from luthier.assembly.model_card_facts import collect_model_card_facts
from luthier.assembly.recipe import Recipe, method_name
from luthier.assembly.run_io import (
    convert_to_plain_lora,
    has_saved_heads,
    open_run,
    resolve_saved_dtype,
    save_full_model,
    save_tuned,
)
from luthier.core.errors import RunError
from luthier.core.protocols import Family, Tuner
from luthier.core.types import Forest, Inputs, Target
from luthier.reporting.model_card import build_model_card
from luthier.reporting.progress import print_line
from luthier.training.run_folder import Run

FORMS = ("merged", "whole", "adapter", "gguf", "gguf-adapter")
VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # PEFT's names of what Transformers alone cannot put in
FILES = {"gguf": "model.gguf", "gguf-adapter": "adapter.gguf"}  # the forms that are one file
DTYPES = {"merged": ("float32", "bfloat16", "float16"), "whole": ("float32", "bfloat16", "float16"),
          "gguf": ("float32", "float16", "q8_0")}
NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE = 16  # tokens of the check that merging changed nothing
# Most that a log-probability of the probe (or a number in a state) may move. In sixteen bits the merged weights
# themselves are rounded.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


def export(run: Run | Path | str, to: Literal["merged", "whole", "adapter", "gguf", "gguf-adapter"] = "merged",
           out: Path | str | None = None,
           dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None,
           lora_rank: int | Literal["auto"] | None = None, *, base_model: str | None = None) -> Path:
    """Write a run as a folder or file of its own, whole or not at all, and return its path.

    Args:
        to: `merged`, a model like any other, the method's change folded into its weights (of a full run, a copy; of a
            run on a base in few bits, into the base as it was before);
            `whole`, the base with the adapter beside it in one folder, which Transformers loads in one call;
            `adapter`, the files that PEFT loads beside the base;
            `gguf`, the merged model as one file for llama.cpp;
            or `gguf-adapter`, a LoRA as the file that llama.cpp loads beside the base's.
        out: the folder or file; left out: in the run's folder, `model.gguf`, `adapter.gguf` or under the form's name.
        dtype: of the weights. Left out: of `merged` and `whole` the one that the base's files are stored in, whatever
            it was trained in; of the matrices in `gguf` float16.
        lora_rank: write `adapter` as a plain LoRA of this rank on every map, for servers that read one rank and one
            alpha: patterns, rsLoRA and AdaLoRA are folded into the weights, smaller ranks padded with zeros. `auto`:
            the largest rank that there is.
        base_model: where the base is now, if it was moved; it must be the one that the run was trained on.

    No local path is written: the base is named by its hub id, or by the bare name of its folder.

    Raises:
        RunError: `out` holds something, the run has no such adapter, or merging changed what the model says.
        NotMergeable: the method cannot be folded in; the error says why.
        BaseError: llama.cpp does not know the base, or would read it otherwise.
    """
    if to not in FORMS:
        raise RunError(f"a run cannot be exported to {to!r}", f"one of: {', '.join(FORMS)}")
    _refuse_dtype(dtype, to)
    _refuse_rank(lora_rank, to)
    run = run if isinstance(run, Run) else Run(run)
    out = Path(out) if out else run.path / FILES.get(to, to)
    _refuse_existing(out, to)
    recipe, base, tuner = open_run(run, to != "adapter", base_model, print_line)
    if to == "adapter" and (tuner is None or tuner.peft() is None):
        raise RunError(f"{str(run.path)!r} holds a whole model, not an adapter", "export it with --to merged")
    if lora_rank is not None and tuner is not None:
        tuner = convert_to_plain_lora(base, tuner, None if lora_rank == "auto" else lora_rank)
    if to == "adapter":
        _refuse_unreadable(run, recipe, tuner)
    if to == "whole":
        _refuse_unsupported(run, recipe, tuner)
    if to in ("merged", "gguf") and tuner is not None:
        merge_adapter(base, tuner)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _write_atomically(out) as temporary:
        if to == "gguf":
            assert dtype != "bfloat16"
            export_gguf_model(recipe, base, temporary, dtype or "float16", out.stem)
        elif to == "gguf-adapter":
            export_gguf_adapter(recipe, base, tuner, temporary, out.stem)
        else:
            if to != "adapter":
                assembly.cast_weights(base, NUMBERS[dtype] if dtype else resolve_saved_dtype(recipe, base))
            _write_folder(temporary, to, recipe, base, tuner)
            facts = collect_model_card_facts(Run(temporary), run, recipe, base, title=out.name)
            Run(temporary).write("README.md", build_model_card(facts))
    return out


@contextmanager
def _write_atomically(out: Path) -> Iterator[Path]:
    """A place beside `out` to write to, which becomes `out` where all goes well and is removed where it does not."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(out)
    finally:  # gone already where all went well
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def _refuse_dtype(dtype: str | None, to: str) -> None:
    if dtype is not None and dtype not in DTYPES.get(to, ()):
        raise RunError(f"dtype {dtype!r} has no effect on {to!r}" if to not in DTYPES else
                       f"--to {to} does not write {dtype}", f"one of: {', '.join(DTYPES[to])}" if to in DTYPES else
                       "omit --dtype, or export with --to merged or --to gguf")


def _refuse_rank(rank: int | str | None, to: str) -> None:
    if rank is not None and to != "adapter":
        raise RunError(f"lora_rank {rank} has no effect on {to!r}",
                       "leave --lora-rank out, or export with --to adapter")
    if rank is not None and rank != "auto" and (not isinstance(rank, int) or rank < 1):
        raise RunError(f"lora_rank is {rank!r}, and a rank is a whole number of at least 1", "give one, or auto")


def _refuse_existing(out: Path, to: str) -> None:
    if to in FILES and out.suffix != ".gguf":
        raise RunError(f"--to {to} writes one file, and {str(out)!r} does not end in .gguf", f"--out {out}.gguf")
    if out.exists() and (to in FILES or not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{str(out)!r} already holds something, and nothing is overwritten",
                       "remove it, or give another name with --out")


def _refuse_unreadable(run: Run, recipe: Recipe, tuner: Tuner | None) -> None:
    """Raises `RunError` where PEFT would compute something else with the adapter."""
    form = (tuner.peft() if tuner is not None else None) or {}
    if form.get("peft_type") in VIRTUAL and (recipe.objective.required_outputs & {"pooled", "scores", "token_scores"}):
        raise RunError(f"{str(run.path)!r}: PEFT's virtual tokens ({method_name(recipe)}) move the place of the "
                       f"state that objective {recipe.objective.name!r} reads",
                       "open the run with Luthier, or train a lora")


def _refuse_unsupported(run: Run, recipe: Recipe, tuner: Tuner | None) -> None:
    """Raises `RunError` where Transformers would not put the adapter into the model by itself."""
    form = tuner.peft() if tuner is not None else None
    what = f"{str(run.path)!r} cannot be a whole model with an adapter in it: "
    if form is None:
        raise RunError(what + "it is a whole model without one", "export it with --to merged")
    if form["peft_type"] == "LUTHIER":
        raise RunError(what + f"neither Transformers nor PEFT knows {method_name(recipe)}",
                       "--to merged, where it merges; else chat, serve and evaluate open the run itself")
    if form["peft_type"] in VIRTUAL:
        raise RunError(what + f"Transformers puts no virtual tokens ({method_name(recipe)}) into a model",
                       "--to adapter, then let PEFT do it: PeftModel.from_pretrained(base, FOLDER)")
    if form.get("use_dora") or form["peft_type"] == "ADALORA":
        unread = "lengths of DoRA" if form.get("use_dora") else "ranks of AdaLoRA"
        raise RunError(what + f"Transformers reads no {unread} from the file",
                       "--to merged, or --to adapter, which PEFT reads whole")
    if form["peft_type"] in assembly.BRIDGED and has_saved_heads(recipe.objective) is False:
        for key in assembly.BRIDGED[form["peft_type"]]:
            if form.get(key) not in (None, False, "none", [], {}):
                raise RunError(what + f"it is not known that Transformers reads {key} from the file",
                               "--to merged, or --to adapter, which PEFT reads whole")
    if heads := form.get("modules_to_save"):
        raise RunError(what + f"Transformers' model has no {heads[0]!r}, the head of objective {recipe.objective.name!r}",
                       "--to merged writes one model with the head in it, where Transformers has a class for it")


def _write_folder(out: Path, to: str, recipe: Recipe, base: Family, tuner: Tuner | None) -> None:
    out.mkdir()
    if to == "whole" and tuner is not None:
        with tuner.disabled():
            save_full_model(Run(out), recipe, base)
    if to in ("adapter", "whole") and tuner is not None:
        save_tuned(Run(out), recipe, base, tuner, public=True)
    else:
        save_full_model(Run(out), recipe, base)


def merge_adapter(base: Family, tuner: Tuner) -> None:
    """Fold the method into the base's weights. Raises `RunError` where the model then says something else."""
    base.train(False)
    before = _compute_probe_outputs(base)
    tuner.merge()
    moved = float((_compute_probe_outputs(base) - before).abs().max())
    allowed = TOLERANCE[base.structure.embedding.weight.dtype]  # type: ignore[index]
    if not moved <= allowed:
        raise RunError(f"merging moved an output by {moved:.2g}, and rounding explains {allowed} at most",
                       "train and export with base.dtype: float32, or use the adapter as it is")


@torch.no_grad()
def _compute_probe_outputs(base: Family) -> torch.Tensor:
    """Log-probabilities of some tokens, each after the ones before it; the states of a base that predicts none."""
    sizes = base.structure.sizes
    if "channels" in sizes:
        place, forest = torch.arange(2), Forest((1, 1), (-1, -1))
        shape = (2, sizes["channels"], sizes["height"], sizes["width"])
        inputs = Inputs(place, place * 0, forest, torch.linspace(-1, 1, math.prod(shape)).view(shape))
        target = Target(place, place, torch.ones(2), 2)
    else:
        half = PROBE // 2  # a source and its answer
        place = torch.arange(PROBE)
        tokens = (place + 1) * 7 % sizes["vocabulary"]
        first = 0 if base.structure.head is not None else -1  # what predicts nothing has no answers either
        inputs = Inputs(tokens, place, Forest((half, PROBE - half), (-1, first)))
        target = Target(place[half - 1:-1], tokens[half:], torch.ones(PROBE - half), 1)
    need = "states" if base.structure.task == "FEATURE_EXTRACTION" or base.structure.head is None else "token_logps"
    outputs = base.forward(inputs.to(base.device), target.to(base.device), frozenset({need}))
    return outputs.tensors()[need]
