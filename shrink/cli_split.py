"""The commands for hosts that refuse large files: `shrink split`, `shrink join` and `shrink hosts`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from shrink import formats, site, split
from shrink.cli_shared import debug_option, force_option, json_option
from shrink.errors import UsageError, printable
from shrink.files import file_size, io_errors
from shrink.manifest import is_manifest
from shrink.split import hosts
from shrink.terminal import bar, emit, in_words, size_on_disk

__all__ = ["hosts_command", "join_command", "split_command"]


@click.command("split")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--max-mb", type=float, metavar="N", help="No file above N MB, of 1,000,000 bytes.")
@click.option("--max-mib", type=float, metavar="N", help="No file above N MiB, of 1,048,576 bytes.")
@click.option("--host", "host_name", metavar="NAME", help="No file above what that host takes: see `shrink hosts`.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The folder to write into.  [default: where MODEL is]"
)
@click.option("--cut", is_flag=True, help="For ONNX: cut the network itself into stages that run one after another.")
@click.option(
    "--input", "inputs", multiple=True, metavar="[NAME=]SHAPE", help="For --cut: the shape of an input, as in 1,110."
)
@click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
@force_option
@json_option
@debug_option
def split_command(
    model: Path | None,
    max_mb: float | None,
    max_mib: float | None,
    host_name: str | None,
    output: Path | None,
    cut: bool,
    inputs: tuple[str, ...],
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write MODEL as several files, none larger than the host takes; the loader and `shrink join` put them together.

    MODEL is a file of weights, an ONNX file, a WebDNN folder, or a folder that `shrink export` wrote; the one model in
    this folder where it is left out. A folder for the web is split in place.

    \b
    Example:
      shrink split gen.eightbit.safetensors --max-mb 20
      shrink split --max-mb 20
      shrink split site/ --host cloudflare-pages
      shrink split model.onnx --max-mb 20 --cut
    """
    limit, limit_in_words, host = hosts.limit(max_mb, max_mib, host_name)
    if inputs and not cut:
        raise UsageError("--input is for --cut")
    source = model if model is not None else split.the_model_in(Path())
    plan = _plan(source, limit, output, cut, inputs, force, dry_run)
    if host is not None:
        is_page = source.is_dir() and any(source.glob("*.html"))
        for warning in hosts.warnings(host, _sizes(plan, source), is_page=is_page):
            click.echo(f"shrink: warning: {printable(warning, at_most=400)}", err=True)
    if not dry_run:
        with bar("splitting") as progress:
            plan.write(progress)
    _report_split(plan, limit_in_words, cut, dry_run, as_json)


def _plan(
    source: Path,
    limit: int,
    output: Path | None,
    cut: bool,
    inputs: tuple[str, ...],
    force: bool,
    dry_run: bool,
) -> split.Plan:
    split.refuse_index(source)
    if cut and is_manifest(source):
        raise UsageError("a page is cut when it is exported", file=source, hint="shrink export … --cut --max-mb N")
    if cut and (source.is_dir() or formats.sniff(source).NAME != "onnx"):
        raise UsageError("--cut is for ONNX files", file=source)
    size = _size_of_all(source, limit)
    if size is not None and size <= limit:
        note = f"{printable(source.name)} fits already: {size:,} bytes."
        return split.Plan(source, output or source.parent, limit, (), (note,), lambda progress: None)
    if not cut:
        return split.plan(source, limit=limit, output=output, force=force, dry_run=dry_run)
    from shrink.split import cut as cutting

    shapes = site.input_shapes(formats.sniff(source).read(source), inputs) if inputs else None
    folder = output or source.parent
    return cutting.plan(source, limit, folder, force=force, dry_run=dry_run, input_shapes=shapes)


def _size_of_all(source: Path, limit: int) -> int | None:
    """The bytes of a model in one file, with what an ONNX file keeps elsewhere; None for a folder."""
    if source.is_dir():
        return None
    kind, size = formats.sniff(source), file_size(source)
    return kind.read(source).source.size_bytes if kind.NAME == "onnx" and size <= limit else size


def _sizes(plan: split.Plan, source: Path) -> dict[str, int]:
    """What is to be uploaded, path and bytes: the plan's files, and what else lies in a folder that is split."""
    sizes = {}
    if not plan.files and not source.is_dir():
        sizes[source.name] = file_size(source)
    if source.is_dir():
        with io_errors(source):
            for path in source.rglob("*"):
                if path.is_file() and path.stat().st_size <= plan.limit_bytes:
                    sizes[path.relative_to(source).as_posix()] = path.stat().st_size
    return sizes | {file.name: file.size_bytes for file in plan.files}


def _report_split(plan: split.Plan, limit_in_words: str, cut: bool, dry_run: bool, as_json: bool) -> None:
    largest = max((file.size_bytes for file in plan.files), default=0)
    result: dict[str, Any] = {
        "input": str(plan.source),
        "output": str(plan.folder),
        "limit_bytes": plan.limit_bytes,
        "largest_bytes": largest,
        "dry_run": dry_run,
        "files": [{"file": f.name, "bytes": f.size_bytes, "holds": f.holds} for f in plan.files],
        "notes": list(plan.notes),
    }
    rows = [[printable(f.name), f"{f.size_bytes:,}", printable(f.holds)] for f in plan.files]
    lines = [printable(note, at_most=1000) for note in plan.notes]
    if plan.files:
        lines += [
            f"{len(plan.files)} files, the largest {in_words(largest)}, limit {limit_in_words}.",
            *_what_next(plan, cut, dry_run),
        ]
    emit(result, ["file", "bytes", "holds"], rows, lines, as_json, None)


def _what_next(plan: split.Plan, cut: bool, dry_run: bool) -> list[str]:
    if dry_run:
        return ["Nothing is written: this was --dry-run."]
    if plan.source.is_dir():
        return [f"Upload the folder as it is: {printable(plan.folder, at_most=1000)}"]
    index = plan.folder / plan.files[-1].name
    if cut:
        return [f"Upload all of them: {printable(index.name)} says how the stages follow each other."]
    loads = f": a page loads {printable(index.name)}" if index.name.endswith(".safetensors.index.json") else ""
    # A name that begins with a dash would be taken for an option.
    path = f"./{index}" if str(index).startswith("-") else str(index)
    joins = printable(shlex.quote(path), at_most=1000)
    return [f"Upload all of them{loads}.", f"To have it back: shrink join {joins}"]


@click.command("join")
@click.argument("index", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where to write.  [default: its old name, beside the index]"
)
@force_option
@json_option
@debug_option
def join_command(index: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Put together what `shrink split` made: the very same bytes, every part checked by its SHA-256.

    INDEX is the index file, or the folder that was split.

    \b
    Example:
      shrink join gen.eightbit.safetensors.index.json -o gen.eightbit.safetensors
      shrink join site/
    """
    with bar("joining") as progress:
        written = split.join(index, output, force=force, progress=progress)
    sizes = {str(path): size_on_disk(path) for path in written}
    result = {"input": str(index), "output_bytes": sum(sizes.values()), "files": sizes}
    lines = [f"Written: {printable(path, at_most=1000)}, {in_words(size)}" for path, size in sizes.items()]
    emit(result, [], [], lines, as_json, None)


@click.command("hosts")
@json_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result here instead of stdout.")
@force_option
@debug_option
def hosts_command(as_json: bool, output: Path | None, force: bool) -> None:
    """Show what hosts accept: the largest file, the whole site, the number of files, and who says so.

    \b
    Example:
      shrink hosts
      shrink hosts --json | jq '.hosts["cloudflare-pages"].file_bytes'
    """
    if output is not None and output.exists() and not force:
        raise UsageError("exists already", file=output, hint="--force replaces it")
    table = hosts.all_hosts()
    rows = [[host.name, host.file or _UNPUBLISHED, host.site or _UNPUBLISHED, _count(host)] for host in table.values()]
    lines = [line for host in table.values() for line in (*_about(host), "")]
    lines.append("To use one: shrink split MODEL --host NAME")
    result = {"hosts": {host.name: _as_json(host) for host in table.values()}}
    emit(result, ["host", "one file", "all files", "how many"], rows, lines, as_json, output)


_UNPUBLISHED = "not published"


def _count(host: hosts.Host) -> str:
    if host.files is not None:
        return f"{host.files:,}"
    return _UNPUBLISHED if host.files_per_folder is None else f"{host.files_per_folder:,} a folder"


def _about(host: hosts.Host) -> list[str]:
    """What the numbers leave out, and who says it."""
    stated = f" (said on {host.stated})" if host.stated else ""
    return [
        f"{host.name}: {host.title}{f'; {host.note}' if host.note else ''}",
        *(f"  It {cannot.what}: {cannot.source}" for cannot in host.cannot),
        f"  Read on {host.read}{stated}: {' '.join(host.sources)}",
    ]


def _as_json(host: hosts.Host) -> dict[str, Any]:
    return {
        "title": host.title,
        "file_bytes": host.file_bytes,
        "site_bytes": host.site_bytes,
        "files": host.files,
        "files_per_folder": host.files_per_folder,
        "note": host.note,
        "cannot": [{"what": c.what, "of": c.of, "source": c.source, "stated": _day(c.stated)} for c in host.cannot],
        "sources": list(host.sources),
        "read": _day(host.read),
        "stated": _day(host.stated),
    }


def _day(day: Any) -> str | None:
    return None if day is None else day.isoformat()
