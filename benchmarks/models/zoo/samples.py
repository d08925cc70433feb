"""What the zoo's networks learn from, and what tells how well they did.

Digits come with scikit-learn, photographs with scikit-image (those that are written into files are in the public domain
or CC0), text is Python's own documentation as `pydoc` brings it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kind", "Samples", "as_input", "digits", "photographs", "run", "score", "text", "write"]

Array = NDArray[Any]
Kind = Literal["classes", "image", "sequence"]

LENGTH = 32  # characters that the text network sees
CHARACTERS = 40  # how many the text network knows
SIDE = 24  # pixels of a small picture; twice that is its original's side
_EACH = 600  # pieces of a photograph
_CONTRAST = 12  # of 255, as a standard deviation


@dataclass(frozen=True)
class Samples:
    """`training` inputs and `targets`; then what is stored: `calibration`, and `evaluation` with `labels`.

    All are integers, which `as_input` makes what the network takes.
    `evaluation` is of samples that no network has seen, `calibration` of other ones.
    """

    training: Array
    targets: Array
    calibration: Array
    evaluation: Array
    labels: Array
    scale: float | None


def digits(shape: tuple[int, ...], rng: np.random.Generator, held_out: int = 256) -> Samples:
    """scikit-learn's 1,797 digits of 8×8 pixels from 0 to 16 in this shape, of 8×8 or of 16×16 pixels."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]

    data = load_digits()
    times = 2 if 16 in shape else 1
    images = np.kron(data.images.astype(np.uint8), np.ones((1, times, times), np.uint8)).reshape(-1, *shape)
    labels = data.target.astype(np.uint8)
    order = rng.permutation(len(images))
    test, rest = order[:held_out], order[held_out:]
    return Samples(images[rest], labels[rest], images[rest[:64]], images[test], labels[test], 1 / 16)


def photographs(rng: np.random.Generator) -> Samples:
    """Grey pieces of 48×48 pixels as targets, and the same made half as large, (n, 1, 24, 24), as inputs."""
    from skimage import data

    free = [data.astronaut(), data.rocket(), data.camera()]
    unseen = [data.chelsea(), data.coffee()]
    small, large = _pieces([*free, data.immunohistochemistry(), data.coins()], _EACH, rng)
    chosen = np.arange(0, len(free) * _EACH, len(free) * _EACH // 24)
    held_small, held_large = _pieces(unseen, 5, rng)
    return Samples(small, large, small[chosen], held_small, held_large, 1 / 255)


def _pieces(pictures: Sequence[Array], count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """`count` pieces of each picture at random places that have some contrast: small ones, large ones."""
    large: list[Array] = []
    for number, picture in enumerate(pictures):
        grey = picture if picture.ndim == 2 else picture @ np.array([0.299, 0.587, 0.114])
        while len(large) < (number + 1) * count:
            top, left = (int(rng.integers(0, size - 2 * SIDE + 1)) for size in grey.shape)
            piece = grey[top : top + 2 * SIDE, left : left + 2 * SIDE]
            if piece.std() >= _CONTRAST:
                large.append(piece)
    stacked = np.stack(large)[:, None]
    small = stacked.reshape(-1, 1, SIDE, 2, SIDE, 2).mean(axis=(3, 5))
    return np.rint(small).astype(np.uint8), np.rint(stacked).astype(np.uint8)


def text(rng: np.random.Generator, held_out: int = 360) -> Samples:
    """Python's documentation in numbers of characters, (n, 32), and for each place the character that comes next.

    `labels` have the one after the last alone. The last tenth of the text is held out.
    """
    from pydoc_data.topics import topics

    whole = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)).lower())
    known = sorted(character for character, _ in Counter(whole).most_common(CHARACTERS))
    number = {character: i for i, character in enumerate(known)}
    numbers = np.array([number[character] for character in whole if character in number], np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(numbers, LENGTH + 1)
    first_unseen = len(numbers) * 9 // 10
    seen, unseen = windows[: first_unseen - LENGTH], windows[first_unseen:]
    test = unseen[rng.choice(len(unseen), held_out, replace=False)]
    calibration = seen[rng.choice(len(seen), 64, replace=False)]
    return Samples(seen[:, :-1], seen[:, 1:], calibration[:, :-1], test[:, :-1], test[:, -1], None)


def write(path: Path, samples: Samples) -> None:
    """An npz of `calibration`, `evaluation`, `labels` and, where there is one, `scale`; always the same bytes."""
    from shrink.files import atomic_file

    arrays: dict[str, Any] = {name: getattr(samples, name) for name in ("calibration", "evaluation", "labels")}
    if samples.scale is not None:
        arrays["scale"] = np.float32(samples.scale)
    with atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def as_input(values: Array, scale: float | None) -> Array:
    """Stored integers as what the network takes: times the scale, float32; int64 where there is none."""
    return values.astype(np.int64) if scale is None else values.astype(np.float32) * np.float32(scale)


def run(model: Path | bytes, inputs: Array) -> Array:
    """The network's first output for each input, one at a time, on ONNX Runtime with one thread: (n, …)."""
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    given = model if isinstance(model, bytes) else model.read_bytes()
    session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in inputs])


def score(kind: Kind, outputs: Array, labels: Array) -> float:
    """The share that is right, 0 to 1; of images the mean PSNR in dB against 8-bit `labels`, the peak being white."""
    if kind != "image":
        return float(np.mean(outputs.argmax(axis=1) == labels))
    squares = (outputs.astype(np.float64) - labels / 255) ** 2
    return float(np.mean(-10 * np.log10(np.maximum(squares.mean(axis=(1, 2, 3)), 1e-12))))
