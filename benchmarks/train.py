"""Trains a sample network for real, with a fixed seed: `train cdcgan` makes benchmarks/models/cdcgan.npz.

The conditional DCGAN learns scikit-learn's 1,797 digits of 8×8 pixels, scaled to 28×28 with a margin. Four things
keep a run of minutes from failing: noise on what the discriminator sees; learning rates that fall to zero in the
second half; a reward for digits that differ as their noise differs (Mao et al., "Mode Seeking GANs", CVPR 2019); and
as result the moving average of the generator's weights instead of its last state.
"""

from __future__ import annotations

import argparse
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.files import atomic_file
from shrink.networks.legacy import import_chainer

F32 = NDArray[np.float32]

MODELS = Path(__file__).parent / "models"
NOISE, BATCH = 100, 64
AVERAGED_STEPS = 200


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=["cdcgan"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=MODELS / "cdcgan.npz")
    parser.add_argument("--preview", type=Path, help="write samples here as a PNG, a row for each digit")
    options = parser.parse_args(arguments)
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]

    # More threads are several times slower on matrices this small, and sum in another order.
    with threadpool_limits(1):
        generator = train_cdcgan(options.seed, options.steps)
    snapshot = import_chainer().serializers.DictionarySerializer()
    snapshot.save(generator)
    with atomic_file(options.output) as file:
        # What save_npz does, but in an order that is always the same.
        np.savez_compressed(file, **dict(sorted(snapshot.target.items())))
    print(f"written: {options.output}, {options.output.stat().st_size:,} bytes")
    if options.preview:
        with atomic_file(options.preview) as file:
            file.write(png(grid(generator, options.seed)))
        print(f"written: {options.preview}")
    return 0


def train_cdcgan(seed: int, steps: int) -> Any:
    """The trained `Generator` of models/networks.py."""
    chainer = import_chainer()
    from benchmarks.models import networks

    untyped: Any = networks
    F = chainer.functions
    np.random.seed(seed)  # Chainer's initializers draw from NumPy's global generator
    rng = np.random.default_rng(seed)
    generator, average, discriminator = untyped.Generator(NOISE), untyped.Generator(NOISE), untyped.Discriminator()
    average.copyparams(generator)
    g_optimizer = chainer.optimizers.Adam(beta1=0.5).setup(generator)
    d_optimizer = chainer.optimizers.Adam(beta1=0.5).setup(discriminator)
    start = time.monotonic()
    for step, (real, labels) in zip(range(1, steps + 1), batches(rng), strict=False):
        # The second half of the fakes has the same labels as the first, for comparing the two.
        fake_labels = np.concatenate([labels[: BATCH // 2]] * 2)
        rate = min(1, 2 - 2 * step / steps)
        g_optimizer.alpha, d_optimizer.alpha = 5e-4 * rate, 2.5e-4 * rate
        noisy = 0.1 * (1 - step / steps) * rng.standard_normal((2, *real.shape), np.float32)
        fake = generator(generator_input(rng, fake_labels))

        real_logit = discriminator(real + noisy[0], labels)
        fake_logit = discriminator(fake.array + noisy[1], fake_labels)
        # Real images count as 0.9 real, so that the discriminator never gets quite sure.
        d_loss = F.mean(F.softplus(-real_logit) + 0.1 * real_logit + F.softplus(fake_logit))
        discriminator.cleargrads()
        d_loss.backward()
        d_optimizer.update()

        variety = F.mean(abs(fake[: BATCH // 2] - fake[BATCH // 2 :]))
        g_loss = F.mean(F.softplus(-discriminator(fake + noisy[1], fake_labels))) + 0.05 / (variety + 0.01)
        generator.cleargrads()
        g_loss.backward()
        g_optimizer.update()

        keep = min(1 - 1 / AVERAGED_STEPS, step / (step + 10))
        for mean, now in zip(average.params(), generator.params(), strict=True):
            mean.array += (1 - keep) * (now.array - mean.array)
        if step % 250 == 0:
            seconds = time.monotonic() - start
            print(f"step {step} of {steps}, {seconds:.0f} s, losses {d_loss.array:.2f} {g_loss.array:.2f}", flush=True)
    measure_batch_norm(average, rng)
    return average


def batches(rng: np.random.Generator, size: int = BATCH) -> Iterator[tuple[F32, F32]]:
    """Digits, (size, 1, 28, 28) from 0 to 1, and their labels, (size, 10), without end."""
    from scipy.ndimage import zoom  # type: ignore[import-untyped,unused-ignore]
    from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]

    data = load_digits()
    # Scaling blurs; more contrast gives the strokes their edges back.
    large = np.clip(2 * zoom(data.images / 16, (1, 3, 3), order=3) - 0.5, 0, 1)
    images = np.pad(large, ((0, 0), (2, 2), (2, 2))).astype(np.float32)
    while True:
        chosen = rng.integers(0, len(images), size)
        yield images[chosen, None], one_hot(data.target[chosen])


def one_hot(digits: NDArray[Any]) -> F32:
    table: F32 = np.eye(10, dtype=np.float32)
    rows: F32 = table[digits]
    return rows


def generator_input(rng: np.random.Generator, labels: F32) -> F32:
    return np.concatenate([rng.standard_normal((len(labels), NOISE), np.float32), labels], axis=1)


def measure_batch_norm(generator: Any, rng: np.random.Generator, batches: int = 100) -> None:
    """Mean and variance as they are for the weights that the generator has now, averaged over some batches."""
    config = import_chainer().using_config
    for number in range(batches):
        for norm in (generator.bn1, generator.bn2):
            norm.decay = number / (number + 1)
        with config("train", True), config("enable_backprop", False):
            generator(generator_input(rng, one_hot(rng.integers(0, 10, BATCH))))


def grid(generator: Any, seed: int, columns: int = 12) -> NDArray[np.uint8]:
    """An image of samples, a row for each digit."""
    config = import_chainer().using_config
    x = generator_input(np.random.default_rng(seed), one_hot(np.repeat(np.arange(10), columns)))
    with config("train", False), config("enable_backprop", False):
        images = generator(x).array.reshape(10, columns, 28, 28)
    pixels: F32 = 255 * images.transpose(0, 2, 1, 3).reshape(280, 28 * columns)
    return np.rint(pixels).astype(np.uint8)


def png(gray: NDArray[np.uint8]) -> bytes:
    """A grayscale image as PNG (www.w3.org/TR/png)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = gray.shape
    rows = b"".join(b"\0" + row.tobytes() for row in gray)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
