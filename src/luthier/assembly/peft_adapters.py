"""Reads adapter folders of PEFT: which method loads one, and the tensors of its weight file.

A folder is loaded so that outputs equal PEFT's, or refused with an error that names the field and a remedy. What the
methods here do not support (a LoRA of the embedding or the head, `modules_to_save`, `bias`, trained tokens) is loaded
by PEFT itself (`methods/peft.py`). Read `methods/peft_settings.py` first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from luthier.core.errors import LuthierError, RunError
from luthier.core.protocols import ModelStructure
from luthier.methods import READERS
from luthier.methods.adapter_format import NATIVE_TYPE, PEFT_PREFIX
from luthier.methods.peft import PEFT_ONLY_FIELDS, PeftConfig
from luthier.methods.peft_settings import MERGE, check_types, is_set
from luthier.training.run_folder import Run

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
HEADS = "heads.safetensors"  # heads that Transformers' classes do not have, and scalars
# PEFT's tasks whose models have a head of their own that the adapter's file holds.
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# Endings of a module's own tensors in PEFT's files of LoRA, AdaLoRA and (IA)^3.
TUNED = re.compile(r"\.(lora_A\.weight|lora_embedding_A|lora_A|lora_E|ia3_l)$")


def read_method(form: Mapping[str, Any], run: Run | None = None) -> Any:
    """The method settings of an adapter_config.json, in PEFT's format or in Luthier's. `run`: the folder, whose weight
    file shows which modules were changed.

    Raises:
        RunError: the settings cannot be read, or are not supported.
    """
    try:
        if form.get("peft_type") == NATIVE_TYPE:
            return form["method"] if "method" in form else [read_method(part) for part in form["parts"]]
        check_types(form)
        kind = str(form.get("peft_type"))
        reader = READERS.get(kind, PeftConfig)
        if kind in PEFT_ONLY_FIELDS and _needs_bridge(form, run):
            reader = PeftConfig
        _refuse_heads(form)
        return reader.from_peft(form).model_dump()
    except KeyError as missing:
        raise RunError(f"the adapter_config.json has no {missing.args[0]!r}, which an adapter of type "
                       f"{form.get('peft_type')} needs", "copy the folder again, or save the adapter again") from None
    except RunError:
        raise
    except LuthierError as error:
        raise RunError(f"the adapter_config.json cannot be read as settings of a method: {error.what}",
                       MERGE) from error


def _needs_bridge(form: Mapping[str, Any], run: Run | None) -> bool:
    """Whether only PEFT can load the adapter, because of its settings or the modules in its file."""
    if any(is_set(form.get(key)) and form[key] != "none" for key in PEFT_ONLY_FIELDS[str(form["peft_type"])]):
        return True
    targets = form.get("target_modules")
    if (targets is None and not form.get("target_parameters")) or str(targets).lower() == "all-linear":
        return True  # PEFT resolves both by tables of its own
    if parameters := form.get("target_parameters"):
        patterns = is_set(form.get("rank_pattern")) or is_set(form.get("alpha_pattern"))
        if patterns or any("experts." not in name for name in parameters):
            return True
    if run is None:
        return False
    changed = {TUNED.sub("", name) for name in list_stored_names(run) if TUNED.search(name)}
    return any(not re.search(r"\.\d+\.", name) for name in changed)  # it is outside the layers: an embedding or a head


def _refuse_heads(form: Mapping[str, Any]) -> None:
    if form.get("task_type") in HEADED and is_set(form.get("modules_to_save")):
        raise RunError(f"the adapter was made for {form['task_type']}, with a head of its own "
                       f"(modules_to_save={form['modules_to_save']!r}), which the base does not have here",
                       "load it with PEFT on the model class of its task, or train a run here with objective classify")


# ---------------------------------------------------------------- the file of weights


def load_adapter_weights(run: Run, structure: ModelStructure) -> dict[str, Tensor]:
    """The trained weights of a run, by their names in the file; scalars of its objective are in `HEADS`. Raises
    `RunError` for a missing or damaged file, and for a prefix of PEFT that would act otherwise on this base.

    Args:
        structure: of the base.
    """
    _check_weights(run)
    form, ports = run.adapter or {}, structure.injector
    has_plain_prefix = ports is not None and "prefix" in ports.peft_kinds
    if form.get("peft_type") == "PREFIX_TUNING" and not run.recipe and not has_plain_prefix:
        raise RunError("PEFT's prefix on a base with sliding-window layers: there PEFT's prefix leaves the window, "
                       "whereas in Luthier every token attends to the prefix",
                       "use it with PEFT, or train a prefix here")
    scalars = run.path / HEADS
    return load_file(run.path / WEIGHTS) | (load_file(scalars) if run.recipe and scalars.exists() else {})


def list_stored_names(run: Run) -> list[str]:
    """Names in the weight file, without reading a tensor. Raises as `load_adapter_weights` does."""
    _check_weights(run)
    with safe_open(run.path / WEIGHTS, framework="pt") as file:
        return list(file.keys())


def _check_weights(run: Run) -> None:
    file = run.path / WEIGHTS
    if not file.exists():
        if (run.path / PICKLED).exists():
            raise RunError(f"{str(run.path)!r} has only pickled weights ({PICKLED}), and pickle is never loaded",
                           "load it with PEFT and save it again: save_pretrained writes safetensors")
        raise RunError(f"{str(run.path)!r} has an adapter_config.json but no {WEIGHTS}",
                       "finish the run (--resume), or copy the folder again")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise RunError(f"{str(file)!r} is damaged: {str(error).splitlines()[0]}", "copy or download the file again") \
            from None


def drop_base_weights(saved: Mapping[str, Tensor], own: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The saved weights without those of the base itself, which PEFT adds with `save_embedding_layers`.

    Args:
        saved: by the names in the file.
        own: the method's tensors, by the same names.
        model: the bare base.

    Raises:
        RunError: the file holds other weights of the base than the base has.
    """
    weights, kept = None, {}
    for name, tensor in saved.items():
        path = name.removeprefix(PEFT_PREFIX)
        if name not in own and path != name:
            weights = weights or {_strip_peft_prefix(key): value for key, value in model.state_dict().items()}
            base = weights.get(_strip_peft_prefix(path))
            if base is not None:
                if base.shape != tensor.shape or not torch.equal(base, tensor.to(base)):
                    raise RunError(f"the adapter's file holds {_strip_peft_prefix(path)!r}, {list(tensor.shape)}, "
                                   "a weight of the "
                                   f"base itself (save_embedding_layers), with other values than the base's, "
                                   f"{list(base.shape)}: its vocabulary or embeddings were changed", MERGE)
                continue
        kept[name] = tensor
    return kept


def _strip_peft_prefix(name: str) -> str:
    """The name of a base weight without the parts that PEFT inserts."""
    return name.replace(".token_adapter.", ".").replace(".base_layer.", ".").replace(".original_module.", ".")
