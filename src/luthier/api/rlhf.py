"""The verb `rlhf`: SFT, then a reward model, then PPO, three runs in one folder. Read `api/train.py` first.

    run/1-sft/  run/2-reward/  run/3-ppo/  run/report.json  run/report.md  run/rlhf.png

Each is an ordinary run. PPO starts from the first and its rewards come from the second, all on one copy of the base.
The same command continues an interrupted run: finished stages are kept, a started stage is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from luthier import assembly
from luthier.api.run import Run
from luthier.api.train import Interrupted, train
from luthier.assembly.consent import list_code, require_consent
from luthier.assembly.policy_evaluation import evaluate_policies
from luthier.assembly.python_rows import accepts_python_values
from luthier.assembly.recipe import Recipe
from luthier.core.consent import accepts_consent
from luthier.core.consent import allow_code as allow_code_of
from luthier.core.errors import RecipeError, suggest_nearest
from luthier.reporting.plots import plot_rlhf
from luthier.training.run_lock import lock_run

STAGES = {"sft": "1-sft", "reward": "2-reward", "ppo": "3-ppo"}
ROLES = {"base": "bare base", "start": "after SFT", "tuned": "after PPO"}


@accepts_python_values
@accepts_consent
def rlhf(recipe: str | Path | Mapping[str, Any], *, quiet: bool = False, allow_code: Sequence[str] = (),
         **settings: Any) -> Run:
    """Run the stages of a recipe that are not finished yet. Returns the folder, with `report.json` and `.md`.

    Args:
        recipe: a YAML file or a mapping with the parts `sft`, `reward` and `ppo`; other settings (base, method, data,
            seed, ...) are the defaults of every part; `output_dir` is the folder.
        allow_code: files, modules, URLs or base models whose code the recipe may run (`core/consent.py`).
        settings: they override it; ``ppo.objective.kl_coef`` in one part, ``model.name_or_path`` in all.

    Raises:
        RecipeError: with all errors of all parts, before the first one starts.
    """
    folder, stages = plan_stages(recipe, settings)
    trusted = [code.name for one in stages.values() for code in list_code(one)]
    with lock_run(Run(folder)), allow_code_of(trusted):
        for stage, one in stages.items():
            path = folder / STAGES[stage]
            if not quiet:
                print(f"stage {stage}: {path}", flush=True)
            try:
                train(one, resume=(path / "recipe.yaml").exists(), quiet=quiet)
            except Interrupted as error:
                error.remedy = "run the same command again to continue"
                raise
        return _write_report(Run(folder), stages, quiet)


def plan_stages(recipe: str | Path | Mapping[str, Any],
                settings: Mapping[str, Any]) -> tuple[Path, dict[str, Recipe]]:
    """The folder, and the recipe of every stage."""
    raw = dict(recipe) if isinstance(recipe, Mapping) else _read_recipe(Path(recipe))
    stem = "rlhf" if isinstance(recipe, Mapping) else Path(recipe).stem
    parts = {stage: dict(raw.pop(stage)) for stage in STAGES if stage in raw}
    folder = Path(str(settings.get("output_dir") or raw.get("output_dir") or Path("runs") / stem))
    if not {"sft", "ppo"} <= parts.keys():
        raise RecipeError("a recipe of rlhf has the parts sft, reward and ppo, each with its data and training",
                          f"see recipes/rlhf.yaml; this one has {', '.join([*parts, *raw]) or 'nothing'}")
    unknown = [key for key in raw if key not in Recipe.model_fields]
    if unknown:
        raise RecipeError(f"unknown setting {unknown[0]!r}",
                          suggest_nearest(unknown[0], [*STAGES, *Recipe.model_fields]))
    shared = {key: value for key, value in raw.items() if key != "output_dir"}
    stages: dict[str, Recipe] = {}
    faults = []
    for stage, part in parts.items():
        over = {key: value for key, value in settings.items() if key.partition(".")[0] not in (*STAGES, "output_dir")}
        over |= {key.removeprefix(f"{stage}."): value for key, value in settings.items() if key.startswith(f"{stage}.")}
        part = {**part, "objective": _build_stage_objective(stage, part.get("objective", {}), folder,
                                                            "reward" in parts),
                "output_dir": str(folder / STAGES[stage])}
        if stage == "ppo":
            first = assembly.dump_recipe(stages["sft"]) if "sft" in stages else {}
            part = {"model": first.get("model", "-"), "method": first.get("method", "lora"), **part,
                    "init_from": str(folder / STAGES["sft"])}
        try:
            one = assembly.build_recipe(shared, {**part, **over})
            stages[stage] = require_consent(one, {**shared, **part, **over} if isinstance(recipe, Mapping) else over)
        except RecipeError as error:
            faults.append(f"{stage}:\n  " + error.what.replace("\n", "\n  "))
    if faults:
        raise RecipeError("\n".join(faults), "fix the settings named above; `luthier schema` prints all settings")
    return folder, stages


def _build_stage_objective(stage: str, objective: Any, folder: Path, rewarded: bool) -> dict[str, Any]:
    """The stage's objective as a mapping; PPO's default reward is the run of the second stage."""
    named = {"name": objective} if isinstance(objective, str) else {"name": stage, **objective}
    if stage == "ppo" and rewarded:
        named = {"reward": {"model": str(folder / STAGES["reward"])}, **named}
    return named


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"the recipe {str(path)!r} cannot be read: {error}", "give a YAML file") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"the recipe {str(path)!r} holds a {type(raw).__name__}, not parts", "see recipes/rlhf.yaml")
    return raw


# ---------------------------------------------------------------- the report


def _write_report(folder: Run, stages: Mapping[str, Recipe], quiet: bool) -> Run:
    """Write the results of every stage as JSON, Markdown and a plot."""
    runs = {stage: Run(folder.path / STAGES[stage]) for stage in stages}
    report: dict[str, Any] = {stage: {key: run.results.get(key) for key in
                                    ("metric", "before", "after", "measured_on", "examples", "steps", "train_seconds",
                                     "peak_memory_gb")}
                            for stage, run in runs.items()}
    report["policies"] = evaluate_policies(runs["ppo"])
    folder.write("report.json", report)
    folder.write("report.md", _format_report(report))
    policies = report["policies"]
    plot_rlhf(runs["ppo"].metrics, {ROLES[role]: one["reward"] for role, one in policies.items()},
              policies["tuned"]["prompts"], folder.path / "rlhf.png")
    if not quiet:
        print(f"the report is {folder.path / 'report.md'}", flush=True)
    return folder


def _format_report(report: Mapping[str, Any]) -> str:
    policies = report["policies"]
    summary = ", ".join(f"{_format_value(one['reward'])} {ROLES[role]}" for role, one in policies.items())
    lines = ["# Results of each stage", "", f"Mean reward: {summary}.", "",
             "| stage | measure | before | after | steps | seconds |",
             "|---|---|---|---|---|---|"]
    for stage in (stage for stage in STAGES if stage in report):
        one = report[stage]
        scores = f"{_format_value(one['before'])} | {_format_value(one['after'])}"
        lines.append(f"| {stage} | {one['metric'] or ''} | {scores} | "
                     f"{one['steps']} | "
                     f"{_format_value(one['train_seconds'])} |")
    rows = report["ppo"].get("measured_on") or "training"
    lines += ["",
              f"On {_format_value(report['policies']['tuned']['prompts'])} {rows} prompts of PPO, one sampled answer "
              "to each with a fixed seed:", "",
              "| policy | mean reward | KL from the policy after SFT, nats per answer | tokens per answer |",
              "|---|---|---|---|"]
    lines += [f"| {ROLES[role]} | {_format_value(one['reward'])} | {_format_value(one.get('kl'))} | "
              f"{_format_value(one['completion_length'])} |"
              for role, one in report["policies"].items()]
    return "\n".join([*lines, "", "![reward and KL](rlhf.png)", ""])


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value if value is not None else "")
