"""Trains the zoo anew: small networks of many kinds, benchmarks/models/zoo/*.onnx, with inputs to try them on.

Every network is trained with a fixed seed, on the processor, within a minute or so, and its score is that on inputs
that it has not seen: the share of right answers, or PSNR in dB. Beside each network lies an npz: `evaluation` inputs,
their `labels`, other inputs for `calibration`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shrink
from benchmarks.models.zoo import graphs, samples
from benchmarks.models.zoo.samples import Kind, Samples
from shrink.files import atomic_file
from shrink.formats import onnx as onnx_format
from shrink.networks import chainer as chainer_networks
from shrink.networks.legacy import import_chainer

__all__ = ["FOLDER", "main"]

FOLDER = Path(__file__).parent / "models" / "zoo"
Array = NDArray[Any]


@dataclass(frozen=True)
class _Recipe:
    """How one network, a class of networks.py, is made.

    `rate` is Adam's first; `noise` is added to what is learnt from, for the digits are few. `graph` makes the ONNX
    graph of the trained arrays; None leaves that to onnx_chainer.
    """

    network: str
    kind: Kind
    samples: Callable[[np.random.Generator], Samples]
    steps: int
    rate: float
    graph: Callable[[Mapping[str, Array]], Any] | None = None
    batch: int = 64
    noise: float = 0


_RECIPES = {
    "dense": _Recipe("Dense", "classes", lambda rng: samples.digits((64,), rng), 600, 2e-3, noise=0.15),
    "residual": _Recipe("Residual", "classes", lambda rng: samples.digits((1, 16, 16), rng), 500, 5e-3, noise=0.15),
    "excitation": _Recipe("Excitation", "classes", lambda rng: samples.digits((1, 16, 16), rng), 600, 5e-3),
    "lstm": _Recipe("TextLSTM", "sequence", samples.text, 1500, 1e-2, graphs.text_lstm),
    "transformer": _Recipe(
        "Transformer", "classes", lambda rng: samples.digits((8, 8), rng), 1000, 2e-3, graphs.transformer, noise=0.15
    ),
    "upscaler": _Recipe("Upscaler", "image", samples.photographs, 1200, 5e-3, batch=32),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"some of {', '.join(_RECIPES)}; none for all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.networks if name not in _RECIPES]
    if unknown:
        parser.error(f"there is no network {unknown[0]!r}: {', '.join(_RECIPES)}")
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped,unused-ignore]

    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.networks or _RECIPES:
        start = time.monotonic()
        # More threads are slower on matrices this small, and sum in another order.
        with threadpool_limits(1):
            made, reached = _make(_RECIPES[name], options.output / f"{name}.onnx", options.seed)
        sizes = " + ".join(f"{path.stat().st_size:,}" for path in made)
        unit = " dB" if _RECIPES[name].kind == "image" else ""
        seconds = time.monotonic() - start
        print(f"{name}: {reached:.4g}{unit} on unseen inputs, {sizes} bytes, {seconds:.0f} s", flush=True)
    return 0


def _make(recipe: _Recipe, path: Path, seed: int) -> tuple[list[Path], float]:
    """The network trained, written and measured: its two files and its score."""
    import_chainer()
    from benchmarks.models.zoo import networks

    np.random.seed(seed)  # Chainer's initializers draw from NumPy's global generator
    rng = np.random.default_rng(seed)
    found = recipe.samples(rng)
    chain = getattr(networks, recipe.network)()
    _train(chain, recipe, found, rng)
    data = path.with_suffix(".npz")
    with atomic_file(path) as file:
        file.write(_exported(chain, recipe, found))
    samples.write(data, found)
    outputs = samples.run(path, samples.as_input(found.evaluation, found.scale))
    return [path, data], samples.score(recipe.kind, outputs, found.labels)


def _train(chain: Any, recipe: _Recipe, found: Samples, rng: np.random.Generator) -> None:
    """With Adam, whose rate falls to zero along half a cosine."""
    chainer = import_chainer()
    F = chainer.functions
    optimizer = chainer.optimizers.Adam().setup(chain)
    for step in range(recipe.steps):
        optimizer.alpha = recipe.rate * (1 + np.cos(np.pi * step / recipe.steps)) / 2
        chosen = rng.integers(0, len(found.training), recipe.batch)
        x = samples.as_input(found.training[chosen], found.scale)
        if recipe.noise:
            x += np.float32(recipe.noise) * rng.standard_normal(x.shape, np.float32)
        y = chain(x)
        if recipe.kind == "image":
            loss = F.mean_squared_error(y, found.targets[chosen].astype(np.float32) / 255)
        else:
            loss = F.softmax_cross_entropy(y, found.targets[chosen].reshape(-1).astype(np.int32))
        chain.cleargrads()
        loss.backward()
        optimizer.update()


def _exported(chain: Any, recipe: _Recipe, found: Samples) -> bytes:
    """The network as an ONNX file."""
    snapshot = import_chainer().serializers.DictionarySerializer()
    snapshot.save(chain)
    arrays = dict(sorted(snapshot.target.items()))
    if recipe.graph:
        proto: bytes = recipe.graph(arrays).SerializeToString(deterministic=True)
        return proto
    with tempfile.TemporaryDirectory() as folder:
        weights, result = Path(folder, "weights.npz"), Path(folder, "network.onnx")
        np.savez(weights, **arrays)
        shape = (1, *found.evaluation.shape[1:])
        model, _ = chainer_networks.to_onnx(chain, [shape], shrink.load(weights))
        onnx_format.write(model, model.tensors, result, None)
        return result.read_bytes()
