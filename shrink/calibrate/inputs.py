"""The inputs that a network is calibrated on: the user's own, drawn from a distribution, or synthetic pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate._arrays import AT_MOST, Input, Values, inputs_of, load_arrays, samples_in
from shrink.calibrate._distributions import (
    EXAMPLE,
    Entry,
    default_distribution,
    drawn,
    given_out,
    number,
    parse_distribution,
    picture_size,
)
from shrink.calibrate.layers import layers
from shrink.calibrate.pictures import F32, from_folder, in_folder, synthetic
from shrink.errors import UsageError, printable
from shrink.export import Network
from shrink.files import is_folder
from shrink.formats._onnx_proto import parse

__all__ = [
    "AT_MOST",
    "Calibration",
    "Entry",
    "Input",
    "Values",
    "calibration",
    "default_distribution",
    "inputs_of",
    "load_arrays",
    "parse_distribution",
    "parse_range",
    "samples_in",
    "vocabulary",
]

Array = NDArray[Any]

_BYTES_AT_MOST = 1 << 31
# Synthetic pictures beside the user's own: a quarter of all, where these are the usual 64 of which 48 are fitted.
_ADDED = 16
# Kinds of values that may be any others: not those that only have some.
_FREE = ("pictures", "normal")
# Fewer kinds of tokens than this are no alphabet, but classes.
_LETTERS = 20
_RANGE_HINT = "write --input-range -1,1 or 0,255"


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on. `source` is for messages: "images.npz", "12 pictures in photos", "normal,onehot:10".

    `added` are samples beside the user's own, synthetic pictures if `added_are` says nothing else, from which a network
    may learn what these happen not to show; the result is not measured on them. `free` are the inputs of numbers that
    nobody asked for, `texts` those of tokens that nobody asked for: others may do as well or better.
    """

    samples: tuple[Values, ...]
    source: str
    added: tuple[Values, ...] = ()
    free: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    added_are: str = "synthetic pictures"


def calibration(
    inputs: Sequence[Input],
    *,
    files: Path | None = None,
    distribution: str | None = None,
    count: int = 64,
    seed: int = 0,
    input_range: tuple[float, float] | None = None,
    tokens: Mapping[str, int] | None = None,
) -> Calibration:
    """`count` samples for a network with these inputs, the same for the same arguments.

    `files` is an .npz or .npy, of which `count` samples are taken evenly where it has more, or a folder of pictures.
    Without them and without a `distribution`, inputs that look like pictures get synthetic ones, and others what
    `default_distribution` says; so do the other inputs where a folder has pictures for one.

    `input_range` is what black and white are to the network, for pictures of both kinds: (0, 1) where it is None, and
    for integers the range of bytes of their sign. `tokens` has the number of tokens by the name of an input, which
    `vocabulary` finds.

    Raises:
        UsageError: arguments that make no sense, or do not fit the inputs.
        BadInput: files that hold something else.
        OutputError: files are missing or cannot be read.
        MissingDependency: there is a folder, and Pillow is not installed.
    """
    if not inputs:
        raise UsageError("the network has no inputs, so there is nothing to calibrate on")
    if files is not None and distribution is not None:
        raise UsageError("inputs come from files or from a distribution, not from both", file=files)
    _check_amount(inputs, count, seed)
    folder = files if files is not None and is_folder(files) else None
    if files is not None and folder is None:
        if input_range is not None:
            raise UsageError("a range belongs to pictures; arrays are taken as they are", file=files)
        return _with_added(_of_arrays(inputs, files, count), inputs, seed)
    entries_of: list[tuple[Entry, ...]]
    if distribution is None:
        entries_of = [(entry,) for entry in default_distribution(inputs, tokens)]
    else:
        entries_of = given_out(parse_distribution(distribution), inputs)
    is_pictures = [entries[0].kind == "pictures" for entries in entries_of]
    if folder is not None and sum(is_pictures) != 1:
        shapes = ", ".join(f"{printable(i.name)} {list(i.shape)}" for i in inputs)
        raise UsageError(
            f"a folder of pictures is for networks with one input that takes pictures; this one takes {shapes}",
            file=folder,
            hint="give the inputs as an .npz",
        )
    if input_range is not None and not any(is_pictures):
        raise UsageError("a range belongs to pictures, and this network gets none")
    columns, said = [], []
    for position, (wanted, entries) in enumerate(zip(inputs, entries_of, strict=True)):
        if is_pictures[position]:
            source, pictures = _pictures(wanted, folder, count, seed, position)
            columns.append(_arranged(pictures, wanted, count, _limits(wanted, input_range)))
            said.append(source)
        else:
            rng = np.random.default_rng((seed, position, 1))
            columns.append([drawn(rng, entries, wanted) for _ in range(count)])
            said.append(",".join(map(str, entries)))
    samples = tuple({i.name: c[n] for i, c in zip(inputs, columns, strict=True)} for n in range(count))
    made = Calibration(samples, (", " if any(is_pictures) else ",").join(said))
    if folder is not None:
        return _with_added(made, inputs, seed)
    kinds = {i.name: entries[0].kind for i, entries in zip(inputs, entries_of, strict=True)}
    if distribution is not None:
        return made
    free = frozenset(name for name, kind in kinds.items() if kind in _FREE)
    return replace(made, free=free, texts=frozenset(tokens or ()) & frozenset(kinds) - free)


def vocabulary(network: Network) -> dict[str, int]:
    """How many tokens there are, by the name of an input: where the network looks them up, and where it most likely
    takes texts of them with a 1 in the place of each. Those are sequences of as many numbers as the network's softmax
    gives shares, as in one that guesses the next letter.
    """
    graph = parse(network.model.graph or b"", network.model.source.path).graph
    softmaxed = {name for node in graph.node if node.op_type in ("Softmax", "LogSoftmax") for name in node.output}
    ends = [list(output.type.tensor_type.shape.dim) for output in graph.output if output.name in softmaxed]
    shares = {dimensions[-1].dim_value for dimensions in ends if dimensions}
    one_hot = {
        wanted.name: wanted.shape[-1]
        for wanted in inputs_of(network)
        if len(wanted.shape) == 3
        and wanted.shape[-1] in shares
        and wanted.shape[-1] >= _LETTERS
        and np.dtype(wanted.dtype).kind == "f"
    }
    looked_up = {layer.input: layer.inputs for layer in layers(network.model) if layer.kind == "embedding"}
    return {**one_hot, **looked_up}


def _with_added(made: Calibration, inputs: Sequence[Input], seed: int) -> Calibration:
    """With synthetic pictures, in the range of the user's own, where the network takes nothing but pictures."""
    if len(inputs) != 1 or picture_size(inputs[0].shape) is None or np.dtype(inputs[0].dtype).kind != "f":
        return made
    (wanted,) = inputs
    given = [sample[wanted.name] for sample in made.samples]
    low, high = min(float(x.min()) for x in given), max(float(x.max()) for x in given)
    if not low < high:
        return made
    pictures = _pictures(wanted, None, _ADDED, seed, 0)[1]
    added = tuple({wanted.name: x} for x in _arranged(pictures, wanted, _ADDED, (low, high)))
    return replace(made, added=added)


def _check_amount(inputs: Sequence[Input], count: int, seed: int) -> None:
    if not 1 <= count <= AT_MOST:
        raise UsageError(f"{count} inputs are not from 1 to {AT_MOST}")
    if seed < 0:
        raise UsageError(f"the seed {seed} is negative")
    size = count * sum(math.prod(i.shape) * np.dtype(i.dtype).itemsize for i in inputs)
    if size > _BYTES_AT_MOST:
        raise UsageError(
            f"{count} inputs of this network take {size / 1e6:.0f} MB, at most {_BYTES_AT_MOST / 1e6:.0f} are possible",
            hint="take fewer, or a smaller --input",
        )


def _of_arrays(inputs: Sequence[Input], path: Path, count: int) -> Calibration:
    found = samples_in(path, inputs)
    if len(found) <= count:
        return Calibration(tuple(found), printable(path.name))
    taken = tuple(found[n * len(found) // count] for n in range(count))
    return Calibration(taken, f"{count} of {len(found)} samples in {printable(path.name)}")


# Pictures


def parse_range(text: str) -> tuple[float, float]:
    """`-1,1` as (-1.0, 1.0): what black and white are to the network. Raises UsageError."""
    found = [number(part.strip()) for part in text.split(",")]
    if len(found) != 2 or None in found:
        raise UsageError(f"{printable(text)!r} is no range", hint=_RANGE_HINT)
    low, high = float(found[0] or 0), float(found[1] or 0)
    if not low < high:
        raise UsageError(f"the range {printable(text)!r} does not go up", hint=_RANGE_HINT)
    return low, high


def _limits(wanted: Input, asked: tuple[float, float] | None) -> tuple[float, float]:
    """What black and white are. Raises UsageError where the input's type does not have the two."""
    dtype = np.dtype(wanted.dtype)
    low, high = asked or {"i": (0, 255), "u": (0, 255)}.get(dtype.kind, (0, 1))
    lowest, highest = 0.0, 1.0
    if dtype.kind in "iu":
        lowest, highest = np.iinfo(dtype).min, np.iinfo(dtype).max
        low, high = (-128, 127) if asked is None and dtype == np.int8 else (low, high)
    elif dtype.kind == "f":
        # The difference of the two must be finite as well.
        lowest, highest = float(np.finfo(dtype).min) / 2, float(np.finfo(dtype).max) / 2
    if not lowest <= low < high <= highest:
        raise UsageError(
            f"the range {low:g},{high:g} is not for the input {printable(wanted.name)} of type {dtype}",
            hint=_RANGE_HINT,
        )
    return low, high


def _pictures(wanted: Input, folder: Path | None, count: int, seed: int, position: int) -> tuple[str, Iterable[F32]]:
    """As many pictures as `count` samples have, and what they are."""
    found = picture_size(wanted.shape)
    if found is None:
        raise UsageError(
            f"the input {printable(wanted.name)} takes no pictures, its shape is {list(wanted.shape)}", hint=EXAMPLE
        )
    size, total = found[0], count * wanted.shape[0]
    # Two inputs of pictures get different ones, and the first the same as if it were alone.
    if folder is None:
        return "synthetic pictures", synthetic(total, size, seed + (position << 32))
    paths = in_folder(folder)
    said = f"{len(paths)} pictures" if len(paths) > 1 else "1 picture"
    if len(paths) > total:
        said = f"{total} of {said}"
    return f"{said} in {printable(folder.resolve().name)}", from_folder(paths, total, size, seed)


def _arranged(pictures: Iterable[F32], wanted: Input, count: int, limits: tuple[float, float]) -> list[Array]:
    """Pictures in batches, in the order of axes and the range of values that the network takes."""
    found = picture_size(wanted.shape)
    channels_last = found is not None and found[1]
    dtype, (low, high) = np.dtype(wanted.dtype), limits
    # Numbers as large as integers can be are not exact in float32.
    working = np.float32 if dtype.kind == "f" and dtype.itemsize <= 4 else np.float64
    out: list[Array] = []
    rest = iter(pictures)
    for _ in range(count):
        values = np.stack(list(islice(rest, wanted.shape[0]))).astype(working) * working(high - low) + working(low)
        if dtype.kind != "f":
            values = np.rint(values)
        if not channels_last:
            values = values.transpose(0, 3, 1, 2)
        out.append(np.ascontiguousarray(values.astype(dtype)))
    return out
