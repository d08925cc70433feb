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
For the same reason weights stay in 8 bits in its memory: so they are written where one asks for that.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from shrink.errors import BadInput, UsageError
from shrink.files import atomic_file, file_size, read_all
from shrink.formats._onnx_proto import AT_MOST_BYTES, NAMED_DTYPES, Names, Reader, clear, inner_tensors, name_of, parse
from shrink.formats._onnx_write import Writer, check_dequantizes
from shrink.model import Entry, Model, Source

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

NAME = "onnx"
SUFFIX = ".onnx"
HOLDS = frozenset({"float32", "float16", "eightbit", "int8", "int4"})


def sniff(path: Path, head: bytes) -> bool:
    return bool(head) and path.suffix.lower() == SUFFIX


def read(path: Path) -> Model:
    """The initializers as tensors, and the graph.

    Raises:
        BadInput: not an ONNX model, data that does not fit the dims, or external data that lies elsewhere.
        OutputError: the file, or one with external data, cannot be read.
        MissingDependency: the package onnx is not installed.
    """
    return from_proto(parse(read_all(path, at_most=AT_MOST_BYTES), path), path)


def from_proto(proto: ModelProto, path: Path) -> Model:
    """The same for a model that is already parsed; its data is taken out of it. External data lies beside `path`."""
    names = Names(proto, path)
    reader = Reader(path)
    for tensor in inner_tensors(proto):
        reader.embed(tensor)
    taken = set(names.initializers)
    tensors = []
    for initializer in proto.graph.initializer:
        if initializer.data_type in NAMED_DTYPES:
            tensors.append(reader.take(initializer, _tensor_name(initializer.name, taken)))
            taken.add(tensors[-1].name)
        else:
            reader.embed(initializer)
    size = (file_size(path) if path.is_file() else 0) + sum(reader.external_sizes.values())
    return Model(tuple(tensors), Source(NAME, path, size), graph=proto.SerializeToString(deterministic=True))


def _tensor_name(initializer: str, taken: set[str]) -> str:
    """What shrink calls an initializer: exporters begin names with a slash, which is no relative name."""
    if not initializer.startswith("/"):
        return initializer
    name, number = initializer.lstrip("/"), 0
    while name in taken:
        number += 1
        name = f"{initializer.lstrip('/')}.{number}"
    return name


def check_keeps_quantized(model: Model) -> None:
    """Whether `write` could keep weights of this model in 8 bits.

    Raises:
        UsageError: the model has no graph.
        BadInput: its opset is below 13.
        MissingDependency: the package onnx is not installed.
    """
    check_dequantizes(_graph_of(model), model.source.path)


def write(
    model: Model, entries: Iterable[Entry], path: Path, level: int | None, *, keep_quantized: bool = False
) -> dict[str, int]:
    """An ONNX file with the tensors in it, at most 2 GiB; each computes to the very values of `Entry.array`.

    A tensor that would not get smaller by it is stored as its values. `level` is not used: ONNX does not compress.
    `keep_quantized`: weights of 8 bits with a scale per channel stay so in the memory of a runtime, which expands them
    by DequantizeLinear whenever it runs.

    Raises:
        UsageError: the model has no graph.
        BadInput: entries and graph do not fit together, the opset is below 7 (13 for `keep_quantized`), or the file
            would exceed 2 GiB.
        MissingDependency: the package onnx is not installed.
    """
    source = model.source.path
    proto = _graph_of(model)
    if keep_quantized:
        check_dequantizes(proto, source)
    names = Names(proto, source)
    slots = _slots(proto, source)
    with atomic_file(path) as out, tempfile.TemporaryFile(dir=path.parent) as spool:
        writer = Writer(proto, names, spool, source, keeps=keep_quantized)
        stored = {}
        for entry in entries:
            slot = slots.pop(entry.name, None)
            if slot is not None:
                start = spool.tell()
                writer.add(slot, entry)
                stored[entry.name] = spool.tell() - start
            elif entry.role == "weight":
                raise BadInput("the graph has no initializer for it", file=source, tensor=entry.name)
        for name in slots:
            raise BadInput("the graph needs it, but the model does not have it", file=source, tensor=name)
        writer.finish(out)
    return stored


def _graph_of(model: Model) -> ModelProto:
    if model.graph is None:
        raise UsageError("an ONNX file needs a graph; this model has only weights", file=model.source.path)
    return parse(model.graph, model.source.path)


def _slots(proto: ModelProto, source: Path) -> dict[str, TensorProto]:
    """The initializers without data, by the tensor that belongs there; they are removed from the graph."""
    slots: dict[str, TensorProto] = {}
    numbers = []
    reader = Reader(source)
    for number, initializer in enumerate(proto.graph.initializer):
        storage, count = reader.storage(initializer), math.prod(reader.shape(initializer))
        if storage == "external" or (storage is None and count):
            slot = type(initializer)()
            slot.CopyFrom(initializer)
            name = slot.external_data[0].value if len(slot.external_data) else slot.name
            if slot.data_type not in NAMED_DTYPES or name in slots:
                raise BadInput("the graph's mark for its data is not valid", file=source, tensor=slot.name)
            clear(slot)
            slots[name] = slot
            numbers.append(number)
    for tensor in inner_tensors(proto):
        if reader.storage(tensor) == "external":
            raise BadInput("the graph refers to data outside", file=source, tensor=name_of(tensor), hint="refused")
    for number in reversed(numbers):
        del proto.graph.initializer[number]
    return slots
