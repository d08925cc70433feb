"""Malformed HDF5 files, built from a good one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]

from tests.samples import Damaged


@dataclass(frozen=True)
class Builder:
    """Writes `<label>.h5` files into a folder; `fill` makes a good one of an empty h5py.File."""

    folder: Path
    fill: Callable[[Any], object]

    def put(self, label: str, data: bytes, *words: str) -> Damaged:
        """A file of these bytes."""
        path = self.folder / f"{label}.h5"
        path.write_bytes(data)
        return Damaged(label, path, words)

    def changed(self, label: str, change: Callable[[Any], object], *words: str) -> Damaged:
        """A good file that `change` has spoiled."""
        path = self.folder / f"{label}.h5"
        with h5py.File(path, "w") as file:
            self.fill(file)
            change(file)
        return Damaged(label, path, words)
