"""The container: what was written once must be read for ever, and other readers must see valid safetensors."""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import shrink
from shrink.container import read, write
from shrink.errors import BadInput
from shrink.model import DTYPES, Entry, Model, Quantized, Role, Source, Tensor
from shrink.steps import Step
from tests import containers

GOLDEN = Path(__file__).parent / "golden" / "container"


@pytest.mark.parametrize("version", ["version1", "version2"])
def test_every_version_is_read_as_it_always_was(version: str) -> None:
    expected = json.loads((GOLDEN / "version1.json").read_text())
    model = shrink.load(GOLDEN / f"{version}.safetensors")
    assert model.source.format == expected["source"]
    assert model.attributes == expected["attributes"]
    assert model.graph == expected["graph"].encode()
    found = {
        t.name: {
            "dtype": str(t.dtype),
            "shape": list(t.shape),
            "role": t.role,
            "crc32": zlib.crc32(t.array.tobytes()),
        }
        for t in model.tensors
    }
    assert found == expected["tensors"]


def test_writing_it_again_gives_the_same_bytes(tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    for version in ("version1", "version2"):
        # Such small ones are packed.
        shrink.save(shrink.load(GOLDEN / f"{version}.safetensors"), again)
        assert again.read_bytes() == (GOLDEN / "version2.safetensors").read_bytes()
    # The same without the encoded tensors.
    shrink.save(shrink.load(GOLDEN / "version1.plain.safetensors"), again)
    assert again.read_bytes() == (GOLDEN / "version1.plain.safetensors").read_bytes()


def test_any_safetensors_reader_opens_it() -> None:
    plain = load_file(GOLDEN / "version1.safetensors")
    assert plain["N"] == 7
    assert plain["int8/W"].dtype == np.uint8
    assert plain["層/b"].dtype == np.float32
    (held,) = load_file(GOLDEN / "version2.safetensors").values()
    assert held.dtype == np.uint8
    assert held.tobytes() == (GOLDEN / "version2.safetensors").read_bytes()[-held.size :]


def test_what_does_not_know_packed_files_says_so() -> None:
    """Earlier readers look at this version, once its checksum is right, before anything else."""
    header, _ = containers.parts((GOLDEN / "version2.safetensors").read_bytes())
    text = header["__metadata__"]["shrink"]
    assert json.loads(text) == {"version": 2}
    assert header["__metadata__"]["shrink.crc32"] == f"{zlib.crc32(text.encode()):08x}"


# --- packed files ----------------------------------------------------------------------------------------------


def written(folder: Path, entries: list[Entry]) -> bytes:
    write(entries, folder / "x.safetensors", source="test", attributes={"a": "é"}, graph=b"graph", level=None)
    return (folder / "x.safetensors").read_bytes()


def contents(folder: Path, data: bytes) -> tuple[Any, ...]:
    (folder / "read.safetensors").write_bytes(data)
    found = read(folder / "read.safetensors")
    entries = [
        (e.name, e.dtype, e.shape, e.role, (e.steps, e.payload) if isinstance(e, Quantized) else e.array.tobytes())
        for e in found.entries
    ]
    return entries, found.source, found.attributes, found.graph


def encoded(name: str, shape: tuple[int, ...], payload: bytes, role: Role = "weight") -> Quantized:
    step = Step("codebook.1", {"table": "eightbit", "scale": 0.1})
    return Quantized.of(name, DTYPES["F32"], shape, (step,), payload, role)


names = st.text('ab/0123456789"\\\\ 層é😀_.', min_size=1, max_size=9).filter(
    lambda n: n[0] not in "/\\\\" and ".." not in n
)
names |= st.sampled_from(["__proto__", "1", "0", "constructor", "shrink.packed", "shrink.crc32"])


@st.composite
def some_entries(draw: st.DrawFn) -> list[Entry]:
    entries: list[Entry] = []
    for name in draw(st.lists(names, min_size=1, max_size=12, unique=True)):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        role: Role = draw(st.sampled_from(["weight", "state"]))
        size = int(np.prod(shape))
        if draw(st.booleans()):
            entries.append(encoded(name, shape, bytes(size), role))
        else:
            dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
            entries.append(Tensor.of(name, np.arange(size).astype(dtype).reshape(shape), role))
    return entries


@settings(max_examples=60)
@given(some_entries())
def test_a_packed_file_holds_the_same(entries: list[Entry]) -> None:
    """As the same container in version 1; smaller; and written only where a tensor is encoded."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = written(folder, entries)
        plain = containers.plain(data)
        assert containers.is_packed(data) == any(isinstance(entry, Quantized) for entry in entries)
        assert contents(folder, data) == contents(folder, plain)
        assert [e.name for e in entries if e.size] == [e[0] for e in contents(folder, data)[0] if np.prod(e[2])]
        if containers.is_packed(data):
            assert 64 * len(data) <= 63 * len(plain)


def test_packed_is_chosen_by_size(tmp_path: Path) -> None:
    """Exactly where it takes 1/64 of the file away."""
    sizes = range(8_000, 20_000, 8)
    low, high = 0, len(sizes) - 1
    while high - low > 1:
        middle = (low + high) // 2
        is_packed = containers.is_packed(written(tmp_path, [encoded("W", (sizes[middle],), bytes(sizes[middle]))]))
        low, high = (middle, high) if is_packed else (low, middle)
    packed = written(tmp_path, [encoded("W", (sizes[low],), bytes(sizes[low]))])
    plain = written(tmp_path, [encoded("W", (sizes[high],), bytes(sizes[high]))])
    assert containers.is_packed(packed)
    assert not containers.is_packed(plain)
    saved = len(plain) - (sizes[high] - sizes[low]) - len(packed)
    assert saved == pytest.approx(len(plain) / 64, abs=2)


def test_a_header_too_large_to_be_believed_is_not_packed(tmp_path: Path) -> None:
    steps = (Step("codebook.1", {"table": "eightbit", "scale": 0.1, "note": "a" * (1 << 20)}),)
    data = written(tmp_path, [Quantized.of("W", DTYPES["F32"], (3,), steps, b"abc")])
    assert not containers.is_packed(data)
    assert contents(tmp_path, data)[0][0][0] == "W"


def test_bfloat16_of_other_writers_becomes_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38, 1e-40], np.float32)
    bits = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    head = json.dumps({"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "bf16.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bits)
    array = shrink.load(path)["w"].array
    assert np.array_equal(array.ravel(), (values.view(np.uint32) >> 16 << 16).view(np.float32))


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    model = Model((Tensor.of("shrink.graph", np.ones(3, "f4")),), Source("safetensors", tmp_path, 0))
    with pytest.raises(BadInput, match="reserved"):
        shrink.save(model, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["version1", "version2"])
def test_every_flipped_bit_is_noticed_or_harmless(version: str, tmp_path: Path) -> None:
    """One flipped bit anywhere: an error, or the very same tensors (a bit in padding or in a number's spelling)."""
    good = (GOLDEN / f"{version}.safetensors").read_bytes()
    original = {t.name: t.array.tobytes() for t in shrink.load(GOLDEN / f"{version}.safetensors").tensors}
    rng = np.random.default_rng(1)
    path = tmp_path / "flipped.safetensors"
    refused = 0
    places = rng.choice(len(good) * 8, 600, replace=False)
    if version == "version2":
        # Everything before the data, too.
        _, body = containers.packed_parts(good)
        places = np.concatenate([np.arange(8 * (len(good) - len(body))), places])
    for position in places:
        data = bytearray(good)
        data[position // 8] ^= 1 << (position % 8)
        path.write_bytes(data)
        try:
            found = {t.name: t.array.tobytes() for t in shrink.load(path).tensors}
        except BadInput:
            refused += 1
            continue
        assert found == original, position
    assert refused > 0.9 * len(places)


def test_packed_tensors_are_not_packed_again(tmp_path: Path) -> None:
    model = shrink.load(GOLDEN / "version1.safetensors")
    assert any(isinstance(t, Quantized) and len(t.steps) > 1 for t in model.tensors)
    shrink.save(model, tmp_path / "a.safetensors", level=19)
    assert (tmp_path / "a.safetensors").stat().st_size <= (GOLDEN / "version1.safetensors").stat().st_size
