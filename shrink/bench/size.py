"""What a variant weighs: its file, its weights on the wire, the runtime, and all that a first visit downloads."""

from __future__ import annotations

import math
import posixpath
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from shrink import manifest
from shrink.bench.plan import ORIGINAL, Sites, Variant
from shrink.bench.variants import file_bytes
from shrink.errors import MissingDependency, ShrinkError
from shrink.files import file_size, io_errors
from shrink.progress import Progress

__all__ = ["BROTLI_AT_MOST", "HOSTS_COMPRESS", "Sizes", "brotli", "gzip", "loaded", "sizes", "under_brotli"]

HOSTS_COMPRESS = frozenset({".html", ".css", ".js", ".mjs", ".json", ".wasm", ".svg", ".txt"})
"""What a static host sends with brotli. Weights, .onnx and .gz files go as they are stored."""

BROTLI_AT_MOST = 64_000_000
"""Bytes that brotli is measured on without being asked for: at its highest level it takes about 2 s per MB."""

_HOW = "scripts, styles, JSON and .wasm under brotli 11, as hosts send them; weights, .onnx and .gz files as stored"
_BROTLI_BYTES_PER_S = 5.5e5
_CHUNK = 1 << 18
# Tells zlib to take or give the header and trailer of gzip.
_GZIP = 31
# As hosts do: the window of nginx and of content networks.
_BROTLI_QUALITY, _GZIP_LEVEL = 11, 9
# A reference from one file of a page to another, wherever it stands.
_REFERENCE = re.compile(r"""["'](\.{0,2}/?[\w./-]+\.(?:js|mjs|css|wasm))["']""")


@dataclass
class Sizes:
    """The document's `size` of a variant, and what could not be measured: what it is, and why."""

    size: dict[str, Any]
    missing: list[tuple[str, str]] = field(default_factory=list)


def sizes(
    variant: Variant,
    sites: Sites,
    backends: tuple[str, ...],
    progress: Progress,
    *,
    weights_count: int | None = None,
    slow: bool = False,
) -> Sizes:
    """The bytes of a variant, from the very files of its exported pages; without `wire_brotli`, see `under_brotli`.

    A backend that it cannot be exported for is missing. `slow` asks for brotli of the runtime as well. `weights_count`
    is how many weights the original has: a variant with a graph of its own may hold codes, which are no floats.

    Raises:
        OutputError: its file cannot be read.
        MissingDependency: the package brotli is not installed.
    """
    out = Sizes({"file": file_bytes(variant), "runtime": {}, "first_visit": {}, "first_visit_parts": {}})
    out.size |= dict.fromkeys(("wire_raw", "wire_gzip", "wire_brotli", "graph", "bits_per_weight", "page"))
    out.size["first_visit_how"] = _HOW
    for backend in backends:
        try:
            _add(out, variant, backend, sites.folder(variant, backend, progress), progress, slow=slow)
        except MissingDependency:
            raise
        except ShrinkError as error:
            out.missing.append((f"{variant.name}: sizes on {backend}", str(error)))
    if out.size["wire_raw"] is not None:
        out.size["bits_per_weight"] = 8 * out.size["wire_raw"] / max(1, weights_count or weights_of(variant))
    return out


def _add(out: Sizes, variant: Variant, backend: str, folder: Path, progress: Progress, *, slow: bool) -> None:
    """What the page of one backend has, and what the pages of all have where it is not there yet."""
    about, _ = manifest.read(folder)
    weights, graph = folder / about["weights"], folder / about["model"]
    runtime = [folder / about["runtime"][role] for role in ("api", "module", "wasm")]
    page = sorted({folder / name for name in loaded(folder, about)} - {*runtime, weights, graph})
    if out.size["wire_raw"] is None:
        wire = {"wire_raw": file_size(weights), "graph": file_size(graph)}
        out.size |= {**wire, "wire_gzip": gzip(weights, _named(progress, f"{variant.name}: gzip -9"))}
    progress(f"runtime for {backend}", 0, 1)
    taken = _runtime(runtime, slow=slow)
    parts = {
        "weights": served(weights),
        "graph": served(graph),
        "runtime": sum(map(served, runtime)),
        "page": sum(map(served, page)),
    }
    out.size["page"] = {
        "raw": sum(map(file_size, page)),
        "gzip": sum(_gzip_of(_read(f)) for f in page),
        "brotli": parts["page"],
    }
    out.size["runtime"][backend] = taken
    out.size["first_visit_parts"][backend] = parts
    out.size["first_visit"][backend] = sum(parts.values())
    if not slow and variant.name == ORIGINAL:
        out.missing.append(
            (f"runtime for {backend} under brotli 11", _too_long(taken["raw"], "the page has it gzipped"))
        )


def weights_of(variant: Variant) -> int:
    """How many trained numbers the network has."""
    return sum(entry.size for entry in variant.network.model.tensors if entry.dtype.kind == "f")


def served(file: Path) -> int:
    """What a visitor downloads of a file: under brotli where a host compresses its type, else as it is stored."""
    return _brotli_of(_read(file)) if file.suffix in HOSTS_COMPRESS else file_size(file)


def loaded(folder: Path, about: Mapping[str, Any]) -> set[str]:
    """The files of an exported page that a visit downloads, found by following the references from index.html."""
    found = {manifest.MANIFEST, "index.html", f"shrink/runtimes/{about['adapter']}", about["weights"], about["model"]}
    found |= {about["runtime"][role] for role in ("api", "module", "wasm")}
    left = [name for name in sorted(found) if name.startswith(("index", "shrink/"))]
    while left:
        name = left.pop()
        if not name.endswith((".html", ".js", ".css")):
            continue
        for reference in _REFERENCE.findall(_read(folder / name).decode("utf-8", "replace")):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), reference))
            if target in about["files"] and target not in found:
                found.add(target)
                left.append(target)
    return found


def under_brotli(
    variant: Variant, sites: Sites, backend: str, progress: Progress, *, slow: bool = False
) -> tuple[int | None, str]:
    """Bytes of the weights on the wire under brotli 11; None and why, where they are more than `BROTLI_AT_MOST`.

    Apart from the other sizes, for it takes longer than all the rest. `slow` asks for it whatever their size.

    Raises:
        ShrinkError: it cannot be exported for this backend.
        MissingDependency: the package brotli is not installed.
    """
    folder = sites.folder(variant, backend, progress)
    file = folder / manifest.read(folder)[0]["weights"]
    if not slow and file_size(file) > BROTLI_AT_MOST:
        return None, _too_long(file_size(file))
    return brotli(file, _named(progress, f"{variant.name}: brotli 11")), ""


def _runtime(files: list[Path], *, slow: bool) -> dict[str, Any]:
    """The scripts and the WebAssembly of a runtime, which lies gzipped in the page and is inflated there."""
    unpacked = [(file, _unpacked(file)) for file in files]
    gzipped = [file_size(f) if f.suffix == ".gz" else _gzip_of(data) for f, data in unpacked]
    return {
        "raw": sum(len(data) for _, data in unpacked),
        "gzip": sum(gzipped),
        "brotli": sum(_brotli_of(data) for _, data in unpacked) if slow else None,
    }


def _too_long(count: int, besides: str = "") -> str:
    seconds = count / _BROTLI_BYTES_PER_S
    said = f"{math.ceil(seconds)} s" if seconds < 90 else f"{math.ceil(seconds / 60)} min"
    return f"it would take about {said}" + (f"; {besides}" if besides else "")


def _unpacked(file: Path) -> bytes:
    data = _read(file)
    return zlib.decompress(data, wbits=_GZIP) if file.suffix == ".gz" else data


def _read(file: Path) -> bytes:
    with io_errors(file):
        return file.read_bytes()


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _quiet(done: int, total: int) -> None:
    pass


def gzip(file: Path, progress: Callable[[int, int], None] = _quiet) -> int:
    """Bytes of the file under gzip -9."""
    stream = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP)
    return _compressed(file, stream.compress, stream.flush, progress)


def brotli(file: Path, progress: Callable[[int, int], None] = _quiet) -> int:
    """Bytes of the file under brotli 11. Raises MissingDependency."""
    stream = _brotli()
    return _compressed(file, stream.process, stream.finish, progress)


def _compressed(
    file: Path, take: Callable[[bytes], bytes], end: Callable[[], bytes], progress: Callable[[int, int], None]
) -> int:
    total, done, out = file_size(file), 0, 0
    with io_errors(file), open(file, "rb") as source:
        while data := source.read(_CHUNK):
            progress(done, total)
            out += len(take(data))
            done += len(data)
    progress(total, total)
    return out + len(end())


def _brotli() -> Any:
    try:
        import brotli
    except ImportError:
        raise MissingDependency("brotli", "bench") from None
    return brotli.Compressor(quality=_BROTLI_QUALITY)


def _gzip_of(data: bytes) -> int:
    stream = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP)
    return len(stream.compress(data)) + len(stream.flush())


# Pages of all variants are the same but for the weights.
@lru_cache(maxsize=64)
def _brotli_of(data: bytes) -> int:
    stream = _brotli()
    return len(stream.process(data)) + len(stream.finish())
