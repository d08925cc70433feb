"""The container: what was written by version 1 must be read for ever, and other readers must see valid safetensors."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import shrink
from shrink.errors import BadInput
from shrink.model import Model, Quantized, Source, Tensor

GOLDEN = Path(__file__).parent / "golden" / "container"


def test_version_1_is_read_as_it_always_was() -> None:
    expected = json.loads((GOLDEN / "version1.json").read_text())
    model = shrink.load(GOLDEN / "version1.safetensors")
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
    shrink.save(shrink.load(GOLDEN / "version1.safetensors"), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (GOLDEN / "version1.safetensors").read_bytes()


def test_any_safetensors_reader_opens_it() -> None:
    plain = load_file(GOLDEN / "version1.safetensors")
    assert plain["N"] == 7
    assert plain["int8/W"].dtype == np.uint8
    assert plain["層/b"].dtype == np.float32


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


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    """One flipped bit anywhere: an error, or the very same tensors (a bit in padding or in a number's spelling)."""
    good = (GOLDEN / "version1.safetensors").read_bytes()
    original = {t.name: t.array.tobytes() for t in shrink.load(GOLDEN / "version1.safetensors").tensors}
    rng = np.random.default_rng(1)
    path = tmp_path / "flipped.safetensors"
    refused = 0
    for position in rng.choice(len(good) * 8, 600, replace=False):
        data = bytearray(good)
        data[position // 8] ^= 1 << (position % 8)
        path.write_bytes(data)
        try:
            found = {t.name: t.array.tobytes() for t in shrink.load(path).tensors}
        except BadInput:
            refused += 1
            continue
        assert found == original, position
    assert refused > 550


def test_packed_tensors_are_not_packed_again(tmp_path: Path) -> None:
    model = shrink.load(GOLDEN / "version1.safetensors")
    assert any(isinstance(t, Quantized) and len(t.steps) > 1 for t in model.tensors)
    shrink.save(model, tmp_path / "a.safetensors", level=19)
    assert (tmp_path / "a.safetensors").stat().st_size <= (GOLDEN / "version1.safetensors").stat().st_size
