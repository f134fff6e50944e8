"""The command line: parses, runs a command, tells errors. `cli/commands.py` has the commands; `cli/console.py` how
results look.

Results go to stdout, and with --json nothing but JSON; progress and errors go to stderr. Exit codes: 0 done, 2 the
user's to mend, 130 and 143 ended by a signal. Verbs are imported where they are called, so that --help is quick.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from luthier import __version__
from luthier.cli import console
from luthier.cli.commands import COMMANDS
from luthier.core.errors import LuthierError, RecipeError, suggest_nearest

SETTING = re.compile(r"[A-Za-z_][\w.]*=")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
PIPE_CLOSED = 141  # as a shell reports a process that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        options = parse(words)
        code = COMMANDS[options.command].run(options)
        sys.stdout.flush()
        return code
    except LuthierError as error:
        return _fail(type(error).__name__, error.what, error.remedy, as_json, error.exit_code)
    except BrokenPipeError:
        # Whoever read has gone. Python would complain once more when it closes stdout: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        return _fail("DiskFull", f"the disk is full{f': {error.filename}' if error.filename else ''}",
                     "free some space, or let the run write to another disk (--run DIR); then --resume", as_json)
    except KeyboardInterrupt:
        return _fail("Interrupted", "interrupted", "", as_json, 130)


def _fail(kind: str, what: str, remedy: str, as_json: bool, code: int = 2) -> int:
    print(f"error: {what}" + (f"\n  -> {remedy}" if remedy else ""), file=sys.stderr)
    if as_json:
        console.as_json({"error": {"kind": kind, "what": what, "remedy": remedy, "exit_code": code}})
    return code


# ---------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(message, f"see: {self.prog} --help")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, with `command` and, where the command takes settings, `settings`."""
    parser = _Parser(prog="luthier", description="Fine-tunes pretrained models.",
                     epilog="luthier COMMAND --help tells more about each.")
    parser.add_argument("--version", action="version", version=f"luthier {__version__}")
    branches = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        branch = branches.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        for flags, described in command.arguments:
            branch.add_argument(*flags, **described)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        raise RecipeError(f"unknown command {words[0]!r}",
                          f"{suggest_nearest(words[0], COMMANDS)}; see: luthier --help")
    options, rest = parser.parse_known_args(words)
    # argparse takes positionals in one run only, so those that stand behind an option come back as rest.
    for word in rest:
        if word.startswith("-"):
            known = [flag for flags, _ in COMMANDS[options.command].arguments for flag in flags if flag.startswith("-")]
            raise RecipeError(f"luthier {options.command} has no option {word!r}",
                              f"{suggest_nearest(word.partition('=')[0], known)}; see: luthier {options.command} "
                              f"--help")
    given = vars(options)
    if "words" in given:
        given["words"] = [*options.words, *rest]
        given["settings"] = dict(_setting(word) for word in given["words"] if SETTING.match(word))
        given["words"] = [word for word in given["words"] if not SETTING.match(word)]
    elif rest:
        raise RecipeError(f"luthier {options.command} does not know what to do with {rest[0]!r}",
                          f"see: luthier {options.command} --help")
    return options


def _setting(word: str) -> tuple[str, Any]:
    """A key and its value, read as YAML: ``method.rank=16``, ``evaluate.metrics=[exact,number]``."""
    import yaml

    from luthier.core.config import NULL
    key, _, value = word.partition("=")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{word!r}: the value is not YAML ({str(error).splitlines()[0]})",
                          "quote it, for example 'data.system=\"You are: a clerk\"'") from None
    return key, NULL if found is None and "." in key else found
