"""Tensors, encoded tensors, and the model that holds them. No file is touched here.

A `Tensor` knows its name, dtype and shape and reads its values on demand, so a model of any size costs
memory for one tensor at a time. A `Quantized` holds the bytes that stand for a tensor and the steps that
turn them back into values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput
from shrink.steps import DTYPES, Step, decode

__all__ = [
    "DTYPES",
    "Entry",
    "Model",
    "Quantized",
    "Role",
    "Source",
    "Tensor",
    "check_name",
    "check_shape",
    "dtype_code",
    "plain_values",
]

Array = NDArray[Any]
Role = Literal["weight", "state"]
"""`state` is what training needs and a browser does not: optimizer moments, iterator positions."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MAX_NAME_CHARACTERS = 1024


def check_name(name: str, *, file: object = None) -> None:
    """Refuse a tensor name that could harm whoever prints it or makes a path of it.

    Raises:
        BadInput: empty, longer than 1024 characters, with a control character, absolute, or with a `..` part.
    """
    if not name:
        raise BadInput("a tensor has an empty name", file=file)
    if len(name) > MAX_NAME_CHARACTERS:
        raise BadInput(f"the name has {len(name)} characters, more than {MAX_NAME_CHARACTERS}", file=file, tensor=name)
    if _CONTROL.search(name):
        raise BadInput("the name holds control characters", file=file, tensor=name)
    if ".." in re.split(r"[/\\]", name) or name[0] in "/\\":
        raise BadInput("the name climbs out of its folder", file=file, tensor=name)


def check_shape(shape: tuple[int, ...], *, file: object = None, tensor: str | None = None) -> None:
    """Refuse a shape that NumPy could not make an array of, before anything is computed with it.

    Raises:
        BadInput: more than 32 dimensions, a negative one, or 2⁴⁸ values and more.
    """
    # Empty dimensions count as 1: NumPy minds the others even where there are no values.
    if len(shape) > 32 or any(n < 0 for n in shape) or math.prod(n or 1 for n in shape) >= 1 << 48:
        raise BadInput("its shape is not one that an array can have", file=file, tensor=tensor)


def dtype_code(dtype: np.dtype[Any], *, file: object = None, tensor: str | None = None) -> str:
    """The table's spelling of a dtype, whatever its byte order. Raises BadInput when it is not in the table."""
    code = _CODES.get(dtype.newbyteorder("<"))
    if code is None:
        raise BadInput(f"values of type {dtype} are not supported", file=file, tensor=tensor)
    return code


@dataclass(frozen=True)
class Tensor:
    """Named values, read when asked for: `array` is little-endian, C order and read-only."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    load: Callable[[], Array] = field(repr=False, compare=False)
    role: Role = "weight"

    @classmethod
    def of(cls, name: str, values: Array, role: Role = "weight") -> Tensor:
        """A tensor around values that are already in memory."""
        dtype_code(values.dtype, tensor=name)
        little = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
        return cls(name, little.dtype, little.shape, lambda: little, role)

    @property
    def array(self) -> Array:
        values = self.load()
        if values.dtype != self.dtype or values.shape != self.shape:
            raise BadInput(
                f"the file holds {values.dtype}{values.shape}, its index says {self.dtype}{self.shape}",
                tensor=self.name,
            )
        view: Array = values.view()
        view.flags.writeable = False
        return view

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Quantized:
    """A tensor as bytes plus the steps, in decoding order, that give its values back.

    `dtype` and `shape` are those of the decoded values; `size_bytes` is the length of the payload.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    steps: tuple[Step, ...]
    size_bytes: int
    load: Callable[[], bytes] = field(repr=False, compare=False)
    role: Role = "weight"

    @classmethod
    def of(
        cls,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        steps: tuple[Step, ...],
        payload: bytes,
        role: Role = "weight",
    ) -> Quantized:
        """An encoded tensor whose payload is already in memory."""
        return cls(name, dtype, shape, steps, len(payload), lambda: payload, role)

    @property
    def payload(self) -> bytes:
        return self.load()

    @property
    def array(self) -> Array:
        """The decoded values, by the reference decoder.

        Raises:
            BadInput: the payload does not decode to exactly the declared shape.
        """
        values = decode(self.payload, self.steps, self.shape, self.dtype, self.name)
        values.flags.writeable = False
        return values

    def dequantize(self) -> Array:
        return self.array

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Entry = Tensor | Quantized


def plain_values(entry: Entry) -> Array:
    """The values in the dtype they are stored in: a float16 tensor stays float16, codes become float32."""
    if isinstance(entry, Quantized) and entry.steps[-1].name == "cast.1":
        stored = DTYPES.get(str(entry.steps[-1].params.get("from")))
        if stored is None:
            raise BadInput("cast.1: from is not a known type", tensor=entry.name)
        return decode(entry.payload, entry.steps, entry.shape, stored, entry.name)
    return entry.array


@dataclass(frozen=True)
class Source:
    """Where a model came from. `path` is for messages and never written into a file."""

    format: str
    path: Path
    size_bytes: int


@dataclass(frozen=True)
class Model:
    """Tensors in file order, the ONNX graph when there is one, and what else the format must have back.

    `attributes` are the format's own (a Keras configuration, a WebDNN descriptor's backend …), text by text.
    `graph` is a serialized ONNX ModelProto whose initializers hold no data.
    """

    tensors: tuple[Entry, ...]
    source: Source
    attributes: Mapping[str, str] = field(default_factory=dict)
    graph: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for tensor in self.tensors:
            check_name(tensor.name, file=self.source.path)
            if tensor.name in seen:
                raise BadInput("two tensors have this name", file=self.source.path, tensor=tensor.name)
            seen.add(tensor.name)

    def __getitem__(self, name: str) -> Entry:
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)
