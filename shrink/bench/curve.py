"""Size against accuracy: a network by every mode, and calibrated at several steps, on inputs that none of it has seen.

The document of a curve is one JSON file. Sizes are in bytes, of the whole .safetensors file as `shrink quantize`
writes it, graph included; `share` is that of the same file with plain float32 values. PSNR is in dB, null where it is
infinite: `exact` tells that nothing differs, `problem` that the outputs are not finite. No time and no machine stands
in it: the same network, samples and seed give the same document.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrink import container
from shrink import recipe as recipes
from shrink.bench.schema import Wrong, choice, count, flag, list_of, number, record, text
from shrink.errors import BadInput, ShrinkError, UsageError, printable
from shrink.export import Network
from shrink.files import atomic_file, read_all
from shrink.metrics import kind_of
from shrink.model import Entry, Model
from shrink.pipeline import decided, drop_state, quantized, restored
from shrink.progress import Progress, silent
from shrink.quantizers import Kept

if TYPE_CHECKING:
    from shrink.calibrate.calibrated import Calibrator, Result
    from shrink.calibrate.inputs import Calibration
from shrink.calibrate.quality import Quality

__all__ = [
    "CALIBRATED",
    "MODES",
    "POINTS",
    "Plan",
    "as_bytes",
    "checked",
    "is_one",
    "measure",
    "read",
    "steps_around",
    "write",
]

Document = dict[str, Any]
OnDocument = Callable[[Document], None]

VERSION = 1
ORIGINAL, CALIBRATED = "float32", "calibrated"

MODES = ("float16", "int8", "eightbit", "int4", "prune", "prune,int8", "prune,eightbit")
"""What calibrated is compared with where the user names none."""

POINTS = 8
"""How many steps are tried where the user does not say."""

# From where nobody sees a difference to where everybody does; the first step is for the middle of it.
_FINE_DB, _COARSE_DB = 65.0, 25.0
_FIRST_DB = 45.0
# As `shrink quantize` packs where nobody says more.
_LEVEL = 3
_AT_MOST_BYTES = 1 << 26
# What one part of the work is on the bar.
_UNITS = 1 << 20


@dataclass(frozen=True)
class Plan:
    """One curve: `network` is the float32 original, `calibration` its samples, `points` the number of steps.

    `made_up` samples are neither the user's own nor known to be what the network is used on.
    """

    network: Network
    calibration: Calibration
    made_up: bool = False
    modes: tuple[str, ...] = MODES
    points: int = POINTS
    seed: int = 0
    effort: int = 1
    command: str = ""


def measure(plan: Plan, on_document: OnDocument = lambda document: None, progress: Progress = silent) -> Document:
    """The document of a curve. `on_document` hears of it after every point, `partial` as long as there are more.

    A mode that cannot store the network is left out, with the reason in `not_measured`.

    Raises:
        UsageError: a mode that there is not, a network without a graph, or one that has nothing to quantize.
        BadInput: graph and weights do not fit together, or the network does not run on the samples.
        MissingDependency: onnx, onnxruntime or wasmtime is not installed.
    """
    from shrink.calibrate.calibrated import Calibrator

    _check(plan)
    model = _plain(plan.network.model)
    kept = _kept(model)
    chosen = [entry.name for entry in model.tensors if entry.name not in kept]
    if not chosen:
        raise UsageError("it has no weights that could be quantized", file=model.source.path)
    network = replace(plan.network, model=model)
    parts = len(plan.modes) + plan.points + 1
    watch = _Watch(progress, parts)
    calibrator = Calibrator(network, plan.calibration, chosen, seed=plan.seed, effort=plan.effort, progress=watch)
    document = _head(plan, model, calibrator)
    with tempfile.TemporaryDirectory() as folder:
        size = _Sizes(model, Path(folder))
        float_bytes, _ = size.of(model.tensors, None)

        def add(point: Document) -> None:
            point["share"] = point["size_bytes"] / float_bytes
            document["points"] = _sorted([*document["points"], point])
            on_document(document)

        exact = calibrator.quality_of({})
        add({"mode": ORIGINAL, "label": ORIGINAL, "step": None, "size_bytes": float_bytes, **_quality(exact)})
        for mode in plan.modes:
            watch.next(mode)
            try:
                add(_by_mode(model, mode, calibrator, size))
            except ShrinkError as error:
                document["not_measured"].append({"what": mode, "why": error.message})

        def calibrated(step: float) -> Document:
            watch.next(f"step {step:g}")
            point = _calibrated(model, calibrator.at(step), kept, size)
            add(point)
            return point

        first = _short(10 ** (-_FIRST_DB / 20))
        found = calibrated(first)
        for step in steps_around(first, found["psnr_db"], plan.points):
            if step != first:
                calibrated(step)
    watch.next("")
    document["partial"] = False
    return document


def _check(plan: Plan) -> None:
    if plan.points < 2:
        raise UsageError(f"a curve has at least 2 points, not {plan.points}")
    if len(set(plan.modes)) < len(plan.modes):
        raise UsageError("a mode is named twice")
    if CALIBRATED in plan.modes:
        raise UsageError("calibrated is measured anyway, and is no mode to compare it with")
    for mode in plan.modes:
        _recipe(mode)
    if plan.network.model.graph is None:
        raise UsageError(
            "this model has only weights, and accuracy is measured on the graph",
            file=plan.network.model.source.path,
            hint="give an ONNX file, or a network in Python as FILE.py:NAME with --weights",
        )


def _recipe(mode: str) -> recipes.Recipe:
    return recipes.from_flags(mode, (), (), None, {})


def _plain(model: Model) -> Model:
    bare = drop_state(model)
    return replace(bare, tensors=tuple(restored(bare)))


def _kept(model: Model) -> dict[str, str]:
    """The tensors that every mode leaves alone, and why."""
    from shrink.calibrate.quantizing import chosen_of

    return {name: found.reason for name, found in chosen_of(model).items() if isinstance(found, Kept)}


def _head(plan: Plan, model: Model, calibrator: Calibrator) -> Document:
    samples = len(plan.calibration.samples)
    outputs, held_out = calibrator.outputs[0], max(1, calibrator.held_out)
    return {
        "shrink_curve": VERSION,
        "title": plan.network.title,
        "command": plan.command,
        "partial": True,
        "model": {
            "file": printable(model.source.path.name),
            "weights": sum(entry.size for entry in model.tensors if entry.dtype.kind == "f"),
            "outputs": [
                {
                    "name": name,
                    "shape": list(outputs[name].shape),
                    "kind": kind_of(outputs[name].shape),
                    "peak": float(peak),
                }
                for name, peak in calibrator.peaks.items()
            ],
        },
        "calibration": {
            "source": plan.calibration.source,
            "made_up": plan.made_up,
            "samples": samples,
            "held_out": held_out,
            # A single sample is all there is to measure on.
            "unseen": samples > held_out,
            "seed": plan.seed,
            "effort": plan.effort,
        },
        "points": [],
        "not_measured": [],
    }


def _sorted(points: list[Document]) -> list[Document]:
    """The original and the modes as they came, then what is calibrated, from fine to coarse."""
    return sorted(points, key=lambda point: point["step"] or 0.0)


def steps_around(first: float, psnr_db: float | None, points: int) -> list[float]:
    """`points` steps, from fine to coarse in geometric progression, one of them `first`, which gave `psnr_db`.

    They are such that the PSNR goes from 65 to 25 dB, if it falls by 6 dB where the step doubles.
    """
    spacing = (_FINE_DB - _COARSE_DB) / (points - 1)
    known = psnr_db if psnr_db is not None and math.isfinite(psnr_db) else _FIRST_DB
    coarser = min(max(round((known - _COARSE_DB) / spacing), 0), points - 1)
    ratio = 10 ** (spacing / 20)
    return [_short(first * ratio**n) for n in range(coarser - points + 1, coarser + 1)]


def _short(step: float) -> float:
    """As few digits as somebody types who wants the same point again."""
    return float(f"{step:.3g}")


# One point


def _by_mode(model: Model, mode: str, calibrator: Calibrator, size: _Sizes) -> Document:
    entries = tuple(quantized(model, decided(model, _recipe(mode))))
    size_bytes, _ = size.of(entries, _LEVEL)
    changed = {new.name: new.array for new, old in zip(entries, model.tensors, strict=True) if new is not old}
    found = calibrator.quality_of(changed)
    return {"mode": mode, "label": mode, "step": None, "size_bytes": size_bytes, **_quality(found)}


def _calibrated(model: Model, result: Result, kept: Mapping[str, str], size: _Sizes) -> Document:
    from shrink.calibrate.quantizing import merged

    entries = tuple(merged(model, result.entries))
    size_bytes, stored = size.of(entries, _LEVEL)
    layers = [
        {
            "tensor": layer.tensor,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "bits_per_weight": layer.bits_per_weight,
            "size_bytes": layer.size_bytes,
            "sensitivity": _finite(layer.sensitivity),
            "step": _finite(layer.step),
            "note": layer.note,
        }
        for layer in result.layers
    ]
    done = {layer.tensor for layer in result.layers}
    alone = [
        {
            "tensor": entry.name,
            "shape": list(entry.shape),
            "size_bytes": stored[entry.name],
            "reason": _reason(entry, result, kept),
        }
        for entry in model.tensors
        if entry.name not in done
    ]
    return {
        "mode": CALIBRATED,
        "label": f"{CALIBRATED} {result.step:g}",
        "step": result.step,
        "size_bytes": size_bytes,
        **_quality(result.quality),
        "layers": layers,
        "kept": alone,
    }


def _reason(entry: Entry, result: Result, kept: Mapping[str, str]) -> str:
    if entry.name in result.entries:
        note = result.note(entry.name)
        return f"{note.mode}: {note.why}"
    return kept.get(entry.name, "the graph does not use it as a weight")


def _quality(found: Quality) -> Document:
    broken = found.worst_psnr_db == -math.inf
    return {
        "exact": found.worst_psnr_db == math.inf,
        "psnr_db": _finite(found.psnr_db),
        "mean_psnr_db": _finite(found.mean_psnr_db),
        "worst_psnr_db": _finite(found.worst_psnr_db),
        "cosine": None if broken else _finite(found.cosine),
        "problem": "its outputs are not finite" if broken else None,
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class _Sizes:
    """How large the file would be, found out by writing it."""

    def __init__(self, model: Model, folder: Path):
        self._model, self._path = model, folder / "out.safetensors"

    def of(self, entries: Iterable[Entry], level: int | None) -> tuple[int, dict[str, int]]:
        """The bytes of the whole file, and those of each tensor in it."""
        model = self._model
        stored = container.write(
            entries, self._path, source=model.source.format, attributes=model.attributes, graph=model.graph, level=level
        )
        return self._path.stat().st_size, stored


class _Watch:
    """One bar for all points: each part of the work has the same share of it."""

    def __init__(self, progress: Progress, parts: int):
        self._progress, self._parts = progress, parts
        self._part, self._what = 0, "original"

    def next(self, what: str) -> None:
        self._part, self._what = self._part + 1, what
        self("", 0, 1)

    def __call__(self, name: str, done: int, total: int, /) -> None:
        here = int(_UNITS * min(done / max(total, 1), 1))
        words = ": ".join(part for part in (self._what, name) if part)
        self._progress(words, self._part * _UNITS + here, self._parts * _UNITS)


# The document


def is_one(path: Path) -> bool:
    """Whether this is JSON that says that it is a curve. Raises OutputError where it cannot be read."""
    try:
        value = json.loads(read_all(path, at_most=_AT_MOST_BYTES))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and "shrink_curve" in value


def read(path: Path) -> Document:
    """A document that was written before, checked: it may come from anywhere.

    Raises:
        BadInput: it is none, or something in it is not what it must be.
        OutputError: it is missing or cannot be read.
    """
    try:
        value = json.loads(read_all(path, at_most=_AT_MOST_BYTES))
    except (ValueError, RecursionError):
        raise BadInput("it is not JSON", file=path, hint="give the .json that `shrink curve` wrote") from None
    try:
        return checked(value)
    except BadInput as error:
        error.file = path
        raise


def checked(value: object) -> Document:
    """The document with every key that there is, and no other; what is optional and not there is null.

    Raises:
        BadInput: it is none, or something in it is not what it must be.
    """
    if not isinstance(value, dict) or "shrink_curve" not in value:
        raise BadInput("it is not the document of a curve", hint="give the .json that `shrink curve` wrote")
    version = value["shrink_curve"]
    if type(version) is not int or version != VERSION:
        raise BadInput(f"it is a document of another version than {VERSION}", hint="measure again")
    try:
        document: Document = _DOCUMENT(value, "")
    except Wrong as error:
        raise BadInput(f"not a valid document: {error}") from None
    return document


def as_bytes(document: Document) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False).encode() + b"\n"


def write(document: Document, path: Path) -> None:
    """Write the document, whole or not at all. Raises OutputError."""
    with atomic_file(path) as out:
        out.write(as_bytes(document))


_shape = list_of(count, 32)
_positive = number(1e-300)

_LAYER = record(
    {
        "tensor": text(),
        "kind": text(100),
        "shape": _shape,
        "bits_per_weight": number(0),
        "size_bytes": count,
    },
    {"sensitivity": number(0), "step": number(0), "note": text()},
)
_KEPT = record({"tensor": text(), "shape": _shape, "size_bytes": count, "reason": text()})
_POINT = record(
    {
        "mode": text(200),
        "label": text(200),
        "size_bytes": count,
        "share": _positive,
        "exact": flag,
    },
    {
        "step": _positive,
        "psnr_db": number(),
        "mean_psnr_db": number(),
        "worst_psnr_db": number(),
        "cosine": number(-1, 1),
        "problem": text(),
        "layers": list_of(_LAYER, 100_000),
        "kept": list_of(_KEPT, 100_000),
    },
)
_OUTPUT = record(
    {"name": text(), "shape": _shape, "kind": choice("image", "classes", "sequence", "other"), "peak": number(0)}
)
_DOCUMENT = record(
    {
        "shrink_curve": count,
        "title": text(),
        "partial": flag,
        "model": record({"file": text(), "weights": count, "outputs": list_of(_OUTPUT, 10_000)}),
        "calibration": record(
            {
                "source": text(4096),
                "made_up": flag,
                "samples": count,
                "held_out": count,
                "unseen": flag,
                "seed": count,
                "effort": count,
            }
        ),
        "points": list_of(_POINT, 1000),
        "not_measured": list_of(record({"what": text(), "why": text(4096)}), 1000),
    },
    {"command": text(1 << 16)},
)
