"""Refuses adapters that PEFT or Transformers would load with other outputs. Read `files.py` first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.core.errors import RunError

VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # PEFT's types that Transformers does not apply by itself


@dataclass(frozen=True)
class AdapterFacts:
    """What decides whether another library can load an adapter.

    Args:
        place: the run folder, for messages.
        method, objective: their names.
        config: as in PEFT's adapter_config.json; None for a full model.
        outputs: that the objective requires of the model.
        has_heads: whether heads of the objective are saved with the adapter.
        bridged: PEFT type -> keys of its config that only PEFT itself applies (`methods.peft.BRIDGED`).
    """

    place: str
    method: str
    objective: str
    config: Mapping[str, Any] | None
    outputs: Collection[str]
    has_heads: bool
    bridged: Mapping[str, Collection[str]]


def check_readable_by_peft(adapter: AdapterFacts) -> None:
    """Raises `RunError` where PEFT would compute other outputs with the adapter."""
    kind = (adapter.config or {}).get("peft_type")
    if kind in VIRTUAL and {"pooled", "scores", "token_scores"} & set(adapter.outputs):
        raise RunError(f"{adapter.place!r}: PEFT's virtual tokens ({adapter.method}) move the position of the "
                       f"state that objective {adapter.objective!r} reads",
                       "open the run with Luthier, or train a lora")


def check_readable_by_transformers(adapter: AdapterFacts) -> None:
    """Raises `RunError` where Transformers would not apply the adapter when it loads the folder."""
    form, what = adapter.config, f"{adapter.place!r} cannot be exported as a bundle: "
    if form is None:
        raise RunError(what + "it is a full model without an adapter", "export it with --to merged")
    if form["peft_type"] == "LUTHIER":
        raise RunError(what + f"neither Transformers nor PEFT supports {adapter.method}",
                       "use --to merged if the method can be merged; chat, serve and evaluate load the run itself")
    if form["peft_type"] in VIRTUAL:
        raise RunError(what + f"Transformers does not support virtual tokens ({adapter.method}) in a bundle",
                       "use --to adapter and load it with PEFT: PeftModel.from_pretrained(base, FOLDER)")
    if form.get("use_dora") or form["peft_type"] == "ADALORA":
        unread = "magnitudes of DoRA" if form.get("use_dora") else "ranks of AdaLoRA"
        raise RunError(what + f"Transformers does not read {unread} from the file",
                       "--to merged, or --to adapter, which PEFT reads whole")
    if form["peft_type"] in adapter.bridged and not adapter.has_heads:
        for key in adapter.bridged[form["peft_type"]]:
            if form.get(key) not in (None, False, "none", [], {}):
                raise RunError(what + f"Transformers is not known to read {key} from the file",
                               "--to merged, or --to adapter, which PEFT reads whole")
    if heads := form.get("modules_to_save"):
        raise RunError(what + f"Transformers' model has no {heads[0]!r}, the head of objective {adapter.objective!r}",
                       "use --to merged, which saves the head in the model if Transformers has a class for it")
