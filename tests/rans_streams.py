"""Payloads of rans.1 for tests and for the fuzzer of `benchmarks`, and the decoder between marked bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import wasmtime
from numpy.typing import NDArray

from shrink.coders import rans
from shrink.coders.wasm import ENCODER
from shrink.entropy import WASM, Layout
from shrink.wasm import Instance

Codes = NDArray[np.int16]

MARK = 0xA5
MARGIN = 64
PAGE = 65536
# What a call may take: far more than any here needs, reached in about a second.
FUEL = 500_000_000


def laplace(seed: int, rows: int, columns: int, spread: float, varied: float = 0.0) -> Codes:
    """Codes as rounding gives them, their spread different from row to row and column to column."""
    rng = np.random.default_rng(seed)
    wide = np.exp(rng.normal(0, varied, (rows, 1)) + rng.normal(0, varied, (1, columns))) if varied else 1.0
    values = np.round(rng.laplace(0, spread, (rows, columns)) * wide)
    return np.clip(values, -32768, 32767).astype(np.int16)


def entropy(codes: NDArray[np.signedinteger]) -> float:
    """Bits per code, were each coded by how often it comes."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / codes.size)).sum() / codes.size)


def exponents(seed: int, count: int) -> bytes:
    """A head as grid.1 has it."""
    walk = np.cumsum(np.random.default_rng(seed).normal(0, 0.7, count))
    return np.clip(np.round(walk), -100, 100).astype(np.int8).tobytes()


def layout_of(head: bytes, codes: Codes) -> Layout:
    rows, columns = codes.shape
    fits = codes.size == 0 or (int(codes.min()) >= -128 and int(codes.max()) <= 127)
    return Layout(rows, columns, len(head), 1 if fits else 2)


def plain(head: bytes, codes: Codes) -> bytes:
    """What a payload of these must decode to."""
    return head + codes.astype(f"<i{layout_of(head, codes).width}").tobytes()


def written(head: bytes, codes: Codes, lane_bits: int, flat: bool, contexts: bool) -> bytes:
    """A payload with this layout, whatever `encode` would choose."""
    return rans._written(Instance(ENCODER), head, codes, (lane_bits, flat), contexts)


def samples() -> Iterator[tuple[bytes, Layout]]:
    """Small payloads of every form."""
    forms = [(bits, flat, contexts) for bits in range(4) for flat in (False, True) for contexts in (False, True)]
    for number, (bits, flat, contexts) in enumerate(forms):
        for rows, columns, spread, varied in ((17, 23, 1.5, 0.8), (3, 40, 9.0, 0.0), (9, 16, 2000.0, 1.0)):
            codes = laplace(number, rows, columns, spread, varied)
            head = exponents(number, rows + columns)
            yield written(head, codes, bits, flat, contexts), layout_of(head, codes)
    # Several chunks, the last one shorter or not, as two of them are decoded at a time.
    for number, (lines, contexts, spread) in enumerate([(48, False, 1.0), (48, True, 30.0), (43, True, 1.0)]):
        codes, head = laplace(number, lines, 20, spread, 0.8), exponents(number, lines + 20)
        with chunks_of(320):
            yield written(head, codes, 3, False, contexts), layout_of(head, codes)


@contextmanager
def chunks_of(codes: int) -> Iterator[None]:
    """Within, payloads are written with chunks of about so many codes, else of many more than a test should have."""
    before = rans._CHUNK_CODES
    rans._CHUNK_CODES = codes
    try:
        yield
    finally:
        rans._CHUNK_CODES = before


class Guarded:
    """rans.wasm with fuel, so that a loop without end fails, and with marks around what it may write."""

    def __init__(self) -> None:
        config = wasmtime.Config()
        config.consume_fuel = True
        engine = wasmtime.Engine(config)
        self.store = wasmtime.Store(engine)
        self.store.set_fuel(FUEL)
        module = wasmtime.Module(engine, WASM.read_bytes())
        self.imports = len(module.imports)
        self.pairs = 0
        exports = wasmtime.Instance(self.store, module, []).exports(self.store)
        self.functions = {n: f for n, f in exports.items() if isinstance(f, wasmtime.Func)}
        memory = exports["memory"]
        assert isinstance(memory, wasmtime.Memory)
        self.memory = memory
        self.free = -(-self.call("heap") // 16) * 16

    def call(self, name: str, *arguments: int) -> int:
        self.store.set_fuel(FUEL)
        result: int = self.functions[name](self.store, *arguments)
        return result

    def decode(self, payload: bytes, layout: Layout) -> bytes | str:
        """The bytes, or in words what is damaged; fails when it writes where it may not.

        Chunks are decoded in pairs where they can be, as in the browser, and also one by one, as in Python.
        """
        one_by_one = self._guarded(payload, layout, pairs=False)
        assert self._guarded(payload, layout, pairs=True) == one_by_one, "pairs of chunks are decoded differently"
        return one_by_one

    def _guarded(self, payload: bytes, layout: Layout, *, pairs: bool) -> bytes | str:
        source = self.free + MARGIN
        target = -(-(source + len(payload) + MARGIN) // 16) * 16
        space = -(-(target + layout.size + MARGIN) // 16) * 16
        # As much as the stride can come to.
        room = 6 * (layout.rows * layout.columns + 16)
        end = space + room + MARGIN
        missing = end + PAGE - self.memory.data_len(self.store)
        if missing > 0:
            self.memory.grow(self.store, -(-missing // PAGE))
        self.memory.write(self.store, bytes([MARK]) * (end - self.free), self.free)
        self.memory.write(self.store, payload, source)
        said = self._decoded(source, target, space, len(payload), layout, pairs)
        after = bytes(self.memory.read(self.store, self.free, end))
        marks = bytes([MARK]) * MARGIN
        out = after[target - self.free : target - self.free + layout.size]
        assert after[:MARGIN] == marks
        assert after[MARGIN : MARGIN + len(payload)] == payload
        assert set(after[MARGIN + len(payload) : target - self.free]) == {MARK}, "it wrote before its target"
        assert set(after[target - self.free + layout.size : space - self.free]) == {MARK}, "it wrote past its target"
        assert after[-MARGIN:] == marks, "it wrote past its workspace"
        return said or out

    def trellis(self, codes: bytes, width: int, rows: int, columns: int) -> bytes | str:
        """The values, or what is damaged; the codes end where the memory does, so that reading past them traps."""
        size = 2 * rows * columns
        end = self.memory.data_len(self.store)
        if end - self.free < size + len(codes) + 3 * MARGIN:
            self.memory.grow(self.store, -(-(size + len(codes) + 3 * MARGIN) // PAGE))
            end = self.memory.data_len(self.store)
        # Behind a head, nothing is aligned.
        source, target = end - len(codes), self.free + MARGIN + 1
        self.memory.write(self.store, bytes([MARK]) * (source - self.free) + codes, self.free)
        fit = self.call("trellis", target, source, width, rows, columns)
        after = bytes(self.memory.read(self.store, self.free, end))
        at = target - self.free
        assert set(after[:at] + after[at + size : source - self.free]) == {MARK}, "it wrote beside its target"
        assert after[source - self.free :] == codes
        return after[at : at + size] if fit else "a code is too large"

    def _decoded(self, source: int, target: int, space: int, length: int, layout: Layout, pairs: bool) -> str:
        chunks = self.call("begin", target, source, length, layout.rows, layout.columns, layout.head, layout.width)
        if chunks < 0:
            return "the header is damaged"
        assert self.call("workspace") <= 6 * (layout.rows * layout.columns + 16)
        number = 0
        while number < chunks:
            if pairs and self.call("pair", number, space):
                self.pairs += 1
                number += 2
            elif self.call("chunk", number, space):
                number += 1
            else:
                return f"chunk {number} is damaged"
        return ""


def mutated(rng: np.random.Generator, payload: bytes) -> bytes:
    """One to four changes: bits, bytes, stretches that are cut, doubled, or noise."""
    data = bytearray(payload)
    for _ in range(int(rng.integers(1, 5))):
        if not data:
            break
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 9))
        kind = int(rng.integers(5))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        else:
            data[at : at + length] = rng.bytes(length)
    return bytes(data)
