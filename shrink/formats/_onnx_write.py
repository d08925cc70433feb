"""Writing an ONNX file: initializers one at a time, and the nodes that expand those stored in fewer bits."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.codebooks import TABLES
from shrink.errors import BadInput
from shrink.formats._onnx_proto import AT_MOST_BYTES, NAMED_DTYPES, Names, library
from shrink.model import Entry, Quantized, plain_values
from shrink.steps import DTYPES, decode_bytes, from_bfloat16, groups

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["Writer", "check_dequantizes"]

Array = NDArray[Any]

_NUMBERS_OF = {dtype: number for number, dtype in NAMED_DTYPES.items()}
# bfloat16, which NumPy does not have, and the first opset whose Cast does.
_BFLOAT16 = 16
_BFLOAT16_OPSET = 13
_FLOATS = frozenset(DTYPES[code] for code in ("F16", "F32", "F64"))

# The two codes of -8 to 7 in each byte, the low half first.
_INT4_PAIRS = np.array([[(half ^ 8) - 8 for half in (byte & 15, byte >> 4)] for byte in range(256)], "<f4")

# ONNX Runtime runs no older opset, and older operators do not broadcast.
_LEAST_OPSET = 7
# The first opset whose DequantizeLinear has a scale per channel.
_DEQUANTIZE_OPSET = 13
# About what the nodes and small initializers that expand a tensor take; a tensor must gain more than this.
_NODES_COST = 256


@dataclass(frozen=True)
class _Op:
    """A node to be: its first input is the value that flows through, `constants` are the further ones."""

    name: str
    constants: tuple[str, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()


def check_dequantizes(proto: ModelProto, source: Path) -> None:
    """Raises BadInput where the graph's operators are too old for weights that stay in 8 bits."""
    opset = _opset(proto)
    if opset < _DEQUANTIZE_OPSET:
        raise BadInput(
            f"the graph's opset is {opset or 'not given'}, weights that stay in 8 bits need {_DEQUANTIZE_OPSET} or "
            "newer",
            file=source,
            hint="convert it with onnx.version_converter",
        )


def _opset(proto: ModelProto) -> int:
    """0 where it is not given."""
    try:
        versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    except UnicodeDecodeError:
        versions = []
    return versions[0] if versions else 0


class Writer:
    """Collects initializers in a spool file, so that only one is in memory, and the nodes that expand them.

    `keeps`: weights of 8 bits with a scale per channel, or one for all, are expanded by DequantizeLinear.
    """

    def __init__(self, proto: ModelProto, names: Names, spool: IO[bytes], source: Path, *, keeps: bool = False):
        self.helper = library().helper
        self.proto = proto
        self.names = names
        self.spool = spool
        self.source = source
        self.nodes: list[NodeProto] = []
        self.expanded: set[str] = set()
        self.shared: dict[str, str] = {}
        self.opset = _opset(proto)
        self.keeps = keeps

    def add(self, slot: TensorProto, entry: Entry) -> None:
        """Store `entry` where `slot` was."""
        target = NAMED_DTYPES[slot.data_type]
        if entry.shape != tuple(slot.dims):
            raise self._bad(slot, f"its shape is {list(entry.shape)}, the graph's is {list(slot.dims)}")
        chain = entry.steps[-1].name if isinstance(entry, Quantized) else ""
        if self.keeps and isinstance(entry, Quantized) and target in _FLOATS and _is_linear(entry):
            # The reference decoder checks all that the node relies on.
            plain_bytes = entry.array.size * target.itemsize
            cost, emit = _affine(entry, dequantize=True)
            if self._pays(slot, cost, plain_bytes):
                self._expand(slot, partial(emit, self, slot.name), DTYPES["F32"])
                return
        if isinstance(entry, Quantized) and chain in ("affine.1", "codebook.1") and entry.dtype == target in _FLOATS:
            # The reference decoder checks all that the nodes rely on.
            plain_bytes = entry.array.nbytes
            cost, emit = _affine(entry) if chain == "affine.1" else _codebook(entry)
            if self._pays(slot, cost, plain_bytes):
                self._expand(slot, partial(emit, self, slot.name), DTYPES["F32"])
                return
        values = plain_values(entry)
        if values.dtype != target and isinstance(entry, Quantized) and entry.dtype == target and target not in _FLOATS:
            values = entry.array
        if values.dtype != target and not {values.dtype, target} <= _FLOATS:
            raise self._bad(slot, f"its values are {values.dtype}, the graph's are {target}")
        if values.dtype.itemsize < target.itemsize and self._pays(slot, values.nbytes, values.size * target.itemsize):
            suffix = f".f{8 * values.dtype.itemsize}"
            self._expand(slot, lambda: (self.constant(slot.name + suffix, values), []), values.dtype)
            return
        with np.errstate(over="ignore"):
            values = values.astype(target, copy=False)
        self._initializer(slot, values)

    def _pays(self, slot: TensorProto, cost: int, plain_bytes: int) -> bool:
        return cost + _NODES_COST + 8 * len(slot.name.encode()) < plain_bytes

    def _expand(self, slot: TensorProto, emit: Callable[[], tuple[str, list[_Op]]], dtype: np.dtype[Any]) -> None:
        """Write what `emit` gives: an initializer and the nodes that make `dtype` values of the slot's shape of it."""
        if self.opset < _LEAST_OPSET:
            raise self._bad(
                slot,
                f"the graph's opset is {self.opset or 'not given'}, quantized tensors need {_LEAST_OPSET} or newer",
                "convert it with onnx.version_converter",
            )
        start, ops = emit()
        target = NAMED_DTYPES[slot.data_type]
        if dtype != target:
            ops = [*ops, _Op("Cast", attributes=(("to", slot.data_type),))]
        self.flow(start, ops, slot.name)
        self.expanded.add(slot.name)

    def flow(self, value: str, ops: Sequence[_Op], output: str) -> str:
        """Emit nodes one behind the other; the last one's output is `output`."""
        for number, op in enumerate(ops):
            result = output if number == len(ops) - 1 else self.names.free(f"{output}.{op.name.lower()}")
            node = self.helper.make_node(op.name, [value, *op.constants], [result], **dict(op.attributes))
            self.nodes.append(node)
            value = result
        return value

    def constant(self, name: str, values: Array, number: int | None = None) -> str:
        """A new initializer, and the name it got; `number` is its data type where NumPy has none."""
        header = library().TensorProto(name=self.names.free(name), dims=values.shape)
        header.data_type = number or _NUMBERS_OF[values.dtype]
        self._initializer(header, values)
        return str(header.name)

    def common(self, name: str, values: Array) -> str:
        """A constant that tensors share."""
        if name not in self.shared:
            self.shared[name] = self.constant(f"shrink.{name}", values)
        return self.shared[name]

    def reshape(self, shape: Sequence[int]) -> _Op:
        text = "x".join(map(str, shape)) or "scalar"
        return _Op("Reshape", (self.common(f"shape.{text}", np.array(shape, "<i8")),))

    def repeat(self, shape: Sequence[int]) -> _Op:
        """Broadcast float32 values to a shape."""
        if self.opset < 8:
            # Times 1 is exact.
            return _Op("Mul", (self.common(f"ones.{shape[-1]}", np.ones(shape[-1], "<f4")),))
        return _Op("Expand", self.reshape(shape).constants)

    def first(self, count: int, axis: int) -> _Op:
        """Keep the first `count` along an axis."""
        if self.opset < 10:
            return _Op("Slice", attributes=(("axes", [axis]), ("ends", [count]), ("starts", [0])))
        bounds = [self.common(f"index.{n}", np.array([n], "<i8")) for n in (0, count, axis)]
        return _Op("Slice", tuple(bounds))

    def cast(self, code: str) -> _Op:
        return _Op("Cast", attributes=(("to", _NUMBERS_OF[DTYPES[code]]),))

    def _initializer(self, header: TensorProto, values: Array) -> None:
        meta = header.SerializeToString(deterministic=True)
        start = meta + _tag(9, values.nbytes)
        self.spool.write(_tag(5, len(start) + values.nbytes) + start)
        self.spool.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._check_size(self.spool.tell())

    def _check_size(self, nbytes: int) -> None:
        if nbytes > AT_MOST_BYTES:
            raise BadInput(
                f"an ONNX file holds at most {AT_MOST_BYTES} bytes, and this one needs more",
                file=self.source,
                hint="store the tensors in fewer bits",
            )

    def finish(self, out: IO[bytes]) -> None:
        """Put the file together: the model, then its graph with the new nodes first and the initializers last."""
        graph = self.proto.graph
        self._drop_inputs(graph)
        nodes = b"".join(_field(1, node.SerializeToString(deterministic=True)) for node in self.nodes)
        rest = graph.SerializeToString(deterministic=True)
        graph_bytes = len(nodes) + len(rest) + self.spool.tell()
        self.proto.ClearField("graph")
        head = self.proto.SerializeToString(deterministic=True)
        self._check_size(len(head) + 6 + graph_bytes)
        out.write(head + _tag(7, graph_bytes) + nodes + rest)
        self.spool.seek(0)
        shutil.copyfileobj(self.spool, out, 1 << 20)

    def _drop_inputs(self, graph: GraphProto) -> None:
        """Initializers may stand among the inputs too, and up to IR version 3 must; what a node computes may not."""
        drop = set(self.expanded)
        if self.expanded and self.proto.ir_version < 4:
            # The new initializers are no inputs, which needs IR version 4; there, an initializer among the inputs
            # would no longer be a constant.
            self.proto.ir_version = 4
            drop.update(self.names.initializers)
        for number in reversed(range(len(graph.input))):
            if graph.input[number].name in drop:
                del graph.input[number]

    def _bad(self, slot: TensorProto, what: str, hint: str = "") -> BadInput:
        return BadInput(what, file=self.source, tensor=slot.name, hint=hint)


def _tag(field: int, length: int) -> bytes:
    """How Protocol Buffers begin a field that holds `length` bytes."""
    out = bytearray([field << 3 | 2])
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    out.append(length)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    return _tag(number, len(data)) + data


_Emit = Callable[[Writer, str], tuple[str, list[_Op]]]


def _codebook(entry: Quantized) -> tuple[int, _Emit]:
    """What the initializers of a codebook.1 tensor take, and the function that emits them."""
    params = entry.steps[-1].params
    codes = decode_bytes(entry.payload, entry.steps[:-1], entry.size * entry.dtype.itemsize, entry.name)
    values = TABLES[params["table"]] if isinstance(params["table"], str) else np.array(params["table"], np.float64)
    # As the reference decoder: one rounding, of the product.
    table = (values * params["scale"]).astype(np.float32)

    def emit(writer: Writer, name: str) -> tuple[str, list[_Op]]:
        start = writer.constant(f"{name}.codes", codes.reshape(entry.shape))
        index = writer.flow(start, [writer.cast("I32")], writer.names.free(f"{name}.index"))
        # Gather's first input is the table, and what flows through is the second.
        return writer.constant(f"{name}.table", table), [_Op("Gather", (index,))]

    return codes.nbytes + table.nbytes, emit


def _is_linear(entry: Quantized) -> bool:
    """Whether it is what DequantizeLinear expands to the very same values: code times the scale of its channel."""
    params = entry.steps[-1].params
    wanted = {"bits": 8, "block": None, "scale": "F32", "zero": False}
    return entry.steps[-1].name == "affine.1" and {key: params.get(key) for key in wanted} == wanted


def _affine(entry: Quantized, *, dequantize: bool = False) -> tuple[int, _Emit]:
    """What the initializers of an affine.1 tensor take, and the function that emits them.

    `dequantize`, for what `_is_linear`: by DequantizeLinear, which runtimes do not work out in advance. Of a matrix
    right behind it, ONNX Runtime would make a product that rounds the other factor to 8 bits as well, and lose far more
    than was asked for: a Reshape, which moves no bytes, stands between.

    Without blocks, scales broadcast over codes that keep the tensor's shape. With blocks, codes stay a matrix of
    (rows, values per row), scales and zero points are spread over it, and the product gets its shape at the end.
    """
    params = entry.steps[-1].params
    bits: int = params["bits"]
    axis: int | None = params.get("axis")
    block: int = params.get("block") or entry.size
    shape = entry.shape
    rows, per_row, blocks = groups(shape, axis, params.get("block"))
    data = decode_bytes(entry.payload, entry.steps[:-1], entry.size * entry.dtype.itemsize, entry.name)
    n_groups = rows * blocks
    scale_bytes = n_groups * (4 if params["scale"] == "F32" else 2)
    zero_bytes = n_groups if params["zero"] else 0
    scales = data[:scale_bytes].view("<f4" if params["scale"] == "F32" else "<u2")
    zeros = data[scale_bytes : scale_bytes + zero_bytes].view(np.int8)
    codes = data[scale_bytes + zero_bytes :]

    spread = blocks > 1
    moved = shape if axis is None else (shape[axis], *shape[:axis], *shape[axis + 1 :])
    work_shape = (rows, per_row) if spread else shape
    group_shape = (rows, blocks, 1) if spread else tuple(n if i == axis else 1 for i, n in enumerate(shape))
    if not spread and axis:
        codes = _reorder(codes, bits, moved, axis)

    def groupwise(writer: Writer, name: str, values: Array, ops: list[_Op], number: int | None = None) -> str:
        start = writer.constant(name, values.reshape(group_shape), number)
        if spread:
            ops = [*ops, writer.repeat((rows, blocks, block)), writer.reshape((rows, blocks * block))]
            if blocks * block != per_row:
                ops.append(writer.first(per_row, 1))
        return writer.flow(start, ops, writer.names.free(f"{name}.spread")) if ops else start

    def emit(writer: Writer, name: str) -> tuple[str, list[_Op]]:
        if bits == 8:
            between = dequantize and len(shape) == 2
            start = writer.constant(
                f"{name}.codes", codes.view(np.int8).reshape((1, *shape) if between else work_shape)
            )
            if dequantize:
                scale = writer.constant(f"{name}.scale", scales.reshape(() if axis is None else (-1,)))
                attributes = () if axis is None else (("axis", axis + between),)
                ops = [_Op("DequantizeLinear", (scale,), attributes)]
                return start, [*ops, writer.reshape(shape)] if between else ops
            ops = [writer.cast("F32")]
        else:
            packed = writer.constant(f"{name}.codes", codes)
            index = writer.flow(packed, [writer.cast("I32")], writer.names.free(f"{name}.index"))
            start, ops = writer.common("int4", _INT4_PAIRS), [_Op("Gather", (index,))]
            if entry.size % 2:
                ops += [writer.reshape((entry.size + 1,)), writer.first(entry.size, 0)]
            ops.append(writer.reshape(work_shape))
        if params["zero"]:
            ops.append(_Op("Sub", (groupwise(writer, f"{name}.zero", zeros, [writer.cast("F32")]),)))
        if params["scale"] == "F32":
            scale = groupwise(writer, f"{name}.scale", scales, [])
        elif writer.opset >= _BFLOAT16_OPSET:
            scale = groupwise(writer, f"{name}.scale", scales, [writer.cast("F32")], _BFLOAT16)
        else:
            scale = groupwise(writer, f"{name}.scale", from_bfloat16(scales), [])
        ops.append(_Op("Mul", (scale,)))
        if spread:
            ops.append(writer.reshape(moved))
            if axis:
                back = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
                ops.append(_Op("Transpose", attributes=(("perm", back),)))
        return start, ops

    return data.nbytes, emit


def _reorder(codes: NDArray[np.uint8], bits: int, moved: tuple[int, ...], axis: int) -> NDArray[np.uint8]:
    """Codes in the tensor's own order, from the order in which `axis` comes first."""
    count = math.prod(moved)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)[:count]
    codes = np.ascontiguousarray(np.moveaxis(codes.reshape(moved), 0, axis)).reshape(-1)
    if bits == 8:
        return codes
    even = np.concatenate([codes, np.zeros(count % 2, np.uint8)])
    packed: NDArray[np.uint8] = even[0::2] | even[1::2] << np.uint8(4)
    return packed
