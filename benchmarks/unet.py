"""Weights of the pix2pix U-Net (54.4 M), seeded random ones, named as in a Chainer snapshot of `networks.py:UNet`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["shapes", "weights"]

_WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)
# As in pix2pix before its training.
_SPREAD = np.float32(0.02)


def shapes() -> dict[str, tuple[int, ...]]:
    """Eight levels down and up again, for 256×256 pictures; the largest tensor has 8.4 M weights."""
    around = (3, *_WIDTHS)
    levels = range(len(_WIDTHS))
    out: dict[str, tuple[int, ...]] = {}
    for i in levels:
        out |= {f"down/{i}/W": (around[i + 1], around[i], 4, 4), f"down/{i}/b": (around[i + 1],)}
    for i in levels:
        # The way up meets, at all levels but the deepest, what the way down has left there.
        joined = around[i + 1] * (1 if i == levels[-1] else 2)
        out |= {f"up/{i}/W": (joined, around[i], 4, 4), f"up/{i}/b": (around[i],)}
    for i in levels[1:]:
        norms = [(f"up_bn/{i - 1}", around[i])]
        norms += [(f"down_bn/{i - 1}", around[i + 1])] if i < levels[-1] else []
        for name, width in norms:
            out |= {f"{name}/{part}": (width,) for part in ("gamma", "beta", "avg_mean", "avg_var")}
    return out


def weights(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Normally distributed, about 0; scales and variances about 1, so that the network runs."""
    rng = np.random.default_rng(seed)
    out: dict[str, NDArray[Any]] = {}
    for name, shape in shapes().items():
        centre = np.float32(name.endswith(("gamma", "avg_var")))
        out[name] = centre + rng.standard_normal(shape, np.float32) * _SPREAD
    return out
