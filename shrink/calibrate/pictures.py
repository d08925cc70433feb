"""Pictures to calibrate on: those of a folder, and synthetic ones for where there are none.

A picture is a float32 array (height, width, channels) in [0, 1], with 1, 3 or 4 channels: grey as ITU-R BT.601 weighs
red, green and blue; these three; or these and alpha. What is transparent lies on white where there is no alpha.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, MissingDependency, printable
from shrink.files import io_errors

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SUFFIXES", "Size", "from_folder", "in_folder", "one_over_f", "synthetic"]

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Generator = np.random.Generator

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
"""Files of other names in a folder of pictures are left alone."""

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
# What Pillow itself warns from; RGBA of it is 358 MB.
_PIXELS_AT_MOST = (1 << 30) // 12
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Size:
    """What a network takes, in pixels. `channels` is 1, 3 or 4."""

    height: int
    width: int
    channels: int


def _in_channels(pixels: U8, channels: int) -> F32:
    """Pixels (height, width, 3 or 4) as a picture of so many channels."""
    x: F32 = pixels.astype(np.float32) / np.float32(255)
    if channels == 4:
        return x if x.shape[2] == 4 else np.concatenate([x, np.ones_like(x[:, :, :1])], axis=2)
    if x.shape[2] == 4:
        alpha = x[:, :, 3:]
        x = x[:, :, :3] * alpha + (1 - alpha)
    if channels == 1:
        # Written out: a matrix product adds up in an order of its own on every machine.
        x = x[:, :, :1] * _LUMA[0] + x[:, :, 1:2] * _LUMA[1] + x[:, :, 2:] * _LUMA[2]
    return x


# Pictures of a folder


def in_folder(folder: Path) -> list[Path]:
    """The pictures of a folder, by name. Links and folders in it are left alone.

    Raises:
        BadInput: there are none.
        OutputError: the folder cannot be read.
    """
    with io_errors(folder), os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(SUFFIXES) and entry.is_file(follow_symlinks=False)
        )
    if not names:
        raise BadInput("no pictures are in this folder", file=folder, hint="it reads " + " ".join(SUFFIXES))
    return [folder / name for name in names]


def from_folder(paths: Sequence[Path], count: int, size: Size, seed: int) -> list[F32]:
    """`count` crops of pictures at `paths`, in turn: each gives one before any gives its second.

    Where there are more pictures than crops, those taken lie evenly among them. Crops are at places drawn from `seed`;
    a picture that is too small is enlarged (bicubic) until the crop just fits.

    Raises:
        BadInput: a file that is no picture, is cut off, or too large.
        OutputError: a file cannot be read.
        MissingDependency: Pillow is not installed.
    """
    taken = [paths[i * len(paths) // count] for i in range(count)] if len(paths) > count else list(paths)
    out: dict[int, F32] = {}
    for number, path in enumerate(taken):
        rng = np.random.default_rng((seed, number))
        places = range(number, count, len(taken))
        out.update(zip(places, _crops(path, len(places), size, rng), strict=True))
    return [out[n] for n in range(count)]


def _crops(path: Path, count: int, size: Size, rng: Generator) -> list[F32]:
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependency("pillow", "calibrate") from None
    with io_errors(path):
        file = open(path, "rb")  # noqa: SIM115
    with file, warnings.catch_warnings():
        # Odd metadata is no matter here, and size is looked at below.
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(file, formats=_FORMATS)
            if opened.width * opened.height <= _PIXELS_AT_MOST:
                picture = _plain(opened)
                return [_in_channels(_crop(picture, size, rng), size.channels) for _ in range(count)]
            said = f"it has {opened.width} × {opened.height} pixels, more than {_PIXELS_AT_MOST}"
        except Image.DecompressionBombError:
            said = f"it has far more than {_PIXELS_AT_MOST} pixels"
        except Exception as error:
            # Decoders meet hostile bytes with whatever they stumble over: struct.error, IndexError, SyntaxError …
            said = f"not a whole picture that Pillow reads: {printable(error, at_most=200)}"
    raise BadInput(said, file=path)


def _plain(picture: Image.Image) -> Image.Image:
    """The picture, its first frame, in RGB or RGBA of 8 bits."""
    from PIL import Image

    if picture.mode.startswith("I"):  # grey of 16 bits, which a plain conversion clips at 255
        values = np.asarray(picture.convert("I"))
        picture = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _crop(picture: Image.Image, size: Size, rng: Generator) -> U8:
    from PIL import Image

    width, height = picture.size
    scale = max(1.0, size.width / width, size.height / height)
    if scale == 1:
        left = int(rng.integers(0, width - size.width, endpoint=True))
        top = int(rng.integers(0, height - size.height, endpoint=True))
        return np.asarray(picture.crop((left, top, left + size.width, top + size.height)))
    # Only what will be seen is enlarged: a line of many pixels would not fit into memory.
    across, down = min(width, size.width / scale), min(height, size.height / scale)
    x, y = rng.random() * (width - across), rng.random() * (height - down)
    box = (x, y, min(width, x + across), min(height, y + down))
    return np.asarray(picture.resize((size.width, size.height), Image.Resampling.BICUBIC, box=box))


# Synthetic pictures


def synthetic(count: int, size: Size, seed: int) -> Iterator[F32]:
    """Pictures with what photographs and drawings have: edges, textures, flat areas, lines, gradients; none alike.

    They are 1/f noise, "dead leaves" (Lee, Mumford, Huang, "Occlusion models for natural images", 2001: opaque shapes,
    sizes by a power law), drawings, and gradients; a third is worn, by noise or by blocks of 8 × 8 as JPEG leaves
    them. Values are multiples of 1/255, and picture n depends on `seed` and n alone.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        colours = _worn(rng, _KINDS[number % len(_KINDS)](rng, size.height, size.width))
        if size.channels == 4:
            colours = np.concatenate([colours, _alpha(rng, size.height, size.width)[:, :, None]], axis=2)
        yield _in_channels(np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8), size.channels)


def one_over_f(rng: Generator, exponent: float, height: int, width: int) -> F32:
    """Noise (height, width) whose amplitudes fall with frequency, as 1 / f ** exponent; mean 0, variance 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width), np.float32))
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    f[0, 0], spectrum[0, 0] = 1, 0
    x = np.fft.irfft2(spectrum * f**-exponent, (height, width))
    return (x / max(float(x.std()), 1e-12)).astype(np.float32)


def _colourful(grey: F32, red_blue: F32, green: F32) -> F32:
    """Red, green and blue out of the three directions in which the colours of photographs vary, nearly independently.

    Ruderman, Cronin, Chiao, "Statistics of cone responses to natural images", 1998.
    """
    return np.stack([grey + red_blue + green, grey - 2 * green, grey - red_blue + green], axis=-1)


def _colour(rng: Generator, low: float = 0.0, high: float = 1.0) -> F32:
    """A colour of a lightness in this range: mostly dull, now and then bright."""
    vivid = rng.choice([0.02, 0.1, 0.3], p=[0.4, 0.4, 0.2])
    grey, red_blue, green = rng.uniform(low, high), rng.normal(0, vivid), rng.normal(0, 0.4 * vivid)
    out: F32 = np.clip(_colourful(*(np.array(v, np.float32) for v in (grey, red_blue, green))), 0, 1)
    return out


def _noise(rng: Generator, height: int, width: int) -> F32:
    exponent = rng.uniform(0.8, 1.6)
    fields = [one_over_f(rng, exponent, height, width) for _ in range(3)]
    contrast, vivid = rng.uniform(0.06, 0.27), rng.choice([0.05, 0.15, 0.35])
    x = _colourful(*(f * np.float32(contrast * s) for f, s in zip(fields, (1, vivid, 0.4 * vivid), strict=True)))
    lit = np.clip(x + (rng.uniform(0.2, 0.75) + _colour(rng) * 0.15), 0, 1)
    # Photographs have many dark pixels and few bright ones, or else are washed out.
    out: F32 = lit ** np.float32(rng.uniform(0.7, 1.7))
    return out


@dataclass(frozen=True)
class _Window:
    """A part of a picture, and where its pixels lie from its middle."""

    rows: slice
    columns: slice
    y: F32
    x: F32


def _window(y: float, x: float, radius: float, height: int, width: int) -> _Window:
    top, bottom = max(0, math.floor(y - radius)), min(height, math.ceil(y + radius) + 1)
    left, right = max(0, math.floor(x - radius)), min(width, math.ceil(x + radius) + 1)
    rows, columns = slice(min(top, height), max(bottom, 0)), slice(min(left, width), max(right, 0))
    at = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(y)
    return _Window(rows, columns, at, np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(x))


def _outside(rng: Generator, at: _Window, radius: float) -> F32:
    """How far each pixel lies outside of a disc, a rectangle or a polygon drawn around the middle; < 0 is inside."""
    turn, kind = rng.uniform(0, 2 * math.pi), rng.integers(3)
    if kind == 0:
        flat = rng.uniform(0.4, 1)
        along, across = (at.x * math.cos(turn) + at.y * math.sin(turn)), (at.y * math.cos(turn) - at.x * math.sin(turn))
        ellipse: F32 = (np.hypot(along, across / flat) - radius) * np.float32(flat)
        return ellipse
    if kind == 1:
        turns, reach = turn + np.arange(4) * math.pi / 2, np.tile(radius * rng.uniform(0.15, 0.7, 2), 2)
    else:
        sides = int(rng.integers(3, 7))
        turns = turn + (np.arange(sides) + rng.uniform(-0.3, 0.3, sides)) * 2 * math.pi / sides
        reach = radius * rng.uniform(0.4, 0.8, sides)
    out = np.full(np.broadcast_shapes(at.x.shape, at.y.shape), -np.inf, np.float32)
    for t, r in zip(turns.tolist(), reach.tolist(), strict=True):
        np.maximum(out, at.x * math.cos(t) + at.y * math.sin(t) - r, out=out)
    # A polygon without an end on one side ends here.
    np.maximum(out, np.hypot(at.x, at.y) - np.float32(radius), out=out)
    return out


def _painted(canvas: F32, at: _Window, cover: F32, colour: F32) -> None:
    """Lay a colour (…, 3) over a part of the canvas, where `cover` is 1."""
    part = canvas[at.rows, at.columns]
    part += cover[:, :, None] * (colour - part)


def _leaves(rng: Generator, height: int, width: int) -> F32:
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = _colour(rng)
    texture = one_over_f(rng, rng.uniform(0.7, 1.6), height, width)
    share = rng.choice([0.0, 0.4, 0.9])  # of leaves that have a texture
    softness = rng.choice([1.0, 1.0, 1.0, 2.5])
    smallest, largest = 1.5, max(4.0, 0.45 * min(height, width))
    count = int(np.clip(height * width / 80, 40, 1500))
    # Density falls with the cube of the radius, so that no scale stands out.
    radii = (smallest**-2 + rng.random(count) * (largest**-2 - smallest**-2)) ** -0.5
    # So few leaves of the law alone are nearly all small, and a stack has been growing for long.
    radii = rng.permutation(np.concatenate([rng.uniform(0.3, 1.0, 15) * largest, radii]))
    palette = [_colour(rng) for _ in range(int(rng.integers(3, 9)))]
    for radius in radii.tolist():
        at = _window(rng.random() * height, rng.random() * width, radius + softness, height, width)
        plain = palette[int(rng.integers(len(palette)))] + np.float32(rng.normal(0, 0.06))
        colour = _filling(rng, at, radius, plain, texture if rng.random() < share else None)
        cover = np.clip(0.5 - _outside(rng, at, radius) / np.float32(softness), 0, 1)
        _painted(canvas, at, cover, colour)
    return canvas


def _filling(rng: Generator, at: _Window, radius: float, colour: F32, texture: F32 | None) -> F32:
    """A colour, plain or with a texture or a gradient."""
    if texture is not None:
        colour = colour + texture[at.rows, at.columns, None] * np.float32(rng.uniform(0.03, 0.2))
    elif rng.random() < 0.4:
        turn, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.4)
        slope = (at.x * math.cos(turn) + at.y * math.sin(turn)) * np.float32(strength / radius)
        colour = colour + slope[:, :, None]
    return colour


def _drawing(rng: Generator, height: int, width: int) -> F32:
    canvas = np.empty((height, width, 3), np.float32)
    canvas[:] = 1.0 if rng.random() < 0.5 else _colour(rng, 0.6, 1.0)
    side = min(height, width)
    ink = _colour(rng, 0.0, 0.25)
    thickness = rng.uniform(0.7, 2.2)
    for _ in range(int(rng.integers(3, 9))):
        radius = max(3.0, side * rng.uniform(0.06, 0.4))
        at = _window(rng.random() * height, rng.random() * width, radius + thickness + 1, height, width)
        outside = _outside(rng, at, radius)
        colour = _filling(rng, at, radius, _colour(rng, 0.2, 1.0), None)
        _painted(canvas, at, np.clip(0.5 - outside, 0, 1), colour)
        _painted(canvas, at, np.clip(0.5 + thickness / 2 - np.abs(outside), 0, 1), ink)
    for _ in range(int(rng.integers(2, 9))):
        reach = side * rng.uniform(0.1, 0.6)
        ends = rng.random((1, 2)) * (height, width) + rng.uniform(-1, 1, (3, 2)) * reach
        t = np.linspace(0, 1, 12)[:, None]
        _stroke(canvas, (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2], thickness, ink)
    for _ in range(int(rng.integers(0, 4))):
        _writing(rng, canvas, ink)
    return canvas


def _writing(rng: Generator, canvas: F32, ink: F32) -> None:
    """A line of strokes as small and as thin as those of letters."""
    height, width, _ = canvas.shape
    tall = rng.uniform(5, 12)
    y, x = rng.random() * height, rng.uniform(0, 0.5) * width
    corners = np.array([(r, c) for r in (0, 0.5, 1) for c in (0, 0.6)]) * tall
    for _ in range(int(rng.integers(4, 16))):
        if rng.random() < 0.85:
            chosen = corners[rng.permutation(6)[: int(rng.integers(2, 5))]]
            _stroke(canvas, chosen + np.array([y, x]), max(0.8, 0.12 * tall), ink)
        x += 0.85 * tall


def _stroke(canvas: F32, points: NDArray[np.float64], thickness: float, ink: F32) -> None:
    """A line through `points` (n, row and column), its edges as smooth as those of a font."""
    height, width, _ = canvas.shape
    low, high = points.min(axis=0), points.max(axis=0)
    middle, radius = (low + high) / 2, float((high - low).max()) / 2 + thickness + 1
    at = _window(float(middle[0]), float(middle[1]), radius, height, width)
    starts = (points[:-1] - middle).astype(np.float32)[:, :, None, None]
    steps = np.diff(points, axis=0).astype(np.float32)[:, :, None, None]
    dy, dx = at.y - starts[:, 0], at.x - starts[:, 1]
    length = np.maximum((steps**2).sum(axis=1), np.float32(1e-6))
    along = np.clip((dy * steps[:, 0] + dx * steps[:, 1]) / length, 0, 1)
    far = np.hypot(dy - along * steps[:, 0], dx - along * steps[:, 1]).min(axis=0)
    _painted(canvas, at, np.clip(0.5 + thickness / 2 - far, 0, 1).astype(np.float32), ink)


def _gradient(rng: Generator, height: int, width: int) -> F32:
    at = _window(height / 2, width / 2, max(height, width), height, width)
    x, y = at.x / max(height, width), at.y / max(height, width)
    turn = rng.uniform(0, 2 * math.pi)
    way = np.clip(0.5 + (x * math.cos(turn) + y * math.sin(turn)) * rng.uniform(0.4, 2), 0, 1)
    canvas = _colour(rng) + way[:, :, None].astype(np.float32) * (_colour(rng) - _colour(rng))
    for _ in range(int(rng.integers(0, 4))):
        spread = rng.uniform(0.05, 0.4)
        distance = (x - rng.uniform(-0.5, 0.5)) ** 2 + (y - rng.uniform(-0.5, 0.5)) ** 2
        _painted(canvas, at, np.exp(-distance / (2 * spread**2)).astype(np.float32), _colour(rng))
    return canvas


def _alpha(rng: Generator, height: int, width: int) -> F32:
    """Opaque, or what a picture cut out along a shape has."""
    out = np.ones((height, width), np.float32)
    if rng.random() < 0.5:
        radius = 0.6 * min(height, width)
        at = _window(height / 2, width / 2, height + width, height, width)
        out[at.rows, at.columns] = np.clip(0.5 - _outside(rng, at, radius), 0, 1)
    return out


def _worn(rng: Generator, x: F32) -> F32:
    """The picture, now and then with what sensors and encoders leave in one."""
    kind = rng.random()
    x = np.clip(x, 0, 1)
    if kind < 0.15:
        x = x + rng.standard_normal(x.shape, np.float32) * np.float32(rng.uniform(1, 8) / 255)
    elif kind < 0.35:
        x = _blocked(x, rng.uniform(0.01, 0.05))
    return x


def _cosines() -> F32:
    k, n = np.arange(8)[:, None], np.arange(8)[None, :]
    basis = np.cos(math.pi * (2 * n + 1) * k / 16) * np.where(k == 0, math.sqrt(1 / 8), 0.5)
    return basis.astype(np.float32)


_COSINES = _cosines()


def _blocked(x: F32, step: float) -> F32:
    """Blocks of 8 × 8 with rounded cosine coefficients, the finer the more coarsely: what is visible of JPEG."""
    height, width, channels = x.shape
    padded = np.pad(x, ((0, -height % 8), (0, -width % 8), (0, 0)), "edge")
    tall, wide = padded.shape[0] // 8, padded.shape[1] // 8
    blocks = padded.reshape(tall, 8, wide, 8, channels).transpose(0, 2, 4, 1, 3)
    steps = np.float32(step) * (1 + np.add.outer(np.arange(8), np.arange(8))).astype(np.float32)
    coefficients = np.rint(_COSINES @ blocks @ _COSINES.T / steps) * steps
    back = (_COSINES.T @ coefficients @ _COSINES).transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(back.reshape(padded.shape)[:height, :width])


_Kind = Callable[[Generator, int, int], F32]
_KINDS: tuple[_Kind, ...] = (_noise, _leaves, _drawing, _leaves, _gradient, _noise, _drawing, _leaves)
