"""ONNX with its weights in files of a limited size, as external data that stock ONNX Runtime and its web build take.

    model.split.onnx                    the graph, which says where each weight lies
    model.split-00001-of-00003.data …   weights, each at a multiple of 64 bytes
    model.rest-00001-of-00001.bin …     what else the file held; only joining needs it
    model.onnx.index.json               written last

In the folder of a page, whose visitors may have old ones in their caches, the names of parts hold a hash.

The index is that of `shrink.parts`, but for how the original comes of the parts:

    "shrink": {"version": 1, "file": name of the original, "bytes": its length, "integrity": its SHA-256,
               "decoded_bytes": of all weights, "graph": name, "tensors": {name: [data files, from 1]},
               "parts": [part, …],
               "layout": [[number of a part, from 0, offset, length], …]}       end to end, the original
"""

from __future__ import annotations

import contextlib
import io
import mmap
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from shrink import formats, parts
from shrink.errors import BadInput, BoundNotMet, ShrinkError, UsageError, blaming, printable
from shrink.files import Scratch, file_size, finishing, holds, io_errors, is_taken, put
from shrink.formats._onnx_proto import AT_MOST_BYTES
from shrink.parts import Part
from shrink.progress import Progress
from shrink.split import DONE, RENAMED, File, Plan, is_web
from shrink.split._onnx_graph import Graph, Piece, Weight, arrange
from shrink.split._onnx_index import Index, join
from shrink.split._onnx_wire import Span

__all__ = ["INDEX_SUFFIX", "join", "plan"]

SUFFIX = ".onnx"
INDEX_SUFFIX = ".onnx.index.json"
# Smaller tensors stay in the graph: shapes and axes must, as they are needed to build the network, and the few bytes
# of the others are not worth an entry. The second is for a graph that is over the limit with them.
_LEAST_BYTES = (1024, 128)
_BLOCK = 1 << 20

# As long as every other: what a graph is planned with before anything is hashed.
_ANY_MARK = "-00000000"

Segment = tuple[int, int] | bytes
"""Start and length of bytes of the whole file, or bytes."""


def plan(source: Path, limit: int, folder: Path, *, force: bool = False, dry_run: bool = False) -> Plan:
    """The graph, data files and index of an ONNX file.

    Raises:
        UsageError: there is such a split already, and no `force`.
        BadInput: not an ONNX model, or one over 2 GiB with its weights.
        BoundNotMet: the graph without its weights is over the limit.
        MissingDependency: the package onnx is not installed.
    """
    if source.name.endswith(f".split{SUFFIX}") and (folder / _index_of(source)).is_file():
        raise UsageError("it is split already", file=source, hint="split the file it was made of")
    notes: tuple[str, ...] = ()
    whole = source
    alive: object = None
    with blaming(source):
        if _has_external_data(source):
            alive = merged = Scratch(folder, dry_run=dry_run)
            model = formats.sniff(source).read(source)
            formats.by_name("onnx").write(model, model.tensors, merged.path, None)
            whole = merged.path
            notes = ("its external data is taken in first: joining gives back one file with all weights in it",)
        split = _Split.of(whole, source.name, limit, folder)
    dropped = [printable(name) for name in split.dropped]
    if dropped:
        notes = (*notes, f"these weights were inputs as well, which they can no longer be: {', '.join(dropped)}")
    return _plan(split, source, notes, force=force, alive=alive)


def _index_of(graph: Path) -> str:
    return graph.name.removesuffix(f".split{SUFFIX}") + INDEX_SUFFIX


def _has_external_data(path: Path) -> bool:
    with _opened(path, _LEAST_BYTES[0]) as graph:
        return graph.has_external_data


@contextlib.contextmanager
def _opened(path: Path, least_bytes: int) -> Iterator[Graph]:
    size = file_size(path)
    if not 0 < size <= AT_MOST_BYTES:
        raise BadInput("an ONNX file is at most 2 GiB" if size else "the file is empty", file=path)
    with io_errors(path), open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield Graph(data, path, least_bytes)


@dataclass(frozen=True)
class _Split:
    """A file to split: where it lies, what it is called, its weights, and which pieces of them each data file holds."""

    whole: Path
    name: str
    limit: int
    folder: Path
    size_bytes: int
    least_bytes: int
    weights: tuple[Weight, ...]
    files: tuple[tuple[Piece, ...], ...]
    dropped: tuple[str, ...]

    @classmethod
    def of(cls, whole: Path, name: str, limit: int, folder: Path) -> _Split:
        size = 0
        mark = _ANY_MARK if is_web(folder) else ""
        for least_bytes in _LEAST_BYTES:
            with _opened(whole, least_bytes) as graph:
                weights = graph.keep_whole(limit)
                files = tuple(tuple(pieces) for pieces in arrange(weights, limit))
                split = cls(whole, name, limit, folder, file_size(whole), least_bytes, tuple(weights), files, ())
                size = len(graph.with_data_in(split.named(mark)))
                if size <= limit:
                    return replace(split, dropped=tuple(graph.dropped))
        raise _too_large(size, limit)

    @property
    def stem(self) -> str:
        return self.name[: -len(SUFFIX)] if self.name.lower().endswith(SUFFIX) else self.name

    @property
    def index(self) -> Path:
        return self.folder / f"{self.stem}{INDEX_SUFFIX}"

    @property
    def graph(self) -> Path:
        return self.folder / f"{self.stem}.split{SUFFIX}"

    def named(self, mark: str = "") -> list[tuple[str, tuple[Piece, ...]]]:
        names = parts.numbered(f"{self.stem}.split{mark}", len(self.files), ".data")
        return list(zip(names, self.files, strict=True))

    def graph_bytes(self, mark: str) -> bytes:
        with _opened(self.whole, self.least_bytes) as graph:
            data = graph.with_data_in(self.named(mark))
        if len(data) > self.limit:
            raise _too_large(len(data), self.limit)
        return data

    def names(self, mark: str = "") -> list[str]:
        rest = parts.numbered(f"{self.stem}.rest{mark}", len(self.rest_lengths), ".bin")
        return [*(name for name, _ in self.named(mark)), *rest]

    @cached_property
    def rest(self) -> tuple[tuple[int, int], ...]:
        """Start and length of all bytes of the whole that are no weights."""
        spans = sorted((w.values.start, w.values.end) for w in self.weights if isinstance(w.values, Span))
        edges = [0, *(edge for span in spans for edge in span), self.size_bytes]
        return tuple((a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a)

    @cached_property
    def rest_lengths(self) -> list[int]:
        return parts.even(sum(length for _, length in self.rest), self.limit)

    @cached_property
    def segments(self) -> list[list[Segment]]:
        """What each part holds."""
        found: list[list[Segment]] = []
        for pieces in self.files:
            held: list[Segment] = []
            at = 0
            for piece in pieces:
                values = self.weights[piece.weight].values
                held.append(bytes(piece.offset - at))
                if isinstance(values, bytes):
                    held.append(values[piece.start : piece.start + piece.size_bytes])
                else:
                    held.append((values.start + piece.start, piece.size_bytes))
                at = piece.end
            found.append([segment for segment in held if segment != b""])
        return [*found, *_divided(self.rest, self.rest_lengths)]

    def layout(self) -> list[list[int]]:
        """Number of a part, offset, and length: end to end, the whole."""
        places = []
        for number, held in enumerate(self.segments):
            offset = 0
            for segment in held:
                length = len(segment) if isinstance(segment, bytes) else segment[1]
                if not isinstance(segment, bytes):
                    places.append((segment[0], number, offset, length))
                offset += length
        return [[number, offset, length] for _, number, offset, length in sorted(places)]

    def unhashed(self) -> list[Part]:
        """The parts as they will be, but for what only reading everything can tell."""
        sizes = [pieces[-1].end for pieces in self.files] + self.rest_lengths
        return [Part(name, size, parts.NO_INTEGRITY) for name, size in zip(self.names(), sizes, strict=True)]

    def read(self, file: IO[bytes], number: int) -> IO[bytes]:
        """The bytes of a part, out of the open whole."""
        return io.BufferedReader(_Segments(file, self.segments[number]), _BLOCK)


def _too_large(size: int, limit: int) -> BoundNotMet:
    return BoundNotMet(
        f"the graph is {size} bytes even without its weights, over the limit of {limit}",
        hint=f"the smallest limit that works is about {size} bytes; --cut divides the graph as well",
    )


def _divided(ranges: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[list[Segment]]:
    """The ranges, end to end, in pieces of these lengths together."""
    left = list(reversed(ranges))
    found: list[list[Segment]] = []
    for length in lengths:
        held: list[Segment] = []
        while length:
            start, size = left.pop()
            taken = min(size, length)
            held.append((start, taken))
            if taken < size:
                left.append((start + taken, size - taken))
            length -= taken
        found.append(held)
    return found


class _Segments(io.RawIOBase):
    """Segments of a file, end to end, as a file."""

    def __init__(self, file: IO[bytes], segments: Sequence[Segment]):
        self._file = file
        self._left = list(reversed(segments))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            return 0
        segment = self._left.pop()
        room = len(buffer)
        if isinstance(segment, bytes):
            data, rest = segment[:room], segment[room:]
            if rest:
                self._left.append(rest)
        else:
            start, length = segment
            self._file.seek(start)
            data = self._file.read(min(room, length))
            if data and length > len(data):
                self._left.append((start + len(data), length - len(data)))
        buffer[: len(data)] = data
        return len(data)


@dataclass(frozen=True)
class _Set:
    """The files of a finished split."""

    parts: list[Part]
    integrity: str
    index_parts: list[tuple[str, bytes]]
    index: bytes

    @classmethod
    def of(cls, split: _Split, found: Sequence[Part], integrity: str, mark: str = "") -> _Set:
        named = [replace(part, file=name) for part, name in zip(found, split.names(mark), strict=True)]
        top, index_parts = parts.fit_index(_index_text(split, named, integrity), split.name + mark, split.limit)
        return cls(named, integrity, index_parts, top)

    @property
    def names(self) -> set[str]:
        return {part.file for part in self.parts} | {name for name, _ in self.index_parts}

    def there(self, folder: Path) -> set[str]:
        """The files that are there with the very content that they would be written with."""
        return {
            *(name for name, data in self.index_parts if holds(folder / name, data)),
            *(part.file for part in self.parts if parts.is_there(folder, part)),
        }


def _index_text(split: _Split, found: Sequence[Part], integrity: str) -> bytes:
    tensors: dict[str, list[int]] = {}
    for number, pieces in enumerate(split.files, 1):
        for piece in pieces:
            tensors.setdefault(split.weights[piece.weight].name, []).append(number)
    ours = {
        "version": parts.VERSION,
        "file": split.name,
        "bytes": split.size_bytes,
        "integrity": integrity,
        "decoded_bytes": sum(weight.size_bytes for weight in split.weights),
        "graph": split.graph.name,
        "tensors": tensors,
        "parts": [part.as_json() for part in found],
        "layout": split.layout(),
    }
    return parts.as_bytes({"shrink": ours})


def _plan(split: _Split, source: Path, notes: tuple[str, ...], *, force: bool, alive: object) -> Plan:
    """The plan. `alive` is held as long as the plan can be carried out."""
    expected = _Set.of(split, split.unhashed(), parts.NO_INTEGRITY)
    mark, kept = "", set[str]()
    fixed = [path for path in (split.index, split.graph) if is_taken(path)]
    taken = {name for name in expected.names if is_taken(split.folder / name)}
    old = _names_of_old(split)
    web = is_web(split.folder)
    graph = split.graph_bytes("")
    if fixed or taken or web:
        # Names are in use, or hold a hash: only now is it worth reading everything before anything is written.
        expected = _Set.of(split, list(_described(split)), _whole_integrity(split))
        if web:
            mark = parts.mark(graph, expected.index, *(data for _, data in expected.index_parts))
            expected = _Set.of(split, expected.parts, expected.integrity, mark)
            graph = split.graph_bytes(mark)
        kept = expected.there(split.folder)
        if holds(split.index, expected.index) and holds(split.graph, graph) and kept == expected.names:
            files = _files(split, expected, graph)
            return Plan(source, split.folder, split.limit, files, (*notes, DONE), lambda progress: None)
        if fixed and not force:
            raise UsageError("exists already", file=fixed[0], hint="--force replaces it")
        if not mark and taken - kept:
            mark = parts.mark(graph, expected.index, *(data for _, data in expected.index_parts))
            expected = _Set.of(split, expected.parts, expected.integrity, mark)
            graph = split.graph_bytes(mark)
            kept = expected.there(split.folder)
            notes = (*notes, RENAMED)
    if split.size_bytes <= split.limit:
        notes = (*notes, f"the whole file is within the limit already: {split.size_bytes} bytes")

    if split.files:
        create = f"ort.InferenceSession.create({split.graph.name!r}, {{ externalData }})"
        notes = (*notes, f"in a page: {printable(create)}, with {{ path: name, data: name }} of each .data file")

    def write(progress: Progress) -> None:
        _write(split, expected, mark, kept, old, graph, progress)
        _ = alive

    return Plan(source, split.folder, split.limit, _files(split, expected, graph), notes, write)


def _files(split: _Split, found: _Set, graph: bytes) -> tuple[File, ...]:
    held = [_holds_words(split, pieces) for pieces in split.files]
    held += ["what joining needs beside the weights"] * (len(found.parts) - len(held))
    return (
        *(File(part.file, part.size_bytes, words) for part, words in zip(found.parts, held, strict=True)),
        *(File(name, len(data), "part of the index") for name, data in found.index_parts),
        File(split.graph.name, len(graph), "the graph, which names the data files"),
        File(split.index.name, len(found.index), "index"),
    )


def _holds_words(split: _Split, pieces: Sequence[Piece]) -> str:
    cut = [p.weight for p in pieces if p.size_bytes < split.weights[p.weight].size_bytes]
    whole = len(pieces) - len(cut)
    words = [f"{whole} tensor{'' if whole == 1 else 's'}"] if whole else []
    return ", ".join([*words, *(f"part of {printable(split.weights[number].name, at_most=40)}" for number in cut)])


def _described(split: _Split) -> Iterator[Part]:
    with io_errors(split.whole), open(split.whole, "rb", buffering=0) as file:
        for number, part in enumerate(split.unhashed()):
            yield parts.describe(part.file, split.read(file, number), part.size_bytes)


def _whole_integrity(split: _Split) -> str:
    with io_errors(split.whole), open(split.whole, "rb", buffering=0) as file:
        return parts.describe(split.name, file, split.size_bytes).integrity


def _names_of_old(split: _Split) -> frozenset[str]:
    """The files of the set that is replaced, as far as its index can be read and the names are like ours."""
    if not split.index.is_file():
        return frozenset()
    try:
        old = Index.read(split.index)
    except ShrinkError:
        return frozenset()
    stem = re.escape(split.stem)
    ours = re.compile(
        rf"{stem}(\.split|\.rest|\.onnx)(-[0-9a-f]{{8}})?(-index\d?)?-\d{{5,}}-of-\d{{5,}}\.(data|bin|json)", re.I
    )
    return frozenset(part.file for part in (*old.parts, *old.index_parts) if ours.fullmatch(part.file))


def _write(
    split: _Split, expected: _Set, mark: str, kept: set[str], old: frozenset[str], graph: bytes, progress: Progress
) -> None:
    with io_errors(split.folder):
        split.folder.mkdir(parents=True, exist_ok=True)
    if file_size(split.whole) != split.size_bytes:
        raise _changed(split)
    with ThreadPoolExecutor(1, "whole") as pool:
        integrity = pool.submit(_whole_integrity, split)
        written = list(_written(split, expected, kept, progress))
        found = _Set.of(split, written, integrity.result(), mark)
    if split.graph_bytes(mark) != graph or expected.integrity not in (parts.NO_INTEGRITY, found.integrity):
        raise _changed(split)
    for name, data in found.index_parts:
        if name not in kept:
            put(split.folder / name, data)
    # It names the data files, which are there; the index, and with it joining, is still the old one.
    put(split.graph, graph)
    put(split.index, found.index)
    for name in old - found.names:
        # What is left of an old set is in nobody's way.
        with contextlib.suppress(OSError):
            (split.folder / name).unlink()


def _written(split: _Split, expected: _Set, kept: set[str], progress: Progress) -> Iterator[Part]:
    total, done = sum(part.size_bytes for part in expected.parts), 0
    with finishing() as finish, io_errors(split.whole), open(split.whole, "rb", buffering=0) as file:
        for number, planned in enumerate(expected.parts):
            if planned.file in kept:
                done += planned.size_bytes
                yield planned
                continue

            def tell(count: int, name: str = planned.file) -> None:
                nonlocal done
                progress(name, done, total)
                done += count

            path = split.folder / planned.file
            source = split.read(file, number)
            part = parts.write_part(path, source, planned.size_bytes, on_bytes=tell, finish=finish)
            if planned.integrity not in (parts.NO_INTEGRITY, part.integrity):
                raise _changed(split)
            yield part
    progress("", total, total)


def _changed(split: _Split) -> BadInput:
    return BadInput("the file has changed since the split was planned", file=split.whole)
