"""The one container of ours: a safetensors file whose encoded tensors carry their decode chain in the header.

A tensor that is not encoded is a plain safetensors tensor that any reader understands. An encoded one is a U8
tensor; under the key `shrink` the header's `__metadata__` holds JSON:

    {"version": 1,
     "source": format name,            what the model was read from
     "attributes": {…},                what that format must have back
     "state": [names],                 tensors that only training needs
     "encoded": {name: {"dtype", "shape", "steps": [[step, params], …]}},
     "crc32": {name: number}}          of each tensor's stored bytes, encoded or not

`shrink.crc32` is the CRC-32 of that JSON text, and `shrink.graph` the ONNX graph in base64 where there is one.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from shrink.coders import pack
from shrink.errors import BadInput, IntegrityError
from shrink.files import atomic_file, io_errors, section
from shrink.model import DTYPES, Entry, Quantized, Role, Tensor, check_name, dtype_code
from shrink.steps import Step

__all__ = ["Contents", "read", "write"]

VERSION = 1
_KEY, _CRC_KEY, _GRAPH_KEY = "shrink", "shrink.crc32", "shrink.graph"

# What one encoded tensor costs in the header beyond its payload; packing must gain more than this.
_HEADER_COST = 160


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
    try:
        # Opening validates everything: header size, overlaps, holes, offsets against dtype and shape.
        with io_errors(path), safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise BadInput(f"not a valid safetensors file: {error}", file=path) from None
    with io_errors(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header_bytes = file.read(length)
    header = _json(header_bytes, path, "the header")
    metadata = header.pop("__metadata__", {})
    meta = _metadata(metadata, path)
    graph = _graph(metadata.get(_GRAPH_KEY), path)
    entries = [
        _entry(name, spec, meta, path, 8 + length)
        for name, spec in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    ]
    known = {e.name for e in entries}
    for name in (*meta.encoded, *meta.crc32, *meta.state):
        if name not in known:
            raise BadInput("the metadata describes it, but the file does not hold it", file=path, tensor=name)
    return Contents(tuple(entries), meta.source, meta.attributes, graph)


@dataclass(frozen=True)
class _Meta:
    source: str | None
    attributes: dict[str, str]
    state: frozenset[str]
    encoded: dict[str, Any]
    crc32: dict[str, Any]


def _json(data: bytes | str, path: Path, what: str) -> dict[str, Any]:
    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise BadInput(f"{what} says something twice", file=path)
        return out

    try:
        value = json.loads(data, object_pairs_hook=no_twins)
    except (ValueError, RecursionError):
        raise BadInput(f"{what} is not valid JSON", file=path) from None
    if not isinstance(value, dict):
        raise BadInput(f"{what} is not a JSON object", file=path)
    return value


def _metadata(metadata: dict[str, str], path: Path) -> _Meta:
    text = metadata.get(_KEY)
    if text is None:
        return _Meta(None, {}, frozenset(), {}, {})
    if metadata.get(_CRC_KEY) != _crc_text(text):
        raise IntegrityError("the metadata is damaged", file=path)
    meta = _json(text, path, "the metadata")
    if meta.get("version") != VERSION:
        raise BadInput(
            f"container version {meta.get('version')!r} is not known", file=path, hint="a newer shrink may know it"
        )
    out = _Meta(meta.get("source"), meta.get("attributes"), meta.get("state"), meta.get("encoded"), meta.get("crc32"))  # type: ignore[arg-type]
    strings = (dict, list, dict, dict)
    for value, kind in zip((out.attributes, out.state, out.encoded, out.crc32), strings, strict=True):
        if not isinstance(value, kind):
            raise BadInput("the metadata has parts missing", file=path)
    if not isinstance(out.source, str) or not all(isinstance(v, str) for v in (*out.attributes.values(), *out.state)):
        raise BadInput("the metadata has parts of the wrong type", file=path)
    return _Meta(out.source, out.attributes, frozenset(out.state), out.encoded, out.crc32)


def _graph(text: str | None, path: Path) -> bytes | None:
    if text is None:
        return None
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise IntegrityError("the graph is damaged", file=path) from None


def _entry(name: str, spec: dict[str, Any], meta: _Meta, path: Path, data_start: int) -> Entry:
    check_name(name, file=path)
    role: Role = "state" if name in meta.state else "weight"
    start, end = spec["data_offsets"]
    load = _checked(section(path, data_start + start, end - start, tensor=name), meta.crc32.get(name), path, name)
    shape = tuple(spec["shape"])
    if name in meta.encoded:
        if spec["dtype"] != "U8":
            raise BadInput("it is encoded, but not stored as U8", file=path, tensor=name)
        return _encoded(name, meta.encoded[name], end - start, load, role, path)
    if spec["dtype"] == "BF16":
        return Tensor(name, DTYPES["F32"], shape, lambda: _widen(load()).reshape(shape), role)
    dtype = DTYPES.get(spec["dtype"])
    if dtype is None:
        raise BadInput(f"values of type {spec['dtype']} are not supported", file=path, tensor=name)
    return Tensor(name, dtype, shape, lambda: np.frombuffer(load(), dtype).reshape(shape), role)


def _encoded(name: str, spec: Any, size_bytes: int, load: Callable[[], bytes], role: Role, path: Path) -> Quantized:
    def wrong(what: str) -> BadInput:
        return BadInput(f"its description {what}", file=path, tensor=name)

    if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "steps"}:
        raise wrong("does not have dtype, shape and steps")
    shape, steps = spec["shape"], spec["steps"]
    if spec["dtype"] not in DTYPES:
        raise wrong("names an unknown dtype")
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise wrong("has no valid shape")
    if math.prod(shape) >= 1 << 48:
        raise wrong("claims more values than a file can hold")
    if not isinstance(steps, list) or not 0 < len(steps) <= 16:
        raise wrong("has no list of steps")
    for step in steps:
        if not (isinstance(step, list) and len(step) == 2 and isinstance(step[0], str) and isinstance(step[1], dict)):
            raise wrong("has a step that is not [name, parameters]")
    return Quantized(
        name, DTYPES[spec["dtype"]], tuple(shape), tuple(Step(s, p) for s, p in steps), size_bytes, load, role
    )


def _checked(load: Callable[[], bytes], crc: Any, path: Path, name: str) -> Callable[[], bytes]:
    if crc is None:
        return load

    def read() -> bytes:
        data = load()
        if zlib.crc32(data) != crc:
            raise IntegrityError("its bytes are not the ones that were written (CRC)", file=path, tensor=name)
        return data

    return read


def _widen(data: bytes) -> NDArray[np.float32]:
    """bfloat16 to float32, exactly."""
    return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")


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
    """Write a container and return the bytes that each tensor takes in it; is in memory at a time:
    payloads go to a spool file, then header and spool join.

    Tensors are stored in the order they come. With a `level`, tensors are packed where that pays.
    """
    header: dict[str, Any] = {}
    encoded: dict[str, Any] = {}
    crc32: dict[str, int] = {}
    state: list[str] = []
    position = 0
    with atomic_file(path) as out, tempfile.TemporaryFile(dir=path.parent) as spool:
        for entry in entries:
            dtype, shape, payload, steps = _stored(entry, level)
            if steps:
                encoded[entry.name] = {
                    "dtype": dtype_code(entry.dtype),
                    "shape": list(entry.shape),
                    "steps": [[s.name, dict(s.params)] for s in steps],
                }
            header[entry.name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(payload)]}
            crc32[entry.name] = zlib.crc32(payload)
            if entry.role == "state":
                state.append(entry.name)
            spool.write(payload)
            position += len(payload)
        meta = {
            "version": VERSION,
            "source": source,
            "attributes": dict(attributes),
            "state": state,
            "encoded": encoded,
            "crc32": crc32,
        }
        text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        metadata = {_KEY: text, _CRC_KEY: _crc_text(text)}
        if graph is not None:
            metadata[_GRAPH_KEY] = base64.b64encode(graph).decode("ascii")
        head = json.dumps({"__metadata__": metadata, **header}, ensure_ascii=False, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        out.write(len(head).to_bytes(8, "little") + head)
        spool.seek(0)
        shutil.copyfileobj(spool, out, 1 << 20)
    return {name: spec["data_offsets"][1] - spec["data_offsets"][0] for name, spec in header.items()}


def _stored(entry: Entry, level: int | None) -> tuple[str, list[int], bytes, tuple[Step, ...]]:
    """dtype, shape and bytes as the safetensors header sees them, and the decode chain, empty for a plain tensor."""
    if isinstance(entry, Tensor):
        values = np.ascontiguousarray(entry.array)
        code = dtype_code(values.dtype)
        bare = Quantized.of(entry.name, entry.dtype, entry.shape, (Step("cast.1", {"from": code}),), values.tobytes())
    else:
        bare = entry
    if level is not None and len(bare.steps) == 1:
        packed = pack(bare, level)
        if packed.size_bytes + _HEADER_COST < bare.size_bytes or bare.steps[0].name != "cast.1":
            return "U8", [packed.size_bytes], packed.payload, packed.steps
    if len(bare.steps) == 1 and bare.steps[0].name == "cast.1":
        # Plain: any safetensors reader sees a float16 tensor as what it is.
        return bare.steps[0].params["from"], list(entry.shape), bare.payload, ()
    return "U8", [bare.size_bytes], bare.payload, bare.steps
