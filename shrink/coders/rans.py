"""Writing payloads of rans.1: codes of a matrix behind the exponents of its rows and columns, entropy-coded.

`shrink.entropy` says what they mean. encoder.wasm chooses tables and contexts; what is left to choose here is the
number of lanes, which cost some two bytes each, and whether lanes take rows or stretches of the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.coders.wasm import ENCODER
from shrink.wasm import Instance

__all__ = ["encode"]

_LANES_FROM = ((1 << 15, 3), (1 << 14, 2), (1 << 13, 1))
_LANE_BITS_AT_MOST = 3
# Adaptation begins anew in every chunk; chunks are what several threads could share.
_CHUNK_CODES = 1 << 19
_CHUNKS_AT_MOST = 4096
_FEW = 1 << 20


def encode(head: bytes, codes: NDArray[np.int16], *, effort: int = 1) -> tuple[bytes, dict[str, Any]]:
    """The payload and the parameters of rans.1 for `codes` (rows, columns) behind the bytes of `head`.

    `effort` 0 writes static tables only, which decode fastest; 1 also contexts where they are smaller; 2 tries
    every layout.

    Raises:
        MissingDependency: wasmtime is not installed.
    """
    rows, columns = codes.shape
    width = 1 if codes.size == 0 or (codes.min() >= -128 and codes.max() <= 127) else 2
    instance = Instance(ENCODER)
    layouts = _layouts(rows, columns, effort)
    payload = min((_written(instance, head, codes, layout, effort > 0) for layout in layouts), key=len)
    return payload, {"rows": rows, "columns": columns, "head": len(head), "width": width}


def _layouts(rows: int, columns: int, effort: int) -> Iterator[tuple[int, bool]]:
    """(binary logarithm of the lanes, whether they take stretches of the codes) that are worth trying."""
    count = rows * columns
    if effort > 1:
        yield from ((bits, flat) for bits in range(_LANE_BITS_AT_MOST + 1) for flat in (False, True))
        return
    bits = next((bits for least, bits in _LANES_FROM if count >= least), 0)
    lanes = 1 << bits
    if rows >= lanes:
        yield bits, False
    if rows < lanes or (rows % lanes and count < _FEW):
        yield bits, True


def _written(
    instance: Instance, head: bytes, codes: NDArray[np.int16], layout: tuple[int, bool], contexts: bool
) -> bytes:
    rows, columns = codes.shape
    count = rows * columns
    lane_bits, flat = layout
    lanes = 1 << lane_bits
    stride = -(-count // lanes) if flat else columns
    lines = -(-count // stride) if count else 0
    band = -(-max(_CHUNK_CODES, count // _CHUNKS_AT_MOST) // max(stride, 1) // lanes) * lanes if count else 0
    chunks = -(-lines // band) if band else 0
    header = 2 * len(head) + (1 << 16) + 4 * chunks
    sizes = (
        *(2 * count, len(head), 2 * count, 4 * count),
        *(6 * count + 64 * (chunks + 1), 2 * count, 4 * stride, header, 6 * count + 64 * (chunks + 1) + header),
    )
    given, before, entries, escapes, body, words, column, scratch, target, _ = instance.lay_out(*sizes)
    instance.view(given, codes.shape, "<i2")[:] = codes
    instance.view(before, (len(head),), "u1")[:] = np.frombuffer(head, np.uint8)
    size = instance.call(
        *("encode", target, given, rows, columns, before, len(head), lane_bits, int(flat), int(contexts)),
        *(band if chunks > 1 else 0, entries, escapes, body, words + 2 * count, column, scratch),
    )
    return instance.view(target, (size,), "u1").tobytes()
