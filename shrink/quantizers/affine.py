"""int8 and int4: (code − zero point) · scale, per channel or per block, chosen for least squared error.

For each group of weights several ranges are tried, symmetric ones around 0 and ones from the smallest to the
largest weight, each shrunk a little to trade the clipping of outliers for finer steps; the range with the least
squared error wins, and its scale is refitted by least squares to the codes it gave.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shrink.model import DTYPES, Quantized
from shrink.steps import Step, from_bfloat16, groups

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]

_SHRINK = {8: (1.0, 0.96, 0.92, 0.88), 4: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64)}
# The class of a layer and the number of its variable.
_KERAS_3 = re.compile(r"(?P<layer>[^/]*)/vars/(?P<number>[0-9]{1,9})$")
# Values coded at once: bounds the working memory to some tens of megabytes.
_BATCH = 1 << 20
# The least scale: smaller ones would lose precision as denormals. Weights this small become 0.
_LEAST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Affine:
    """`bits` 4 or 8; `block` values share a scale, or all of an output channel where it is 0.

    Error: half a step inside a group's range, the clipped part beyond it; see `bound`. With a scale per channel, the
    squared error of a channel is never above that of plain symmetric rounding with scale max |w| / (2^(bits−1) − 1);
    with blocks the scales are rounded to bfloat16, which costs up to 2⁻⁹ of a weight.
    """

    bits: int = field(metadata={"set_by": "the mode's name"})
    block: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits is 4 or 8, not {self.bits}")
        if type(self.block) is not int or not 0 <= self.block <= 1 << 30:
            raise ValueError(f"block is a whole number of weights up to 2^30, not {self.block!r}")

    @property
    def stores(self) -> str:
        return f"int{self.bits}"

    def quantize(self, name: str, x: F32) -> Quantized:
        axis = output_axis(name, x.shape)
        block = self.block or None
        # bfloat16 keeps float32's range; where there are many scales their bytes count.
        scale_type = "BF16" if block else "F32"
        scales, zeros, codes = self._encode(x, axis, block, scale_type)
        has_zero = bool(zeros.any())
        head = _round_scales(scales, scale_type)[1].tobytes() + (zeros.tobytes() if has_zero else b"")
        if self.bits == 4:
            padded = np.concatenate([codes, np.zeros(codes.size % 2, np.int8)]).view(np.uint8) & 15
            body = (padded[0::2] | padded[1::2] << 4).tobytes()
        else:
            body = codes.tobytes()
        params = {"bits": self.bits, "axis": axis, "block": block, "scale": scale_type, "zero": has_zero}
        return Quantized.of(name, DTYPES["F32"], x.shape, (Step("affine.1", params),), head + body)

    def bound(self, x: F32, quantized: Quantized) -> float:
        # A code is at most half a step off inside the range, and no range is shrunk below the last factor.
        largest = float(np.abs(x).max()) if x.size else 0.0
        shrink = _SHRINK[self.bits][-1]
        return float(largest * (1 - shrink + 1.02 / (2 ** (self.bits - 1) - 1)) + _LEAST_SCALE * 2**self.bits)

    def _encode(self, x: F32, axis: int | None, block: int | None, scale_type: str) -> tuple[F32, I8, I8]:
        rows, per_row, blocks = groups(x.shape, axis, block)
        matrix = (np.moveaxis(x, axis, 0) if axis is not None else x).reshape(rows, per_row)
        scales = np.zeros((rows, blocks), np.float32)
        zeros = np.zeros((rows, blocks), np.int8)
        codes = np.empty((rows, per_row), np.int8)
        for row, part, values, width in _batches(matrix, block or per_row):
            s, z, c = self._fit(values, scale_type)
            scales[row, part] = s.reshape(scales[row, part].shape)
            zeros[row, part] = z.reshape(zeros[row, part].shape)
            start = part.start * width
            codes[row, start : start + values.size // (row.stop - row.start)] = c.reshape(row.stop - row.start, -1)
        return scales.reshape(-1), zeros.reshape(-1), codes.reshape(-1)

    @np.errstate(over="ignore", invalid="ignore")
    def _fit(self, x: F32, scale_type: str) -> tuple[F32, I8, I8]:
        """Scale, zero point and codes of each row of `x`.

        A range that leaves float32 has an error that is not a number, and so is never better.
        """
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        smallest, largest = x.min(axis=1), x.max(axis=1)
        magnitude = np.maximum(-smallest, largest)
        # A pruned tensor keeps its zeros and its sparse storage: symmetric ranges only, where code 0 is 0.
        pruned = np.count_nonzero(x) < 0.5 * x.size
        smallest, largest = np.minimum(smallest, 0), np.maximum(largest, 0)
        best_error = np.full(len(x), np.inf)
        best_scale = np.zeros(len(x), np.float32)
        best_zero = np.zeros(len(x), np.int8)
        best_codes = np.zeros(x.shape, np.int8)
        for shrink in _SHRINK[self.bits]:
            for symmetric in (True,) if pruned else (True, False):
                span = magnitude / high if symmetric else (largest - smallest) / (high - low)
                scale = _round_scales(np.maximum(span * np.float32(shrink), _LEAST_SCALE), scale_type)[0]
                zero = np.zeros(len(x), np.float32)
                if not symmetric:
                    zero = np.clip(np.rint(low - smallest * np.float32(shrink) / scale), low, high)
                for refit in (False, True):
                    shifted = np.clip(np.rint(x / scale[:, None]), (low - zero)[:, None], (high - zero)[:, None])
                    if refit:
                        # Least squares: the scale that fits these codes best, then codes for that scale.
                        norm = np.einsum("ij,ij->i", shifted, shifted, dtype=np.float64)
                        fitted = np.einsum("ij,ij->i", shifted, x, dtype=np.float64) / np.maximum(norm, 1)
                        usable = (norm > 0) & (fitted >= _LEAST_SCALE)
                        scale = _round_scales(np.where(usable, fitted, scale).astype(np.float32), scale_type)[0]
                        shifted = np.clip(np.rint(x / scale[:, None]), (low - zero)[:, None], (high - zero)[:, None])
                    difference = x - (shifted * scale[:, None]).astype(np.float32)
                    error = np.einsum("ij,ij->i", difference, difference, dtype=np.float64)
                    better = error < best_error
                    best_error[better], best_scale[better] = error[better], scale[better]
                    best_zero[better] = zero[better].astype(np.int8)
                    best_codes[better] = (shifted[better] + zero[better, None]).astype(np.int8)
        return best_scale, best_zero, best_codes


def output_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """The axis of channels, along which weights differ most in size; None for a tensor without axes.

    The first: output channels of convolutions and dense layers in Chainer, ONNX and PyTorch, input channels of their
    deconvolutions. The last in Keras, whose weights are called `kernel:0`, or in Keras 3 by a layer's class and a
    number as in `layers/dense_1/vars/0`; in a depthwise kernel the one before it. An embedding has a row for each
    symbol.
    """
    if len(shape) < 2:
        return None
    keras3 = _KERAS_3.search(name)
    leaf = _keras_name(keras3["layer"], int(keras3["number"])) if keras3 else name.rsplit("/", 1)[-1]
    if "depthwise_kernel" in leaf:
        return max(len(shape) - 2, 0)
    return len(shape) - 1 if "kernel" in leaf else 0


def _keras_name(layer: str, number: int) -> str:
    """What Keras calls a weight that Keras 3 stores by its layer's class and a number."""
    if "depthwise" in layer or (layer.startswith("separable") and number == 0):
        return "depthwise_kernel"
    return "embeddings" if layer.startswith("embedding") else "kernel"


def _batches(matrix: F32, width: int) -> Iterator[tuple[slice, slice, F32, int]]:
    """The groups of a (rows, values) matrix, as (rows, blocks, values with a group per row, values per block).

    Whole blocks of many rows come together; the short last blocks come apart.
    """
    rows, per_row = matrix.shape
    if not matrix.size:
        return
    whole = per_row // width
    for part in _spans(whole, max(1, _BATCH // width)):
        for row in _spans(rows, max(1, _BATCH // (width * (part.stop - part.start)))):
            values = matrix[row, part.start * width : part.stop * width]
            yield row, part, np.ascontiguousarray(values).reshape(-1, width), width
    if per_row % width:
        yield slice(0, rows), slice(whole, whole + 1), np.ascontiguousarray(matrix[:, whole * width :]), width


def _spans(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _round_scales(scales: F32, scale_type: str) -> tuple[F32, NDArray[np.generic]]:
    """The scales as they will be decoded, and as they are stored."""
    if scale_type == "F32":
        return scales, scales.astype("<f4")
    bits = np.ascontiguousarray(scales, "<f4").view("<u4")
    # Round to nearest even on the upper 16 bits.
    upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return from_bfloat16(upper), upper


MODES = {"int8": Affine(bits=8, block=0), "int4": Affine(bits=4, block=32)}
