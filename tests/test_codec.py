"""codec.wasm: made from the sources beside it, and every function gives what the reference decoder gives.

Python runs the very bytes that the browser runs, in wasmtime: with a bound on memory, with fuel, so that a loop without
end fails, and between marked bytes, so that a write past the end shows.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wasmtime
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shrink.errors import BadInput
from shrink.steps import Step, decode_bytes
from tests import setup
from tests.web import WEB, build

GOLDEN = sorted((Path(__file__).parent / "golden" / "steps").glob("*.json"))
PAGE = 65536
MARK = 0xA5
# What a call may take: far more than any here needs, reached in about a second.
FUEL = 500_000_000
MEMORY = 64 << 20


class Codec:
    """One instance of codec.wasm; each call lays out the memory anew."""

    def __init__(self) -> None:
        config = wasmtime.Config()
        config.consume_fuel = True
        engine = wasmtime.Engine(config)
        self.module = wasmtime.Module(engine, (WEB / "codec.wasm").read_bytes())
        self.store = wasmtime.Store(engine)
        self.store.set_limits(memory_size=MEMORY)
        self.store.set_fuel(FUEL)
        exports = wasmtime.Instance(self.store, self.module, []).exports(self.store)
        self.functions: dict[str, Any] = {n: f for n, f in exports.items() if isinstance(f, wasmtime.Func)}
        memory = exports["memory"]
        assert isinstance(memory, wasmtime.Memory)
        self.memory = memory
        self.space = -(-self.call("heap") // 16) * 16
        self.free = self.space + self.call("workspace")

    def call(self, name: str, *arguments: int) -> int:
        self.store.set_fuel(FUEL)
        result: int | None = self.functions[name](self.store, *arguments)
        return (result or 0) & 0xFFFFFFFF

    def run(self, name: str, source: bytes, size: int, *more: int, shift: int = 0, before: tuple[int, ...] = ()) -> Any:
        """Call name(*before, target, …) as `arguments` says below; its result, and what then lies at `target`.

        `shift` moves both addresses, as nothing says that they are aligned. Memory ends 16 bytes after the target.
        """
        start = self.free + 64 + shift
        target = start + len(source) + 64
        end = target + size + 64
        missing = end - self.memory.data_len(self.store)
        if missing > 0:
            self.memory.grow(self.store, -(-missing // PAGE))
        pages = self.memory.size(self.store)
        self.memory.write(self.store, bytes([MARK]) * (end - self.free), self.free)
        self.memory.write(self.store, source, start)
        arguments = {
            "unzstd": (self.space, target, size, start, len(source)),
            "crc32": (*more, start, len(source)),
            "planes": (target, start, *more),
            "sparse": (target, start, len(source), *more),
            "nibbles": (target, start, len(source)),
        }[name]
        result = self.call(name, *arguments)
        after = bytes(self.memory.read(self.store, self.free, end))
        assert self.memory.size(self.store) == pages
        out = after[target - self.free : target - self.free + size]
        marks = bytes([MARK]) * 64
        assert after[start - self.free - 64 : target - self.free] == marks + source + marks, (
            "it wrote before its target"
        )
        assert after[-64:] == marks, "it wrote past its target"
        return result, out

    def step(self, step: Step, data: bytes) -> bytes | None:
        """What a byte step makes of the data, as codec.js has it done; None where it refuses."""
        params = step.params
        skip = params.get("skip", 0)
        head, rest = data[:skip], data[skip:]
        if step.name == "zstd.1":
            fits, out = self.run("unzstd", data, params["size"])
            return out if fits else None
        if step.name == "planes.1":
            width = params["width"]
            return head + bytes(self.run("planes", rest, len(rest), width, len(rest) // width)[1])
        assert step.name == "sparse.1"
        fits, out = self.run("sparse", rest, params["width"] * params["count"], params["width"], params["count"])
        return head + out if fits else None


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec()


def reference(step: Step, data: bytes) -> bytes | None:
    try:
        return decode_bytes(data, [step], 1 << 24, "W").tobytes()
    except BadInput:
        return None


# --- where it comes from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", build.MODULES, ids=lambda module: module.path.name)
def test_the_sources_give_these_very_bytes(module: build.Wasm) -> None:
    obstacle = setup.codec_obstacle()
    if obstacle:
        pytest.skip(f"{module.path.name} is not made anew: {obstacle}")
    assert module.path.read_bytes() == build.built(module)
    assert (WEB / "zstd.LICENSE").read_bytes() == (setup.CODEC_TOOLS / "zstd" / "LICENSE").read_bytes()


def test_it_asks_for_nothing_and_offers_what_is_tested_here(codec: Codec) -> None:
    assert codec.module.imports == []
    assert {e.name for e in codec.module.exports} == {*codec.functions, "memory"}
    assert set(codec.functions) == {"heap", "workspace", "unzstd", "crc32", "planes", "sparse", "nibbles"}


# --- the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files(codec: Codec, path: Path) -> None:
    """Every byte step but deflate.1, which browsers have themselves, and those of rans.wasm; codes of four bits."""
    cases = json.loads(path.read_text())
    assert cases
    for case in cases:
        data = base64.b64decode(case["payload"])
        for name, params in case["steps"][:-1]:
            expected = reference(Step(name, params), data)
            assert expected is not None
            if name not in ("deflate.1", "rans.1", "trellis.1"):
                assert codec.step(Step(name, params), data) == expected
            data = expected
        assert codec.run("crc32", data, 0, 0)[0] == zlib.crc32(data)
        assert codec.run("nibbles", data, 2 * len(data))[1] == nibbles(data)


def test_the_golden_files_are_there() -> None:
    assert {"zstd.1", "planes.1", "sparse.1", "affine.1"} <= {path.stem for path in GOLDEN}


def nibbles(data: bytes) -> bytes:
    packed = np.frombuffer(data, np.uint8)
    codes = np.stack([packed & 15, packed >> 4], axis=1).astype(np.int8)
    return ((codes ^ 8) - 8).tobytes()


@given(data=st.binary(max_size=300), cut=st.integers(0, 300), start=st.integers(0, 2**32 - 1), shift=st.integers(0, 15))
def test_crc32(codec: Codec, data: bytes, cut: int, start: int, shift: int) -> None:
    signed = start - (start >> 31 << 32)
    assert codec.run("crc32", data, 0, signed, shift=shift)[0] == zlib.crc32(data, start)
    first, _ = codec.run("crc32", data[:cut], 0, 0)
    assert codec.run("crc32", data[cut:], 0, first - (first >> 31 << 32))[0] == zlib.crc32(data)


@given(data=st.binary(max_size=200), shift=st.integers(0, 15))
def test_nibbles(codec: Codec, data: bytes, shift: int) -> None:
    assert codec.run("nibbles", data, 2 * len(data), shift=shift)[1] == nibbles(data)


@pytest.mark.parametrize("width", [2, 3, 4, 8, 63, 64, 65, 130])
@given(
    count=st.integers(0, 150),
    skip=st.integers(0, 9),
    seed=st.integers(0, 999),
)
def test_planes(codec: Codec, width: int, count: int, skip: int, seed: int) -> None:
    data = np.random.default_rng(seed).bytes(skip + width * count)
    step = Step("planes.1", {"width": width, "skip": skip})
    assert codec.step(step, data) == reference(step, data)


@pytest.mark.parametrize("width", range(1, 9))
def test_every_byte_of_a_mask(codec: Codec, width: int) -> None:
    """Also where the items, but not the mask, end within a vector."""
    mask = bytes(range(256))
    for count in (*range(70), *range(2030, 2049)):
        cut = (int.from_bytes(mask, "little") & ((1 << count) - 1)).to_bytes((count + 7) // 8, "little")
        data = cut + np.random.default_rng(count).bytes(width * int.from_bytes(cut, "little").bit_count())
        step = Step("sparse.1", {"width": width, "count": count, "skip": 0})
        expected = reference(step, data)
        assert expected is not None
        assert codec.step(step, data) == expected


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@given(
    count=st.integers(0, 150),
    skip=st.integers(0, 9),
    seed=st.integers(0, 999),
    density=st.sampled_from([0, 0.02, 0.5, 0.98, 1]),
    wrong=st.sampled_from(["nothing", "short", "long", "flipped", "count", "past"]),
)
def test_sparse(codec: Codec, width: int, count: int, skip: int, seed: int, density: float, wrong: str) -> None:
    """Also what does not fit together: what the reference refuses is refused, and nothing else."""
    rng = np.random.default_rng(seed)
    present = rng.random(count) < density
    mask = np.packbits(present, bitorder="little").tobytes()
    data = bytearray(rng.bytes(skip) + mask + rng.bytes(width * int(present.sum())))
    if wrong == "short" and len(data) > skip:
        del data[-1]
    elif wrong == "long":
        data += bytes(width)
    elif wrong == "flipped" and mask:
        data[skip + int(rng.integers(len(mask)))] ^= 1 << int(rng.integers(8))
    elif wrong == "past" and count % 8:
        # A bit behind the last item, and an item for it.
        data[skip + len(mask) - 1] |= 1 << int(rng.integers(count % 8, 8))
        data += bytes(width)
    elif wrong == "count":
        count += int(rng.integers(1, 40))
    step = Step("sparse.1", {"width": width, "count": count, "skip": skip})
    assert codec.step(step, bytes(data)) == reference(step, bytes(data))


def test_a_mask_of_which_nothing_is_there(codec: Codec) -> None:
    for count in (1, 2**31, 2**32 - 1):
        signed = count - (count >> 31 << 32)
        assert codec.run("sparse", b"", 64, 1, signed)[0] == 0
        assert codec.run("sparse", b"\xff" * 9, 64, 8, signed)[0] == 0


# What compresses in several ways: runs, few values, text, noise.
contents = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda b, n: b * n, st.binary(max_size=9), st.integers(0, 9000)),
    st.builds(
        lambda seed, n, spread: np.asarray(np.random.default_rng(seed).normal(0, spread, n)).astype(np.int8).tobytes(),
        st.integers(0, 99),
        st.integers(0, 200_000),
        st.sampled_from([0.3, 4, 30]),
    ),
)


@given(data=contents, level=st.integers(-5, 22), checksum=st.booleans(), sized=st.booleans())
def test_unzstd(codec: Codec, data: bytes, level: int, checksum: bool, sized: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=sized)
    frame = compressor.compress(data)
    assert codec.step(Step("zstd.1", {"size": len(data)}), frame) == data
    assert codec.step(Step("zstd.1", {"size": len(data) + 1}), frame) is None
    if data:
        assert codec.step(Step("zstd.1", {"size": len(data) - 1}), frame) is None


@given(
    data=contents, seed=st.integers(0, 9999), checksum=st.booleans(), wrong=st.sampled_from(["cut", "flip", "noise"])
)
def test_damaged_frames(codec: Codec, data: bytes, seed: int, checksum: bool, wrong: str) -> None:
    """Refused, or, where the damage leaves a frame, decoded as Zstandard does in Python."""
    rng = np.random.default_rng(seed)
    frame = bytearray(zstandard.ZstdCompressor(level=3, write_checksum=checksum).compress(data))
    if wrong == "cut":
        del frame[int(rng.integers(len(frame))) :]
    elif wrong == "flip":
        for _ in range(int(rng.integers(1, 4))):
            frame[int(rng.integers(len(frame)))] ^= 1 << int(rng.integers(8))
    else:
        at = int(rng.integers(4, len(frame)))
        frame[at : at + 16] = rng.bytes(16)
    step = Step("zstd.1", {"size": len(data)})
    out = codec.step(step, bytes(frame))
    if wrong == "cut":
        assert out is None
    if data:
        assert out == whole_frame(bytes(frame), len(data))
        assert out in (None, reference(step, bytes(frame)))


def whole_frame(data: bytes, size: int) -> bytes | None:
    """What Zstandard itself makes of one frame of this size, with nothing missing at its end and nothing after it."""
    try:
        if zstandard.frame_content_size(data) not in (-1, size):
            return None
        out = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError:
        return None
    return out if len(out) == size else None


def test_every_flipped_bit(codec: Codec) -> None:
    """Among them offsets that point before the first byte, of which a frame without checksum says nothing."""
    noise = np.random.default_rng(4).bytes(90)
    data = noise + b"weights " * 9 + noise[20:70] + noise[10:40]
    frame = zstandard.ZstdCompressor(level=19, write_checksum=False).compress(data)
    step = Step("zstd.1", {"size": len(data)})
    decoded = 0
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        out = codec.step(step, bytes(flipped))
        assert out == whole_frame(bytes(flipped), len(data))
        assert out in (None, reference(step, bytes(flipped)))
        decoded += out is not None
    assert 100 < decoded < 7 * len(frame)


def frame_header(size: int) -> bytes:
    """Of a frame in one segment, with its content size in eight bytes."""
    return b"\x28\xb5\x2f\xfd" + b"\xe0" + size.to_bytes(8, "little")


BIG = zstandard.ZstdCompressor(level=3).compress(bytes(30_000_000))
FIVE = zstandard.ZstdCompressor(level=3).compress(b"12345")
RUN = b"\x03\x00\x80"  # the header of a last block: one byte, 2^20 times


@pytest.mark.parametrize(
    ("data", "size"),
    [
        pytest.param(b"", 10, id="nothing"),
        pytest.param(FIVE + b"x", 5, id="a byte after the frame"),
        pytest.param(FIVE + FIVE, 10, id="two frames"),
        pytest.param(FIVE + FIVE, 5, id="a frame after the frame"),
        pytest.param(b"\x50\x2a\x4d\x18\x05\x00\x00\x0012345", 5, id="a frame to skip"),
        pytest.param(
            # As a frame to decode: a run of 0xa0 bytes.
            b"\x50\x2a\x4d\x18\xa0\x00\x00\x00\x00\x03\x05\x00x",
            0xA0,
            id="a frame to skip that could be decoded",
        ),
        pytest.param(BIG, 1000, id="30 MB where 1000 bytes belong"),
        pytest.param(frame_header(2**63) + RUN + b"x", 1000, id="2^63 bytes"),
        pytest.param(frame_header(2**32 + 1000) + RUN + b"x", 1000, id="2^32 bytes more"),
        pytest.param(frame_header(1000) + RUN + b"x", 1000, id="a run longer than a block"),
        pytest.param(b"\x28\xb5\x2f\xfd\x01\x58\x07\x29\x00\x0012345", 5, id="a dictionary"),
        pytest.param(b"\x25\xb5\x2f\xfd" + FIVE[4:], 5, id="an old version"),
        pytest.param(zlib.compress(b"12345"), 5, id="zlib"),
    ],
)
def test_frames_that_are_refused(codec: Codec, data: bytes, size: int) -> None:
    assert codec.step(Step("zstd.1", {"size": size}), data) is None
    # The instance is as good as before.
    assert codec.step(Step("zstd.1", {"size": 5}), FIVE) == b"12345"


def test_an_address_outside_the_memory_traps(codec: Codec) -> None:
    """What a mistake of the caller comes to: an error, never foreign bytes."""
    end = codec.memory.data_len(codec.store)
    for name, arguments in {
        "crc32": (0, end - 4, 8),
        "planes": (end - 4, codec.free, 2, 64),
        "nibbles": (codec.free, end - 4, 64),
        "sparse": (codec.free, end - 4, 64, 1, 64),
    }.items():
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            codec.call(name, *arguments)
