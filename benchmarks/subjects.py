"""The networks that the suites measure: the sample generator, the U-Net, and real trained models where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import unet

__all__ = ["SHARED", "SUBJECTS", "Subject", "chosen"]

_HERE = Path(__file__).parent / "models"
SHARED = Path(__file__).parents[1].parent / "shared" / "models"

Inputs = NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """`network` is FILE.py:NAME, and `inputs` makes what it is run on, one sample a row; None for weights alone.

    `file` are the weights; None for the U-Net's, which are made when they are needed.
    """

    name: str
    about: str
    file: Path | None
    network: str | None = None
    inputs: Callable[[], Inputs] | None = None

    def weights(self, folder: Path) -> Path:
        """The file of the weights, made in `folder` where there is none. It may be missing."""
        if self.file is not None:
            return self.file
        path = folder / f"{self.name}.npz"
        if not path.exists():
            arrays: dict[str, Any] = dict(unet.weights())
            norms = [name.removesuffix("/avg_var") for name in arrays if name.endswith("/avg_var")]
            arrays |= {f"{norm}/N": np.array(1) for norm in norms}
            np.savez(path, **arrays)
        return path


def _digits() -> Inputs:
    """Noise, and a one for each of the ten digits in turn."""
    noise = np.random.default_rng(0).standard_normal((10, 100), np.float32)
    return np.concatenate([noise, np.eye(10, dtype=np.float32)], axis=1)


def _photographs(size: int) -> Inputs:
    """Six pieces of scikit-learn's two photographs, (6, 3, size, size), from 0 to 1."""
    from sklearn.datasets import load_sample_images

    pieces = [
        picture[top : top + size, left : left + size]
        for picture in load_sample_images().images
        for top, left in ((60, 60), (120, 180), (170, 240))
    ]
    stacked: Inputs = np.stack(pieces).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return stacked


def _luma(size: int) -> Inputs:
    """The same in grey, (6, 1, size, size), as ITU-R BT.601 weighs colours."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    grey: Inputs = np.einsum("nchw,c->nhw", _photographs(size), weights)[:, np.newaxis].astype(np.float32)
    return grey


_NETWORKS, _WAIFU2X = _HERE / "networks.py", _HERE / "waifu2x.py"

SUBJECTS = (
    Subject("cdcgan", "a conditional DCGAN, trained", _HERE / "cdcgan.npz", f"{_NETWORKS}:Generator", _digits),
    Subject(
        "vgg7",
        "waifu2x VGG7, trained, on photographs",
        SHARED / "waifu2x" / "vgg7_noise0_y.npz",
        f"{_WAIFU2X}:VGG7",
        lambda: _luma(78),
    ),
    Subject(
        "upconv7",
        "waifu2x UpConv7, trained, on photographs",
        SHARED / "waifu2x" / "upconv7_scale_rgb.npz",
        f"{_WAIFU2X}:UpConv7",
        lambda: _photographs(78),
    ),
    Subject("lstm", "Keras text generation, trained", SHARED / "lstm-text-keras" / "lstm_text_generation.h5"),
    Subject(
        "unet",
        "the pix2pix U-Net, 54.4 M seeded random weights, on photographs",
        None,
        f"{_NETWORKS}:UNet",
        lambda: 2 * _photographs(256)[:2] - 1,
    ),
)


def chosen(names: list[str]) -> list[Subject]:
    """Those with these names; all where there are none. Raises SystemExit for a name that is none."""
    known = {subject.name: subject for subject in SUBJECTS}
    for name in names:
        if name not in known:
            raise SystemExit(f"there is no model {name!r}: {', '.join(known)}")
    return [known[name] for name in names] or list(SUBJECTS)
