"""The verb `paraphrase`: rows said anew by a model, as a file to train on beside the rows themselves.

    prompt_template  one request: the words in other words. Several: each answer is what the next one
                     asks about, such as a translation and the way back (Sennrich et al. 2016, arXiv:1511.06709,
                     section 3)

The answers depend on the base, the rows, the requests and the seed alone. A row whose words came back empty or
unchanged teaches nothing new, one whose answer was cut off teaches half sentences: both are left out and counted. Read
`chat.py` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from luthier import assembly
from luthier.assembly.factory import PromptFormat, encode_chat_prompt
from luthier.assembly.run_io import open_run
from luthier.core.errors import DataError, RecipeError, RunError
from luthier.core.examples import Message
from luthier.core.protocols import Family, SamplingParams
from luthier.reporting.progress import Progress, print_line, status
from luthier.training.run_folder import Run

PROMPT_TEMPLATE = "Say this in other words, in the same language:\n{text}"


def paraphrase(file: str, column: str, out: Path | str, *, model: Run | Path | str = "smollm2",
               prompt_template: Sequence[str] | str = PROMPT_TEMPLATE, max_samples: int | None = None,
               temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 128, batch_size: int = 16,
               quiet: bool = False, base_model: str | None = None) -> dict[str, Any]:
    """Write the rows of a file with one column said anew. Returns what became of them: rows read, written, unchanged,
    empty, cut off (an answer longer than `max_new_tokens`), unreadable.

    Args:
        column: whose words change; all others are kept as they are.
        out: a `.jsonl` file to make; what was asked, and the counts, stand in a `.json` beside it.
        model: a base or run that writes.
        base_model: where the base of that run is now, if it was moved.
        prompt_template: the request, with `{text}` where the words go; several are asked one after the other.

    Raises:
        RecipeError: a request without `{text}`, or a model that does not write.
        DataError: no row has the column.
        RunError: `out` is there already, or is no `.jsonl` file.
    """
    asked, target = [prompt_template] if isinstance(prompt_template, str) else list(prompt_template), Path(out)
    if lame := next((one for one in asked if "{text}" not in one), None if asked else "nothing"):
        raise RecipeError(f"the request {lame!r} has no place for the words", "write {text} where they go")
    if target.suffix != ".jsonl" or target.exists():
        raise RunError(f"rows are written to a .jsonl file that is not there yet, not to {str(target)!r}",
                       "name another file with --out")
    rows, unread = [], 0
    for _, found in assembly.rows.read_source(file):
        for row in found:
            usable = isinstance(row, assembly.rows.Row) and isinstance(row.values.get(column), str)
            rows += [dict(row.values)] if usable and isinstance(row, assembly.rows.Row) else []
            unread += not usable
    if not rows:
        raise DataError(f"no row of {file} has words in a column {column!r}", "name a column of texts with --column")
    rows = rows[:max_samples]
    with status("loading the model", quiet=quiet):
        _, base, _ = open_run(Run(model) if not isinstance(model, Run) else model, False, base_model,
                                   partial(print_line, quiet=quiet))
    if not base.can_generate:
        raise RecipeError(f"{str(model)!r} does not write", "use a base that writes text, such as 'smollm2'")
    base.train(False)
    sampling = SamplingParams(max_new_tokens, temperature, batch_size=batch_size, seed=seed)
    with Progress(len(rows) * len(asked), title="rows said anew", quiet=quiet) as bar:
        words, cut = _paraphrase_texts(base, [str(row[column]) for row in rows], asked, sampling, bar)
    made = [{**row, column: text} for row, text in zip(rows, words, strict=True) if text not in ("", row[column])]
    told = {"rows": len(rows), "written": len(made), "empty": words.count("") - cut, "cut_off": cut,
            "unreadable": unread, "unchanged": sum(bool(text) and text == row[column]
                                                   for row, text in zip(rows, words, strict=True))}
    folder = Run(target.parent)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_lines(target.name, made)
    folder.write(target.with_suffix(".json").name, {**told, "file": file, "column": column, "model": str(model),
                                                    "prompt_template": asked, "temperature": temperature, "seed": seed})
    return {"file": str(target), **told}


def _paraphrase_texts(base: Family, words: Sequence[str], asked: Sequence[str], sampling: SamplingParams,
                      bar: Progress) -> tuple[list[str], int]:
    """The words as the last request left them, empty where an answer was, or where one was cut off; and how many of
    those there are. Nothing is asked about words that are not there: a model would make some up."""
    found, cut = [text if text.strip() else "" for text in words], 0
    for turn, one in enumerate(asked):
        left = [place for place, text in enumerate(found) if text]
        prompts = [encode_chat_prompt(base, [Message("user", one.replace("{text}", found[place]))],
                                      PromptFormat())
                   for place in left]
        for done, answer in enumerate(base.generate(prompts, sampling), 1):
            said = base.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
            found[left[answer.index]] = said if answer.finished else ""
            cut += bool(said) and not answer.finished
            bar.update(turn * len(words) + done)
    return found, cut
