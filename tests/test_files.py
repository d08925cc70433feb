"""Files and folders appear whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shrink import files
from shrink.errors import BadInput, OutputError
from shrink.files import Scratch, atomic_file, atomic_folder, finishing, is_taken, read_all

ROOT = Path(__file__).resolve().parents[1]

_KILLED = """
import os, signal, sys
from pathlib import Path
from shrink import files

if sys.argv[2] == "in two steps":
    files._exchanged = lambda a, b: False

def kill_at(step):
    left = step
    def hook(event, arguments):
        nonlocal left
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

step = 0
while True:
    step += 1
    place = Path(sys.argv[1], str(step), "site")
    place.mkdir(parents=True)
    (place / "a").write_text("old")
    (place / "b").write_text("old")
    child = os.fork()
    if not child:
        kill_at(step)
        with files.atomic_folder(place) as folder:
            for name in "abc":
                (folder / name).write_text("new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status == 0:
        break
    if status != signal.SIGKILL:
        sys.exit("the child failed by itself")
print(step)
"""


def killed_at_every_step(folder: Path, way: str) -> list[Path]:
    """The folders that were being replaced when SIGKILL came, one for each step."""
    command = [sys.executable, "-c", _KILLED, str(folder), way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = int(done.stdout)
    assert steps > 8
    return [folder / str(step) / "site" for step in range(1, steps + 1)]


def content(folder: Path) -> dict[str, str]:
    return {f.name: f.read_text() for f in folder.iterdir()}


OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "b": "new", "c": "new"}


def can_exchange(folder: Path) -> bool:
    a, b = folder / "a", folder / "b"
    a.write_text("a")
    b.write_text("b")
    return files._exchanged(a, b) and b.read_text() == "a"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_step_the_old_or_the_new_folder_is_there(tmp_path: Path) -> None:
    if not can_exchange(tmp_path):
        pytest.skip("this system cannot exchange two folders in one step")
    found = [content(place) for place in killed_at_every_step(tmp_path, "in one step")]
    assert all(there in (OLD, NEW) for there in found)
    assert found[0] == OLD
    assert found[-1] == NEW


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_where_two_steps_are_needed_the_old_folder_is_never_lost(tmp_path: Path) -> None:
    for place in killed_at_every_step(tmp_path, "in two steps"):
        there = [content(folder) for folder in (place, *place.parent.glob(".shrink-*.old")) if folder.is_dir()]
        assert OLD in there or NEW in there


def test_nothing_is_left_beside_a_folder_that_was_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "site") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / text).write_text(text)
    assert [f.name for f in tmp_path.iterdir()] == ["site"]
    assert content(tmp_path / "site" / "sub") == {"new": "new"}


def test_a_folder_that_failed_leaves_the_old_one(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "site") as folder:
        (folder / "a").write_text("old")

    def fails() -> None:
        with atomic_folder(tmp_path / "site") as folder:
            (folder / "a").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [f.name for f in tmp_path.iterdir()] == ["site"]
    assert content(tmp_path / "site") == {"a": "old"}


LARGE = 11 << 20
"""Bytes of a file that goes to the disk while it is written."""


@pytest.mark.parametrize("block", [1 << 16, (1 << 20) + 1, LARGE])
def test_a_large_file_is_what_was_written(block: int, tmp_path: Path) -> None:
    data = random.Random(block).randbytes(LARGE)
    with atomic_file(tmp_path / "a") as out:
        for at in range(0, LARGE, block):
            out.write(data[at : at + block])
        out.seek(3)
        out.write(b"changed")
        out.seek(0, os.SEEK_END)
        out.write(b"the end")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == data[:3] + b"changed" + data[10:] + b"the end"
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("when", ["on the way", "at the end"])
def test_a_disk_that_fails_leaves_the_old_file(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells of a failed write once: to whoever brings the file to the disk next, and never again."""
    (tmp_path / "a").write_text("old")
    sync, calls = os.fsync, 0

    def fails_once(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EIO, "Input/output error")
        sync(file)

    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OutputError, match="Input/output error"), atomic_file(tmp_path / "a") as out:
        out.write(bytes(LARGE if when == "on the way" else 100))
    assert content(tmp_path) == {"a": "old"}


def test_files_that_are_finished_beside_others_are_all_there_at_the_end(tmp_path: Path) -> None:
    with finishing() as finish:
        for i in range(20):
            with atomic_file(tmp_path / str(i), finish=finish) as out:
                out.write(bytes([i]) * 300_000)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == {str(i): bytes([i]) * 300_000 for i in range(20)}


def test_a_file_that_cannot_take_its_place_is_said_and_the_others_are_there(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    written = 0

    def write_all() -> None:
        nonlocal written
        with finishing() as finish:
            for i in range(20):
                with atomic_file(tmp_path / str(i), finish=finish) as out:
                    out.write(b"new")
                written += 1

    with pytest.raises(OutputError, match="directory") as caught:
        write_all()
    assert caught.value.file == tmp_path / "1"
    # It is said while the others are written, and what is half done has no name.
    assert written < 20
    assert {f.name for f in tmp_path.iterdir()} - {"1"} <= {str(i) for i in range(written + 1)}
    assert all(f.is_dir() or f.read_bytes() == b"new" for f in tmp_path.iterdir())


def test_a_block_that_fails_leaves_what_was_finished_and_nothing_else(tmp_path: Path) -> None:
    def fails() -> None:
        with finishing() as finish:
            with atomic_file(tmp_path / "a", finish=finish) as out:
                out.write(b"a")
            with atomic_file(tmp_path / "b", finish=finish) as out:
                out.write(b"b")
                raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert content(tmp_path) == {"a": "a"}


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    # Without the check it would wait for ever.
    signal.alarm(20)
    try:
        for path in (tmp_path / "pipe", Path(os.devnull)):
            with pytest.raises(BadInput, match="a pipe or a device"):
                read_all(path, at_most=100)
    finally:
        signal.alarm(0)
    with pytest.raises(OutputError, match="directory"):
        read_all(tmp_path, at_most=1 << 20)


def test_a_name_that_nothing_can_have_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="name too long"):
        is_taken(tmp_path / ("x" * 300))


def test_what_is_made_on_the_way_lies_beside_or_with_the_system_and_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "system"
    system.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(system))
    beside, elsewhere = Scratch(tmp_path / "not" / "yet"), Scratch(tmp_path / "not" / "yet", dry_run=True)
    assert beside.path.parent == tmp_path
    assert elsewhere.path.parent == system
    beside.path.mkdir()
    (beside.path / "file").write_text("x")
    elsewhere.path.write_text("x")
    never_made = Scratch(tmp_path)
    del beside, elsewhere, never_made
    gc.collect()
    assert list(tmp_path.iterdir()) == [system]
    assert list(system.iterdir()) == []
