"""The decode steps: golden files, and refusal of everything that is not exactly right."""

from __future__ import annotations

import base64
import json
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from shrink.codebooks import EIGHTBIT_TABLE
from shrink.errors import BadInput
from shrink.model import DTYPES
from shrink.steps import TRELLIS, Step, decode, trellised

GOLDEN = Path(__file__).parent / "golden" / "steps"
STEPS = [
    *("zstd.1", "deflate.1", "planes.1", "sparse.1", "rans.1", "trellis.1"),
    *("cast.1", "fill.1", "codebook.1", "affine.1", "grid.1"),
]


def chain(spec: list[list[Any]]) -> tuple[Step, ...]:
    return tuple(Step(name, params) for name, params in spec)


@pytest.mark.parametrize("step", STEPS)
def test_stored_bytes_mean_what_they_always_meant(step: str) -> None:
    """A missing golden file fails: bytes in users' hands must decode for ever."""
    cases = json.loads((GOLDEN / f"{step}.json").read_text())
    assert cases
    for case in cases:
        assert step in [s[0] for s in case["steps"]]
        dtype = DTYPES[case["dtype"]]
        values = decode(base64.b64decode(case["payload"]), chain(case["steps"]), tuple(case["shape"]), dtype, "golden")
        assert values.dtype == dtype
        assert values.shape == tuple(case["shape"])
        assert base64.b64encode(values.tobytes()).decode() == case["values"]


def test_every_step_has_a_golden_file_and_every_golden_file_a_step() -> None:
    from shrink import steps

    assert sorted([*steps._BYTE_STEPS, *steps._VALUE_STEPS]) == sorted(STEPS)
    assert sorted(p.stem for p in GOLDEN.glob("*.json")) == sorted(STEPS)


def test_the_eightbit_table_is_symmetric_and_ascending() -> None:
    assert EIGHTBIT_TABLE.shape == (256,)
    assert EIGHTBIT_TABLE[0] == 0
    assert EIGHTBIT_TABLE[127] == 1
    assert (np.diff(EIGHTBIT_TABLE[:128]) > 0).all()
    assert np.array_equal(EIGHTBIT_TABLE[128:], -EIGHTBIT_TABLE[:128])


AFFINE = {"bits": 8, "axis": None, "block": None, "scale": "F32", "zero": False}
GRID = {"scale": 1.0, "view": None, "rows": [0], "width": 1}
RANS = {"rows": 1, "columns": 3, "head": 0, "width": 1}
CODES = ["cast.1", {"from": "I8"}]
TRELLIS_OF_3 = {"rows": 1, "columns": 3, "head": 0, "width": 1}
NUMBERS = ["cast.1", {"from": "I16"}]
ONE = np.float32(1).tobytes()
ZLIB_OF_ABC = zlib.compress(b"abc")
RANS_OF_ABC = bytes.fromhex("03ff4fec00000100804108")
ZSTD_OF_ABC = bytes.fromhex("28b52ffd2003190000616263")
ZSTD_CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(b"abc")


@pytest.mark.parametrize(
    ("label", "steps", "payload", "shape", "words"),
    [
        ("no steps", [], b"", (0,), "does not end in values"),
        ("ends in bytes", [["zstd.1", {"size": 3}]], ZSTD_OF_ABC, (3,), "does not end in values"),
        ("unknown step", [["magic.1", {}], ["cast.1", {"from": "U8"}]], b"abc", (3,), "magic.1"),
        ("newer version", [["zstd.2", {}], ["cast.1", {"from": "U8"}]], b"abc", (3,), "zstd.2"),
        ("value step too early", [["cast.1", {"from": "U8"}], ["cast.1", {"from": "U8"}]], b"abc", (3,), "not known"),
        ("unknown parameter", [["cast.1", {"from": "U8", "x": 1}]], b"abc", (3,), "unknown parameter 'x'"),
        ("missing parameter", [["cast.1", {}]], b"abc", (3,), "from"),
        ("unhashable parameter", [["cast.1", {"from": ["U8"]}]], b"abc", (3,), "from"),
        ("cast too short", [["cast.1", {"from": "F32"}]], b"abc", (1,), "3 bytes are there where 4"),
        ("zstd damaged", [["zstd.1", {"size": 3}], ["cast.1", {"from": "U8"}]], b"notzstd", (3,), "damaged"),
        ("zstd cut", [["zstd.1", {"size": 3}], ["cast.1", {"from": "U8"}]], ZSTD_OF_ABC[:-2], (3,), "zstd.1"),
        ("zstd longer", [["zstd.1", {"size": 2}], ["cast.1", {"from": "U8"}]], ZSTD_OF_ABC, (2,), "promised 2"),
        ("zstd shorter", [["zstd.1", {"size": 4}], ["cast.1", {"from": "U8"}]], ZSTD_OF_ABC, (4,), "promised 4"),
        (
            "zstd checksum cut",
            [["zstd.1", {"size": 3}], ["cast.1", {"from": "U8"}]],
            ZSTD_CHECKED[:-4],
            (3,),
            "damaged",
        ),
        ("zstd twice", [["zstd.1", {"size": 3}], ["cast.1", {"from": "U8"}]], ZSTD_OF_ABC * 2, (3,), "damaged"),
        ("zstd and more", [["zstd.1", {"size": 3}], ["cast.1", {"from": "U8"}]], ZSTD_OF_ABC + b"!", (3,), "damaged"),
        ("zstd huge", [["zstd.1", {"size": 1 << 40}], ["cast.1", {"from": "U8"}]], ZSTD_OF_ABC, (3,), "size"),
        ("size is true", [["zstd.1", {"size": True}], ["cast.1", {"from": "U8"}]], ZSTD_OF_ABC, (1,), "size"),
        ("deflate bad", [["deflate.1", {"size": 3}], ["cast.1", {"from": "U8"}]], b"nozlib", (3,), "damaged"),
        ("deflate cut", [["deflate.1", {"size": 3}], ["cast.1", {"from": "U8"}]], ZLIB_OF_ABC[:-1], (3,), "promised 3"),
        ("deflate longer", [["deflate.1", {"size": 2}], ["cast.1", {"from": "U8"}]], ZLIB_OF_ABC, (2,), "promised 2"),
        ("deflate shorter", [["deflate.1", {"size": 4}], ["cast.1", {"from": "U8"}]], ZLIB_OF_ABC, (4,), "promised 4"),
        (
            "deflate tail",
            [["deflate.1", {"size": 3}], ["cast.1", {"from": "U8"}]],
            ZLIB_OF_ABC + b"x",
            (3,),
            "promised",
        ),
        ("deflate huge", [["deflate.1", {"size": 1 << 40}], ["cast.1", {"from": "U8"}]], ZLIB_OF_ABC, (3,), "size"),
        ("planes odd", [["planes.1", {"width": 2, "skip": 0}], ["cast.1", {"from": "U8"}]], b"abc", (3,), "whole"),
        ("planes skip", [["planes.1", {"width": 2, "skip": 9}], ["cast.1", {"from": "U8"}]], b"abc", (3,), "skip"),
        (
            "mask cut",
            [["sparse.1", {"width": 1, "count": 9, "skip": 0}], ["cast.1", {"from": "U8"}]],
            b"\0",
            (9,),
            "cut off",
        ),
        (
            "mask past end",
            [["sparse.1", {"width": 1, "count": 3, "skip": 0}], ["cast.1", {"from": "U8"}]],
            b"\xf0abcd",
            (3,),
            "past the end",
        ),
        (
            "mask and items differ",
            [["sparse.1", {"width": 1, "count": 3, "skip": 0}], ["cast.1", {"from": "U8"}]],
            b"\x07ab",
            (3,),
            "marks 3",
        ),
        (
            "sparse bomb",
            [["sparse.1", {"width": 8, "count": 60000, "skip": 0}], ["cast.1", {"from": "U8"}]],
            bytes(7500),
            (3,),
            "more bytes",
        ),
        ("bytes in a fill", [["fill.1", {"value": 1.0}]], b"a", (1,), "1 bytes are there where none"),
        ("fill of text", [["fill.1", {"value": "1"}]], b"", (1,), "value is not a finite number"),
        ("fill too large", [["fill.1", {"value": 1e39}]], b"", (1,), "too large"),
        ("fill of too much", [["fill.1", {"value": 1.0}]], b"", (1 << 28,), "0 bytes claim to hold"),
        ("unknown table", [["codebook.1", {"table": "nine", "scale": 1.0}]], b"a", (1,), "table"),
        ("outside the table", [["codebook.1", {"table": [0.0, 1.0], "scale": 1.0}]], b"\0\2", (2,), "code 2 is"),
        ("NaN in table", [["codebook.1", {"table": [float("nan")], "scale": 1.0}]], b"\0", (1,), "table"),
        ("infinite scale", [["codebook.1", {"table": "eightbit", "scale": float("inf")}]], b"\0", (1,), "scale"),
        ("scale too large", [["codebook.1", {"table": "eightbit", "scale": 1e39}]], b"\0", (1,), "too large"),
        ("codebook too short", [["codebook.1", {"table": "eightbit", "scale": 1.0}]], b"\0", (2,), "gives 1 values"),
        ("affine too short", [["affine.1", AFFINE]], ONE + b"a", (2,), "5 bytes are there where 6"),
        ("affine 5 bits", [["affine.1", {**AFFINE, "bits": 5}]], ONE + b"a", (1,), "bits"),
        ("affine axis", [["affine.1", {**AFFINE, "axis": 1}]], ONE + b"a", (1,), "axis"),
        ("affine block 0", [["affine.1", {**AFFINE, "block": 0}]], ONE + b"a", (1,), "block"),
        ("affine scale NaN", [["affine.1", AFFINE]], np.float32("nan").tobytes() + b"a", (1,), "finite"),
        ("affine scale large", [["affine.1", AFFINE]], np.float32(3e38).tobytes() + b"\x7f", (1,), "too large"),
        ("nibbles past end", [["affine.1", {**AFFINE, "bits": 4}]], ONE + b"\x11", (1,), "past the end"),
        ("rans nothing", [["rans.1", RANS], CODES], b"", (3,), "header is damaged"),
        ("rans noise", [["rans.1", RANS], CODES], bytes(range(60)), (3,), "damaged"),
        ("rans cut", [["rans.1", RANS], CODES], RANS_OF_ABC[:-1], (3,), "chunk 0 is damaged"),
        ("rans and more", [["rans.1", RANS], CODES], RANS_OF_ABC + b"!", (3,), "chunk 0 is damaged"),
        ("rans wider", [["rans.1", {**RANS, "width": 3}], CODES], RANS_OF_ABC, (3,), "width"),
        ("rans bomb", [["rans.1", {**RANS, "rows": 60000}], CODES], RANS_OF_ABC, (3,), "more bytes"),
        ("rans huge", [["rans.1", {**RANS, "rows": 1 << 40}], CODES], RANS_OF_ABC, (3,), "rows"),
        ("rans rows true", [["rans.1", {**RANS, "rows": True}], CODES], RANS_OF_ABC, (3,), "rows"),
        ("rans head below 0", [["rans.1", {**RANS, "head": -1}], CODES], RANS_OF_ABC, (3,), "head"),
        ("rans version", [["rans.1", {**RANS, "version": 2}], CODES], RANS_OF_ABC, (3,), "unknown parameter"),
        ("trellis nothing", [["trellis.1", TRELLIS_OF_3], NUMBERS], b"", (3,), "0 bytes are there where 3"),
        (
            "trellis cut",
            [["trellis.1", {**TRELLIS_OF_3, "head": 1}], NUMBERS],
            b"abc",
            (3,),
            "3 bytes are there where 4",
        ),
        ("trellis and more", [["trellis.1", TRELLIS_OF_3], NUMBERS], b"abcd", (3,), "4 bytes are there where 3"),
        ("trellis wide", [["trellis.1", {**TRELLIS_OF_3, "width": 2}], NUMBERS], bytes(5), (3,), "5 bytes are there"),
        ("trellis wider", [["trellis.1", {**TRELLIS_OF_3, "width": 3}], NUMBERS], b"abc", (3,), "width"),
        ("trellis width true", [["trellis.1", {**TRELLIS_OF_3, "width": True}], NUMBERS], b"abc", (3,), "width"),
        ("trellis bomb", [["trellis.1", {**TRELLIS_OF_3, "rows": 30000}], NUMBERS], b"abc", (3,), "more bytes"),
        ("trellis huge", [["trellis.1", {**TRELLIS_OF_3, "rows": 1 << 40}], NUMBERS], b"abc", (3,), "rows"),
        ("trellis columns", [["trellis.1", {**TRELLIS_OF_3, "columns": 3.5}], NUMBERS], b"abc", (3,), "columns"),
        ("trellis head below 0", [["trellis.1", {**TRELLIS_OF_3, "head": -1}], NUMBERS], b"ab", (3,), "head"),
        ("trellis version", [["trellis.1", {**TRELLIS_OF_3, "states": 4}], NUMBERS], b"abc", (3,), "unknown parameter"),
        ("trellis high", [["trellis.1", {**TRELLIS_OF_3, "width": 2}], NUMBERS], b"abcd\0\x40", (3,), "too large"),
        ("trellis low", [["trellis.1", {**TRELLIS_OF_3, "width": 2}], NUMBERS], b"\xff\xbfabcd", (3,), "too large"),
        ("grid too short", [["grid.1", GRID]], bytes(6), (2, 2), "6 bytes are there where 8"),
        ("grid scale 0", [["grid.1", {**GRID, "scale": 0}]], bytes(8), (2, 2), "above 0"),
        ("grid scale below 0", [["grid.1", {**GRID, "scale": -1.0}]], bytes(8), (2, 2), "above 0"),
        ("grid scale NaN", [["grid.1", {**GRID, "scale": float("nan")}]], bytes(8), (2, 2), "finite"),
        ("grid scale large", [["grid.1", {**GRID, "scale": 1e39}]], bytes(8), (2, 2), "too large"),
        ("grid value large", [["grid.1", {**GRID, "scale": 1e20}]], b"\x7f" * 8, (2, 2), "too large"),
        ("grid width", [["grid.1", {**GRID, "width": 4}]], bytes(20), (2, 2), "width"),
        ("grid width true", [["grid.1", {**GRID, "width": True}]], bytes(8), (2, 2), "width"),
        ("grid view", [["grid.1", {**GRID, "view": [3, 2]}]], bytes(11), (2, 2), "view"),
        ("grid view text", [["grid.1", {**GRID, "view": "4"}]], bytes(9), (2, 2), "view"),
        ("grid view part", [["grid.1", {**GRID, "view": [0.5, 8]}]], bytes(13), (2, 2), "view"),
        ("grid view below 0", [["grid.1", {**GRID, "view": [-2, -2]}]], bytes(8), (2, 2), "view"),
        ("grid view long", [["grid.1", {**GRID, "view": [4] + [1] * 16}]], bytes(9), (2, 2), "view"),
        ("grid view large", [["grid.1", {**GRID, "view": [0, 1 << 31]}]], b"", (0,), "view"),
        ("grid many axes", [["grid.1", GRID]], bytes(2), (1,) * 17, "view"),
        ("grid rows", [["grid.1", {**GRID, "rows": [2]}]], bytes(8), (2, 2), "axes of the 2"),
        ("grid rows missing", [["grid.1", {**GRID, "rows": None}]], bytes(8), (2, 2), "axes of the 2"),
        ("grid rows true", [["grid.1", {**GRID, "rows": [True]}]], bytes(8), (2, 2), "axes of the 2"),
        ("grid rows twice", [["grid.1", {**GRID, "rows": [0, 0]}]], bytes(8), (2, 2), "twice"),
        ("ten terabytes", [["cast.1", {"from": "F32"}]], b"abcd", (1600000, 1600000), "claim to hold"),
    ],
)
def test_malformed_chains_are_refused(
    label: str, steps: list[list[Any]], payload: bytes, shape: tuple[int, ...], words: str
) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        decode(payload, chain(steps), shape, DTYPES["U8"] if label != "ten terabytes" else DTYPES["F32"], "W")
    assert caught.value.tensor == "W"


def test_what_the_damaged_payloads_are_made_from() -> None:
    values = decode(RANS_OF_ABC, chain([["rans.1", RANS], CODES]), (3,), DTYPES["U8"], "W")
    assert values.tobytes() == b"abc"


def test_grids_by_hand() -> None:
    """Each value by its indices, one at a time: axes (2, 0) of (2, 3, 4) are the rows, axis 1 the columns."""
    rng = np.random.default_rng(16)
    head = rng.integers(-20, 20, 4 * 2 + 3).astype("i1")
    codes = rng.integers(-3000, 3000, (8, 3)).astype("<i2")
    step = Step("grid.1", {"scale": 0.037, "view": [2, 3, 4], "rows": [2, 0], "width": 2})
    values = decode(head.tobytes() + codes.tobytes(), (step,), (6, 4), DTYPES["F32"], "W").reshape(2, 3, 4)
    f32 = np.float32

    def half_octaves(exponent: int) -> float:
        return float(np.ldexp([1.0, 1.4142135623730951][exponent % 2], exponent // 2))

    for a, b, c in np.ndindex(2, 3, 4):
        row = f32(0.037 * half_octaves(int(head[c * 2 + a])))
        column = f32(half_octaves(int(head[8 + b])))
        assert values[a, b, c] == f32(f32(codes[c * 2 + a, b]) * column) * row


def trellised_by_hand(codes: NDArray[Any]) -> NDArray[np.int64]:
    """Code by code, with the machine as the description has it."""
    machine = [(0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)]
    values = np.zeros(codes.shape, np.int64)
    for row, line in enumerate(codes.tolist()):
        state = 0
        for column, code in enumerate(line):
            values[row, column] = 2 * code - ((code > 0) - (code < 0)) * (state & 1)
            state = machine[state][code & 1]
    return values


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
@given(data=st.data())
def test_trellises_by_hand(dtype: type[np.signedinteger[Any]], data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 40)))
    most = 127 if dtype is np.int8 else 16383
    codes = data.draw(arrays(dtype, shape, elements=st.integers(-3, 3) | st.integers(-most - 1, most)))
    values = trellised(codes)
    assert values.dtype == np.int32
    assert np.array_equal(values, trellised_by_hand(codes))


def test_the_machine_cannot_be_changed() -> None:
    assert TRELLIS.shape == (8, 2)
    with pytest.raises(ValueError, match="read-only"):
        TRELLIS[0, 0] = 1


def test_columns_without_rows_take_no_time() -> None:
    """A row of so many codes would take minutes, and a file can say so in a few bytes."""
    start = time.perf_counter()
    assert trellised(np.empty((0, 1 << 30), np.int8)).shape == (0, 1 << 30)
    assert time.perf_counter() - start < 5


def test_random_bytes_never_do_worse_than_a_refusal() -> None:
    rng = np.random.default_rng(11)
    kinds: list[list[list[Any]]] = [
        [["zstd.1", {"size": 64}], ["cast.1", {"from": "F32"}]],
        [["planes.1", {"width": 4, "skip": 0}], ["cast.1", {"from": "F32"}]],
        [["sparse.1", {"width": 4, "count": 16, "skip": 0}], ["cast.1", {"from": "F32"}]],
        [["affine.1", {"bits": 4, "axis": 0, "block": 3, "scale": "BF16", "zero": True}]],
        [["codebook.1", {"table": "eightbit", "scale": 0.5}]],
        [["grid.1", {"scale": 0.5, "view": None, "rows": [1], "width": 1}]],
        [["rans.1", {"rows": 4, "columns": 4, "head": 0, "width": 1}], ["cast.1", {"from": "I8"}]],
        [["trellis.1", {"rows": 2, "columns": 8, "head": 0, "width": 2}], ["cast.1", {"from": "I16"}]],
    ]
    decoded = 0
    for _ in range(2000):
        payload = rng.bytes(int(rng.integers(0, 90)))
        try:
            values = decode(payload, chain(kinds[int(rng.integers(len(kinds)))]), (4, 4), DTYPES["F32"], "W")
        except BadInput:
            continue
        decoded += 1
        assert values.shape == (4, 4)
    assert decoded
