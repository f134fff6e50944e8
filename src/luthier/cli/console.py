"""What the commands print: results on stdout, as tables for people or as JSON for programs. Read `cli/main.py`
first."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

MAX_SHOWN_ANSWERS = 3  # after a training, side by side
MAX_SHOWN_ROWS = 10  # rejected rows listed by a data check


class ChatSession(Protocol):
    """A conversation with a model, as `luthier.api.chat` opens it."""

    def say(self, text: str) -> Iterator[str]: ...


def print_json(value: Any) -> None:
    is_unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not is_unicode, default=str))


def print_notice(line: str) -> None:
    """Print a line that is not a result, to stderr."""
    print(line, file=sys.stderr)


def read_line() -> str | None:
    """One line of input, stripped; None at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives `input` a history and an editable line
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def print_table(values: Mapping[str, Any], as_json: bool) -> int:
    """Print names and values."""
    if as_json:
        print_json(values)
        return 0
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {_format_number(value)}")
    return 0


def print_sections(found: Mapping[str, Mapping[str, Any]], as_json: bool) -> int:
    """Print names and values under headings."""
    if as_json:
        print_json(found)
        return 0
    for title, values in found.items():
        print(title)
        for name, value in values.items():
            inner = (", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping)
                     else _format_number(value))
            print(f"  {name:<14} {inner}")
    return 0


def _format_number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_report(folder: Path, name: str, as_json: bool) -> int:
    """Print the report `name`.md or `name`.json of a folder: a comparison, a plan."""
    if as_json:
        print((folder / f"{name}.json").read_text(encoding="utf-8"))
        return 0
    print((folder / f"{name}.md").read_text(encoding="utf-8"))
    print(f"written: {', '.join(str(file) for file in sorted(folder.glob(f'{name}.*')))}")
    return 0


# ---------------------------------------------------------------- train


def print_training(run: Path, results: Mapping[str, Any], as_json: bool) -> int:
    """Print the results of a training, some answers before and after it, and the next commands."""
    if as_json:
        print_json({"run": str(run), **results})
        return 0
    console = Console()
    shown = _compare_answers(run, str(results.get("metric", "")))
    if shown:
        console.print(shown)
    for name, value in _list_results(run, results):
        print(f"{name:<11} {value}")
    print("\nnext:")
    for line in _list_next_commands(run, results):
        print(f"  {line}")
    return 0


def _list_results(run: Path, results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", str(run)
    if "after" in results:
        before = f"{results['before']:.4g} -> " if results.get("before") is not None else ""
        rows = f"{results['examples']} {_get_part(results)} rows"
        yield str(results["metric"]), f"{before}{results['after']:.4g}  ({rows})"
    part = _get_part(results)
    if "perplexity" in (measured := results.get(part) or {}) and results.get("metric") != "perplexity":
        before = f"{results[f'{part}_before']['perplexity']:.4g} -> " if f"{part}_before" in results else ""
        yield "perplexity", f"{before}{measured['perplexity']:.4g}  ({results['examples']} {part} rows)"
    elif perplexity := (results.get("best") or {}).get("eval_perplexity"):
        yield "perplexity", f"{perplexity:.4g} at step {int(results['best']['step'])}  (validation rows)"
    share = f"{results['trainable']:,} of {results['parameters']:,} parameters ({results['trainable_fraction']:.2%})"
    yield "trained", share
    yield "time", f"{results['train_seconds']:.4g} s for {results['steps']} steps, {results['train_tokens']:,} tokens"
    yield "memory", f"{results['peak_memory_gb']:.3g} GB at most"
    yield "file", f"{results['file_bytes'] / 1e6:.3g} MB"
    if results.get("stopped"):
        yield "stopped", str(results["stopped"])


def _get_part(results: Mapping[str, Any]) -> str:
    """`test`, or `validation` where the rows also chose the checkpoint."""
    return str(results.get("measured_on", "test"))


def _list_next_commands(run: Path, results: Mapping[str, Any]) -> Iterator[str]:
    adapter, model = (_read_json(run / name) for name in ("adapter_config.json", "config.json"))
    classes = model.get("architectures") or ()
    if adapter.get("task_type") == "CAUSAL_LM" or any(name.endswith("ForCausalLM") for name in classes):
        yield f"luthier chat {run}" + (" --compare" if adapter else "")
    yield f"luthier evaluate {run}" + ("" if "after" in results else " --data FILE")
    yield f"luthier export {run} --to merged"


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _compare_answers(run: Path, metric: str) -> Table | None:
    """A table of up to three prompts: the answers of the base and of the tuned model, and the reference."""
    before, after = _read_rows(run / "answers_before.jsonl"), _read_rows(run / "answers.jsonl")
    if not after:
        return None
    shown = Table(title=f"the first {min(MAX_SHOWN_ANSWERS, len(after))} of {len(after)} answers ({metric})",
                  show_lines=True)
    for title in ("prompt", *(["base"] if before else []), "tuned", "reference"):
        shown.add_column(title, overflow="fold")
    for index, row in enumerate(after[:MAX_SHOWN_ANSWERS]):
        old = [before[index]["answer"]] if before else []
        shown.add_row(*(Text(_shorten(text)) for text in (row["prompt"], *old, row["answer"], row["reference"])))
    return shown


def _read_rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _shorten(text: str, max_length: int = 300) -> str:
    return text if len(text) <= max_length else text[:max_length - 4] + " ..."


# ---------------------------------------------------------------- chat


def stream_answer(sessions: Sequence[ChatSession], line: str) -> None:
    """Print the answer while it is generated; of two sessions (base and tuned) side by side."""
    if len(sessions) == 1:
        for delta in sessions[0].say(line):
            print(delta, end="", flush=True)
        print()
        return
    console = Console()
    answers = [Text() for _ in sessions]
    shown = Table(show_lines=True, expand=console.is_terminal)
    for title in ("base", "tuned"):
        shown.add_column(title, ratio=1, overflow="fold")
    shown.add_row(*answers)
    if not console.is_terminal:
        for text, session in zip(answers, sessions, strict=True):
            text.append("".join(session.say(line)))
        console.print(shown)
        return
    with Live(shown, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for text, session in zip(answers, sessions, strict=True):
            for delta in session.say(line):
                text.append(delta)
                live.refresh()


# ---------------------------------------------------------------- inspect


def print_inspection(found: Mapping[str, Any], as_json: bool) -> int:
    """Print virtual tokens with their nearest vocabulary tokens, and changed linear layers with size and rank."""
    if as_json:
        print_json(found)
        return 0
    for reading in found["readings"]:
        print(f"{found['method']}: {reading['about']}")
        shown = Table()
        for title in next(iter(reading["rows"])):
            shown.add_column(title, overflow="fold")
        for row in reading["rows"]:
            shown.add_row(*(Text(_format_cell(value)) for value in row.values()))
        Console().print(shown)
    if found["plot"]:
        print(f"written: {found['plot']}")
    return 0


def _format_cell(value: Any) -> str:
    """A cell of a table; of a virtual token ``'cat' 0.12, 'dog' 0.40 (size 1.1)``, or its size alone."""
    if value is None:
        return "unknown"
    if not isinstance(value, Mapping):
        return _format_number(value)
    nearest = ", ".join(f"{near['word']!r} {near['distance']:.2f}" for near in value["nearest"])
    return f"{nearest} (size {value['size']:.2g})" if nearest else f"size {value['size']:.2g}"


# ---------------------------------------------------------------- data check


def print_data_check(report: Mapping[str, Any], lines: Iterable[str], previews: Sequence[Text], files: Sequence[Path],
                     as_json: bool) -> int:
    """Print the report of a data check and some examples; trained text is green, or between brackets."""
    if as_json:
        print_json({**report, "files": files})
        return 0
    for line in lines:
        print(line)
    for name, part in report["parts"].items():
        for row in part["refused"][:MAX_SHOWN_ROWS]:
            detail = f" ({row['detail']})" if row["detail"] else ""
            print(f"  {row['file']}:{row['line']}: {row['reason']}{detail}")
        if (more := sum(part["reasons"].values()) - MAX_SHOWN_ROWS) > 0:
            print(f"  and {more} more rejected rows")
        lengths = part["lengths"]
        print(f"{name}: tokens per example: {lengths['min']:.0f} to {lengths['max']:.0f}, median "
              f"{lengths['median']:.0f}, 99th percentile {lengths['p99']:.0f}")
    console = Console()
    colored = console.is_terminal and not console.no_color
    for number, text in enumerate(previews, 1):
        how = "green" if colored else "between ⟦ and ⟧"
        print(f"\nexample {number} as the model reads it (trained text: {how}):")
        console.print(text if colored else _add_brackets(text), soft_wrap=True)
    print("\nwritten: " + ", ".join(map(str, files)))
    return 0


def _add_brackets(text: Text) -> Text:
    plain, end = "", 0
    for span in text.spans:
        if span.style == "green":
            plain += text.plain[end:span.start] + "⟦" + text.plain[span.start:span.end] + "⟧"
            end = span.end
    return Text(plain + text.plain[end:])
