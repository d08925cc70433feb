"""Running parts of a network on ONNX Runtime: from any values that are known to those that are wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate.layers import Layer, exposed, graphs_of, used_in
from shrink.errors import BadInput, MissingDependency, printable
from shrink.export import Network
from shrink.formats._onnx_proto import NAMED_DTYPES, Reader, clear, parse

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

__all__ = ["Graph", "Program"]

Array = NDArray[Any]
Values = Mapping[str, Array]

_NUMBERS = {dtype: number for number, dtype in NAMED_DTYPES.items()}
# Numbers such as the scales of a Resize stay in the graph, where ONNX Runtime looks for them.
_FEW = 8


class Graph:
    """The network's graph, with sizes of inputs fixed, and its weights, which may be replaced one by one.

    Raises:
        BadInput: graph and weights do not fit together.
        MissingDependency: onnx is not installed.
    """

    def __init__(self, network: Network, layers: Sequence[Layer]):
        model = network.model
        self.file = model.source.path
        self.proto: ModelProto = exposed(parse(model.graph or b"", self.file), layers)
        initializers = {slot.name for slot in self.proto.graph.initializer}
        self.inputs = [info for info in self.proto.graph.input if info.name not in initializers]
        for info, shape in zip(self.inputs, network.input_shapes, strict=True):
            dims = info.type.tensor_type.shape.dim
            for dim, n in zip(dims, shape, strict=False):
                dim.dim_value = n
        self.put_out = [output.name for output in parse(model.graph or b"", self.file).graph.output]
        """All that the graph puts out, be they inputs or weights as they are."""
        # Any value can be asked for by its name; as outputs, only the graph's own count.
        del self.proto.graph.output[len(self.put_out) :]
        made = {name for node in self.proto.graph.node for name in node.output}
        for number, output in reversed(list(enumerate(self.proto.graph.output))):
            # An input or a weight that is put out as it is tells nothing about the network.
            if output.name not in made:
                del self.proto.graph.output[number]
        self.outputs = [output.name for output in self.proto.graph.output]
        entries = {entry.name: entry for entry in model.tensors}
        reader = Reader(self.file)
        self._slots: dict[str, TensorProto] = {}
        self._initializer_of: dict[str, str] = {}
        self.weights: dict[str, Array] = {}
        """The current values by the name of the tensor, in the type that the graph has for them."""
        for slot in self.proto.graph.initializer:
            self._slots[slot.name] = slot
            if reader.storage(slot) != "external" or not slot.external_data:
                continue
            name = slot.external_data[0].value
            if name not in entries:
                raise BadInput("the graph needs it, but the model does not have it", file=self.file, tensor=name)
            self._initializer_of[slot.name] = name
            self._put(name, entries[name].array, slot)
        self._of_tensor = {tensor: slot for slot, tensor in self._initializer_of.items()}
        self._nodes = list(self.proto.graph.node)
        self._reads = [_inputs_of(node) for node in self._nodes]
        self._maker = {name: number for number, node in enumerate(self._nodes) for name in node.output if name}

    def put(self, tensor: str, values: Array) -> None:
        """Go on with other values for a weight."""
        self._put(tensor, values, self._slots[self._of_tensor[tensor]])

    def has(self, tensor: str) -> bool:
        """Whether the graph uses this tensor of the model."""
        return tensor in self._of_tensor

    def tensor_of(self, value: str) -> str | None:
        """The tensor of the model that the graph has under this name."""
        return self._initializer_of.get(value)

    def _put(self, tensor: str, values: Array, slot: TensorProto) -> None:
        if values.size != math.prod(slot.dims):
            raise BadInput(f"its shape is {list(values.shape)}, the graph's is {list(slot.dims)}", tensor=tensor)
        with np.errstate(over="ignore"):
            typed = values.astype(NAMED_DTYPES[slot.data_type], copy=False)
        self.weights[tensor] = np.ascontiguousarray(typed).reshape(tuple(slot.dims))

    def program(self, known: Mapping[str, np.dtype[Any]], wanted: Sequence[str]) -> Program:
        """What computes the wanted values from known ones (their types by name), and from nothing else.

        Raises:
            BadInput: they do not suffice, or ONNX Runtime does not take it.
        """
        needed: set[int] = set()
        given: set[str] = set()
        left = [name for name in wanted if name not in known]
        while left:
            name = left.pop()
            if not name or name in self._slots or name in given:
                continue
            if name in known:
                given.add(name)
            elif name in self._maker:
                if self._maker[name] not in needed:
                    needed.add(self._maker[name])
                    left += self._reads[self._maker[name]]
            else:
                raise BadInput(f"nothing in the graph makes the value {printable(name)}", file=self.file)
        proto = type(self.proto)()
        proto.CopyFrom(_without_graph(self.proto))
        graph = proto.graph
        graph.name = self.proto.graph.name
        nodes = [self._nodes[number] for number in sorted(needed)]
        graph.node.extend(nodes)
        for name in sorted(given):
            graph.input.add(name=name).type.tensor_type.elem_type = _NUMBERS[known[name]]
        made = [name for name in wanted if name not in known]
        for name in made:
            graph.output.add(name=name)
        used = {name for number in needed for name in self._reads[number]} | set(made)
        slots = [slot for name, slot in self._slots.items() if name in used]
        return Program(proto, slots, self.weights_of, made, self.file)

    def whole(self, proto: ModelProto, wanted: Sequence[str]) -> Program:
        """A program of another graph over the same weights, such as that of the gradients."""
        other = type(proto)()
        other.CopyFrom(proto)
        used = {name for node in other.graph.node for name in _inputs_of(node)} | set(wanted)
        # ONNX Runtime does not take values for those that nothing uses.
        slots = [slot for slot in other.graph.initializer if slot.name in used]
        other.graph.ClearField("initializer")
        del other.graph.output[:]
        for name in wanted:
            other.graph.output.add(name=name)
        return Program(other, slots, self.weights_of, list(wanted), self.file)

    def weights_of(self, slot: TensorProto) -> Array | None:
        """The current values of an initializer; None where the graph holds them itself."""
        return self.weights.get(self._initializer_of.get(slot.name, ""))


class Program:
    """A session on the CPU. `run` wants what the graph's inputs say, and ignores other values."""

    def __init__(self, proto: ModelProto, slots: Iterable[TensorProto], weights_of: Any, wanted: list[str], file: Any):
        try:
            import onnxruntime  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise MissingDependency("onnxruntime", "calibrate") from None
        self._file, self._wanted = file, wanted
        # ONNX Runtime reads these whenever it likes.
        self._held: list[Any] = []
        names, values = [], []
        for slot in slots:
            array = weights_of(slot)
            made = proto.graph.initializer.add()
            made.CopyFrom(slot)
            if array is None:
                continue
            if array.dtype.kind != "f" or array.size <= _FEW:
                clear(made)
                made.raw_data = array.tobytes()
                continue
            self._held.append(array)
            names.append(slot.name)
            values.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        self._held.append(values)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # What one run needs goes back to the system after it: the widest layers want that room.
        options.enable_cpu_mem_arena = False
        # Threads that wait busily for the next run take time from the matrix products between runs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if names:
            options.add_external_initializers(names, values)
        self._session: Any = None
        if not wanted:
            return
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BadInput(f"ONNX Runtime does not take the network: {_said(error)}", file=file) from error
        self._inputs = [info.name for info in self._session.get_inputs()]

    def run(self, values: Values) -> dict[str, Array]:
        """The wanted values that were not known. Raises BadInput."""
        if self._session is None:
            return {}
        try:
            found = self._session.run(self._wanted, {name: np.asarray(values[name]) for name in self._inputs})
        except Exception as error:
            raise BadInput(f"ONNX Runtime does not run the network: {_said(error)}", file=self._file) from error
        return dict(zip(self._wanted, map(np.asarray, found), strict=True))


def _inputs_of(node: NodeProto) -> list[str]:
    """What a node reads, also in the graphs inside it."""
    return [*node.input, *(name for inner in graphs_of(node) for name in used_in(inner))]


def _without_graph(proto: ModelProto) -> ModelProto:
    head = type(proto)()
    for field, value in proto.ListFields():
        if field.name == "graph":
            continue
        if field.is_repeated:
            getattr(head, field.name).extend(value)
        elif field.message_type is not None:
            getattr(head, field.name).CopyFrom(value)
        else:
            setattr(head, field.name, value)
    return head


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__, at_most=300)
