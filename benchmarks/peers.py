"""Other tools that shrink is measured beside, and how to call them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shrink.bench.peers import tensorflowjs_affine, tensorflowjs_float16, webdnn_decode, webdnn_encoder

__all__ = ["tensorflowjs_float16", "tensorflowjs_uint8", "webdnn_decode", "webdnn_encoder"]


def tensorflowjs_uint8(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], float, float]:
    """TensorFlow.js 4.22's affine uint8: codes, scale, minimum."""
    codes, scale, minimum = tensorflowjs_affine(x, 8)
    return codes.astype(np.uint8, copy=False), scale, minimum
