"""What can be known of the values of an ONNX graph without its weights and without running it."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate._gradient_tape import Dim, Facts, Shape

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

__all__ = ["known_facts"]

Array = NDArray[Any]

# Constants of at most so many values are looked at: shapes, axes, pads, bounds.
_SMALL = 1 << 12
# How shapes are computed in graphs; none gives much more than it takes.
_FOLDED = frozenset(
    ("Add", "And", "Cast", "Ceil", "Concat", "Div", "Equal", "Floor", "Gather", "Identity", "Max", "Min", "Mul",
     "Neg", "Not", "ReduceProd", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where")
)  # fmt: skip
# Shapes that depend on shapes that depend on shapes: each round knows one more.
_ROUNDS = 256


def known_facts(proto: ModelProto) -> Facts:
    """Types and shapes as ONNX infers them, as far as that goes, and the small constants.

    From sizes that are known follow constants, from which follow more sizes. ONNX itself does that from opset 13 on.
    """
    lean = _lean(proto)
    constants = _constants(proto)
    facts = _inferred(proto, lean, constants)
    if not any(node.op_type in ("Shape", "Size") for node in proto.graph.node):
        return facts
    for _ in range(_ROUNDS):
        more = _folded(proto, facts)
        if not more:
            break
        constants |= more
        made = set(more)
        left = [n for n in lean.graph.node if len(n.output) != 1 or n.output[0] not in made]
        kept = [_copied(n) for n in left]
        del lean.graph.node[:]
        lean.graph.node.extend(kept)
        lean.graph.initializer.extend(_tensor(name, array) for name, array in more.items())
        facts = _inferred(proto, lean, constants)
    return facts


def _copied(node: NodeProto) -> NodeProto:
    copy = type(node)()
    copy.CopyFrom(node)
    return copy


def _tensor(name: str, array: Array) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)


def _constants(proto: ModelProto) -> dict[str, Array]:
    from onnx import numpy_helper

    constants: dict[str, Array] = {}
    for tensor in proto.graph.initializer:
        held = tensor.data_location != tensor.EXTERNAL
        if held and math.prod(tensor.dims) <= _SMALL:
            with contextlib.suppress(Exception):
                constants[tensor.name] = numpy_helper.to_array(tensor)
    for node in proto.graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and node.output:
            with contextlib.suppress(Exception):
                array = _constant(node)
                if array is not None:
                    constants[node.output[0]] = array
        elif node.op_type == "Identity" and node.input and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    return constants


def _constant(node: NodeProto) -> Array | None:
    from onnx import numpy_helper

    value = node.attribute[0]
    if value.name == "value" and value.t.data_location != value.t.EXTERNAL and math.prod(value.t.dims) <= _SMALL:
        return numpy_helper.to_array(value.t)
    if value.name in ("value_int", "value_ints"):
        return np.asarray(value.i if value.name == "value_int" else list(value.ints), np.int64)
    if value.name in ("value_float", "value_floats"):
        return np.asarray(value.f if value.name == "value_float" else list(value.floats), np.float32)
    return None


def _folded(proto: ModelProto, facts: Facts) -> dict[str, Array]:
    """The constants that follow from those known and from known shapes."""
    found: dict[str, Array] = {}
    for node in proto.graph.node:
        if len(node.output) != 1 or node.output[0] in facts.constants or node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in ("Shape", "Size") and node.input:
            dims = [d for d in facts.shapes.get(node.input[0], (None,)) if isinstance(d, int)]
            whole = len(dims) == len(facts.shapes.get(node.input[0], (None,)))
            if whole and node.op_type == "Size":
                found[node.output[0]] = np.asarray(math.prod(dims), np.int64)
            elif whole:
                bounds = {a.name: a.i for a in node.attribute}
                found[node.output[0]] = np.asarray(dims[bounds.get("start", 0) : bounds.get("end")], np.int64)
        elif node.op_type in _FOLDED and not any(a.HasField("g") for a in node.attribute):
            given = {name: found.get(name, facts.constants.get(name)) for name in node.input if name}
            # Vectors at most, so that no broadcasting makes much of little.
            vectors = {name: array for name, array in given.items() if array is not None and array.ndim <= 1}
            if len(vectors) == len(given):
                with contextlib.suppress(Exception):
                    found[node.output[0]] = _run(proto, node, vectors)
    return {name: array for name, array in found.items() if array.size <= _SMALL}


def _run(proto: ModelProto, node: NodeProto, given: dict[str, Array]) -> Array:
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()
    ]
    graph = helper.make_graph([node], "node", infos, [helper.make_empty_tensor_value_info(node.output[0])])
    model = helper.make_model(graph, opset_imports=list(proto.opset_import))
    (found,) = list(ReferenceEvaluator(model).run(None, given))
    return np.asarray(found)


def _lean(proto: ModelProto) -> ModelProto:
    """A copy without larger weights, whose unnamed dims get names."""
    import onnx

    lean = onnx.ModelProto(ir_version=max(proto.ir_version, 4))
    lean.opset_import.extend(proto.opset_import)
    lean.functions.extend(proto.functions)
    lean.graph.name = proto.graph.name
    lean.graph.node.extend(proto.graph.node)
    lean.graph.value_info.extend(proto.graph.value_info)
    lean.graph.output.extend(proto.graph.output)
    lean.graph.input.extend(proto.graph.input)
    fed = {i.name for i in proto.graph.input}
    for number, info in enumerate(lean.graph.input):
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if dim.WhichOneof("value") is None:
                dim.dim_param = f"input/{number}/{axis}"
    for tensor in proto.graph.initializer:
        if tensor.data_location != tensor.EXTERNAL and math.prod(tensor.dims) <= _SMALL:
            lean.graph.initializer.append(tensor)
        elif tensor.name not in fed:
            dims = list(tensor.dims)
            lean.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, dims))
    return lean


def _inferred(proto: ModelProto, lean: ModelProto, constants: dict[str, Array]) -> Facts:
    import onnx

    facts = Facts({}, {}, dict(constants))
    infos = [*proto.graph.value_info, *proto.graph.output, *proto.graph.input]
    with contextlib.suppress(Exception):
        graph = onnx.shape_inference.infer_shapes(lean, data_prop=True).graph
        infos += [*graph.input, *graph.output, *graph.value_info]
    for info in infos:
        _note(facts, info)
    for tensor in proto.graph.initializer:
        facts.dtypes[tensor.name] = tensor.data_type
        facts.shapes[tensor.name] = tuple(tensor.dims)
    for name, array in constants.items():
        facts.dtypes[name] = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        facts.shapes[name] = array.shape
    return facts


def _note(facts: Facts, info: ValueInfoProto) -> None:
    if info.type.WhichOneof("value") != "tensor_type":
        # A sequence or a map: nothing flows through it.
        if info.type.WhichOneof("value"):
            facts.dtypes[info.name] = 0
        return
    tensor = info.type.tensor_type
    if tensor.elem_type:
        facts.dtypes[info.name] = tensor.elem_type
    if tensor.HasField("shape"):
        dims: Shape = tuple(_dim(d) for d in tensor.shape.dim)
        known = facts.shapes.get(info.name, ())
        if len(known) == len(dims):
            dims = tuple(old if new is None else new for new, old in zip(dims, known, strict=True))
        facts.shapes[info.name] = dims


def _dim(dim: Any) -> Dim:
    which = dim.WhichOneof("value")
    return None if which is None else int(dim.dim_value) if which == "dim_value" else str(dim.dim_param)
