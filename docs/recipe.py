"""Writes `docs/recipe.md`: every setting of a recipe with its type, default and meaning, read off the config classes.

    PYTHONPATH=src python docs/recipe.py

A test holds the page against what this makes. Read `src/luthier/assembly/recipe.py` (Recipe) first.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from luthier.assembly import Recipe
from luthier.core.config import Config
from luthier.data import ChatConfig, DataConfig, ImageAugmentation, MixupAugmentation, Source, TextAugmentation
from luthier.evaluation.generation_eval import EvaluateConfig
from luthier.methods import METHODS
from luthier.models import ModelConfig
from luthier.models.surgery import SurgeryConfig
from luthier.objectives import OBJECTIVES
from luthier.objectives.rl_config import RewardSourceConfig
from luthier.training.loop import TrainingConfig
from luthier.training.optimizer import OptimizerConfig

PAGE = Path(__file__).with_suffix(".md")
SECTIONS: dict[str, type[Config]] = {
    "Top level": Recipe, "`model`": ModelConfig, "`model.surgery`": SurgeryConfig,
    **{f"`method`: {name}": config for name, config in METHODS.items()},
    **{f"`objective`: {name}": config for name, config in OBJECTIVES.items()},
    "`objective.reward` of ppo and grpo": RewardSourceConfig, "`data`": DataConfig, "a source of `data`": Source,
    "`data.chat`": ChatConfig,
    "`data.augment`: words": TextAugmentation, "`data.augment`: images": ImageAugmentation,
    "`data.augment`: mixup": MixupAugmentation,
    "`training`": TrainingConfig, "`optimizer`": OptimizerConfig, "`evaluate`": EvaluateConfig,
}
MEANT = {  # what no description in the code says
    "training": "length, batches, evaluation and checkpoints of the training",
    "optimizer": "AdamW and its schedule",
    "evaluate": "how generated answers are scored",
    "adam_beta1": "AdamW: decay of the moving average of gradients",
    "adam_beta2": "AdamW: decay of the moving average of squared gradients",
    "epsilon": "AdamW: added to the denominator",
}
HEAD = """# The recipe

<!-- Made by docs/recipe.py from the config classes; change them, not this page. -->

A recipe describes a whole run: as a YAML file, as a mapping in Python, or as settings on the command line. This page
lists every setting with its type, its default and its meaning. `luthier schema` prints the same as a JSON schema, for
editors.

```yaml
model: smollm2
method: {name: lora, rank: 16}
objective: sft
data: {train: mine.jsonl, eval: 0.05, max_length: 512}
training: {num_train_epochs: 2, batch_size: 8}
optimizer: {learning_rate: 2.0e-4, lr_scheduler_type: cosine}
evaluate: {metrics: [exact_match], max_samples: 100}
output_dir: runs/mine
```

Only `data` is required. Short forms: `model: smollm2` for `model: {name_or_path: smollm2}`, likewise `method` and
`objective`; `data: mine.jsonl` for `data: {train: mine.jsonl}`, where `train` may be a list, and each entry a path or
a source.

Settings on the command line override a recipe. They are written `key=value`, with dots for nested keys;
values are YAML:

```bash
luthier train recipes/demo.yaml method.rank=16 training.max_steps=20 'evaluate.metrics=[exact_match,contains]'
```

An unknown key is an error that suggests the most similar known key. All errors of a recipe are reported together. A
setting without an effect causes a warning. The run folder contains the recipe with the value of every setting.
"""
NOTES = {
    "`data`": "The column names of `columns`, and the formats: [data.md](data.md).",
    "`model`": "Quantized base models: [QLoRA](methods/lora.md#qlora-the-base-in-four-bits).",
    "`model.surgery`": "Examples: [adaptation](adaptation.md#change-the-structure).",
    "`objective.reward` of ppo and grpo": "Your own reward functions: [PPO](objectives/ppo.md#rewards).",
    "`training`": "`batch_size` affects the result. `max_tokens_per_micro_batch` affects only the "
                  "memory of a step.",
    "`evaluate`": "What each metric means: [metrics.md](metrics.md).",
}


def page() -> str:
    parts = [HEAD]
    for title, config in SECTIONS.items():
        parts += [f"## {title}\n", *([NOTES[title] + "\n"] if title in NOTES else []),
                  "| setting | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows(config)) + "\n"]
    return "\n".join(parts)


def rows(config: type[Config]) -> Iterator[str]:
    """One line of the table for each setting."""
    described = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)$", inspect.getdoc(config) or "", re.MULTILINE)
    told = {name: " ".join(words.split()) for name, words in described}
    for name, field in config.model_fields.items():
        meaning = field.description or told.get(name) or MEANT.get(name) or "selects this entry"
        default = "required" if field.is_required() else shown(field.get_default(call_default_factory=True))
        cells = (f"`{name}`", typed(field.annotation), default, meaning.rstrip("."))
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def shown(default: Any) -> str:
    """A default as YAML would have it."""
    if isinstance(default, Config):
        name = vars(default).get("name", vars(default).get("name_or_path"))
        return f"`{name}`" if name else "see its section"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, (tuple, dict)):
        return "empty" if not default else f"`{list(default)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def typed(annotation: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return typed(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(typed(part) for part in parts if part is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {typed(parts[0])}"
    if origin is not None:
        return f"{typed(parts[0])} to {typed(parts[1])}"
    if annotation is Any:
        return "anything"
    if issubclass(annotation, Config):
        return "source" if annotation is Source else "section"
    return {str: "text", int: "whole number", float: "number", bool: "yes or no"}[annotation]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
