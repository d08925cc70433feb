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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from shrink import __version__, cli_bench, cli_curve, cli_export, cli_quantize, cli_split, formats, inspection, pipeline
from shrink.cli_shared import (
    beside,
    check_output,
    debug_option,
    difference_cells,
    difference_of,
    force_option,
    json_option,
    model_argument,
    number_of,
    shape_of,
    total_difference,
)
from shrink.errors import OutputError, ShrinkError, printable
from shrink.model import Entry, Model, Quantized
from shrink.progress import Progress
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


@command.command()
@model_argument
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result here instead of stdout.")
@force_option
@debug_option
def inspect(model: Path, as_json: bool, output: Path | None, force: bool) -> None:
    """Show the tensors of MODEL: shape, bytes, share, range, sparsity, entropy.

    Entropy is in bits per weight at 8-bit precision: how far a coder could get without loss.

    \b
    Example:
      shrink inspect gen.npz
      shrink inspect site/model/ --json | jq .total_bytes
    """
    check_output(output, [model], force)
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
            shape_of(f.shape),
            f.encoding or f.dtype,
            f"{f.stored_bytes:,}",
            f"{f.stored_bytes / max(value_bytes, 1):.1%}",
            number_of(f.smallest),
            number_of(f.largest),
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
@model_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write.  [default: <stem>.restored.<suffix>]"
)
@force_option
@json_option
@debug_option
def restore(model: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Write MODEL with plain float32 weights again, in the format it came from or that -o's suffix names.

    \b
    Example:
      shrink restore gen.eightbit.safetensors -o back.npz
    """
    loaded = formats.sniff(model).read(model)
    target_path = output or beside(model, "restored", formats.by_name(loaded.source.format).SUFFIX)
    target = formats.for_output(target_path, loaded.source.format)
    check_output(target_path, [model], force, folder=not target.SUFFIX)
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
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result here instead of stdout.")
@force_option
@debug_option
def compare(original: Path, other: Path, as_json: bool, output: Path | None, force: bool) -> None:
    """Show how far the weights of OTHER are from those of ORIGINAL, tensor by tensor, worst first.

    \b
    Example:
      shrink compare gen.npz gen.eightbit.safetensors
    """
    check_output(output, [original, other], force)
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
                **(difference_of(row.difference) if row.difference else {}),
            }
            for row in compared
        ],
    }
    headers = ["tensor", "shape", "max |error|", "RMSE", "SQNR dB", "note"]
    rows = [
        [printable(row.name), shape_of(row.shape), *difference_cells(row.difference), row.problem] for row in compared
    ]
    different = sum(bool(row.problem) for row in compared)
    total = total_difference([row for row in compared if row.difference and row.is_float])
    lines = [
        f"{in_words(first.source.size_bytes)} and {in_words(second.source.size_bytes)}"
        + (f", overall SQNR {total.sqnr_db:.2f} dB, max |error| {total.max_error:.3g}" if total else "")
        + (f"; {different} tensors cannot be compared" if different else "")
    ]
    lost = {row.name for row in compared if row.difference and row.difference.max_error > 0}
    moved = sum(_is_constant(entry) and entry.name in lost for entry in second.tensors)
    if moved:
        lines.append(
            f"{moved} tensor{'s are' if moved > 1 else ' is'} constant now: calibration moved the numbers into others. "
            "What the outputs lose is for shrink bench to say."
        )
    emit(result, headers, rows, lines, as_json, output)


def _is_constant(entry: Entry) -> bool:
    return isinstance(entry, Quantized) and entry.steps[-1].name == "fill.1"


command.add_command(cli_quantize.quantize_command)
command.add_command(cli_curve.curve_command)
command.add_command(cli_bench.bench_command)
command.add_command(cli_bench.report_command)
command.add_command(cli_export.export)
command.add_command(cli_export.serve)
command.add_command(cli_split.split_command)
command.add_command(cli_split.join_command)
command.add_command(cli_split.hosts_command)


def _watched(model: Model, progress: Progress) -> Iterator[Any]:
    total = sum(t.size_bytes for t in model.tensors)
    done = 0
    for tensor in model.tensors:
        progress(tensor.name, done, total)
        yield tensor
        done += tensor.size_bytes
    progress("", total, total)
