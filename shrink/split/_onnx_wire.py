"""Where the weights of an ONNX file lie: its Protocol Buffers walked by hand, so that no weight need be in memory.

Of a tensor's values only those count that stand in the file as they would in external data, one after the other and
little-endian: `raw_data`, and packed `float_data` and `double_data`. Every length is checked against what is there.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from shrink.errors import BadInput

__all__ = ["Lean", "Span", "lean"]

# What leads from a model to its tensors: a message's fields that are messages in turn.
_INSIDE = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 11: "graph"},
}
_DATA_TYPE, _SEGMENT, _FLOATS, _RAW, _DOUBLES, _LOCATION = 2, 3, 4, 9, 10, 14
_VALUES = (_FLOATS, 5, 6, 7, _RAW, _DOUBLES, 11)
# The type whose values a typed field holds as they are.
_TYPE_OF = {_FLOATS: 1, _DOUBLES: 11}

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# Protocol Buffers read no deeper.
_AT_MOST_DEEP = 100


@dataclass(frozen=True)
class Span:
    """Bytes of the file, from `start` to before `end`, that are the values of one tensor."""

    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Lean:
    """A model with marks for values: `number(raw_data)` is the place in `spans` of what belongs there."""

    model: bytes
    spans: tuple[Span, ...]
    mark: bytes

    def number(self, raw_data: bytes) -> int | None:
        return int(raw_data[len(self.mark) :]) if raw_data.startswith(self.mark) else None


@dataclass(frozen=True)
class _Field:
    number: int
    wire: int
    tag: int
    start: int
    end: int


def lean(data: mmap | bytes, path: Path, least_bytes: int) -> Lean:
    """The model without the values of tensors that have at least `least_bytes` of them.

    Raises:
        BadInput: the bytes are no Protocol Buffers.
    """
    walk = _Walk(data, path, least_bytes)
    model = walk.message("model", 0, len(data), 0)
    return Lean(bytes(data[:]) if model is None else model, tuple(walk.spans), walk.mark)


class _Walk:
    def __init__(self, data: mmap | bytes, path: Path, least_bytes: int):
        self.data = data
        self.path = path
        self.least_bytes = least_bytes
        self.spans: list[Span] = []
        # No file can hold it, not even one made for that.
        self.mark = secrets.token_bytes(16)

    def message(self, kind: str, start: int, end: int, depth: int) -> bytes | None:
        """The message without large values; None where it has none."""
        if kind == "tensor":
            return self.tensor(start, end)
        chunks: list[bytes] = []
        kept = start
        for field in self.fields(start, end):
            inner = _INSIDE[kind].get(field.number)
            # What is small as a whole holds nothing large.
            if inner is None or field.wire != _LENGTH or field.end - field.start < self.least_bytes:
                continue
            if depth >= _AT_MOST_DEEP:
                raise self.damaged()
            changed = self.message(inner, field.start, field.end, depth + 1)
            if changed is not None:
                chunks += [self.data[kept : field.tag], _prefix(field.number, len(changed)), changed]
                kept = field.end
        return b"".join([*chunks, self.data[kept:end]]) if chunks else None

    def tensor(self, start: int, end: int) -> bytes | None:
        fields = list(self.fields(start, end))
        values = [f for f in fields if f.number in _VALUES]
        if len(values) != 1 or values[0].end - values[0].start < self.least_bytes:
            return None
        (found,) = values
        types = [self.varint(f.start, f.end)[0] for f in fields if f.number == _DATA_TYPE and f.wire == _VARINT]
        own = found.number == _RAW or types == [_TYPE_OF.get(found.number)]
        elsewhere = any(f.number in (_SEGMENT, _LOCATION) for f in fields)
        if found.wire != _LENGTH or not own or elsewhere:
            return None
        mark = self.mark + b"%d" % len(self.spans)
        self.spans.append(Span(found.start, found.end))
        return b"".join([self.data[start : found.tag], _prefix(_RAW, len(mark)), mark, self.data[found.end : end]])

    def fields(self, start: int, end: int) -> Iterator[_Field]:
        at = start
        while at < end:
            tag = at
            key, at = self.varint(at, end)
            number, wire = key >> 3, key & 7
            value = at
            if wire == _VARINT:
                _, at = self.varint(at, end)
            elif wire == _LENGTH:
                length, value = self.varint(at, end)
                at = value + length
            elif wire in (_FIXED32, _FIXED64):
                at += 4 if wire == _FIXED32 else 8
            else:  # groups, which ONNX never had
                raise self.damaged()
            if at > end or number == 0:
                raise self.damaged()
            yield _Field(number, wire, tag, value, at)

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self.data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (1 << 64) - 1, at
        raise self.damaged()

    def damaged(self) -> BadInput:
        return BadInput("not a readable ONNX model: its bytes are damaged, or not ONNX at all", file=self.path)


def _prefix(number: int, length: int) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
