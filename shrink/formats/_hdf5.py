"""Foreign HDF5 files, for the formats that are made of them. The library runs in a child, see `_hdf5_process`."""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shrink.errors import BadInput, printable
from shrink.files import io_errors
from shrink.formats._hdf5_child import DEFLATE_RATIO, FILL_BYTES_AT_MOST, Array, Attribute, numbers
from shrink.formats._hdf5_process import CRASHED, Child, Crash, Gone, Refused, started, used
from shrink.model import check_name, dtype_code

__all__ = [
    "SIGNATURE",
    "Attribute",
    "Dataset",
    "File",
    "holds_keras",
    "holds_keras3",
    "is_attribute",
    "is_hdf5",
    "opened",
]

SIGNATURE = b"\x89HDF\r\n\x1a\n"

# What a request may cost: a fixed share, and more for many values.
_CPU_S = 20.0
_WALL_S = 60.0
_CPU_BYTES_PER_S = 4 << 20
_WALL_BYTES_PER_S = 1 << 20
_MEMORY_BYTES = 512 << 20


@dataclass(frozen=True)
class Dataset:
    """`dtype` is little-endian. Both are None for an HDF5 "empty" dataset, which has no values."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None


_Identity = tuple[int, int, int, int]


def _identity(path: str, shown: Path) -> _Identity:
    with io_errors(shown):
        facts = os.stat(path)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


class File:
    """A foreign HDF5 file: its index, and its values when asked for.

    `groups` maps the path of every group ("" is the root) to its attributes; `datasets` are in the order of a walk
    by name. Names have no leading slash.

    Raises:
        BadInput: the file is malformed, or holds what a saved model has no use for.
        OutputError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._where = os.path.abspath(path)
        self._identity = _identity(self._where, path)
        self.size_bytes = self._identity[2]
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._ending: weakref.finalize[Any, Any] | None = None
        try:
            self.groups, self.datasets = self._index(self._ask({"do": "index"}, bytearray()))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child. It starts again when values are asked for."""
        if self._ending is not None:
            self._ending()
        self._child = self._ending = None

    def load(self, dataset: Dataset) -> Array:
        """The values of a dataset of this file, in C order.

        Raises:
            BadInput: they are damaged, or the file has changed.
        """
        if dataset.dtype is None or dataset.shape is None:
            raise BadInput("it has no values", file=self.path, tensor=dataset.name)
        try:
            data = bytearray(math.prod(dataset.shape) * dataset.dtype.itemsize)
        except (MemoryError, OverflowError):
            raise BadInput("it does not fit into memory", file=self.path, tensor=dataset.name) from None
        self._ask({"do": "values", "name": dataset.name}, data, dataset.name)
        if dataset.dtype.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
            raise BadInput("its truth values are neither 0 nor 1", file=self.path, tensor=dataset.name)
        return np.frombuffer(data, dataset.dtype).reshape(dataset.shape)

    def bare_groups(self) -> list[str]:
        """Groups with nothing in them, which the paths of datasets do not bring back."""
        above = {name.rpartition("/")[0] for name in (*self.groups, *(d.name for d in self.datasets))}
        return [name for name in self.groups if name and name not in above]

    def _ask(self, request: Mapping[str, object], into: bytearray, name: str | None = None) -> Any:
        costs = {"cpu_s": _CPU_S + len(into) / _CPU_BYTES_PER_S, "memory_bytes": _MEMORY_BYTES + 3 * len(into)}
        try:
            while True:
                with contextlib.suppress(Gone):
                    wall_s = _WALL_S + len(into) / _WALL_BYTES_PER_S
                    return self._alive().ask({**request, **costs}, into=into, wall_s=wall_s)
        except Refused as answer:
            which = printable(answer.name) if answer.name is not None else name
            raise BadInput(printable(answer.what), file=self.path, tensor=which) from None
        except Crash as crash:
            raise BadInput(str(crash), file=self.path, tensor=name) from None

    def _alive(self) -> Child:
        with self._lock:
            child = self._child
            if child is None or child.closed or child.owner != os.getpid():
                self.close()
                if _identity(self._where, self.path) != self._identity:
                    raise BadInput("the file has changed since its index was read", file=self.path)
                with io_errors(self.path):
                    self._child = child = started(self._where, self.size_bytes)
                self._ending = weakref.finalize(self, child.close)
            else:
                self._unchanged()
                used(child)
            return child

    def _unchanged(self) -> None:
        """Refuse a file that was written to while the child has it open. One that was replaced is still there."""
        with contextlib.suppress(OSError):
            facts = os.stat(self._where)
            now = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if now[:2] == self._identity[:2] and now != self._identity:
                raise BadInput("the file has changed since its index was read", file=self.path)

    def _index(self, said: Any) -> tuple[dict[str, dict[str, Attribute]], tuple[Dataset, ...]]:
        """The index as the child said it, believed only after the same checks that the file gets."""
        crashed = BadInput(CRASHED, file=self.path)
        if not (isinstance(said, dict) and isinstance(said.get("groups"), list)):
            raise crashed
        groups: dict[str, dict[str, Attribute]] = {}
        datasets: dict[str, Dataset] = {}
        try:
            for name, attributes in said["groups"]:
                if not isinstance(name, str) or name in groups or not isinstance(attributes, dict):
                    raise crashed
                if name:
                    check_name(name, file=self.path)
                for attribute, value in attributes.items():
                    check_name(attribute, file=self.path)
                    if not is_attribute(value):
                        raise crashed
                groups[name] = attributes
            for name, code, shape in said["datasets"]:
                if not isinstance(name, str) or name in groups or name in datasets:
                    raise crashed
                check_name(name, file=self.path)
                datasets[name] = self._dataset(name, code, shape, crashed)
        except (TypeError, ValueError, KeyError):
            raise crashed from None
        if "" not in groups:
            raise crashed
        return groups, tuple(datasets.values())

    def _dataset(self, name: str, code: Any, shape: Any, crashed: BadInput) -> Dataset:
        if code is None and shape is None:
            return Dataset(name, None, None)
        if not isinstance(code, str) or not isinstance(shape, list) or len(shape) > 32:
            raise crashed
        if not all(type(n) is int and n >= 0 for n in shape):
            raise crashed
        dtype = np.dtype(code)
        dtype_code(dtype, file=self.path, tensor=name)
        nbytes = math.prod(shape) * dtype.itemsize
        # A length of zero makes any shape empty, which NumPy does not believe beyond what it can count.
        if math.prod(n for n in shape if n) * dtype.itemsize >= 1 << 62:
            raise BadInput("its shape is not valid", file=self.path, tensor=name)
        if nbytes > DEFLATE_RATIO * self.size_bytes + FILL_BYTES_AT_MOST:
            raise BadInput(f"{self.size_bytes} bytes claim to hold {nbytes}", file=self.path, tensor=name)
        return Dataset(name, dtype, tuple(shape))


def is_attribute(value: object) -> bool:
    if isinstance(value, str):
        return True
    if isinstance(value, list):
        return all(isinstance(v, str) for v in value)
    return isinstance(value, dict) and numbers(value) is not None


def is_hdf5(head: bytes) -> bool:
    return head.startswith(SIGNATURE)


# What was looked at last, by path: sniffing asks two formats about a file and then reads it, with one child for all.
_LOOKED_AT_MOST = 4
_looked_lock = threading.Lock()
_looked: dict[str, tuple[_Identity, File | BadInput]] = {}


def opened(path: Path) -> File:
    """The file at `path`, from the last look at it where there was one.

    Raises:
        BadInput: see `File`.
        OutputError: it cannot be read.
        MissingDependency: h5py is not installed.
    """
    # Not kept: whoever reads the file owns the child from now on, and it ends with the model.
    found = _look(path, keep=False)
    if isinstance(found, BadInput):
        raise found
    return found


def holds_keras(path: Path) -> bool:
    """Whether the HDF5 file at `path` is a model of Keras 1 or 2. False for a damaged file: `opened` will refuse it."""
    found = _look(path, keep=True)
    if isinstance(found, BadInput):
        return False
    return _is_keras(found)


def _is_keras(file: File) -> bool:
    return "model_weights" in file.groups or any(a in ("layer_names", "layer_names0") for a in file.groups[""])


def holds_keras3(path: Path) -> bool:
    """Whether the HDF5 file at `path` holds Keras 3 weights: numbered variables, and no values but in a `vars`."""
    found = _look(path, keep=True)
    if isinstance(found, BadInput) or _is_keras(found):
        return False
    places = [dataset.name.rpartition("/") for dataset in found.datasets]
    return all(above.rpartition("/")[2] == "vars" for above, _, _ in places) and any(
        re.fullmatch("[0-9]+", name) for _, _, name in places
    )


def _look(path: Path, *, keep: bool) -> File | BadInput:
    where = os.path.abspath(path)
    identity = _identity(where, path)
    with _looked_lock:
        known = _looked.pop(where, None)
    found: File | BadInput
    if known is not None and known[0] == identity:
        found = known[1]
    else:
        try:
            found = File(path)
        except BadInput as error:
            found = error.with_traceback(None)
    if keep:
        with _looked_lock:
            _looked[where] = (identity, found)
            while len(_looked) > _LOOKED_AT_MOST:
                del _looked[next(iter(_looked))]
    return found
