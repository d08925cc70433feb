"""The command that draws size against accuracy: `shrink curve`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from shrink import given
from shrink.cli_calibrate import Calibrating, calibration_of, calibration_options, is_made_up
from shrink.cli_shared import check_output, command_line, debug_option, force_option, listed, page_beside, write_page
from shrink.errors import MissingDependency, UsageError, printable
from shrink.terminal import bar, emit, in_words, size_on_disk

__all__ = ["curve_command"]

Document = dict[str, Any]

_file = click.Path(path_type=Path)


@click.command("curve")
@click.argument("model")
@click.option("--weights", type=_file, help="For a network in Python: its snapshot, of any format.")
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SHAPE", help="The shape of an input, as in 1,110.")
@calibration_options
@click.option("--modes", metavar="LIST", help="What to compare with; + composes, as in prune+int8.  [default: all]")
@click.option("--points", type=click.IntRange(2, 100), default=8, show_default=True, help="How many steps to try.")
@click.option(
    "-o", "--output", type=_file, help="The page, .html, or the data alone, .json.  [default: <stem>.curve.html]"
)
@force_option
@click.option("--json", "as_json", is_flag=True, help="Print the data; without -o, write nothing.")
@debug_option
@click.pass_context
def curve_command(
    context: click.Context,
    /,
    model: str,
    weights: Path | None,
    inputs: tuple[str, ...],
    modes: str | None,
    points: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    **calibrating: Any,
) -> None:
    """Show what size of MODEL keeps what accuracy: calibrated at several steps, beside all other modes.

    MODEL is an ONNX file, or a .safetensors file that shrink made of one; or a Chainer network as FILE.py:NAME, with
    --weights and --input, which is run. A quarter of the samples is held out, and accuracy is measured on that.

    Writes a page, one HTML file, and the data beside it as .json. Ctrl-C keeps what has been measured.

    \b
    Example:
      shrink curve model.onnx --calibrate images.npz -o reports/curve.html
      shrink curve model.onnx --calibrate photos/ --input-range -1,1 --modes int8,eightbit
      shrink curve networks.py:Generator --weights gen.npz --input 1,110 --input-distribution normal,onehot:10
    """
    asked = Calibrating(**calibrating)
    if output is None and not as_json:
        output = page_beside(model, weights, "curve")
    page, numbers = _outputs(output)
    inputs_on_disk = [path for path in (Path(model), weights, asked.calibrate) if path is not None]
    for path in (page, numbers):
        check_output(path, inputs_on_disk, force)
    if page is not None and find_spec("jinja2") is None:
        # Found out now and not after minutes of measuring.
        raise MissingDependency("jinja2", "bench")
    from shrink.bench import curve

    wanted = curve.MODES if modes is None else _modes(modes)
    network, notes = given.network(model, weights, inputs)
    calibration = calibration_of(network, asked)
    plan = curve.Plan(
        network,
        calibration,
        made_up=is_made_up(asked, calibration),
        modes=wanted,
        points=points,
        seed=asked.seed,
        effort=asked.effort,
        command=command_line(context),
    )
    measured: list[Document] = []
    try:
        with bar("measuring") as progress:
            found = curve.measure(plan, lambda so_far: measured.__setitem__(slice(None), [so_far]), progress)
    except BaseException:
        # Ctrl-C, or the machine gives up half-way: minutes of measuring are not thrown away.
        for part in measured:
            _finish(part, notes, page, numbers, as_json)
        raise
    _finish(found, notes, page, numbers, as_json)


# What is asked


def _modes(text: str) -> tuple[str, ...]:
    """`int8,prune+int8` as modes are called: `int8` and `prune,int8`."""
    return tuple(name.replace("+", ",") for name in listed(text, "--modes"))


# Where it goes


def _outputs(output: Path | None) -> tuple[Path | None, Path | None]:
    """The page and the data, each where it is wanted."""
    suffix = output.suffix.lower() if output is not None else ""
    if output is None or suffix == ".json":
        return None, output
    if suffix not in (".html", ".htm"):
        raise UsageError("a curve is an .html file, or its data alone a .json", file=output)
    return output, output.with_suffix(".json")


# What is said


def _finish(found: Document, notes: Sequence[str], page: Path | None, numbers: Path | None, as_json: bool) -> None:
    from shrink.bench import curve

    found = curve.checked(found)
    if numbers is not None:
        curve.write(found, numbers)
    if page is not None:
        from shrink.bench import curve_page

        write_page(page, curve_page.render(found))
    _show(found, notes, page, numbers, as_json)


def _show(found: Document, notes: Sequence[str], page: Path | None, numbers: Path | None, as_json: bool) -> None:
    from shrink.bench.curve_page import MADE_UP, headline

    headers = ["mode", "step", "bytes", "of float32", "PSNR dB", "mean", "worst", "cosine", "note"]
    rows = [
        [
            printable(point["mode"]),
            f"{point['step']:g}" if point["step"] is not None else "",
            f"{point['size_bytes']:,}",
            f"{point['share']:.1%}",
            *(_decibels(point, key) for key in ("psnr_db", "mean_psnr_db", "worst_psnr_db")),
            f"{point['cosine']:.6f}" if point["cosine"] is not None else "",
            point["problem"] or "",
        ]
        for point in found["points"]
    ]
    align = ["left", *("right" for _ in headers[1:-1]), "left"]
    written = [path for path in (page, numbers) if path is not None]
    lines = [
        *(["Interrupted: this is what had been measured.", ""] if found["partial"] else []),
        *tabulate(rows, headers, colalign=align, disable_numparse=True).splitlines(),
        "",
        headline(found),
        *_samples(found["calibration"]),
        *([MADE_UP] if found["calibration"]["made_up"] else []),
        *notes,
        *(f"Not measured: {printable(e['what'])}: {printable(e['why'], at_most=200)}" for e in found["not_measured"]),
        *(f"Written: {printable(path, at_most=1000)} ({in_words(size_on_disk(path))})" for path in written),
    ]
    emit(found, [], [], lines, as_json, None)


def _decibels(point: Document, key: str) -> str:
    if point["problem"]:
        return ""
    return "identical" if point[key] is None else f"{point[key]:.2f}"


def _samples(asked: Document) -> list[str]:
    source = printable(asked["source"], at_most=400)
    if not asked["unseen"]:
        return [
            f"Calibrated and measured on one sample, {source}: give more for numbers that say how it does on others."
        ]
    held = asked["held_out"]
    return [f"Calibrated on {asked['samples'] - held} samples, measured on {held} others ({source})."]
