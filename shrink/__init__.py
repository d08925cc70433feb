"""Make trained neural networks small enough, and quick enough to load, for the web.

>>> import shrink
>>> model = shrink.load("gen.npz")
>>> small = shrink.quantize(model, mode="eightbit")
>>> shrink.save(small, "gen.eightbit.safetensors")

Errors are subclasses of `shrink.errors.ShrinkError`. Nothing here prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from shrink import formats, inspection, pipeline, recipe, split
from shrink.errors import ShrinkError, UsageError
from shrink.inspection import Compared, Facts
from shrink.model import Model, Quantized, Source, Tensor
from shrink.pipeline import Change, Difference

__all__ = [
    "Change",
    "Compared",
    "Difference",
    "Facts",
    "Model",
    "Quantized",
    "ShrinkError",
    "Source",
    "Tensor",
    "compare",
    "inspect",
    "join",
    "load",
    "quantize",
    "restore",
    "save",
    "split",
]
__version__ = "0.1.0"


def load(path: str | PathLike[str]) -> Model:
    """The model at `path`: its index now, its values when they are asked for.

    Raises:
        BadInput: no format knows it, or it is malformed.
        OutputError: it is missing or cannot be read.
    """
    return formats.sniff(Path(path)).read(Path(path))


def quantize(
    model: Model,
    mode: str | None = None,
    *,
    recipe_file: str | PathLike[str] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    keep_all: bool = False,
    **parameters: Any,
) -> Model:
    """The model with its weights encoded by `mode`, such as "eightbit" or "prune,int8", in memory.

    Training state is dropped unless `keep_all`. `parameters` are the modes' own, as `sparsity=0.7`.

    Raises:
        UsageError: a mode, parameter or rule that makes no sense.
        BadInput: a tensor holds NaN or infinity.
    """
    rules = recipe.from_flags(
        mode, include, exclude, recipe.read(Path(recipe_file)) if recipe_file is not None else None, parameters
    )
    model = model if keep_all else pipeline.drop_state(model)
    return dataclasses.replace(model, tensors=tuple(pipeline.quantized(model, pipeline.decided(model, rules))))


def restore(model: Model) -> Model:
    """The model with plain float32 values where it was encoded."""
    return dataclasses.replace(model, tensors=tuple(pipeline.restored(model)))


def save(model: Model, path: str | PathLike[str], *, level: int | None = 3) -> None:
    """Write the model in the format of the suffix: .safetensors, .npz, .h5, .onnx, or a WebDNN folder without one.

    `level` is Zstandard's, for safetensors; None leaves compression out. An existing file is replaced at the end.

    Raises:
        UsageError: the format cannot hold what the model has.
        OutputError: writing failed; nothing is left behind.
    """
    target = formats.for_output(Path(path), model.source.format)
    for tensor in model.tensors:
        if pipeline.stored_as(tensor) not in target.HOLDS:
            raise UsageError(f"{target.NAME} cannot hold it as {pipeline.stored_as(tensor)}", tensor=tensor.name)
    target.write(model, model.tensors, Path(path), level)


def inspect(model: Model) -> list[Facts]:
    """Shape, bytes, range, sparsity and entropy of every tensor, in file order."""
    return list(inspection.inspect(model))


def compare(original: Model, other: Model) -> list[Compared]:
    """Largest error, RMSE and SQNR of every weight, worst first."""
    return inspection.compare(original, other)


def join(
    index: str | PathLike[str], output: str | PathLike[str] | None = None, *, force: bool = False
) -> tuple[Path, ...]:
    """Put together what `shrink.split.plan(…).write(…)` or `shrink split` made, and return the files written.

    `index` is the index file, or the folder that was split in place. `output` is by default the old name beside it.

    Raises:
        IntegrityError: a part is missing or not the one that was written; nothing is left behind.
        UsageError: the output exists, and `force` is not set.
    """
    return split.join(Path(index), None if output is None else Path(output), force=force)
