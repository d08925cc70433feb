"""The command that makes models smaller: `shrink quantize`."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shrink import formats, given, pipeline
from shrink import recipe as recipes
from shrink.cli_calibrate import Calibrating, calibration_of, calibration_options, is_made_up
from shrink.cli_shared import (
    beside,
    check_output,
    debug_option,
    default_output,
    difference_cells,
    difference_of,
    finite_or_none,
    force_option,
    json_option,
    level_option,
    model_argument,
    no_compress_option,
    shape_of,
    total_difference,
)
from shrink.errors import UsageError, printable
from shrink.formats import onnx
from shrink.model import Entry, Model
from shrink.pipeline import Change
from shrink.quantizers import modes
from shrink.terminal import bar, emit, in_words, size_on_disk

if TYPE_CHECKING:
    from shrink.calibrate.inputs import Calibration
    from shrink.calibrate.quantizing import Quantizing, Target

__all__ = ["quantize_command"]

CALIBRATED = "calibrated"
_PSNR_AT_MOST = 150.0
# So much less on other pictures is worth a word.
_MUCH_DB = 3.0


@dataclass(frozen=True)
class Bounds:
    """What the result shall be: at least one is given."""

    min_psnr: float | None = None
    max_mb: float | None = None
    step: float | None = None

    def checked(self) -> Bounds:
        """Itself. Raises UsageError where the numbers make no sense."""
        if self == Bounds():
            raise UsageError(
                "mode calibrated wants to know how far it may go",
                hint="--min-psnr 45, or --max-mb 2, or --step 0.01",
            )
        if self.step is not None and (self.min_psnr is not None or self.max_mb is not None):
            raise UsageError("--step is one point, and cannot meet a bound as well", hint="leave it out")
        for flag, value, most in (
            ("--min-psnr", self.min_psnr, _PSNR_AT_MOST),
            ("--max-mb", self.max_mb, 1e6),
            ("--step", self.step, 1.0),
        ):
            if value is not None and not 0 < value <= most:
                raise UsageError(f"{flag} {value:g} is not above 0 and at most {most:g}")
        return self

    def target(self) -> Target:
        from shrink.calibrate.quantizing import Target

        most = None if self.max_mb is None else int(self.max_mb * 1e6)
        return Target(self.min_psnr, most, self.step)


@click.command("quantize")
@model_argument
@click.option(
    "--mode",
    help=f"One of {', '.join(sorted([*modes(), CALIBRATED]))}; several compose, left to right: prune,eightbit.",
)
@click.option("--sparsity", type=float, help="For prune: the share of weights to set to 0.  [default: 0.5]")
@click.option(
    "--scope", type=click.Choice(["tensor", "global"]), help="For prune: one threshold per tensor or one for all."
)
@click.option("--block", type=int, help="For int8 and int4: weights that share a scale; 0: an output channel.")
@click.option("--include", multiple=True, metavar="GLOB", help="Quantize only these tensors (* matches / too).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these tensors as they are.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="A TOML file that says it per tensor.")
@click.option("--keep-all", is_flag=True, help="Keep optimizer state and what else only training needs.")
@click.option("--min-psnr", type=float, metavar="DB", help="For calibrated: the smallest file that keeps so much.")
@click.option("--max-mb", type=float, metavar="N", help="For calibrated: the best that fits N MB, of 1,000,000 bytes.")
@click.option("--step", type=float, help="For calibrated: how coarse, as a share of the outputs' peak, such as 0.01.")
@click.option(
    "--keep-quantized",
    is_flag=True,
    help="For calibrated: an ONNX file whose weights stay in 8 bits in memory when it runs.",
)
@click.option("--network", metavar="FILE.py:NAME", help="For calibrated: the Chainer network that MODEL belongs to.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]SHAPE",
    help="For calibrated: the shape of an input, as in 1,110, where the network does not tell.",
)
@calibration_options
@level_option
@no_compress_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write.  [default: <stem>.<mode>.<suffix>]"
)
@force_option
@json_option
@debug_option
def quantize_command(
    model: Path,
    mode: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    recipe_file: Path | None,
    keep_all: bool,
    min_psnr: float | None,
    max_mb: float | None,
    step: float | None,
    keep_quantized: bool,
    network: str | None,
    inputs: tuple[str, ...],
    level: int,
    no_compress: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
    **parameters: Any,
) -> None:
    """Make MODEL smaller, and show tensor by tensor what it cost.

    Weights (tensors of two dimensions or more) are quantized; biases, batch-norm values and counters are kept.

    Mode calibrated rounds by what the outputs of the network lose, and corrects biases. It runs the network, so it
    wants its graph: an ONNX file, or --network. PSNR is that of the outputs, on a quarter of the inputs, to
    which no weight is fitted. Interrupted, it goes on with the layers that are done.

    \b
    Example:
      shrink quantize gen.npz --mode eightbit
      shrink quantize gen.npz --mode float16 -o gen16.npz
      shrink quantize gen.npz --mode prune,eightbit --sparsity 0.7
      shrink quantize gen.npz --mode int8 --exclude 'conv1/*'
      shrink quantize webdnn_folder/ --mode eightbit
      shrink quantize model.onnx --mode calibrated --min-psnr 45 --calibrate photos/
      shrink quantize gen.npz --mode calibrated --max-mb 2 --network networks.py:Generator
      shrink quantize model.onnx --mode calibrated --min-psnr 45 --keep-quantized -o small.onnx
    """
    asked = Calibrating(**{f.name: parameters.pop(f.name) for f in dataclasses.fields(Calibrating)})
    bounds = Bounds(min_psnr, max_mb, step)
    if mode == CALIBRATED:
        set_by_others = [f"--{key}" for key, value in parameters.items() if value is not None]
        if recipe_file or set_by_others:
            raise UsageError(f"mode calibrated takes no {(set_by_others or ['--recipe'])[0]}")
        _calibrated(
            model, network, inputs, include, exclude, asked, bounds.checked(),
            keep_quantized=keep_quantized, output=output, force=force, keep_all=keep_all,
            level=None if no_compress else level, as_json=as_json,
        )  # fmt: skip
        return
    if bounds != Bounds() or keep_quantized or network or inputs or asked != Calibrating():
        raise UsageError(
            "--min-psnr, --max-mb, --step, --keep-quantized, --network, --input and what is about calibration "
            "belong to --mode calibrated"
        )
    chosen = {key: value for key, value in parameters.items() if value is not None}
    file_recipe = recipes.read(recipe_file) if recipe_file else None
    recipe = recipes.from_flags(mode, include, exclude, file_recipe, chosen)
    loaded = formats.sniff(model).read(model)
    source = loaded.source
    target_path = output or default_output(model, source.format, mode or "recipe", recipe.stores)
    target = formats.for_output(target_path, source.format)
    missing = recipe.stores - target.HOLDS
    if missing:
        raise UsageError(
            f"{target.NAME} cannot hold {sorted(missing)[0]} weights", hint="write a .safetensors file instead"
        )
    check_output(target_path, [model], force, folder=not target.SUFFIX)
    reduced = loaded if keep_all else pipeline.drop_state(loaded)
    decisions = pipeline.decided(reduced, recipe, to_webdnn=target.NAME == "webdnn")
    changes: list[Change] = []
    with bar("quantizing") as progress:
        entries = pipeline.quantized(reduced, decisions, progress, changes.append)
        stored = target.write(reduced, entries, target_path, None if no_compress else level)
    dropped = [t for t in loaded.tensors if t.role == "state"] if not keep_all else []
    _report_quantized(model, loaded, target_path, changes, stored, sum(t.size_bytes for t in dropped), as_json)


def _calibrated(
    model: Path,
    spec: str | None,
    inputs: tuple[str, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    asked: Calibrating,
    bounds: Bounds,
    *,
    keep_quantized: bool,
    output: Path | None,
    force: bool,
    keep_all: bool,
    level: int | None,
    as_json: bool,
) -> None:
    loaded = formats.sniff(model).read(model)
    target_path = output or beside(model, CALIBRATED, onnx.SUFFIX if keep_quantized else ".safetensors")
    target = formats.for_output(target_path, loaded.source.format)
    write = target.write
    if keep_quantized:
        if target.NAME != onnx.NAME:
            raise UsageError("--keep-quantized writes ONNX: name the output .onnx", file=target_path)
        write = partial(onnx.write, keep_quantized=True)
    elif CALIBRATED not in target.HOLDS:
        raise UsageError(f"{target.NAME} cannot hold calibrated weights", hint="write a .safetensors file instead")
    check_output(target_path, [model, *([asked.calibrate] if asked.calibrate else [])], force)
    network, notes = given.network_of(model, spec, inputs)
    if keep_quantized:
        onnx.check_keeps_quantized(network.model)
    calibration = calibration_of(network, asked)
    from shrink.calibrate import quantizing

    reduced = loaded if keep_all else pipeline.drop_state(loaded)
    decisions = quantizing.chosen_of(reduced, include, exclude, keep_quantized=keep_quantized)
    work = quantizing.Work(network, calibration, reduced, decisions, asked.seed, asked.effort, keep_quantized)

    def size_of(entries: Mapping[str, Entry]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model" + target.SUFFIX)
            write(reduced, quantizing.merged(reduced, entries), path, level)
            return size_on_disk(path)

    unfinished = target_path.with_name(f"{target_path.name}.unfinished")
    with bar("calibrating") as progress:
        done = quantizing.quantized(work, bounds.target(), size_of, unfinished, progress)
    stored = write(reduced, quantizing.merged(reduced, done.result.entries), target_path, level)
    done.store.clear()
    dropped = 0 if keep_all else sum(t.size_bytes for t in loaded.tensors if t.role == "state")
    changes = quantizing.changes(reduced, decisions, done.result)
    _report_quantized(
        model, loaded, target_path, changes, stored, dropped, as_json,
        facts=_facts(done, calibration), said=[*_said(done, calibration, is_made_up(asked, calibration)), *notes],
    )  # fmt: skip


def _facts(done: Quantizing, calibration: Calibration) -> dict[str, Any]:
    quality = done.result.quality
    return {
        "step": done.result.step,
        "passes": done.passes,
        "psnr_db": finite_or_none(quality.psnr_db),
        "mean_psnr_db": finite_or_none(quality.mean_psnr_db),
        "worst_psnr_db": finite_or_none(quality.worst_psnr_db),
        "cosine": quality.cosine,
        "synthetic_psnr_db": finite_or_none(done.elsewhere.psnr_db) if done.elsewhere else None,
        "calibration": {
            "source": calibration.source,
            "samples": len(calibration.samples),
            "held_out": done.held_out,
            "fitted": done.fitted,
            "fitted_added": done.fitted_added,
        },
        "layers": [{**dataclasses.asdict(layer), "shape": list(layer.shape)} for layer in done.result.layers],
    }


def _said(done: Quantizing, calibration: Calibration, made_up: bool) -> list[str]:
    quality = done.result.quality
    lines = [
        f"Outputs: PSNR {_decibels(quality.psnr_db)} over all samples, {_decibels(quality.mean_psnr_db)} in the mean, "
        f"{_decibels(quality.worst_psnr_db)} at worst, cosine {quality.cosine:.6f}; step {done.result.step:.4g}, "
        f"found in {done.passes} {'pass' if done.passes == 1 else 'passes'}."
    ]
    source = printable(calibration.source, at_most=400)
    if done.held_out:
        also = f" and {done.fitted_added} {calibration.added_are}" if done.fitted_added else ""
        lines.append(f"Calibrated on {done.fitted} samples{also}, measured on {done.held_out} others ({source}).")
    else:
        lines.append(f"Calibrated and measured on one sample ({source}): give more to know how it does on others.")
    if done.elsewhere is not None and done.elsewhere.psnr_db < quality.psnr_db - _MUCH_DB:
        lines.append(
            f"On {calibration.added_are} it keeps {_decibels(done.elsewhere.psnr_db)} only: --calibrate on inputs of "
            "every kind that it will see."
        )
    if made_up:
        lines.append("These inputs are made up: give your own with --calibrate to be sure, and for a smaller file.")
    if done.resumed:
        layers = "layer was" if done.resumed == 1 else "layers were"
        lines.append(f"{done.resumed} {layers} done already by a run that was interrupted.")
    return lines


def _decibels(psnr: float) -> str:
    return f"{psnr:.2f} dB" if math.isfinite(psnr) else "identical" if psnr > 0 else "not finite"


def _report_quantized(
    model: Path,
    loaded: Model,
    output: Path,
    changes: Sequence[Change],
    stored: Mapping[str, int],
    dropped_bytes: int,
    as_json: bool,
    *,
    facts: Mapping[str, Any] | None = None,
    said: Sequence[str] = (),
) -> None:
    output_bytes = size_on_disk(output)
    quantized = [c for c in changes if c.difference is not None]
    total = total_difference(quantized)
    result: dict[str, Any] = {
        "input": str(model),
        "output": str(output),
        "input_bytes": loaded.source.size_bytes,
        "output_bytes": output_bytes,
        "float_bytes": sum(c.original_bytes for c in changes),
        "dropped_state_bytes": dropped_bytes,
        "sqnr_db": finite_or_none(total.sqnr_db) if total else None,
        "max_error": total.max_error if total else None,
        "tensors": [
            {
                "name": c.name,
                "shape": list(c.shape),
                "mode": c.mode,
                "note": c.note,
                "original_bytes": c.original_bytes,
                "stored_bytes": stored.get(c.name),
                **(difference_of(c.difference) if c.difference else {}),
            }
            for c in changes
        ],
        **(facts or {}),
    }
    rows = [
        [
            printable(c.name),
            shape_of(c.shape),
            c.mode,
            f"{c.original_bytes:,}",
            f"{stored[c.name]:,}" if c.name in stored else "",
            f"{stored[c.name] / c.original_bytes:.1%}" if c.name in stored and c.original_bytes else "",
            *(difference_cells(c.difference)),
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
    lines += said
    if dropped_bytes:
        lines.append(f"Dropped {in_words(dropped_bytes)} of training state (--keep-all keeps it).")
    lines.append(f"Written: {printable(output)}")
    if output_bytes > loaded.source.size_bytes:
        click.echo("shrink: warning: the result is larger than what it was made from", err=True)
    emit(result, headers, rows, lines, as_json, None)
