"""Files in parts: every part is checked, and an index leads nowhere but to parts in its own folder."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink import parts
from shrink.errors import BadInput, IntegrityError, OutputError, UsageError
from shrink.parts import Part

WHOLE = bytes(range(256)) * 8


def make(folder: Path, *, head: bytes = b"HEAD") -> tuple[list[Part], Path]:
    """WHOLE in three parts, each with a head that is skipped, and the index."""
    source = io.BytesIO(WHOLE)
    lengths = parts.even(len(WHOLE), 700)
    names = parts.numbered("gen", len(lengths), ".bin")
    found = [
        parts.write_part(folder / name, source, length, head=head) for name, length in zip(names, lengths, strict=True)
    ]
    index = folder / "gen.index.json"
    index.write_bytes(parts.as_bytes({"shrink": described(found)}))
    return found, index


def described(found: list[Part]) -> dict[str, Any]:
    return {"version": 1, "file": "gen", "bytes": len(WHOLE), "parts": [p.as_json() for p in found]}


def joined(index: Path) -> bytes:
    out = io.BytesIO()
    said = parts.read_index(index)
    parts.join(index.parent, said.parts, out, file=index)
    return out.getvalue()


def test_parts_join_to_the_whole(tmp_path: Path) -> None:
    found, index = make(tmp_path)
    assert len(found) == 3
    assert joined(index) == WHOLE
    for part in found:
        data = (tmp_path / part.file).read_bytes()
        assert data.startswith(b"HEAD")
        assert (len(data), parts.integrity(data)) == (part.size_bytes, part.integrity)


def test_a_skip_larger_than_a_block_is_skipped(tmp_path: Path) -> None:
    _, index = make(tmp_path, head=bytes(3_000_000))
    assert joined(index) == WHOLE


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    found, index = make(tmp_path)
    heard: list[tuple[int, int]] = []
    parts.verify(tmp_path, found, file=index, progress=lambda name, done, total: heard.append((done, total)))
    assert heard == sorted(heard)
    assert heard[-1] == (len(WHOLE) + 12, len(WHOLE) + 12)


def replace_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(path: Path) -> None:
    other = path.with_name("gen-00003-of-00003.bin")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link_outside(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def a_link_in_a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "shorter"),
        (lambda path: path.write_bytes(b""), "shorter"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "longer"),
        (replace_byte, "content"),
        (swap, "part gen-0000"),
        (a_folder, "not a file"),
        (a_link_outside, "outside|out of"),
        (a_link_in_a_circle, "nowhere|cannot be read"),
        (a_pipe, "not a file"),
    ],
    ids=["missing", "truncated", "empty", "longer", "flipped", "swapped", "folder", "link", "circle", "pipe"],
)
def test_damage_names_the_part(damage: Callable[[Path], object], word: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    found, index = make(folder)
    damage(folder / found[1].file)
    with pytest.raises(BadInput, match=word) as caught:
        parts.verify(folder, found, file=index)
    assert caught.value.file == index
    assert "gen-0000" in str(caught.value)
    assert caught.value.hint
    with pytest.raises(BadInput, match=word):
        joined(index)


def test_a_part_that_is_the_head_of_another_length_is_noticed(tmp_path: Path) -> None:
    """Parts of an older split: the same length, other content."""
    found, index = make(tmp_path)
    (tmp_path / found[0].file).write_bytes(bytes(found[0].size_bytes))
    with pytest.raises(IntegrityError, match="SHA-256"):
        joined(index)


def change(**fields: Any) -> Callable[[dict[str, Any]], object]:
    """Change the second part; None takes the field away."""

    def apply(ours: dict[str, Any]) -> None:
        for name, value in fields.items():
            if value is None:
                del ours["parts"][1][name]
            else:
                ours["parts"][1][name] = value

    return apply


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no parts": (lambda o: o.pop("parts"), "there is none"),
    "empty parts": (lambda o: o.update(parts=[]), "there is none"),
    "parts of text": (lambda o: o.update(parts="all"), "there is none"),
    "a part of text": (lambda o: o["parts"].__setitem__(0, "gen"), "not an object"),
    "no file": (change(file=None), "no file"),
    "file is a number": (change(file=7), "no file"),
    "file is empty": (change(file=""), "outside"),
    "file is absolute": (change(file="/etc/passwd"), "outside"),
    "file climbs": (change(file="../gen-00002-of-00003.bin"), "outside"),
    "file in a folder": (change(file="a/b.bin"), "outside"),
    "file with a backslash": (change(file="a\\b.bin"), "outside"),
    "file is the folder": (change(file="."), "outside"),
    "file is the folder above": (change(file=".."), "outside"),
    "file with a zero": (change(file="a\0b"), "outside"),
    "file that is endless": (change(file="a" * 5000), "outside"),
    "file twice": (lambda o: o["parts"].__setitem__(1, o["parts"][0]), "twice"),
    "file is the index": (change(file="gen.index.json"), "itself"),
    "no bytes": (change(bytes=None), "believable"),
    "bytes of text": (change(bytes="700"), "believable"),
    "bytes true": (change(bytes=True), "believable"),
    "bytes half": (change(bytes=700.5), "believable"),
    "bytes negative": (change(bytes=-1), "believable"),
    "bytes huge": (change(bytes=10**30), "believable"),
    "bytes infinite": (change(bytes=float("inf")), "believable"),
    "skip negative": (change(skip=-4), "believable"),
    "skip beyond the end": (change(skip=10**6), "believable"),
    "no integrity": (change(integrity=None), "SHA-256"),
    "integrity of another kind": (change(integrity="sha1-abc="), "SHA-256"),
    "integrity of a number": (change(integrity=5), "SHA-256"),
    "bytes do not add up": (lambda o: o.update(bytes=len(WHOLE) + 1), "add up"),
    "total negative": (lambda o: o.update(bytes=-1), "add up"),
    "total of text": (lambda o: o.update(bytes="many"), "add up"),
    "total missing": (lambda o: o.pop("bytes"), "add up"),
    "no name": (lambda o: o.pop("file"), "name"),
    "name climbs": (lambda o: o.update(file="../gen"), "name"),
    "name is a list": (lambda o: o.update(file=["gen"]), "name"),
    "version missing": (lambda o: o.pop("version"), "version"),
    "version 2": (lambda o: o.update(version=2), "version 2"),
    "version true": (lambda o: o.update(version=True), "version"),
    "index of text": (lambda o: o.update(index="x"), "its own parts"),
    "index without bytes": (lambda o: o.update(index={"parts": []}), "its own parts"),
    "index too large": (lambda o: o.update(index={"bytes": 1 << 40, "parts": []}), "its own parts"),
    "index is itself": (
        lambda o: o.update(
            index={"bytes": 9, "parts": [{"file": "gen.index.json", "bytes": 9, "integrity": parts.NO_INTEGRITY}]}
        ),
        "itself",
    ),
}


@pytest.mark.parametrize("label", MALFORMED)
def test_a_malformed_index_is_refused(label: str, tmp_path: Path) -> None:
    found, index = make(tmp_path)
    damage, words = MALFORMED[label]
    ours = described(found)
    damage(ours)
    index.write_text(json.dumps({"shrink": ours}))
    with pytest.raises(BadInput, match=words) as caught:
        parts.read_index(index)
    assert caught.value.file == index
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "shrink did not write it"),
        (b'{"shrink": 5}', "shrink did not write it"),
        (b'{"weight_map": {"a": "b.safetensors"}}', "shrink did not write it"),
    ],
)
def test_what_is_no_index_is_refused(text: bytes, words: str, tmp_path: Path) -> None:
    index = tmp_path / "gen.index.json"
    index.write_bytes(text)
    with pytest.raises(BadInput, match=words):
        parts.read_index(index)


def test_a_missing_index_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        parts.read_index(tmp_path / "gone.index.json")


def test_a_part_that_claims_the_moon_costs_nothing(tmp_path: Path) -> None:
    found, index = make(tmp_path)
    ours = described(found)
    ours["parts"][1]["bytes"] += 1 << 50
    ours["bytes"] += 1 << 50
    index.write_text(json.dumps({"shrink": ours}))
    start = time.monotonic()
    with pytest.raises(IntegrityError, match="shorter"):
        joined(index)
    assert time.monotonic() - start < 5


def nested(text: bytes, limit: int) -> tuple[bytes, dict[str, bytes]]:
    top, files = parts.fit_index(text, "gen", limit)
    return top, dict(files)


@given(st.integers(0, 400_000), st.integers(1_000, 30_000))
def test_an_index_of_any_length_fits_any_limit(length: int, limit: int) -> None:
    text = parts.as_bytes({"pad": "x" * length})
    top, files = nested(text, limit)
    assert max(map(len, (top, *files.values()))) <= limit
    # Sizes and names are known before what the index says is.
    other, others = nested(parts.as_bytes({"pad": "y" * length}), limit)
    assert (len(top), {n: len(d) for n, d in files.items()}) == (len(other), {n: len(d) for n, d in others.items()})


def test_a_nested_index_is_read_and_its_parts_are_known(tmp_path: Path) -> None:
    found, _ = make(tmp_path)
    text = parts.as_bytes({"shrink": described(found), "pad": "層" * 40_000})
    top, files = nested(text, 1_000)
    assert any("-index2-" in name for name in files)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    index = tmp_path / "cut.index.json"
    index.write_bytes(top)
    said = parts.read_index(index)
    assert said.parts == tuple(found)
    assert {p.file for p in said.index_parts} == set(files)
    assert said.content["pad"] == "層" * 40_000
    (tmp_path / next(iter(files))).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        parts.read_index(index)


def test_an_index_without_end_is_refused(tmp_path: Path) -> None:
    text = b"{}"
    for deep in range(12):
        name = f"deep{deep}.json"
        (tmp_path / name).write_bytes(text)
        inner = [Part(name, len(text), parts.integrity(text)).as_json()]
        text = parts.as_bytes({"shrink": {"version": 1, "index": {"bytes": len(text), "parts": inner}}})
    index = tmp_path / "x.index.json"
    index.write_bytes(text)
    with pytest.raises(BadInput, match="without end"):
        parts.read_json(index)


def test_an_index_beyond_belief_is_refused_when_written() -> None:
    with pytest.raises(UsageError, match="larger than"):
        parts.fit_index(bytes((1 << 27) + 1), "gen", 10_000)


@pytest.mark.parametrize("name", ["a", "生成\u3000器.bin", "a b", "..a", "\u202egen", "é" * 127, "x" * 255, "-n", "😀"])
def test_what_is_a_name(name: str) -> None:
    assert parts.is_plain(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "a\\b",
        "a\0",
        "a\nb",
        "\x1b[2J",
        "\x7f",
        "a\x85b",
        "\u2028",
        "\u2029",
        "\udc80",
        "x" * 256,
        1,
        None,
    ],
)
def test_what_is_no_name(name: object) -> None:
    assert not parts.is_plain(name)


@given(st.integers(0, 10**12), st.integers(10_000, 10**9))
def test_even_lengths_are_few_and_equal(size: int, limit: int) -> None:
    if size // limit > 10_000:
        size %= 10_000 * limit
    lengths = parts.even(size, limit)
    assert sum(lengths) == size
    assert len(lengths) == max(1, -(-size // limit))
    assert max(lengths) <= limit
    assert max(lengths) - min(lengths) <= 1


def test_a_source_that_ends_too_soon_leaves_no_part(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="shorter"):
        parts.write_part(tmp_path / "a.bin", io.BytesIO(b"abc"), 4)
    assert not list(tmp_path.iterdir())
