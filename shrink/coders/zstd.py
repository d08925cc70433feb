"""Packing with Zstandard: byte planes for wide items, a mask for sparse ones, whatever comes out smallest."""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

from shrink.model import Quantized
from shrink.steps import DTYPES, Step, groups

__all__ = ["pack"]

# A mask costs a bit per item; with fewer zeros than this it is not worth trying.
_ZEROS_WORTH_A_MASK = 0.125


def pack(quantized: Quantized, level: int) -> Quantized:
    """The same tensor in fewer bytes, or as it is when packing gains nothing.

    The byte steps that undo the packing go in front of the tensor's own chain, which must be a bare value step.
    """
    payload = quantized.payload
    width, skip = _items(quantized)
    data = np.frombuffer(payload, np.uint8)
    candidates: list[tuple[bytes, tuple[Step, ...]]] = [(payload, ()), _compressed(data, width, skip, (), level)]
    if width:
        items = data[skip:].reshape(-1, width)
        present = items[:, 0] != 0 if width == 1 else items.any(axis=1)
        if np.count_nonzero(present) < (1 - _ZEROS_WORTH_A_MASK) * len(items):
            mask = np.packbits(present, bitorder="little")
            packed = np.concatenate([data[:skip], mask, items[present].reshape(-1)])
            sparse = (Step("sparse.1", {"width": width, "count": len(items), "skip": skip}),)
            candidates += [(packed.tobytes(), sparse), _compressed(packed, width, skip + mask.size, sparse, level)]
    best, steps = min(candidates, key=lambda c: len(c[0]))
    return Quantized.of(
        quantized.name, quantized.dtype, quantized.shape, (*steps, *quantized.steps), best, quantized.role
    )


def _items(quantized: Quantized) -> tuple[int, int]:
    """The bytes of one stored value, 0 where values share bytes, and how many bytes stand before the first."""
    (step,) = quantized.steps
    if step.name == "cast.1":
        return DTYPES[step.params["from"]].itemsize, 0
    if step.name == "codebook.1":
        return 1, 0
    rows, _, blocks = groups(quantized.shape, step.params["axis"], step.params["block"])
    per_group = (4 if step.params["scale"] == "F32" else 2) + (1 if step.params["zero"] else 0)
    return (1 if step.params["bits"] == 8 else 0), rows * blocks * per_group


def _compressed(
    data: NDArray[np.uint8], width: int, skip: int, then: tuple[Step, ...], level: int
) -> tuple[bytes, tuple[Step, ...]]:
    if width > 1 and data.size > skip:
        planes = np.ascontiguousarray(data[skip:].reshape(-1, width).T).reshape(-1)
        data = np.concatenate([data[:skip], planes]) if skip else planes
        then = (Step("planes.1", {"width": width, "skip": skip}), *then)
    frame = zstandard.ZstdCompressor(level=level).compress(data.tobytes())
    return frame, (Step("zstd.1", {"size": data.size}), *then)
