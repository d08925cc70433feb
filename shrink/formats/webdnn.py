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
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import deflate
import numpy as np
from numpy.typing import NDArray

from shrink.codebooks import EIGHTBIT_TABLE
from shrink.errors import BadInput, OutputError, UsageError, printable
from shrink.files import atomic_folder, io_errors
from shrink.formats._webdnn_read import (
    CHUNK,
    EIGHTBIT,
    F32,
    GRAPH_FILE,
    NAME,
    RAW,
    RECORD_HEAD,
    VALUES_AT_MOST,
    WEIGHT_FILE,
    Layout,
    Span,
    constants,
    json_object,
    layout_of,
    names_in,
    read,
)
from shrink.model import DTYPES, Entry, Model, Tensor
from shrink.steps import decode_bytes

SUFFIX = ""
HOLDS = frozenset({"float32", "eightbit"})

_GAP = re.compile(r"gap@(0|[1-9][0-9]{0,9})")

__all__ = ["HOLDS", "NAME", "SUFFIX", "encode", "read", "sniff", "write"]


def sniff(path: Path, head: bytes) -> bool:
    if head or not path.is_dir():
        return False
    names = names_in(path)
    return any(map(GRAPH_FILE.fullmatch, names)) and any(map(WEIGHT_FILE.fullmatch, names))


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]:
    """A folder that stock `webdnn.js` loads. The bodies of records are always deflated, whatever `level` says.

    A backend becomes `eightbit` when any of its tensors is coded so, and `raw` when none is. A tensor of plain
    floats in an eightbit backend is coded without loss where that is possible, else by WebDNN's own rule.
    Graphs change in `weight_encoding` only, and in `converted_at` where the weights are others than before: stock
    `webdnn.js` keeps weights in the visitor's browser until that number changes. When the model was read from a
    folder, the other plain files of that folder (kernels, labels) are copied; links, hidden files and folders are
    not.

    Raises:
        UsageError: the model did not come from a WebDNN folder, or not all of its tensors are given.
        BadInput: a tensor does not fit its place in the graph, or holds values that WebDNN cannot.
        OutputError: what lies at `path` would be lost.
    """
    # Errors name where the graphs came from: the folder, or the container that carries them.
    graphs = {m[1]: text for key, text in model.attributes.items() if (m := GRAPH_FILE.fullmatch(key))}
    if not graphs:
        raise UsageError("only a model that was read from a WebDNN folder can be written as one", file=path)
    others = _other_files(model)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(atomic_folder(path))
        writers = {}
        for backend, text in sorted(graphs.items()):
            spool = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            _, graph = json_object(text, model.source.path, f"graph_{backend}.json")
            cut = _cut(model.attributes.get(f"records_{backend}"), model.source.path)
            layout = layout_of(graph, backend, model.source.path)
            writers[backend] = _Writer(layout, text, cut, model.source.path, spool)
        given = set()
        before = {t.name: t for t in model.tensors}
        for entry in entries:
            backend, _, name = entry.name.partition("/")
            if backend not in writers:
                raise BadInput("no graph has it", file=model.source.path, tensor=entry.name)
            writers[backend].add(name, entry, changed=entry is not before.get(entry.name))
            given.add(entry.name)
        for tensor in model.tensors:
            if tensor.name not in given:
                raise UsageError("a WebDNN folder must have all its tensors", file=path, tensor=tensor.name)
        for writer in writers.values():
            writer.finish(folder)
        for name, source in others.items():
            _copy(source, folder / name)
        # Last, for only now is the old folder about to go.
        _refuse_to_lose(path, others)
    return {w.layout.tensor(part.name): part.stored_bytes for w in writers.values() for part in w.parts}


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

    layout: Layout
    text: str
    cut: Mapping[str, Sequence[tuple[int, float]]]
    source: Path
    spool: IO[bytes]
    parts: list[_Part] = field(default_factory=list)
    changed: bool = False
    spans: dict[str, Span] = field(init=False)

    def __post_init__(self) -> None:
        self.spans = {span.name: span for span in self.layout.spans}

    def add(self, name: str, entry: Entry, *, changed: bool) -> None:
        self.changed |= changed
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
        constants(self.layout, total, self.source)
        eightbit = any(part.coded for part in self.parts)
        with open(folder / f"weight_{self.layout.backend}.bin", "x+b") as file:
            for part in self.parts:
                self.spool.seek(part.start)
                if eightbit and not part.coded:
                    for data in self._late_records(part):
                        file.write(data)
                else:
                    _copy_bytes(self.spool, file, part.stored_bytes)
            file.seek(0)
            stamp = 0
            while data := file.read(CHUNK):
                stamp = zlib.crc32(data, stamp)
        text = self.text
        encoding = EIGHTBIT if eightbit else RAW
        if self.parts and encoding != self.layout.encoding:
            text, self.changed = _with(text, "weight_encoding", encoding), True
        if self.changed:
            text = _with(text, "converted_at", stamp)
        (folder / f"graph_{self.layout.backend}.json").write_bytes(text.encode())

    def _late_records(self, part: _Part) -> Iterator[bytes]:
        values = np.frombuffer(self.spool.read(part.stored_bytes), F32)
        if not np.isfinite(values).all():
            raise self._bad(part.name, "eightbit cannot hold values that are not finite")
        offset = part.offset
        for codes, scale in encode(values, self.cut.get(part.name, ())):
            yield _record(offset, codes, scale)
            offset += codes.size

    def _span(self, name: str, entry: Entry) -> Span:
        span = self.spans.get(name)
        gap = _GAP.fullmatch(name)
        if span is None and gap is not None:
            return Span(name, int(gap[1]), entry.size)
        if span is None:
            raise self._bad(name, "the graph has no such allocation")
        return span

    def _bad(self, name: str, what: str) -> BadInput:
        return BadInput(what, file=self.source, tensor=self.layout.tensor(name))


def _with(text: str, name: str, value: str | int) -> str:
    """The graph, known to be valid, with another value of a key, if it has that; every other character as it was."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[ \t\n\r,:]*")
    position = text.index("{") + 1
    end = text.rindex("}")
    while (position := between.match(text, position).end()) < end:  # type: ignore[union-attr]
        key, position = decoder.raw_decode(text, position)
        start = between.match(text, position).end()  # type: ignore[union-attr]
        _, position = decoder.raw_decode(text, start)
        if key == name:
            return text[:start] + json.dumps(value) + text[position:]
    return text


def _codes(entry: Entry) -> tuple[NDArray[np.uint8], float] | None:
    """The codes and scale of a tensor that is in WebDNN's eightbit code already, however its bytes are packed."""
    if isinstance(entry, Tensor) or entry.dtype != F32 or not entry.steps:
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
    if values.dtype not in (F32, DTYPES["F16"]):
        raise BadInput(f"WebDNN holds float32 only, not {values.dtype}", tensor=entry.name)
    return values.reshape(-1).astype(F32, copy=False)


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
    return RECORD_HEAD.pack(offset, len(body), scale, 0) + body


def _deflated(data: bytes) -> bytes:
    # Level 12 searches for matches that codes of trained weights hardly have; now and then level 1, which spends no
    # bits on them, is smaller.
    return min((bytes(deflate.zlib_compress(data, level)) for level in (12, 1)), key=len)


def _cut(text: str | None, path: Path) -> dict[str, list[tuple[int, float]]]:
    """The attribute `records_<backend>`, checked: it may come from a container that is not ours."""
    if text is None:
        return {}
    _, cut = json_object(text, path, "the list of records")
    most = float(np.finfo(np.float32).max)
    for name, pieces in cut.items():
        if not isinstance(pieces, list) or not all(
            isinstance(p, list)
            and len(p) == 2
            and type(p[0]) is int
            and 0 < p[0] <= VALUES_AT_MOST
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
            for name in names_in(folder)
            if not name.startswith(".")
            and not GRAPH_FILE.fullmatch(name)
            and not WEIGHT_FILE.fullmatch(name)
            and stat.S_ISREG(os.lstat(folder / name).st_mode)
        }


def _refuse_to_lose(path: Path, others: Mapping[str, Path]) -> None:
    """The folder at `path` will be replaced: it may hold only graphs, weights, and what is written again."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError("is not a folder", file=path)
    for name in names_in(path) if path.exists() else ():
        if name not in others and not GRAPH_FILE.fullmatch(name) and not WEIGHT_FILE.fullmatch(name):
            raise OutputError(
                f"the folder also holds {printable(name)}, which would be lost", file=path, hint="choose another folder"
            )


def _copy(source: Path, target: Path) -> None:
    # The file may have become a link since the folder was listed; that is not followed either.
    with io_errors(source):
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as read, open(target, "xb") as out:
        shutil.copyfileobj(read, out, CHUNK)


def _copy_bytes(source: IO[bytes], target: IO[bytes], nbytes: int) -> None:
    while nbytes:
        data = source.read(min(nbytes, CHUNK))
        if not data:
            raise OutputError("the temporary file is shorter than what was written to it")
        target.write(data)
        nbytes -= len(data)
