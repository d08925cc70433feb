"""The commands that end in a browser: `shrink export` and `shrink serve`."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from shrink import given, site
from shrink import recipe as recipes
from shrink.cli_shared import debug_option
from shrink.errors import OutputError, ShrinkError, UsageError, printable
from shrink.export import Target, all_targets, by_name
from shrink.files import atomic_folder
from shrink.manifest import MANIFEST
from shrink.pipeline import Change
from shrink.split import hosts
from shrink.split import site as splitting
from shrink.terminal import bar, emit, in_words

__all__ = ["export", "serve"]


@click.command()
@click.argument("model")
@click.option(
    "--weights", type=click.Path(path_type=Path), help="For a network in Python: its snapshot, of any format."
)
@click.option("--to", "target", required=True, help="What runs it: " + ", ".join(t.NAME for t in all_targets()) + ".")
@click.option("--mode", help="Quantize the weights on the way, as `shrink quantize` does: eightbit, float16 …")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="A TOML file that says it per tensor.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]SHAPE",
    help="The shape of an input, as in 1,3,224,224, one after the other; of an ONNX file also by NAME=.",
)
@click.option("--backend", help="For onnxruntime-web: wasm or webgpu.  [default: wasm]")
@click.option(
    "--runtime",
    type=click.Path(path_type=Path),
    help="A folder of the npm package onnxruntime-web or webdnn, any version.",
)
@click.option(
    "--max-mb", type=float, metavar="N", help="No file above N MB: larger ones are split, see `shrink split`."
)
@click.option("--max-mib", type=float, metavar="N", help="No file above N MiB.")
@click.option("--host", "host_name", metavar="NAME", help="No file above what that host takes: see `shrink hosts`.")
@click.option("--cut", is_flag=True, help="Cut the network into stages within the limit that run one after another.")
@click.option("--sequential", is_flag=True, help="With --cut: load, run and drop one stage at a time; saves memory.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--force", is_flag=True, help="Replace an exported page.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@debug_option
def export(
    model: str,
    weights: Path | None,
    target: str,
    mode: str | None,
    recipe_file: Path | None,
    inputs: tuple[str, ...],
    backend: str | None,
    runtime: Path | None,
    max_mb: float | None,
    max_mib: float | None,
    host_name: str | None,
    cut: bool,
    sequential: bool,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Write MODEL as a folder that a static host serves: a page, the network and what runs it.

    MODEL is an ONNX file, or a .safetensors file that shrink made of one; or a Chainer network as FILE.py:NAME, with
    --weights and --input. That file is run, as if you had, with what it imports from its folder: give only one that
    you trust. A file of weights never is.

    What runs it in the browser, the npm package onnxruntime-web or webdnn, is taken from node_modules, or else
    downloaded once from registry.npmjs.org and checked against its SHA-512.

    \b
    Example:
      shrink export networks.py:Generator --weights gen.npz --input 1,110 --to webdnn -o site/
      shrink export model.onnx --to onnxruntime-web --mode eightbit --backend webgpu -o site/
      shrink export model.onnx --to onnxruntime-web --max-mb 20 --cut --sequential -o site/
      shrink serve site/
    """
    writer = by_name(target)
    limit, host = _limit(max_mb, max_mib, host_name, cut, sequential)
    options = _options(
        writer, backend=backend, runtime=runtime, cut=limit if cut else None, sequential=sequential or None
    )
    recipe = None
    if mode is not None or recipe_file is not None:
        recipe = recipes.from_flags(mode, (), (), recipes.read(recipe_file) if recipe_file else None, {})
        for stores in sorted(recipe.stores - writer.HOLDS):
            raise UsageError(f"{writer.NAME} cannot hold {stores} weights")
    _check_output(output, force)
    network, notes = given.network(model, weights, inputs)
    with bar("exporting") as progress, atomic_folder(output) as folder, _naming(output, folder):
        exported = writer.export(network, folder, recipe, progress, **options)
        manifest = site.add_page(folder, target, network.title, exported)
        if limit is not None:
            splitting.plan(folder, limit, folder).write(progress)
            manifest = json.loads((folder / MANIFEST).read_bytes())
    if host is not None:
        for warning in hosts.warnings(host, _sizes(manifest), is_page=True):
            click.echo(f"shrink: warning: {printable(warning, at_most=400)}", err=True)
    _report(model, output, exported.changes, [*notes, *exported.notes], manifest, as_json)


def _limit(
    max_mb: float | None, max_mib: float | None, host_name: str | None, cut: bool, sequential: bool
) -> tuple[int | None, hosts.Host | None]:
    if sequential and not cut:
        raise UsageError("--sequential is for --cut")
    if not cut and max_mb is None and max_mib is None and host_name is None:
        return None, None
    limit, _, host = hosts.limit(max_mb, max_mib, host_name)
    return limit, host


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of every file of the page, by path."""
    sizes: dict[str, int] = {}
    for path, about in manifest["files"].items():
        folder, _, _ = path.rpartition("/")
        parts = {f"{folder}/{part['file']}".lstrip("/"): part["bytes"] for part in about.get("parts", ())}
        sizes |= parts or {path: about["bytes"]}
    return sizes


@contextlib.contextmanager
def _naming(output: Path, folder: Path) -> Iterator[None]:
    """Errors about `folder`, which nobody finds any more, are about `output`."""
    try:
        yield
    except ShrinkError as error:
        if isinstance(error.file, Path) and error.file.is_relative_to(folder):
            error.file = output / error.file.relative_to(folder)
        raise


def _options(target: Target, **options: Any) -> dict[str, Any]:
    """Those that were given. A target takes the ones it knows as keyword arguments."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in sorted(given.keys() - inspect.signature(target.export).parameters.keys()):
        raise UsageError(f"--{name} is not for {target.NAME}")
    return given


def _check_output(output: Path, force: bool) -> None:
    if not output.resolve().parent.is_dir():
        raise OutputError("its folder does not exist", file=output, hint="make it first")
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError("is not a folder", file=output)
    if not site.is_ours(output):
        raise UsageError("holds files that shrink did not export", file=output, hint="choose another -o")
    if any(output.iterdir()) and not force:
        raise UsageError("exists already", file=output, hint="--force replaces it")


def _report(
    model: str,
    output: Path,
    changes: Sequence[Change],
    notes: Sequence[str],
    manifest: dict[str, Any],
    as_json: bool,
) -> None:
    sizes = _sizes(manifest)
    result = {
        "input": model,
        "output": str(output),
        "output_bytes": sum(sizes.values()),
        "files": sizes,
        "tensors": [_change(change) for change in changes],
        "notes": list(notes),
    }
    rows = [[printable(path), f"{count:,}"] for path, count in sorted(sizes.items(), key=lambda item: (-item[1], item))]
    lines = [
        *_became(changes),
        *notes,
        f"Written: {printable(output)}, {in_words(sum(sizes.values()))}. To see it: shrink serve {printable(output)}",
    ]
    emit(result, ["file", "bytes"], rows, lines, as_json, None)


def _change(change: Change) -> dict[str, Any]:
    out: dict[str, Any] = {"name": change.name, "mode": change.mode, "note": change.note}
    if change.difference is not None:
        out |= {"max_error": change.difference.max_error, "rmse": change.difference.rmse}
    return out


def _became(changes: Sequence[Change]) -> list[str]:
    counts: dict[str, int] = {}
    for change in changes:
        counts[change.mode] = counts.get(change.mode, 0) + 1
    if not counts:
        return []
    worst = max((c.difference.max_error for c in changes if c.difference is not None), default=0.0)
    parts = ", ".join(f"{count} {mode}" for mode, count in sorted(counts.items()))
    return [f"Tensors: {parts}; max |error| of a weight {worst:.3g}."]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="The port.  [default: one that is free]")
@click.option("--json", "as_json", is_flag=True, help="Print the address as JSON.")
@debug_option
@click.pass_context
def serve(context: click.Context, folder: Path, port: int, as_json: bool) -> None:
    """Serve FOLDER to browsers on this machine, and on this one only, until Ctrl-C.

    \b
    Example:
      shrink serve site/
      shrink serve site/ --port 8000
    """
    from shrink.serve import Server

    with Server(folder, port, lambda line: click.echo(printable(line), err=True)) as server:
        emit({"address": server.url}, [], [], [server.url], as_json, None)
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            # How everyone ends a server: no message, and the exit code of an interrupt.
            context.exit(130)
