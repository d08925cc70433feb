"""What the commands about files of weights share: options, where results go, figures in tables."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from shrink import formats
from shrink.errors import OutputError, UsageError, printable
from shrink.files import atomic_file, io_errors
from shrink.networks import chainer
from shrink.pipeline import Difference

__all__ = [
    "beside",
    "check_output",
    "command_line",
    "debug_option",
    "default_output",
    "difference_cells",
    "difference_of",
    "finite_or_none",
    "force_option",
    "json_option",
    "level_option",
    "listed",
    "model_argument",
    "no_compress_option",
    "number_of",
    "page_beside",
    "shape_of",
    "total_difference",
    "write_page",
]

model_argument = click.argument("model", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
debug_option = click.option("--debug", is_flag=True, hidden=True, expose_value=False)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
level_option = click.option(
    "--level", type=click.IntRange(1, 22), default=3, show_default=True, help="Zstandard level, for safetensors."
)
no_compress_option = click.option(
    "--no-compress", is_flag=True, help="Leave lossless compression out, for safetensors."
)


def beside(model: Path, word: str, suffix: str) -> Path:
    """`<stem>.<word><suffix>` in the model's folder, and beside a folder such as `.` that does not say its name."""
    path = model if model.name not in ("", "..") else Path(os.path.abspath(model))
    stem = path.name
    for ending in (".safetensors.index.json", path.suffix if not path.is_dir() else ""):
        if ending and stem.endswith(ending):
            stem = stem[: -len(ending)]
            break
    return path.with_name(f"{stem}.{word}{suffix}")


def default_output(model: Path, source: str, mode: str, stores: frozenset[str]) -> Path:
    """`<stem>.<mode>.<suffix>` beside the model: in its own format where that is for the web, else safetensors."""
    own = formats.by_name(source)
    stays = own.NAME in ("webdnn", "onnx") and stores <= own.HOLDS and model.suffix.lower() == own.SUFFIX
    suffix = own.SUFFIX if stays else ".safetensors"
    return beside(model, mode.replace(",", "-").replace(" ", ""), suffix)


def page_beside(model: str, weights: Path | None, word: str) -> Path:
    """`<stem>.<word>.html` beside the file of the weights, as `shrink quantize` puts its result."""
    return beside(weights if weights is not None and chainer.is_network(model) else Path(model), word, ".html")


def write_page(page: Path, text: str) -> None:
    with atomic_file(page) as out:
        out.write(text.encode())


def listed(text: str, option: str) -> tuple[str, ...]:
    """The names between commas. Raises UsageError where one is empty."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(f"{option} {printable(text)!r} has an empty name in it")
    return names


def check_output(output: Path | None, models: Sequence[Path], force: bool, *, folder: bool = False) -> None:
    if output is None:
        return
    with io_errors(output):
        if output.exists() and any(output.resolve() == model.resolve() for model in models):
            raise UsageError("that is the model itself", file=output, hint="choose another -o")
        if output.exists() and not force:
            raise UsageError("exists already", file=output, hint="--force replaces it")
        if output.exists() and output.is_dir() != folder:
            raise UsageError("is a folder" if output.is_dir() else "is not a folder", file=output)
        if not output.resolve().parent.is_dir():
            raise OutputError("its folder does not exist", file=output, hint="make it first")


def total_difference(rows: Sequence[Any]) -> Difference | None:
    """The difference of all the tensors together."""
    count = sum(math.prod(row.shape) for row in rows)
    if not count:
        return None

    def rms(pick: Callable[[Difference], float]) -> float:
        return math.sqrt(sum(pick(row.difference) ** 2 * math.prod(row.shape) for row in rows) / count)

    return Difference(max(r.difference.max_error for r in rows), rms(lambda d: d.rmse), rms(lambda d: d.signal_rms))


def difference_of(difference: Difference) -> dict[str, float | None]:
    return {"max_error": difference.max_error, "rmse": difference.rmse, "sqnr_db": finite_or_none(difference.sqnr_db)}


def difference_cells(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", "", ""]
    sqnr = "exact" if math.isinf(difference.sqnr_db) and difference.rmse == 0 else f"{difference.sqnr_db:.2f}"
    return [f"{difference.max_error:.3g}", f"{difference.rmse:.3g}", sqnr]


def finite_or_none(value: float) -> float | None:
    """JSON has no infinity: an exact result has no SQNR, and an rmse of 0."""
    return value if math.isfinite(value) else None


def number_of(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def shape_of(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "()"


def command_line(context: click.Context) -> str:
    """The command as it was given, option by option."""
    words: list[str] = ["shrink", str(context.info_name)]
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params.get(name)
        if isinstance(parameter, click.Argument):
            words += map(str, value) if isinstance(value, tuple) else [str(value)]
        elif isinstance(parameter, click.Option) and parameter.expose_value:
            for each in value if isinstance(value, tuple) else [value]:
                words += [parameter.opts[-1]] if parameter.is_flag else [parameter.opts[-1], str(each)]
    return shlex.join(words)
