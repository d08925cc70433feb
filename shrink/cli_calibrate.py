"""What the commands that calibrate share: their options, and the samples that these ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shrink.errors import BadInput, UsageError
from shrink.export import Network
from shrink.terminal import bar

if TYPE_CHECKING:
    from shrink.calibrate.inputs import Calibration

__all__ = ["Calibrating", "calibration_of", "calibration_options", "is_made_up"]

# What `shrink.calibrate.inputs` calls pictures that are nobody's.
_SYNTHETIC = "synthetic pictures"
# Calibration gains by every sample. There may be many where they are small, of fewer values than a picture has, or
# texts, and the network has few multiplications for each.
_SAMPLES, _MANY_SAMPLES = 64, 512
_SMALL, _SMALL_TEXT, _QUICK = 1 << 10, 1 << 16, 3 * 10**8

Command = TypeVar("Command", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--calibrate",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="What to calibrate on: an .npz of inputs, or a folder of pictures.  [default: made-up ones]",
    ),
    click.option(
        "--input-distribution", metavar="LIST", help="What the inputs are drawn from, as in normal,onehot:10."
    ),
    click.option("--input-range", metavar="A,B", help="What black and white are to the network.  [default: 0,1]"),
    click.option(
        "--samples",
        type=click.IntRange(1, 10_000),
        help=f"How many inputs.  [default: {_SAMPLES}, and {_MANY_SAMPLES} where they are small]",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same bytes."),
    click.option(
        "--effort", type=click.IntRange(0, 2), default=1, show_default=True, help="0 decodes fastest, 2 is smallest."
    ),
)


@dataclass(frozen=True)
class Calibrating:
    """What the options say."""

    calibrate: Path | None = None
    input_distribution: str | None = None
    input_range: str | None = None
    samples: int | None = None
    seed: int = 0
    effort: int = 1


def calibration_options(command: Command) -> Command:
    """Give a command the options; it gets them as keyword arguments, those of `Calibrating`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def calibration_of(network: Network, options: Calibrating) -> Calibration:
    """The samples to calibrate the network on.

    Raises:
        UsageError: options that do not belong together, or do not fit the network.
        BadInput: files that hold something else.
        OutputError: files are missing or cannot be read.
        MissingDependency: onnx or onnxruntime is not installed; or there is a folder, and Pillow is not.
    """
    from shrink.calibrate import inputs, matching, texts

    if network.model.graph is None:
        raise UsageError(
            "this model has only weights, and calibration runs the graph",
            file=network.model.source.path,
            hint="give an ONNX file, or a network in Python as FILE.py:NAME",
        )
    tokens = inputs.vocabulary(network)

    def drawn(count: int) -> Calibration:
        return inputs.calibration(
            inputs.inputs_of(network),
            files=options.calibrate,
            distribution=options.input_distribution,
            count=count,
            seed=options.seed,
            input_range=inputs.parse_range(options.input_range) if options.input_range is not None else None,
            tokens=tokens,
        )

    made = drawn(options.samples or _SAMPLES)
    if options.samples is None and _are_cheap(network, made.samples[0], texts=len(tokens) == len(made.samples[0])):
        made = drawn(_MANY_SAMPLES)
    with bar("making inputs") as progress:
        if options.calibrate is not None:
            return texts.beside(network, made, options.seed, progress)
        return texts.written(network, matching.matched(network, made, progress), options.seed, progress)


def _are_cheap(network: Network, sample: Mapping[str, Any], *, texts: bool) -> bool:
    """Whether there may be many such samples."""
    from shrink.calibrate import budget
    from shrink.calibrate.layers import layers
    from shrink.calibrate.running import Graph

    if sum(value.size for value in sample.values()) > (_SMALL_TEXT if texts else _SMALL):
        return False
    found = layers(network.model)
    try:
        return budget.multiplications(Graph(network, found), found, sample) <= _QUICK
    except BadInput:
        # What is wrong with a network is for calibration to say.
        return False


def is_made_up(options: Calibrating, calibration: Calibration) -> bool:
    """Whether nobody has said that the network is used on such samples: what is measured on them is a guess."""
    if options.calibrate is not None:
        return False
    return options.input_distribution is None or _SYNTHETIC in calibration.source
