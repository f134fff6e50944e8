"""The commands: what each is for, what it takes, and which verb it calls. Read `cli/main.py` first.

One function a command, and one entry in `COMMANDS`. Verbs are imported where they are called, so that --help is quick.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.cli import console
from luthier.core.errors import LuthierError, RecipeError, nearest


def _only(options: argparse.Namespace, what: str) -> str:
    """The one word that a command was given besides settings."""
    if len(options.words) != 1:
        raise RecipeError(f"luthier {options.command} takes one {what}, not {len(options.words)}",
                          f"see: luthier {options.command} --help")
    return str(options.words[0])


def _train(options: argparse.Namespace) -> int:
    from luthier.api.train import train
    if len(options.words) > 1:
        raise RecipeError(f"luthier train takes one recipe, not {len(options.words)}: {' '.join(options.words)}",
                          "settings are written key=value")
    source = options.words[0] if options.words else None
    folder = options.run or options.settings.get("run")
    if options.resume and (source is None or not Path(source).is_file()):
        folder = source or folder
        if folder is None:
            raise RecipeError("--resume: which run?", "luthier train --resume RUN")
        source = _recorded(Path(folder))
    named = {"base.name": options.model, "data": options.data, "method": options.method, "objective": options.objective,
             "run": str(folder) if folder else None}
    run = train(source, resume=options.resume, quiet=options.quiet, base_model=options.base_model,
                **{key: value for key, value in named.items() if value is not None} | options.settings)
    return console.trained(run.path, run.results, options.json)


def _recorded(folder: Path) -> str:
    if not (folder / "recipe.yaml").exists():
        raise RecipeError(f"there is no run in {str(folder)!r} to go on with (no recipe.yaml)",
                          "name the folder of a run that was started")
    return str(folder / "recipe.yaml")


def _demo(options: argparse.Namespace) -> int:
    from importlib.resources import as_file, files

    from luthier.api.train import train
    if options.words:
        raise RecipeError(f"luthier demo takes settings (key=value) only, not {options.words[0]!r}",
                          "train on your own rows: luthier train --data FILE")
    with as_file(files("luthier") / "demo") as folder:
        shipped = {"data.train": str(folder / "train.jsonl"), "data.test": str(folder / "test.jsonl"),
                   "run": options.run}
        run = train(folder / "recipe.yaml", quiet=options.quiet, **shipped | options.settings)
    return console.trained(run.path, run.results, options.json)


def _evaluate(options: argparse.Namespace) -> int:
    from luthier.api.evaluate import evaluate
    results = evaluate(_only(options, "run"), data=options.data, metrics=options.metric, limit=options.limit,
                       base=options.base, max_new_tokens=options.max_new_tokens, quiet=options.quiet,
                       base_model=options.base_model, **options.settings)
    shown = results if options.json else {name: value for name, value in results.items() if name != "rows"}
    return console.table(shown, options.json)


def _chat(options: argparse.Namespace) -> int:
    from luthier.api.chat import open_chat
    talks = open_chat(options.run, compare=options.compare, system=options.system, temperature=options.temperature,
                      max_new_tokens=options.max_new_tokens, quiet=options.quiet, base_model=options.base_model)
    if options.message is not None:
        console.answer(talks, options.message)
        return 0
    console.say("/reset forgets the conversation, /exit ends it")
    while (line := console.ask()) is not None and line != "/exit":
        if line == "/reset":
            for talk in talks:
                talk.reset()
        elif line:
            try:
                console.answer(talks, line)
            except LuthierError as error:  # a conversation that outgrew the context can be reset
                console.say(f"error: {error}")
    return 0


def _paraphrase(options: argparse.Namespace) -> int:
    from luthier.api.paraphrase import ASK, paraphrase
    return console.table(paraphrase(options.file, options.column, options.out, model=options.model,
                                   ask=options.ask or ASK, limit=options.limit, temperature=options.temperature,
                                   seed=options.seed, max_new_tokens=options.max_new_tokens, quiet=options.quiet,
                                   base_model=options.base_model),
                        options.json)


def _serve(options: argparse.Namespace) -> int:
    from luthier.api.serve import serve
    serve(options.runs, host=options.host, port=options.port, most=options.batch_size, quiet=options.quiet,
          base_model=options.base_model)
    return 0


def _data(options: argparse.Namespace) -> int:
    from luthier.api.data_check import check_data
    if options.words[:1] != ["check"]:
        given = f" {options.words[0]!r}" if options.words else ""
        raise RecipeError(f"luthier data has no command{given}", f"{nearest((options.words or [''])[0], ['check'])}: "
                          "luthier data check FILE")
    if len(options.words) != 2:
        raise RecipeError("luthier data check takes one file", "luthier data check FILE [key=value ...]")
    found = check_data(options.words[1], model=options.model, evaluated=options.eval, settings=options.settings,
                       out=options.out, quiet=options.quiet)
    return console.checked(found.report.to_json(), found.report.lines(), found.previews,
                          (found.report_file, found.plot_file), options.json)


def _rlhf(options: argparse.Namespace) -> int:
    from luthier.api.rlhf import rlhf
    named = {"run": options.run} if options.run else {}
    folder = rlhf(_only(options, "recipe"), quiet=options.quiet or options.json, **named | options.settings)
    report = json.loads((folder.path / "report.json").read_text(encoding="utf-8"))
    shown = {f"reward {role}": one["reward"] for role, one in report["policies"].items()}
    return console.table({"folder": str(folder.path), **(report if options.json else shown)}, options.json)


def _merge(options: argparse.Namespace) -> int:
    from luthier.api.export import export
    written = export(options.run, "merged", options.out, base_model=options.base_model)
    return console.table({"folder": str(written), **_dtype_of(written)}, options.json)


def _export(options: argparse.Namespace) -> int:
    from luthier.api.export import export
    rank = options.lora_rank  # a word that is no number is refused by `export`
    written = export(options.run, options.to, options.out, options.dtype,
                     int(rank) if rank and rank.isdecimal() else rank, base_model=options.base_model)
    return console.table({"folder" if written.is_dir() else "file": str(written), **_dtype_of(written)}, options.json)


def _dtype_of(written: Path) -> dict[str, str]:
    """What an exported model's weights are stored in."""
    config = written / "config.json"
    return {"dtype": json.loads(config.read_text(encoding="utf-8")).get("dtype", "")} if config.is_file() else {}


def _features(options: argparse.Namespace) -> int:
    from luthier.api.features import features, fit_linear_probe
    base, out = _only(options, "base or run"), Path(options.out) if options.out else None
    if options.probe != (options.test is not None):
        raise RecipeError("a probe is measured on rows that it has not seen, so --probe and --test belong together",
                          "luthier features BASE --data FILE --probe --test FILE")
    if not (out or options.probe):
        raise RecipeError("the features would go nowhere", "name a file with --out, or ask for --probe")
    states, labels = features(base, options.data, out=out, quiet=options.quiet, base_model=options.base_model,
                              **options.settings)
    shown: dict[str, Any] = {"file": str(out)} if out else {}
    shown |= {"rows": len(states), "size": states.shape[1]}
    if options.probe:
        test = out and out.with_name(f"{out.stem}-test{out.suffix}")
        shown |= fit_linear_probe(states, labels, *features(base, options.test, out=test, quiet=options.quiet,
                                                  base_model=options.base_model, **options.settings))
    return console.table(shown, options.json)


def _inspect(options: argparse.Namespace) -> int:
    from luthier.api.inspect_run import inspect_run
    return console.inspected(inspect_run(options.run, quiet=options.quiet, base_model=options.base_model), options.json)


def _combine(options: argparse.Namespace) -> int:
    from luthier.api.merge_adapters import merge_adapters
    return console.table(merge_adapters(options.runs, options.out, weights=options.weights, how=options.how,
                                rank=options.rank, base_model=options.base_model), options.json)


def _compare(options: argparse.Namespace) -> int:
    from luthier.api.compare import compare
    run = compare(_only(options, "recipe"), options.methods.split(","), general=options.general, out=options.out,
                  quiet=options.quiet, **options.settings)
    return console.written(run.path, "comparison", options.json)


def _plan(options: argparse.Namespace) -> int:
    from luthier.api.plan import WAYS, plan
    if len(options.words) > 1:
        raise RecipeError(f"luthier plan takes one recipe, not {len(options.words)}: {' '.join(options.words)}",
                          "settings are written key=value")
    named = {"base.name": options.model, "data": options.data, "objective": options.objective}
    run = plan(options.words[0] if options.words else None, options.methods.split(",") if options.methods else WAYS,
               out=options.out, quiet=options.quiet,
               **{key: value for key, value in named.items() if value is not None} | options.settings)
    return console.written(run.path, "plan", options.json)


def _doctor(options: argparse.Namespace) -> int:
    from luthier.api.doctor import doctor
    return console.sections(doctor(), options.json)


def _schema(options: argparse.Namespace) -> int:
    from luthier.api.schema import schema
    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0


# ---------------------------------------------------------------- what there is

Argument = tuple[tuple[str, ...], dict[str, Any]]


@dataclass(frozen=True)
class Command:
    """One command: what it is for, what it takes, what it does."""

    help: str
    run: Callable[[argparse.Namespace], int]
    arguments: tuple[Argument, ...] = ()


def _option(*flags: str, **described: Any) -> Argument:
    return flags, described


QUIET = _option("--quiet", action="store_true", help="no progress on the terminal")
JSON = _option("--json", action="store_true", help="print JSON and nothing else")
BASE_MODEL = _option("--base-model", metavar="PATH",
                     help="where the base is now, if it was moved; must be the base that the run was trained on")
RUN = _option("--run", metavar="DIR", help="the run folder to make")

COMMANDS: dict[str, Command] = {
    "train": Command("fine-tune a base and leave a run folder", _train, (
        _option("words", nargs="*", metavar="RECIPE.yaml | key=value", help="a recipe, and settings laid over it"),
        _option("--model", metavar="BASE", help="alias, folder, .gguf file or hub id (base.name)"),
        _option("--data", metavar="FILE", help="rows to train on (data.train)"),
        _option("--method", help="which parameters train (method.name); a wrong name lists them all"),
        _option("--objective", help="what is minimised (objective.name); a wrong name lists them all"),
        RUN, _option("--resume", action="store_true", help="go on with the run named, from its newest checkpoint"),
        BASE_MODEL, QUIET, JSON)),
    "rlhf": Command("SFT, then a reward model, then PPO: three runs in one folder, and what each gained", _rlhf, (
        _option("words", nargs="*", metavar="RECIPE.yaml | key=value",
                help="a recipe with the parts sft, reward and ppo; given again, it goes on where it was interrupted"),
        RUN, QUIET, JSON)),
    "evaluate": Command("measure a run on its test rows, or on others", _evaluate, (
        _option("words", nargs="*", metavar="RUN | key=value", help="a run folder, and settings laid over its recipe"),
        _option("--data", metavar="FILE", help="rows to measure on; left out: the recipe's"),
        _option("--metric", action="append", default=[], help="score of generated answers; may be given several times"),
        _option("--limit", type=int, metavar="N", help="only the first N rows"),
        _option("--base", action="store_true", help="measure the bare base instead"),
        _option("--max-new-tokens", type=int, metavar="N", help="longest answer"),
        BASE_MODEL, QUIET, JSON)),
    "chat": Command("talk with a run or a base", _chat, (
        _option("run", metavar="RUN", help="a run folder, or a base"),
        _option("--compare", action="store_true", help="the base's and the tuned model's answers side by side"),
        _option("--message", metavar="TEXT", help="say this, print the answer and end"),
        _option("--system", metavar="TEXT", help="system prompt"),
        _option("--temperature", type=float, default=0.0, help="0 (as it comes): always the most probable word"),
        _option("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer"),
        BASE_MODEL, QUIET)),
    "serve": Command("answer by OpenAI's protocol: a base, or several runs on one copy of it", _serve, (
        _option("runs", nargs="+", metavar="RUN | NAME=RUN", help="run folders of one base, or a base"),
        _option("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in"),
        _option("--port", type=int, default=8000),
        _option("--batch-size", type=int, default=16, metavar="N", help="requests answered together"),
        BASE_MODEL, QUIET)),
    "data": Command("`data check FILE`: what would become of every row", _data, (
        _option("words", nargs="*", metavar="check FILE | key=value", help="`check`, a file, and settings of `data`"),
        _option("--model", metavar="BASE", help="whose tokenizer and chat template; left out: smollm2"),
        _option("--eval", metavar="FILE", help="rows to evaluate on: are some of them in FILE too?"),
        _option("--out", metavar="DIR", help="where the report and the picture go"), QUIET, JSON)),
    "paraphrase": Command("rows said anew by a model, or translated there and back: more rows to train on",
                          _paraphrase, (
        _option("file", metavar="FILE", help="rows with a column of texts"),
        _option("--column", required=True, metavar="NAME", help="whose words change; the rest of a row is kept"),
        _option("--out", required=True, metavar="FILE", help="the .jsonl file to make"),
        _option("--model", default="smollm2", metavar="BASE | RUN", help="who says it anew"),
        _option("--ask", action="append", metavar="TEXT",
                help="the request, with {text} where the words go; given twice: the second asks about what came back"),
        _option("--limit", type=int, metavar="N", help="only the first N rows"),
        _option("--temperature", type=float, default=0.0, help="0 (as it comes): always the most probable word"),
        _option("--seed", type=int, default=0), _option("--max-new-tokens", type=int, default=128, metavar="N"),
        BASE_MODEL, QUIET, JSON)),
    "export": Command("write a run as a folder or file for other tools", _export, (
        _option("run", metavar="RUN", help="a run folder"),
        _option("--to", choices=("merged", "whole", "adapter", "gguf", "gguf-adapter"), default="merged",
                help="one model; the base with the adapter in its folder; PEFT's adapter files; for llama.cpp a file "
                     "of the one model, or of the LoRA alone"),
        _option("--dtype", choices=("float32", "bfloat16", "float16", "q8_0"),
                help="of the weights; default: as the base's files store them; for gguf float16"),
        _option("--lora-rank", metavar="N | auto",
                help="write the adapter as a plain LoRA of one rank and one alpha, for servers that read no patterns"),
        _option("--out", metavar="PATH", help="the folder or file to write; left out: inside the run's"),
        BASE_MODEL, JSON)),
    "merge": Command("fold what was trained into the base and write the model: export --to merged", _merge, (
        _option("run", metavar="RUN", help="a run folder"),
        _option("--out", metavar="DIR", help="the folder to write; left out: `merged` inside the run's"), BASE_MODEL,
        JSON)),
    "features": Command("keep a frozen base's state of every row in a file, for a model on top", _features, (
        _option("words", nargs="*", metavar="BASE | RUN | key=value", help="a base or a run, and settings"),
        _option("--data", metavar="FILE", required=True, help="texts or pictures, with a label each"),
        _option("--out", metavar="FILE", help="a .safetensors file; one that is there already is not computed again"),
        _option("--probe", action="store_true", help="fit a linear classifier on them (scikit-learn)"),
        _option("--test", metavar="FILE", help="rows to measure the probe on"), BASE_MODEL, QUIET, JSON)),
    "inspect": Command("show what a run learned: virtual tokens as words, LoRA's changes by size and rank", _inspect, (
        _option("run", metavar="RUN", help="a run folder, or an adapter of PEFT"), BASE_MODEL, QUIET, JSON)),
    "compare": Command("train one recipe with many methods and set what they gave and cost side by side", _compare, (
        _option("words", nargs="*", metavar="RECIPE.yaml | key=value", help="a recipe, and settings laid over it"),
        _option("--methods", required=True, metavar="A,B,A+B,A@nf4",
                help="ways to train; a+b is both together, lora@nf4 (or qlora) on a base in four bits"),
        _option("--general", metavar="FILE", help="rows of other text, for what was forgotten"),
        _option("--out", metavar="DIR", help="the folder for the runs and the comparison"), QUIET, JSON)),
    "plan": Command("try a few steps of each way to train, and say which fit this machine and this data", _plan, (
        _option("words", nargs="*", metavar="RECIPE.yaml | key=value", help="a recipe, and settings laid over it"),
        _option("--model", metavar="BASE", help="alias, folder, .gguf file or hub id (base.name)"),
        _option("--data", metavar="FILE", help="rows to train on (data.train)"),
        _option("--objective", help="what is minimised (objective.name)"),
        _option("--methods", metavar="A,B,A+B,A@nf4", help="ways to try; left out: the common ones"),
        _option("--out", metavar="DIR", help="the folder for the plan"), QUIET, JSON)),
    "combine": Command("several LoRA runs of one base into one", _combine, (
        _option("runs", nargs="+", metavar="RUN", help="run folders"),
        _option("--weights", nargs="+", type=float, default=[], metavar="W", help="one for each run; left out: 1"),
        _option("--how", choices=("sum", "concatenation", "svd"), default="sum",
                help="sum and concatenation are exact; svd brings the sum to a rank"),
        _option("--rank", type=int, metavar="R", help="of the result, for svd"),
        _option("--out", metavar="DIR", required=True, help="the run folder to make"), BASE_MODEL, JSON)),
    "demo": Command("train the embedded base on the embedded rows: a few minutes on a laptop", _demo, (
        _option("words", nargs="*", metavar="key=value", help="settings laid over the demo's recipe"),
        RUN, QUIET, JSON)),
    "doctor": Command("tell what this machine has", _doctor, (JSON,)),
    "schema": Command("print the JSON schema of a recipe", _schema),
}
