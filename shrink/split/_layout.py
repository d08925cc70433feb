"""Where a safetensors file is cut into shards: arithmetic over its tensors, without touching a file.

What is cut is the whole file, header first, as one stream of tensors. A shard takes a contiguous range of it: whole
tensors as they are, and of a tensor that lies across a cut a flat chunk. Sizes are exact, the shard's own header
included, which is why everything is counted in the bytes of the finished file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Item", "Piece", "Shard", "items", "layout"]

ELEMENT_BYTES = {
    **dict.fromkeys(("U8", "I8", "BOOL"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_PUNCTUATION = len(':{"dtype":"","shape":,"data_offsets":[,]}')
# What a shard costs beyond its entries: the length of the header, its braces, and padding on average.
_SHARD_COST = 8 + 2 + 4


@dataclass(frozen=True)
class Item:
    """One tensor of the stream: what it is, and the names that it has in shards, whole and in chunks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    key: str
    chunk_key: str

    @property
    def chunk_dtype(self) -> str:
        """Of a type that we do not know, the bytes are all that can be cut."""
        return self.dtype if self.dtype in ELEMENT_BYTES else "U8"

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Piece:
    """Bytes start to stop of one tensor, under the name `key`."""

    item: int
    start: int
    stop: int
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Bytes start to stop of the stream, and its pieces in order."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def header(self) -> bytes:
        """The shard's own safetensors header, its length in front."""
        position = 0
        entries = []
        for piece in self.pieces:
            end = position + piece.stop - piece.start
            entries.append(_entry(piece.key, piece.dtype, piece.shape, position, end))
            position = end
        head = b"{" + b",".join(entries) + b"}"
        head += b" " * (-len(head) % 8)
        return len(head).to_bytes(8, "little") + head


def _entry(key: str, dtype: str, shape: Sequence[int], start: int, stop: int) -> bytes:
    value = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    return f"{_text(key)}:{_text(value)}".encode()


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def items(tensors: Sequence[tuple[str, str, tuple[int, ...], int]], limit: int) -> list[Item]:
    """The tensors (name, dtype, shape, bytes) with the names that they go by in shards, all different.

    A tensor whose entry would fill half a shard is flat there and goes by a number.
    """
    names = {name for name, _, _, _ in tensors}
    # A chunk is called `name[2/5]`: what stands before the last bracket of any other name is not free.
    bases = {name.rpartition("[")[0] for name in names if "[" in name}
    found = []
    for i, (name, dtype, shape, size_bytes) in enumerate(tensors):
        key = name
        if len(_entry(name, dtype, shape, size_bytes, size_bytes)) > limit // 2:
            key = f"shrink.tensor-{i}"
            while key in names:
                key += "_"
            names.add(key)
            element = ELEMENT_BYTES.get(dtype, 0)
            dtype, shape = (dtype, (size_bytes // element,)) if element else ("U8", (size_bytes,))
        chunk_key = key
        while chunk_key in bases or (chunk_key != key and chunk_key in names):
            chunk_key += "_"
        bases.add(chunk_key)
        found.append(Item(name, dtype, shape, size_bytes, key, chunk_key))
    return found


Position = tuple[int, int]
"""An item, and how many of its bytes lie behind."""


class _Filler:
    """How far one shard of a given size reaches. Lengths of entries are counted once."""

    def __init__(self, stream: Sequence[Item], limit: int):
        self.stream = stream
        self.limit = limit
        # The bytes of an entry without its offsets; a chunk's without its number of elements either.
        self.whole = [len(_text(i.key).encode()) + len(i.dtype) + len(_text(i.shape)) + _PUNCTUATION for i in stream]
        self.chunk = [
            len(_text(i.chunk_key).encode())
            + len("[/]" + "[]")
            # Number and count, a digit to spare: shards of many are never so small that it takes ten times as many.
            + 2 * (len(str(i.size_bytes // (limit // 2))) + 1)
            + len(i.chunk_dtype)
            + _PUNCTUATION
            for i in stream
        ]
        self.left = self._costs()

    def _costs(self) -> list[int]:
        """What is left from each item on, in bytes of shards."""
        left = [0]
        for item, whole, chunk in zip(reversed(self.stream), reversed(self.whole), reversed(self.chunk), strict=True):
            digits = 2 * len(str(self.limit))
            entries = 1 + item.size_bytes // (self.limit - chunk - digits - _SHARD_COST)
            left.append(left[-1] + item.size_bytes + whole + 1 + digits + (entries - 1) * (chunk + digits))
        return left[::-1]

    def cost(self, position: Position, shards: int) -> int:
        """About how many bytes the rest takes in so many shards."""
        item, done = position
        return self.left[item] - done + shards * _SHARD_COST

    def fill(self, position: Position, size: int, stop: int) -> Position:
        """The position that a shard of at most `size` bytes reaches; never beyond the start of item `stop`."""
        item, done = position
        header, data = 2, 0
        while item < stop:
            this = self.stream[item]
            rest = this.size_bytes - done
            comma = 1 if header > 2 else 0
            if done:
                count = len(str(rest // this.element_bytes))
                entry = self.chunk[item] + count
            else:
                entry = self.whole[item]
            entry += comma + len(str(data)) + len(str(data + rest))
            if _file_bytes(header + entry, data + rest) <= size:
                header, data, item, done = header + entry, data + rest, item + 1, 0
                continue
            digits = 2 * len(str(size))
            entry = self.chunk[item] + comma + digits + len(str(data))
            room = size - _file_bytes(header + entry, data)
            taken = min(room, rest - 1) // this.element_bytes * this.element_bytes
            if taken > 0:
                # The digits were counted for the worst case; what they leave holds no more than an element or two.
                done += taken
            break
        return item, done


def _file_bytes(header: int, data: int) -> int:
    return 8 + header + -header % 8 + data


def layout(stream: Sequence[Item], limit: int) -> list[Shard]:
    """The shards of the stream: of the least number within one, none over `limit` bytes, about equally large.

    `limit` must be 10,000 or more.
    """
    return list(_shards(stream, _cuts(_Filler(stream, limit))))


def _cuts(filler: _Filler) -> list[Position]:
    """The end of every shard."""
    full = list(_greedy(filler))
    for count in (len(full), len(full) + 1):
        cuts = list(_balanced(filler, count))
        if cuts[-1] == full[-1]:
            return cuts
    return full


def _greedy(filler: _Filler) -> Iterator[Position]:
    """Every shard as full as can be: the fewest."""
    position, end = (0, 0), (len(filler.stream), 0)
    while position != end:
        position = filler.fill(position, filler.limit, end[0])
        yield position


def _balanced(filler: _Filler, count: int) -> Iterator[Position]:
    """Shards of about the same size. Where the estimate was too low, the last one does not reach the end."""
    position, end = (0, 0), (len(filler.stream), 0)
    for left in range(count, 0, -1):
        if position == end:
            return
        position = _next_cut(filler, position, left)
        yield position


def _next_cut(filler: _Filler, position: Position, left: int) -> Position:
    full = filler.fill(position, filler.limit, len(filler.stream))
    if left == 1:
        return full
    size = min(filler.limit, -(-filler.cost(position, left) // left))
    even = filler.fill(position, size, len(filler.stream))
    # The ends of the tensor that is cut, the nearer first.
    item, done = even
    near = []
    if done:
        before, after = done, filler.stream[item].size_bytes - done
        near = [(before, (item, 0)), (after, (item + 1, 0))]
    candidates = [cut for distance, cut in sorted(near) if distance <= size // 8]
    for cut in (*candidates, even):
        if position < cut <= full and filler.cost(cut, left - 1) <= (left - 1) * filler.limit:
            return cut
    return full


def _shards(stream: Sequence[Item], cuts: Sequence[Position]) -> Iterator[Shard]:
    chunks = [0] * len(stream)
    for item, done in cuts:
        if done:
            chunks[item] = (chunks[item] or 1) + 1
    numbers = [0] * len(stream)
    offset, position = 0, (0, 0)
    for cut in cuts:
        pieces = []
        start = offset
        while position < cut:
            item, done = position
            this = stream[item]
            stop = cut[1] if item == cut[0] else this.size_bytes
            if chunks[item]:
                numbers[item] += 1
                key = f"{this.chunk_key}[{numbers[item]}/{chunks[item]}]"
                shape: tuple[int, ...] = ((stop - done) // this.element_bytes,)
                pieces.append(Piece(item, done, stop, key, this.chunk_dtype, shape))
            else:
                pieces.append(Piece(item, 0, stop, this.key, this.dtype, this.shape))
            offset += stop - done
            position = cut if item == cut[0] else (item + 1, 0)
        yield Shard(start, offset, tuple(pieces))
