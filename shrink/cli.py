"""The command. The only place that prints or exits.

stdout carries the result, a table or JSON; stderr carries progress, warnings and errors.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from shrink import __version__, cli_bench, cli_export, cli_split, formats, inspection, pipeline
from shrink import recipe as recipes
from shrink.errors import OutputError, ShrinkError, UsageError, printable
from shrink.files import io_errors
from shrink.model import Model
from shrink.pipeline import Change, Difference
from shrink.progress import Progress
from shrink.quantizers import modes
from shrink.terminal import bar, emit, in_words, size_on_disk

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command, with `sys.argv` where no arguments are given, and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us, as `>&-` does
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        # An orderly end removes what is half written; only the main thread of a program may ask for it.
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, _stopped)
    try:
        # Without standalone mode an exit that a command asks for is what it returns.
        code = int(command(arguments, prog_name="shrink", standalone_mode=False) or 0)
    except (click.Abort, KeyboardInterrupt):
        code = _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else error.format_message(), err=True)
        code = 2
    except click.UsageError as error:
        where = f" (try: {error.ctx.command_path} --help)" if error.ctx else ""
        code = _fail(error.format_message() + where, 2)
    except ShrinkError as error:
        if debug:
            traceback.print_exc()
        code = _fail(str(error), error.exit_code)
    except (OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        code = _fail(str(error) or "out of memory", OutputError.exit_code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _fail(f"{type(error).__name__}: {error} (this is a bug; --debug shows where)", 1)
    sys.exit(code)


def _stopped(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(message: str, code: int) -> int:
    # One line, whatever a file name or message holds.
    click.echo("shrink: error: " + " ".join(message.split()), err=True)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="shrink")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def command(debug: bool) -> None:
    """Make trained neural networks small enough, and quick enough to load, for the web.

    \b
    Example:
      shrink inspect gen.npz
      shrink quantize gen.npz --mode eightbit
      shrink compare gen.npz gen.eightbit.safetensors
    """


_model = click.argument("model", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
_debug = click.option("--debug", is_flag=True, hidden=True, expose_value=False)
_force = click.option("--force", is_flag=True, help="Replace an existing output.")
_level = click.option(
    "--level", type=click.IntRange(1, 22), default=3, show_default=True, help="Zstandard level, for safetensors."
)
_no_compress = click.option("--no-compress", is_flag=True, help="Leave lossless compression out, for safetensors.")


@command.command()
@_model
@_json
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result here instead of stdout.")
@_force
@_debug
def inspect(model: Path, as_json: bool, output: Path | None, force: bool) -> None:
    """Show the tensors of MODEL: shape, bytes, share, range, sparsity, entropy.

    Entropy is in bits per weight at 8-bit precision: how far a coder could get without loss.

    \b
    Example:
      shrink inspect gen.npz
      shrink inspect site/model/ --json | jq .total_bytes
    """
    _check_output(output, [model], force)
    loaded = formats.sniff(model).read(model)
    with bar("reading") as progress:
        facts = list(inspection.inspect(loaded, progress))
    value_bytes = sum(t.size_bytes for t in loaded.tensors)
    state_bytes = sum(f.stored_bytes for f in facts if f.role == "state")
    result: dict[str, Any] = {
        "file": str(model),
        "format": loaded.source.format,
        "file_bytes": loaded.source.size_bytes,
        "total_bytes": value_bytes,
        "weights": sum(math.prod(f.shape) for f in facts if f.role == "weight"),
        "state_bytes": state_bytes,
        "tensors": [{**dataclasses.asdict(f), "shape": list(f.shape)} for f in facts],
    }
    rows = [
        [
            printable(f.name),
            _shape(f.shape),
            f.encoding or f.dtype,
            f"{f.stored_bytes:,}",
            f"{f.stored_bytes / max(value_bytes, 1):.1%}",
            _number(f.smallest),
            _number(f.largest),
            f"{f.sparsity:.1%}",
            f"{f.entropy_bits:.2f}",
            "training state" if f.role == "state" else f"{f.nonfinite} not finite" if f.nonfinite else "",
        ]
        for f in facts
    ]
    headers = ["tensor", "shape", "type", "bytes", "share", "min", "max", "zeros", "bits", "note"]
    lines = [
        f"{result['weights']:,} weights in {len(facts)} tensors, {in_words(value_bytes)}; "
        f"the file is {in_words(loaded.source.size_bytes)} ({loaded.source.format})."
    ]
    if state_bytes:
        lines.append(
            f"{in_words(state_bytes)} of it ({state_bytes / max(value_bytes, 1):.0%}) is training state that a browser "
            "does not need: quantize drops it."
        )
    emit(result, headers, rows, lines, as_json, output)


@command.command()
@_model
@click.option("--mode", help=f"One of {', '.join(sorted(modes()))}; several compose, left to right: prune,eightbit.")
@click.option("--sparsity", type=float, help="For prune: the share of weights to set to 0.  [default: 0.5]")
@click.option(
    "--scope", type=click.Choice(["tensor", "global"]), help="For prune: one threshold per tensor or one for all."
)
@click.option("--block", type=int, help="For int8 and int4: weights that share a scale; 0: an output channel.")
@click.option("--include", multiple=True, metavar="GLOB", help="Quantize only these tensors (* matches / too).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these tensors as they are.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="A TOML file that says it per tensor.")
@click.option("--keep-all", is_flag=True, help="Keep optimizer state and what else only training needs.")
@_level
@_no_compress
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write.  [default: <stem>.<mode>.<suffix>]"
)
@_force
@_json
@_debug
def quantize(
    model: Path,
    mode: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    recipe_file: Path | None,
    keep_all: bool,
    level: int,
    no_compress: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
    **parameters: Any,
) -> None:
    """Make MODEL smaller, and show tensor by tensor what it cost.

    Weights (tensors of two dimensions or more) are quantized; biases, batch-norm values and counters are kept.

    \b
    Example:
      shrink quantize gen.npz --mode eightbit
      shrink quantize gen.npz --mode float16 -o gen16.npz
      shrink quantize gen.npz --mode prune,eightbit --sparsity 0.7
      shrink quantize gen.npz --mode int8 --exclude 'conv1/*'
      shrink quantize webdnn_folder/ --mode eightbit
    """
    given = {key: value for key, value in parameters.items() if value is not None}
    file_recipe = recipes.read(recipe_file) if recipe_file else None
    recipe = recipes.from_flags(mode, include, exclude, file_recipe, given)
    loaded = formats.sniff(model).read(model)
    source = loaded.source
    target_path = output or _default_output(model, source.format, mode or "recipe", recipe.stores)
    target = formats.for_output(target_path, source.format)
    missing = recipe.stores - target.HOLDS
    if missing:
        raise UsageError(
            f"{target.NAME} cannot hold {sorted(missing)[0]} weights", hint="write a .safetensors file instead"
        )
    _check_output(target_path, [model], force, folder=not target.SUFFIX)
    reduced = loaded if keep_all else pipeline.drop_state(loaded)
    decisions = pipeline.decided(reduced, recipe, to_webdnn=target.NAME == "webdnn")
    changes: list[Change] = []
    with bar("quantizing") as progress:
        entries = pipeline.quantized(reduced, decisions, progress, changes.append)
        stored = target.write(reduced, entries, target_path, None if no_compress else level)
    dropped = [t for t in loaded.tensors if t.role == "state"] if not keep_all else []
    _report_quantized(model, loaded, target_path, changes, stored, sum(t.size_bytes for t in dropped), as_json)


def _report_quantized(
    model: Path,
    loaded: Model,
    output: Path,
    changes: Sequence[Change],
    stored: Mapping[str, int],
    dropped_bytes: int,
    as_json: bool,
) -> None:
    output_bytes = size_on_disk(output)
    quantized = [c for c in changes if c.difference is not None]
    total = _total(quantized)
    result: dict[str, Any] = {
        "input": str(model),
        "output": str(output),
        "input_bytes": loaded.source.size_bytes,
        "output_bytes": output_bytes,
        "float_bytes": sum(c.original_bytes for c in changes),
        "dropped_state_bytes": dropped_bytes,
        "sqnr_db": _finite(total.sqnr_db) if total else None,
        "max_error": total.max_error if total else None,
        "tensors": [
            {
                "name": c.name,
                "shape": list(c.shape),
                "mode": c.mode,
                "note": c.note,
                "original_bytes": c.original_bytes,
                "stored_bytes": stored.get(c.name),
                **(_difference(c.difference) if c.difference else {}),
            }
            for c in changes
        ],
    }
    rows = [
        [
            printable(c.name),
            _shape(c.shape),
            c.mode,
            f"{c.original_bytes:,}",
            f"{stored[c.name]:,}" if c.name in stored else "",
            f"{stored[c.name] / c.original_bytes:.1%}" if c.name in stored and c.original_bytes else "",
            *(_difference_cells(c.difference)),
            c.note,
        ]
        for c in changes
    ]
    headers = ["tensor", "shape", "became", "bytes", "now", "%", "max |error|", "RMSE", "SQNR dB", "note"]
    shares = [
        f"{output_bytes / whole:.1%} of {what}"
        for what, whole in (("the file", loaded.source.size_bytes), ("its values", result["float_bytes"]))
        if whole
    ]
    lines = [
        f"{in_words(loaded.source.size_bytes)} -> {in_words(output_bytes)} ({', '.join(shares)})"
        + (f", SQNR {total.sqnr_db:.2f} dB" if total else "")
    ]
    if dropped_bytes:
        lines.append(f"Dropped {in_words(dropped_bytes)} of training state (--keep-all keeps it).")
    lines.append(f"Written: {printable(output)}")
    if output_bytes > loaded.source.size_bytes:
        click.echo("shrink: warning: the result is larger than what it was made from", err=True)
    emit(result, headers, rows, lines, as_json, None)


@command.command()
@_model
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write.  [default: <stem>.restored.<suffix>]"
)
@_force
@_json
@_debug
def restore(model: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Write MODEL with plain float32 weights again, in the format it came from or that -o's suffix names.

    \b
    Example:
      shrink restore gen.eightbit.safetensors -o back.npz
    """
    loaded = formats.sniff(model).read(model)
    target_path = output or _beside(model, "restored", formats.by_name(loaded.source.format).SUFFIX)
    target = formats.for_output(target_path, loaded.source.format)
    _check_output(target_path, [model], force, folder=not target.SUFFIX)
    with bar("restoring") as progress:
        plain = dataclasses.replace(loaded, tensors=tuple(pipeline.restored(loaded)))
        target.write(plain, _watched(plain, progress), target_path, None)
    result: dict[str, Any] = {
        "input": str(model),
        "output": str(target_path),
        "input_bytes": loaded.source.size_bytes,
        "output_bytes": size_on_disk(target_path),
        "tensors": len(plain.tensors),
    }
    lines = [
        f"{in_words(loaded.source.size_bytes)} -> {in_words(size_on_disk(target_path))}, {len(plain.tensors)} tensors.",
        f"Written: {printable(target_path)}",
    ]
    emit(result, [], [], lines, as_json, None)


@command.command()
@click.argument("original", type=click.Path(path_type=Path))
@click.argument("other", type=click.Path(path_type=Path))
@_json
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result here instead of stdout.")
@_force
@_debug
def compare(original: Path, other: Path, as_json: bool, output: Path | None, force: bool) -> None:
    """Show how far the weights of OTHER are from those of ORIGINAL, tensor by tensor, worst first.

    \b
    Example:
      shrink compare gen.npz gen.eightbit.safetensors
    """
    _check_output(output, [original, other], force)
    first, second = (formats.sniff(path).read(path) for path in (original, other))
    with bar("comparing") as progress:
        compared = inspection.compare(first, second, progress)
    result: dict[str, Any] = {
        "original": str(original),
        "other": str(other),
        "original_bytes": first.source.size_bytes,
        "other_bytes": second.source.size_bytes,
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "problem": row.problem,
                **(_difference(row.difference) if row.difference else {}),
            }
            for row in compared
        ],
    }
    headers = ["tensor", "shape", "max |error|", "RMSE", "SQNR dB", "note"]
    rows = [
        [printable(row.name), _shape(row.shape), *_difference_cells(row.difference), row.problem] for row in compared
    ]
    different = sum(bool(row.problem) for row in compared)
    total = _total([row for row in compared if row.difference and row.is_float])
    lines = [
        f"{in_words(first.source.size_bytes)} and {in_words(second.source.size_bytes)}"
        + (f", overall SQNR {total.sqnr_db:.2f} dB, max |error| {total.max_error:.3g}" if total else "")
        + (f"; {different} tensors cannot be compared" if different else "")
    ]
    emit(result, headers, rows, lines, as_json, output)


command.add_command(cli_bench.bench_command)
command.add_command(cli_bench.report_command)
command.add_command(cli_export.export)
command.add_command(cli_export.serve)
command.add_command(cli_split.split_command)
command.add_command(cli_split.join_command)
command.add_command(cli_split.hosts_command)


# ---- pieces that the commands share


def _watched(model: Model, progress: Progress) -> Iterator[Any]:
    total = sum(t.size_bytes for t in model.tensors)
    done = 0
    for tensor in model.tensors:
        progress(tensor.name, done, total)
        yield tensor
        done += tensor.size_bytes
    progress("", total, total)


def _beside(model: Path, word: str, suffix: str) -> Path:
    """`<stem>.<word><suffix>` in the model's folder, and beside a folder such as `.` that does not say its name."""
    path = model if model.name not in ("", "..") else Path(os.path.abspath(model))
    stem = path.name
    for ending in (".safetensors.index.json", path.suffix if not path.is_dir() else ""):
        if ending and stem.endswith(ending):
            stem = stem[: -len(ending)]
            break
    return path.with_name(f"{stem}.{word}{suffix}")


def _default_output(model: Path, source: str, mode: str, stores: frozenset[str]) -> Path:
    """`<stem>.<mode>.<suffix>` beside the model: in its own format where that is for the web, else safetensors."""
    own = formats.by_name(source)
    stays = own.NAME in ("webdnn", "onnx") and stores <= own.HOLDS and model.suffix.lower() == own.SUFFIX
    suffix = own.SUFFIX if stays else ".safetensors"
    return _beside(model, mode.replace(",", "-").replace(" ", ""), suffix)


def _check_output(output: Path | None, models: Sequence[Path], force: bool, *, folder: bool = False) -> None:
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
            raise OutputError("its folder does not exist", file=output)


def _total(rows: Sequence[Any]) -> Difference | None:
    """The difference of all the tensors together."""
    count = sum(math.prod(row.shape) for row in rows)
    if not count:
        return None

    def rms(pick: Callable[[Difference], float]) -> float:
        return math.sqrt(sum(pick(row.difference) ** 2 * math.prod(row.shape) for row in rows) / count)

    return Difference(max(r.difference.max_error for r in rows), rms(lambda d: d.rmse), rms(lambda d: d.signal_rms))


def _difference(difference: Difference) -> dict[str, float | None]:
    return {"max_error": difference.max_error, "rmse": difference.rmse, "sqnr_db": _finite(difference.sqnr_db)}


def _difference_cells(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", "", ""]
    sqnr = "exact" if math.isinf(difference.sqnr_db) and difference.rmse == 0 else f"{difference.sqnr_db:.2f}"
    return [f"{difference.max_error:.3g}", f"{difference.rmse:.3g}", sqnr]


def _finite(value: float) -> float | None:
    """JSON has no infinity: an exact result has no SQNR, and an rmse of 0."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "()"
