"""The inputs that every variant is run on: seeded ones, or the user's own with their labels."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.bench.plan import Inputs, Values
from shrink.errors import BadInput, UsageError, printable
from shrink.export import Network
from shrink.export.onnxruntime_web import graph_inputs
from shrink.files import io_errors
from shrink.formats._onnx_proto import NAMED_DTYPES, parse
from shrink.site import seeded_input

__all__ = ["Input", "Samples", "inputs_of", "samples"]

Array = NDArray[Any]
_AT_MOST = 10_000


@dataclass(frozen=True)
class Input:
    """What the network takes: `shape` is that of one sample, the batch first."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Samples:
    """The samples, in order; `labels` has a row for each, in any shape, or is None. `source` is for the report."""

    values: tuple[Values, ...]
    labels: Array | None
    source: str


def inputs_of(network: Network) -> list[Input]:
    """The network's inputs. Raises BadInput where one is not of numbers."""
    path = network.model.source.path
    found = graph_inputs(parse(network.model.graph or b"", path))
    out = []
    for info, shape in zip(found, network.input_shapes, strict=True):
        dtype = NAMED_DTYPES.get(info.type.tensor_type.elem_type)
        if dtype is None:
            raise BadInput(f"its input {printable(info.name)} is not of numbers", file=path)
        out.append(Input(info.name, dtype.name, shape))
    return out


def samples(inputs: Sequence[Input], asked: Inputs) -> Samples:
    """What `asked` says, made to fit the network's inputs.

    Raises:
        UsageError: labels without data, a count that is none.
        BadInput: a file that holds something else.
        OutputError: a file is missing or cannot be read.
    """
    if asked.data is None:
        if asked.labels is not None:
            raise UsageError("--labels belong to --data", file=asked.labels)
        if not 1 <= asked.count <= _AT_MOST:
            raise UsageError(f"{asked.count} inputs are not from 1 to {_AT_MOST}")
        values = [
            {i.name: seeded_input(seed, n, i.shape, i.dtype) for n, i in enumerate(inputs)}
            for seed in range(asked.count)
        ]
        return Samples(tuple(values), None, "seeded")
    arrays = _arrays(asked.data, inputs)
    parts = {i.name: _parts(arrays[i.name], i, asked.data) for i in inputs}
    counts = {len(p) for p in parts.values()}
    if len(counts) != 1:
        said = ", ".join(f"{printable(name)} {len(p)}" for name, p in parts.items())
        raise BadInput(f"its arrays have different numbers of samples: {said}", file=asked.data)
    count = counts.pop()
    if not 1 <= count <= _AT_MOST:
        raise BadInput(f"it has {count} samples, not from 1 to {_AT_MOST}", file=asked.data)
    labels = None if asked.labels is None else _labels(asked.labels, count, max([1, *map(_batch, inputs)]))
    values = [{name: p[number] for name, p in parts.items()} for number in range(count)]
    return Samples(tuple(values), labels, asked.data.name)


def _batch(wanted: Input) -> int:
    return wanted.shape[0] if wanted.shape else 1


def _arrays(path: Path, inputs: Sequence[Input]) -> dict[str, Array]:
    found = _loaded(path)
    names = [i.name for i in inputs]
    if all(name in found for name in names):
        return found
    if len(found) == 1 and len(names) == 1:
        return {names[0]: next(iter(found.values()))}
    missing = next(name for name in names if name not in found)
    raise BadInput(
        f"it has no array for the input {printable(missing)}",
        file=path,
        hint="give one array for each input, by its name: " + ", ".join(map(printable, names)),
    )


def _loaded(path: Path) -> dict[str, Array]:
    """The arrays of an .npz by their names, or that of an .npy under no name."""
    with io_errors(path):
        file = open(path, "rb")  # noqa: SIM115
    with file:
        try:
            found = np.load(file, allow_pickle=False)
            return {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
        except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            raise BadInput(f"not arrays that NumPy wrote: {_said(error)}", file=path) from None


def _parts(array: Array, wanted: Input, path: Path) -> list[Array]:
    """The array cut into samples of the input's shape: its first axis counts samples, or rows of batches."""

    def refused(what: str) -> BadInput:
        return BadInput(what, file=path, tensor=wanted.name)

    if array.dtype.kind not in "fiub":
        raise refused(f"it holds values of type {array.dtype}")
    shape = wanted.shape
    if array.shape == shape:
        array = array[np.newaxis]
    elif array.shape[1:] == shape[1:] and array.ndim and shape and len(array) % shape[0] == 0:
        array = array.reshape(-1, *shape)
    elif array.shape[1:] != shape:
        raise refused(f"its shape is {list(array.shape)}, the network takes {list(shape)}")
    with np.errstate(over="ignore", invalid="ignore"):
        values = array.astype(wanted.dtype)
    if array.dtype.kind == "f" and not np.all(np.isfinite(values)):
        raise refused("it holds NaN or infinity")
    if np.dtype(wanted.dtype).kind in "iu" and not np.array_equal(values, array):
        raise refused(f"its values are not all of type {wanted.dtype}")
    return list(np.ascontiguousarray(values))


def _labels(path: Path, count: int, batch: int) -> Array:
    labels = next(iter(_loaded(path).values()), np.zeros(0))
    if labels.dtype.kind not in "iu" or labels.ndim < 1:
        raise BadInput("labels are one array of integers", file=path, hint="numpy.save('y.npy', labels)")
    if len(labels) != count * batch:
        raise BadInput(f"it has {len(labels)} labels, there are {count * batch} inputs", file=path)
    if labels.size and labels.min() < 0:
        raise BadInput("a label is negative", file=path)
    out: Array = labels.reshape(count, -1)
    return out


def _said(error: BaseException) -> str:
    return printable(str(error).partition("\n")[0] or type(error).__name__, at_most=200)
