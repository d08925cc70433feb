"""An ONNX graph whose weights lie in other files: found, laid out over files of a limited size, and named there.

A weight that lies in several files is cut: its pieces are initializers of their own, which a Concat, in front of all
other nodes, joins under the weight's name. Where its rows, along the first axis, are small, the pieces are rows;
otherwise they are flat, and a Reshape follows. ONNX Runtime folds both once, when it loads.

Weights of inner graphs (If, Loop) become weights of the model's own, which inner ones see: ONNX Runtime Web 1.22 takes
no external data inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from shrink.errors import BoundNotMet
from shrink.formats._onnx_proto import NAMED_DTYPES, Names, Reader, clear, inner_tensors, library, parse
from shrink.split._onnx_wire import Span, lean

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

__all__ = ["Graph", "Piece", "Weight", "arrange"]

# Where values begin in their file: no processor asks for more.
_ALIGNMENT = 64
# A file ends early, by this part of its size, rather than cut a weight; rows larger than this part are cut.
_SNAP = 8
_STEPS = 16

_BFLOAT16, _BFLOAT16_OPSET = 16, 13
# From here on: Reshape takes its shape as an input, initializers need not be inputs as well.
_RESHAPE_OPSET = 5
_IR_VERSION = 4


@dataclass(frozen=True)
class Weight:
    """A tensor that leaves the graph. `values` are bytes of the file, or given where they do not lie there as they are.

    `itemsize` is 0 where the weight cannot be cut.
    """

    name: str
    size_bytes: int
    values: Span | bytes
    itemsize: int
    row_bytes: int


@dataclass(frozen=True)
class Piece:
    """`size_bytes` of a weight, from its byte `start`, at `offset` in a file."""

    weight: int
    start: int
    size_bytes: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def arrange(weights: Sequence[Weight], limit: int) -> list[list[Piece]]:
    """The pieces in each file: the fewest files of at most `limit` bytes, about equally full, with few cuts.

    Raises:
        BoundNotMet: a weight that cannot be cut is over the limit.
    """
    if not weights:
        return []
    whole = max((w for w in weights if not w.itemsize), key=lambda w: w.size_bytes, default=None)
    if whole is not None and whole.size_bytes > limit:
        raise BoundNotMet(
            f"its {whole.size_bytes} bytes are over the limit of {limit}, and values of its type cannot be cut",
            tensor=whole.name,
            hint=f"the smallest limit that works is {whole.size_bytes} bytes",
        )
    fewest = _filled(weights, limit, tidy=False)
    total = sum(_aligned(w.size_bytes) for w in weights)
    least = max(-(-total // len(fewest)), whole.size_bytes if whole else 0)
    for step in range(_STEPS + 1):
        files = _filled(weights, min(limit, least + max(0, limit - least) * step // _STEPS), tidy=True)
        if len(files) == len(fewest):
            return files
    return fewest


def _filled(weights: Sequence[Weight], capacity: int, *, tidy: bool) -> list[list[Piece]]:
    """Files filled one after the other up to `capacity`, which no weight that cannot be cut is over.

    Tidy ones leave a little room rather than cut a row, or a weight near its start.
    """
    files: list[list[Piece]] = [[]]
    for number, weight in enumerate(weights):
        in_rows = tidy and 0 < weight.row_bytes <= capacity // _SNAP
        grain, done = weight.row_bytes if in_rows else weight.itemsize, 0
        while done < weight.size_bytes:
            offset = _aligned(files[-1][-1].end) if files[-1] else 0
            room, left = max(0, capacity - offset), weight.size_bytes - done
            size = left if left <= room else room // grain * grain if grain else 0
            near = tidy and not done and files[-1] and size < min(left, capacity // _SNAP)
            if size and not near:
                files[-1].append(Piece(number, done, size, offset))
                done += size
            if done < weight.size_bytes:
                files.append([])
    return files


@dataclass(frozen=True)
class _Place:
    """Where a weight's tensor stands."""

    graph: GraphProto
    tensor: TensorProto
    # The Constant node whose value it is.
    node: NodeProto | None


class Graph:
    """The model in `data`, without the values of its larger tensors, which are `weights`.

    Raises:
        BadInput: not an ONNX model, or values do not fit their dims.
    """

    def __init__(self, data: mmap | bytes, path: Path, least_bytes: int):
        self.path = path
        self.reader = Reader(path)
        found = lean(data, path, least_bytes)
        self.proto = parse(found.model, path)
        self.names = Names(self.proto, path)
        self.fed = set() if self.proto.ir_version < _IR_VERSION else {i.name for i in self.proto.graph.input}
        versions = [o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")]
        self.opset: int = versions[0] if versions else 0
        everything = (*self.proto.graph.initializer, *inner_tensors(self.proto))
        self.has_external_data = any(t.data_location == t.EXTERNAL for t in everything)
        self.dropped: list[str] = []
        marked: list[tuple[int, _Place]] = []
        for place in _tensors(self.proto.graph):
            number = found.number(place.tensor.raw_data)
            if number is None:
                continue
            if place.node is None or self._is_constant(place):
                marked.append((number, place))
            else:
                place.tensor.raw_data = data[found.spans[number].start : found.spans[number].end]
        typed = [
            tensor
            for tensor in self.proto.graph.initializer
            if found.number(tensor.raw_data) is None and self._is_typed(tensor, least_bytes)
        ]
        marked.sort(key=lambda item: item[0])
        self._tensors = [self._outermost(place) for _, place in marked]
        self.weights = [
            self._weight(tensor, found.spans[number]) for tensor, (number, _) in zip(self._tensors, marked, strict=True)
        ]
        for tensor in typed:
            values = self.reader.take(tensor, tensor.name).array.tobytes()
            self._tensors.append(tensor)
            self.weights.append(self._weight(tensor, values))

    def _is_constant(self, place: _Place) -> bool:
        """Whether the node can become an initializer."""
        node = place.node
        return (
            node is not None
            and node.op_type == "Constant"
            and node.domain in ("", "ai.onnx")
            and len(node.output) == len(node.attribute) == 1
            and node.attribute[0].name == "value"
            and node.output[0] not in {o.name for o in place.graph.output}
            and self.proto.ir_version >= _IR_VERSION
        )

    def _outermost(self, place: _Place) -> TensorProto:
        """The tensor as an initializer of the model's own graph."""
        main = self.proto.graph
        name = place.node.output[0] if place.node else place.tensor.name
        if place.node is None and place.graph is main:
            return place.tensor
        tensor: TensorProto = main.initializer.add()
        tensor.CopyFrom(place.tensor)
        tensor.name = name if place.graph is main else self.names.free(name)
        if place.node is not None:
            place.graph.node.remove(place.node)
        else:
            place.graph.initializer.remove(place.tensor)
        if place.graph is not main:
            _rename(place.graph, name, tensor.name)
            self._declare(tensor)
        return tensor

    def _weight(self, tensor: TensorProto, values: Span | bytes) -> Weight:
        size_bytes = len(values) if isinstance(values, bytes) else values.size_bytes
        shape = self.reader.shape(tensor)
        itemsize = _itemsize(tensor.data_type)
        if itemsize and math.prod(shape) * itemsize != size_bytes:
            claimed = math.prod(shape) * itemsize
            raise self.reader.bad(tensor, f"its dims claim {claimed} bytes of values, {size_bytes} are there")
        if not self.opset or (tensor.data_type == _BFLOAT16 and self.opset < _BFLOAT16_OPSET):
            itemsize = 0
        return Weight(tensor.name, size_bytes, values, itemsize, math.prod(shape[1:]) * itemsize)

    def _is_typed(self, tensor: TensorProto, least_bytes: int) -> bool:
        """Whether its values are numbers of varying length, or otherwise not as external data has them."""
        dtype = NAMED_DTYPES.get(tensor.data_type)
        if dtype is None or self.reader.storage(tensor) in (None, "raw_data", "external"):
            return False
        return math.prod(self.reader.shape(tensor)) * dtype.itemsize >= least_bytes

    def keep_whole(self, limit: int) -> list[Weight]:
        """The weights, of which those that a user may feed instead are cut only where they must be."""
        return [
            Weight(w.name, w.size_bytes, w.values, 0, 0) if w.name in self.fed and w.size_bytes <= limit else w
            for w in self.weights
        ]

    def with_data_in(self, files: Sequence[tuple[str, Sequence[Piece]]]) -> bytes:
        """The model with its weights in these files. The graph is used up by it."""
        pieces: list[list[tuple[str, Piece]]] = [[] for _ in self.weights]
        for file, content in files:
            for piece in content:
                pieces[piece.weight].append((file, piece))
        joins: list[NodeProto] = []
        for weight, tensor, lies_in in zip(self.weights, self._tensors, pieces, strict=True):
            clear(tensor)
            if len(lies_in) == 1:
                _refer(tensor, *lies_in[0])
            else:
                joins += self._cut(weight, tensor, lies_in)
        kept = list(self.proto.graph.node)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend([*joins, *kept])
        data: bytes = self.proto.SerializeToString(deterministic=True)
        return data

    def _cut(self, weight: Weight, whole: TensorProto, pieces: Sequence[tuple[str, Piece]]) -> Iterator[NodeProto]:
        helper, graph = library().helper, self.proto.graph
        shape, data_type = tuple(whole.dims), whole.data_type
        graph.initializer.remove(whole)
        for item in [i for i in graph.input if i.name == weight.name]:
            graph.input.remove(item)
            if weight.name in self.fed:
                self.dropped.append(weight.name)
        in_rows = all(piece.size_bytes % weight.row_bytes == 0 for _, piece in pieces)
        parts: list[str] = []
        for file, piece in pieces:
            count = piece.size_bytes // (weight.row_bytes if in_rows else weight.itemsize)
            tensor = graph.initializer.add()
            tensor.name = self.names.free(f"{weight.name}/piece{len(parts) + 1}")
            tensor.data_type = data_type
            tensor.dims.extend([count, *shape[1:]] if in_rows else [count])
            _refer(tensor, file, piece)
            self._declare(tensor)
            parts.append(tensor.name)
        joined = weight.name if in_rows else self.names.free(f"{weight.name}/flat")
        yield helper.make_node("Concat", parts, [joined], self.names.free(f"{weight.name}/join"), axis=0)
        if in_rows:
            return
        reshape = self.names.free(f"{weight.name}/reshape")
        if self.opset < _RESHAPE_OPSET:
            yield helper.make_node("Reshape", [joined], [weight.name], reshape, shape=shape)
            return
        dims = graph.initializer.add()
        dims.CopyFrom(
            helper.make_tensor(self.names.free(f"{weight.name}/shape"), dims.INT64, [len(shape)], list(shape))
        )
        self._declare(dims)
        yield helper.make_node("Reshape", [joined, dims.name], [weight.name], reshape)

    def _declare(self, tensor: TensorProto) -> None:
        if self.proto.ir_version < _IR_VERSION:
            make = library().helper.make_tensor_value_info
            self.proto.graph.input.append(make(tensor.name, tensor.data_type, list(tensor.dims)))


def _tensors(graph: GraphProto) -> Iterator[_Place]:
    """The initializers of a graph and of those inside its nodes, and the tensors that nodes hold."""
    for tensor in graph.initializer:
        yield _Place(graph, tensor, None)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield _Place(graph, attribute.t, node)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _rename(graph: GraphProto, name: str, new: str) -> None:
    """Let the nodes of an inner graph, and those further inside, use another name."""
    for node in graph.node:
        for number, used in enumerate(node.input):
            if used == name:
                node.input[number] = new
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, name, new)
    for output in graph.output:
        if output.name == name:
            graph.node.append(library().helper.make_node("Identity", [new], [name]))


def _itemsize(data_type: int) -> int:
    """Bytes of one value; 0 for types that Concat does not take."""
    if data_type == _BFLOAT16:
        return 2
    dtype = NAMED_DTYPES.get(data_type)
    return 0 if dtype is None else dtype.itemsize


def _refer(tensor: TensorProto, file: str, piece: Piece) -> None:
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", file), ("offset", piece.offset), ("length", piece.size_bytes)):
        tensor.external_data.add(key=key, value=str(value))
