"""Reading WebDNN folders, whose form the module `webdnn` describes: graphs, layouts, records."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, printable
from shrink.files import file_size, inside, io_errors, read_all, section
from shrink.model import DTYPES, Entry, Model, Quantized, Source, Tensor
from shrink.steps import Step, decode

NAME = "webdnn"

F32 = DTYPES["F32"]
GRAPH_FILE = re.compile(r"graph_([A-Za-z0-9_]{1,64})\.json")
WEIGHT_FILE = re.compile(r"weight_([A-Za-z0-9_]{1,64})\.bin")
_GRAPH_AT_MOST = 32 << 20
# The memory of WebAssembly ends at 4 GiB. Offsets and lengths in a weight file are int32, which this keeps to.
VALUES_AT_MOST = 1 << 30
RECORD_HEAD = struct.Struct("<iifi")
CHUNK = 1 << 20
RAW, EIGHTBIT = "raw", "eightbit"


@dataclass(frozen=True)
class Span:
    """Where a tensor's values lie in its backend's weights, counted in values."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Layout:
    """The spans that one graph names, in a room of so many values.

    With `constants_only` all of them are weights, else those that begin within the weight file.
    """

    backend: str
    encoding: str
    spans: tuple[Span, ...]
    room: int
    constants_only: bool

    def tensor(self, name: str) -> str:
        return f"{self.backend}/{name}"

    def at(self, offset: int) -> str:
        """The tensor that holds the value at `offset`, for messages."""
        for span in self.spans:
            if span.offset <= offset < span.end:
                return self.tensor(span.name)
        return self.tensor(f"gap@{offset}")


@dataclass(frozen=True)
class _Record:
    """One record of an eightbit weight file: `size` codes that belong at `offset`, deflated at `body_start`."""

    offset: int
    size: int
    scale: float
    body_start: int
    body_bytes: int

    @property
    def steps(self) -> tuple[Step, ...]:
        return _steps(self.scale)


def _steps(scale: float) -> tuple[Step, ...]:
    return (Step("codebook.1", {"table": "eightbit", "scale": scale}),)


def names_in(folder: Path) -> list[str]:
    with io_errors(folder):
        return sorted(os.listdir(folder))


def read(path: Path) -> Model:
    """All backends of a folder. Every weight file is checked to its end; values are read again when asked for.

    The attributes hold each graph's JSON text under its file name, and, under `records_<backend>`, how the
    tensors that are not exactly one record were cut into records, so that they can be written again without loss.
    `Source.size_bytes` counts the graphs and weights of all backends.

    Raises:
        BadInput: a graph or weight file is missing, malformed, a link out of the folder, or they contradict each other.
    """
    tensors: list[Entry] = []
    attributes: dict[str, str] = {}
    size_bytes = 0
    graphs = [match for match in map(GRAPH_FILE.fullmatch, names_in(path)) if match]
    if not graphs:
        raise BadInput("there is no graph_<backend>.json in it", file=path)
    for match in graphs:
        backend = match[1]
        graph_path = _own_file(path, match[0])
        data = read_all(graph_path, at_most=_GRAPH_AT_MOST)
        text, graph = json_object(data, graph_path, "the graph")
        layout = layout_of(graph, backend, graph_path)
        weight_path = _own_file(path, f"weight_{backend}.bin")
        attributes[match[0]] = text
        if layout.encoding == RAW:
            tensors += _read_raw(layout, weight_path)
        else:
            found, records = _read_eightbit(layout, weight_path)
            tensors += found
            if records:
                attributes[f"records_{backend}"] = json.dumps(records, separators=(",", ":"))
        size_bytes += len(data) + file_size(weight_path)
    return Model(tuple(tensors), Source(NAME, path, size_bytes), attributes)


def _own_file(folder: Path, name: str) -> Path:
    try:
        path = inside(folder, name, file=folder)
    except RuntimeError:  # links in a circle, up to Python 3.12
        raise BadInput(f"{name} is a link to itself", file=folder, hint="refused") from None
    if not path.exists():
        raise BadInput(f"the file {name} is missing", file=path)
    # A pipe would block for ever, a device never end.
    if not path.is_file():
        raise BadInput("not a regular file", file=path)
    return path


def json_object(data: bytes | str, path: Path, what: str) -> tuple[str, dict[str, Any]]:
    """The text and content of a JSON object, as `JSON.parse` in a browser would take it, but no key twice."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise BadInput(f"{what} says something twice", file=path)
        return out

    def not_json(constant: str) -> None:
        raise ValueError(constant)

    try:
        # A text from a container may hold surrogates, which no file can.
        text = (data.encode() if isinstance(data, str) else data).decode()
        graph = json.loads(text, object_pairs_hook=no_twins, parse_constant=not_json)
    except (ValueError, RecursionError):
        raise BadInput(f"{what} is not valid JSON", file=path) from None
    if not isinstance(graph, dict):
        raise BadInput(f"{what} is not a JSON object", file=path)
    return text, graph


def layout_of(graph: Mapping[str, Any], backend: str, path: Path) -> Layout:
    def part(of: Any, *keys: str) -> Any:
        for key in keys:
            of = of.get(key) if isinstance(of, dict) else None
        if not isinstance(of, dict):
            raise BadInput(f"the graph has no {'.'.join(keys)}", file=path)
        return of

    encoding = graph.get("weight_encoding")
    if encoding not in (RAW, EIGHTBIT):
        raise BadInput(f"the weight encoding {printable(repr(encoding))} is not known", file=path)
    spans = []
    if "constants_map" in graph:
        for name, spec in part(graph, "constants_map").items():
            byte_offset, size = _place(spec, "byte_offset", backend, name, path)
            if byte_offset % 4:
                raise BadInput(f"byte {byte_offset} is not the start of a value", file=path, tensor=f"{backend}/{name}")
            spans.append(Span(name, byte_offset // 4, size))
        room = max((s.end for s in spans), default=0)
    else:
        room = part(graph, "memory_layout", "static").get("size")
        if type(room) is not int or room < 0:
            raise BadInput("memory_layout.static.size is not a whole number from 0", file=path)
        for name, spec in part(graph, "memory_layout", "static", "allocations").items():
            spans.append(Span(name, *_place(spec, "offset", backend, name, path)))
    room = min(room, VALUES_AT_MOST)
    for span in spans:
        if span.end > room:
            raise BadInput(
                f"{span.size} values at {span.offset} do not fit the layout of {room}",
                file=path,
                tensor=f"{backend}/{span.name}",
            )
    return Layout(backend, encoding, tuple(spans), room, "constants_map" in graph)


def _place(spec: Any, key: str, backend: str, name: str, path: Path) -> tuple[int, int]:
    values = (spec.get(key), spec.get("size")) if isinstance(spec, dict) else ()
    if not values or not all(type(v) is int and v >= 0 for v in values):
        raise BadInput(f"its {key} and size are not whole numbers from 0", file=path, tensor=f"{backend}/{name}")
    return values  # type: ignore[return-value]


def constants(layout: Layout, count: int, path: Path) -> list[Span]:
    """The tensors in `count` values of weights, gaps among them, end to end in order."""
    if count > layout.room:
        raise BadInput(f"{count} values of weights are there, the layout has room for {layout.room}", file=path)
    out: list[Span] = []
    end = 0
    for span in sorted(layout.spans, key=lambda s: (s.offset, s.size, s.name)):
        if span.offset >= count and not layout.constants_only:
            break
        if span.end > count:
            raise BadInput(
                f"it ends at value {span.end}, the weights at {count}", file=path, tensor=layout.tensor(span.name)
            )
        if span.offset < end and span.size:
            raise BadInput("it overlaps the tensor before it", file=path, tensor=layout.tensor(span.name))
        if span.offset > end:
            out.append(Span(f"gap@{end}", end, span.offset - end))
        out.append(span)
        end = max(end, span.end)
    if count > end:
        out.append(Span(f"gap@{end}", end, count - end))
    return out


def _read_raw(layout: Layout, path: Path) -> list[Entry]:
    size = file_size(path)
    if size % 4:
        raise BadInput(f"{size} bytes are not whole float32 values", file=path)

    def loader(read: Callable[[], bytes]) -> Callable[[], NDArray[np.float32]]:
        return lambda: np.frombuffer(read(), F32)

    return [
        Tensor(name, F32, (span.size,), loader(section(path, 4 * span.offset, 4 * span.size, tensor=name)))
        for span in constants(layout, size // 4, path)
        for name in [layout.tensor(span.name)]
    ]


def _read_eightbit(layout: Layout, path: Path) -> tuple[list[Entry], dict[str, list[tuple[int, float]]]]:
    """The tensors, and of those that are not exactly one record the sizes and scales of their records."""
    records = _records(layout, path)
    spans = constants(layout, sum(r.size for r in records), path)
    # Only tensors that share a record with others use this, one after the other.
    inflated = lru_cache(maxsize=1)(lambda record: _codes_of(record, path, layout))
    entries: list[Entry] = []
    cut: dict[str, list[tuple[int, float]]] = {}
    first = 0
    for span in spans:
        while first < len(records) and records[first].offset + records[first].size <= span.offset:
            first += 1
        pieces = []
        last = first
        while span.size and last < len(records) and records[last].offset < span.end:
            record = records[last]
            start, end = max(record.offset, span.offset), min(record.offset + record.size, span.end)
            pieces.append((record, start - record.offset, end - record.offset))
            last += 1
        entries.append(_eightbit_entry(layout, span, pieces, path, inflated))
        if isinstance(entries[-1], Tensor) and pieces:
            cut[span.name] = [(end - start, record.scale) for record, start, end in pieces]
    return entries, cut


_Piece = tuple[_Record, int, int]


def _eightbit_entry(
    layout: Layout, span: Span, pieces: Sequence[_Piece], path: Path, inflated: Callable[[_Record], bytes]
) -> Entry:
    name = layout.tensor(span.name)
    if len(pieces) == 1 and pieces[0][0].size == span.size:
        record = pieces[0][0]
        return Quantized(name, F32, (span.size,), record.steps, span.size, lambda: _codes_of(record, path, layout))

    def load() -> NDArray[np.float32]:
        out = np.empty(span.size, F32)
        done = 0
        for record, start, end in pieces:
            codes = inflated(record)[start:end]
            out[done : done + len(codes)] = decode(codes, record.steps, (len(codes),), F32, name)
            done += len(codes)
        return out

    return Tensor(name, F32, (span.size,), load)


def _records(layout: Layout, path: Path) -> list[_Record]:
    """All records of a weight file, each inflated once to know that it can be, without keeping its codes."""
    size = file_size(path)
    most = layout.room
    records: list[_Record] = []
    position = total = 0
    with io_errors(path), open(path, "rb") as file:
        while position < size:

            def bad(what: str, total: int = total) -> BadInput:
                return BadInput(what, file=path, tensor=layout.at(total))

            head = file.read(RECORD_HEAD.size)
            if len(head) < RECORD_HEAD.size:
                raise bad(f"the file ends in the head of its record, at byte {position}")
            position += len(head)
            offset, body_bytes, scale, _ = RECORD_HEAD.unpack(head)
            if offset != total:
                raise bad(f"its record says that it starts at value {offset}, it lies at {total}")
            if not math.isfinite(scale) or scale < 0:
                raise bad(f"its scale {scale} is not a finite number from 0")
            if not 0 < body_bytes <= size - position:
                raise bad(f"its record claims {body_bytes} bytes, {size - position} are left")
            try:
                count = _inflated_size(file, body_bytes, most - total)
            except zlib.error as error:
                raise bad(f"its codes are damaged: {error}") from None
            records.append(_Record(offset, count, scale, position, body_bytes))
            position += body_bytes
            total += count
    # A record of nothing stands for no tensor.
    return [r for r in records if r.size]


def _inflated_size(file: IO[bytes], nbytes: int, at_most: int) -> int:
    """How many bytes the next `nbytes` of `file` inflate to, never held all at once.

    Raises:
        zlib.error: damage, or more than `at_most` bytes.
    """
    inflater = zlib.decompressobj()
    count = 0
    while nbytes:
        data = file.read(min(nbytes, CHUNK))
        if not data or inflater.eof:
            break
        nbytes -= len(data)
        while True:
            out = inflater.decompress(data, CHUNK)
            count += len(out)
            if count > at_most:
                raise zlib.error(f"they are more than the {at_most} values that the layout has room for")
            data = inflater.unconsumed_tail
            # A full chunk may leave output behind in the inflater even when all input is taken.
            if not data and len(out) < CHUNK:
                break
    if not inflater.eof:
        raise zlib.error("the stream is cut off")
    if nbytes or inflater.unused_data:
        raise zlib.error("there are bytes past the end of the stream")
    return count


def _codes_of(record: _Record, path: Path, layout: Layout) -> bytes:
    name = layout.at(record.offset)
    body = section(path, record.body_start, record.body_bytes, tensor=name)()
    inflater = zlib.decompressobj()
    try:
        # One byte more than expected is asked for, so that a longer stream shows itself.
        codes = inflater.decompress(body, record.size + 1)
    except zlib.error as error:
        raise BadInput(f"its codes are damaged: {error}", file=path, tensor=name) from None
    if len(codes) != record.size or not inflater.eof:
        raise BadInput("the file changed while it was read", file=path, tensor=name)
    return codes
