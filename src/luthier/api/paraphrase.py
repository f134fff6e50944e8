"""The verb `paraphrase`: a file of rows paraphrased by a model, to train on together with the original rows.

    With several prompt templates, the output of each is the input of the next: two templates can translate a text and
    translate it back (Sennrich et al. 2016, arXiv:1511.06709, section 3).

The output depends only on the model, the rows, the templates and the seed. Rows whose output is empty, unchanged or
truncated are dropped and counted. Read `chat.py` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from luthier import assembly
from luthier.assembly.factory import PromptFormat, encode_chat_prompt
from luthier.assembly.run_io import open_run
from luthier.core.consent import accepts_consent
from luthier.core.errors import DataError, RecipeError, RunError
from luthier.core.examples import Message
from luthier.core.protocols import Family, SamplingParams
from luthier.reporting.progress import Progress, print_line, status
from luthier.training.run_folder import Run

PROMPT_TEMPLATE = "Say this in other words, in the same language:\n{text}"


@accepts_consent
def paraphrase(file: str, column: str, out: Path | str, *, model: Run | Path | str = "smollm2",
               prompt_template: Sequence[str] | str = PROMPT_TEMPLATE, max_samples: int | None = None,
               temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 128, batch_size: int = 16,
               quiet: bool = False, base_model: Path | str | None = None,
               allow_code: Sequence[str] = ()) -> dict[str, Any]:
    """Write the rows of a file with one column paraphrased. Returns counts: rows read, written, unchanged, empty,
    cut off (longer than `max_new_tokens`), unreadable.

    Args:
        allow_code: files, modules, URLs or base models whose code the run may use (`core/consent.py`).
        column: the column to paraphrase; all others are copied.
        out: a new `.jsonl` file; the templates and the counts are written to a `.json` file of the same name.
        model: a base model or run that generates text.
        base_model: where the base of that run is now, if it was moved.
        prompt_template: the prompt template, with `{text}` where the text goes; several are applied one after the
        other.

    Raises:
        RecipeError: a template without `{text}`, or a model that cannot generate.
        DataError: no row has the column.
        RunError: `out` exists, or is not a `.jsonl` file.
    """
    templates, target = [prompt_template] if isinstance(prompt_template, str) else list(prompt_template), Path(out)
    invalid = next((template for template in templates if "{text}" not in template), None if templates else "nothing")
    if invalid:
        raise RecipeError(f"the prompt template {invalid!r} has no {{text}}", "write {text} where the text goes")
    if target.suffix != ".jsonl" or target.exists():
        raise RunError(f"rows are written to a new .jsonl file, not to {str(target)!r}",
                       "give another file with --out")
    rows, unread = [], 0
    for _, group in assembly.rows.read_source(file):
        for row in group:
            usable = isinstance(row, assembly.rows.Row) and isinstance(row.values.get(column), str)
            rows += [dict(row.values)] if usable and isinstance(row, assembly.rows.Row) else []
            unread += not usable
    if not rows:
        raise DataError(f"no row of {file} has text in a column {column!r}", "give a column of texts with --column")
    rows = rows[:max_samples]
    with status("loading the model", quiet=quiet):
        _, base, _ = open_run(Run(model) if not isinstance(model, Run) else model, False, base_model,
                                   partial(print_line, quiet=quiet))
    if not base.can_generate:
        raise RecipeError(f"{str(model)!r} cannot generate text", "use a model that generates text, such as 'smollm2'")
    base.train(False)
    sampling = SamplingParams(max_new_tokens, temperature, batch_size=batch_size, seed=seed)
    with Progress(len(rows) * len(templates), title="rows paraphrased", quiet=quiet) as bar:
        texts, cut = _paraphrase_texts(base, [str(row[column]) for row in rows], templates, sampling, bar)
    paraphrased = [{**row, column: text} for row, text in zip(rows, texts, strict=True)
                   if text not in ("", row[column])]
    counts = {"rows": len(rows), "written": len(paraphrased), "empty": texts.count("") - cut, "cut_off": cut,
            "unreadable": unread, "unchanged": sum(bool(text) and text == row[column]
                                                   for row, text in zip(rows, texts, strict=True))}
    folder = Run(target.parent)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_lines(target.name, paraphrased)
    folder.write(target.with_suffix(".json").name, {**counts, "file": file, "column": column, "model": str(model),
                                                    "prompt_template": templates, "temperature": temperature,
                                                    "seed": seed})
    return {"file": str(target), **counts}


def _paraphrase_texts(base: Family, texts: Sequence[str], templates: Sequence[str], sampling: SamplingParams,
                      bar: Progress) -> tuple[list[str], int]:
    """The texts after the last template, empty where an output was empty or cut off; and the number of outputs that
    were cut off. Empty texts are skipped: a model would invent one."""
    texts, cut = [text if text.strip() else "" for text in texts], 0
    for turn, template in enumerate(templates):
        remaining = [position for position, text in enumerate(texts) if text]
        prompts = [encode_chat_prompt(base, [Message("user", template.replace("{text}", texts[position]))],
                                      PromptFormat())
                   for position in remaining]
        for done, answer in enumerate(base.generate(prompts, sampling), 1):
            output = base.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
            texts[remaining[answer.index]] = output if answer.finished else ""
            cut += bool(output) and not answer.finished
            bar.update(turn * len(texts) + done)
    return texts, cut
