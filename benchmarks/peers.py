"""Other tools that shrink is measured beside, and how to call them."""

from __future__ import annotations

import collections
import collections.abc
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def webdnn_encoder() -> tuple[Callable[[F32], bytes], Callable[[F32], object]]:
    """WebDNN 1.2.11's own eightbit encoder: one tensor to the bytes of its file, and weights to codes only.

    Raises:
        ImportError: the package is not installed.
    """
    # WebDNN was written for Python 3.6, where these names were still here.
    for name in ("Collection", "Iterable", "Sequence"):
        if not hasattr(collections, name):
            setattr(collections, name, getattr(collections.abc, name))
    from webdnn.backend.code_generator.allocator import Allocation
    from webdnn.encoder import constant_encoder_eightbit as module

    encoder = module.ConstantEncoderEightbit()

    def whole(x: F32) -> bytes:
        data: bytes = encoder._single_encode(x.reshape(-1), Allocation(x.size, 0))
        return data

    class NoDeflate:
        @staticmethod
        def compress(data: bytes, level: int) -> bytes:
            return b""

    def codes(x: F32) -> object:
        deflate, module.zlib = module.zlib, NoDeflate
        try:
            return encoder._single_encode(x.reshape(-1), Allocation(x.size, 0))
        finally:
            module.zlib = deflate

    return whole, codes


def tensorflowjs_uint8(x: F32) -> NDArray[Any]:
    """TensorFlow.js 4.22's affine uint8: the formulas of its converter's quantization.py."""
    smallest, largest = x.min().astype(np.float64), x.max().astype(np.float64)
    smallest, largest = min(smallest, 0.0), max(largest, 0.0)
    scale = (largest - smallest) / 255
    zero = np.round(-smallest / scale)
    nudged_smallest, nudged_largest = -zero * scale, (255 - zero) * scale
    clipped = np.clip(x, nudged_smallest, nudged_largest)
    codes: NDArray[Any] = np.round((clipped - nudged_smallest) / scale).astype(np.uint8)
    return codes


def tensorflowjs_float16(x: F32) -> NDArray[Any]:
    """TensorFlow.js 4.22's float16: NumPy's cast."""
    return x.astype(np.float16)
