"""The one container of ours: a safetensors file whose encoded tensors carry their decode chain in the header.

A tensor that is not encoded is a plain safetensors tensor that any reader understands. An encoded one is a U8
tensor; under the key `shrink` the header's `__metadata__` holds JSON:

    {"version": 1,
     "source": format name,                 what the model was read from
     "state": [names],                      tensors that only training needs
     "tensors": {name: {"crc32": number,    of the tensor's stored bytes
                        "dtype", "shape",   of the decoded values, and
                        "steps": [[step, parameters], …]}}}      its decode chain, where it is encoded

`shrink.crc32` is the CRC-32 of that text. Two more U8 tensors, which are none of the model's, hold zlib streams:
`shrink.attributes`, JSON of what the source's format must have back, and `shrink.graph`, the ONNX graph.

That is version 1. Of a small model such a header is half of the file: where it is worth it, the file is packed, which
is version 2. There the metadata says {"version": 2} and no more, and the file holds one U8 tensor, `shrink.packed`:

    4 bytes                                the length of the zlib stream, little-endian
    a zlib stream                          of JSON, the packed header
    the data                               as in version 1

    {"source", "state",                    as in version 1
     "tensors": [row, …]}                  in the order of their data, without gaps

    [crc32, bytes, shape, name, dtype]             a plain tensor of so many bytes
    [crc32, bytes, shape, name, dtype, steps]      an encoded one: dtype and shape are those of the decoded values
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deflate
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from shrink.coders import pack
from shrink.errors import BadInput, IntegrityError, printable
from shrink.files import atomic_file, io_errors, section
from shrink.model import DTYPES, Entry, Quantized, Role, Tensor, check_name, check_shape, dtype_code
from shrink.steps import Step, from_bfloat16

__all__ = ["Contents", "read", "write"]

VERSION, PACKED_VERSION = 1, 2
_KEY, _CRC_KEY = "shrink", "shrink.crc32"
_ATTRIBUTES, _GRAPH, _PACKED = "shrink.attributes", "shrink.graph", "shrink.packed"
_RESERVED = ("__metadata__", _ATTRIBUTES, _GRAPH)
# The name of a format: it is shown to users.
_SOURCE = re.compile(r"[a-z0-9-]{1,32}")

# What one encoded tensor costs in the header beyond its payload; packing must gain more than this.
_HEADER_COST = 100
# What one more step takes there.
_STEP_COST = 30
# The largest attributes or graph that is believed.
_BLOB_AT_MOST = 1 << 28
# The largest packed header that is written and believed, deflated or not. What JSON becomes in memory is many times its
# size, and what is deflated need not bring the bytes.
_PACKED_AT_MOST = 1 << 20
# A file is packed where that takes one byte of so many away: other readers see less of it then.
_WORTH_PACKING = 64


@dataclass(frozen=True)
class Contents:
    """What a container file holds; `source` is None for a safetensors file that shrink did not write."""

    entries: tuple[Entry, ...]
    source: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    graph: bytes | None = None


def read(path: Path) -> Contents:
    """Read and check the header; payloads are read, and their CRC checked, when asked for.

    Raises:
        BadInput: not a valid safetensors file, or metadata that contradicts it.
        IntegrityError: the metadata is not what was written.
    """
    header, data_start = _header(path)
    said = _said(header.pop("__metadata__", {}), path)
    if said is not None and said.get("version") == PACKED_VERSION:
        header, said, data_start = _unpacked(header, data_start, path)
    meta = _metadata(said, path)
    loads = {
        name: _checked(
            section(path, data_start + start, end - start, tensor=name),
            meta.tensors.get(name, {}).get("crc32"),
            path,
            name,
        )
        for name, (start, end) in ((name, spec["data_offsets"]) for name, spec in header.items())
    }
    attributes, graph = {}, None
    if meta.source is not None:
        if header.pop(_ATTRIBUTES, None):
            attributes = _attributes(_inflated(loads[_ATTRIBUTES](), path, _ATTRIBUTES), path)
        if header.pop(_GRAPH, None):
            graph = _inflated(loads[_GRAPH](), path, _GRAPH)
    for name in (*meta.tensors, *meta.state):
        if name not in loads:
            raise BadInput("the metadata describes it, but the file does not hold it", file=path, tensor=name)
    in_order = sorted(header, key=lambda name: (header[name]["data_offsets"], name))
    entries = tuple(_entry(name, header[name], meta, loads[name], path) for name in in_order)
    return Contents(entries, meta.source, attributes, graph)


@dataclass(frozen=True)
class _Meta:
    source: str | None
    state: frozenset[str]
    tensors: dict[str, dict[str, Any]]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, validated, and where the data starts."""
    try:
        # Opening validates everything: header size, overlaps, holes, offsets against dtype and shape.
        with io_errors(path), safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise BadInput(f"not a valid safetensors file: {error}", file=path) from None
    with io_errors(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return _json(file.read(length), path, "the header"), 8 + length


def _json(data: bytes | str, path: Path, what: str) -> dict[str, Any]:
    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise BadInput(f"{what} says something twice", file=path)
        return out

    try:
        # Of bytes, json would take UTF-16 as well.
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text, object_pairs_hook=no_twins)
    except (ValueError, RecursionError):
        raise BadInput(f"{what} is not valid JSON", file=path) from None
    if not isinstance(value, dict):
        raise BadInput(f"{what} is not a JSON object", file=path)
    return value


def _said(metadata: dict[str, str], path: Path) -> dict[str, Any] | None:
    """What shrink wrote about the file; None where shrink did not write it."""
    text = metadata.get(_KEY)
    if text is None and _CRC_KEY not in metadata:
        return None
    if text is None or metadata.get(_CRC_KEY) != _crc_text(text):
        raise IntegrityError("the metadata is damaged", file=path)
    return _json(text, path, "the metadata")


def _metadata(meta: dict[str, Any] | None, path: Path) -> _Meta:
    if meta is None:
        return _Meta(None, frozenset(), {})
    if meta.get("version") != VERSION:
        raise BadInput(
            f"container version {meta.get('version')!r} is not known", file=path, hint="a newer shrink may know it"
        )
    source, state, tensors = meta.get("source"), meta.get("state"), meta.get("tensors")
    if not (
        isinstance(source, str)
        and _SOURCE.fullmatch(source)
        and isinstance(state, list)
        and all(isinstance(name, str) for name in state)
        and isinstance(tensors, dict)
        and all(isinstance(spec, dict) for spec in tensors.values())
    ):
        raise BadInput("the metadata has parts missing or of the wrong type", file=path)
    return _Meta(source, frozenset(state), tensors)


def _unpacked(header: dict[str, Any], start: int, path: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Of a packed file: tensors and metadata as a header of version 1 has them, and where the data starts."""
    if list(header) != [_PACKED]:
        raise BadInput(f"a packed file holds {_PACKED} and nothing else", file=path)
    left = header[_PACKED]["data_offsets"][1] - 4
    with io_errors(path), open(path, "rb") as file:
        file.seek(start)
        length = int.from_bytes(file.read(4), "little")
        if length > min(left, _PACKED_AT_MOST):
            raise BadInput("the packed header is longer than the file, or than is believable", file=path)
        deflated = file.read(length)
    inflated = _inflated(deflated, path, _PACKED, at_most=_PACKED_AT_MOST, alone=True)
    said = _json(inflated, path, "the packed header")
    rows = said.get("tensors")
    if not isinstance(rows, list):
        raise BadInput("the packed header has no list of tensors", file=path)
    specs: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    end = 0
    for row in rows:
        name, spec, tensors_said = _row(row, end, path)
        if name in specs:
            raise BadInput("the packed header says it twice", file=path, tensor=name)
        specs[name], tensors[name] = spec, tensors_said
        end = spec["data_offsets"][1]
    if end != left - length:
        raise BadInput(f"its tensors take {end} bytes, but {left - length} are there", file=path)
    return specs, {**said, "version": VERSION, "tensors": tensors}, start + 4 + length


def _row(row: Any, start: int, path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """One tensor of a packed header: name, what the header of a plain file says of it, and what the metadata."""
    if not isinstance(row, list) or len(row) not in (5, 6):
        raise BadInput("the packed header has a tensor that is no row of 5 or 6", file=path)
    crc, size, shape, name, dtype, *steps = row
    if not isinstance(name, str):
        raise BadInput("the packed header has a tensor without a name", file=path)
    if type(size) is not int or size < 0:
        raise BadInput("its size is not a whole number", file=path, tensor=name)
    said = {"crc32": crc}
    if steps:
        said |= {"dtype": dtype, "shape": shape, "steps": steps[0]}
        dtype, shape = "U8", [size]
    elif not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise BadInput("it has no valid shape", file=path, tensor=name)
    else:
        check_shape(tuple(shape), file=path, tensor=name)
        if size != math.prod(shape) * _width(dtype, path, name):
            raise BadInput("its shape and size do not fit", file=path, tensor=name)
    return name, {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}, said


def _width(dtype: Any, path: Path, name: str) -> int:
    """Bytes per value in a file."""
    if dtype == "BF16":
        return 2
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadInput(f"values of type {printable(dtype)} are not supported", file=path, tensor=name)
    return DTYPES[dtype].itemsize


def _inflated(data: bytes, path: Path, name: str, *, at_most: int = _BLOB_AT_MOST, alone: bool = False) -> bytes:
    """What a zlib stream holds; with `alone`, nothing may come after it."""
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data, at_most)
    except zlib.error as error:
        raise IntegrityError(f"damaged: {error}", file=path, tensor=name) from None
    if alone and stream.unused_data:
        raise BadInput("there are bytes after the end of its zlib stream", file=path, tensor=name)
    if not stream.eof:
        raise BadInput("cut, or larger than is believable", file=path, tensor=name)
    return out


def _attributes(data: bytes, path: Path) -> dict[str, str]:
    attributes = _json(data, path, "attributes")
    if not all(isinstance(value, str) for value in attributes.values()):
        raise BadInput("attributes are not all text", file=path)
    return attributes


def _entry(name: str, spec: dict[str, Any], meta: _Meta, load: Callable[[], bytes], path: Path) -> Entry:
    check_name(name, file=path)
    role: Role = "state" if name in meta.state else "weight"
    start, end = spec["data_offsets"]
    said = meta.tensors.get(name, {})
    if "steps" in said:
        if spec["dtype"] != "U8":
            raise BadInput("it is encoded, but not stored as U8", file=path, tensor=name)
        return _encoded(name, said, end - start, load, role, path)
    shape = tuple(spec["shape"])
    check_shape(shape, file=path, tensor=name)
    if spec["dtype"] == "BF16":
        return Tensor(name, DTYPES["F32"], shape, lambda: _widened(load()).reshape(shape), role)
    dtype = DTYPES.get(spec["dtype"])
    if dtype is None:
        raise BadInput(f"values of type {spec['dtype']} are not supported", file=path, tensor=name)
    return Tensor(name, dtype, shape, lambda: np.frombuffer(load(), dtype).reshape(shape), role)


def _encoded(
    name: str, said: dict[str, Any], size_bytes: int, load: Callable[[], bytes], role: Role, path: Path
) -> Quantized:
    def wrong(what: str) -> BadInput:
        return BadInput(f"its description {what}", file=path, tensor=name)

    dtype, shape, steps = said.get("dtype"), said.get("shape"), said["steps"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong("names no known dtype")
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise wrong("has no valid shape")
    check_shape(tuple(shape), file=path, tensor=name)
    if not isinstance(steps, list) or not 0 < len(steps) <= 16:
        raise wrong("has no list of steps")
    for step in steps:
        if not (isinstance(step, list) and len(step) == 2 and isinstance(step[0], str) and isinstance(step[1], dict)):
            raise wrong("has a step that is not [name, parameters]")
    chain = tuple(Step(step_name, parameters) for step_name, parameters in steps)
    return Quantized(name, DTYPES[dtype], tuple(shape), chain, size_bytes, load, role)


def _checked(load: Callable[[], bytes], crc: Any, path: Path, name: str) -> Callable[[], bytes]:
    if crc is None:
        return load

    def read() -> bytes:
        data = load()
        if zlib.crc32(data) != crc:
            raise IntegrityError("its bytes are not the ones that were written (CRC)", file=path, tensor=name)
        return data

    return read


def _widened(data: bytes) -> NDArray[np.float32]:
    return from_bfloat16(np.frombuffer(data, "<u2"))


def _crc_text(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def write(
    entries: Iterable[Entry],
    path: Path,
    *,
    source: str,
    attributes: Mapping[str, str],
    graph: bytes | None,
    level: int | None,
) -> dict[str, int]:
    """Write a container and return the bytes that each tensor takes in it.

    Tensors are stored in the order they come, one in memory at a time: payloads go to a spool file, then header
    and spool join. With a `level`, tensors are packed where that pays.
    """
    header: dict[str, Any] = {}
    tensors: dict[str, dict[str, Any]] = {}
    state: list[str] = []
    position = 0
    with atomic_file(path) as out, tempfile.TemporaryFile(dir=path.parent) as spool:

        def store(name: str, dtype: str, shape: list[int], payload: bytes) -> None:
            nonlocal position
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(payload)]}
            tensors[name] = {"crc32": zlib.crc32(payload)}
            spool.write(payload)
            position += len(payload)

        for entry in entries:
            if entry.name in _RESERVED:
                raise BadInput("this name is reserved", file=path, tensor=entry.name)
            dtype, shape, payload, steps = _stored(entry, level)
            store(entry.name, dtype, shape, payload)
            if steps:
                tensors[entry.name] |= {
                    "dtype": dtype_code(entry.dtype),
                    "shape": list(entry.shape),
                    "steps": [[s.name, dict(s.params)] for s in steps],
                }
            if entry.role == "state":
                state.append(entry.name)
        sizes = {name: spec["data_offsets"][1] - spec["data_offsets"][0] for name, spec in header.items()}
        if attributes:
            blob = bytes(deflate.zlib_compress(_compact(dict(attributes)).encode(), 12))
            store(_ATTRIBUTES, "U8", [len(blob)], blob)
        if graph is not None:
            blob = bytes(deflate.zlib_compress(graph, 12))
            store(_GRAPH, "U8", [len(blob)], blob)
        out.write(_head(header, {"source": source, "state": state, "tensors": tensors}, position))
        spool.seek(0)
        shutil.copyfileobj(spool, out, 1 << 20)
    return sizes


def _head(header: dict[str, Any], said: dict[str, Any], size_bytes: int) -> bytes:
    """Everything before the data, of which there are `size_bytes`: packed where that pays."""
    head = _with_metadata({"version": VERSION, **said}, header)
    head += b" " * (-len(head) % 8)
    whole = len(head).to_bytes(8, "little") + head
    # Without an encoded tensor, any reader can do something with every part of the file.
    if not any("steps" in tensor for tensor in said["tensors"].values()):
        return whole
    packed = _packed_head(header, said, size_bytes)
    if packed is None or _WORTH_PACKING * (len(whole) - len(packed)) < len(whole) + size_bytes:
        return whole
    return packed


def _packed_head(header: dict[str, Any], said: dict[str, Any], size_bytes: int) -> bytes | None:
    """The same in a packed file; None where it is too large for one."""
    rows = []
    for name, spec in header.items():
        start, end = spec["data_offsets"]
        # Of an encoded tensor, dtype and shape are the decoded ones.
        tensor = {**spec, **said["tensors"][name]}
        steps = [tensor["steps"]] if "steps" in tensor else []
        rows.append([tensor["crc32"], end - start, tensor["shape"], name, tensor["dtype"], *steps])
    text = _compact({**said, "tensors": rows}).encode()
    if len(text) > _PACKED_AT_MOST:
        return None
    deflated = bytes(deflate.zlib_compress(text, 12))
    size = 4 + len(deflated) + size_bytes
    outer = _with_metadata(
        {"version": PACKED_VERSION}, {_PACKED: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    )
    return len(outer).to_bytes(8, "little") + outer + len(deflated).to_bytes(4, "little") + deflated


def _with_metadata(said: dict[str, Any], header: dict[str, Any]) -> bytes:
    text = _compact(said)
    return _compact({"__metadata__": {_KEY: text, _CRC_KEY: _crc_text(text)}, **header}).encode()


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _stored(entry: Entry, level: int | None) -> tuple[str, list[int], bytes, tuple[Step, ...]]:
    """dtype, shape and bytes as the safetensors header sees them, and the decode chain, empty for a plain tensor."""
    if isinstance(entry, Tensor):
        values = entry.array
        cast = (Step("cast.1", {"from": dtype_code(values.dtype)}),)
        bare = Quantized.of(entry.name, entry.dtype, entry.shape, cast, values.tobytes())
    else:
        bare = entry
    if level is not None and len(bare.steps) == 1:
        packed = pack(bare, level)
        cost = _HEADER_COST if bare.steps[0].name == "cast.1" else _STEP_COST
        if packed.size_bytes + cost < bare.size_bytes:
            return "U8", [packed.size_bytes], packed.payload, packed.steps
    if len(bare.steps) == 1 and bare.steps[0].name == "cast.1":
        # Plain: any safetensors reader sees a float16 tensor as what it is.
        return bare.steps[0].params["from"], list(entry.shape), bare.payload, ()
    return "U8", [bare.size_bytes], bare.payload, bare.steps
