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

COMPARED = 3  # answers shown side by side after a training
REFUSED = 10  # rows named one by one after a data check


class Speaker(Protocol):
    """Whatever answers: a conversation of the verb `chat`."""

    def say(self, text: str) -> Iterator[str]: ...


def as_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def say(line: str) -> None:
    """A word to the user that is no result."""
    print(line, file=sys.stderr)


def ask() -> str | None:
    """A line from the user without outer space; None at the end of the input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives `input` a history and an editable line
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def table(values: Mapping[str, Any], json_wanted: bool) -> int:
    """Names and values."""
    if json_wanted:
        as_json(values)
        return 0
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {_number(value)}")
    return 0


def sections(found: Mapping[str, Mapping[str, Any]], json_wanted: bool) -> int:
    """Names and values under headings."""
    if json_wanted:
        as_json(found)
        return 0
    for title, values in found.items():
        print(title)
        for name, value in values.items():
            inner = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else _number(value)
            print(f"  {name:<14} {inner}")
    return 0


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def written(folder: Path, name: str, json_wanted: bool) -> int:
    """What a verb wrote as `name`.json, .md and .png: a comparison, a plan."""
    if json_wanted:
        print((folder / f"{name}.json").read_text(encoding="utf-8"))
        return 0
    print((folder / f"{name}.md").read_text(encoding="utf-8"))
    print(f"written: {', '.join(str(file) for file in sorted(folder.glob(f'{name}.*')))}")
    return 0


# ---------------------------------------------------------------- train


def trained(run: Path, results: Mapping[str, Any], json_wanted: bool) -> int:
    """What a training came to, some answers before and after, and what to try next."""
    if json_wanted:
        as_json({"run": str(run), **results})
        return 0
    console = Console()
    shown = _side_by_side(run, str(results.get("metric", "")))
    if shown:
        console.print(shown)
    for name, value in _summary(run, results):
        print(f"{name:<11} {value}")
    print("\nnext:")
    for line in _next(run, results):
        print(f"  {line}")
    return 0


def _summary(run: Path, results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", str(run)
    if "after" in results:
        before = f"{results['before']:.4g} -> " if results.get("before") is not None else ""
        rows = f"{results['examples']} {_measured_on(results)} rows"
        yield str(results["metric"]), f"{before}{results['after']:.4g}  ({rows})"
    part = _measured_on(results)
    if "perplexity" in (tested := results.get(part) or {}) and results.get("metric") != "perplexity":
        before = f"{results[f'{part}_before']['perplexity']:.4g} -> " if f"{part}_before" in results else ""
        yield "perplexity", f"{before}{tested['perplexity']:.4g}  ({results['examples']} {part} rows)"
    elif perplexity := (results.get("best") or {}).get("eval_perplexity"):
        yield "perplexity", f"{perplexity:.4g} at step {int(results['best']['step'])}  (validation rows)"
    share = f"{results['trainable']:,} of {results['parameters']:,} parameters ({results['trainable_fraction']:.2%})"
    yield "trained", share
    yield "time", f"{results['train_seconds']:.4g} s for {results['steps']} steps, {results['train_tokens']:,} tokens"
    yield "memory", f"{results['peak_memory_gb']:.3g} GB at most"
    yield "file", f"{results['file_bytes'] / 1e6:.3g} MB"
    if results.get("stopped"):
        yield "stopped", str(results["stopped"])


def _measured_on(results: Mapping[str, Any]) -> str:
    """`test`, or `validation` where the rows are those that chose the checkpoint."""
    return str(results.get("measured_on", "test"))


def _next(run: Path, results: Mapping[str, Any]) -> Iterator[str]:
    adapter, whole = (_json(run / name) for name in ("adapter_config.json", "config.json"))
    classes = whole.get("architectures") or ()
    if adapter.get("task_type") == "CAUSAL_LM" or any(name.endswith("ForCausalLM") for name in classes):
        yield f"luthier chat {run}" + (" --compare" if adapter else "")
    yield f"luthier evaluate {run}" + ("" if "after" in results else " --data FILE")
    yield f"luthier export {run} --to merged"


def _json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _side_by_side(run: Path, metric: str) -> Table | None:
    """Up to three questions with the base's answer, the tuned model's and the right one."""
    before, after = _rows(run / "answers_before.jsonl"), _rows(run / "answers.jsonl")
    if not after:
        return None
    shown = Table(title=f"the first {min(COMPARED, len(after))} of {len(after)} answers ({metric})", show_lines=True)
    for title in ("asked", *(["base"] if before else []), "tuned", "right"):
        shown.add_column(title, overflow="fold")
    for index, row in enumerate(after[:COMPARED]):
        old = [before[index]["answer"]] if before else []
        shown.add_row(*(Text(_brief(words)) for words in (row["prompt"], *old, row["answer"], row["reference"])))
    return shown


def _rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _brief(words: str, most: int = 300) -> str:
    return words if len(words) <= most else words[:most - 4] + " ..."


# ---------------------------------------------------------------- chat


def answer(speakers: Sequence[Speaker], line: str) -> None:
    """The answer as it comes; of two speakers side by side, base and tuned."""
    if len(speakers) == 1:
        for bit in speakers[0].say(line):
            print(bit, end="", flush=True)
        print()
        return
    console = Console()
    said = [Text() for _ in speakers]
    shown = Table(show_lines=True, expand=console.is_terminal)
    for title in ("base", "tuned"):
        shown.add_column(title, ratio=1, overflow="fold")
    shown.add_row(*said)
    if not console.is_terminal:
        for text, speaker in zip(said, speakers, strict=True):
            text.append("".join(speaker.say(line)))
        console.print(shown)
        return
    with Live(shown, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for text, speaker in zip(said, speakers, strict=True):
            for bit in speaker.say(line):
                text.append(bit)
                live.refresh()


# ---------------------------------------------------------------- inspect


def inspected(found: Mapping[str, Any], json_wanted: bool) -> int:
    """Virtual tokens by their nearest words, and changed linear maps by size and rank."""
    if json_wanted:
        as_json(found)
        return 0
    for reading in found["readings"]:
        print(f"{found['method']}: {reading['about']}")
        shown = Table()
        for title in next(iter(reading["rows"])):
            shown.add_column(title, overflow="fold")
        for row in reading["rows"]:
            shown.add_row(*(Text(_cell(value)) for value in row.values()))
        Console().print(shown)
    if found["picture"]:
        print(f"written: {found['picture']}")
    return 0


def _cell(place: Any) -> str:
    """``'word' 0.12, 'other' 0.40 (size 1.1)`` for a virtual token; its size alone where there are no words."""
    if place is None:
        return "not known"
    if not isinstance(place, Mapping):
        return _number(place)
    words = ", ".join(f"{near['word']!r} {near['distance']:.2f}" for near in place["nearest"])
    return f"{words} (size {place['size']:.2g})" if words else f"size {place['size']:.2g}"


# ---------------------------------------------------------------- data check


def checked(report: Mapping[str, Any], lines: Iterable[str], previews: Sequence[Text], files: Sequence[Path],
            json_wanted: bool) -> int:
    """The report of a data check and some examples, what is trained in green or between brackets."""
    if json_wanted:
        as_json({**report, "files": files})
        return 0
    for line in lines:
        print(line)
    for name, part in report["parts"].items():
        for row in part["refused"][:REFUSED]:
            detail = f" ({row['detail']})" if row["detail"] else ""
            print(f"  {row['file']}:{row['line']}: {row['reason']}{detail}")
        if (more := sum(part["reasons"].values()) - REFUSED) > 0:
            print(f"  and {more} more that were refused")
        at = part["lengths"]
        print(f"{name}: tokens in an example: {at['min']:.0f} to {at['max']:.0f}, half up to {at['median']:.0f}, "
              f"99% up to {at['p99']:.0f}")
    console = Console()
    coloured = console.is_terminal and not console.no_color
    for number, text in enumerate(previews, 1):
        how = "green" if coloured else "between ⟦ and ⟧"
        print(f"\nexample {number} as the model meets it (trained: {how}):")
        console.print(text if coloured else _bracketed(text), soft_wrap=True)
    print("\nwritten: " + ", ".join(map(str, files)))
    return 0


def _bracketed(text: Text) -> Text:
    plain, at = "", 0
    for span in text.spans:
        if span.style == "green":
            plain += text.plain[at:span.start] + "⟦" + text.plain[span.start:span.end] + "⟧"
            at = span.end
    return Text(plain + text.plain[at:])
