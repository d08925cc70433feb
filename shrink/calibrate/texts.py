"""Texts by a network itself: what one that guesses the next token is used on is much like what it goes on to write.

Windows of random tokens, or of the user's own, move on by one token at a time, which is drawn as likely as the network
says, until nothing of their beginning is left. What the network was trained on need not be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate.budget import PER_RUN, affordable, multiplications
from shrink.calibrate.inputs import Calibration, Values, vocabulary
from shrink.calibrate.layers import layers
from shrink.calibrate.running import Graph
from shrink.errors import BadInput
from shrink.export import Network
from shrink.progress import Progress, silent

__all__ = ["beside", "written"]

Array = NDArray[Any]
F64 = NDArray[np.float64]

# So much more than its length a window moves on: the first tokens follow random ones.
_BEYOND = 1.5
_SUM = 1e-3
# Texts beside each sample of the user's own, and the most samples that there are with them.
_BESIDE, _AT_MOST = 4, 512


def written(network: Network, calibration: Calibration, seed: int, progress: Progress = silent) -> Calibration:
    """Samples that the network wrote, where they were made up, as `calibration.texts` says.

    They stay as they are where the network does not guess a token of those that it reads, and where it would take too
    long; of many samples there may be fewer then.

    Raises:
        UsageError: the network has no graph.
        MissingDependency: onnx or onnxruntime is not installed.
    """
    if not calibration.texts:
        return calibration
    made = _texts(network, calibration.samples, seed, progress)
    if not made:
        return calibration
    return replace(calibration, samples=made, source=f"{calibration.source}, continued by the network itself")


def beside(network: Network, calibration: Calibration, seed: int, progress: Progress = silent) -> Calibration:
    """The user's own samples with texts added that the network went on to write from each: few texts tell little about
    many weights. As they are where `written` would leave them so.

    Raises:
        UsageError: the network has no graph.
        MissingDependency: onnx or onnxruntime is not installed.
    """
    own = calibration.samples
    count = min(_BESIDE * len(own), _AT_MOST - len(own))
    if calibration.added or count <= 0:
        return calibration
    made = _texts(network, [own[n % len(own)] for n in range(count)], seed, progress)
    return replace(calibration, added=made, added_are="texts of its own") if made else calibration


def _texts(network: Network, starts: Sequence[Values], seed: int, progress: Progress) -> tuple[Values, ...]:
    """What the network writes, a text of the same length for each start, or for some; none where it writes no texts."""
    if len(starts[0]) != 1:
        return ()
    try:
        return _moved_on(network, starts, seed, progress)
    except BadInput:
        # What is wrong with a network is for calibration to say.
        return ()


def _moved_on(network: Network, starts: Sequence[Values], seed: int, progress: Progress) -> tuple[Values, ...]:
    ((name, first),) = starts[0].items()
    tokens, found = vocabulary(network).get(name, 0), layers(network.model)
    is_one_hot = first.dtype.kind == "f"
    if first.ndim != 2 + is_one_hot or first.shape[1] < 2:
        return ()
    if is_one_hot and not all(map(_has_ones, starts)):
        return ()
    graph = Graph(network, found)
    program = graph.program({name: first.dtype}, graph.outputs[:1])
    if _shares(_only(program.run({name: first})), tokens) is None:
        return ()
    moves = int(_BEYOND * first.shape[1])
    count = affordable(len(starts), moves * (PER_RUN + multiplications(graph, found, starts[0])))
    random = np.random.default_rng([seed, 4])
    out = []
    for number, sample in enumerate(starts[:count]):
        progress("texts by the network", number, count)
        window = sample[name].copy()
        for _ in range(moves):
            shares = _shares(_only(program.run({name: window})), tokens)
            if shares is None:
                return ()
            # The first token whose running total passes a number from 0 to 1.
            chosen = (shares.cumsum(axis=1) < random.random((len(shares), 1))).sum(axis=1).clip(0, tokens - 1)
            window[:, :-1] = window[:, 1:]
            window[:, -1] = np.eye(tokens, dtype=window.dtype)[chosen] if is_one_hot else chosen
        out.append({name: window})
    return tuple(out)


def _has_ones(sample: Values) -> bool:
    """Whether there is a single 1 in the place of each token."""
    value = _only(sample)
    return bool(((value == 0) | (value == 1)).all() and (value.sum(axis=-1) == 1).all())


def _only(values: Mapping[str, Array]) -> Array:
    (value,) = values.values()
    return value


def _shares(output: Array, tokens: int) -> F64 | None:
    """How likely each token comes next, (batch, tokens), from shares or what a softmax would make shares of; None where
    the output is something else."""
    last = output[:, -1] if output.ndim == 3 else output
    if last.ndim != 2 or last.shape[1] != tokens or last.dtype.kind != "f" or not np.isfinite(last).all():
        return None
    shares: F64 = last.astype(np.float64)
    if (shares < 0).any() or (np.abs(shares.sum(axis=1) - 1) > _SUM).any():
        shares = np.exp(shares - shares.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares
