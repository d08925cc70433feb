"""What the commands share: a progress bar on stderr, the result on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from shrink.errors import printable
from shrink.files import atomic_file
from shrink.progress import Progress

__all__ = ["bar", "emit", "in_words", "size_on_disk"]


@contextlib.contextmanager
def bar(label: str) -> Iterator[Progress]:
    """A progress bar on stderr with an estimate; nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda name, done, total: None
        return
    with contextlib.ExitStack() as shown:
        bars: list[Any] = []

        def show(name: str, done: int, total: int) -> None:
            # Work that is nothing after all shows nothing.
            if not bars:
                made = click.progressbar(length=1, label=label, file=sys.stderr, item_show_func=lambda item: item)
                bars.append(shown.enter_context(made))
            bars[0].length = max(total, 1)
            bars[0].update(done - bars[0].pos, printable(name)[:40])

        yield show


def size_on_disk(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def in_words(count: int) -> str:
    return f"{count:,} bytes" if count < 100_000 else f"{count / 1e6:,.2f} MB"


def emit(
    result: Mapping[str, Any],
    headers: list[str],
    rows: list[list[str]],
    lines: list[str],
    as_json: bool,
    output: Path | None,
) -> None:
    if as_json:
        text = json.dumps(result, ensure_ascii=False, indent=2, allow_nan=False)
    else:
        align = ["right" if h in _NUMBERS else "left" for h in headers]
        table = [tabulate(rows, headers, colalign=align, disable_numparse=True), ""] if rows else []
        text = "\n".join([*table, *lines])
    if output is None:
        try:
            click.echo(text)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader of a pipe went away, as `head` does: no error of ours. What is left to say has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        with atomic_file(output) as file:
            file.write((text + "\n").encode())


_NUMBERS = frozenset({"bytes", "share", "min", "max", "zeros", "bits", "now", "%", "max |error|", "RMSE", "SQNR dB"})
