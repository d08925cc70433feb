"""Which tensors must stay inside a stage, so that a runtime computes the very bits it computes for the whole network.

A runtime puts neighbours together when it builds a network: Conv with BatchNormalization and an activation, MatMul
with Add, the many nodes of a GELU, a layer normalization or an attention. Cut through, such a group is computed one by
one, and rounds differently. So a tensor may cross only where one layer ends and the next begins:

 - all that read it begin a layer (Conv, MatMul with a weight …), or, where there are several, leave no trace in it;
 - what makes it is nothing that a runtime draws into the layer behind it (Transpose, Pad, a cast, a scale);
 - it is not inside an attention;
 - no operator whose rounding depends on the memory layout gets another layout by it: ONNX Runtime keeps pictures in
   blocks of channels from one Conv to the next, and pools, normalizes and sums them in that order.
"""

from __future__ import annotations

from collections.abc import Iterable

from shrink.split._stages import Graph, Op

__all__ = ["held"]

_STARTS = frozenset(
    {
        "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "Gemm", "MatMul", "MatMulInteger", "QLinearMatMul",
        "LSTM", "GRU", "RNN", "MaxPool", "GlobalMaxPool", "Concat", "DepthToSpace", "SpaceToDepth", "Flatten", "Shape",
        "If", "Loop", "Scan",
    }
)  # fmt: skip
# Exact for each value by itself, so that they may follow a tensor that others read too.
_AFTER_FORK = frozenset({"Relu", "LeakyRelu", "PRelu", "Clip", "Add", "Sum"})
# A residual stream is read by the normalization of the next branch and by the Add behind it.
_NORMALIZES = frozenset(
    {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean", "Sub", "Pow", "Mul", "Div"}
)
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean", "Pow"})
# Drawn into what reads them, or moved past it.
_PREPARES = frozenset(
    {
        "Pad", "Transpose", "Cast", "CastLike", "Identity", "Dropout", "Squeeze", "Unsqueeze", "Expand",
        "DequantizeLinear", "Shape", "Size",
    }
)  # fmt: skip
# Rounding depends on the layout of what they read, and these hand a layout on.
_LAYOUT = frozenset({"BatchNormalization", "Sigmoid", "Tanh", "Resize", "Upsample"})
_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool"})
_KEEPS_LAYOUT = _LAYOUT | {"Concat", "Add", "Sum", "Mul", "Relu", "LeakyRelu", "Clip", "MaxPool"} | _AVERAGES
# Between the products of an attention and the layers around it.
_IN_ATTENTION = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze", "Slice", "Gather", "Cast",
        "Where", "Softmax", "Expand", "Concat", "MatMul", "Einsum", "Flatten", "Gemm",
    }
)  # fmt: skip
_PRODUCTS = frozenset({"MatMul", "Gemm"})


class _Around:
    """Who makes a tensor, and who reads it."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.maker: dict[str, Op] = {name: op for op in graph.ops for name in op.writes}
        self.readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for name in op.reads:
                self.readers.setdefault(name, []).append(op)

    def has_constant(self, op: Op) -> bool:
        """Whether an input of the node is known when a session is built."""
        if op.number is None:
            return False
        return any(name in self.graph.constants for name in self.graph.proto.graph.node[op.number].input)

    def computed(self, op: Op) -> list[Op]:
        return [self.maker[name] for name in op.reads]

    def is_convolution(self, op: Op) -> bool:
        """A Conv, with its BatchNormalization or bias when it has one, that nothing else reads."""
        while op.name in ("BatchNormalization", "Add", "Mul") and self.has_constant(op) and len(op.reads) == 1:
            (name,) = op.reads
            if len(self.readers[name]) > 1:
                return False
            op = self.maker[name]
        return op.name == "Conv"


def held(graph: Graph) -> frozenset[str]:
    """The names of tensors that may not cross from one stage to another."""
    around = _Around(graph)
    inside = _inside_attention(around) | _of_one_layout(around)
    return frozenset(
        name
        for name, readers in around.readers.items()
        if name in inside or name not in graph.types or not _ends_a_layer(around, name, readers)
    )


def _ends_a_layer(around: _Around, name: str, readers: list[Op]) -> bool:
    maker = around.maker[name]
    kinds = {op.name for op in readers if op.number is not None}
    # What is no operator of ONNX's own is in no group that we know.
    kinds = {kind for kind in kinds if ":" not in kind}
    if maker.name == "QuantizeLinear":
        return kinds <= {"DequantizeLinear", *_STARTS}
    if maker.name in _PREPARES or not _weighted(around, readers) or _scales(around, maker, kinds):
        return False
    if len(readers) == 1:
        return kinds <= _STARTS
    if "Add" in kinds and kinds & _NORMS and not (maker.name == "Add" and around.has_constant(maker)):
        return kinds <= _STARTS | _AFTER_FORK | _NORMALIZES
    return kinds <= _STARTS | _AFTER_FORK


def _weighted(around: _Around, readers: list[Op]) -> bool:
    """Whether each product among them is one with a weight: those of two activations are inside an attention."""
    return all(around.has_constant(op) for op in readers if op.name in _PRODUCTS)


def _scales(around: _Around, maker: Op, kinds: set[str]) -> bool:
    """Whether it is a scale that a MatMul can take over. The last Mul of a GELU is none."""
    if maker.name not in ("Mul", "Div") or not around.has_constant(maker) or not kinds & _PRODUCTS:
        return False
    near = [maker]
    for _ in range(3):
        near += [op for n in near for op in around.computed(n)]
        near = list({op.writes: op for op in near}.values())
    return not any(op.name in ("Erf", "Tanh") for op in near)


def _inside_attention(around: _Around) -> set[str]:
    """Everything from what the projections of an attention read to what its output projection gives."""
    inside: set[str] = set()
    for op in around.graph.ops:
        if op.name in _PRODUCTS and len(op.reads) > 1:
            inside.update(_walk(around, op.reads, up=True))
            inside.update(_walk(around, op.writes, up=False))
    return inside


def _walk(around: _Around, start: Iterable[str], *, up: bool) -> set[str]:
    """Tensors from `start` as far as an attention reaches: through one product with a weight, and not beyond it."""
    found: set[str] = set()
    left = list(start)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for op in [around.maker[name]] if up else around.readers.get(name, []):
            ends = op.name in _PRODUCTS and around.has_constant(op)
            if op.name not in _IN_ATTENTION or (op.name == "Add" and len(op.reads) > 1 and not around.has_constant(op)):
                continue
            if ends:
                # What the projection reads: nothing but a normalization is looked through for.
                found.update(n for n in (op.reads if up else op.writes) if not (up and _forks(around, n)))
            else:
                left += op.reads if up else op.writes
    return found


def _forks(around: _Around, name: str) -> bool:
    """Whether the tensor is a residual stream without a normalization between it and the projections."""
    return around.maker[name].name in ("Add", "Sum")


def _of_one_layout(around: _Around) -> set[str]:
    """What must not be cut off from an operator whose rounding depends on how its input lies in memory."""
    found: set[str] = set()
    left: list[str] = []
    for op in around.graph.ops:
        if op.name in _LAYOUT | _AVERAGES:
            left += op.reads
        if op.name in ("Add", "Sum") and len(op.reads) > 1 and any(map(around.is_convolution, around.computed(op))):
            # The runtime adds inside the convolution, where the other operand lies as its own output does.
            left += op.reads
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        if around.maker[name].name in _KEEPS_LAYOUT:
            left += around.maker[name].reads
    return found
