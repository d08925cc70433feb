"""What a network takes, and the arrays that a user has for it."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, printable
from shrink.export import Network
from shrink.export.onnxruntime_web import graph_inputs
from shrink.files import io_errors
from shrink.formats._onnx_proto import NAMED_DTYPES, parse

__all__ = ["AT_MOST", "Input", "Values", "inputs_of", "load_arrays", "samples_in"]

Array = NDArray[Any]

Values = Mapping[str, Array]
"""Arrays by the names of the network's inputs: those of one sample, the batch axis first."""

AT_MOST = 10_000
"""How many samples there can be."""


@dataclass(frozen=True)
class Input:
    """What the network takes: `shape` is that of one sample, the batch first."""

    name: str
    dtype: str
    shape: tuple[int, ...]


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


def samples_in(path: Path, inputs: Sequence[Input]) -> list[Values]:
    """The samples in an .npz, which has an array for each input, by its name, or in an .npy, for a network with one.

    Raises:
        BadInput: a file that holds something else.
        OutputError: the file is missing or cannot be read.
    """
    arrays = _by_input(path, inputs)
    parts = {i.name: _parts(arrays[i.name], i, path) for i in inputs}
    counts = {len(p) for p in parts.values()}
    if len(counts) != 1:
        said = ", ".join(f"{printable(name)} {len(p)}" for name, p in parts.items())
        raise BadInput(f"its arrays have different numbers of samples: {said}", file=path)
    count = counts.pop()
    if not 1 <= count <= AT_MOST:
        raise BadInput(f"it has {count} samples, not from 1 to {AT_MOST}", file=path)
    return [{name: p[number] for name, p in parts.items()} for number in range(count)]


def load_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz by their names, or that of an .npy under no name. Nothing in the file is run.

    Raises:
        BadInput: a file that holds something else.
        OutputError: the file is missing or cannot be read.
    """
    with io_errors(path):
        file = open(path, "rb")  # noqa: SIM115
    with file:
        try:
            found = np.load(file, allow_pickle=False)
            return {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
        except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            said = printable(str(error).partition("\n")[0] or type(error).__name__, at_most=200)
            raise BadInput(f"not arrays that NumPy wrote: {said}", file=path) from None


def _by_input(path: Path, inputs: Sequence[Input]) -> dict[str, Array]:
    found = load_arrays(path)
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
    values = np.ascontiguousarray(values)
    # The dots keep a single number an array.
    return [values[number, ...] for number in range(len(values))]
