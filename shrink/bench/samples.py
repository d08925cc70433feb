"""The inputs that every variant is run on: seeded ones, or the user's own with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.bench.plan import Inputs, Values
from shrink.calibrate.inputs import AT_MOST, Input, inputs_of, load_arrays, samples_in
from shrink.errors import BadInput, UsageError
from shrink.site import seeded_input

__all__ = ["Input", "Samples", "inputs_of", "samples"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """The samples, in order; `labels` has a row for each, in any shape, or is None. `source` is for the report."""

    values: tuple[Values, ...]
    labels: Array | None
    source: str


def samples(inputs: Sequence[Input], asked: Inputs) -> Samples:
    """What `asked` says, made to fit the network's inputs.

    Raises:
        UsageError: labels without data, a count that is none.
        BadInput: a file that holds something else.
        OutputError: a file is missing or cannot be read.
    """
    if asked.data is None:
        if asked.labels is not None:
            raise UsageError("--labels belong to --data", file=asked.labels)
        if not 1 <= asked.count <= AT_MOST:
            raise UsageError(f"{asked.count} inputs are not from 1 to {AT_MOST}")
        seeded = [
            {i.name: seeded_input(seed, n, i.shape, i.dtype) for n, i in enumerate(inputs)}
            for seed in range(asked.count)
        ]
        return Samples(tuple(seeded), None, "seeded")
    values = samples_in(asked.data, inputs)
    labels = None if asked.labels is None else _labels(asked.labels, len(values), max([1, *map(_batch, inputs)]))
    return Samples(tuple(values), labels, asked.data.name)


def _batch(wanted: Input) -> int:
    return wanted.shape[0] if wanted.shape else 1


def _labels(path: Path, count: int, batch: int) -> Array:
    labels = next(iter(load_arrays(path).values()), np.zeros(0))
    if labels.dtype.kind not in "iu" or labels.ndim < 1:
        raise BadInput("labels are one array of integers", file=path, hint="numpy.save('y.npy', labels)")
    if len(labels) != count * batch:
        raise BadInput(f"it has {len(labels)} labels, there are {count * batch} inputs", file=path)
    if labels.size and labels.min() < 0:
        raise BadInput("a label is negative", file=path)
    out: Array = labels.reshape(count, -1)
    return out
