"""Files and folders appear whole or not at all, whenever the writer is killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shrink import files
from shrink.errors import BadInput, OutputError
from shrink.files import Scratch, atomic_folder, is_taken, read_all

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
