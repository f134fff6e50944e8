"""The command line: parses arguments, runs a command, prints errors. `cli/commands.py` has the commands,
`cli/console.py` prints results.

Results go to stdout, with `--json` as JSON and nothing else; progress and errors go to stderr. Exit codes: 0 success,
1 an unexpected error, 2 an error that the user can fix, 129, 130 and 143 ended by a signal. `luthier.api` is imported
where it is called, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from luthier import __version__
from luthier.cli import console
from luthier.cli.commands import COMMANDS
from luthier.core.consent import allow_code
from luthier.core.errors import LuthierError, RecipeError, StoppedAtOnce, suggest_nearest

SETTING = re.compile(r"[A-Za-z_][\w.]*=")
COMMAND_NAMES = {"combine": "merge-adapters", "sft": "train", "eval": "evaluate", "finetune": "train", "api": "serve",
                 "infer": "predict", "chatbot": "chat"}  # elsewhere, or before -> here
OPTION_NAMES = {"--run": "--output-dir", "--limit": "--max-samples", "--base": "--base-model-only",
                "--general": "--retention-data", "--ask": "--prompt-template", "--how": "--combination-type",
                "--batch-size": "--max-num-seqs", "--output": "--output-dir", "--dataset": "--data",
                "--model-name-or-path": "--model", "--num-samples": "--max-samples"}  # the same of options
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PIPE_CLOSED = 141  # as a shell reports a process that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know ASCII only
            stream.reconfigure(errors="backslashreplace")
    try:
        options = parse(arguments)
        with allow_code(vars(options).get("allow_code") or ()):
            code = COMMANDS[options.command].run(options)
        sys.stdout.flush()
        return code
    except LuthierError as error:
        return _fail(type(error).__name__, error.what, error.remedy, as_json, error.exit_code)
    except BrokenPipeError:
        # The reader closed the pipe. Python would fail again when it flushes stdout at exit, so stdout goes to null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in DISK_FULL:
            return _fail_unexpectedly(error, as_json)
        return _fail("DiskFull", f"the disk is full{f': {error.filename}' if error.filename else ''}",
                     "free some space, or write the run to another disk (--output-dir DIR); then --resume", as_json)
    except Exception as error:
        return _fail_unexpectedly(error, as_json)
    except StoppedAtOnce as error:
        return _fail("Interrupted", f"{error}, twice: stopped at once",
                     "the newest checkpoint is intact; continue with --resume", as_json, error.exit_code)
    except KeyboardInterrupt:
        return _fail("Interrupted", "interrupted", "", as_json, 130)


def _fail_unexpectedly(error: Exception, as_json: bool) -> int:
    """An error that no code has foreseen: one line, and the traceback in a file. `LUTHIER_TRACEBACK=1` raises it."""
    if os.environ.get("LUTHIER_TRACEBACK"):
        raise error
    handle, file = tempfile.mkstemp(prefix="luthier-error-", suffix=".txt")
    with open(handle, "w", encoding="utf-8", errors="backslashreplace") as written:
        traceback.print_exception(error, file=written)
    remedy = ("use a smaller batch or model: luthier plan shows what fits" if isinstance(error, MemoryError) else
              "if the message does not help, report it")
    return _fail(type(error).__name__, f"{type(error).__name__}: {error}".rstrip(": "),
                 f"{remedy}; the traceback is in {file}", as_json, 1)


def _fail(kind: str, what: str, remedy: str, as_json: bool, code: int = 2) -> int:
    print(f"error: {what}" + (f"\n  -> {remedy}" if remedy else ""), file=sys.stderr)
    if as_json:
        console.print_json({"error": {"kind": kind, "what": what, "remedy": remedy, "exit_code": code}})
    return code


# ---------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    """A parser that raises `RecipeError` in place of exiting."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message, f"see: {self.prog} --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments: `command`, its options, and for commands with settings `positionals` and `settings`."""
    parser = _build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        name = arguments[0]
        hint = f"use {COMMAND_NAMES[name]}" if name in COMMAND_NAMES else suggest_nearest(name, COMMANDS)
        raise RecipeError(f"unknown command {name!r}", f"{hint}; see: luthier --help")
    options, rest = parser.parse_known_args(arguments)
    # argparse reads positionals in one group only, so those that follow an option are returned as `rest`.
    for argument in rest:
        if argument.startswith("-"):
            _refuse_option(options.command, argument)
    parsed = vars(options)
    if "positionals" in parsed:
        positionals = [*options.positionals, *rest]
        parsed["settings"] = dict(_parse_setting(one) for one in positionals if SETTING.match(one))
        parsed["positionals"] = [one for one in positionals if not SETTING.match(one)]
    elif rest:
        raise RecipeError(f"luthier {options.command} does not take the argument {rest[0]!r}",
                          f"see: luthier {options.command} --help")
    return options


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="luthier", description="Fine-tune pretrained models.",
                     epilog="luthier COMMAND --help describes a command.")
    parser.add_argument("--version", action="version", version=f"luthier {__version__}")
    branches = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        branch = branches.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        for flags, described in command.arguments:
            branch.add_argument(*flags, **described)
    return parser


def _refuse_option(command: str, argument: str) -> NoReturn:
    known = [flag for flags, _ in COMMANDS[command].arguments for flag in flags if flag.startswith("-")]
    given = argument.partition("=")[0]
    ours = OPTION_NAMES.get(given.replace("_", "-"))
    hint = f"use {ours}" if ours in known else suggest_nearest(given, known)
    raise RecipeError(f"luthier {command} has no option {argument!r}", f"{hint}; see: luthier {command} --help")


def _parse_setting(argument: str) -> tuple[str, Any]:
    """A key and its value, read as YAML: ``method.rank=16``, ``evaluate.metrics=[exact_match,numeric_match]``."""
    import yaml

    from luthier.core.config import NULL
    key, _, value = argument.partition("=")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{argument!r}: the value is not YAML ({str(error).splitlines()[0]})",
                          "quote it, for example 'data.system=\"You are: a clerk\"'") from None
    return key, NULL if parsed is None and "." in key else parsed
