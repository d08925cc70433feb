"""What an ONNX model is made of: its graphs, names and tensors, each checked before anything relies on it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, MissingDependency, OutputError
from shrink.files import file_size, inside, section
from shrink.model import Tensor
from shrink.steps import DTYPES

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["AT_MOST_BYTES", "NAMED_DTYPES", "Names", "Reader", "clear", "inner_tensors", "library", "name_of", "parse"]

Array = NDArray[Any]

# The numbers of TensorProto.DataType for the types of the one dtype table.
_CODES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
    13: "U64",
}  # fmt: skip
NAMED_DTYPES = {number: DTYPES[code] for number, code in _CODES.items()}
# Where values are kept that are not raw: the field, and the type its items are read as.
_FIELDS = {
    "F32": ("float_data", "<f4"), "F64": ("double_data", "<f8"), "I64": ("int64_data", "<i8"),
    "U32": ("uint64_data", "<u8"), "U64": ("uint64_data", "<u8"),
}  # fmt: skip
_OTHER_FIELD = ("int32_data", "<i4")
_ALL_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")

# What Protocol Buffers allow in one message.
AT_MOST_BYTES = (1 << 31) - 1
_AT_MOST_DIMS = 32
_AT_MOST_VALUES = 1 << 48


def library() -> ModuleType:
    try:
        import onnx
    except ImportError:
        raise MissingDependency("onnx", "onnx") from None
    return onnx


def parse(data: bytes, path: Path) -> ModelProto:
    onnx = library()
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

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


def inner_tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """All tensors but the dense initializers of the model's own graph, which `_graphs` gives first."""
    for number, (graph, nodes) in enumerate(_graphs(proto)):
        if graph is not None:
            if number > 0:
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


class Names:
    """The names a model uses: those of its initializers, checked, and all of them, to find ones that are free."""

    def __init__(self, proto: ModelProto, path: Path):
        try:
            self.initializers = [i.name for i in proto.graph.initializer]
            self.used = set(self._all(proto))
            # Protocol Buffers give text that is not UTF-8 as bytes, or raise, depending on their version.
            readable = all(isinstance(name, str) for name in self.used)
        except UnicodeDecodeError:
            readable = False
        if not readable:
            raise BadInput("not a readable ONNX model: a name in it is not UTF-8", file=path)
        outputs = {o for node in proto.graph.node for o in node.output}
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


class Reader:
    """Takes data out of the tensors of the model at `path`, each size checked before anything is read."""

    def __init__(self, path: Path):
        self.path = path
        self.external_sizes: dict[Path, int] = {}
        self.embedded_bytes = 0

    def bad(self, tensor: TensorProto, what: str, hint: str = "") -> BadInput:
        return BadInput(what, file=self.path, tensor=name_of(tensor), hint=hint)

    def take(self, initializer: TensorProto, name: str) -> Tensor:
        """Move the values of an initializer into a tensor, and leave the mark that says where they went."""
        dtype = NAMED_DTYPES[initializer.data_type]
        shape = self.shape(initializer)
        nbytes = math.prod(shape) * dtype.itemsize
        storage = self.storage(initializer)
        load: Callable[[], Array]
        if storage == "external":
            file, offset, length = self._external(initializer, nbytes)
            load = partial(_load, section(file, offset, length, tensor=initializer.name), dtype, shape)
        elif storage == "raw_data":
            raw = initializer.raw_data
            if len(raw) != nbytes:
                raise self.bad(initializer, f"its dims claim {nbytes} bytes of values, {len(raw)} are there")
            load = partial(_load, lambda: raw, dtype, shape)
        else:
            values = self._typed(initializer, storage, dtype, shape)
            load = lambda: values  # noqa: E731
        clear(initializer)
        initializer.data_location = initializer.EXTERNAL
        initializer.external_data.add(key="location", value=name)
        return Tensor(name, dtype, shape, load)

    def embed(self, tensor: TensorProto) -> None:
        """Bring external data of a tensor that stays in the graph into it."""
        if self.storage(tensor) != "external":
            return
        count = math.prod(self.shape(tensor))
        known = NAMED_DTYPES.get(tensor.data_type)
        file, offset, length = self._external(tensor, count * known.itemsize if known else None)
        # No type has values of more than 16 bytes. Many tensors may name the same part of one file.
        self.embedded_bytes += length
        if length > 16 * count or self.embedded_bytes > AT_MOST_BYTES:
            raise self.bad(tensor, f"its external data, {length} bytes, is larger than its dims or the graph allow")
        data = section(file, offset, length, tensor=name_of(tensor))()
        clear(tensor)
        tensor.raw_data = data

    def shape(self, tensor: TensorProto) -> tuple[int, ...]:
        if len(tensor.dims) > _AT_MOST_DIMS:
            raise self.bad(tensor, f"it has {len(tensor.dims)} dims, more than {_AT_MOST_DIMS}")
        shape = tuple(tensor.dims)
        if any(n < 0 for n in shape):
            raise self.bad(tensor, "its dims are not valid: one is negative")
        # Beside a 0 no huge dims either: NumPy multiplies all the others.
        if math.prod(n or 1 for n in shape) >= _AT_MOST_VALUES:
            raise self.bad(tensor, "its dims claim more values than a file can hold")
        return shape

    def storage(self, tensor: TensorProto) -> str | None:
        """Where the values are: "external", "raw_data", a typed field, or None where there are none."""
        if tensor.HasField("segment"):
            raise self.bad(tensor, "it is a segment of a tensor, which is not supported")
        found = [field for field in _ALL_FIELDS if len(getattr(tensor, field))]
        if tensor.data_location == tensor.EXTERNAL:
            found.append("external")
        if tensor.raw_data or (tensor.HasField("raw_data") and not found):
            found.append("raw_data")
        if len(found) > 1:
            raise self.bad(tensor, f"its values are in two places, {found[0]} and {found[1]}")
        return found[0] if found else None

    def _typed(self, tensor: TensorProto, storage: str | None, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        field, item = _FIELDS.get(_CODES[tensor.data_type], _OTHER_FIELD)
        stored, count = getattr(tensor, field), math.prod(shape)
        if storage not in (field, None):
            raise self.bad(tensor, f"its values are in {storage}, where its type has none")
        if len(stored) != count:
            raise self.bad(tensor, f"its dims claim {count} values, {len(stored)} are there")
        values: Array = np.fromiter(stored, np.dtype(item), count)
        if values.dtype != dtype:
            # Small integers and the bits of float16 are kept in wider ones.
            narrow = {"F16": DTYPES["U16"], "BOOL": DTYPES["U8"]}.get(_CODES[tensor.data_type], dtype)
            limits = np.iinfo(narrow)
            if count and not (limits.min <= values.min() and values.max() <= limits.max):
                raise self.bad(tensor, f"a number in its {field} does not fit its type")
            values = values.astype(narrow).view(dtype)
        return values.reshape(shape)

    def _external(self, tensor: TensorProto, nbytes: int | None) -> tuple[Path, int, int]:
        """File, offset and length of external data; `nbytes` is what the dims claim, None where that is not known."""
        try:
            said = {item.key: item.value for item in tensor.external_data}
            readable = all(isinstance(text, str) for item in said.items() for text in item)
        except UnicodeDecodeError:
            readable = False
        if not readable:
            raise self.bad(tensor, "the description of its external data is not UTF-8")
        location = said.get("location", "")
        for key in ("offset", "length"):
            if said.get(key) and not re.fullmatch(r"[0-9]{1,18}", said[key]):
                raise self.bad(tensor, f"the {key} of its external data is not a number")
        try:
            file = inside(self.path.parent, location, file=self.path)
            size = self.external_sizes[file] = file_size(file)
        except BadInput as error:
            raise self.bad(tensor, error.message, error.hint) from None
        except OutputError as error:
            what = f"its external data in {location!r}: {error.message}"
            raise OutputError(what, file=self.path, tensor=name_of(tensor)) from error
        if not file.is_file():
            raise self.bad(tensor, f"its external data is in {location!r}, which is not a file")
        offset = int(said.get("offset") or 0)
        left = max(0, size - offset)
        length = int(said["length"]) if said.get("length") else left if nbytes is None else nbytes
        if nbytes is not None and length != nbytes:
            raise self.bad(tensor, f"its dims claim {nbytes} bytes of values, its external data has {length}")
        if length > left:
            raise self.bad(tensor, f"its external data is past the end of {location!r}, which has {size} bytes")
        return file, offset, length


def _load(read_bytes: Callable[[], bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    return np.frombuffer(read_bytes(), dtype).reshape(shape)


def name_of(tensor: TensorProto) -> str:
    try:
        return tensor.name
    except UnicodeDecodeError:
        return "?"


def clear(tensor: TensorProto) -> None:
    for field in (*_ALL_FIELDS, "raw_data", "external_data", "data_location"):
        tensor.ClearField(field)
