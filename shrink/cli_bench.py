"""The commands that measure and show: `shrink bench` and `shrink report`."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from shrink import formats, given
from shrink.bench import BACKENDS, MODES, NETWORKS, BrowserOptions, Inputs, Plan, document, measure, summary, wording
from shrink.bench.document import RUNS_AT_MOST
from shrink.cli_shared import command_line, debug_option, json_option, listed, page_beside, write_page
from shrink.errors import MissingDependency, OutputError, ShrinkError, UsageError, printable
from shrink.files import io_errors
from shrink.progress import Progress
from shrink.terminal import emit, in_words, size_on_disk

__all__ = ["bench_command", "report_command"]

Document = dict[str, Any]

_force = click.option("--force", is_flag=True, help="Replace an existing report.")
_file = click.Path(path_type=Path)

_GATE_CLOSED = 4
_REASONS_SHOWN = 8
# What a document that is only a part says of the other.
_REST, _INTERRUPTED = "the rest", "interrupted"
# Who made a page stands in its head.
_HEAD_BYTES = 1 << 16


@click.command("bench")
@click.argument("model")
@click.argument("variants", nargs=-1, type=_file, metavar="[VARIANT]...")
@click.option("--weights", type=_file, help="For a network in Python: its snapshot, of any format.")
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SHAPE", help="The shape of an input, as in 1,110.")
@click.option(
    "--modes", metavar="LIST", help=f"What to measure; + composes, as in prune+int8.  [default: {','.join(MODES)}]"
)
@click.option("--data", type=_file, help="An .npz with inputs by their names, or one array of them; else seeded ones.")
@click.option("--labels", type=_file, help="For --data: an .npy with the right classes.")
@click.option(
    "--backends", default=",".join(BACKENDS), show_default=True, metavar="LIST", help="Or none, for no browser at all."
)
@click.option("--network", metavar="|".join(NETWORKS), help="Hold the downloads to this.  [default: not throttled]")
@click.option("--server", is_flag=True, help="Also the same network behind a server on this machine.")
@click.option(
    "--runs", type=click.IntRange(1, RUNS_AT_MOST), default=30, show_default=True, help="Warm runs of each, at least."
)
@click.option(
    "--seconds", type=click.FloatRange(0, 3600), default=10.0, show_default=True, help="Of warm runs, at least."
)
@click.option("--visits", type=click.IntRange(1, 100), default=3, show_default=True, help="First visits of each.")
@click.option("--samples", type=click.IntRange(1, 1000), default=6, show_default=True, help="How many seeded inputs.")
@click.option("--slow", is_flag=True, help="Also what takes minutes: brotli of large files, layers of deep networks.")
@click.option("--fail-under", multiple=True, metavar="METRIC=N", help="Exit 4 below this, as in psnr=40.")
@click.option("--fail-over", multiple=True, metavar="METRIC=N", help="Exit 4 above this, as in first-visit-mb=2.")
@click.option("--runtime", type=_file, help="A folder of the npm package onnxruntime-web, any version.")
@click.option("--chromium", type=_file, help="The browser.  [default: the one on the PATH]")
@click.option("-o", "--output", type=_file, help="Where to write.  [default: <stem>.bench.html beside the model]")
@_force
@json_option
@debug_option
@click.pass_context
def bench_command(
    context: click.Context,
    /,
    model: str,
    variants: tuple[Path, ...],
    weights: Path | None,
    inputs: tuple[str, ...],
    modes: str | None,
    data: Path | None,
    labels: Path | None,
    samples: int,
    slow: bool,
    fail_under: tuple[str, ...],
    fail_over: tuple[str, ...],
    runtime: Path | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    **browser: Any,
) -> None:
    """Measure MODEL beside smaller variants of it: size, accuracy, and latency in a real browser.

    MODEL is an ONNX file, or a .safetensors file that shrink made of one; or a Chainer network as FILE.py:NAME, with
    --weights and --input, which is run. The variants are made by --modes, or are the files that you name.

    Writes a report, one HTML file, and the numbers beside it as .json. Ctrl-C keeps what has been measured. What
    --fail-under and --fail-over can name, --json prints. The peak of PSNR and SSIM is 1 where the original's values
    are from 0 to 1, 2 where they are from -1 to 1, 255 where they are bytes, and else the range that they have.

    \b
    Example:
      shrink bench model.onnx
      shrink bench model.onnx model.eightbit.onnx --data images.npz --labels y.npy -o report.html
      shrink bench networks.py:Generator --weights gen.npz --input 1,110 --modes eightbit,prune+int8
      shrink bench model.onnx --fail-under psnr=40 --fail-over first-visit-mb=2
    """
    bounds = [summary.bound(text, at_most=False) for text in fail_under]
    bounds += [summary.bound(text, at_most=True) for text in fail_over]
    if variants and modes is not None:
        raise UsageError("--modes makes variants, and files are variants already", hint="give one of the two")
    page, numbers = _outputs(output or page_beside(model, weights, "bench"))
    _check_outputs([page, numbers], [Path(model), *variants, *_present(weights, data, labels)], force)
    _needs_templates()
    for path in variants:
        formats.sniff(path)
    network, notes = given.network(model, weights, inputs)
    plan = Plan(
        network,
        model,
        datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=command_line(context),
        modes=listed(modes, "--modes") if modes is not None else MODES,
        files=variants,
        inputs=Inputs(data, labels, samples),
        browser=_browser_options(**browser),
        slow=slow,
        runtime=runtime,
    )
    measured: list[Document] = []
    try:
        with _estimates() as progress:
            found = measure(plan, lambda so_far: measured.__setitem__(slice(None), [so_far]), progress)
    except BaseException as error:
        # Ctrl-C, or something gives up half-way: minutes of measuring are not thrown away.
        for part in measured:
            _keep(part, error, notes, page, numbers, as_json)
        raise
    found = document.checked(found)
    found["checks"] = summary.evaluated(found, bounds, () if variants else plan.modes)
    _finish(found, notes, page, numbers, as_json)
    failed = [check for check in found["checks"] if not check["met"]]
    for check in failed:
        click.echo(f"shrink: error: {_failed(check)}", err=True)
    if failed:
        context.exit(_GATE_CLOSED)


@click.command("report")
@click.argument("data", type=_file, metavar="DATA.json")
@click.option("-o", "--output", type=_file, help="The page to write.  [default: DATA.html]")
@_force
@json_option
@debug_option
def report_command(data: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Make the page of DATA.json, which `shrink bench` or `shrink curve` wrote, again. Nothing is measured.

    \b
    Example:
      shrink report reports/gen.json -o gen.html
    """
    page, _ = _outputs(output or data.with_suffix(".html"))
    # What was rendered may be rendered again.
    _check_outputs([page], [data], force or _is_report(page))
    _needs_templates()
    from shrink.bench import curve, report

    if curve.is_one(data):
        _draw_curve(data, page, as_json)
        return
    found = document.read(data)
    write_page(page, report.render(found))
    _show(found, [], page, data, as_json)


# What is asked


def _browser_options(
    *,
    backends: str,
    network: str | None,
    server: bool,
    runs: int,
    seconds: float,
    visits: int,
    chromium: Path | None,
) -> BrowserOptions:
    names = () if backends.strip() == "none" else listed(backends, "--backends")
    if len(set(names)) < len(names):
        raise UsageError("a backend is named twice")
    return BrowserOptions(names, network, runs, seconds, visits, chromium, server)


# Where it goes


def _outputs(page: Path) -> tuple[Path, Path]:
    """The page, and the numbers beside it."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError("a report is an .html file", file=page, hint="the .json is written beside it")
    return page, page.with_suffix(".json")


def _present(*paths: Path | None) -> list[Path]:
    return [path for path in paths if path is not None]


def _is_report(page: Path) -> bool:
    """Whether this is a page that shrink wrote."""
    if not page.is_file():
        return False
    with io_errors(page), open(page, "rb") as file:
        return b'<meta name="generator" content="shrink">' in file.read(_HEAD_BYTES)


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path], force: bool) -> None:
    for output in outputs:
        with io_errors(output):
            if any(output.resolve() == path.resolve() for path in inputs):
                raise UsageError("that is an input", file=output, hint="choose another -o")
            if output.is_dir():
                raise UsageError("is a folder", file=output)
            if output.exists() and not force:
                raise UsageError("exists already", file=output, hint="--force replaces it")
            if not output.resolve().parent.is_dir():
                raise OutputError("its folder does not exist", file=output, hint="make it first")


def _needs_templates() -> None:
    # Found out now and not after minutes of measuring.
    if find_spec("jinja2") is None:
        raise MissingDependency("jinja2", "bench")


def _finish(found: Document, notes: Sequence[str], page: Path, numbers: Path, as_json: bool) -> None:
    from shrink.bench import report

    document.write(found, numbers)
    write_page(page, report.render(found))
    _show(found, notes, page, numbers, as_json)


def _keep(part: Document, error: BaseException, notes: Sequence[str], page: Path, numbers: Path, as_json: bool) -> None:
    """Write what had been measured when `error` came, which is the one that the user must hear of in the end."""
    why = str(error) if isinstance(error, ShrinkError) else _INTERRUPTED
    rest = {"what": _REST, "why": document.cut(why, document.WHY_CHARACTERS)}
    try:
        found = document.checked({**part, "not_measured": [*part["not_measured"], rest]})
        _finish(found, notes, page, numbers, as_json)
    except ShrinkError as another:
        click.echo(f"shrink: error: what had been measured is lost: {another}", err=True)


def _draw_curve(data: Path, page: Path, as_json: bool) -> None:
    from shrink.bench import curve, curve_page

    found = curve.read(data)
    write_page(page, curve_page.render(found))
    written = f"Written: {printable(page, at_most=1000)} ({in_words(size_on_disk(page))})"
    emit(found, [], [], [curve_page.headline(found), written], as_json, None)


# What is said


@contextlib.contextmanager
def _estimates() -> Iterator[Progress]:
    """A bar on stderr for each part of the work, with an estimate of what is left of it; nothing without a terminal."""
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    with click.progressbar(length=1, label="measuring", file=sys.stderr, item_show_func=lambda item: item) as bar:

        def show(name: str, done: int, total: int) -> None:
            total = max(total, 1)
            if done < bar.pos or total != bar.length:
                # The next part of the work: what the last one took says nothing about it.
                bar.length, bar.pos, bar.avg, bar.finished = total, 0, [], False
                bar.start = bar.last_eta = time.time()
            bar.update(min(done, total) - bar.pos, printable(name)[:40])

        yield show


def _show(found: Document, notes: Sequence[str], page: Path, numbers: Path, as_json: bool) -> None:
    verdicts = _verdicts(found)
    result = {
        "report": str(page),
        "data": str(numbers),
        "psnr_peak": wording.peak(found),
        "partial": found["partial"],
        "variants": [
            {"name": variant["name"], "verdict": verdicts.get(variant["name"]), **_metrics(variant)}
            for variant in found["variants"]
        ],
        "checks": found["checks"],
        "not_measured": found["not_measured"],
    }
    headers, rows = summary.table(found)
    align = ["left", *("right" for _ in headers[1:])]
    table = tabulate(rows, headers, colalign=align, disable_numparse=True).splitlines() if rows else []
    lines = [
        *([f"{_stopped(found)}: this is what had been measured.", ""] if found["partial"] else []),
        *table,
        "",
        *verdicts.values(),
        *_peak(found),
        *_adapter(found),
        *notes,
        *_missing(found["not_measured"] or []),
        *(f"{'met' if check['met'] else 'NOT met'}: {_bound(check)}" for check in found["checks"] or []),
        f"Written: {printable(page, at_most=1000)} ({in_words(size_on_disk(page))}), {printable(numbers.name)}",
    ]
    emit(result, [], [], lines, as_json, None)


def _verdicts(found: Document) -> dict[str, str]:
    from shrink.bench.verdicts import verdicts

    names = [variant["name"] for variant in found["variants"]]
    return dict(zip(names, (printable(v.text, at_most=400) for v in verdicts(found)), strict=True))


def _metrics(variant: Mapping[str, Any]) -> dict[str, float | None]:
    """Every metric that can be bounded, by its worst number; null where it was not measured, or nothing differs."""
    out: dict[str, float | None] = {}
    for name, metric in summary.METRICS.items():
        values = metric.values(variant)
        worst = (min(values) if metric.more_is_better else max(values)) if values else math.inf
        out[name] = worst if math.isfinite(worst) else None
    return out


def _stopped(found: Document) -> str:
    """Why the document is only a part of one: by Ctrl-C, or by an error, which stands among what is not measured."""
    why = next((entry["why"] for entry in found["not_measured"] if entry["what"] == _REST), _INTERRUPTED)
    return "Interrupted" if why == _INTERRUPTED else "Stopped by an error"


def _peak(found: Document) -> list[str]:
    peak = wording.peak(found)
    return [] if peak is None else [f"PSNR and SSIM: the peak is {peak:.4g}."]


def _adapter(found: Document) -> list[str]:
    browser = found["browser"]
    if not browser or not browser["software_adapter"]:
        return []
    return [f"WebGPU ran on {printable(browser['adapter'])}, in software: its times say nothing about graphics cards."]


def _missing(entries: Sequence[Mapping[str, str]]) -> list[str]:
    lines = [f"Not measured: {printable(e['what'])}: {printable(e['why'], at_most=200)}" for e in entries]
    more = len(lines) - _REASONS_SHOWN
    return lines if more <= 0 else [*lines[:_REASONS_SHOWN], f"Not measured: {more} more, which the report names"]


def _bound(check: Mapping[str, Any]) -> str:
    value = check["why"] if check["value"] is None else f"{check['value']:.6g}"
    return f"{printable(check['variant'])} {printable(check['check'])}: {printable(value)}"


def _failed(check: Mapping[str, Any]) -> str:
    return f"the check is not met: {_bound(check)}"
