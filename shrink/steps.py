"""The decode steps: the closed, versioned list of ways in which stored bytes become values.

This is the reference decoder. It says what the bytes mean, in plain NumPy; any faster decoder must match it
bit for bit. A chain is zero or more byte steps (bytes -> bytes) and then one value step (bytes -> values):

    zstd.1      {"size": n}                     a Zstandard frame that holds n bytes
    deflate.1   {"size": n}                     a zlib stream (RFC 1950) that holds n bytes
    planes.1    {"width", "skip"}               skip bytes as they are, then byte planes: all first bytes of the
                                                items, all second bytes …; with wide items, a transposed matrix
    sparse.1    {"width", "count", "skip"}      skip bytes as they are, one mask bit per item, the items not zero
    rans.1      {"rows", "columns", "head", "width"}
                                                head bytes and rows · columns codes of width bytes, entropy-coded:
                                                shrink/entropy.py has the format
    trellis.1   {"rows", "columns", "head", "width"}
                                                head bytes as they are; rows · columns codes of width bytes become
                                                numbers of 2 bytes, as a machine's state has it: `trellised`
    cast.1      {"from": dtype}                 little-endian values of that dtype, cast to the tensor's
    fill.1      {"value": number}               no bytes: every value is that number, rounded to float32
    codebook.1  {"table", "scale"}              one byte per value: table[code] · scale, rounded once to float32
    affine.1    {"bits", "axis", "block", "scale", "zero"}
                                                (code − zero) · scale, a scale and zero per channel or block
    grid.1      {"scale", "view", "rows", "width"}
                                                code · column · row of a matrix, steps in half octaves: `_grid`

Every number in a chain may come from a hostile file: nothing is allocated before it is checked.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from shrink import entropy
from shrink.codebooks import TABLES
from shrink.errors import BadInput

__all__ = [
    "DTYPES",
    "TRELLIS",
    "Step",
    "decode",
    "decode_bytes",
    "from_bfloat16",
    "groups",
    "half_octaves",
    "matrix",
    "trellised",
]

Bytes = NDArray[np.uint8]
Array = NDArray[Any]

# The one dtype table: safetensors spelling -> NumPy, little-endian. BF16 has no NumPy type; a format that
# meets it widens it to float32, which is exact.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}

# A tensor larger than this is believed only when enough bytes stand behind it.
_BELIEVED_BYTES = 1 << 26
_BELIEVED_RATIO = 4096
_WIDEST_ITEM = 1 << 24
_LARGEST_NUMBER = 1e300
_AXES_AT_MOST = 16
_LARGEST_DIMENSION = (1 << 31) - 1


@dataclass(frozen=True)
class Step:
    """One decode step, `name` with its version, as in `affine.1`."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


# The machine of trellis.1, that of dependent quantization with eight states (ITU-T H.266, ISO/IEC 15938-17): the state
# after a code, by the state before it and the code's lowest bit.
TRELLIS: NDArray[np.uint8] = np.array([0, 2, 5, 7, 1, 3, 6, 4, 2, 0, 4, 6, 3, 1, 7, 5], np.uint8).reshape(8, 2)
TRELLIS.flags.writeable = False


def decode(payload: bytes, steps: Sequence[Step], shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> Array:
    """The values that `payload` stands for.

    Raises:
        BadInput: an unknown step or parameter, or bytes that do not give exactly the declared values.
    """
    if not steps or steps[-1].name not in _VALUE_STEPS:
        raise BadInput("its decode chain does not end in values", tensor=name)
    count = math.prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes > _BELIEVED_BYTES and nbytes > _BELIEVED_RATIO * len(payload):
        raise BadInput(f"{len(payload)} bytes claim to hold {nbytes}", tensor=name)
    data = decode_bytes(payload, steps[:-1], nbytes, name)
    step = steps[-1]
    values = _VALUE_STEPS[step.name](data, _Params(step, name), shape, name)
    if values.size != count:
        raise BadInput(f"{step.name} gives {values.size} values where {count} belong", tensor=name)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.ascontiguousarray(values.astype(dtype, copy=False)).reshape(shape)


def decode_bytes(payload: bytes, steps: Sequence[Step], nbytes: int, name: str) -> Bytes:
    """Run byte steps only. `nbytes` is the size of the decoded tensor, which bounds what a step may produce."""
    # Scales and zero points travel before the codes, so a step may give somewhat more bytes than the values take.
    most = 4 * nbytes + 65536
    data: Bytes = np.frombuffer(payload, np.uint8)
    for step in steps:
        function = _BYTE_STEPS.get(step.name)
        if function is None:
            raise BadInput(
                f"the decode step {step.name!r} is not known", tensor=name, hint="a newer shrink may know it"
            )
        data = function(data, _Params(step, name), most, name)
    return data


def _is_finite(value: Any) -> bool:
    # JSON's whole numbers have no limit: some do not fit a float.
    return type(value) in (int, float) and abs(value) <= _LARGEST_NUMBER


class _Params:
    """The parameters of one step, each taken once and checked; what is left over is refused by `done`."""

    def __init__(self, step: Step, tensor: str):
        self.step = step
        self.tensor = tensor
        self.left = dict(step.params)

    def bad(self, what: str) -> BadInput:
        return BadInput(f"{self.step.name}: {what}", tensor=self.tensor)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.left.pop(key, None)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(f"{key} is not a whole number from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        if self.left.get(key) is None:
            self.left.pop(key, None)
            return None
        return self.integer(key, low, high)

    def choice(self, key: str, choices: Sequence[Any]) -> Any:
        value = self.left.pop(key, None)
        if type(value) not in {type(c) for c in choices} or value not in choices:
            raise self.bad(f"{key} is not one of {', '.join(map(str, choices))}")
        return value

    def number(self, key: str) -> float:
        value = self.left.pop(key, None)
        if not _is_finite(value):
            raise self.bad(f"{key} is not a finite number")
        return float(value)

    def take(self, key: str) -> Any:
        return self.left.pop(key, None)

    def dimensions(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Other dimensions for as many values, `shape` itself where there are none."""
        view = self.left.pop(key, None)
        if view is None:
            view = list(shape)
        whole = isinstance(view, list) and all(type(n) is int and 0 <= n <= _LARGEST_DIMENSION for n in view)
        if not whole or len(view) > _AXES_AT_MOST or math.prod(view) != math.prod(shape):
            raise self.bad(f"{key} is not at most {_AXES_AT_MOST} dimensions of as many values")
        return tuple(view)

    def axes(self, key: str, count: int) -> tuple[int, ...]:
        """Some of `count` axes, in any order."""
        axes = self.left.pop(key, None)
        if not isinstance(axes, list) or not all(type(a) is int and 0 <= a < count for a in axes):
            raise self.bad(f"{key} are not axes of the {count}")
        if len(set(axes)) != len(axes):
            raise self.bad(f"{key} has an axis twice")
        return tuple(axes)

    def done(self) -> None:
        if self.left:
            raise self.bad(f"unknown parameter {sorted(self.left)[0]!r}")


def _zstd(data: Bytes, params: _Params, most: int, name: str) -> Bytes:
    size = params.integer("size", 0, most)
    params.done()
    if size == 0:
        return np.empty(0, np.uint8)
    frame = data.tobytes()
    try:
        # A frame need not say how much it holds, but must not say anything else than what is promised.
        if zstandard.frame_content_size(frame) not in (-1, size):
            raise params.bad(f"the frame does not hold the promised {size} bytes")
        decoder = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        out = decoder.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise params.bad(f"the compressed bytes are damaged: {error}") from None
    if len(out) != size:
        raise params.bad(f"the frame does not hold the promised {size} bytes")
    return np.frombuffer(out, np.uint8)


def _deflate(data: Bytes, params: _Params, most: int, name: str) -> Bytes:
    size = params.integer("size", 0, most)
    params.done()
    stream = zlib.decompressobj()
    try:
        out = stream.decompress(data.tobytes(), size + 1)
    except zlib.error as error:
        raise params.bad(f"the compressed bytes are damaged: {error}") from None
    # `eof` comes after the checksum: without it the stream was cut.
    if len(out) != size or not stream.eof or stream.unused_data:
        raise params.bad(f"the stream does not hold the promised {size} bytes")
    return np.frombuffer(out, np.uint8)


def _planes(data: Bytes, params: _Params, most: int, name: str) -> Bytes:
    width = params.integer("width", 2, _WIDEST_ITEM)
    skip = params.integer("skip", 0, data.size)
    params.done()
    if (data.size - skip) % width:
        raise params.bad(f"{data.size - skip} bytes are not whole items of {width}")
    items = np.ascontiguousarray(data[skip:].reshape(width, -1).T).reshape(-1)
    return np.concatenate([data[:skip], items]) if skip else items


def _sparse(data: Bytes, params: _Params, most: int, name: str) -> Bytes:
    width = params.integer("width", 1, 8)
    count = params.integer("count", 0, most)
    skip = params.integer("skip", 0, most)
    params.done()
    if skip + count * width > most:
        raise params.bad("it gives more bytes than the tensor holds")
    mask_bytes = -(-count // 8)
    if data.size < skip + mask_bytes:
        raise params.bad("the mask is cut off")
    bits = np.unpackbits(data[skip : skip + mask_bytes], bitorder="little")
    if bits[count:].any():
        raise params.bad("the mask marks items past the end")
    mask = bits[:count].view(bool)
    items = data[skip + mask_bytes :]
    present = int(np.count_nonzero(mask))
    if items.size != present * width:
        raise params.bad(f"the mask marks {present} items of {width} bytes, {items.size} bytes are there")
    out = np.zeros(skip + count * width, np.uint8)
    out[:skip] = data[:skip]
    out[skip:].reshape(count, width)[mask] = items.reshape(present, width)
    return out


def _rans(data: Bytes, params: _Params, most: int, name: str) -> Bytes:
    rows, columns, head = (params.integer(key, 0, most) for key in ("rows", "columns", "head"))
    layout = entropy.Layout(rows, columns, head, params.integer("width", 1, 2))
    params.done()
    if layout.size > most:
        raise params.bad("it gives more bytes than the tensor holds")
    try:
        return entropy.decode(data, layout)
    except entropy.Damaged as damage:
        raise params.bad(str(damage)) from None


def trellised(codes: NDArray[np.signedinteger]) -> NDArray[np.int32]:
    """What codes (rows, columns) of trellis.1 stand for, as many whole numbers.

    Each row starts in state 0. In an even state a code k stands for 2k, in an odd one for 2k − sgn(k), so even states
    have the even numbers and odd ones the odd numbers and 0; `TRELLIS` has the state after it.
    """
    after, odd = _trellis_eights()
    eights = np.packbits((codes & 1).astype(bool), axis=1, bitorder="little")
    states = np.zeros_like(eights)
    # Without rows, a hostile number of columns takes no time either.
    for column in range(1, eights.shape[1] if len(codes) else 0):
        states[:, column] = after[states[:, column - 1], eights[:, column - 1]]
    values: NDArray[np.int32] = 2 * codes.astype(np.int32)
    values -= np.sign(codes) * np.unpackbits(odd[states, eights], axis=1, count=codes.shape[1], bitorder="little")
    return values


@functools.cache
def _trellis_eights() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """By a state and the lowest bits of the next eight codes: the state after them, in which of them it is odd."""
    state, bits = np.indices((8, 256), np.uint8)
    odd = np.zeros((8, 256), np.uint8)
    for number in range(8):
        odd |= (state & 1) << number
        state = TRELLIS[state, bits >> number & 1]
    return state, odd


def _trellis(data: Bytes, params: _Params, most: int, name: str) -> Bytes:
    rows, columns, head = (params.integer(key, 0, most) for key in ("rows", "columns", "head"))
    width = params.integer("width", 1, 2)
    params.done()
    if head + 2 * rows * columns > most:
        raise params.bad("it gives more bytes than the tensor holds")
    if data.size != head + rows * columns * width:
        raise params.bad(f"{data.size} bytes are there where {head + rows * columns * width} belong")
    codes = np.frombuffer(data[head:].tobytes(), f"<i{width}").reshape(rows, columns)
    if ((codes < -16384) | (codes > 16383)).any():
        raise params.bad("a code is too large")
    return np.concatenate([data[:head], trellised(codes).astype("<i2").reshape(-1).view(np.uint8)])


def _cast(data: Bytes, params: _Params, shape: tuple[int, ...], name: str) -> Array:
    dtype = DTYPES[params.choice("from", tuple(DTYPES))]
    params.done()
    if data.size != math.prod(shape) * dtype.itemsize:
        raise params.bad(f"{data.size} bytes are there where {math.prod(shape) * dtype.itemsize} belong")
    return data.view(dtype)


def _fill(data: Bytes, params: _Params, shape: tuple[int, ...], name: str) -> Array:
    value = params.number("value")
    params.done()
    if data.size:
        raise params.bad(f"{data.size} bytes are there where none belong")
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    if not np.isfinite(rounded):
        raise params.bad("value is too large for float32")
    return np.full(math.prod(shape), rounded)


def _codebook(data: Bytes, params: _Params, shape: tuple[int, ...], name: str) -> Array:
    scale = params.number("scale")
    table = params.take("table")
    params.done()
    if isinstance(table, str) and table in TABLES:
        values = TABLES[table]
    elif isinstance(table, list) and 0 < len(table) <= 256 and all(map(_is_finite, table)):
        values = np.array(table, np.float64)
    else:
        raise params.bad("table is neither a known name nor a list of 1 to 256 finite numbers")
    if data.size and int(data.max()) >= values.size:
        raise params.bad(f"code {int(data.max())} is outside the table of {values.size}")
    with np.errstate(over="ignore"):
        scaled = (values * scale).astype(np.float32)
    if not np.isfinite(scaled).all():
        raise params.bad("the scale is too large for float32")
    return scaled[data]


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16, given as its bits, to float32, exactly: it is the upper half of one."""
    return (bits.astype("<u4") << 16).view("<f4")


def groups(shape: tuple[int, ...], axis: int | None, block: int | None) -> tuple[int, int, int]:
    """How affine.1 groups values: (rows, values per row, blocks per row).

    With an axis, each index along it is a row (the axis is moved to the front); without, all values are one
    row. A row is cut into blocks of `block` values, the last one short; without a block, a row is one block.
    """
    count = math.prod(shape)
    rows = shape[axis] if axis is not None else 1
    per_row = count // rows if rows else 0
    blocks = -(-per_row // block) if block else 1
    return rows, per_row, blocks


def _affine(data: Bytes, params: _Params, shape: tuple[int, ...], name: str) -> Array:
    bits = params.choice("bits", (4, 8))
    axis = params.optional_integer("axis", 0, len(shape) - 1)
    block = params.optional_integer("block", 1, 1 << 30)
    scale_type = params.choice("scale", ("F32", "BF16"))
    has_zero = params.choice("zero", (True, False))
    params.done()
    rows, per_row, blocks = groups(shape, axis, block)
    count, n_groups = rows * per_row, rows * blocks
    scale_bytes = n_groups * (4 if scale_type == "F32" else 2)
    zero_bytes = n_groups if has_zero else 0
    code_bytes = count if bits == 8 else -(-count // 2)
    if data.size != scale_bytes + zero_bytes + code_bytes:
        raise params.bad(f"{data.size} bytes are there where {scale_bytes + zero_bytes + code_bytes} belong")
    stored = data[:scale_bytes]
    scales = stored.view("<f4") if scale_type == "F32" else from_bfloat16(stored.view("<u2"))
    if not np.isfinite(scales).all():
        raise params.bad("a scale is not finite")
    zeros = data[scale_bytes : scale_bytes + zero_bytes].view(np.int8)
    codes = data[scale_bytes + zero_bytes :]
    if bits == 4:
        nibbles = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
        if nibbles[count:].any():
            raise params.bad("there are codes past the end")
        # Sign extension of four bits: 8…15 stand for −8…−1.
        codes = (nibbles[:count] ^ 8) - np.uint8(8)
    span = np.full(blocks, block or per_row, np.intp)
    span[-1:] = per_row - (blocks - 1) * (block or per_row)
    offsets = codes.view(np.int8).reshape(rows, per_row).astype(np.float32)
    if has_zero:
        offsets -= np.repeat(zeros.reshape(rows, blocks), span, axis=1)
    with np.errstate(over="ignore"):
        offsets *= np.repeat(scales.reshape(rows, blocks), span, axis=1)
    if not np.isfinite(offsets).all():
        raise params.bad("a scale is too large for float32")
    if axis is None:
        return offsets.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return np.moveaxis(offsets.reshape(moved), 0, axis)


def matrix(view: Sequence[int], axes: Sequence[int]) -> tuple[int, int]:
    """How grid.1 sees a tensor with the dimensions `view`: (rows, columns), where `axes` are those of the rows."""
    others = (n for axis, n in enumerate(view) if axis not in axes)
    return math.prod(view[axis] for axis in axes), math.prod(others)


def half_octaves(exponents: NDArray[np.signedinteger]) -> NDArray[np.float64]:
    """2^(k/2) of each exponent k, in float64: 1 or √2 times a power of two."""
    k = exponents.astype(np.int32)
    powers: NDArray[np.float64] = np.ldexp(np.where(k & 1, 1.4142135623730951, 1.0), k >> 1)
    return powers


def _grid(data: Bytes, params: _Params, shape: tuple[int, ...], name: str) -> Array:
    """Codes of a matrix whose rows and columns have steps of half octaves.

    The data are an exponent per row and per column, one signed byte each, then the codes. The tensor, seen with the
    dimensions `view`, has the axes `rows`, in this order, as the matrix's rows and the others, in order, as its
    columns. Column j is worth f32(2^(exponent / 2)), row i f32(scale · 2^(exponent / 2)), a value
    f32(f32(code · column) · row).
    """
    scale = params.number("scale")
    width = params.choice("width", (1, 2))
    view = params.dimensions("view", shape)
    axes = params.axes("rows", len(view))
    params.done()
    if scale <= 0:
        raise params.bad("scale is not above 0")
    rows, columns = matrix(view, axes)
    size = rows + columns + rows * columns * width
    if data.size != size:
        raise params.bad(f"{data.size} bytes are there where {size} belong")
    codes = np.frombuffer(data[rows + columns :].tobytes(), f"<i{width}").reshape(rows, columns)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        row = (scale * half_octaves(data[:rows].view(np.int8))).astype(np.float32)
        values = codes.astype(np.float32)
        values *= half_octaves(data[rows : rows + columns].view(np.int8)).astype(np.float32)
        values *= row[:, None]
    if not np.isfinite(values).all():
        raise params.bad("the scale is too large for float32")
    order = (*axes, *(axis for axis in range(len(view)) if axis not in axes))
    back = tuple(order.index(axis) for axis in range(len(view)))
    out: Array = values.reshape([view[axis] for axis in order]).transpose(back).reshape(shape)
    return out


_BYTE_STEPS: dict[str, Callable[[Bytes, _Params, int, str], Bytes]] = {
    "zstd.1": _zstd,
    "deflate.1": _deflate,
    "planes.1": _planes,
    "sparse.1": _sparse,
    "rans.1": _rans,
    "trellis.1": _trellis,
}
_VALUE_STEPS: dict[str, Callable[[Bytes, _Params, tuple[int, ...], str], Array]] = {
    "cast.1": _cast,
    "fill.1": _fill,
    "codebook.1": _codebook,
    "affine.1": _affine,
    "grid.1": _grid,
}
