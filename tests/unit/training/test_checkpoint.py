"""Checkpoints: exact, whole or not there at whatever moment the writer is killed, and honest about damage."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from luthier.core.errors import RunError
from luthier.training import checkpoint
from luthier.training.checkpoint import find_latest, load_checkpoint, save_checkpoint

PART = {"method": {"w": torch.arange(6.0).reshape(2, 3)}}


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, NaN's payload and the sign of zero too."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn,
                                   torch.int64, torch.int32, torch.uint8, torch.bool])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (3 * 4 * dtype.itemsize,), dtype=torch.uint8)
    square = bits.view(dtype).reshape(3, 4)
    given = {"method": {"all": square, "turned": square.T, "view": square[1:], "scalar": square[0, 0], "none": square[:0]},
             "optimizer": {"all": square}, "empty": {}}
    read = load_checkpoint(save_checkpoint(tmp_path, 7, given, {}, keep=1))
    assert read.step == 7
    assert set(read.tensors) == set(given)
    for part, named in given.items():
        assert set(read.tensors[part]) == set(named)
        assert all(same(read.tensors[part][name], tensor) for name, tensor in named.items())


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {"rate": 0.1 + 0.2, "cursor": 2**70, "words": "Geige, 琴", "deep": [{"a": None}, True], "tiny": 5e-324}
    assert load_checkpoint(save_checkpoint(tmp_path, 1, PART, state, keep=1)).state == state
    assert math.isnan(load_checkpoint(save_checkpoint(tmp_path, 2, PART, {"loss": math.nan}, keep=1)).state["loss"])


def test_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, PART, {}, keep=2, protect=2)
    assert steps(tmp_path) == ["step-2", "step-4", "step-5"]
    save_checkpoint(tmp_path, 3, PART, {}, keep=1)  # an earlier step again: what is later is not its business
    assert steps(tmp_path) == ["step-3", "step-4", "step-5"]


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 4, PART, {"try": 1}, keep=1)
    save_checkpoint(tmp_path, 4, PART, {"try": 2}, keep=1)
    assert steps(tmp_path) == ["step-4"]
    assert find_latest(tmp_path)[0].state == {"try": 2}


def test_no_folder_no_checkpoint(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "none") == (None, [])
    assert find_latest(tmp_path) == (None, [])


def test_litter_of_dead_writers_goes_and_of_living_ones_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f".writing-step-1-{pid}").mkdir()
    (tmp_path / ".dropped-step-1").mkdir()
    save_checkpoint(tmp_path, 2, PART, {}, keep=1)
    assert steps(tmp_path) == [f".writing-step-1-{os.getppid()}", "step-2"]


# ---------------------------------------------------------------- damage


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1 - len(content) // 3] ^= 16
    file.write_bytes(content)


def spoil(file: Path) -> None:
    file.write_text('{"torn": ')


def hollow(file: Path) -> None:
    file.write_text("[]")


@pytest.mark.parametrize("name", ["method.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink, spoil, hollow])
def test_damage_is_found_named_and_passed_over(tmp_path: Path, name: str, harm) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, PART, {"step": step}, keep=3)
    harm(tmp_path / "step-3" / name)
    found, notes = find_latest(tmp_path)
    assert found.step == found.state["step"] == 2
    assert len(notes) == 1
    assert "step-3 is damaged" in notes[0]
    assert "step-2 is used instead" in notes[0]
    assert name in notes[0] or name == "manifest.json"
    with pytest.raises(RunError, match="step-3 is damaged"):
        load_checkpoint(tmp_path / "step-3")


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """In the tensors and the state. In the manifest a flip of a blank may change nothing."""
    place = save_checkpoint(tmp_path, 1, PART, {"a": 1}, keep=1)
    for file in (place / "method.safetensors", place / "state.json"):
        whole = file.read_bytes()
        for bit in range(0, len(whole) * 8, 13):
            harmed = bytearray(whole)
            harmed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(harmed)
            assert checkpoint._find_damage(place), (file.name, bit)
        file.write_bytes(whole)
    whole = (place / "manifest.json").read_bytes()
    for bit in range(0, len(whole) * 8, 13):
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        (place / "manifest.json").write_bytes(harmed)
        if not checkpoint._find_damage(place):  # then it says the same
            assert load_checkpoint(place).state == {"a": 1}
            assert set(load_checkpoint(place).tensors) == {"method"}


def test_nothing_whole_is_said(tmp_path: Path) -> None:
    for step in (1, 2):
        truncate(save_checkpoint(tmp_path, step, PART, {}, keep=2) / "state.json")
    found, notes = find_latest(tmp_path)
    assert found is None
    assert len(notes) == 2
    assert all("no older checkpoint is complete" in note for note in notes)


# ---------------------------------------------------------------- a disk that refuses


@pytest.mark.parametrize("place", ["save_file", "fsync", "rename", "write_text"])
@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "free disk space"), (errno.EACCES, "write permission"),
                                             (errno.EIO, "check that disk")])
def test_a_refusing_disk_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              place: str, code: int, words: str) -> None:
    save_checkpoint(tmp_path, 1, PART, {}, keep=1)

    def refuse(*_: object, **__: object) -> None:
        if place == "save_file":
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code))

    owner = {"save_file": checkpoint, "fsync": os, "rename": Path, "write_text": Path}[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, place, refuse)
        with pytest.raises(RunError) as caught:
            save_checkpoint(tmp_path, 2, PART, {}, keep=1)
    assert str(tmp_path) in caught.value.what
    assert os.strerror(code) in caught.value.what
    assert "need 24 bytes" in caught.value.what
    assert words in caught.value.remedy
    assert steps(tmp_path) == ["step-1"]
    assert find_latest(tmp_path)[0].step == 1


def test_a_full_file_system_in_earnest(tmp_path: Path) -> None:
    """The library's own words for the system's error, brought about by a limit on the size of files."""
    script = """
import resource, sys, torch
from pathlib import Path
from luthier.core.errors import RunError
from luthier.training.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_checkpoint(Path(sys.argv[1]), 1, {"method": {"w": torch.zeros(5000)}}, {}, keep=1)
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert os.strerror(errno.EFBIG) in done.stdout
    assert "need 20,000 bytes" in done.stdout
    assert steps(tmp_path) == []


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot save step-1"):
        save_checkpoint(tmp_path / "file", 1, PART, {}, keep=1)


# ---------------------------------------------------------------- killed while saving

KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from luthier.training.checkpoint import find_latest, save_checkpoint

torch.set_num_threads(1)
os.fsync = lambda handle: None  # a kill loses nothing that the system holds, and waiting for the disk takes all the time
folder, mode = Path(sys.argv[1]), sys.argv[2]

def write(step):
    tensors = {part: {"w": torch.full((40_000,), float(step))} for part in ("method", "optimizer")}
    save_checkpoint(folder, step, tensors, {"step": step}, keep=1)

def doomed(survive):
    # dies before its `survive`-th change of the folder
    left = [survive]
    def wrap(call):
        def step(*given, **named):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*given, **named)
        return step
    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir", "chmod", "open"):
        setattr(os, name, wrap(getattr(os, name)))

def check(least):
    found, notes = find_latest(folder)
    assert not notes, notes
    step = found.step if found else 0
    assert step >= least, (step, least)
    if found:
        assert found.state == {"step": step}
        assert all((part["w"] == step).all() for part in found.tensors.values())
    return step

rounds = reached = 0
if mode == "every":
    for again in (0, 1):  # the next step, or the same one once more
        survive, status = 0, None
        while status != 0:
            write(reached + 1)
            reached += 1
            if not (child := os.fork()):
                doomed(survive)
                write(reached + 1 - again)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            reached = check(reached)
            survive += 1
            rounds += 1
else:
    random.seed(5)
    while rounds < 40:
        if not (child := os.fork()):
            for step in range(reached + 1, reached + 1000):
                write(step)
            os._exit(1)
        time.sleep(random.uniform(0.001, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reached = check(reached)
        rounds += 1
write(reached + 1)
print(rounds, reached, *sorted(os.listdir(folder)))
"""


@pytest.mark.parametrize("mode", ["every", "random"])
def test_killed_at_any_moment(tmp_path: Path, mode: str) -> None:
    """Before each single change of the folder, then at random moments: never less than the last whole checkpoint."""
    done = subprocess.run([sys.executable, "-c", KILLER, tmp_path, mode], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rounds, reached, *left = done.stdout.split()
    assert int(rounds) > 30
    assert int(reached) >= 5
    assert left == [f"step-{int(reached) + 1}"]


def test_a_replaced_checkpoint_counts_until_the_new_one_stands(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, PART, {"try": 1}, keep=1).rename(tmp_path / ".replaced-step-3")
    assert find_latest(tmp_path)[0].state == {"try": 1}
    save_checkpoint(tmp_path, 4, PART, {}, keep=2)
    assert steps(tmp_path) == ["step-3", "step-4"]


def test_a_checkpoint_may_be_copied_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(save_checkpoint(tmp_path, 3, PART, {}, keep=1), tmp_path / "best")
    assert load_checkpoint(tmp_path / "best").step == 3
    assert set(json.loads((tmp_path / "best/manifest.json").read_text())) == {"method.safetensors", "state.json"}
