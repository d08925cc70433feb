"""rans.1 and trellis.1: round trips, decoders that agree, payloads that were tampered with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import deflate
import numpy as np
import pytest
import wasmtime
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shrink.coders import packing, rans
from shrink.entropy import Damaged, Layout, decode, reference
from shrink.model import DTYPES, Quantized
from shrink.steps import Step, trellised
from tests.rans_streams import (
    Codes,
    Guarded,
    chunks_of,
    entropy,
    exponents,
    laplace,
    layout_of,
    mutated,
    plain,
    samples,
    written,
)

ROOT = Path(__file__).parents[1]
MUTATIONS = 4000


@pytest.fixture(scope="module")
def guarded() -> Guarded:
    return Guarded()


def either(payload: bytes, layout: Layout) -> bytes | str:
    """What the reference makes of a payload: the bytes, or what is damaged."""
    try:
        return reference(np.frombuffer(payload, np.uint8), layout).tobytes()
    except Damaged as damage:
        return str(damage)


# --- round trips -------------------------------------------------------------------------------------------------

matrices = st.one_of(
    arrays(np.int16, st.tuples(st.integers(0, 20), st.integers(0, 20)), elements=st.integers(-40, 40)),
    arrays(np.int16, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(-32768, 32767)),
    st.builds(laplace, st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.2, 2.0, 500.0])),
)


@given(codes=matrices, head=st.binary(max_size=60), effort=st.integers(0, 2))
@settings(deadline=None)
def test_any_matrix_comes_back(codes: Codes, head: bytes, effort: int) -> None:
    payload, params = rans.encode(head, codes, effort=effort)
    layout = Layout(**params)
    assert layout == layout_of(head, codes)
    data = np.frombuffer(payload, np.uint8)
    assert decode(data, layout).tobytes() == plain(head, codes)
    assert reference(data, layout).tobytes() == plain(head, codes)
    # The coder's choices are not left to chance.
    assert rans.encode(head, codes, effort=effort) == (payload, params)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0), (1, 1), (1, 300), (300, 1), (8, 16), (9, 17), (16, 33)])
@pytest.mark.parametrize("value", [0, -1, 127, -128, 32767, -32768, None])
def test_extremes(guarded: Guarded, shape: tuple[int, int], value: int | None) -> None:
    """All equal, or (None) as far apart as codes can be; in every layout."""
    codes = np.full(shape, 0 if value is None else value, np.int16)
    if value is None:
        codes[::2], codes[1::2] = 32767, -32768
    head = exponents(1, sum(shape))
    for bits in range(4):
        for flat in (False, True):
            payload = written(head, codes, bits, flat, True)
            assert guarded.decode(payload, layout_of(head, codes)) == plain(head, codes)
            if flat or bits == 3:
                assert either(payload, layout_of(head, codes)) == plain(head, codes)


def test_every_form_has_the_same_meaning_to_both_decoders(guarded: Guarded) -> None:
    forms, pairs = 0, guarded.pairs
    for payload, layout in samples():
        said = guarded.decode(payload, layout)
        assert isinstance(said, bytes)
        assert said == either(payload, layout)
        forms += 1
    assert forms == 51
    assert guarded.pairs - pairs == 3


@pytest.mark.parametrize("contexts", [False, True])
@pytest.mark.parametrize("bits", [0, 1, 2, 3])
def test_chunks(guarded: Guarded, bits: int, contexts: bool) -> None:
    # What escapes say is left to the file's checksum, so there are none.
    codes = np.clip(laplace(2, 45, 30, 3.0, 0.8), -15, 15)
    head = exponents(2, 75)
    with chunks_of(200):
        payload = written(head, codes, bits, False, contexts)
    layout = layout_of(head, codes)
    assert either(payload, layout) == guarded.decode(payload, layout) == plain(head, codes)
    # Damage is said of the chunk that it is in: the last bytes are the last chunk's.
    harmed = payload[:-3] + bytes([payload[-3] ^ 16]) + payload[-2:]
    said = guarded.decode(harmed, layout)
    lines = -(-200 // 30 // (1 << bits)) * (1 << bits)
    assert said == either(harmed, layout) == f"chunk {-(-45 // lines) - 1} is damaged"


@given(
    lines=st.integers(1, 80),
    columns=st.integers(1, 40),
    codes=st.integers(64, 900),
    spread=st.sampled_from([0.5, 3.0, 90.0]),
    contexts=st.booleans(),
    data=st.data(),
)
@settings(deadline=None)
def test_pairs_of_chunks(
    guarded: Guarded, lines: int, columns: int, codes: int, spread: float, contexts: bool, data: st.DataObject
) -> None:
    """Whatever their lengths are, and one of them damaged."""
    matrix = laplace(4, lines, columns, spread, 0.6)
    with chunks_of(codes):
        payload = written(b"", matrix, 3, data.draw(st.booleans()), contexts)
    layout = layout_of(b"", matrix)
    assert guarded.decode(payload, layout) == plain(b"", matrix)
    at = data.draw(st.integers(len(payload) // 8, len(payload) - 1))
    harmed = payload[:at] + bytes([payload[at] ^ data.draw(st.integers(1, 255))]) + payload[at + 1 :]
    guarded.decode(harmed, layout)


def test_many_codes() -> None:
    """More than one chunk as `encode` cuts them, and a last group of three lines."""
    codes = laplace(3, 1203, 1100, 1.2, 0.6)
    head = exponents(3, 2303)
    payload, params = rans.encode(head, codes)
    assert decode(np.frombuffer(payload, np.uint8), Layout(**params)).tobytes() == plain(head, codes)
    assert len(rans.encode(b"", codes, effort=0)[0]) > len(payload) - len(head)


# --- small -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0, 10.0, 100.0])
def test_near_the_entropy(spread: float) -> None:
    codes = laplace(4, 256, 256, spread)
    bits = codes.size * entropy(codes)
    payload, _ = rans.encode(b"", codes)
    # Magnitudes beyond 15 share tokens, in which not all are equally likely.
    assert len(payload) < bits / 8 * (1.005 if spread < 5 else 1.03) + 60


def test_contexts_follow_rows_and_columns() -> None:
    codes = laplace(5, 256, 512, 1.5, 0.8)
    static, _ = rans.encode(b"", codes, effort=0)
    adaptive, _ = rans.encode(b"", codes, effort=1)
    assert len(adaptive) < 0.93 * len(static)
    assert len(rans.encode(b"", codes, effort=2)[0]) <= len(adaptive)


def test_little_takes_little() -> None:
    """Tables, states and lengths must not weigh on small tensors: 2000 codes of 1.5 bits are 375 bytes."""
    codes = laplace(6, 40, 50, 0.62)
    ideal = codes.size * entropy(codes) / 8
    assert len(rans.encode(b"", codes)[0]) < ideal + 20
    assert len(rans.encode(b"", np.zeros((1, 1), np.int16))[0]) < 12


def grid(codes: Codes, seed: int) -> Quantized:
    rows, columns = codes.shape
    width = layout_of(b"", codes).width
    step = Step("grid.1", {"scale": 0.01, "view": None, "rows": [0], "width": width})
    payload = exponents(seed, rows) + exponents(seed + 1, columns) + codes.astype(f"<i{width}").tobytes()
    return Quantized.of("W", DTYPES["F32"], codes.shape, (step,), payload)


@pytest.mark.parametrize("level", [3, 12])
@pytest.mark.parametrize("spread", [0.5, 3.0, 200.0])
def test_packing_a_grid(level: int, spread: float) -> None:
    bare = grid(laplace(7, 120, 90, spread, 0.5), 7)
    packed = packing.pack(bare, level)
    assert [s.name for s in packed.steps] == ["rans.1", "grid.1"]
    others = (zstandard.ZstdCompressor(level=19).compress(bare.payload), deflate.zlib_compress(bare.payload, 12))
    assert len(packed.payload) < 0.97 * min(map(len, others))
    assert np.array_equal(packed.dequantize(), bare.dequantize())


def test_narrow_codes_in_a_wide_grid() -> None:
    step = Step("grid.1", {"scale": 1.0, "view": None, "rows": [0], "width": 2})
    codes = laplace(8, 60, 60, 2.0)
    bare = Quantized.of("W", DTYPES["F32"], (60, 60), (step,), bytes(120) + codes.astype("<i2").tobytes())
    packed = packing.pack(bare, 3)
    assert [s.name for s in packed.steps] == ["rans.1", "grid.1"]
    assert np.array_equal(packed.dequantize(), codes.astype(np.float32))


ALONE = """
import sys
sys.modules["wasmtime"] = None
from pathlib import Path
import numpy as np
from shrink.coders import packing
from shrink.model import DTYPES, Quantized
from shrink.steps import Step
folder, steps = Path(sys.argv[1]), {steps!r}
def tensor(name, chain):
    chain = tuple(Step(*step) for step in chain)
    return Quantized.of("W", DTYPES["F32"], {shape!r}, chain, (folder / name).read_bytes())
values = np.load(folder / "values.npy")
assert np.array_equal(tensor("packed", steps).dequantize(), values)
other = packing.pack(tensor("bare", steps[-1:]), 3)
assert other.steps[0].name in ("zstd.1", "deflate.1"), other.steps
assert np.array_equal(other.dequantize(), values)
"""


def test_without_wasmtime_grids_are_packed_by_others_and_still_read(tmp_path: Path) -> None:
    """In a process of its own, in which wasmtime cannot be imported."""
    bare = grid(laplace(9, 30, 40, 1.0), 9)
    packed = packing.pack(bare, 3)
    (tmp_path / "bare").write_bytes(bare.payload)
    (tmp_path / "packed").write_bytes(packed.payload)
    np.save(tmp_path / "values.npy", bare.dequantize())
    code = ALONE.format(steps=[(s.name, dict(s.params)) for s in packed.steps], shape=bare.shape)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_said_when_the_interpreter_ends() -> None:
    code = "import numpy as np; from shrink.coders import rans; rans.encode(b'', np.zeros((3, 3), np.int16))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- tampered with -----------------------------------------------------------------------------------------------


def test_every_flipped_bit_and_every_cut(guarded: Guarded) -> None:
    codes = np.clip(laplace(10, 9, 7, 4.0, 0.5), -15, 15)
    head = exponents(10, 16)
    layout = layout_of(head, codes)
    for bits, contexts in ((3, True), (0, False)):
        payload = written(head, codes, bits, False, contexts)
        same = 0
        for bit in range(8 * len(payload)):
            harmed = bytearray(payload)
            harmed[bit // 8] ^= 1 << bit % 8
            said = guarded.decode(bytes(harmed), layout)
            assert said == either(bytes(harmed), layout)
            same += said == plain(head, codes)
        # The header's last byte says one of several things that mean the same; bits that fill the last byte none.
        assert same < 16
        for length in range(len(payload)):
            assert isinstance(guarded.decode(payload[:length], layout), str)
        assert isinstance(guarded.decode(payload + b"\0", layout), str)


def test_mutations_do_no_harm(guarded: Guarded) -> None:
    """Refused, or decoded as the reference does; `python -m benchmarks fuzz` tries many more."""
    known = list(samples())
    rng = np.random.default_rng(12)
    decoded = 0
    for number in range(MUTATIONS):
        payload, layout = known[int(rng.integers(len(known)))]
        harmed = mutated(rng, payload)
        said = guarded.decode(harmed, layout)
        decoded += isinstance(said, bytes)
        if number % 40 == 0:
            assert said == either(harmed, layout)
    assert decoded < MUTATIONS / 2


def test_noise_and_wrong_sizes(guarded: Guarded) -> None:
    rng = np.random.default_rng(13)
    payload, layout = next(samples())
    for other in (
        Layout(layout.rows + 1, layout.columns, layout.head, layout.width),
        Layout(layout.rows, layout.columns, layout.head + 1, layout.width),
        Layout(layout.columns, layout.rows, layout.head, layout.width),
        Layout(0, 0, 0, 1),
        Layout(70, 1000, 0, 2),
    ):
        assert guarded.decode(payload, other) == either(payload, other)
    for length in range(300):
        noise = rng.bytes(length)
        assert guarded.decode(noise, layout) == either(noise, layout)


def test_the_decoder_asks_for_nothing(guarded: Guarded) -> None:
    assert guarded.imports == 0
    assert set(guarded.functions) == {"heap", "begin", "workspace", "chunk", "pair", "trellis", "factors", "grid"}


def test_an_address_outside_the_memory_traps(guarded: Guarded) -> None:
    end = guarded.memory.data_len(guarded.store)
    with pytest.raises(wasmtime.Trap, match="out of bounds"):
        guarded.call("begin", guarded.free, end, 64, 1, 1, 64, 1)


@pytest.mark.parametrize("contexts", [False, True])
def test_words_that_run_out_at_the_end_of_the_memory(guarded: Guarded, contexts: bool) -> None:
    """Of two chunks the second is cut: reading on would trap, 16 bytes behind its end."""
    codes = laplace(11, 80, 200, 3.0, 0.9)
    with chunks_of(8000):
        payload = written(b"", codes, 3, False, contexts)
    payload = payload[: len(payload) * 2 // 3]
    guarded.memory.grow(guarded.store, 2)
    source = guarded.memory.data_len(guarded.store) - 16 - len(payload)
    guarded.memory.write(guarded.store, payload, source)
    space = guarded.free + -(-codes.nbytes // 16) * 16
    layout = layout_of(b"", codes)
    assert guarded.call("begin", guarded.free, source, len(payload), *codes.shape, 0, layout.width) == 2
    assert [guarded.call("chunk", number, space) for number in range(2)] == [1, 0]
    assert guarded.call("pair", 0, space) == 0


# --- trellis -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2])
@given(data=st.data())
@settings(deadline=None)
def test_the_trellis_of_both_decoders(guarded: Guarded, width: int, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 35)))
    most = 127 if width == 1 else 16383
    codes = data.draw(arrays(f"<i{width}", shape, elements=st.integers(-3, 3) | st.integers(-most - 1, most)))
    assert guarded.trellis(codes.tobytes(), width, *shape) == trellised(codes).astype("<i2").tobytes()


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("bad", [16384, -16385, 32767, -32768])
def test_codes_too_large_for_the_trellis(guarded: Guarded, columns: int, bad: int) -> None:
    """Wherever it stands, the last vector included."""
    for at in range(3 * columns):
        codes = np.full(3 * columns, 16383, "<i2")
        codes[::2] = -16384
        assert (
            guarded.trellis(codes.tobytes(), 2, 3, columns) == trellised(codes.reshape(3, -1)).astype("<i2").tobytes()
        )
        codes[at] = bad
        assert guarded.trellis(codes.tobytes(), 2, 3, columns) == "a code is too large"


def test_every_state_and_all_lowest_bits(guarded: Guarded) -> None:
    """Eight codes at a time go through a table: three of them lead into each state, then come all of eight bits."""
    bits = np.arange(1 << 11)[:, None] >> np.arange(11) & 1
    for codes in (bits, -bits, 2 - bits, bits - 2):
        for start in range(8):
            shifted = np.pad(codes.astype("i1"), ((0, 0), (start, 0)))
            values = trellised(shifted).astype("<i2").tobytes()
            assert guarded.trellis(shifted.tobytes(), 1, *shifted.shape) == values
