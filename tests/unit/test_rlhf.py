"""The verb rlhf: three ordinary runs in one folder, resumable at any point, with a report of what each gained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from luthier.api.evaluate import evaluate
from luthier.api.rlhf import plan_stages, rlhf
from luthier.cli.main import main
from luthier.core.errors import RecipeError
from luthier.training.run_folder import Run
from tiny import save_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rlhf")
    save_tiny(folder / "base", "llama", dtype=torch.float32, num_hidden_layers=1)
    pairs = [{"prompt": f"p{i}?", "chosen": "a" * (1 + i % 3), "rejected": "zz" * (1 + i % 2)} for i in range(12)]
    for name, rows in (("sft", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]),
                       ("pairs", pairs), ("prompts", [{"prompt": row["prompt"]} for row in pairs]),
                       ("held", [{"prompt": "new?"}, {"prompt": "newer?"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)))
    rlhf(recipe(folder), output_dir=str(folder / "whole"), quiet=True)
    return folder


def recipe(home: Path) -> dict[str, Any]:
    brief = {"max_steps": 3, "batch_size": 4, "save_steps": 1}
    return {
        "model": str(home / "base"), "method": {"name": "lora", "rank": 2}, "optimizer": {"learning_rate": 0.01},
        "evaluate": {"before_training": False}, "training": brief,
        "sft": {"data": str(home / "sft.jsonl")},
        "reward": {"data": {"train": str(home / "pairs.jsonl"), "test": str(home / "pairs.jsonl")}},
        "ppo": {"data": {"train": str(home / "prompts.jsonl"), "test": str(home / "held.jsonl")},
                "objective": {"num_generations": 2, "max_new_tokens": 4, "num_mini_batches": 2}, "training": {"batch_size": 2}},
    }


def test_three_runs_and_a_report(home: Path) -> None:
    folder = home / "whole"
    report = json.loads((folder / "report.json").read_text())
    assert report["reward"]["metric"] == "rewards/accuracies"
    assert [report[stage]["steps"] for stage in ("sft", "reward", "ppo")] == [3, 3, 3]
    assert report["policies"].keys() == {"base", "start", "tuned"}
    assert report["policies"]["start"]["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(report["policies"]["tuned"]["kl"]) > 1e-5
    rewards = {round(one["reward"], 6) for one in report["policies"].values()}
    assert len(rewards) == 3
    assert "| after PPO |" in (folder / "report.md").read_text()
    assert (folder / "rlhf.png").stat().st_size > 5000
    ppo = Run(folder / "3-ppo")
    assert ppo.recipe["init_from"] == str(folder / "1-sft")
    assert ppo.recipe["objective"]["reward"][0]["model"] == str(folder / "2-reward")
    assert ppo.recipe["training"]["batch_size"] == 2
    assert ppo.recipe["training"]["max_steps"] == 3


def test_evaluate_says_what_the_policy_earns(home: Path) -> None:
    found = evaluate(home / "whole" / "3-ppo", quiet=True)
    report = json.loads((home / "whole" / "report.json").read_text())
    assert found["reward"] == pytest.approx(report["policies"]["tuned"]["reward"], rel=1e-4)


@pytest.mark.parametrize(("stage", "at"), [("2-reward", 1), ("3-ppo", 2)])
def test_it_goes_on_where_it_was_interrupted(home: Path, tmp_path: Path, stage: str, at: int) -> None:
    folder = home / f"killed-{stage}-{at}"
    made = recipe(home)
    shutil.copytree(home / "whole", folder)
    for file in folder.rglob("recipe.yaml"):  # the stages name one another
        file.write_text(file.read_text().replace(str(home / "whole"), str(folder)))
    later = [name for name in ("1-sft", "2-reward", "3-ppo") if name > stage]
    for name in later:
        shutil.rmtree(folder / name)
    (folder / stage / "README.md").unlink()
    for place in (folder / stage / "checkpoints").glob("step-*"):
        if int(place.name[5:]) > at:
            shutil.rmtree(place)
    earlier = {f: f.stat().st_mtime_ns for n in ("1-sft", "2-reward") if n < stage for f in (folder / n).glob("*")}
    rlhf(made, output_dir=str(folder), quiet=True)
    for name in ("1-sft", "2-reward", "3-ppo"):
        file = Path(name) / "adapter_model.safetensors"
        assert (folder / file).read_bytes() == (home / "whole" / file).read_bytes(), name
    assert all(f.stat().st_mtime_ns == before for f, before in earlier.items())
    policies = [json.loads((home / name / "report.json").read_text())["policies"] for name in ("whole", folder.name)]
    assert policies[0] == policies[1]
    shutil.rmtree(folder)


def test_the_command_prints_what_came_out(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rlhf", str(home / "recipe.yaml"), "--output-dir", str(home / "whole"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["policies"]["tuned"]["reward"]


@pytest.mark.parametrize(("change", "words"), [
    ({"ppo": None}, ["parts sft, reward and ppo"]),
    ({"trainng": {}}, ["did you mean 'training'"]),
    ({"sft": {"data": "x", "training": {"max_stepz": 3}}, "ppo": {"data": "x", "objective": {"klcoef": 3}}},
     ["sft:", "'training.max_stepz'", "did you mean 'max_steps'", "ppo:", "did you mean 'kl_coef'"]),
])
def test_all_faults_come_at_once(home: Path, change: dict[str, Any], words: list[str]) -> None:
    raw = {key: value for key, value in (recipe(home) | change).items() if value is not None}
    with pytest.raises(RecipeError) as caught:
        rlhf(raw, quiet=True)
    for word in words:
        assert word in str(caught.value)


def test_settings_are_laid_over_one_part_or_all(home: Path) -> None:
    folder, made = plan_stages(recipe(home), {"ppo.objective.kl_coef": 0.7, "seed": 3, "output_dir": "there"})
    assert folder == Path("there")
    assert [one.seed for one in made.values()] == [3, 3, 3]
    assert made["ppo"].model_dump()["objective"]["kl_coef"] == 0.7


def test_the_shipped_recipe_is_whole() -> None:
    folder, made = plan_stages(ROOT / "recipes" / "rlhf.yaml", {})
    assert list(made) == ["sft", "reward", "ppo"]
    for one in made.values():
        for source in filter(None, (*one.data.train, one.data.test)):
            assert (ROOT / source.path).is_file(), source  # type: ignore[union-attr]
    assert folder
