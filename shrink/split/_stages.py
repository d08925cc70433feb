"""An ONNX graph as something to cut: what each node reads, what may be computed twice, and how large tensors are.

Nodes whose values depend on nothing but initializers and shapes are *recipes*: short to compute, and a runtime looks
through them while it builds a network. Each stage gets its own copy of those it uses. All other nodes, the *ops*, run
in one stage only.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shrink.errors import BadInput, UsageError, printable
from shrink.formats._onnx_proto import NAMED_DTYPES, Names, library

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto

__all__ = ["RANDOM", "Graph", "Item", "Op", "examine", "graph_inputs", "in_order", "reads"]

Item = tuple[Literal["node", "initializer", "sparse", "function"], int]
"""What several stages may have a copy of, and its number in the model."""

_STANDARD = ("", "ai.onnx")
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
# Of one recipe: a longer one is computed once, like all else.
_ITEMS_AT_MOST = 2000
# The bits of a value, by the number of TensorProto.DataType; a string has no fixed size.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4,
}  # fmt: skip


@dataclass(frozen=True)
class Op:
    """A node that runs in one stage only. `number` is that of the node, None for a result that needs no op.

    `reads` are tensors that other ops compute, `feeds` inputs of the graph; `items` must lie in the same file.
    """

    number: int | None
    name: str
    reads: tuple[str, ...]
    feeds: tuple[str, ...]
    writes: tuple[str, ...]
    items: frozenset[Item]


@dataclass(frozen=True)
class Graph:
    """A model whose structure is sound. `ops` are in running order, and `ranks` is that order for every node.

    `types` are the types of tensors with the dimensions that the model leaves open, `sizes` and `shapes` their bytes
    and shapes at `input_shapes`; a tensor is in all of them where it is one of numbers and its shape is known then.
    """

    proto: ModelProto
    source: Path
    input_shapes: Mapping[str, tuple[int, ...]]
    ops: tuple[Op, ...]
    ranks: tuple[int, ...]
    types: Mapping[str, TypeProto]
    sizes: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    constants: frozenset[str]

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(info.name for info in self.proto.graph.output)


def graph_inputs(proto: ModelProto) -> list[ValueInfoProto]:
    """The inputs without those that only name an initializer, as files of IR version 3 list them."""
    held = {i.name for i in proto.graph.initializer} | {s.values.name for s in proto.graph.sparse_initializer}
    return [info for info in proto.graph.input if info.name not in held]


def examine(proto: ModelProto, source: Path, shapes: Sequence[tuple[int, ...]] | None = None) -> Graph:
    """`proto` as a graph to cut. It is changed: nodes are put in order, and a `Shape` that is known becomes constant.

    `shapes` are those of the inputs, in order. None takes them from the model, where a first dimension that is open
    is 1, the batch. Initializers need no data, but small ones that say shapes and axes.

    Raises:
        BadInput: nodes in a circle, a name that nothing computes or two nodes do.
        UsageError: an input whose shape is open, or shapes that do not fit the model's.
        MissingDependency: the package onnx is not installed.
    """
    _check_names(proto, source)
    input_shapes = _input_shapes(proto, shapes, source)
    _put_in_order(proto, source)
    ranks = range(len(proto.graph.node))
    types = _types(proto)
    _fold_shapes(proto, types)
    sized = _types(_with_shapes(proto, input_shapes))
    known = {name: size for name, kind in sized.items() if (size := _size(kind)) is not None}
    ops, constants = _ops(proto, ranks)
    return Graph(
        proto,
        source,
        input_shapes,
        tuple(ops),
        tuple(ranks),
        {name: types.get(name, sized[name]) for name in known},
        known,
        {name: tuple(d.dim_value for d in sized[name].tensor_type.shape.dim) for name in known},
        frozenset(constants),
    )


# --- names and order -------------------------------------------------------------------------------------------


def _check_names(proto: ModelProto, source: Path) -> None:
    Names(proto, source)
    known = {info.name for info in graph_inputs(proto)}
    if len(known) != len(graph_inputs(proto)):
        raise BadInput("two inputs have one name", file=source)
    known |= {i.name for i in proto.graph.initializer} | {s.values.name for s in proto.graph.sparse_initializer}
    for node in proto.graph.node:
        for name in node.output:
            if name and name in known:
                raise BadInput("it is computed twice", file=source, tensor=name)
            known.add(name)
    for node in proto.graph.node:
        for name in reads(node):
            if name not in known:
                raise BadInput("a node reads it, but nothing computes it", file=source, tensor=name)
    for info in proto.graph.output:
        if info.name not in known:
            raise BadInput("it is a result of the network, but nothing computes it", file=source, tensor=info.name)


def reads(node: NodeProto) -> list[str]:
    """The tensors that a node needs, those that graphs inside it take from outside too; each once."""
    found = dict.fromkeys(name for name in node.input if name)
    for graph in _inner(node):
        found |= dict.fromkeys(_captured(graph))
    return list(found)


def _inner(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _captured(graph: GraphProto) -> list[str]:
    own = {i.name for i in graph.input} | {i.name for i in graph.initializer}
    own |= {s.values.name for s in graph.sparse_initializer} | {o for node in graph.node for o in node.output}
    used = [name for node in graph.node for name in reads(node)] + [info.name for info in graph.output]
    return [name for name in used if name not in own]


def _put_in_order(proto: ModelProto, source: Path) -> None:
    """Bring the nodes in a running order, the file's own where that is one: inference wants it, and so do models."""
    makers = {name: number for number, node in enumerate(proto.graph.node) for name in node.output if name}
    before = [{makers[name] for name in reads(node) if name in makers} for node in proto.graph.node]
    order = in_order(before)
    if len(order) != len(before):
        raise BadInput("its nodes wait for each other in a circle", file=source)
    if order != list(range(len(order))):
        nodes = [proto.graph.node[number] for number in order]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)


def in_order(before: Sequence[Iterable[int]]) -> list[int]:
    """Numbers so that each comes after all of its `before`, the lowest first; short where there is a circle."""
    after: list[list[int]] = [[] for _ in before]
    waits = [0] * len(before)
    for number, earlier in enumerate(before):
        for other in earlier:
            after[other].append(number)
            waits[number] += 1
    ready = [number for number, count in enumerate(waits) if count == 0]
    order = []
    while ready:
        number = heapq.heappop(ready)
        order.append(number)
        for other in after[number]:
            waits[other] -= 1
            if waits[other] == 0:
                heapq.heappush(ready, other)
    return order


# --- shapes ----------------------------------------------------------------------------------------------------


def _input_shapes(
    proto: ModelProto, given: Sequence[tuple[int, ...]] | None, source: Path
) -> dict[str, tuple[int, ...]]:
    inputs = graph_inputs(proto)
    if given is not None and len(given) != len(inputs):
        raise UsageError(f"{len(given)} input shapes are given, the network has {len(inputs)} inputs", file=source)
    shapes = {}
    for number, info in enumerate(inputs):
        kind = info.type.tensor_type
        name = printable(info.name)
        if kind.elem_type not in NAMED_DTYPES:
            raise BadInput(f"its input {name} is not of numbers", file=source)
        dims = [d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim]
        if given is None:
            shape = tuple(1 if n is None else n for n in dims)
            if not kind.HasField("shape") or None in dims[1:]:
                what = f"the model leaves the shape of its input {name} open"
                raise UsageError(what, file=source, hint=f"give it: --input {name}=1,3,224,224")
        else:
            shape = given[number]
            fits = len(shape) == len(dims) and all(n in (m, None) for m, n in zip(shape, dims, strict=True))
            if kind.HasField("shape") and not fits:
                raise UsageError(f"{shape} does not fit the input {name}", file=source)
        if math.prod(shape) >= 1 << 31:
            raise UsageError(f"its input {name} is too large", file=source)
        shapes[info.name] = shape
    return shapes


def _types(proto: ModelProto) -> dict[str, TypeProto]:
    """The types that inference gives, and those that the model says."""
    onnx = library()
    try:
        graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    except Exception:
        # Inference runs over whatever the file holds. Without it, there is only what the model says itself.
        graph = proto.graph
    return {info.name: info.type for info in (*graph.input, *graph.value_info, *graph.output)}


def _with_shapes(proto: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> ModelProto:
    sized = type(proto)()
    sized.CopyFrom(proto)
    for info in sized.graph.input:
        if info.name in shapes:
            info.type.tensor_type.ClearField("shape")
            for n in shapes[info.name]:
                info.type.tensor_type.shape.dim.add(dim_value=n)
            # A scalar has a shape too, one without dimensions.
            info.type.tensor_type.shape.SetInParent()
    for info in sized.graph.output:
        info.type.tensor_type.ClearField("shape")
    return sized


def _size(kind: TypeProto) -> int | None:
    """Bytes of a tensor of numbers; None where that is not known."""
    bits = _BITS.get(kind.tensor_type.elem_type) if kind.HasField("tensor_type") else None
    dims = kind.tensor_type.shape.dim
    if bits is None or not kind.tensor_type.HasField("shape") or not all(d.HasField("dim_value") for d in dims):
        return None
    values: int = math.prod(max(0, d.dim_value) for d in dims)
    return -(-values * bits // 8)


def _fold_shapes(proto: ModelProto, types: Mapping[str, TypeProto]) -> None:
    """Make constants of the `Shape` nodes whose answer the model knows, as any runtime does.

    A later stage would otherwise be fed with it, and not know what the whole network knows.
    """
    onnx = library()
    for node in proto.graph.node:
        if node.op_type != "Shape" or node.domain not in _STANDARD or len(node.input) != 1 or len(node.output) != 1:
            continue
        kind = types.get(node.input[0])
        if kind is None or not kind.tensor_type.HasField("shape"):
            continue
        bounds = {a.name: a.i for a in node.attribute}
        dims = list(kind.tensor_type.shape.dim)[bounds.get("start", 0) : bounds.get("end")]
        if all(d.HasField("dim_value") for d in dims):
            values = onnx.helper.make_tensor("value", onnx.TensorProto.INT64, [len(dims)], [d.dim_value for d in dims])
            node.CopyFrom(onnx.helper.make_node("Constant", [], list(node.output), name=node.name, value=values))


# --- ops and recipes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """How a stage has a tensor: by copies of `items`, from inputs of the graph and from tensors that ops compute."""

    items: frozenset[Item]
    feeds: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()


def _ops(proto: ModelProto, ranks: Sequence[int]) -> tuple[list[Op], set[str]]:
    """The ops in running order, and the names of tensors that are known when a session is built."""
    graph = proto.graph
    functions = _functions(proto)
    recipes: dict[str, _Recipe] = {}
    for number, initializer in enumerate(graph.initializer):
        recipes[initializer.name] = _Recipe(frozenset({("initializer", number)}))
    for number, sparse in enumerate(graph.sparse_initializer):
        recipes[sparse.values.name] = _Recipe(frozenset({("sparse", number)}))
    for info in graph_inputs(proto):
        recipes[info.name] = _Recipe(frozenset(), frozenset({info.name}))
    made: set[str] = set()
    ops = []
    for number in sorted(range(len(graph.node)), key=lambda n: ranks[n]):
        node = graph.node[number]
        parts = [recipes.get(name) or _Recipe(frozenset(), reads=frozenset({name})) for name in reads(node)]
        items = frozenset().union(*(p.items for p in parts), _used_functions(node, functions))
        feeds = frozenset().union(*(p.feeds for p in parts))
        read = frozenset().union(*(p.reads for p in parts))
        writes = tuple(name for name in node.output if name)
        if _is_recipe(node, parts, feeds, read, made) and len(items) < _ITEMS_AT_MOST:
            made.update(writes)
            recipes |= dict.fromkeys(writes, _Recipe(items | {("node", number)}, feeds, read))
            continue
        name = node.op_type if node.domain in _STANDARD else f"{node.domain}:{node.op_type}"
        ops.append(Op(number, name, tuple(sorted(read)), tuple(sorted(feeds)), writes, items))
    for info in graph.output:
        # A result that no op computes is handed out by the last stage.
        if (recipe := recipes.get(info.name)) is not None:
            feeds, read = recipe.feeds, recipe.reads
            ops.append(Op(None, "", tuple(sorted(read)), tuple(sorted(feeds)), (info.name,), recipe.items))
    # Before IR version 4 every initializer is an input too; later, one that is can be fed.
    inputs = {info.name for info in graph.input} if proto.ir_version >= 4 else set()
    constants = {name for name, r in recipes.items() if not r.feeds and not r.reads and name not in inputs}
    return ops, constants


def _is_recipe(
    node: NodeProto, parts: Sequence[_Recipe], feeds: frozenset[str], read: frozenset[str], made: set[str]
) -> bool:
    """Whether a node only computes with constants and shapes."""
    if node.domain not in _STANDARD or node.op_type in RANDOM or any(True for _ in _inner(node)):
        return False
    if node.op_type in ("Shape", "Size"):
        # The shape of a tensor is small, and the tensor is not: only what is at hand in every stage is asked again.
        return not read
    return all(not (p.feeds or p.reads) or name in made for name, p in zip(reads(node), parts, strict=True))


def _functions(proto: ModelProto) -> dict[tuple[str, str], frozenset[Item]]:
    """The functions of the model by domain and name, each with those that it needs itself."""
    uses: dict[tuple[str, str], set[tuple[str, str]]] = {}
    numbers: dict[tuple[str, str], set[int]] = {}
    for number, function in enumerate(proto.functions):
        key = (function.domain, function.name)
        numbers.setdefault(key, set()).add(number)
        uses.setdefault(key, set()).update(called for node in function.node for called in _called(node))
    found: dict[tuple[str, str], frozenset[Item]] = {}
    for key in numbers:
        seen, left = {key}, [key]
        while left:
            new = {k for k in uses[left.pop()] if k in numbers} - seen
            seen |= new
            left += new
        found[key] = frozenset(("function", n) for k in seen for n in numbers[k])
    return found


def _called(node: NodeProto) -> Iterator[tuple[str, str]]:
    yield (node.domain, node.op_type)
    for graph in _inner(node):
        for inner in graph.node:
            yield from _called(inner)


def _used_functions(node: NodeProto, functions: Mapping[tuple[str, str], frozenset[Item]]) -> frozenset[Item]:
    return frozenset().union(*(functions.get(key, frozenset()) for key in _called(node))) if functions else frozenset()
