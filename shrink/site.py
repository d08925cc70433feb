"""The page of an exported network: its files, the manifest that lists them, and the input that it draws from a seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, UsageError, printable
from shrink.export import Exported
from shrink.files import atomic_file
from shrink.manifest import MANIFEST, VERSION, as_bytes, is_ours, listed
from shrink.model import Model

if TYPE_CHECKING:
    from onnx import ValueInfoProto

__all__ = ["MANIFEST", "add_page", "input_shapes", "is_ours", "parse_shape", "seeded_input"]

_WEB = Path(__file__).parent / "web"
# What of shrink/web a page loads, by the suffix of its files: types and the list of npm packages stay here.
_SERVED = (".html", ".css", ".js", ".mjs", ".wasm", ".LICENSE")
# What NumPy 1 has at most.
_DIMS_AT_MOST = 32


def add_page(folder: Path, target: str, title: str, exported: Exported) -> dict[str, Any]:
    """Put the page, the loader and the target's adapter beside what the target wrote, and the manifest of all of it.

    Every file is listed with its bytes and SHA-256, spelled as Subresource Integrity does, so that the page can tell
    a damaged one, and `shrink export` a folder that it may replace.
    """
    adapter = f"{target.replace('-', '_')}.js"
    for file in sorted(_WEB.rglob("*")):
        place = _place(file.relative_to(_WEB), adapter)
        if place is not None and file.is_file():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(file.read_bytes())
    about = {"shrink": VERSION, "title": title, "target": target, "adapter": adapter}
    manifest = {**about, **exported.page, "files": {name: about.as_json() for name, about in listed(folder).items()}}
    with atomic_file(folder / MANIFEST) as out:
        out.write(as_bytes(manifest))
    return manifest


def _place(file: Path, adapter: str) -> Path | None:
    """Where a file of shrink/web goes: the page on top, the rest in shrink/ as it lies there; None for nowhere."""
    if file.parts[0] == "node_modules" or file.suffix not in _SERVED:
        return None
    if file.parts[0] == "pages":
        return Path(*file.parts[1:])
    if file.parts[0] == "runtimes" and file.name != adapter:
        return None
    return Path("shrink", file)


def input_shapes(model: Model, given: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the inputs of an ONNX model, in order. `given` are shapes of --input, `1,110` or `name=1,110`.

    A first dimension that the model leaves open is 1, the batch.

    Raises:
        UsageError: a shape that is none, or does not fit; a dimension that is open.
        BadInput: an input that no values have the shape of, or too many.
    """
    from shrink.export.onnxruntime_web import graph_inputs
    from shrink.formats._onnx_proto import parse

    source = model.source.path
    if model.graph is None:
        raise UsageError("this model has only weights, and a page needs the graph", file=source)
    inputs = graph_inputs(parse(model.graph, source))
    asked = _asked(given, [info.name for info in inputs])
    return tuple(_shape(info, asked.get(info.name), source) for info in inputs)


def _shape(info: ValueInfoProto, asked: tuple[int, ...] | None, source: Path) -> tuple[int, ...]:
    known = info.type.tensor_type.HasField("shape")
    # Exporters write -1 where they should write nothing.
    dims = [
        d.dim_value if d.HasField("dim_value") and d.dim_value != -1 else None for d in info.type.tensor_type.shape.dim
    ]
    name = printable(info.name)
    if any(n is not None and n < 1 for n in dims):
        raise BadInput(f"its input {name} has a shape that no values have{_said(dims)}", file=source)
    if len(dims) > _DIMS_AT_MOST or math.prod(n or 1 for n in dims) >= 1 << 31:
        raise BadInput(f"its input {name} is too large{_said(dims[:_DIMS_AT_MOST])}", file=source)
    if asked is None:
        # What is left open first is the batch.
        shape = tuple(n if n is not None else 1 for n in dims)
        if not known or None in dims[1:]:
            raise UsageError(
                f"the model leaves the shape of its input {name} open{_said(dims) if known else ''}",
                file=source,
                hint=f"give it, as in --input {name}={_example(dims)}",
            )
        return shape
    if known and (len(asked) != len(dims) or any(m not in (n, None) for n, m in zip(asked, dims, strict=True))):
        text = ",".join(map(str, asked))
        raise UsageError(f"--input {text} does not fit the input {name}{_said(dims)}", file=source)
    return asked


def _example(dims: list[int | None]) -> str:
    """A shape that fits, of a picture where any does."""
    picture = (1, 3, 224, 224)
    usual = picture if len(dims) in (0, len(picture)) else (1, *[64] * (len(dims) - 1))
    return ",".join(str(n or other) for n, other in zip(dims or usual, usual, strict=True))


def _said(dims: list[int | None]) -> str:
    return f": [{', '.join('?' if n is None else str(n) for n in dims)}]"


def _asked(given: tuple[str, ...], names: list[str]) -> dict[str, tuple[int, ...]]:
    asked: dict[str, tuple[int, ...]] = {}
    for number, text in enumerate(given):
        name, equals, numbers = text.rpartition("=")
        if not equals and number >= len(names):
            raise UsageError(f"--input is given {len(given)} times, the model has {len(names)} inputs")
        name = name if equals else names[number]
        if name not in names:
            raise UsageError(f"the model has no input {printable(name)}", hint="it has " + ", ".join(names))
        asked[name] = parse_shape(numbers)
    return asked


def parse_shape(text: str) -> tuple[int, ...]:
    """`1,110` as (1, 110). Raises UsageError."""
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or len(shape) > _DIMS_AT_MOST or min(shape) < 1 or math.prod(shape) >= 1 << 31:
        raise UsageError(f"{printable(text)!r} is no shape", hint="write --input 1,3,224,224")
    return shape


def seeded_input(seed: int, number: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """The values that the page feeds to input `number`: the mulberry32 generator, as in shrink/web/pages/page.js.

    Floats are uniform in [-1, 1), with 24 bits each, exact in float32; integers and truth values are 0 or 1.
    """
    count = np.arange(1, math.prod(shape) + 1, dtype=np.uint32)
    start = np.uint32((seed + 0x9E3779B9 * number) % (1 << 32))
    a = start + np.uint32(0x6D2B79F5) * count
    t = (a ^ a >> np.uint32(15)) * (a | np.uint32(1))
    t ^= t + (t ^ t >> np.uint32(7)) * (t | np.uint32(61))
    bits = t ^ t >> np.uint32(14)
    if np.dtype(dtype).kind == "f":
        values = (bits >> np.uint32(8)).astype(np.float64) / (1 << 23) - 1
    else:
        values = (bits >> np.uint32(31)).astype(np.float64)
    out: NDArray[Any] = values.astype(dtype).reshape(shape)
    return out
