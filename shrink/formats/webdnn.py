"""WebDNN 1.2 descriptor folders: for each backend a `graph_<backend>.json` and its `weight_<backend>.bin`.

The weights of a backend are one array of float32; the graph says which tensor lies where in it. What lies past
the last weight is room for activations and has no tensor. WebGL's graphs, of which there is one for each
texture size, list their constants apart (`constants_map`); asm.js runs on WebAssembly's weights.

Two encodings of that array exist. `raw` is float32, little-endian. `eightbit` is a sequence of records, normally
one for each tensor:

    int32 offset · int32 body_bytes · float32 scale · int32 0 · body

where the body, in zlib's format, holds one byte per value: the codes of codebook.1's table "eightbit". The browser
side ignores the offset and lays the records end to end, so they are valid only in order and without holes.

A tensor is named `<backend>/<allocation>`, and `<backend>/gap@<offset>` where weights belong to no allocation.
Source: github.com/mil-tokyo/webdnn v1.2.11, `encoder/constant_encoder_eightbit.py` and `weight_decoder_eightbit.ts`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import deflate
import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, OutputError, UsageError, printable
from shrink.files import atomic_folder, file_size, inside, io_errors, read_all, section
from shrink.model import DTYPES, Entry, Model, Quantized, Source, Tensor
from shrink.steps import EIGHTBIT_TABLE, Step, decode, decode_bytes

NAME = "webdnn"
SUFFIX = ""
HOLDS = frozenset({"float32", "eightbit"})

_F32 = DTYPES["F32"]
_GRAPH = re.compile(r"graph_([A-Za-z0-9_]{1,64})\.json")
_WEIGHT = re.compile(r"weight_([A-Za-z0-9_]{1,64})\.bin")
_GAP = re.compile(r"gap@(0|[1-9][0-9]{0,9})")
_GRAPH_AT_MOST = 32 << 20
# The memory of WebAssembly ends at 4 GiB. Offsets and lengths in a weight file are int32, which this keeps to.
_VALUES_AT_MOST = 1 << 30
_RECORD = struct.Struct("<iifi")
_CHUNK = 1 << 20
_RAW, _EIGHTBIT = "raw", "eightbit"


@dataclass(frozen=True)
class _Span:
    """Where a tensor's values lie in its backend's weights, counted in values."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class _Layout:
    """The spans that one graph names, in a room of so many values.

    With `constants_only` all of them are weights, else those that begin within the weight file.
    """

    backend: str
    encoding: str
    spans: tuple[_Span, ...]
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


def sniff(path: Path, head: bytes) -> bool:
    if head or not path.is_dir():
        return False
    names = _names(path)
    return any(map(_GRAPH.fullmatch, names)) and any(map(_WEIGHT.fullmatch, names))


def _names(folder: Path) -> list[str]:
    with io_errors(folder):
        return sorted(os.listdir(folder))


# --- reading ---------------------------------------------------------------------------------------------------


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
    graphs = [match for match in map(_GRAPH.fullmatch, _names(path)) if match]
    if not graphs:
        raise BadInput("there is no graph_<backend>.json in it", file=path)
    for match in graphs:
        backend = match[1]
        graph_path = _own_file(path, match[0])
        data = read_all(graph_path, at_most=_GRAPH_AT_MOST)
        text, graph = _object(data, graph_path, "the graph")
        layout = _layout(graph, backend, graph_path)
        weight_path = _own_file(path, f"weight_{backend}.bin")
        attributes[match[0]] = text
        if layout.encoding == _RAW:
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


def _object(data: bytes | str, path: Path, what: str) -> tuple[str, dict[str, Any]]:
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


def _layout(graph: Mapping[str, Any], backend: str, path: Path) -> _Layout:
    def part(of: Any, *keys: str) -> Any:
        for key in keys:
            of = of.get(key) if isinstance(of, dict) else None
        if not isinstance(of, dict):
            raise BadInput(f"the graph has no {'.'.join(keys)}", file=path)
        return of

    encoding = graph.get("weight_encoding")
    if encoding not in (_RAW, _EIGHTBIT):
        raise BadInput(f"the weight encoding {printable(repr(encoding))} is not known", file=path)
    spans = []
    if "constants_map" in graph:
        for name, spec in part(graph, "constants_map").items():
            byte_offset, size = _place(spec, "byte_offset", backend, name, path)
            if byte_offset % 4:
                raise BadInput(f"byte {byte_offset} is not the start of a value", file=path, tensor=f"{backend}/{name}")
            spans.append(_Span(name, byte_offset // 4, size))
        room = max((s.end for s in spans), default=0)
    else:
        room = part(graph, "memory_layout", "static").get("size")
        if type(room) is not int or room < 0:
            raise BadInput("memory_layout.static.size is not a whole number from 0", file=path)
        for name, spec in part(graph, "memory_layout", "static", "allocations").items():
            spans.append(_Span(name, *_place(spec, "offset", backend, name, path)))
    room = min(room, _VALUES_AT_MOST)
    for span in spans:
        if span.end > room:
            raise BadInput(
                f"{span.size} values at {span.offset} do not fit the layout of {room}",
                file=path,
                tensor=f"{backend}/{span.name}",
            )
    return _Layout(backend, encoding, tuple(spans), room, "constants_map" in graph)


def _place(spec: Any, key: str, backend: str, name: str, path: Path) -> tuple[int, int]:
    values = (spec.get(key), spec.get("size")) if isinstance(spec, dict) else ()
    if not values or not all(type(v) is int and v >= 0 for v in values):
        raise BadInput(f"its {key} and size are not whole numbers from 0", file=path, tensor=f"{backend}/{name}")
    return values  # type: ignore[return-value]


def _constants(layout: _Layout, count: int, path: Path) -> list[_Span]:
    """The tensors in `count` values of weights, gaps among them, end to end in order."""
    if count > layout.room:
        raise BadInput(f"{count} values of weights are there, the layout has room for {layout.room}", file=path)
    out: list[_Span] = []
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
            out.append(_Span(f"gap@{end}", end, span.offset - end))
        out.append(span)
        end = max(end, span.end)
    if count > end:
        out.append(_Span(f"gap@{end}", end, count - end))
    return out


def _read_raw(layout: _Layout, path: Path) -> list[Entry]:
    size = file_size(path)
    if size % 4:
        raise BadInput(f"{size} bytes are not whole float32 values", file=path)

    def loader(read: Callable[[], bytes]) -> Callable[[], NDArray[np.float32]]:
        return lambda: np.frombuffer(read(), _F32)

    return [
        Tensor(name, _F32, (span.size,), loader(section(path, 4 * span.offset, 4 * span.size, tensor=name)))
        for span in _constants(layout, size // 4, path)
        for name in [layout.tensor(span.name)]
    ]


def _read_eightbit(layout: _Layout, path: Path) -> tuple[list[Entry], dict[str, list[tuple[int, float]]]]:
    """The tensors, and of those that are not exactly one record the sizes and scales of their records."""
    records = _records(layout, path)
    spans = _constants(layout, sum(r.size for r in records), path)
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
    layout: _Layout, span: _Span, pieces: Sequence[_Piece], path: Path, inflated: Callable[[_Record], bytes]
) -> Entry:
    name = layout.tensor(span.name)
    if len(pieces) == 1 and pieces[0][0].size == span.size:
        record = pieces[0][0]
        return Quantized(name, _F32, (span.size,), record.steps, span.size, lambda: _codes_of(record, path, layout))

    def load() -> NDArray[np.float32]:
        out = np.empty(span.size, _F32)
        done = 0
        for record, start, end in pieces:
            codes = inflated(record)[start:end]
            out[done : done + len(codes)] = decode(codes, record.steps, (len(codes),), _F32, name)
            done += len(codes)
        return out

    return Tensor(name, _F32, (span.size,), load)


def _records(layout: _Layout, path: Path) -> list[_Record]:
    """All records of a weight file, each inflated once to know that it can be, without keeping its codes."""
    size = file_size(path)
    most = layout.room
    records: list[_Record] = []
    position = total = 0
    with io_errors(path), open(path, "rb") as file:
        while position < size:

            def bad(what: str, total: int = total) -> BadInput:
                return BadInput(what, file=path, tensor=layout.at(total))

            head = file.read(_RECORD.size)
            if len(head) < _RECORD.size:
                raise bad(f"the file ends in the head of its record, at byte {position}")
            position += len(head)
            offset, body_bytes, scale, _ = _RECORD.unpack(head)
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
        data = file.read(min(nbytes, _CHUNK))
        if not data or inflater.eof:
            break
        nbytes -= len(data)
        while True:
            out = inflater.decompress(data, _CHUNK)
            count += len(out)
            if count > at_most:
                raise zlib.error(f"they are more than the {at_most} values that the layout has room for")
            data = inflater.unconsumed_tail
            # A full chunk may leave output behind in the inflater even when all input is taken.
            if not data and len(out) < _CHUNK:
                break
    if not inflater.eof:
        raise zlib.error("the stream is cut off")
    if nbytes or inflater.unused_data:
        raise zlib.error("there are bytes past the end of the stream")
    return count


def _codes_of(record: _Record, path: Path, layout: _Layout) -> bytes:
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


# --- writing ---------------------------------------------------------------------------------------------------


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> None:
    """A folder that stock `webdnn.js` loads. The bodies of records are always deflated, whatever `level` says.

    A backend becomes `eightbit` when any of its tensors is coded so, and `raw` when none is. A tensor of plain
    floats in an eightbit backend is coded without loss where that is possible, else by WebDNN's own rule.
    Graphs change in `weight_encoding` only. When the model was read from a folder, the other plain files of that
    folder (kernels, labels) are copied; links, hidden files and folders are not.

    Raises:
        UsageError: the model did not come from a WebDNN folder, or not all of its tensors are given.
        BadInput: a tensor does not fit its place in the graph, or holds values that WebDNN cannot.
        OutputError: what lies at `path` would be lost.
    """
    # Errors name where the graphs came from: the folder, or the container that carries them.
    graphs = {m[1]: text for key, text in model.attributes.items() if (m := _GRAPH.fullmatch(key))}
    if not graphs:
        raise UsageError("only a model that was read from a WebDNN folder can be written as one", file=path)
    others = _other_files(model)
    _refuse_to_lose(path, others)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(atomic_folder(path))
        writers = {}
        for backend, text in sorted(graphs.items()):
            spool = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            _, graph = _object(text, model.source.path, f"graph_{backend}.json")
            cut = _cut(model.attributes.get(f"records_{backend}"), model.source.path)
            layout = _layout(graph, backend, model.source.path)
            writers[backend] = _Writer(layout, text, cut, model.source.path, spool)
        given = set()
        for entry in entries:
            backend, _, name = entry.name.partition("/")
            if backend not in writers:
                raise BadInput("no graph has it", file=model.source.path, tensor=entry.name)
            writers[backend].add(name, entry)
            given.add(entry.name)
        for tensor in model.tensors:
            if tensor.name not in given:
                raise UsageError("a WebDNN folder must have all its tensors", file=path, tensor=tensor.name)
        for writer in writers.values():
            writer.finish(folder)
        for name, source in others.items():
            _copy(source, folder / name)


@dataclass(frozen=True)
class _Part:
    """What one tensor left in the spool: a whole record, or plain float32 values (`coded` False)."""

    name: str
    offset: int
    size: int
    start: int
    stored_bytes: int
    coded: bool


@dataclass
class _Writer:
    """Collects one backend's tensors, in any order, in a spool file: their encoding is known only after the last."""

    layout: _Layout
    text: str
    cut: Mapping[str, Sequence[tuple[int, float]]]
    source: Path
    spool: IO[bytes]
    parts: list[_Part] = field(default_factory=list)
    spans: dict[str, _Span] = field(init=False)

    def __post_init__(self) -> None:
        self.spans = {span.name: span for span in self.layout.spans}

    def add(self, name: str, entry: Entry) -> None:
        span = self._span(name, entry)
        if span.size != entry.size:
            raise self._bad(name, f"it has {entry.size} values, its place in the graph {span.size}")
        if not span.size:
            return
        coded = _codes(entry)
        data: bytes | memoryview
        data = np.ascontiguousarray(_floats(entry)).data.cast("B") if coded is None else _record(span.offset, *coded)
        start = self.spool.tell()
        self.spool.write(data)
        self.parts.append(_Part(name, span.offset, span.size, start, len(data), coded is not None))

    def finish(self, folder: Path) -> None:
        self.parts.sort(key=lambda p: p.offset)
        total = 0
        for part in self.parts:
            if part.offset != total:
                raise self._bad(part.name, f"it belongs at value {part.offset}, the tensors before it end at {total}")
            total += part.size
        _constants(self.layout, total, self.source)
        eightbit = any(part.coded for part in self.parts)
        with open(folder / f"weight_{self.layout.backend}.bin", "xb") as file:
            for part in self.parts:
                self.spool.seek(part.start)
                if eightbit and not part.coded:
                    for data in self._late_records(part):
                        file.write(data)
                else:
                    _copy_bytes(self.spool, file, part.stored_bytes)
        text = self.text
        encoding = _EIGHTBIT if eightbit else _RAW
        if self.parts and encoding != self.layout.encoding:
            text = _with_encoding(text, encoding)
        (folder / f"graph_{self.layout.backend}.json").write_bytes(text.encode())

    def _late_records(self, part: _Part) -> Iterator[bytes]:
        values = np.frombuffer(self.spool.read(part.stored_bytes), _F32)
        if not np.isfinite(values).all():
            raise self._bad(part.name, "eightbit cannot hold values that are not finite")
        offset = part.offset
        for codes, scale in encode(values, self.cut.get(part.name, ())):
            yield _record(offset, codes, scale)
            offset += codes.size

    def _span(self, name: str, entry: Entry) -> _Span:
        span = self.spans.get(name)
        gap = _GAP.fullmatch(name)
        if span is None and gap is not None:
            return _Span(name, int(gap[1]), entry.size)
        if span is None:
            raise self._bad(name, "the graph has no such allocation")
        return span

    def _bad(self, name: str, what: str) -> BadInput:
        return BadInput(what, file=self.source, tensor=self.layout.tensor(name))


def _with_encoding(text: str, encoding: str) -> str:
    """The graph, known to be valid, with another `weight_encoding` and every other character as it was."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[ \t\n\r,:]*")
    position = text.index("{") + 1
    while True:
        key, position = decoder.raw_decode(text, between.match(text, position).end())  # type: ignore[union-attr]
        start = between.match(text, position).end()  # type: ignore[union-attr]
        _, position = decoder.raw_decode(text, start)
        if key == "weight_encoding":
            return text[:start] + json.dumps(encoding) + text[position:]


def _codes(entry: Entry) -> tuple[NDArray[np.uint8], float] | None:
    """The codes and scale of a tensor that is in WebDNN's eightbit code already, however its bytes are packed."""
    if isinstance(entry, Tensor) or entry.dtype != _F32 or not entry.steps:
        return None
    last = entry.steps[-1]
    scale = last.params.get("scale")
    if last.name != "codebook.1" or last.params.get("table") != "eightbit" or set(last.params) != {"table", "scale"}:
        return None
    # A record holds the scale as a float32 that is not negative; the values of any other scale are kept as floats.
    if not isinstance(scale, int | float) or not 0 <= scale <= float(np.finfo(np.float32).max):
        return None
    if float(np.float32(scale)) != scale:
        return None
    codes = decode_bytes(entry.payload, entry.steps[:-1], entry.size * entry.dtype.itemsize, entry.name)
    if codes.size != entry.size:
        raise BadInput(f"{codes.size} codes are there where {entry.size} belong", tensor=entry.name)
    return codes, float(scale)


def _floats(entry: Entry) -> NDArray[np.float32]:
    values = entry.array
    if values.dtype not in (_F32, DTYPES["F16"]):
        raise BadInput(f"WebDNN holds float32 only, not {values.dtype}", tensor=entry.name)
    return values.reshape(-1).astype(_F32, copy=False)


def encode(values: NDArray[np.float32], cut: Sequence[tuple[int, float]] = ()) -> list[tuple[NDArray[np.uint8], float]]:
    """Finite float32 values, 1-D, as records of eightbit codes and a scale.

    Where the values are exactly those of records with the sizes and scales of `cut`, or of one record with scale
    max |w|, the codes give them back bit for bit. Else this is WebDNN's rule: one record with scale max |w| and the
    nearest code, so that an error is at most half the widest step of the table, 0.0086 · max |w|.
    """
    if cut and sum(size for size, _ in cut) == values.size:
        ends = np.cumsum([size for size, _ in cut])
        parts = np.split(values, ends[:-1])
        exact = [_exact_codes(part, scale) for part, (_, scale) in zip(parts, cut, strict=True)]
        if all(codes is not None for codes in exact):
            return [(codes, scale) for codes, (_, scale) in zip(exact, cut, strict=True) if codes is not None]
    scale = float(np.max(np.abs(values), initial=0.0))
    exact_codes = _exact_codes(values, scale)
    if exact_codes is not None:
        return [(exact_codes, scale)]
    magnitudes = EIGHTBIT_TABLE[:128] * scale
    nearest = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(values))
    return [(_signed(nearest, values), scale)]


def _exact_codes(values: NDArray[np.float32], scale: float) -> NDArray[np.uint8] | None:
    """Codes that decode to exactly `values`, signs of zeros included, or None when there are none."""
    magnitudes = (EIGHTBIT_TABLE[:128] * scale).astype(np.float32)
    wanted = np.abs(values)
    codes = np.minimum(np.searchsorted(magnitudes, wanted), 127)
    return _signed(codes, values) if np.array_equal(magnitudes[codes], wanted) else None


def _signed(codes: NDArray[np.intp], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    out = codes.astype(np.uint8)
    out[np.signbit(values)] += np.uint8(128)
    return out


def _record(offset: int, codes: NDArray[np.uint8], scale: float) -> bytes:
    body = _deflated(codes.tobytes())
    return _RECORD.pack(offset, len(body), scale, 0) + body


def _deflated(data: bytes) -> bytes:
    # Level 12 searches for matches that codes of trained weights hardly have; now and then level 1, which spends no
    # bits on them, is smaller.
    return min((bytes(deflate.zlib_compress(data, level)) for level in (12, 1)), key=len)


def _cut(text: str | None, path: Path) -> dict[str, list[tuple[int, float]]]:
    """The attribute `records_<backend>`, checked: it may come from a container that is not ours."""
    if text is None:
        return {}
    _, cut = _object(text, path, "the list of records")
    most = float(np.finfo(np.float32).max)
    for name, pieces in cut.items():
        if not isinstance(pieces, list) or not all(
            isinstance(p, list)
            and len(p) == 2
            and type(p[0]) is int
            and 0 < p[0] <= _VALUES_AT_MOST
            and type(p[1]) in (int, float)
            and 0 <= p[1] <= most
            and float(np.float32(p[1])) == p[1]
            for p in pieces
        ):
            raise BadInput("its list of records is not valid", file=path, tensor=name)
    return {name: [(size, float(scale)) for size, scale in pieces] for name, pieces in cut.items()}


def _other_files(model: Model) -> dict[str, Path]:
    """What belongs to the folder that the model was read from, besides graphs and weights: plain files only."""
    folder = model.source.path
    if model.source.format != NAME or not folder.is_dir():
        return {}
    with io_errors(folder):
        return {
            name: folder / name
            for name in _names(folder)
            if not name.startswith(".")
            and not _GRAPH.fullmatch(name)
            and not _WEIGHT.fullmatch(name)
            and stat.S_ISREG(os.lstat(folder / name).st_mode)
        }


def _refuse_to_lose(path: Path, others: Mapping[str, Path]) -> None:
    """The folder at `path` will be replaced: it may hold only graphs, weights, and what is written again."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError("something that is not a folder is in the way", file=path)
    for name in _names(path) if path.exists() else ():
        if name not in others and not _GRAPH.fullmatch(name) and not _WEIGHT.fullmatch(name):
            raise OutputError(
                f"the folder also holds {printable(name)}, which would be lost", file=path, hint="choose another folder"
            )


def _copy(source: Path, target: Path) -> None:
    # The file may have become a link since the folder was listed; that is not followed either.
    with io_errors(source):
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as read, open(target, "xb") as out:
        shutil.copyfileobj(read, out, _CHUNK)


def _copy_bytes(source: IO[bytes], target: IO[bytes], nbytes: int) -> None:
    while nbytes:
        data = source.read(min(nbytes, _CHUNK))
        if not data:
            raise OutputError("the temporary file is shorter than what was written to it")
        target.write(data)
        nbytes -= len(data)
