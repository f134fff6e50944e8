"""No command ends in a traceback: unforeseen errors are one line, on every terminal. Read `cli/main.py` first."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.cli import commands
from luthier.cli.main import main

SOURCE = str(Path(__file__).parents[2] / "src")
ERRORS = [MemoryError(), RecursionError("maximum recursion depth exceeded"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
          OverflowError("too large"), PermissionError(13, "Permission denied", "/x"), IsADirectoryError(21, "Is a directory", "/x"),
          ZeroDivisionError("division by zero"), KeyError("gone"), AssertionError("a programmer's mistake"), RuntimeError("")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_unforeseen_error_is_one_line_and_a_file(error: Exception, as_json: bool, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.delenv("LUTHIER_TRACEBACK")
    monkeypatch.setitem(commands.COMMANDS, "doctor", replace(commands.COMMANDS["doctor"], run=fail))
    assert main(["doctor", *(["--json"] if as_json else [])]) == 1
    out, words = capsys.readouterr()
    assert words.startswith(f"error: {type(error).__name__}")
    assert "Traceback" not in words
    file = Path(re.search(r"the traceback is in (\S+)", words)[1])  # type: ignore[index]
    assert "in fail" in file.read_text()
    file.unlink()
    if as_json:
        assert json.loads(out)["error"]["exit_code"] == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["doctor"], ["doctor", "--json"], ["schema"],
                                   ["data", "check", "zeilen.jsonl", "--model", "gibt es nicht \u4e2d"], ["train", "\u4e2d\u6587.yaml"]])
def test_every_terminal_can_print_it(tmp_path: Path, encoding: str, words: list[str]) -> None:
    (tmp_path / "zeilen.jsonl").write_text('{"prompt": "\u4e2d\u6587 \u00e4", "completion": "\U0001f600"}\n', encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "luthier", *words], cwd=tmp_path, capture_output=True, env={
        **os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": SOURCE, "LUTHIER_TRACEBACK": ""})
    assert b"Traceback" not in done.stderr, done.stderr
    assert b"UnicodeEncodeError" not in done.stderr
    assert done.returncode in (0, 2), done.stderr
    if words[-1] == "--json":
        json.loads(done.stdout.decode(encoding))
