"""The commands: what each is for, its arguments, and the function of `luthier.api` it calls. Read `cli/main.py` first.

One function and one entry in `COMMANDS` for each command. The functions of `luthier.api` are imported where they are
called, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.cli import console
from luthier.core.errors import LuthierError, RecipeError, suggest_nearest


def _get_only_positional(options: argparse.Namespace, what: str) -> str:
    """The single positional argument of a command that takes settings besides it."""
    if len(options.positionals) != 1:
        raise RecipeError(f"luthier {options.command} takes one {what}, not {len(options.positionals)}",
                          f"see: luthier {options.command} --help")
    return str(options.positionals[0])


def _get_optional_recipe(options: argparse.Namespace) -> str | None:
    """The recipe of a command that also runs without one."""
    if len(options.positionals) > 1:
        raise RecipeError(f"luthier {options.command} takes one recipe, not {len(options.positionals)}: "
                          f"{' '.join(options.positionals)}", "settings are written key=value")
    return str(options.positionals[0]) if options.positionals else None


def _merge_settings(options: argparse.Namespace, **named: Any) -> dict[str, Any]:
    """The options that were given, by the names of their recipe fields; settings written key=value win."""
    return {key: value for key, value in named.items() if value is not None} | options.settings


def _run_train(options: argparse.Namespace) -> int:
    from luthier.api.train import train
    source = _get_optional_recipe(options)
    folder = options.output_dir or options.settings.get("output_dir")
    if options.resume and (source is None or not Path(source).is_file()):
        folder = source or folder
        if folder is None:
            raise RecipeError("--resume needs a run folder", "luthier train --resume RUN")
        source = _find_saved_recipe(Path(folder))
    run = train(source, resume=options.resume, quiet=options.quiet, base_model=options.base_model, **_merge_settings(
        options, **{"model.name_or_path": options.model, "data": options.data, "method": options.method,
                    "objective": options.objective, "output_dir": str(folder) if folder else None}))
    return console.print_training(run.path, run.results, options.json)


def _find_saved_recipe(folder: Path) -> str:
    if not (folder / "recipe.yaml").exists():
        raise RecipeError(f"{str(folder)!r} is not a run folder (it has no recipe.yaml), so it cannot be resumed",
                          "give the folder of a run that was started")
    return str(folder / "recipe.yaml")


def _run_demo(options: argparse.Namespace) -> int:
    from importlib.resources import as_file, files

    from luthier.api.train import train
    if options.positionals:
        raise RecipeError(f"luthier demo takes settings (key=value) only, not {options.positionals[0]!r}",
                          "train on your own rows: luthier train --data FILE")
    with as_file(files("luthier") / "demo") as folder:
        embedded = {"data.train": str(folder / "train.jsonl"), "data.test": str(folder / "test.jsonl"),
                    "output_dir": options.output_dir}
        run = train(folder / "recipe.yaml", quiet=options.quiet, **embedded | options.settings)
    return console.print_training(run.path, run.results, options.json)


def _run_evaluate(options: argparse.Namespace) -> int:
    from luthier.api.evaluate import evaluate
    results = evaluate(_get_only_positional(options, "run"), data=options.data, metrics=options.metric,
                       max_samples=options.max_samples, base_model_only=options.base_model_only,
                       max_new_tokens=options.max_new_tokens, quiet=options.quiet, base_model=options.base_model,
                       **options.settings)
    shown = results if options.json else {name: value for name, value in results.items() if name != "rows"}
    return console.print_table(shown, options.json)


def _run_predict(options: argparse.Namespace) -> int:
    from luthier.api.predict import predict
    predictions = predict(_get_only_positional(options, "run"), options.data, out=options.out,
                          max_samples=options.max_samples, max_new_tokens=options.max_new_tokens or 256,
                          quiet=options.quiet, base_model=options.base_model, **options.settings)
    if options.out is None:
        for line in predictions:
            print(json.dumps(line, ensure_ascii=False))
        return 0
    wrong = sum("error" in line for line in predictions)
    return console.print_table({"file": options.out, "rows": len(predictions), "refused": wrong}, options.json)


def _run_chat(options: argparse.Namespace) -> int:
    from luthier.api.chat import open_chat
    sessions = open_chat(options.run, compare=options.compare, system=options.system,
                         temperature=options.temperature, max_new_tokens=options.max_new_tokens, quiet=options.quiet,
                         base_model=options.base_model)
    if options.message is not None:
        console.stream_answer(sessions, options.message)
        return 0
    console.print_notice("/reset clears the conversation, /exit ends it")
    while (line := console.read_line()) is not None and line != "/exit":
        if line == "/reset":
            for session in sessions:
                session.reset()
        elif line:
            try:
                console.stream_answer(sessions, line)
            except LuthierError as error:  # a conversation that no longer fits the context can be reset
                console.print_notice(f"error: {error}")
    return 0


def _run_paraphrase(options: argparse.Namespace) -> int:
    from luthier.api.paraphrase import PROMPT_TEMPLATE, paraphrase
    counts = paraphrase(options.file, options.column, options.out, model=options.model,
                        prompt_template=options.prompt_template or PROMPT_TEMPLATE, max_samples=options.max_samples,
                        temperature=options.temperature, seed=options.seed, max_new_tokens=options.max_new_tokens,
                        quiet=options.quiet, base_model=options.base_model)
    return console.print_table(counts, options.json)


def _run_serve(options: argparse.Namespace) -> int:
    from luthier.api.serve import serve
    serve(options.runs, host=options.host, port=options.port, max_num_seqs=options.max_num_seqs,
          api_key=options.api_key, prefix_cache_gb=options.prefix_cache_gb, quiet=options.quiet,
          base_model=options.base_model)
    return 0


def _run_data(options: argparse.Namespace) -> int:
    from luthier.api.data_check import check_data
    if options.positionals[:1] != ["check"]:
        given = f" {options.positionals[0]!r}" if options.positionals else ""
        hint = suggest_nearest((options.positionals or [""])[0], ["check"])
        raise RecipeError(f"luthier data has no command{given}", f"{hint}: luthier data check FILE")
    if len(options.positionals) != 2:
        raise RecipeError("luthier data check takes one file", "luthier data check FILE [key=value ...]")
    found = check_data(options.positionals[1], model=options.model, evaluated=options.eval, settings=options.settings,
                  out=options.out, quiet=options.quiet)
    return console.print_data_check(found.report.to_json(), found.report.lines(), found.previews,
                                    (found.report_file, found.plot_file), options.json)


def _run_rlhf(options: argparse.Namespace) -> int:
    from luthier.api.rlhf import rlhf
    folder = rlhf(_get_only_positional(options, "recipe"), quiet=options.quiet or options.json,
                  **_merge_settings(options, output_dir=options.output_dir or None))
    report = json.loads((folder.path / "report.json").read_text(encoding="utf-8"))
    shown = {f"reward {role}": one["reward"] for role, one in report["policies"].items()}
    return console.print_table({"folder": str(folder.path), **(report if options.json else shown)}, options.json)


def _run_merge(options: argparse.Namespace) -> int:
    from luthier.api.export import export
    written = export(options.run, "merged", options.out, base_model=options.base_model)
    return console.print_table({"folder": str(written), **_read_dtype(written)}, options.json)


def _run_export(options: argparse.Namespace) -> int:
    from luthier.api.export import export
    rank = options.lora_rank  # text that is not a number is refused by `export`
    written = export(options.run, options.to, options.out, options.dtype,
                     int(rank) if rank and rank.isdecimal() else rank, base_model=options.base_model)
    kind = "folder" if written.is_dir() else "file"
    return console.print_table({kind: str(written), **_read_dtype(written)}, options.json)


def _read_dtype(written: Path) -> dict[str, str]:
    """The dtype that an exported model's weights are stored in."""
    config = written / "config.json"
    return {"dtype": json.loads(config.read_text(encoding="utf-8")).get("dtype", "")} if config.is_file() else {}


def _run_features(options: argparse.Namespace) -> int:
    from luthier.api.features import extract_features, fit_linear_probe
    model = _get_only_positional(options, "model or run")
    out = Path(options.out) if options.out else None
    if options.probe != (options.test is not None):
        raise RecipeError("--probe and --test must be given together: a probe is evaluated on rows that it was not "
                          "fitted on",
                          "luthier features MODEL --data FILE --probe --test FILE")
    if not (out or options.probe):
        raise RecipeError("give --out or --probe; otherwise the features are not saved",
                          "give a file with --out, or give --probe and --test")
    states, labels = extract_features(model, options.data, out=out, quiet=options.quiet, base_model=options.base_model,
                                      **options.settings)
    shown: dict[str, Any] = {"file": str(out)} if out else {}
    shown |= {"rows": len(states), "size": states.shape[1]}
    if options.probe:
        test = out and out.with_name(f"{out.stem}-test{out.suffix}")
        shown |= fit_linear_probe(states, labels, *extract_features(model, options.test, out=test, quiet=options.quiet,
                                                 base_model=options.base_model, **options.settings))
    return console.print_table(shown, options.json)


def _run_inspect(options: argparse.Namespace) -> int:
    from luthier.api.inspect_run import inspect_run
    return console.print_inspection(inspect_run(options.run, quiet=options.quiet, base_model=options.base_model),
                                    options.json)


def _run_merge_adapters(options: argparse.Namespace) -> int:
    from luthier.api.merge_adapters import merge_adapters
    results = merge_adapters(options.runs, options.out, weights=options.weights,
                             combination_type=options.combination_type, rank=options.rank,
                             base_model=options.base_model)
    return console.print_table(results, options.json)


def _run_compare(options: argparse.Namespace) -> int:
    from luthier.api.compare import compare_methods
    run = compare_methods(_get_only_positional(options, "recipe"), options.methods.split(","),
                          retention_data=options.retention_data, out=options.out, quiet=options.quiet,
                          **options.settings)
    return console.print_report(run.path, "comparison", options.json)


def _run_plan(options: argparse.Namespace) -> int:
    from luthier.api.plan import WAYS, plan
    run = plan(_get_optional_recipe(options), options.methods.split(",") if options.methods else WAYS, out=options.out,
               quiet=options.quiet, **_merge_settings(options, **{
                   "model.name_or_path": options.model, "data": options.data, "objective": options.objective}))
    return console.print_report(run.path, "plan", options.json)


def _run_doctor(options: argparse.Namespace) -> int:
    from luthier.api.doctor import doctor
    return console.print_sections(doctor(), options.json)


def _run_schema(options: argparse.Namespace) -> int:
    from luthier.api.schema import schema
    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0


# ---------------------------------------------------------------- the table of commands

Argument = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class Command:
    """One command: its help, its function, its arguments."""

    help: str
    run: Callable[[argparse.Namespace], int]
    arguments: tuple[Argument, ...] = ()


def _option(*flags: str, **described: Any) -> Argument:
    return flags, described


QUIET = _option("--quiet", action="store_true", help="print no progress")
JSON = _option("--json", action="store_true", help="print JSON and nothing else")
BASE_MODEL = _option("--base-model", metavar="PATH",
                     help="the present path of the base model, if it was moved; must be the one the run was trained on")
ALLOW_CODE = _option("--allow-code", action="append", default=[], metavar="NAME",
                     help="let this Python file, module, URL or base model's code be used, which a stored file names; "
                          "may be repeated")
MODEL = _option("--model", metavar="MODEL", help="alias, folder, .gguf file or hub id (model.name_or_path)")
TRAIN_DATA = _option("--data", metavar="FILE", help="training rows (data.train)")
OBJECTIVE = _option("--objective", help="training objective (objective.name); an unknown name lists all of them")
RECIPE = _option("positionals", nargs="*", metavar="RECIPE.yaml | key=value",
                 help="a recipe, and settings that override it")
OUTPUT_DIR = _option("--output-dir", metavar="DIR", help="the run folder to create (output_dir)")
MAX_SAMPLES = _option("--max-samples", type=int, metavar="N", help="use only the first N rows")
TEMPERATURE = _option("--temperature", type=float, default=0.0,
                      help="sampling temperature; 0 (default) is greedy decoding")

COMMANDS: dict[str, Command] = {
    "train": Command("fine-tune a model and write a run folder", _run_train, (
        RECIPE, MODEL, TRAIN_DATA,
        _option("--method", help="training method (method.name); an unknown name lists all of them"),
        OBJECTIVE, OUTPUT_DIR,
        _option("--resume", action="store_true", help="continue a run from its newest checkpoint"),
        BASE_MODEL, ALLOW_CODE, QUIET, JSON)),
    "rlhf": Command("SFT, reward model and PPO: three runs in one folder, with a report of each stage's results",
                    _run_rlhf, (
        _option("positionals", nargs="*", metavar="RECIPE.yaml | key=value",
                help="a recipe with the parts sft, reward and ppo; run it again to continue where it was interrupted"),
        OUTPUT_DIR, ALLOW_CODE, QUIET, JSON)),
    "evaluate": Command("evaluate a run on its test rows, or on other rows", _run_evaluate, (
        _option("positionals", nargs="*", metavar="RUN | key=value",
                help="a run folder, and settings that override its recipe"),
        _option("--data", metavar="FILE", help="rows to evaluate on; default: the recipe's test rows"),
        _option("--metric", action="append", default=[], help="metric of generated answers; may be repeated"),
        MAX_SAMPLES, _option("--base-model-only", action="store_true", help="evaluate the base model without the run"),
        _option("--max-new-tokens", type=int, metavar="N", help="maximum length of an answer"),
        BASE_MODEL, ALLOW_CODE, QUIET, JSON)),
    "predict": Command("predict new rows: classes, numbers, rewards, embeddings or answers", _run_predict, (
        _option("positionals", nargs="*", metavar="RUN | key=value", help="a run folder, and settings of its recipe"),
        _option("--data", metavar="FILE", required=True, help="the rows; they need no labels"),
        _option("--out", metavar="FILE", help="a .jsonl file, or .npy for embeddings; default: print the predictions"),
        MAX_SAMPLES, _option("--max-new-tokens", type=int, metavar="N", help="maximum length of an answer"),
        BASE_MODEL, ALLOW_CODE, QUIET, JSON)),
    "chat": Command("chat with a run or a model", _run_chat, (
        _option("run", metavar="RUN", help="a run folder, or a model"),
        _option("--compare", action="store_true",
                help="print the base model's and the tuned model's answers side by side"),
        _option("--message", metavar="TEXT", help="send one message, print the answer and exit"),
        _option("--system", metavar="TEXT", help="system prompt"), TEMPERATURE,
        _option("--max-new-tokens", type=int, default=256, metavar="N", help="maximum length of an answer"),
        BASE_MODEL, ALLOW_CODE, QUIET)),
    "serve": Command("serve a model, or several runs on one copy of it, by the OpenAI protocol", _run_serve, (
        _option("runs", nargs="+", metavar="RUN | NAME=RUN", help="run folders with the same base model, or one model"),
        _option("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts other machines"),
        _option("--port", type=int, default=8000),
        _option("--max-num-seqs", type=int, default=16, metavar="N", help="requests that are decoded together"),
        _option("--api-key", metavar="KEY", help="key that clients must send; default: LUTHIER_API_KEY; required with "
                                                 "--host other than this machine"),
        _option("--prefix-cache-gb", type=float, default=0.5, metavar="GB",
                help="memory for prompts that begin like earlier ones"),
        BASE_MODEL, ALLOW_CODE, QUIET)),
    "data": Command("`data check FILE`: report how each row would be used", _run_data, (
        _option("positionals", nargs="*", metavar="check FILE | key=value",
                help="`check`, a file, and settings of `data`"),
        _option("--model", metavar="MODEL", help="model whose tokenizer and chat template are used; default: smollm2"),
        _option("--eval", metavar="FILE", help="evaluation rows, to find rows that are also in FILE"),
        _option("--out", metavar="DIR", help="folder for the report and the plot"), QUIET, JSON)),
    "paraphrase": Command("paraphrase or back-translate rows with a model, to train on more rows", _run_paraphrase, (
        _option("file", metavar="FILE", help="rows with a column of text"),
        _option("--column", required=True, metavar="NAME", help="the column to rewrite; other columns are kept"),
        _option("--out", required=True, metavar="FILE", help="the .jsonl file to create"),
        _option("--model", default="smollm2", metavar="MODEL | RUN", help="the model or run that rewrites"),
        _option("--prompt-template", action="append", metavar="TEXT",
                help="prompt with {text} in place of the text; given twice, the second is applied to the first answer"),
        MAX_SAMPLES, TEMPERATURE,
        _option("--seed", type=int, default=0), _option("--max-new-tokens", type=int, default=128, metavar="N"),
        BASE_MODEL, ALLOW_CODE, QUIET, JSON)),
    "export": Command("export a run for other tools", _run_export, (
        _option("run", metavar="RUN", help="a run folder"),
        _option("--to", choices=("merged", "bundle", "adapter", "gguf", "gguf-adapter"), default="merged",
                help="merged: one model; bundle: the base model with the adapter in one folder; adapter: PEFT's files "
                     "alone; gguf: the merged model for llama.cpp; gguf-adapter: the LoRA alone for llama.cpp"),
        _option("--dtype", choices=("float32", "bfloat16", "float16", "q8_0"),
                help="dtype of the weights; default: that of the base model's files; for gguf float16"),
        _option("--lora-rank", metavar="N | auto",
                help="write a plain LoRA with one rank and one alpha, for servers that do not support patterns"),
        _option("--out", metavar="PATH", help="the folder or file to create; default: inside the run folder"),
        BASE_MODEL, ALLOW_CODE, JSON)),
    "merge": Command("merge the trained weights into the base model: the same as export --to merged", _run_merge, (
        _option("run", metavar="RUN", help="a run folder"),
        _option("--out", metavar="DIR", help="the folder to create; default: `merged` inside the run folder"),
        BASE_MODEL, ALLOW_CODE, JSON)),
    "features": Command("write a frozen model's pooled state of each row to a file", _run_features, (
        _option("positionals", nargs="*", metavar="MODEL | RUN | key=value", help="a model or a run, and settings"),
        _option("--data", metavar="FILE", required=True, help="texts or images, each with a label"),
        _option("--out", metavar="FILE", help="a .safetensors file; an existing one is read, not computed again"),
        _option("--probe", action="store_true", help="fit a linear classifier on the states (scikit-learn)"),
        _option("--test", metavar="FILE", help="rows to evaluate the probe on"), BASE_MODEL, ALLOW_CODE, QUIET, JSON)),
    "inspect": Command("show what a run learned: nearest tokens of virtual tokens, size and rank of LoRA updates",
                       _run_inspect, (
        _option("run", metavar="RUN", help="a run folder, or a PEFT adapter"), BASE_MODEL, ALLOW_CODE, QUIET, JSON)),
    "compare": Command("train one recipe with several methods and report quality and cost of each", _run_compare, (
        RECIPE,
        _option("--methods", required=True, metavar="A,B,A+B,A@nf4",
                help="methods to train; a+b combines two, lora@nf4 (or qlora) quantizes the base model to four bits"),
        _option("--retention-data", metavar="FILE", help="unrelated rows, to measure what the model forgets"),
        _option("--out", metavar="DIR", help="folder for the runs and the comparison"), ALLOW_CODE, QUIET, JSON)),
    "plan": Command("dry run: estimate memory and time of several methods on this machine and data, and recommend "
                    "one", _run_plan, (
        RECIPE, MODEL, TRAIN_DATA, OBJECTIVE,
        _option("--methods", metavar="A,B,A+B,A@nf4", help="methods to measure; default: the common ones"),
        _option("--out", metavar="DIR", help="folder for the plan"), ALLOW_CODE, QUIET, JSON)),
    "merge-adapters": Command("merge several LoRA runs of one base model into one", _run_merge_adapters, (
        _option("runs", nargs="+", metavar="RUN", help="run folders"),
        _option("--weights", nargs="+", type=float, default=[], metavar="W", help="one for each run; default: 1"),
        _option("--combination-type", choices=("linear", "cat", "svd"), default="linear",
                help="linear and cat are exact; svd approximates the sum at a given rank"),
        _option("--rank", type=int, metavar="R", help="rank of the result, for svd"),
        _option("--out", metavar="DIR", required=True, help="the run folder to create"), BASE_MODEL, ALLOW_CODE, JSON)),
    "demo": Command("train the embedded model on the embedded rows: a few minutes on a laptop", _run_demo, (
        _option("positionals", nargs="*", metavar="key=value", help="settings that override the demo's recipe"),
        OUTPUT_DIR, QUIET, JSON)),
    "doctor": Command("print hardware, versions and optional packages", _run_doctor, (JSON,)),
    "schema": Command("print the JSON schema of a recipe", _run_schema),
}
