"""Packing an encoded tensor: a few arrangements of its bytes, two entropy coders, whatever comes out smallest.

Weights have no repetitions to find; what counts is how well a coder follows their distribution. Zstandard is
quick. Deflate, as libdeflate writes it, places the borders of its blocks better and is 0.3 to 1.5 % smaller on
trained weights, but slower to write: it is tried on small tensors, or on all where a high level says to take time.
Codes of a grid have a coder of their own, rans.1, where wasmtime is installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import deflate
import numpy as np
import zstandard
from numpy.typing import NDArray

from shrink.coders import rans
from shrink.errors import MissingDependency
from shrink.model import Quantized
from shrink.steps import DTYPES, Step, groups, matrix

__all__ = ["pack"]

Bytes = NDArray[np.uint8]
Packed = tuple[bytes, tuple[Step, ...]]

# A mask costs a bit per item; with fewer zeros than this it is not worth trying.
_ZEROS_WORTH_A_MASK = 0.125
_SMALL = 1 << 19
_PATIENT_LEVEL = 10
_PATIENT_EFFORT = 2
_DEFLATE_LEVEL = 12


def pack(quantized: Quantized, level: int) -> Quantized:
    """The same tensor in fewer bytes, or as it is when packing gains nothing; `level` is Zstandard's, 1 to 22.

    The byte steps that undo the packing go in front of the tensor's own chain, which must be a bare value step.
    """
    payload = quantized.payload
    if not payload:
        return quantized
    best: Packed = (payload, ())
    patient = len(payload) <= _SMALL or level >= _PATIENT_LEVEL
    for data, steps in _arrangements(quantized, np.frombuffer(payload, np.uint8), patient):
        for candidate in _coded(data, steps, level, patient):
            if len(candidate[0]) < len(best[0]):
                best = candidate
    if quantized.steps[0].name == "grid.1":
        effort = _PATIENT_EFFORT if level >= _PATIENT_LEVEL else 1
        best = min([best, *_grid_coded(quantized, effort)], key=lambda packed: len(packed[0]))
    data_bytes, steps = best
    return Quantized.of(
        quantized.name, quantized.dtype, quantized.shape, (*steps, *quantized.steps), data_bytes, quantized.role
    )


def _grid_matrix(quantized: Quantized) -> tuple[int, int]:
    params = quantized.steps[0].params
    view = params.get("view")
    return matrix(quantized.shape if view is None else view, params["rows"])


def _grid_coded(quantized: Quantized, effort: int) -> Iterator[Packed]:
    """The exponents and codes of a grid, entropy-coded; nothing where the coder is not installed."""
    (step,) = quantized.steps
    payload = quantized.payload
    rows, columns = _grid_matrix(quantized)
    codes = np.frombuffer(payload[rows + columns :], f"<i{step.params['width']}").reshape(rows, columns)
    try:
        coded, params = rans.encode(payload[: rows + columns], codes.astype(np.int16), effort=effort)
    except MissingDependency:
        return
    # The coder says how wide codes must be, the grid how wide they are.
    yield coded, (Step("rans.1", {**params, "width": step.params["width"]}),)


def _arrangements(quantized: Quantized, data: Bytes, patient: bool) -> Iterator[tuple[Bytes, tuple[Step, ...]]]:
    """The bytes in orders that may compress better, with the steps that put them back."""
    width, skip = _items(quantized)
    if width > 1:
        yield _planes(data, width, skip, ())
    else:
        yield data, ()
        columns = quantized.shape[-1] if len(quantized.shape) == 2 and width == 1 else 0
        if patient and columns > 1:
            # The columns of a dense or recurrent layer are its units, which differ more than its inputs do.
            yield _planes(data, columns, skip, ())
    if width:
        items = data[skip:].view(f"V{width}")
        present = data[skip:].view(f"u{width}") != 0
        if np.count_nonzero(present) < (1 - _ZEROS_WORTH_A_MASK) * len(items):
            mask = np.packbits(present, bitorder="little")
            packed = np.concatenate([data[:skip], mask, items[present].view(np.uint8)])
            sparse = (Step("sparse.1", {"width": width, "count": len(items), "skip": skip}),)
            yield _planes(packed, width, skip + mask.size, sparse) if width > 1 else (packed, sparse)


def _items(quantized: Quantized) -> tuple[int, int]:
    """The bytes of one stored value, 0 where values share bytes, and how many bytes stand before the first."""
    (step,) = quantized.steps
    if step.name == "cast.1":
        return DTYPES[step.params["from"]].itemsize, 0
    if step.name == "codebook.1":
        return 1, 0
    if step.name == "grid.1":
        return step.params["width"], sum(_grid_matrix(quantized))
    rows, _, blocks = groups(quantized.shape, step.params["axis"], step.params["block"])
    per_group = (4 if step.params["scale"] == "F32" else 2) + (1 if step.params["zero"] else 0)
    return (1 if step.params["bits"] == 8 else 0), rows * blocks * per_group


def _planes(data: Bytes, width: int, skip: int, then: tuple[Step, ...]) -> tuple[Bytes, tuple[Step, ...]]:
    planes = np.ascontiguousarray(data[skip:].reshape(-1, width).T).reshape(-1)
    whole = np.concatenate([data[:skip], planes]) if skip else planes
    return whole, (Step("planes.1", {"width": width, "skip": skip}), *then)


def _coded(data: Bytes, then: tuple[Step, ...], level: int, patient: bool) -> Iterator[Packed]:
    raw = data.tobytes()
    size = {"size": data.size}
    yield raw, then
    yield zstandard.ZstdCompressor(level=level).compress(raw), (Step("zstd.1", size), *then)
    if patient and raw:
        yield bytes(deflate.zlib_compress(raw, _DEFLATE_LEVEL)), (Step("deflate.1", size), *then)
