"""The files that Sentence Transformers needs to load a folder: pooling, normalization, length. Read `task_heads.py`
first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier.core.errors import BaseError
from luthier.models.task_heads import Pooling

POOLING = "1_Pooling/config.json"
MODES: dict[str, Pooling] = {"cls": "first", "mean": "mean", "lasttoken": "last"}  # by Sentence Transformers' names
OLD_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "lasttoken",
             "pooling_mode_max_tokens": "max", "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
             "pooling_mode_weightedmean_tokens": "weightedmean"}


def write_sentence_files(path: Path, hidden: int, pooling: Pooling, *, max_length: int | None = None,
                         normalize: bool = False) -> None:
    """Write them next to a model or an adapter.

    Args:
        hidden: width of a state.
        max_length: maximum number of tokens of a text; None: that of the tokenizer.
        normalize: whether embeddings are L2-normalized.
    """
    mode = next(name for name, known in MODES.items() if known == pooling)
    modules = [("", "Transformer"), (POOLING.partition("/")[0], "Pooling")]
    modules += [("2_Normalize", "Normalize")] * normalize
    for folder, _ in modules:
        (path / folder).mkdir(exist_ok=True)
    _write_json(path / POOLING, {"word_embedding_dimension": hidden,
                            **{old: name == mode for old, name in OLD_MODES.items()}})
    _write_json(path / "modules.json", [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (folder, kind) in enumerate(modules)])
    if max_length is not None:
        _write_json(path / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
        _write_json(path / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_pooling(path: Path) -> Pooling:
    """The pooling of the encoder in a folder: that of Sentence Transformers' file, otherwise the first token."""
    if not (path / POOLING).is_file():
        return "first"
    settings = json.loads((path / POOLING).read_text(encoding="utf-8"))
    named = settings.get("pooling_mode") or [mode for old, mode in OLD_MODES.items() if settings.get(old)] or "mean"
    modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in MODES:
        raise BaseError(f"{path / POOLING}: pooling by {' and '.join(modes)}; known are {', '.join(MODES)}",
                        "set model.pooling to last, first or mean")
    return MODES[modes[0]]
