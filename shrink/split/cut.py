"""An ONNX graph in stages that run one after another, each a model of its own and within a limit.

    examine(model)                  what is in the graph, and how large what flows through it is
    cut(graph, sizes, limit)        the fewest stages, cut where the least crosses; no file is touched
    stage_models(graph, stages)     the stages as models
    plan(source, limit, folder)     all of it for a file: stage files, and the index that says how to chain them

A tensor that later stages need is kept until the last of them; inputs and results of the network are at hand anyway.
An initializer that two stages need lies in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shrink.errors import BadInput
from shrink.formats import onnx as onnx_format
from shrink.formats._onnx_proto import AT_MOST_BYTES, Reader, clear, parse
from shrink.model import Model
from shrink.split import Plan
from shrink.split._partition import Division, Unit, divide, orders, units
from shrink.split._stage_bounds import held
from shrink.split._stage_files import StageFiles
from shrink.split._stages import Graph, Item, Op, examine, graph_inputs

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

__all__ = ["Graph", "Stage", "cut", "examine", "plan", "stage_models"]

# Shapes, axes and the like must be in the graph when shapes are inferred.
_SMALL_BYTES = 1024
# Protocol Buffers put a tag and a length in front of everything, here of at most this many bytes.
_TAG_BYTES = 6


@dataclass(frozen=True)
class Stage:
    """A part of a network: numbers of its nodes in running order, and the names of what it takes, gives and holds.

    `size_bytes` is what it takes in a file at most, `crossing_bytes` what has to be kept when it has run, for itself
    and all stages before it. `functions` are numbers of those that its nodes use.
    """

    nodes: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    initializers: tuple[str, ...]
    functions: tuple[int, ...]
    size_bytes: int
    crossing_bytes: int


def cut(graph: Graph, sizes: Mapping[str, int], limit: int) -> tuple[Stage, ...]:
    """The fewest stages of at most `limit` bytes; of those, where the least crosses.

    `sizes` are the bytes that the values of an initializer will take, where they are not in the graph. A stage is
    over the limit only where it could not be cut: inside a node, or a group that a runtime computes as one.

    Raises:
        BadInput: there are no nodes.
    """
    if not graph.ops:
        raise BadInput("there is nothing in it that could be run in stages", file=graph.source)
    item_bytes = _item_bytes(graph, sizes)
    edge_bytes = _edge_bytes(graph)
    base_bytes = _frame(graph).ByteSize() + sum(edge_bytes[i.name] for i in graph_inputs(graph.proto)) + 4 * _TAG_BYTES
    parts = units(graph, held(graph), _op_bytes(graph))
    divided = [divide(graph, order, limit, item_bytes, edge_bytes, base_bytes) for order in orders(graph, parts)]
    best = min(divided, key=lambda division: division.cost)
    return _stages(graph, best, item_bytes, edge_bytes, base_bytes)


def _item_bytes(graph: Graph, sizes: Mapping[str, int]) -> dict[Item, int]:
    proto = graph.proto
    inputs = {info.name: info.ByteSize() + _TAG_BYTES for info in proto.graph.input}
    found: dict[Item, int] = {}
    said = _said_bytes(graph)
    for number, node in enumerate(proto.graph.node):
        found["node", number] = node.ByteSize() + _TAG_BYTES + sum(said.get(name, 0) for name in node.output)
    for number, tensor in enumerate(proto.graph.initializer):
        header = tensor.ByteSize() + 2 * _TAG_BYTES + inputs.get(tensor.name, 0)
        found["initializer", number] = header + sizes.get(tensor.name, 0)
    for number, sparse in enumerate(proto.graph.sparse_initializer):
        found["sparse", number] = sparse.ByteSize() + _TAG_BYTES + inputs.get(sparse.values.name, 0)
    for number, function in enumerate(proto.functions):
        found["function", number] = function.ByteSize() + _TAG_BYTES
    return found


def _op_bytes(graph: Graph) -> dict[Op, int]:
    proto = graph.proto.graph
    said = _said_bytes(graph)
    return {
        op: 0
        if op.number is None
        else proto.node[op.number].ByteSize() + _TAG_BYTES + sum(said.get(name, 0) for name in op.writes)
        for op in graph.ops
    }


def _said_bytes(graph: Graph) -> dict[str, int]:
    """What the model says about a tensor that a node computes, besides the node."""
    proto = graph.proto.graph
    said = {info.name: info.ByteSize() + _TAG_BYTES for info in proto.value_info}
    for annotation in proto.quantization_annotation:
        said[annotation.tensor_name] = said.get(annotation.tensor_name, 0) + annotation.ByteSize() + _TAG_BYTES
    return said


def _edge_bytes(graph: Graph) -> dict[str, int]:
    """What it takes to say that a tensor is an input or output of a stage."""
    found = {name: kind.ByteSize() + len(name.encode()) + 3 * _TAG_BYTES for name, kind in graph.types.items()}
    for info in (*graph.proto.graph.input, *graph.proto.graph.output):
        found[info.name] = max(found.get(info.name, 0), info.ByteSize() + _TAG_BYTES)
    return found


def _stages(
    graph: Graph,
    division: Division,
    item_bytes: Mapping[Item, int],
    edge_bytes: Mapping[str, int],
    base_bytes: int,
) -> tuple[Stage, ...]:
    proto = graph.proto.graph
    made_at = {name: place for place, op in enumerate(graph.ops) for name in op.writes}
    starts = (0, *division.cuts[:-1])
    parts: list[Sequence[Unit]] = [division.order[a:b] for a, b in zip(starts, division.cuts, strict=True)]
    needed_later: list[set[str]] = [set()]
    for part in reversed(parts[1:]):
        needed_later.append(needed_later[-1] | {name for unit in part for name in unit.reads})
    needed_later.reverse()
    stages = []
    for part, later, crossing in zip(parts, needed_later, division.crossing, strict=True):
        ops = [op for unit in part for op in unit.ops]
        items = frozenset().union(*(unit.items for unit in part))
        made = {name for op in ops for name in op.writes}
        feeds = {name for op in ops for name in op.feeds}
        taken = {name for op in ops for name in op.reads} - made
        given = {name for name in made if name in later or name in graph.outputs}
        numbers = {number for kind, number in items if kind == "node"}
        numbers |= {op.number for op in ops if op.number is not None}
        size = base_bytes + sum(item_bytes[item] for item in items) + sum(unit.own_bytes for unit in part)
        stages.append(
            Stage(
                tuple(sorted(numbers, key=lambda number: graph.ranks[number])),
                (
                    *(info.name for info in graph_inputs(graph.proto) if info.name in feeds),
                    *sorted(taken, key=lambda name: made_at[name]),
                ),
                tuple(sorted(given, key=lambda name: made_at[name])),
                (
                    *(tensor.name for n, tensor in enumerate(proto.initializer) if ("initializer", n) in items),
                    *(s.values.name for n, s in enumerate(proto.sparse_initializer) if ("sparse", n) in items),
                ),
                tuple(sorted(number for kind, number in items if kind == "function")),
                size + sum(edge_bytes[name] for name in taken | given),
                crossing,
            )
        )
    return tuple(stages)


# --- stages as models ------------------------------------------------------------------------------------------


def stage_models(graph: Graph, stages: Sequence[Stage]) -> list[ModelProto]:
    """Each stage as a model, with the opsets, functions and metadata of the whole; initializers are as in the graph."""
    return [_stage_model(graph, stage) for stage in stages]


def _frame(graph: Graph) -> ModelProto:
    """The model without what its stages share out."""
    frame = type(graph.proto)()
    for descriptor, _ in graph.proto.ListFields():
        if descriptor.name not in ("graph", "functions", "training_info"):
            _copy_field(graph.proto, frame, descriptor.name)
    for descriptor, _ in graph.proto.graph.ListFields():
        if descriptor.name in ("name", "doc_string", "metadata_props"):
            _copy_field(graph.proto.graph, frame.graph, descriptor.name)
    return frame


def _copy_field(source: ModelProto | GraphProto, target: ModelProto | GraphProto, name: str) -> None:
    value = getattr(source, name)
    if isinstance(value, int | str | bytes):
        setattr(target, name, value)
    else:
        getattr(target, name).MergeFrom(value)


def _stage_model(graph: Graph, stage: Stage) -> ModelProto:
    whole = graph.proto.graph
    model = _frame(graph)
    part = model.graph
    part.node.extend(whole.node[number] for number in stage.nodes)
    model.functions.extend(graph.proto.functions[number] for number in stage.functions)
    initializers = set(stage.initializers)
    part.initializer.extend(t for t in whole.initializer if t.name in initializers)
    part.sparse_initializer.extend(s for s in whole.sparse_initializer if s.values.name in initializers)
    # Up to IR version 3 initializers stand among the inputs; later, one that does can be replaced by whoever runs it.
    declared = {info.name: info for info in whole.input}
    results = {info.name: info for info in whole.output}
    for name in stage.inputs:
        if name in declared:
            part.input.add().CopyFrom(declared[name])
        else:
            part.input.add(name=name).type.CopyFrom(graph.types[name])
    part.input.extend(info for info in whole.input if info.name in initializers)
    for name in stage.outputs:
        if name in results:
            part.output.add().CopyFrom(results[name])
        else:
            part.output.add(name=name).type.CopyFrom(graph.types[name])
    made = {name for number in stage.nodes for name in whole.node[number].output}
    part.value_info.extend(info for info in whole.value_info if info.name in made and info.name not in stage.outputs)
    near = made | initializers | set(stage.inputs)
    part.quantization_annotation.extend(a for a in whole.quantization_annotation if a.tensor_name in near)
    return model


# --- a file ----------------------------------------------------------------------------------------------------


def plan(
    source: Path,
    limit: int,
    folder: Path,
    *,
    force: bool = False,
    dry_run: bool = False,
    input_shapes: Sequence[tuple[int, ...]] | None = None,
) -> Plan:
    """Stage files of an ONNX file, and `<name>.stages.json`, which says how to chain them.

    `input_shapes` are those of the inputs, in order; without them a first dimension that the model leaves open is 1.
    What one stage holds lies in further files beside it where it is over the limit by itself.

    Raises:
        UsageError: there are stages already, and no `force`, or an input's shape is open.
        BadInput: not an ONNX model, or one that cannot be run.
        BoundNotMet: a stage cannot be brought below the limit.
        MissingDependency: the package onnx is not installed.
    """
    model = onnx_format.read(source)
    proto = _with_small_tensors(model)
    dropped = len(proto.training_info) > 0
    graph = examine(proto, source, input_shapes or None)
    sizes = {tensor.name: tensor.size_bytes for tensor in model.tensors if hasattr(tensor, "size_bytes")}
    stages = cut(graph, _by_initializer(proto, sizes), min(limit, AT_MOST_BYTES))
    notes = ["the stages leave out what the model says about training"] if dropped else []
    files = StageFiles(source, limit, folder, model, graph, stages, stage_models(graph, stages))
    return files.plan(notes, force=force, dry_run=dry_run)


def _with_small_tensors(model: Model) -> ModelProto:
    """The graph, with tensors in it that say shapes and axes."""
    source = model.source.path
    proto = parse(model.graph or b"", source)
    reader = Reader(source)
    small = {t.name: t for t in model.tensors if t.size * t.dtype.itemsize <= _SMALL_BYTES}
    for slot in proto.graph.initializer:
        if reader.storage(slot) == "external" and (tensor := small.get(slot.external_data[0].value)) is not None:
            clear(slot)
            slot.raw_data = tensor.array.tobytes()
    return proto


def _by_initializer(proto: ModelProto, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes by the name that the graph has for a tensor, of those that are not in it."""
    return {
        slot.name: sizes[slot.external_data[0].value]
        for slot in proto.graph.initializer
        if slot.data_location == slot.EXTERNAL
    }
