"""What a benchmark is asked, and what passes between the parts that measure it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shrink.export import Network
from shrink.progress import Progress

__all__ = [
    "BACKENDS",
    "MODES",
    "NETWORKS",
    "ORIGINAL",
    "BrowserOptions",
    "Cell",
    "Inputs",
    "OnDocument",
    "Plan",
    "Sites",
    "Values",
    "Variant",
]

Values = Mapping[str, NDArray[Any]]
"""Arrays by the names of the network's inputs or outputs: those of one sample."""

OnDocument = Callable[[dict[str, Any]], None]
"""Hears of the document, so far as it is measured, after every finished part. It must not change it."""

ORIGINAL = "float32"
"""The name of the first variant, the one that all others are measured against."""

MODES = ("float16", "eightbit", "int8", "prune")
"""Those that are measured where the user names none."""

BACKENDS = ("wasm", "webgpu")
"""What the user may ask for. "wasm" is measured twice, as "wasm-1" with one thread and as "wasm" with all."""

NETWORKS = ("10mbit", "4g", "offline-cache")
"""Speeds that a download can be held to. "offline-cache" is the second visit, from the browser's cache."""


@dataclass(frozen=True)
class Variant:
    """One way of storing the network's weights.

    `network` is ready for `shrink.export`, without a recipe: its model has the graph, and the weights as they are
    stored. `file` is a file that holds them: what the user has, or what `shrink quantize` writes.
    """

    name: str
    mode: str | None
    file: Path
    network: Network


@dataclass(frozen=True)
class Inputs:
    """The samples that every variant is run on: `data` is an .npz, None for `count` seeded ones; `labels` an .npy."""

    data: Path | None = None
    labels: Path | None = None
    count: int = 6


@dataclass(frozen=True)
class BrowserOptions:
    """What is measured in the browser: `backends` out of BACKENDS, () for no browser at all.

    `network` is one of NETWORKS, None for unthrottled. A warm measurement ends after `runs` runs of each variant or
    after `seconds`, whichever is later. `chromium` is the browser's executable, None for the one on the PATH.
    `server` asks for the baseline as well: the same network behind a server on this machine.
    """

    backends: tuple[str, ...] = BACKENDS
    network: str | None = None
    runs: int = 30
    seconds: float = 10.0
    cold_runs: int = 3
    chromium: Path | None = None
    server: bool = False


@dataclass(frozen=True)
class Plan:
    """One benchmark: `network` is the float32 original, `source` how the user named it, `created` the time (ISO 8601).

    Variants are made by `modes`, such as "eightbit" or "prune+int8"; where there are `files`, by those instead.
    `slow` asks for what takes minutes as well: brotli of large files, the layers of large networks. `runtime` is a
    folder of the npm package onnxruntime-web.
    """

    network: Network
    source: str
    created: str
    command: str = ""
    modes: tuple[str, ...] = MODES
    files: tuple[Path, ...] = ()
    inputs: Inputs = field(default_factory=Inputs)
    browser: BrowserOptions = field(default_factory=BrowserOptions)
    slow: bool = False
    runtime: Path | None = None


class Sites(Protocol):
    """Exported folders of the variants, made when they are first asked for and gone when the benchmark ends."""

    def folder(self, variant: Variant, backend: str, progress: Progress) -> Path:
        """The folder of a page that runs `variant` on `backend`, "wasm" or "webgpu". It must not be changed.

        Raises:
            ShrinkError: the variant cannot be exported.
        """


@dataclass(frozen=True)
class Cell:
    """What one variant did on one backend: "wasm-1", "wasm" or "webgpu".

    `latency` is that part of the document; where it went wrong, its "problem" says how. `outputs` are those of the
    samples, in order, empty where the page never got that far; floats are float32.
    """

    variant: str
    backend: str
    latency: dict[str, Any]
    outputs: tuple[Mapping[str, NDArray[np.float32]], ...] = ()
