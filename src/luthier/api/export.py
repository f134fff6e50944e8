"""The verb `export`: a run as a folder or file that other tools load. Read `exporters/files.py` first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from luthier import assembly
from luthier.assembly.gguf_export import export_gguf_adapter, export_gguf_model
from luthier.assembly.model_card_facts import collect_model_card_facts
from luthier.assembly.recipe import Recipe, get_method_name
from luthier.assembly.run_io import (
    convert_to_plain_lora,
    has_saved_heads,
    open_run,
    resolve_saved_dtype,
    save_full_model,
    save_tuned,
)
from luthier.core.consent import accepts_consent
from luthier.core.errors import RunError
from luthier.core.protocols import Family, Tuner
from luthier.exporters import adapters, files
from luthier.exporters.merging import merge_into_base
from luthier.reporting.model_card import build_model_card
from luthier.reporting.progress import print_line
from luthier.training.run_folder import Run

Form: TypeAlias = Literal["merged", "bundle", "adapter", "gguf", "gguf-adapter"]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16", "q8_0"]
NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@accepts_consent
def export(run: Run | Path | str, to: Form = "merged", out: Path | str | None = None, dtype: Dtype | None = None,
           lora_rank: int | Literal["auto"] | None = None, *, base_model: Path | str | None = None,
           allow_code: Sequence[str] = ()) -> Path:
    """Write a run as a folder or file atomically, and return its path.

    Args:
        to: `merged`, a model with the adapter merged into its weights (of a full run, a copy; of a run on a quantized
            base, merged into the unquantized base);
            `bundle`, one folder with the base and the adapter, which Transformers loads in one call;
            `adapter`, the files that PEFT loads together with the base;
            `gguf`, the merged model as one file for llama.cpp;
            `gguf-adapter`, a LoRA as a file that llama.cpp loads together with the base.
        out: the folder or file; default: in the run's folder, `model.gguf`, `adapter.gguf` or the name of the form.
        dtype: of the weights. Default: for `merged` and `bundle` the dtype of the base's files, whatever it was trained
            in; for the matrices in `gguf` float16.
        lora_rank: write `adapter` as a plain LoRA with this rank on every target, for servers that support one rank and
            one alpha: patterns, rsLoRA and AdaLoRA are folded into the weights, smaller ranks are padded with zeros.
            `auto`: the largest rank of the run.
        allow_code: files, modules, URLs or base models whose code the run may use (`core/consent.py`).
        base_model: where the base is now, if it was moved; it must be the one that the run was trained on.

    No local path is written: the base is named by its hub id, or by the name of its folder.

    Raises:
        RunError: `out` exists, the run has no such adapter, or merging changed the outputs.
        NotMergeable: the method cannot be merged; the error says why.
        BaseError: llama.cpp does not support the base.
    """
    files.check_form(to)
    files.check_dtype(dtype, to)
    files.check_rank(lora_rank, to)
    run = run if isinstance(run, Run) else Run(run)
    out = Path(out) if out else run.path / files.FILES.get(to, to)
    files.check_vacant(out, to)
    with files.write_atomically(out) as temporary:  # before the model is loaded: the folder may not be writable
        _write_export(run, to, temporary, out, dtype, lora_rank, base_model)
    return out


def _write_export(run: Run, to: Form, temporary: Path, out: Path, dtype: Dtype | None,
                  lora_rank: int | Literal["auto"] | None,
                  base_model: Path | str | None) -> None:
    """Load the run and write it to `temporary`, which becomes `out`."""
    recipe, base, tuner = open_run(run, to != "adapter", base_model, print_line)
    if to == "adapter" and (tuner is None or tuner.get_peft_config() is None):
        raise RunError(f"{str(run.path)!r} holds a full model, not an adapter", "export it with --to merged")
    if lora_rank is not None and tuner is not None:
        tuner = convert_to_plain_lora(base, tuner, None if lora_rank == "auto" else lora_rank)
    if to == "adapter":
        adapters.check_readable_by_peft(_describe_adapter(run, recipe, tuner))
    if to == "bundle":
        adapters.check_readable_by_transformers(_describe_adapter(run, recipe, tuner))
    if to in ("merged", "gguf") and tuner is not None:
        merge_into_base(base, tuner)
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


def _describe_adapter(run: Run, recipe: Recipe, tuner: Tuner | None) -> adapters.AdapterFacts:
    objective = recipe.objective
    config = tuner.get_peft_config() if tuner is not None else None
    return adapters.AdapterFacts(str(run.path), get_method_name(recipe), objective.name, config,
                                 objective.required_outputs, has_saved_heads(objective), assembly.PEFT_ONLY_FIELDS)


def _write_folder(out: Path, to: str, recipe: Recipe, base: Family, tuner: Tuner | None) -> None:
    out.mkdir()
    if to == "bundle" and tuner is not None:
        with tuner.disabled():
            save_full_model(Run(out), recipe, base)
    if to in ("adapter", "bundle") and tuner is not None:
        save_tuned(Run(out), recipe, base, tuner, public=True)
    else:
        save_full_model(Run(out), recipe, base)
