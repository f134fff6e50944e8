"""A stored file is never consent to run code: each verb, with each kind of code that a stranger's run can name.

Read `core/consent.py` and `assembly/consent.py` first. Whatever runs leaves a mark, which must not be there; with the
consent of the call it must be there, so that no test passes because nothing would have run anyway.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import luthier
from luthier.api.chat import open_chat
from luthier.api.inspect_run import inspect_run
from luthier.assembly.multi_adapter_loading import load_served_models
from luthier.cli.main import main
from luthier.core.consent import allow_code, is_allowed
from luthier.core.errors import BaseError, LuthierError, RecipeError, RunError
from luthier.models.model_folder import list_weight_files
from luthier.training.run_folder import Run
from tiny import save_tiny

MARK = Path("mark")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained SFT run and a trained GRPO run, before a stranger has changed them."""
    home = tmp_path_factory.mktemp("made")
    save_tiny(home / "base", "llama", dtype=torch.float32)
    rows = [{"prompt": f"Say {word}.", "completion": word * 2} for word in ("one", "two", "six", "ten")]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {"model": str(home / "base"), "data": {"train": str(home / "rows.jsonl"), "test": str(home / "rows.jsonl")},
              "training": {"max_steps": 1, "batch_size": 2, "save_steps": 1}}
    luthier.train(shared | {"output_dir": str(home / "sft")}, quiet=True)
    luthier.train(shared | {"output_dir": str(home / "grpo"), "objective": {
        "name": "grpo", "reward": "contains", "max_new_tokens": 2, "num_generations": 2}}, quiet=True)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "home")
    for run in ("sft", "grpo"):  # the copy has the paths of this home
        for name in ("recipe.yaml", "adapter_config.json"):
            file = tmp_path / "home" / run / name
            file.write_text(file.read_text().replace(str(made), str(tmp_path / "home")))
        (tmp_path / "home" / run / "results.json").write_text(
            json.dumps({k: v for k, v in Run(tmp_path / "home" / run).results.items() if k != "digests"}))
    monkeypatch.chdir(tmp_path / "home")
    module = (f"open({str(tmp_path / 'home' / 'mark')!r}, 'w').close()\n"
              "def f(prompts, completions, metadata): return [1.0] * len(prompts)\n")
    for name in ("rewards", module_name(tmp_path / "home")):
        (tmp_path / "home" / f"{name}.py").write_text(module)
    return tmp_path / "home"


def module_name(home: Path) -> str:
    """A module that Python has not imported for an earlier test."""
    return "rewards_" + hashlib.sha256(str(home).encode()).hexdigest()[:12]


@pytest.fixture
def endpoint(home: Path) -> Iterator[str]:
    """A reward endpoint that leaves the mark when it is called."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            (home / "mark").touch()
            answer = json.dumps({"rewards": [1.0] * len(body["prompts"])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/reward"
    server.shutdown()


def change(run: str, **changed: Any) -> str:
    """A stranger's edit of a stored recipe; the run is unfinished, so that it can be resumed."""
    file = Path(run) / "recipe.yaml"
    raw = yaml.safe_load(file.read_text())
    for key, value in changed.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    file.write_text(yaml.safe_dump(raw))
    (Path(run) / "README.md").unlink(missing_ok=True)
    shutil.rmtree(Path(run) / "checkpoints", ignore_errors=True)
    return run


def bring_code() -> str:
    """The base brings Python files that leave the mark when they are imported. Returns its name."""
    base = Path("base").absolute()
    for name in ("configuration_mine.py", "modeling_mine.py"):
        (base / name).write_text(
            f"open({str(MARK.absolute())!r}, 'w').close()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class MyConfig(LlamaConfig): pass\n"
            "class MyModel(LlamaForCausalLM): config_class = MyConfig\n")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (base / "config.json").write_text(json.dumps(config))
    for run in ("sft", "grpo"):  # the stranger made the run with this base, so its digests are right
        file = Path(run) / "recipe.yaml"
        raw = yaml.safe_load(file.read_text())
        raw["model"]["trust_remote_code"] = True
        raw["provenance"].pop("base", None)
        file.write_text(yaml.safe_dump(raw))
    return str(base)


VERBS: dict[str, Callable[[str], Any]] = {
    "evaluate": lambda run: luthier.evaluate(run, quiet=True),
    "evaluate --data": lambda run: luthier.evaluate(run, data="rows.jsonl", quiet=True),
    "chat": lambda run: list(open_chat(run, quiet=True, max_new_tokens=2)[0].say("Say one.")),
    "serve": lambda run: load_served_models({"one": run}),
    "export merged": lambda run: luthier.export(run, out="merged"),
    "export adapter": lambda run: luthier.export(run, "adapter", out="adapter"),
    "inspect": lambda run: inspect_run(run, quiet=True),
    "features": lambda run: luthier.extract_features(run, "labeled.jsonl", quiet=True),
    "train from it": lambda run: luthier.train(init_from=run, data="rows.jsonl", output_dir="next", quiet=True,
                                               **{"training.max_steps": 1}),
}
RESUME: dict[str, Callable[[str], Any]] = {
    "resume": lambda run: luthier.train(Path(run) / "recipe.yaml", resume=True, quiet=True),
    "retrain": lambda run: luthier.train(Path(run) / "recipe.yaml", output_dir="next", quiet=True),
    "compare": lambda run: luthier.compare_methods(Path(run) / "recipe.yaml", ["bitfit"], out="next", quiet=True),
    "plan": lambda run: luthier.plan(Path(run) / "recipe.yaml", ["bitfit"], out="next", quiet=True),
    "command line": lambda run: main(["train", "--resume", run, "--quiet"]) and _fail_as_the_command_line_does(),
}


def _fail_as_the_command_line_does() -> None:
    raise RecipeError("the command ended with an error, which it has printed")


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["file", "module", "url"])
def test_commands_that_use_a_run_work_without_its_rewards(home: Path, endpoint: str, verb: str, kind: str) -> None:
    reward = {"file": {"function": "rewards.py:f"}, "module": {"function": f"{module_name(home)}:f"}, "url": {"url": endpoint}}[kind]
    Path("labeled.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}\n')
    run = change("grpo", objective__reward=[reward])
    if verb == "train from it":
        Path("rows.jsonl").write_text('{"prompt": "Say one.", "completion": "one"}\n')
    VERBS[verb](run)
    assert not MARK.exists()


@pytest.mark.parametrize("kind", ["file", "url"])
def test_evaluate_computes_a_reward_that_the_call_allows(home: Path, endpoint: str, kind: str,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    reward, name = {"file": ({"function": "rewards.py:f"}, "rewards.py"), "url": ({"url": endpoint}, endpoint)}[kind]
    run = change("grpo", objective__reward=[reward])
    assert "reward" not in luthier.evaluate(run)
    assert f"--allow-code {name}" in capsys.readouterr().err
    assert luthier.evaluate(run, quiet=True, allow_code=[name])["reward"] == 1.0
    assert MARK.exists()


@pytest.mark.parametrize("verb", RESUME)
@pytest.mark.parametrize("kind", ["file", "module", "url"])
def test_training_by_a_stored_recipe_needs_consent(home: Path, endpoint: str, verb: str, kind: str) -> None:
    reward, name = {"file": ({"function": f"{home}/rewards.py:f"}, "rewards.py"),  # a run stores absolute paths
                    "module": ({"function": f"{module_name(home)}:f"}, module_name(home)), "url": ({"url": endpoint}, endpoint)}[kind]
    run = change("grpo", objective__reward=[{"function": "contains"}, reward])
    with pytest.raises(LuthierError) as refused:
        RESUME[verb](run)
    if verb != "command line":
        assert "objective.reward.1" in refused.value.what
        assert "--allow-code" in refused.value.remedy
    assert not MARK.exists()
    assert not Path("next").exists(), "nothing is written before the refusal"
    with allow_code("other.py"), pytest.raises(LuthierError):
        RESUME[verb](run)
    with allow_code(name):
        if verb not in ("compare", "plan"):  # those are tried below: they start a process for each training
            RESUME[verb](run)
            assert MARK.exists()


@pytest.mark.parametrize("verb", ["compare", "plan"])
def test_consent_reaches_the_processes_that_a_call_starts(home: Path, verb: str) -> None:
    run = change("grpo", objective__reward=[{"function": "rewards.py:f"}])
    with allow_code(["rewards.py"]):
        RESUME[verb](run)
    assert MARK.exists()


def test_the_call_itself_may_name_the_code(home: Path) -> None:
    run = change("grpo", objective__reward=[{"function": "rewards.py:f"}])
    Path("mine.yaml").write_text((Path(run) / "recipe.yaml").read_text())
    luthier.train("mine.yaml", output_dir="next", quiet=True, **{"objective.reward": "rewards.py:f"})
    assert MARK.exists()
    MARK.unlink()
    raw = yaml.safe_load(Path("mine.yaml").read_text())
    raw.pop("provenance")
    luthier.train(raw | {"output_dir": "after"}, quiet=True)  # a mapping in Python is an argument of the call
    assert MARK.exists() or Path("after/results.json").exists()


def test_rlhf_needs_consent_for_every_part(home: Path) -> None:
    shared = {"model": "base", "data": "rows.jsonl", "training": {"max_steps": 1, "batch_size": 2}}
    Path("mine.yaml").write_text(yaml.safe_dump(shared | {
        "sft": {}, "ppo": {"objective": {"reward": "rewards.py:f", "max_new_tokens": 2, "num_generations": 2}},
        "output_dir": "next"}))
    from luthier.api.rlhf import rlhf
    with pytest.raises(RecipeError, match="would run that Python code"):
        rlhf("mine.yaml", quiet=True)
    assert not Path("next").exists()
    rlhf("mine.yaml", quiet=True, allow_code=["rewards.py"])
    assert MARK.exists()


# ---------------------------------------------------------------- the base's own code


@pytest.mark.parametrize("verb", VERBS)
def test_a_bases_own_code_needs_consent(home: Path, verb: str) -> None:
    """The base is of a known architecture, so it is loaded by Transformers' own class."""
    Path("labeled.jsonl").write_text('{"text": "one", "label": "a"}\n{"text": "two", "label": "b"}\n')
    base = bring_code()
    if verb == "train from it":
        with pytest.raises(RecipeError, match="would run Python files"):
            VERBS[verb]("sft")
    else:
        VERBS[verb]("sft")
    assert not MARK.exists()
    with allow_code(base):
        shutil.rmtree("merged", ignore_errors=True)
        shutil.rmtree("adapter", ignore_errors=True)
        VERBS[verb]("sft")
    assert MARK.exists()


@pytest.mark.parametrize("verb", ["resume", "retrain", "compare", "plan"])
def test_training_with_a_bases_own_code_needs_consent(home: Path, verb: str) -> None:
    base = bring_code()
    change("sft")
    with pytest.raises(RecipeError, match="would run Python files of the base") as refused:
        RESUME[verb]("sft")
    assert f"--allow-code {base}" in refused.value.remedy
    assert not MARK.exists()


def test_a_base_of_an_unknown_architecture_is_refused_with_the_consent_that_it_needs(home: Path) -> None:
    base = bring_code()
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    with pytest.raises(BaseError, match="needs its own Python code") as refused:
        luthier.evaluate("sft", quiet=True)
    assert f"--allow-code {base}" in refused.value.remedy
    assert not MARK.exists()


# ---------------------------------------------------------------- paths


def test_a_stored_recipe_reads_no_other_file_of_the_user(home: Path) -> None:
    Path("secret.jsonl").write_text('{"prompt": "password?", "completion": "1234"}\n')
    run = change("sft", data__test={"path": str(home / "secret.jsonl")})
    with pytest.raises(RunError, match="not recorded"):
        luthier.evaluate(run, quiet=True)
    assert luthier.evaluate(run, data="secret.jsonl", quiet=True)["examples"] == 1
    run = change("sft", data__train=[{"path": str(home / "secret.jsonl")}])
    with pytest.raises(RunError, match=r"not recorded|another recipe"):
        luthier.train(Path(run) / "recipe.yaml", resume=True, quiet=True)


def test_rows_that_have_changed_since_are_not_mixed_into_a_run(home: Path) -> None:
    luthier.evaluate("sft", quiet=True)
    with Path("rows.jsonl").open("a") as file:
        file.write('\n{"prompt": "Say more.", "completion": "more"}\n')
    with pytest.raises(RunError, match="has changed since"):
        luthier.evaluate("sft", quiet=True)
    assert luthier.evaluate("sft", data="rows.jsonl", quiet=True)["examples"] == 5
    (Path("sft") / "README.md").unlink()
    with pytest.raises(RunError, match="has changed since"):
        luthier.train("sft/recipe.yaml", resume=True, quiet=True)


def test_a_run_is_resumed_in_the_folder_that_is_named(home: Path) -> None:
    file = Path("sft/recipe.yaml")
    raw = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(raw | {"output_dir": str(home / "elsewhere")}))
    (Path("sft") / "README.md").unlink()
    assert luthier.train("sft/recipe.yaml", resume=True, quiet=True).path == Path("sft")
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "a/b.safetensors"])
def test_an_index_names_files_of_its_own_folder_only(home: Path, name: str) -> None:
    (home / "base" / "model.safetensors").rename(home / "outside.safetensors")
    (home / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(BaseError, match="as a weight file"):
        list_weight_files(home / "base")
    with pytest.raises(BaseError, match="as a weight file"):
        luthier.evaluate("base", data="rows.jsonl", quiet=True)


# ---------------------------------------------------------------- consent itself


def test_consent_ends_with_the_call_and_stays_in_its_thread() -> None:
    seen = []
    with allow_code("a.py"):
        assert is_allowed("a.py")
        assert is_allowed(str(Path("a.py").absolute()))
        assert not is_allowed("b.py")
        thread = threading.Thread(target=lambda: seen.append(is_allowed("a.py")))
        thread.start()
        thread.join()
        with allow_code(["b.py"]):
            assert is_allowed("b.py")
        assert not is_allowed("b.py")
    assert seen == [False]
    assert not is_allowed("a.py")
