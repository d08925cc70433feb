"""The networks that the suites measure: the sample generator, the U-Net, and real trained models where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import unet
from shrink import given
from shrink.export import Network

if TYPE_CHECKING:
    from shrink.calibrate.inputs import Calibration

__all__ = ["SHARED", "SUBJECTS", "TRIALS", "Subject", "Trial", "chosen", "trials"]

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
    return _grey(_photographs(size))


def _grey(pictures: Inputs) -> Inputs:
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    grey: Inputs = np.einsum("nchw,c->nhw", pictures, weights)[:, np.newaxis].astype(np.float32)
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


# What calibrated quantization is tried on

_DEFAULT = "without data"
_PICTURES = "on photographs"


@dataclass(frozen=True)
class Trial:
    """A network, what it is calibrated on by turns, and inputs that none of these hold, (n, …), a sample a row.

    `unchanged` are the inputs as outputs, where the network changes them but little: what doing nothing is worth.
    `evaluated` is the network for inputs of their size. `peak` is that of PSNR, None to take it from the outputs;
    `by_cosine` says that bounds are on the cosine of the outputs instead.
    """

    network: Network
    evaluated: Network
    calibrations: dict[str, Calibration]
    inputs: NDArray[Any]
    about: str
    peak: float | None = None
    by_cosine: bool = False
    unchanged: NDArray[Any] | None = None


def trials(names: list[str]) -> list[str]:
    """These names; without any, all but the U-Net, which takes long. Raises SystemExit for one that there is not."""
    for name in names:
        if name not in TRIALS:
            raise SystemExit(f"there is no model {name!r}: {', '.join(TRIALS)}")
    return names or [name for name in TRIALS if name != "unet"]


def _made_up(network: Network, **options: Any) -> Calibration:
    """What commands calibrate on where nobody says on what."""
    from shrink.cli_calibrate import Calibrating, calibration_of

    return calibration_of(network, Calibrating(**options))


def _of_chainer(name: str, folder: Path, shape: tuple[int, ...]) -> Network:
    (subject,) = chosen([name])
    path = subject.weights(folder)
    if not path.exists():
        raise FileNotFoundError(path)
    network, _ = given.network(str(subject.network), path, (",".join(map(str, shape)),))
    return network


def _drawings(size: int) -> Inputs:
    """A drawing in colours, a silhouette and a printed page, all of scikit-image, (3, 3, size, size), from 0 to 1."""
    from skimage import data

    logo = data.logo().astype(np.float32) / 255
    logo = logo[:, :, :3] * logo[:, :, 3:] + (1 - logo[:, :, 3:])
    # It is true where there is no horse.
    horse, page = data.horse().astype(np.float32), data.page().astype(np.float32) / 255
    pieces = [
        logo[90 : 90 + size, 150 : 150 + size],
        np.stack([horse[:size, 250 : 250 + size]] * 3, axis=2),
        np.stack([page[20 : 20 + size, :size]] * 3, axis=2),
    ]
    stacked: Inputs = np.stack(pieces).transpose(0, 3, 1, 2).astype(np.float32)
    return stacked


def _unseen_pictures(size: int) -> Inputs:
    """Three pieces of photographs and three of drawings, (6, 3, size, size), from 0 to 1."""
    return np.concatenate([_photographs(size)[[0, 2, 4]], _drawings(size)])


def _photographs_in(folder: Path) -> Path:
    """A folder of four of scikit-image's photographs: none of them, or of their kind, is among the unseen ones."""
    from PIL import Image
    from skimage import data

    photographs = folder / "photographs"
    photographs.mkdir(exist_ok=True)
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(photographs / f"{name}.png")
    return photographs


def _on_pictures(name: str, folder: Path, channels: int) -> Trial:
    from shrink.calibrate import inputs

    network = _of_chainer(name, folder, (1, channels, 78, 78))
    wanted = inputs.inputs_of(network)
    pictures = _unseen_pictures(128)
    shown = _grey(pictures) if channels == 1 else pictures
    return Trial(
        network,
        _of_chainer(name, folder, (1, channels, 128, 128)),
        {
            _DEFAULT: _made_up(network),
            _PICTURES: inputs.calibration(wanted, files=_photographs_in(folder)),
        },
        shown,
        "six pieces of 128×128 pixels: three of scikit-learn's two photographs, three of scikit-image's logo, horse "
        "and page (a drawing, a silhouette, a printed page)",
        peak=1.0,
        unchanged=shown[:, :, 7:-7, 7:-7] if name == "vgg7" else None,
    )


def _cdcgan(folder: Path) -> Trial:
    network = _of_chainer("cdcgan", folder, (1, 110))
    noise = np.random.default_rng(1).standard_normal((40, 100), np.float32)
    labels = np.tile(np.eye(10, dtype=np.float32), (4, 1))
    return Trial(
        network,
        network,
        {
            _DEFAULT: _made_up(network),
            "normal,onehot:10": _made_up(network, input_distribution="normal,onehot:10"),
        },
        np.concatenate([noise, labels], axis=1),
        "four digits of each kind, of noise of another seed",
        peak=1.0,
    )


def _unet(folder: Path) -> Trial:
    from shrink.calibrate import inputs

    network = _of_chainer("unet", folder, (1, 3, 256, 256))
    wanted = inputs.inputs_of(network)
    return Trial(
        network,
        network,
        {
            _DEFAULT: _made_up(network, input_range="-1,1", samples=16),
            _PICTURES: inputs.calibration(wanted, files=_photographs_in(folder), input_range=(-1.0, 1.0), count=16),
        },
        2 * _photographs(256) - 1,
        "six pieces of scikit-learn's two photographs; the weights are random",
    )


def _of_zoo(name: str, folder: Path) -> Trial:
    from tests import zoo

    if name == "keras-lstm":
        if not (SHARED / "lstm-text-keras").exists():
            raise FileNotFoundError(SHARED / "lstm-text-keras")
        found = zoo.keras_lstm(SHARED, folder)
    else:
        (found,) = (network for network in zoo.NETWORKS if f"zoo {network.name}" == name)
    samples = found.calibration
    network, _ = given.network(str(found.path), None, (",".join(map(str, (1, *samples.shape[1:]))),))
    own = folder / f"{found.path.stem}.inputs.npz"
    np.savez(own, samples)
    return Trial(
        network,
        network,
        {_DEFAULT: _made_up(network), "on inputs of its own": _made_up(network, calibrate=own)},
        found.evaluation[:_EVALUATED],
        f"{min(len(found.evaluation), _EVALUATED)} inputs that it was not trained on",
        by_cosine=name == "keras-lstm",
    )


_EVALUATED = 64


def _zoo_trial(name: str) -> Callable[[Path], Trial]:
    return lambda folder: _of_zoo(name, folder)


TRIALS: dict[str, Callable[[Path], Trial]] = {
    "cdcgan": _cdcgan,
    "vgg7": lambda folder: _on_pictures("vgg7", folder, 1),
    "upconv7": lambda folder: _on_pictures("upconv7", folder, 3),
    **{
        f"zoo {kind}": _zoo_trial(f"zoo {kind}")
        for kind in ("dense", "residual", "excitation", "lstm", "transformer", "upscaler")
    },
    "keras-lstm": _zoo_trial("keras-lstm"),
    "unet": _unet,
}
