"""Speed and memory of `shrink split` and `shrink join` on 218 MB, beside a plain copy of the same bytes.

    python -m benchmarks split [--rounds 7] [--folder DIR] [-o reports/split.json]

The file is a container of the pix2pix U-Net's shapes (54.4 M float32 weights, as they are), split at 20 MB. Everything
is written on one disk, each time under new names. `shrink` makes sure that what it wrote is on the disk before it
names it (fsync), so there are two copies to compare with: one that does so too, and one that leaves it to the system.
A copy by Python's own means is in the same process as the functions; the commands are whole processes beside `cp`.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Run, Timing, interleaved, process
from benchmarks.tables import Table, published
from shrink import parts
from shrink.progress import silent
from shrink.split import join, plan

_LIMIT = 20_000_000
_CONTAINER_COMMAND = """
import sys
from pathlib import Path
import shrink
from benchmarks import unet
from shrink.model import Model, Source, Tensor
tensors = tuple(Tensor.of(name, values) for name, values in unet.weights().items())
shrink.save(Model(tensors, Source("chainer-npz", Path("unet"), 0)), sys.argv[1], level=None)
"""
COPY, COPY_FSYNC = "copy", "copy, fsync"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks split", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write  [default: the system's temporary folder]")
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/split.json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        whole = folder / "unet.safetensors"
        # Made by a process of its own: the system counts the memory of whoever starts a process as the process's.
        process([sys.executable, "-c", _CONTAINER_COMMAND, str(whole)])
        index = _split_once(whole, folder / "set")
        commands = _commands(whole, index, folder, options.rounds)
        functions = _functions(whole, index, folder, options.rounds)
        shards = [part.size_bytes for part in parts.read_index(index).parts]
        result = {
            "bytes": whole.stat().st_size,
            "limit_bytes": _LIMIT,
            "shards": shards,
            "rounds": options.rounds,
            "functions": functions,
            "commands": commands,
        }
    published(result, __doc__ or "", tables(result), options.output)
    return 0


def _split_once(whole: Path, folder: Path) -> Path:
    """The set that is joined, checked once to give the very same bytes."""
    planned = plan(whole, limit=_LIMIT, output=folder)
    planned.write(silent)
    index = folder / planned.files[-1].name
    (back,) = join(index, folder / "back")
    if not filecmp.cmp(whole, back, shallow=False):
        raise RuntimeError("what was joined is not what was split")
    back.unlink()
    return index


def _copy(whole: Path, target: Path, *, fsync: bool) -> None:
    shutil.copyfile(whole, target)
    if fsync:
        with open(target, "rb") as file:
            os.fsync(file.fileno())


def _functions(whole: Path, index: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """The functions in this process. Removing what was written is part of no time."""
    places = (folder / f"f{i}" for i in itertools.count())
    written: list[Path] = []

    def fresh(work: Callable[[Path], object]) -> Callable[[], object]:
        def run() -> None:
            place = next(places)
            written.append(place)
            work(place)

        return run

    timings: dict[str, list[float]] = {}
    work = {
        COPY: fresh(lambda place: _copy(whole, place, fsync=False)),
        COPY_FSYNC: fresh(lambda place: _copy(whole, place, fsync=True)),
        "split": fresh(lambda place: plan(whole, limit=_LIMIT, output=place).write(silent)),
        "join": fresh(lambda place: join(index, place)),
    }
    for _ in range(rounds):
        for name, timing in interleaved(work, 1).items():
            timings.setdefault(name, []).extend(timing.seconds)
        _remove(written)
    return _rows({name: Timing(tuple(seconds)) for name, seconds in timings.items()})


def _commands(whole: Path, index: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Whole processes: reading the arguments, importing, working."""
    shrink = [sys.executable, "-m", "shrink"]
    runs: dict[str, list[Run]] = {}
    for i in range(rounds + 1):
        place = folder / f"c{i}"
        for name, command in {
            COPY: ["cp", str(whole), f"{place}-1"],
            COPY_FSYNC: ["sh", "-c", 'cp "$0" "$1" && sync "$1"', str(whole), f"{place}-2"],
            "split": [*shrink, "split", str(whole), "--max-mb", str(_LIMIT / 10**6), "-o", str(place)],
            "join": [*shrink, "join", str(index), "-o", f"{place}-3"],
        }.items():
            run = process(command)
            if i:
                runs.setdefault(name, []).append(run)
        _remove([place, *(Path(f"{place}-{n}") for n in (1, 2, 3))])
    rows = _rows({name: Timing(tuple(run.seconds for run in done)) for name, done in runs.items()})
    return {name: row | {"peak_bytes": max(run.peak_bytes for run in runs[name])} for name, row in rows.items()}


def _remove(places: list[Path]) -> None:
    for place in places:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    places.clear()


def _rows(timings: dict[str, Timing]) -> dict[str, Any]:
    return {
        name: {
            "seconds": timing.seconds,
            "median_seconds": timing.median,
            "times_a_copy_with_fsync": timing.ratio(timings[COPY_FSYNC]),
            "times_a_copy": timing.ratio(timings[COPY]),
        }
        for name, timing in timings.items()
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of a result, of the functions and of the commands."""
    shards = result["shards"]
    about = (
        f"{result['bytes']:,} bytes in {len(shards)} shards of {min(shards):,} to {max(shards):,} bytes, "
        f"median of {result['rounds']} rounds."
    )
    headers = ["", "seconds", "× a copy with fsync", "× a copy", "peak MB"]
    return [
        Table("functions", headers[:-1], [row[:-1] for row in _cells(result["functions"])], [about]),
        Table("commands", headers, _cells(result["commands"])),
    ]


def _cells(rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            name,
            f"{row['median_seconds']:.3f}",
            f"{row['times_a_copy_with_fsync']:.2f}",
            f"{row['times_a_copy']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
        ]
        for name, row in rows.items()
    ]
