"""What a payload of rans.1 means: `decode` gives the head's bytes and the codes, or says what is damaged.

A payload is the length of its header (7 bits per byte, the lowest first, 128 = more follow), the header, the chunks.

The header is one arithmetic code of bits, most of them adaptive (`_Bits`). In order: 2 bits, the binary logarithm of
the lanes; 1, whether a line is an equal share of all codes for each lane, otherwise it is a row; 1, contexts; 1,
several chunks, then 32, the lines in a chunk, and 32 for the bytes of every chunk but the last. If there are codes: 2,
the precision of levels; with contexts 12, the first mean, and one adaptive bit for each context but the first, whether
it begins a new table; the tables (`_table`). Last the bytes of the head (`_head`).

A chunk is the lanes' first states, 32 bits each; 16-bit words, all little-endian; and the bits of escapes, from the
chunk's last byte backwards, its highest bit first. Lane l reads line s + l of each group of lines s, s + 1 …; the lanes
take turns, column by column. A code's token is that whose slots hold the state's low 12 bits; the state becomes
frequency · (state >> 12) + (low bits − first slot), and below 2^16 takes in a word. It ends where it must: all states
2^16, nothing left over.

A token below 31 is the code + 15. From 31 on there are two to an octave: (2 or 3) · 2^(k−1) is the least magnitude,
k = 4 + (token − 31) // 2; k − 1 bits are added to it, one is the sign.

With contexts, a line's mean starts at the first mean and moves by ((m · 256 − mean) >> 5) with each magnitude m, at
most 15; a column's mean, in its chunk, moves after each group by (((sum of m · 256 / lanes) − mean) · rate >> 12), with
rate = max(4096 // (groups so far + 2), 64 · lanes). The context is the sum of the levels of both, in quarter octaves.

This is the reference; `web/rans.c` is what browsers run, and this too where wasmtime is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shrink.errors import MissingDependency
from shrink.wasm import Instance

__all__ = ["WASM", "Damaged", "Layout", "decode", "reference"]

Bytes = NDArray[np.uint8]
I64 = NDArray[np.int64]

WASM = Path(__file__).parent / "web" / "rans.wasm"

_SLOT_BITS = 12
_SLOTS = 1 << _SLOT_BITS
_LOWEST = 1 << 16
_EXACT = 15
_ESCAPE = 31
_TOKENS = 54
_CLASSES = 39
_TABLES_AT_MOST = 16
_CHUNKS_AT_MOST = 4096
_CONTEXTS = 63
_MOST_SEEN = 24
_UNARY = 14
# 2^(i/16) · 2^12.
_POWERS = (4096, 4277, 4467, 4664, 4871, 5087, 5312, 5547, 5793, 6049, 6317, 6597, 6889, 7194, 7512, 7845)
# Level of a mean of magnitudes in 256ths, by mean // 4: quarter octaves of that + 4, linear within an octave.
_LEVELS: I64 = np.array([4 * (v.bit_length() - 4) + (v >> v.bit_length() - 3) for v in range(4, 965)], np.int64)


class Damaged(Exception):
    """What is damaged, in words that go after `rans.1: `."""


@dataclass(frozen=True)
class Layout:
    """What the chain says about a payload: codes (rows, columns) of `width` bytes, 1 or 2, behind `head` bytes."""

    rows: int
    columns: int
    head: int
    width: int

    @property
    def size(self) -> int:
        """Bytes that come out."""
        return self.head + self.rows * self.columns * self.width


def decode(payload: Bytes, layout: Layout) -> Bytes:
    """The head's bytes, then the codes, row after row, little-endian: `layout.size` bytes.

    Raises:
        Damaged: the payload is not one of this layout.
    """
    try:
        return _compiled(payload, layout)
    except (MissingDependency, MemoryError):
        return reference(payload, layout)


def _compiled(payload: Bytes, layout: Layout) -> Bytes:
    instance = Instance(WASM)
    _, source, target, space, _ = instance.lay_out(16, payload.size + 16, layout.size, 0)
    instance.view(source, payload.shape, "u1")[:] = payload
    chunks = instance.call(
        *("begin", target, source, payload.size, layout.rows, layout.columns, layout.head, layout.width)
    )
    if chunks >> 31:
        raise Damaged("the header is damaged")
    instance.lay_out(instance.call("workspace"), start=space)
    for number in range(chunks):
        if not instance.call("chunk", number, space):
            raise Damaged(f"chunk {number} is damaged")
    out: Bytes = instance.view(target, (layout.size,), "u1").copy()
    return out


def reference(payload: Bytes, layout: Layout) -> Bytes:
    """`decode` in plain NumPy: slow, and right by definition."""
    size, start = _header_length(payload)
    if size > payload.size - start:
        raise Damaged("the header is damaged")
    bits = _Bits(payload[start : start + size].tobytes())
    stream = _Stream.read(bits, layout)
    head = _head(bits, layout)
    if bits.missing != 3:
        raise Damaged("the header is damaged")
    codes = np.zeros(layout.rows * layout.columns, f"<i{layout.width}")
    rest = payload[start + size :]
    known = sum(stream.lengths)
    if known > rest.size or (not stream.chunks and rest.size):
        raise Damaged("the header is damaged")
    for number, length in enumerate((*stream.lengths, rest.size - known)[: stream.chunks]):
        first = number * stream.band * stream.stride
        part = codes[first : first + stream.band * stream.stride]
        if not _chunk(rest[:length], stream, part):
            raise Damaged(f"chunk {number} is damaged")
        rest = rest[length:]
    return np.concatenate([head, codes.view(np.uint8)])


def _header_length(payload: Bytes) -> tuple[int, int]:
    size = 0
    for i, byte in enumerate(payload[:5].tolist()):
        size |= (byte & 127) << 7 * i
        if byte < 128:
            return size & 0xFFFFFFFF, i + 1
    raise Damaged("the header is damaged")


class _Bit:
    """An adaptive bit: 2^16 times how likely a one is, and how often it was seen."""

    def __init__(self) -> None:
        self.one = 32768
        self.seen = 0


class _Number:
    """The adaptive bits of a small number: is it zero, its sign, does its magnitude go on."""

    def __init__(self) -> None:
        self.zero, self.sign = _Bit(), _Bit()
        self.more = [_Bit() for _ in range(_UNARY)]


class _Bits:
    """The header's bits. `missing` counts the bytes that were asked for behind its end."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 4
        self.low, self.high = 0, 0xFFFFFFFF
        self.value = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    @property
    def missing(self) -> int:
        return self.at - len(self.data)

    def bit(self, one: int) -> int:
        middle = self.low + ((self.high - self.low) * one >> 16)
        value = int(self.value <= middle)
        if value:
            self.high = middle
        else:
            self.low = middle + 1
        while not (self.low ^ self.high) >> 24:
            self.low = self.low << 8 & 0xFFFFFFFF
            self.high = (self.high << 8 | 255) & 0xFFFFFFFF
            following = self.data[self.at] if self.at < len(self.data) else 0
            self.value = (self.value << 8 | following) & 0xFFFFFFFF
            self.at += 1
        return value

    def adaptive(self, bit: _Bit) -> int:
        rate = 131072 // (2 * bit.seen + 3)
        value = self.bit(bit.one)
        bit.one += (65535 - bit.one) * rate >> 16 if value else -(bit.one * rate >> 16)
        bit.seen = min(bit.seen + 1, _MOST_SEEN)
        return value

    def direct(self, bits: int) -> int:
        out = 0
        for _ in range(bits):
            out = out << 1 | self.bit(32768)
        return out

    def number(self, bits: _Number, most: int) -> int:
        if not self.adaptive(bits.zero):
            return 0
        negative = self.adaptive(bits.sign)
        magnitude = 1
        while magnitude < most and self.adaptive(bits.more[min(magnitude, _UNARY) - 1]):
            magnitude += 1
        return -magnitude if negative else magnitude


def _head(bits: _Bits, layout: Layout) -> Bytes:
    """Its bytes; where there is one per row and column, these are two parts. Each part is told in one of three ways:
    raw, as differences to its first byte, or to the byte before."""
    head = bytearray()
    split = layout.rows if layout.head == layout.rows + layout.columns else layout.head
    for part in (split, layout.head - split):
        if not part:
            continue
        way = bits.direct(2)
        numbers = [_Number() for _ in range(3)]
        before = 1
        start = len(head)
        for i in range(part):
            if i == 0 or way == 0:
                head.append(bits.direct(8))
                continue
            off = bits.number(numbers[before], 128)
            before = 0 if off < 0 else 2 if off > 0 else 1
            head.append(((head[start] if way == 1 else head[-1]) + off) & 255)
    return np.frombuffer(bytes(head), np.uint8)


@dataclass(frozen=True)
class _Table:
    """Of each slot its token, of each token its frequency and first slot."""

    token: I64
    frequency: I64
    first: I64


@dataclass(frozen=True)
class _Contexts:
    mean: int
    table: I64


@dataclass(frozen=True)
class _Stream:
    lanes: int
    stride: int
    band: int
    chunks: int
    lengths: tuple[int, ...]
    contexts: _Contexts | None
    tables: tuple[_Table, ...]

    @staticmethod
    def read(bits: _Bits, layout: Layout) -> _Stream:
        count = layout.rows * layout.columns
        lanes = 1 << bits.direct(2)
        flat, contexts, many = bits.direct(1), bits.direct(1), bits.direct(1)
        stride = -(-count // lanes) if flat else layout.columns
        lines = -(-count // stride) if count else 0
        band = bits.direct(32) if many else lines
        if (many and not lines) or (lines and not band):
            raise Damaged("the header is damaged")
        if not lines:
            return _Stream(lanes, stride, 0, 0, (), None, ())
        chunks = -(-lines // band)
        if chunks > _CHUNKS_AT_MOST:
            raise Damaged("the header is damaged")
        lengths = tuple(bits.direct(32) for _ in range(chunks - 1))
        precision = bits.direct(2)
        known = _contexts(bits) if contexts else None
        table_bits = _TableBits()
        tables = tuple(
            _slots(_table(bits, table_bits, precision), precision)
            for _ in range(int(known.table[-1]) + 1 if known else 1)
        )
        return _Stream(lanes, stride, band, chunks, lengths, known, tables)


def _contexts(bits: _Bits) -> _Contexts:
    mean = bits.direct(12)
    if mean > _EXACT << 8:
        raise Damaged("the header is damaged")
    following = _Bit()
    begins = [0, *(bits.adaptive(following) for _ in range(_CONTEXTS - 1))]
    if sum(begins) >= _TABLES_AT_MOST:
        raise Damaged("the header is damaged")
    return _Contexts(mean, np.cumsum(begins))


class _TableBits:
    def __init__(self) -> None:
        self.present = [[_Bit(), _Bit()] for _ in range(4)]
        self.level = [_Number() for _ in range(4)]


def _table(bits: _Bits, known: _TableBits, precision: int) -> list[int]:
    """Level of each token, in 2^(precision + 1) per octave, −1 where it does not occur.

    They come by magnitude, each told by how far it is from what the magnitudes before let expect.
    """
    top = 12 << (precision + 1)
    levels = [-1] * _TOKENS
    means: list[int] = []
    classes = bits.direct(6)
    if classes > _CLASSES:
        raise Damaged("the header is damaged")
    before = 1
    for c in range(classes):
        expected = means[c - 1] if c else top
        if c > 2:
            expected += (means[c - 1] - means[c - 3]) >> 1
        expected = min(max(expected, 0), top)
        found: list[int] = []
        if c == 0:
            tokens = [(0, _EXACT)]
        elif c <= _EXACT:
            tokens = [(1, _EXACT + c), (2, _EXACT - c)]
        else:
            tokens = [(3, _ESCAPE + c - _EXACT - 1)]
        for kind, token in tokens:
            before = bits.adaptive(known.present[kind][before])
            if before:
                level = (found[0] if found else expected) + bits.number(known.level[kind], top)
                if not 0 <= level <= top:
                    raise Damaged("the header is damaged")
                levels[token] = level
                found.append(level)
        means.append(sum(found) // len(found) if found else expected)
    return levels


def _slots(levels: list[int], precision: int) -> _Table:
    """Frequencies are 2^level, made to come to 4096; the largest takes what is left."""
    weights = []
    for level in levels:
        fine = max(level, 0) << (3 - precision)
        weights.append(_POWERS[fine & 15] << (fine >> 4) if level >= 0 else 0)
    total = sum(weights)
    if not total:
        raise Damaged("the header is damaged")
    frequencies = [max(weight * _SLOTS // total, 1) if weight else 0 for weight in weights]
    frequencies[weights.index(max(weights))] += _SLOTS - sum(frequencies)
    frequency = np.array(frequencies, np.int64)
    return _Table(np.repeat(np.arange(_TOKENS), frequency), frequency, np.cumsum(frequency) - frequency)


def _chunk(data: Bytes, stream: _Stream, out: NDArray[np.signedinteger]) -> bool:
    """Decode one chunk into its part of the codes; False where it is damaged."""
    lanes, stride = stream.lanes, stream.stride
    reader = _Reader.open(data, lanes)
    if reader is None:
        return False
    known = stream.contexts
    columns = np.full(stride, known.mean if known else 0, np.int64)
    table_of = known.table if known else np.zeros(_CONTEXTS, np.int64)
    tokens, frequencies, firsts = (
        np.array([getattr(t, field) for t in stream.tables]) for field in ("token", "frequency", "first")
    )
    for group, start in enumerate(range(0, out.size, lanes * stride)):
        lines = out[start : start + lanes * stride]
        means = np.full(lanes, known.mean if known else 0, np.int64)
        rate = max(4096 // (group + 2), 64 * lanes)
        for column in range(min(stride, lines.size)):
            active = len(lines[column::stride])
            table = table_of[_LEVELS[means[:active] >> 2] + _LEVELS[columns[column] >> 2]]
            slot = reader.states[:active] & (_SLOTS - 1)
            token = tokens[table, slot]
            reader.advance(frequencies[table, token], slot - firsts[table, token])
            values = token - _EXACT
            for lane in np.flatnonzero(token >= _ESCAPE):
                values[lane] = reader.escaped(int(token[lane]))
            lines[column::stride] = values
            if reader.broken or (lines[column::stride] != values).any():
                return False
            magnitudes = np.minimum(abs(token - _EXACT), _EXACT)
            means[:active] += ((magnitudes << 8) - means[:active]) >> 5
            columns[column] += (((int(magnitudes.sum()) << 8) // lanes) - columns[column]) * rate >> 12
    return reader.finished


class _Reader:
    """States, words and escape bits of a chunk. `broken` once more is read than is there."""

    def __init__(self, states: I64, words: Bytes):
        self.states = states
        self.rest = words
        self.words = words[: words.size // 2 * 2].view("<u2").astype(np.int64)
        self.used = 0
        self.bits = 0
        self.broken = False

    @staticmethod
    def open(data: Bytes, lanes: int) -> _Reader | None:
        if data.size < 4 * lanes:
            return None
        states = data[: 4 * lanes].copy().view("<u4").astype(np.int64)
        return _Reader(states, data[4 * lanes :].copy()) if (states >= _LOWEST).all() else None

    def advance(self, frequency: I64, offset: I64) -> None:
        """One step of the first lanes."""
        states = self.states[: frequency.size]
        states[:] = frequency * (states >> _SLOT_BITS) + offset
        hungry = np.flatnonzero(states < _LOWEST)
        words = self.words[self.used : self.used + hungry.size]
        self.used += hungry.size
        if words.size < hungry.size:
            self.broken = True
        else:
            states[hungry] = states[hungry] << 16 | words

    def escaped(self, token: int) -> int:
        octave, half = 4 + (token - _ESCAPE >> 1), (token - _ESCAPE) & 1
        first = self.bits >> 3
        self.bits += octave
        last = -(-self.bits // 8)
        if last > self.rest.size:
            self.broken = True
            return 0
        taken = int.from_bytes(self.rest[::-1][first:last].tobytes(), "big")
        low = taken >> (8 * last - self.bits) & ((1 << octave) - 1)
        magnitude = (2 + half << octave - 1) + (low >> 1)
        return -magnitude if low & 1 else magnitude

    @property
    def finished(self) -> bool:
        return bool((self.states == _LOWEST).all()) and 2 * self.used + -(-self.bits // 8) == self.rest.size
