"""Finished layers kept in a folder, so that interrupted work goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink import container
from shrink.calibrate.layer_result import LayerResult
from shrink.errors import ShrinkError
from shrink.files import atomic_file
from shrink.formats import safetensors
from shrink.model import Entry, Tensor

if TYPE_CHECKING:
    from shrink.calibrate.inputs import Calibration
    from shrink.export import Network

__all__ = ["Store", "identity_of"]

F64 = NDArray[np.float64]

_IDENTITY, _GRADIENTS, _LAYER = "identity", "gradients.npz", ".layer.safetensors"
_WEIGHTS = "weights.json"
_RESULT, _DIGEST = "layer", "digest"
# What NumPy and zipfile raise on damaged archives.
_DAMAGE = (
    *(OSError, ValueError, EOFError, KeyError, AttributeError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
# What is stored changes with this.
_VERSION = "4"


def identity_of(
    network: Network,
    calibration: Calibration,
    chosen: list[str],
    seed: int,
    effort: int,
    *,
    keep_quantized: bool = False,
) -> str:
    """What the work is about: the same for the same weights, graph, samples and settings."""
    digest = hashlib.sha256(json.dumps([_VERSION, sorted(chosen), seed, effort, keep_quantized]).encode())
    digest.update(network.model.graph or b"")
    for entry in network.model.tensors:
        digest.update(entry.name.encode() + b"\\0")
        digest.update(np.ascontiguousarray(entry.array).reshape(-1).view(np.uint8).data)
    for sample in (*calibration.samples, *calibration.added):
        for name, value in sorted(sample.items()):
            digest.update(f"{name} {value.shape} {value.dtype}".encode())
            digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Store:
    """Work of this identity in a folder, made when there is something to keep; None keeps nothing.

    Work of another identity that is there is thrown away. What cannot be read or written is done again.
    """

    def __init__(self, folder: Path | None, identity: str):
        self._folder, self._identity = folder, identity
        self.found = 0
        """How many layers were there."""
        if folder is not None and folder.is_dir() and self._read_identity() != identity:
            self.clear()

    def layer(self, key: str) -> tuple[LayerResult, Mapping[str, Entry]] | None:
        """A layer that was finished under this key."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            model = safetensors.read(path)
            told = json.loads(model.attributes[_RESULT])
            result = LayerResult(**{**told, "shape": tuple(told["shape"])})
            entries = {entry.name: _in_memory(entry) for entry in model.tensors}
            if model.attributes[_DIGEST] != _digest(key, told, entries):
                return None
        except (ShrinkError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return None
        self.found += 1
        return result, entries

    def keep(self, key: str, work: tuple[LayerResult, Mapping[str, Entry]]) -> None:
        path = self._path(key)
        if path is None or not self._ready():
            return
        result, entries = work
        told = dataclasses.asdict(result)
        attributes = {_RESULT: json.dumps(told), _DIGEST: _digest(key, told, entries)}
        with contextlib.suppress(ShrinkError, OSError):
            container.write(entries.values(), path, source="calibration", attributes=attributes, graph=None, level=None)

    def gradients(self) -> dict[str, F64] | None:
        path = self._folder / _GRADIENTS if self._folder is not None else None
        if path is None or not path.is_file():
            return None
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files}
                if str(found.pop(_IDENTITY)) != self._identity:
                    return None
                return {name.removeprefix("g:"): g for name, g in found.items()}
        except _DAMAGE:
            return None

    def keep_gradients(self, found: Mapping[str, F64]) -> None:
        if self._folder is None or not self._ready():
            return
        # Names may hold slashes, which an archive takes for folders: numbers in the order of the names.
        arrays: dict[str, Any] = {f"g:{name}": g for name, g in found.items()}
        arrays[_IDENTITY] = np.array(self._identity)
        with contextlib.suppress(ShrinkError, OSError), atomic_file(self._folder / _GRADIENTS) as file:
            np.savez(file, **arrays)

    def weights(self) -> dict[str, float]:
        """What layers weigh, by tensor, of those that were weighed."""
        try:
            identity, found = json.loads((self._folder or Path()).joinpath(_WEIGHTS).read_bytes())
            sound = self._folder is not None and identity == self._identity
            sound = sound and all(type(weight) is float and 0 < weight < math.inf for weight in found.values())
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return {}
        return dict(found) if sound else {}

    def keep_weights(self, found: Mapping[str, float]) -> None:
        if self._folder is None or not self._ready():
            return
        with contextlib.suppress(ShrinkError, OSError), atomic_file(self._folder / _WEIGHTS) as file:
            file.write(json.dumps([self._identity, dict(found)]).encode())

    def clear(self) -> None:
        """Remove what is kept, and nothing else."""
        if self._folder is None or not self._folder.is_dir() or not (self._folder / _IDENTITY).is_file():
            return
        with contextlib.suppress(OSError):
            for path in self._kept():
                path.unlink()
            self._folder.rmdir()

    def _kept(self) -> Iterator[Path]:
        folder = self._folder or Path()
        yield from sorted(folder.glob(f"*{_LAYER}"))
        yield from (path for path in (folder / _GRADIENTS, folder / _WEIGHTS, folder / _IDENTITY) if path.is_file())

    def _path(self, key: str) -> Path | None:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self._folder / f"{name}{_LAYER}" if self._folder is not None else None

    def _ready(self) -> bool:
        folder = self._folder
        if folder is None:
            return False
        with contextlib.suppress(ShrinkError, OSError):
            folder.mkdir(exist_ok=True)
            if self._read_identity() != self._identity:
                with atomic_file(folder / _IDENTITY) as file:
                    file.write(self._identity.encode())
            return True
        return False

    def _read_identity(self) -> str:
        try:
            return (self._folder or Path()).joinpath(_IDENTITY).read_text("ascii")
        except (OSError, ValueError):
            return ""


def _digest(key: str, told: Mapping[str, Any], entries: Mapping[str, Entry]) -> str:
    """What a file with this work has to tell, so that a damaged one is known."""
    digest = hashlib.sha256(json.dumps([key, told]).encode())
    for name, entry in sorted(entries.items()):
        digest.update(f"{name} {entry.shape}".encode())
        # Float16 comes back as a type of its own.
        digest.update(np.ascontiguousarray(entry.array, np.float64).tobytes())
    return digest.hexdigest()


def _in_memory(entry: Entry) -> Entry:
    """The entry with its bytes read: its file may go."""
    if isinstance(entry, Tensor):
        values = entry.load()
        return dataclasses.replace(entry, load=lambda: values)
    payload = entry.load()
    return dataclasses.replace(entry, load=lambda: payload)
