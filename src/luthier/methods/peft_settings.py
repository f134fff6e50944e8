"""Interprets fields of PEFT's adapter_config.json: which are set, and which modules they select.

The `from_peft` methods of the configs use it, so that no field is silently ignored.
A field counts as set unless it is None, False or empty: `layers_to_transform: 0` is set.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from typing import Any

from luthier.core.errors import RunError

MERGE = ("merge it with PEFT and use the result as the base: "
         "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(OUT)")
# LoRA's fields that PEFT cannot merge: the input decides which tokens the adapter changes.
NOT_MERGEABLE = ("alora_invocation_tokens", "arrow_config")
# Fields that describe the origin of an adapter, not what it computes.
ORIGIN = frozenset({"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                    "inference_mode", "runtime_config", "merge_weights"})
# Fields that only select modules; `target_expression` reads all of them.
SELECTION = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")  # where they are strings
# Fields whose wrong type would otherwise fail late or never.
TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,), "lora_alpha": (int, float), "target_modules": (str, list), "exclude_modules": (str, list),
    "layers_to_transform": (int, list), "layers_pattern": (str, list),
    "rank_pattern": (dict,), "alpha_pattern": (dict,),
    "modules_to_save": (list,), "target_parameters": (list,), "num_virtual_tokens": (int,),
    "feedforward_modules": (str, list), "trainable_token_indices": (list, dict), "bias": (str,)}


def is_set(value: Any) -> bool:
    """Whether a field is set. 0 is.

    >>> [is_set(value) for value in (None, False, [], {}, "", 0, [0], "all")]
    [False, False, False, False, False, True, True, True]
    """
    return not (value is None or value is False or (isinstance(value, (list, dict, str, tuple)) and not value))


def refuse_unread(adapter: Mapping[str, Any], known: Container[str]) -> None:
    """Raises `RunError` for the first set field that is not in `known`."""
    for key, value in adapter.items():
        if is_set(value) and key not in known and (key, value) != ("bias", "none"):
            raise format_unsupported(key, value)


def format_unsupported(key: str, value: Any) -> RunError:
    """The error for a setting that is not supported."""
    return RunError(f"the adapter was made with {key}={value!r}, which is not supported",
                    "use it with PEFT" if key in NOT_MERGEABLE else MERGE)


def check_types(adapter: Mapping[str, Any]) -> None:
    """Raises `RunError` for a field of the wrong type and for an invalid regular expression."""
    for key, types in TYPES.items():
        value = adapter.get(key)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise RunError(f"adapter_config.json: {key} is {value!r}, but it must be "
                           + " or ".join(kind.__name__ for kind in types), "fix the file, or save the adapter again")
    named = [(key, adapter[key]) for key in EXPRESSIONS if isinstance(adapter.get(key), str)]
    named += [(key, pattern) for key in ("rank_pattern", "alpha_pattern") for pattern in adapter.get(key) or {}]
    for key, pattern in named:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RunError(f"adapter_config.json: {key} {pattern!r} is not a valid regular expression: {error}",
                           "fix the file, or save the adapter again") from None


def build_name_pattern(names: str | Sequence[str]) -> str:
    """PEFT's rule for module names: a string is an expression for the whole path; a list holds suffixes of paths.

    >>> import re
    >>> bool(re.fullmatch(build_name_pattern(["q_proj"]), "layers.0.q_proj"))
    True
    """
    if isinstance(names, str):
        return f"(?:{names})"
    return rf"(?:(?:.*\.)?(?:{_join_alternatives(names)}))"


def build_target_pattern(adapter: Mapping[str, Any]) -> str | None:
    """One regular expression for the whole paths of the modules that PEFT's fields (`SELECTION`) select; None if they
    select none (`target_modules: []` with `target_parameters`)."""
    targets = adapter.get("target_modules")
    if not targets:
        return None
    found = build_name_pattern(targets)
    layers = _build_layer_pattern(adapter.get("layers_to_transform"), adapter.get("layers_pattern"))
    if layers and not isinstance(targets, str):  # a whole path in the list is selected in any layer
        names = _join_alternatives(targets)
        found = rf"(?:(?:{names})|{layers}(?:.*\.(?:{names})))"
    exclude = adapter.get("exclude_modules")
    return rf"(?!{build_name_pattern(exclude)}$){found}" if exclude else found


def _build_layer_pattern(indexes: int | Sequence[int] | None, patterns: str | Sequence[str] | None) -> str:
    """A lookahead for the layer index; empty if every layer is selected. As in PEFT, the index is the first number
    after one of the `patterns`; without them, the first number from the third part of the path on."""
    if indexes is None or (not isinstance(indexes, int) and not indexes):
        return ""
    allowed = "|".join(str(i) for i in ([indexes] if isinstance(indexes, int) else indexes))
    if not patterns:
        return rf"(?=[^.]*\.[^.]*\.(?:(?!\d+\.)[^.]*\.)*(?:{allowed})\.)"
    lists = "|".join([patterns] if isinstance(patterns, str) else patterns)
    return rf"(?=(?:.*?\.)?(?:{lists})\.(?:{allowed})\.)"


def build_key_pattern(pattern: str) -> str:
    """PEFT's rule for keys of rank_pattern and alpha_pattern: an expression for the last dotted parts of a path."""
    return rf"(.*\.)?({pattern})"


def _join_alternatives(names: Sequence[str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names))


# ---------------------------------------------------------------- writing


def shorten_names(paths: Sequence[str], every: Sequence[str]) -> list[str]:
    """`target_modules` for these modules: the last part of a path if all modules of that name are selected, else the
    whole path.

    Args:
        paths: paths of the selected modules.
        every: paths of all modules of the model.

    >>> shorten_names(["a.0.q", "a.1.q", "a.0.v"], ["a.0.q", "a.1.q", "a.0.v", "a.1.v"])
    ['a.0.v', 'q']
    """
    selected, names = set(paths), set()
    for path in paths:
        last = path.rpartition(".")[2]
        names.add(last if all(other in selected for other in every if other == last or other.endswith(f".{last}"))
                  else path)
    return sorted(names)


def make_alphas_integers(form: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json with whole-numbered alphas as integers, which some servers require.

    >>> make_alphas_integers({"lora_alpha": 16.0, "lora_dropout": 0.0, "alpha_pattern": {"q": 8.0, "v": 0.5}})
    {'lora_alpha': 16, 'lora_dropout': 0.0, 'alpha_pattern': {'q': 8, 'v': 0.5}}
    """
    changed = {key: _to_integer(value) for key, value in form.items() if key in ("alpha", "lora_alpha")}
    if isinstance(patterns := form.get("alpha_pattern"), Mapping):
        changed["alpha_pattern"] = {key: _to_integer(value) for key, value in patterns.items()}
    return {**form, **changed}


def _to_integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
