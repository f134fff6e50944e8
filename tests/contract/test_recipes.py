"""The recipes run on a machine without the hub, by the commands of `recipes/README.md`, each for one step on a tiny base."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from luthier.assembly.recipe import build_recipe
from luthier.cli.main import main
from luthier.training.run_folder import Run
from tiny import save_tiny

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\| `[\w.-]+` \| `luthier (train [^`]+)` \|$", PAGE, re.M)
SHORT = ["training.max_steps=1", "training.batch_size=4", "data.max_samples=24", "evaluate.max_new_tokens=2", "evaluate.max_samples=4",
         "data.max_length=192", "--quiet"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    small = {"dtype": torch.float32, "max_position_embeddings": 512}
    save_tiny(folder / "smollm2", "llama", **small)
    save_tiny(folder / "minilm", "bert", **small)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    subprocess.run([sys.executable, str(ROOT / "recipes/make_rows.py"), "rows"], cwd=folder, check=True, capture_output=True)
    return folder


def test_every_recipe_has_a_command_without_the_hub() -> None:
    named = {Path(shlex.split(command)[1]).name for command in COMMANDS} | {"demo.yaml", "rlhf.yaml"}
    assert named == {path.name for path in (ROOT / "recipes").glob("*.yaml")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recipe_runs_on_made_rows(home: Path, command: str, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(home)
    words = shlex.split(command)
    if not any(word.startswith("output_dir=") for word in words):
        words.append(f"output_dir=runs/{Path(words[1]).stem}")
    short = [word for word in SHORT if not (word.startswith("evaluate") and "metrics" not in (ROOT / words[1]).read_text())]
    if "grpo" in command:
        short += ["objective.max_new_tokens=2", "objective.num_generations=2"]
    assert main([*words, *short]) == 0, capsys.readouterr().err
    run = Run(home / next(word for word in words if word.startswith("output_dir=")).partition("=")[2])
    parts = json.loads((run.path / "data_report.json").read_text())["parts"]
    assert all(part["kept"] > 0 for part in parts.values())
    assert run.results["steps"] == 1


def test_made_rows_are_the_same_at_every_call_and_right() -> None:
    made = runpy.run_path(str(ROOT / "recipes/make_rows.py"))
    for name in made["FILES"]:
        assert list(made["make_rows"](name)) == list(made["make_rows"](name))
    for row in made["make_rows"]("gsm8k"):
        first, second, lost = map(int, re.findall(r"\d+", row["question"]))
        assert row["answer"].endswith(f"#### {first * second - lost}")
    train = {row["question"] for row in made["make_rows"]("gsm8k")}
    assert len([row for row in made["make_rows"]("gsm8k_test") if row["question"] not in train]) > 80


def test_hub_recipes_parse_and_name_data_sets_of_the_hub() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        if path.name == "rlhf.yaml":
            continue
        recipe = build_recipe(path)
        for source in recipe.data.train:
            assert path.name == "demo.yaml" or re.fullmatch(r"[\w-]+/[\w.-]+", source.path), source.path


def test_nothing_that_users_meet_needs_this_workshop() -> None:
    tracked = subprocess.run(["git", "ls-files", "README*", "CONTRIBUTING.md", "docs", "recipes", "src", "examples", "Makefile",
                              "benchmarks/*.py"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    files: list[Path] = [ROOT / name for name in tracked] or [*ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/*"), ROOT / "README.md"]
    found: list[Any] = [path for path in files if path.is_file() and path.suffix in (".md", ".py", ".yaml", "")
                        and "../shared" in path.read_text(encoding="utf-8", errors="replace")]
    assert found == []


def test_rows_of_the_package_are_where_the_recipes_name_them() -> None:
    for name in ("demo.yaml", "rlhf.yaml"):
        text = yaml.safe_dump(yaml.safe_load((ROOT / "recipes" / name).read_text()))
        for path in re.findall(r"src/[\w/.]+\.jsonl", text):
            assert (ROOT / path).is_file()
