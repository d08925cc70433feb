"""Exported pages split in place: every file within the limit, and joined to the very same folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink import site
from shrink.errors import BadInput, BoundNotMet, IntegrityError, ShrinkError, UsageError
from shrink.export import Exported
from shrink.manifest import MANIFEST
from shrink.progress import silent
from shrink.split import site as splitting

LIMIT = 60_000
WEIGHTS, GRAPH = "weights.safetensors", "重み/model.onnx"


def page(folder: Path, sizes: dict[str, int]) -> Path:
    """A page with files of these sizes; who cuts them does not mind what they hold."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, size in sizes.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rng.bytes(size))
    site.add_page(folder, "onnxruntime-web", "a page", Exported({"weights": WEIGHTS}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return page(tmp_path / "サイト", {WEIGHTS: 250_001, GRAPH: 60_001, "runtime/ort.wasm.gz": 60_000})


def split(folder: Path, limit: int = LIMIT, to: Path | None = None) -> None:
    splitting.plan(folder, limit, to or folder).write(silent)


def content(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    return found


def test_what_is_planned_is_what_is_there(folder: Path) -> None:
    plan = splitting.plan(folder, LIMIT, folder)
    assert content(folder).keys() >= {WEIGHTS, GRAPH}
    plan.write(silent)
    after = content(folder)
    assert {f.name: f.size_bytes for f in plan.files} == {f.name: len(after[f.name]) for f in plan.files}
    assert plan.files[-1].name == MANIFEST
    assert max(map(len, after.values())) <= LIMIT
    assert WEIGHTS not in after
    assert GRAPH not in after
    assert "runtime/ort.wasm.gz" in after
    assert [f.name.rpartition("-of-")[2] for f in plan.files] == ["00005.bin"] * 5 + ["00002.bin"] * 2 + [MANIFEST]
    about = manifest(folder)["files"][GRAPH]
    assert about["bytes"] == 60_001
    assert all("/" not in part["file"] and (folder / "重み" / part["file"]).exists() for part in about["parts"])


def test_join_gives_back_the_very_same_folder(folder: Path) -> None:
    before = content(folder)
    split(folder)
    assert content(folder) != before
    splitting.join(folder)
    assert content(folder) == before


def test_the_same_page_is_split_the_same_way(folder: Path, tmp_path: Path) -> None:
    split(folder, to=tmp_path / "once")
    split(folder, to=tmp_path / "twice")
    split(folder)
    assert content(tmp_path / "once") == content(tmp_path / "twice") == content(folder)


def test_a_smaller_limit_cuts_parts_again_and_a_larger_one_changes_nothing(folder: Path, tmp_path: Path) -> None:
    split(folder, 30_000, to=tmp_path / "at once")
    split(folder, 125_001)
    assert len(content(folder)) > 0
    split(folder, 30_000)
    assert content(folder) == content(tmp_path / "at once")
    plan = splitting.plan(folder, 500_000, folder)
    assert plan.files == ()
    assert "fits already" in plan.notes[0]
    plan.write(silent)
    assert content(folder) == content(tmp_path / "at once")


def test_a_file_that_the_browser_loads_by_itself_cannot_be_cut(folder: Path) -> None:
    before = content(folder)
    largest = max(len(data) for name, data in before.items() if name.startswith("shrink/"))
    with pytest.raises(BoundNotMet, match=f"the smallest limit for this page is {largest:,} bytes"):
        splitting.plan(folder, 12_000, folder)
    assert content(folder) == before
    split(folder, largest)
    assert max(map(len, content(folder).values())) <= largest


def test_a_page_is_not_copied_over_something_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        splitting.plan(folder, LIMIT, tmp_path / "there")


def test_not_even_force_replaces_what_is_no_page(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    split(folder, to=tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("precious")
    for there in ("home", "copy"):
        before = content(tmp_path / there)
        with pytest.raises(UsageError, match="did not export"):
            splitting.plan(folder, LIMIT, tmp_path / there, force=True)
        assert content(tmp_path / there) == before


def test_force_replaces_a_copy(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    split(folder, 125_001, to=copy)
    splitting.plan(folder, 30_000, copy, force=True).write(silent)
    split(folder, 30_000)
    assert content(copy) == content(folder)


@pytest.mark.parametrize("place", ["サイト/copy", "サイト/shrink", "."])
def test_a_copy_does_not_lie_in_the_page_nor_the_page_in_the_copy(folder: Path, tmp_path: Path, place: str) -> None:
    before = content(tmp_path)
    with pytest.raises(UsageError, match="lies in the other"):
        splitting.plan(folder, LIMIT, tmp_path / place, force=True)
    assert content(tmp_path) == before


def test_a_copy_takes_nothing_from_outside_the_page(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "linked").symlink_to(tmp_path / "private")
    os.mkfifo(folder / "pipe")
    split(folder, to=tmp_path / "copy")
    copy = tmp_path / "copy"
    assert (copy / "link.txt").is_symlink()
    assert (copy / "linked").is_symlink()
    assert not (copy / "pipe").exists()
    assert (copy / MANIFEST).exists()


def test_what_else_lies_there_stays_and_is_named(folder: Path) -> None:
    (folder / "film.mp4").write_bytes(bytes(LIMIT + 1))
    plan = splitting.plan(folder, LIMIT, folder)
    plan.write(silent)
    assert plan.notes == ("film.mp4 is over the limit too, but not part of the page: it stays as it is.",)
    assert (folder / "film.mp4").exists()
    assert not site.is_ours(folder)


def test_a_split_page_is_still_one_that_export_may_replace(folder: Path) -> None:
    assert site.is_ours(folder)
    split(folder)
    assert site.is_ours(folder)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    signal.alarm(20)
    try:
        with pytest.raises(IntegrityError, match="not the file that was exported"):
            split(folder)
    finally:
        signal.alarm(0)


def test_a_damaged_file_is_not_cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(250_001))
    before = content(folder)
    with pytest.raises(IntegrityError, match="not the file that was exported"):
        split(folder)
    after = content(folder)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: part.unlink(),
        lambda part: part.write_bytes(part.read_bytes()[:-1]),
        lambda part: part.write_bytes(part.read_bytes() + b"!"),
        lambda part: part.write_bytes(bytes([part.read_bytes()[0] ^ 1]) + part.read_bytes()[1:]),
        lambda part: part.write_bytes(part.with_name(part.name.replace("00002-of", "00001-of")).read_bytes()),
    ],
    ids=["missing", "short", "long", "flipped", "swapped"],
)
def test_damaged_parts_are_not_joined(folder: Path, damage: Callable[[Path], object]) -> None:
    split(folder)
    (part,) = folder.glob(f"{WEIGHTS}-*-00002-of-*")
    damage(part)
    with pytest.raises(IntegrityError, match="00002-of-00005"):
        splitting.join(folder)
    assert not (folder / WEIGHTS).exists()


def test_where_one_part_is_damaged_no_file_of_the_page_appears(folder: Path) -> None:
    split(folder)
    for name in (WEIGHTS, GRAPH):
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        (part,) = copy.glob(f"{name}-*-00002-of-*")
        part.write_bytes(bytes(part.stat().st_size))
        before = content(copy)
        with pytest.raises(IntegrityError, match="00002-of"):
            splitting.join(copy)
        assert content(copy) == before
        shutil.rmtree(copy)


def test_parts_that_are_of_another_file_than_is_listed_are_not_joined(folder: Path) -> None:
    split(folder)
    said = manifest(folder)
    said["files"][GRAPH]["integrity"] = "sha256-" + "A" * 43 + "="
    (folder / MANIFEST).write_text(json.dumps(said))
    before = content(folder)
    with pytest.raises(IntegrityError) as caught:
        splitting.join(folder)
    assert caught.value.file == folder / GRAPH
    assert content(folder) == before


def test_joining_that_was_stopped_while_it_tidied_up_goes_on(folder: Path) -> None:
    before = content(folder)
    split(folder)
    parts = {path: path.read_bytes() for path in folder.rglob("*-of-*.bin")}
    splitting.join(folder)
    (folder / "mine.txt").write_text("precious")
    for path, data in parts.items():
        path.write_bytes(data)
    splitting.join(folder)
    assert content(folder) == {**before, "mine.txt": b"precious"}
    with pytest.raises(UsageError, match="none of its files is split"):
        splitting.join(folder)


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_parts_that_may_be_needed_yet_stay(folder: Path, harm: Callable[[Path], object]) -> None:
    split(folder)
    parts = {path: path.read_bytes() for path in folder.rglob("*-of-*.bin")}
    splitting.join(folder)
    for path, data in parts.items():
        path.write_bytes(data)
    harm(folder / WEIGHTS)
    before = content(folder)
    with pytest.raises(ShrinkError):
        splitting.join(folder)
    assert content(folder) == before


def test_a_whole_page_is_not_joined(folder: Path) -> None:
    with pytest.raises(UsageError, match="none of its files is split"):
        splitting.join(folder)


class Killed(BaseException):
    """Like a signal: nothing catches it."""


def test_killed_at_any_write_the_page_is_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {WEIGHTS: 150_001, GRAPH: 60_001}
    original = content(page(tmp_path / "original", sizes))
    steps = ["replace", "fsync", "unlink"]
    real = {name: getattr(os, name) for name in steps}
    for after in range(100):
        folder = page(tmp_path / str(after), sizes)
        left = [after]

        def step(name: str, left: list[int]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real[name](*arguments, **options)

            return run

        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(os, name, step(name, left))
            try:
                split(folder)
                killed = False
            except Killed:
                killed = True
        if manifest(folder)["files"][WEIGHTS].get("parts"):
            splitting.join(folder)
        present = content(folder)
        assert {name: present[name] for name in original} == original
        assert site.is_ours(folder)
        split(folder)
        splitting.join(folder)
        assert content(folder) == original
        if not killed:
            assert after > 10
            return
    pytest.fail("it never ended")


@given(st.integers(0, 300_000), st.integers(16_000, 320_000))
def test_every_size_and_limit(tmp_path_factory: pytest.TempPathFactory, size: int, limit: int) -> None:
    folder = page(tmp_path_factory.mktemp("sizes") / "site", {WEIGHTS: size, "a.onnx": 1})
    before = content(folder)
    try:
        split(folder, limit)
    except BoundNotMet:
        assert limit < max(len(data) for name, data in before.items() if name != WEIGHTS) + 5000
        assert content(folder) == before
        return
    assert max(map(len, content(folder).values())) <= limit
    assert len(list(folder.glob(f"{WEIGHTS}-*"))) == (-(-size // limit) if size > limit else 0)
    if size > limit:
        splitting.join(folder)
    assert content(folder) == before


def changed(**about: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["files"][WEIGHTS].update(about)


PART = {"file": "a.bin", "bytes": 250_001, "integrity": "sha256-" + "A" * 43 + "="}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("files"),
        lambda content: content.update(files=[]),
        lambda content: content.update(shrink=2),
        lambda content: content.update(shrink=True),
        lambda content: content["files"].update({"../outside.bin": {"bytes": 1, "integrity": PART["integrity"]}}),
        lambda content: content["files"].update({"/etc/passwd": {"bytes": 1, "integrity": PART["integrity"]}}),
        lambda content: content["files"].update({WEIGHTS: 1}),
        changed(bytes=-1),
        changed(bytes="1"),
        changed(bytes=1e3),
        changed(integrity="sha256-"),
        changed(integrity=None),
        changed(parts=[]),
        changed(parts=[{**PART, "file": "../a.bin"}]),
        changed(parts=[{**PART, "bytes": 1}]),
        changed(parts=[{**PART, "skip": -1}]),
        changed(parts=[PART, PART]),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    said = manifest(folder)
    change(said)
    (folder / MANIFEST).write_text(json.dumps(said))
    before = content(folder)
    for attempt in (lambda: splitting.plan(folder, LIMIT, folder), lambda: splitting.join(folder)):
        with pytest.raises(BadInput):
            attempt()
    assert content(folder) == before


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_what_is_no_manifest_is_refused(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(ShrinkError):
        splitting.plan(folder, LIMIT, folder)
