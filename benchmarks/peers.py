"""Other tools that shrink is measured beside, and how to call them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.networks.legacy import import_webdnn

F32 = NDArray[np.float32]


def webdnn_encoder() -> tuple[Callable[[F32], bytes], Callable[[F32], object]]:
    """WebDNN 1.2.11's own eightbit encoder: one tensor to the bytes of its file, and weights to codes only.

    Raises:
        MissingDependency: the package is not installed.
    """
    import_webdnn()
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


def webdnn_decode(data: bytes, table: NDArray[np.float64]) -> F32:
    """What WebDNN's browser side makes of one tensor's bytes: offset, length, scale, a reserved word, zlib codes."""
    scale = float(np.frombuffer(data, "<f4", 1, 8)[0])
    codes = np.frombuffer(zlib.decompress(data[16:]), np.uint8)
    return (table * scale).astype(np.float32)[codes]


def tensorflowjs_uint8(x: F32) -> tuple[NDArray[np.uint8], float, float]:
    """TensorFlow.js 4.22's affine uint8, by the formulas of its converter's quantization.py: codes, scale, minimum."""
    smallest, largest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (largest - smallest) / 255 or 1.0
    zero = round(-smallest / scale)
    low, high = -zero * scale, (255 - zero) * scale
    codes = np.round((np.clip(x, low, high) - low) / scale).astype(np.uint8)
    return codes, scale, low


def tensorflowjs_float16(x: F32) -> NDArray[Any]:
    """TensorFlow.js 4.22's float16: NumPy's cast."""
    return x.astype(np.float16)
