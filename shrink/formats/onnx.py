"""ONNX models, in one file or with external data, and quantized ones that stock ONNX Runtime loads as they are.

Reading takes the data out of the top-level initializers; what is left is the model's graph. Each initializer left
without data is marked as external, and its `location` says which tensor holds its values. Initializers of a type
that NumPy does not have (bfloat16, int4, strings …), sparse ones, Constant nodes and the initializers of subgraphs
stay in the graph as they are.

A tensor stored in fewer bits is written as an initializer and, in front of all other nodes, the few that expand it
under its old name, so that nothing else in the graph changes:

    float16     Cast
    eightbit    Cast, Gather from a table of 256
    int8        Cast, Sub zero point, Mul scale
    int4        Cast, Gather from a table of 256 pairs, as a byte holds two codes; then as int8

These are operators of opset 7. DequantizeLinear would store no fewer bytes, needs opset 13 for a scale per channel
and 21 for blocks and int4, and ONNX Runtime runs it at every inference, where it folds these once, when it loads.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, MissingDependency, UsageError
from shrink.files import atomic_file, file_size, inside, io_errors, read_all, section
from shrink.model import Entry, Model, Quantized, Source, Tensor, plain_values
from shrink.steps import DTYPES, TABLES, decode_bytes, groups

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

NAME = "onnx"
SUFFIX = ".onnx"
HOLDS = frozenset({"float32", "float16", "eightbit", "int8", "int4"})

Array = NDArray[Any]

# The numbers of TensorProto.DataType for the types of the one dtype table.
_CODES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
    13: "U64",
}  # fmt: skip
_DTYPES = {number: DTYPES[code] for number, code in _CODES.items()}
_NUMBERS = {code: number for number, code in _CODES.items()}
_BFLOAT16 = 16
# Where values are kept that are not raw: the field, and the type its items are read as.
_FIELDS = {
    "F32": ("float_data", "<f4"), "F64": ("double_data", "<f8"), "I64": ("int64_data", "<i8"),
    "U32": ("uint64_data", "<u8"), "U64": ("uint64_data", "<u8"),
}  # fmt: skip
_OTHER_FIELD = ("int32_data", "<i4")
_ALL_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_FLOATS = frozenset(DTYPES[code] for code in ("F16", "F32", "F64"))

# What Protocol Buffers allow in one message.
_AT_MOST_BYTES = (1 << 31) - 1
_AT_MOST_DIMS = 32
_AT_MOST_VALUES = 1 << 48
# ONNX Runtime runs no older opset, and older operators do not broadcast.
_LEAST_OPSET = 7
# About what the nodes and small initializers that expand a tensor take; a tensor must gain more than this.
_NODES_COST = 256


def sniff(path: Path, head: bytes) -> bool:
    return bool(head) and path.suffix.lower() == SUFFIX


def read(path: Path) -> Model:
    """The initializers as tensors, and the graph.

    Raises:
        BadInput: not an ONNX model, data that does not fit the dims, or external data that lies elsewhere.
        MissingDependency: the package onnx is not installed.
    """
    proto = _parse(read_all(path, at_most=_AT_MOST_BYTES), path)
    return from_proto(proto, path)


def from_proto(proto: ModelProto, path: Path) -> Model:
    """The same for a model that is already parsed; its data is taken out of it. External data lies beside `path`."""
    names = _Names(proto, path)
    external: dict[Path, int] = {}
    _embed(_inner_tensors(proto), path, external)
    taken = set(names.initializers)
    tensors = []
    for initializer in proto.graph.initializer:
        if initializer.data_type not in _DTYPES:
            _embed([initializer], path, external)
            continue
        tensor = _take(initializer, _tensor_name(initializer.name, taken), path, external)
        taken.add(tensor.name)
        tensors.append(tensor)
    size = (file_size(path) if path.is_file() else 0) + sum(external.values())
    return Model(tuple(tensors), Source(NAME, path, size), graph=proto.SerializeToString(deterministic=True))


def _library() -> ModuleType:
    try:
        import onnx
    except ImportError:
        raise MissingDependency("onnx", "onnx") from None
    return onnx


def _parse(data: bytes, path: Path) -> ModelProto:
    onnx = _library()
    from google.protobuf.message import DecodeError

    try:
        proto: ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError:
        raise BadInput("not a readable ONNX model: its bytes are damaged, or not ONNX at all", file=path) from None
    if not proto.graph.node and not proto.graph.initializer:
        raise BadInput("not a readable ONNX model: there is no graph in it", file=path)
    return proto


def _graphs(proto: ModelProto) -> Iterator[tuple[GraphProto | None, Iterable[NodeProto]]]:
    """Every graph and its nodes: the model's own first, then those inside nodes, and the bodies of functions."""
    left: list[tuple[GraphProto | None, Iterable[NodeProto]]] = [(proto.graph, proto.graph.node)]
    left += [(None, function.node) for function in proto.functions]
    for training in proto.training_info:
        left += [(g, g.node) for g in (training.initialization, training.algorithm)]
    while left:
        graph, nodes = left.pop(0)
        yield graph, nodes
        for node in nodes:
            for attribute in node.attribute:
                inner = [attribute.g] if attribute.HasField("g") else []
                left += [(g, g.node) for g in (*inner, *attribute.graphs)]


def _inner_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """All tensors but the initializers of the model's own graph."""
    for graph, nodes in _graphs(proto):
        if graph is not None:
            if graph is not proto.graph:
                yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for node in nodes:
            for attribute in node.attribute:
                yield from ([attribute.t] if attribute.HasField("t") else [])
                yield from attribute.tensors
                one = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
                for sparse in (*one, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)


class _Names:
    """The names a model uses: those of its initializers, checked, and all of them, to find ones that are free."""

    def __init__(self, proto: ModelProto, path: Path):
        try:
            self.initializers = [i.name for i in proto.graph.initializer]
            self.used = set(self._all(proto))
            outputs = {o for node in proto.graph.node for o in node.output}
        except UnicodeDecodeError:
            raise BadInput("not a readable ONNX model: a name in it is not UTF-8", file=path) from None
        seen: set[str] = set()
        for name in (*self.initializers, *(s.values.name for s in proto.graph.sparse_initializer)):
            if name in seen:
                raise BadInput("two initializers have this name", file=path, tensor=name)
            if name in outputs:
                raise BadInput("it is both an initializer and the output of a node", file=path, tensor=name)
            seen.add(name)

    @staticmethod
    def _all(proto: ModelProto) -> Iterator[str]:
        for graph, nodes in _graphs(proto):
            if graph is not None:
                for named in (graph.input, graph.output, graph.value_info, graph.initializer):
                    yield from (item.name for item in named)
                yield from (s.values.name for s in graph.sparse_initializer)
            for node in nodes:
                yield from (node.name, *node.input, *node.output)

    def free(self, name: str) -> str:
        """The name, with a number behind it where it is in use; in use from now on."""
        unused, number = name, 0
        while unused in self.used:
            number += 1
            unused = f"{name}.{number}"
        self.used.add(unused)
        return unused


def _tensor_name(initializer: str, taken: set[str]) -> str:
    """What shrink calls an initializer: exporters begin names with a slash, which is no relative name."""
    if not initializer.startswith("/"):
        return initializer
    name, number = initializer.lstrip("/"), 0
    while name in taken:
        number += 1
        name = f"{initializer.lstrip('/')}.{number}"
    return name


def _take(initializer: TensorProto, name: str, path: Path, external: dict[Path, int]) -> Tensor:
    """Move the values of an initializer into a tensor, and leave the mark that says where they went."""

    def bad(what: str) -> BadInput:
        return BadInput(what, file=path, tensor=initializer.name)

    dtype = _DTYPES[initializer.data_type]
    shape = _shape(initializer, bad)
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    load: Callable[[], Array]
    if _storage(initializer, bad) == "external":
        read_part = _external(initializer, nbytes, path, external, bad)
        load = partial(_load, read_part, dtype, shape)
    elif initializer.HasField("raw_data"):
        raw = initializer.raw_data
        if len(raw) != nbytes:
            raise bad(f"its dims claim {nbytes} bytes of values, {len(raw)} are there")
        load = partial(_load, lambda: raw, dtype, shape)
    else:
        values = _typed(initializer, dtype, count, bad).reshape(shape)
        load = partial(lambda array: array, values)
    _mark(initializer, name)
    return Tensor(name, dtype, shape, load)


def _load(read_bytes: Callable[[], bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    return np.frombuffer(read_bytes(), dtype).reshape(shape)


def _shape(initializer: TensorProto, bad: Callable[[str], BadInput]) -> tuple[int, ...]:
    if len(initializer.dims) > _AT_MOST_DIMS:
        raise bad(f"it has {len(initializer.dims)} dims, more than {_AT_MOST_DIMS}")
    shape = tuple(initializer.dims)
    if any(n < 0 for n in shape):
        raise bad("its dims are not valid: one is negative")
    # An empty tensor may not claim huge dims beside the 0 either: NumPy multiplies those.
    if math.prod(n or 1 for n in shape) >= _AT_MOST_VALUES:
        raise bad("its dims claim more values than a file can hold")
    return shape


def _storage(tensor: TensorProto, bad: Callable[[str], BadInput]) -> str | None:
    """Where the values are: "external", "raw_data", one of the typed fields, or None where there are none."""
    found = [name for name in _ALL_FIELDS if len(getattr(tensor, name))]
    found += ["raw_data"] if tensor.HasField("raw_data") and (tensor.raw_data or not found) else []
    if tensor.data_location == tensor.EXTERNAL:
        found = ["external", *(name for name in found if name != "raw_data" or tensor.raw_data)]
    if tensor.HasField("segment"):
        raise bad("it is a segment of a tensor, which is not supported")
    if len(found) > 1:
        raise bad(f"its values are in two places, {found[0]} and {found[1]}")
    return found[0] if found else None


def _typed(initializer: TensorProto, dtype: np.dtype[Any], count: int, bad: Callable[[str], BadInput]) -> Array:
    field, item = _FIELDS.get(_CODES[initializer.data_type], _OTHER_FIELD)
    stored = getattr(initializer, field)
    if len(stored) != count or _storage(initializer, bad) not in (field, None):
        raise bad(f"its dims claim {count * dtype.itemsize} bytes of values, its {field} holds {len(stored)} of {count}")
    values = np.fromiter(stored, np.dtype(item), count)
    if values.dtype == dtype:
        return values
    # Small integers and the bits of float16 travel in wider ones.
    narrow = np.dtype("<u2") if dtype == DTYPES["F16"] else np.dtype("u1") if dtype == DTYPES["BOOL"] else dtype
    limits = np.iinfo(narrow)
    if count and not (limits.min <= values.min() and values.max() <= limits.max):
        raise bad(f"a number in its {field} does not fit its type")
    return values.astype(narrow).view(dtype)


def _external(
    tensor: TensorProto, nbytes: int | None, path: Path, external: dict[Path, int], bad: Callable[[str], BadInput]
) -> Callable[[], bytes]:
    """A reader of external data. `nbytes` is what the dims claim, None where only the file can tell."""
    try:
        said = {item.key: item.value for item in tensor.external_data}
    except UnicodeDecodeError:
        raise bad("its external data is described in something else than text") from None
    location = said.get("location", "")
    if not location:
        raise bad("its data is external, but no location is given")
    numbers = {}
    for key in ("offset", "length"):
        text = said.get(key, "")
        if text and not re.fullmatch(r"[0-9]{1,18}", text):
            raise bad(f"the {key} of its external data is not a number")
        numbers[key] = int(text) if text else None
    try:
        file = inside(path.parent, location, file=path)
    except BadInput as error:
        raise BadInput(error.message, file=path, tensor=tensor.name, hint=error.hint) from None
    size = file_size(file)
    if not file.is_file():
        raise bad(f"its data is in {location!r}, which is not a file")
    offset = numbers["offset"] or 0
    left = max(0, size - offset)
    length = numbers["length"]
    if length is None:
        length = left if nbytes is None else nbytes
    if nbytes is not None and length != nbytes:
        raise bad(f"its dims claim {nbytes} bytes of values, its external data has {length}")
    if length > left:
        raise bad(f"its external data is outside the file {location!r}, which has {size} bytes")
    external[file] = size
    return section(file, offset, length, tensor=tensor.name)


def _embed(tensors: Iterable[TensorProto], path: Path, external: dict[Path, int]) -> None:
    """Bring the external data of tensors that stay in the graph into it."""
    total = 0
    for tensor in tensors:

        def bad(what: str, tensor: TensorProto = tensor) -> BadInput:
            return BadInput(what, file=path, tensor=tensor.name)

        if tensor.data_location != tensor.EXTERNAL:
            continue
        _storage(tensor, bad)
        shape = _shape(tensor, bad)
        known = _DTYPES.get(tensor.data_type)
        nbytes = math.prod(shape) * known.itemsize if known else None
        read_part = _external(tensor, nbytes, path, external, bad)
        # No type takes more than 16 bytes a value; without a limit one file could be embedded many times over.
        part_bytes = read_part.size  # type: ignore[attr-defined]
        total += part_bytes
        if total > _AT_MOST_BYTES or part_bytes > 16 * math.prod(shape):
            raise bad("its external data is larger than its dims")
        tensor.raw_data = read_part()
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
