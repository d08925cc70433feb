"""Which weights of an ONNX graph are linear maps: as matrices, and where their inputs can be seen.

At every position of a layer, outputs = matrix @ inputs, per group, then the bias. Dense and recurrent layers have
their own matrices; a convolution has one of patches. A transposed convolution of stride s writes, at each position, a
block of s pixels per axis (its phases), all from the same patch of inputs: pixel p of its full output is phase p mod s
of block p // s, and what kernel index k brings there comes from the input pixel (k · dilation) // s before it. The
blocks cover the full output; `pads` cut some pixels off its edges, which count here as the others do.

Two things are not exact. The gate of a GRU's new state sees its old state times the reset gate, unless
linear_before_reset is set; here it is the old state. Sequences shorter than the others of their batch count in full.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate._linear import LINEAR, RECURRENT, BiasSlot, Call, Found, Kind
from shrink.calibrate._positions import Reads, States
from shrink.calibrate._views import Reshape, Step, Transpose, forward, joined
from shrink.errors import BadInput, UsageError, blaming
from shrink.formats._onnx_proto import NAMED_DTYPES, Names, Reader, library, parse
from shrink.model import Entry, Model

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

__all__ = ["Layer", "Use", "exposed", "graphs_of", "is_standard", "layers", "naming", "used_in"]

F32 = NDArray[np.float32]

# A matrix of second moments of all inputs has at most this many values, 1 GiB of them.
_MOMENTS_AT_MOST = 1 << 28
_DOMAINS = ("", "ai.onnx")
_RANDOM = ("Bernoulli", "Multinomial", "Dropout")
_STEPS_AT_MOST = 32


@dataclass(frozen=True)
class Use:
    """One node that applies the weight: the values that go in and come out, and how a row of inputs is read from them.

    `initial` is the value of a recurrent layer's initial states, "" where they are zeros. `node` is the node's number.
    """

    input: str
    output: str
    node: int
    reads: Reads = field(repr=False)
    initial: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.input, self.initial) if self.initial else (self.input,)


@dataclass(frozen=True)
class Layer:
    """One weight tensor as a linear map: at every position, outputs = matrix @ inputs, per group.

    `tensor` and `bias` are names of the model's tensors. A bias is that of the node, or of an Add right behind it, and
    None where there is none that is the layer's own. `output` is the value behind the node, without the bias of an
    Add, before any activation; for a recurrent layer it is all its states, Y. `shared` says that the graph uses the
    tensor elsewhere as well; `uses` are those that apply the same matrix. `diagonal` layers, embeddings and those
    with too many inputs, have a covariance of which only the diagonal is known.
    """

    tensor: str
    kind: Kind
    shape: tuple[int, ...]
    groups: int
    outputs: int
    inputs: int
    uses: tuple[Use, ...]
    bias: str | None
    shared: bool
    steps: tuple[Step, ...] = field(repr=False)
    bias_slot: BiasSlot = field(repr=False)

    @property
    def input(self) -> str:
        return self.uses[0].input

    @property
    def output(self) -> str:
        return self.uses[0].output

    @property
    def needs(self) -> tuple[str, ...]:
        """The values that `Covariance.collect` reads, in no particular order."""
        return tuple(dict.fromkeys(name for use in self.uses for name in use.needs))

    @property
    def diagonal(self) -> bool:
        return self.kind == "embedding" or self.groups * self.inputs**2 > _MOMENTS_AT_MOST

    def matrix(self, w: F32) -> F32:
        """The tensor's values as (groups, outputs, inputs), C order. Raises BadInput if it has another shape."""
        if w.shape != self.shape:
            raise BadInput(f"its shape is {list(w.shape)}, not {list(self.shape)}", tensor=self.tensor)
        laid: F32 = np.ascontiguousarray(forward(self.steps, w))
        return laid

    def weight(self, matrix: F32) -> F32:
        """The inverse: the tensor's values out of a matrix. What the matrix has besides, `extra` says where, is lost.

        Raises:
            BadInput: it is not (groups, outputs, inputs).
        """
        if matrix.shape != (self.groups, self.outputs, self.inputs):
            raise BadInput(f"{list(matrix.shape)} is not the shape of its matrix", tensor=self.tensor)
        for step in reversed(self.steps):
            matrix = step.undo(matrix)
        return np.ascontiguousarray(matrix)

    def extra(self) -> NDArray[np.bool_]:
        """Where the matrix holds no weight, (groups, outputs, inputs): there it is 0 and has to stay so.

        Only a transposed convolution has such places, where its stride does not divide its kernel.
        """
        there: NDArray[np.bool_] = forward(self.steps, np.ones(self.shape, np.bool_))
        return ~there

    def bias_rows(self) -> NDArray[np.int64]:
        """For each row of the matrix the number of its value in the flat bias, (groups, outputs).

        For a convolution, transposed or not, that is its output channel, whether there is a bias or not.
        """
        slot = self.bias_slot
        rows = np.arange(self.outputs) // slot.rows_per_value
        return slot.start + np.arange(self.groups)[:, None] * slot.per_group + rows


def layers(model: Model) -> list[Layer]:
    """The layers of the model, in the order in which its graph computes them.

    A tensor that several nodes use gives one layer, that of the first which is not a mere look-up. Weights are found
    through Identity, Transpose, Reshape to constant dims and Cast from one float to another.

    Raises:
        UsageError: the model has no graph.
        BadInput: graph and tensors do not fit together.
        MissingDependency: onnx is not installed.
    """
    if model.graph is None:
        raise UsageError("its layers cannot be told without a graph", file=model.source.path)
    with blaming(model.source.path):
        return _Finder(model, model.graph).layers()


def exposed(proto: ModelProto, layers: Iterable[Layer]) -> ModelProto:
    """A copy of the model the layers were found in that puts out, besides its outputs, all that the layers need.

    Raises:
        BadInput: a layer's node is not there, or a value that it needs.
    """
    onnx = library()
    made: ModelProto = onnx.ModelProto()
    made.CopyFrom(proto)
    nodes = made.graph.node
    wanted: dict[str, None] = {}
    for layer in layers:
        for use in layer.uses:
            if isinstance(use.reads, States):
                _name_states(nodes, use, layer)
            wanted.update(dict.fromkeys(use.needs))
    known = {item.name: item for item in (*made.graph.input, *made.graph.value_info)}
    known.update((item.name, item) for item in _inferred(made))
    held = {item.name: item for item in made.graph.initializer}
    made_by_node = {name for node in nodes for name in node.output}
    outputs = {item.name for item in made.graph.output}
    for name in wanted:
        if name in outputs:
            continue
        if name not in known and name not in held and name not in made_by_node:
            raise BadInput(f"the graph does not have the value {name!r}")
        output = made.graph.output.add(name=name)
        # Only the type: dims that were inferred for one batch may be wrong for another.
        if name in held:
            output.type.tensor_type.elem_type = held[name].data_type
        elif name in known:
            output.type.tensor_type.elem_type = known[name].type.tensor_type.elem_type
    return made


def _name_states(nodes: Sequence[NodeProto], use: Use, layer: Layer) -> None:
    """Give the first output of a recurrent node, all its states, the name it was found under."""
    node = nodes[use.node] if use.node < len(nodes) else None
    named = node.output[0] if node and node.output else ""
    if node is None or node.op_type not in RECURRENT or named not in ("", use.input):
        raise BadInput("the graph is not the one in which it was found", tensor=layer.tensor)
    if not node.output:
        node.output.append(use.input)
    node.output[0] = use.input


def _inferred(proto: ModelProto) -> list[Any]:
    """What the library finds out about the graph's values: nothing, where an operator is unknown to it."""
    onnx = library()
    try:
        return list(onnx.shape_inference.infer_shapes(proto).graph.value_info)
    except Exception:
        # Its errors have no common class, and ONNX Runtime infers for itself.
        return []


@dataclass(frozen=True)
class _Place:
    """A value that is nothing but a weight laid out anew, behind the node of that number."""

    value: str
    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    node: int


class _Finder:
    def __init__(self, model: Model, graph: bytes):
        proto = parse(graph, model.source.path)
        self._names = Names(proto, model.source.path)
        self._reader = Reader(model.source.path)
        self._graph = proto.graph
        self._nodes = list(proto.graph.node)
        if not _readable(self._nodes):
            raise BadInput("not a readable ONNX model: the type of a node in it is not UTF-8")
        entries = {entry.name: entry for entry in model.tensors}
        self._entries: dict[str, Entry] = {}
        for slot in proto.graph.initializer:
            if self._reader.storage(slot) != "external" or not slot.external_data:
                continue
            entry = entries.get(slot.external_data[0].value)
            if entry is None:
                raise BadInput("the graph needs it, but the model does not have it", tensor=slot.name)
            shape = self._reader.shape(slot)
            if entry.shape != shape:
                raise BadInput(f"its shape is {list(entry.shape)}, the graph's is {list(shape)}", tensor=entry.name)
            self._entries[slot.name] = entry
        self._consumers: dict[str, list[tuple[int, int]]] = {}
        for number, node in enumerate(self._nodes):
            for place, name in enumerate(node.input):
                self._consumers.setdefault(name, []).append((number, place))
        # Uses from the outside and from graphs inside nodes.
        self._others = Counter(item.name for item in proto.graph.output)
        for node in self._nodes:
            for inner in graphs_of(node):
                self._others.update(used_in(inner))
        self._constant = self._constants()
        # Names given to the states of recurrent nodes that have none, by node.
        self._states: dict[int, str] = {}

    def layers(self) -> list[Layer]:
        found: list[tuple[tuple[int, int], Layer]] = []
        for slot in self._graph.initializer:
            entry = self._entries.get(slot.name)
            if entry is None or entry.dtype.kind != "f" or len(entry.shape) < 2 or 0 in entry.shape:
                continue
            with naming(entry.name):
                found += self._layer(entry, slot.name)
        return [layer for _, layer in sorted(found, key=lambda item: item[0])]

    def _layer(self, entry: Entry, name: str) -> Iterator[tuple[tuple[int, int], Layer]]:
        """The layer that a weight is, and which node and input of it comes first; or nothing."""
        linear, others = self._uses(entry, name)
        if not linear:
            return
        linear.sort(key=lambda item: (item[1].kind == "embedding", item[0]))
        place, first = linear[0]
        same = sorted(
            (item for item in linear if (item[1].kind, item[1].steps) == (first.kind, first.steps)),
            key=lambda item: item[0],
        )
        biases = {self._bias(number, found, same) for (number, _), found in same}
        groups, outputs, inputs = first.matrix
        yield (
            place,
            Layer(
                entry.name,
                first.kind,
                entry.shape,
                groups,
                outputs,
                inputs,
                tuple(self._use(number, found) for (number, _), found in same),
                biases.pop() if len(biases) == 1 else None,
                len(linear) + others > 1,
                first.steps,
                first.bias_slot,
            ),
        )

    def _uses(self, entry: Entry, name: str) -> tuple[list[tuple[tuple[int, int], Found]], int]:
        """Where a weight is applied, by node and input, and how often it is used in other ways."""
        found: list[tuple[tuple[int, int], Found]] = []
        others, left = 0, [_Place(name, (), entry.shape, -1)]
        while left:
            place = left.pop()
            others += self._others[place.value]
            for number, slot in self._consumers.get(place.value, ()):
                node = self._nodes[number]
                further = self._laid_out(place, number, slot)
                if further is not None:
                    left.append(further)
                    continue
                rule = LINEAR.get(node.op_type) if is_standard(node) else None
                linear = rule(Call(node, slot, place.shape)) if rule else None
                if linear is None or linear.input in self._constant:
                    others += 1
                else:
                    steps = joined((*place.steps, *linear.steps))
                    found.append(((number, slot), replace(linear, steps=steps)))
        return found, others

    def _laid_out(self, place: _Place, number: int, slot: int) -> _Place | None:
        """The output of a node that does no more than lay its input out anew."""
        node = self._nodes[number]
        ours = is_standard(node) and slot == 0 and number > place.node and len(place.steps) < _STEPS_AT_MOST
        if not ours or len(node.output) != 1 or not node.output[0]:
            return None
        call, shape = Call(node, slot, place.shape), place.shape
        step: tuple[Step, ...] = ()
        if node.op_type == "Transpose":
            axes = len(shape)
            order = call.ints("perm", axes, 0) if node.attribute else tuple(reversed(range(axes)))
            if sorted(order) != list(range(axes)):
                raise call.bad(f"perm is {list(order)}")
            step, shape = (Transpose(order),), tuple(shape[axis] for axis in order)
        elif node.op_type == "Reshape":
            dims = self._dims(call)
            if dims is None:
                return None
            step, shape = (Reshape(shape, dims),), dims
        elif node.op_type == "Cast":
            if NAMED_DTYPES.get(call.whole("to", 0), np.dtype(bool)).kind != "f":
                return None
        elif node.op_type != "Identity":
            return None
        return _Place(node.output[0], joined((*place.steps, *step)), shape, number)

    def _dims(self, call: Call) -> tuple[int, ...] | None:
        """What a Reshape makes of its input, where its dims are constant."""
        entry = self._entries.get(call.input(1))
        if entry is None or entry.dtype.kind != "i" or len(entry.shape) != 1 or entry.size > len(call.shape) + 8:
            return None
        keeps = call.whole("allowzero", 0) == 0
        given = [int(n) for n in entry.array]
        dims = [call.shape[i] if n == 0 and keeps and i < len(call.shape) else n for i, n in enumerate(given)]
        size, known = math.prod(call.shape), math.prod(n for n in dims if n != -1)
        if dims.count(-1) == 1 and known > 0:
            dims[dims.index(-1)] = size // known
        if min(dims, default=1) < 1 or math.prod(dims) != size:
            raise call.bad(f"it cannot give {list(call.shape)} the shape {given}")
        return tuple(dims)

    def _use(self, number: int, found: Found) -> Use:
        node = self._nodes[number]
        output = node.output[0] if node.output else ""
        if found.kind == "recurrent":
            if not output and number not in self._states:
                named = next((name for name in node.output if name), "recurrent")
                self._states[number] = self._names.free(f"{named}.states")
            output = output or self._states[number]
        value = output if isinstance(found.reads, States) else found.input
        if not value or not output:
            raise Call(node, 0, ()).bad("it has no input or no output")
        return Use(value, output, number, found.reads, found.initial)

    def _bias(self, number: int, found: Found, uses: Sequence[tuple[tuple[int, int], Found]]) -> str | None:
        """The tensor that is added to what the node puts out, and to nothing but what the layer does."""
        node = self._nodes[number]
        name, shape = Call(node, 0, ()).input(found.bias) if found.bias else "", found.bias_shape
        if not name and found.added:
            name, shape = self._added(node), (*shape, *[1] * found.positions)
        entry = self._entries.get(name)
        if entry is None or entry.dtype.kind != "f" or self._others[name]:
            return None
        alone = len(self._consumers.get(name, ())) == len({number for (number, _), _ in uses})
        return entry.name if alone and _without_ones(entry.shape) == _without_ones(shape) else None

    def _added(self, node: NodeProto) -> str:
        """What an Add behind a node adds, where nothing else uses the node's output."""
        output = node.output[0] if node.output else ""
        users = self._consumers.get(output, ())
        if not output or len(users) != 1 or self._others[output]:
            return ""
        add = self._nodes[users[0][0]]
        if add.op_type != "Add" or not is_standard(add) or len(add.input) != 2:
            return ""
        return str(add.input[1 - users[0][1]])

    def _constants(self) -> set[str]:
        """All values that are the same whatever goes into the model."""
        constant = {item.name for item in self._graph.initializer}
        constant.update(item.values.name for item in self._graph.sparse_initializer)
        for node in self._nodes:
            given = [name for name in node.input if name]
            random = node.op_type.startswith("Random") or node.op_type in _RANDOM
            if node.op_type == "Constant" or (given and constant.issuperset(given) and not random):
                constant.update(name for name in node.output if name)
        return constant


@contextlib.contextmanager
def naming(tensor: str) -> Iterator[None]:
    """Errors that do not know their tensor get this one."""
    try:
        yield
    except BadInput as error:
        error.tensor = error.tensor or tensor
        raise


def _readable(nodes: Iterable[NodeProto]) -> bool:
    """Whether what nodes and attributes are called is text: Protocol Buffers give bytes, or raise, where it is not."""
    try:
        names = [text for node in nodes for text in (node.op_type, node.domain, *(a.name for a in node.attribute))]
    except UnicodeDecodeError:
        return False
    return all(isinstance(name, str) for name in names)


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its leading ones, which broadcasting minds as little."""
    first = next((axis for axis, n in enumerate(shape) if n != 1), len(shape))
    return tuple(shape[first:])


def is_standard(node: NodeProto) -> bool:
    """Whether the node's operator is ONNX's own."""
    return node.domain in _DOMAINS


def graphs_of(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def used_in(graph: GraphProto) -> Iterator[str]:
    """The names from outside that the nodes and outputs of an inner graph use, and those of graphs inside it."""
    left, used, own = [graph], dict[str, int](), set[str]()
    while left:
        inner = left.pop()
        own.update(item.name for item in (*inner.input, *inner.initializer))
        used.update((item.name, 0) for item in inner.output)
        for node in inner.node:
            own.update(node.output)
            used.update(dict.fromkeys(node.input, 0))
            left += graphs_of(node)
    return iter([name for name in used if name and name not in own])
