"""Calibrated quantization as a whole: from a network and samples to entries that meet a bound."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shrink import recipe as recipes
from shrink.calibrate import search
from shrink.calibrate.calibrated import Calibrator, Result
from shrink.calibrate.inputs import Calibration
from shrink.calibrate.quality import Quality
from shrink.calibrate.resuming import Store, identity_of
from shrink.calibrate.vectors import Note
from shrink.errors import BoundNotMet, UsageError
from shrink.export import Network
from shrink.model import Entry, Model
from shrink.pipeline import Change, decided, difference
from shrink.progress import Progress
from shrink.quantizers import Kept
from shrink.recipe import Decision

__all__ = ["FEWEST_WEIGHTS", "Quantizing", "Target", "Work", "changes", "chosen_of", "merged", "quantized"]

FEWEST_WEIGHTS = 96
"""Smaller tensors cost more to describe than calibration saves."""

Entries = Mapping[str, Entry]

# What a search is expected to take, for the progress; a pass more or less does not matter.
_PASSES = 4
# A step that no weight of 8 bits can have.
_FINEST = 1e-8


@dataclass(frozen=True)
class Target:
    """What is wanted: at least this PSNR, at most these bytes, both, or just this step."""

    min_psnr: float | None = None
    max_bytes: int | None = None
    step: float | None = None


@dataclass(frozen=True)
class Work:
    """`model` has the tensors that are written; those that `decisions` do not keep are quantized. `keep_quantized`: to
    what stays in 8 bits where it runs, see `Calibrator`."""

    network: Network
    calibration: Calibration
    model: Model
    decisions: Mapping[str, Decision]
    seed: int = 0
    effort: int = 1
    keep_quantized: bool = False

    @property
    def chosen(self) -> list[str]:
        return [name for name, decision in self.decisions.items() if not isinstance(decision, Kept)]

    @property
    def fixed(self) -> frozenset[str]:
        """What the user said is to stay as it is."""
        kept = {name: decision for name, decision in self.decisions.items() if isinstance(decision, Kept)}
        return frozenset(name for name, decision in kept.items() if decision.reason.startswith("by --exclude"))

    @property
    def named(self) -> list[str]:
        """Both, told apart: what the result depends on."""
        return [*self.chosen, *(f"!{name}" for name in self.fixed)]


def chosen_of(
    model: Model, include: Iterable[str] = (), exclude: Iterable[str] = (), *, keep_quantized: bool = False
) -> dict[str, Decision]:
    """What is quantized, or why it is not: the tensors that int8 takes, those of two dimensions or more, and small ones
    too where they are entropy-coded.

    Raises:
        UsageError: globs that disagree or fit nothing.
    """
    recipe = recipes.from_flags("int8", include, exclude, None, {})
    return decided(model, recipe, fewest=None if keep_quantized else FEWEST_WEIGHTS)


@dataclass(frozen=True)
class Quantizing:
    """The result, the passes that it took, the samples it was measured on alone, the samples and those added to them
    that weights were fitted to, how many layers were there already, and how the result does on those added."""

    result: Result
    passes: int
    held_out: int
    fitted: int
    fitted_added: int
    resumed: int
    store: Store
    elsewhere: Quality | None = None


def quantized(
    work: Work, target: Target, size_of: Callable[[Entries], int], unfinished: Path | None, progress: Progress
) -> Quantizing:
    """The entries that meet the target. `size_of` tells the size of a file with such entries; finished layers are kept
    in the folder `unfinished`, and found there again.

    Raises:
        UsageError: there is nothing to quantize.
        BadInput: the network does not run on the samples.
        BoundNotMet: the target cannot be met.
        MissingDependency: onnx, onnxruntime or wasmtime is not installed.
    """
    if not work.chosen:
        raise UsageError("no tensor is left to quantize", file=work.model.source.path)
    keep = work.keep_quantized
    identity = identity_of(work.network, work.calibration, work.named, work.seed, work.effort, keep_quantized=keep)
    store = Store(unfinished, identity)
    finest = keep and target.min_psnr is None and target.step is None
    watched = _Passes(progress, 1 if target.step is not None or finest else _PASSES)
    calibrator = Calibrator(
        work.network,
        work.calibration,
        work.chosen,
        seed=work.seed,
        effort=work.effort,
        progress=watched,
        store=store,
        keep_quantized=keep,
        # Eight bits are eight bits, however fine the steps: then layers get the finest that they hold.
        weighed=not finest,
        fixed=work.fixed,
    )
    watched.next()
    number = 1

    def at(step: float) -> Result:
        result = calibrator.at(step)
        watched.next()
        return result

    def size(found: search.Measured) -> int:
        return size_of(found.entries) if isinstance(found, Result) else 0

    with _cleared_where_not_met(store):
        if target.step is not None:
            found: search.Measured = at(target.step)
        elif target.min_psnr is not None:
            found, number = search.smallest_with(at, target.min_psnr)
            if target.max_bytes is not None and size(found) > target.max_bytes:
                raise BoundNotMet(
                    f"{target.min_psnr:g} dB take {size(found):,} bytes, over {target.max_bytes:,}", hint="give one up"
                )
        elif finest:
            found = at(_FINEST)
            if size(found) > (target.max_bytes or 0):
                raise BoundNotMet(
                    f"weights of 8 bits take {size(found):,} bytes, over {target.max_bytes or 0:,}",
                    hint="leave --keep-quantized out: what is expanded when it is loaded takes fewer",
                )
        else:
            found, number = search.best_within(at, size, target.max_bytes or 0, calibrator.weights)
    if not isinstance(found, Result):
        raise TypeError(type(found))
    counts = calibrator.held_out, calibrator.fitted, calibrator.fitted_added
    return Quantizing(found, number, *counts, store.found, store, calibrator.quality_elsewhere(found))


@contextlib.contextmanager
def _cleared_where_not_met(store: Store) -> Iterator[None]:
    """What cannot be is not unfinished."""
    try:
        yield
    except BoundNotMet:
        store.clear()
        raise


def merged(model: Model, entries: Entries) -> Iterator[Entry]:
    """The model's tensors, those that changed as they are now."""
    for tensor in model.tensors:
        entry = entries.get(tensor.name, tensor)
        yield entry if entry is tensor else dataclasses.replace(entry, role=tensor.role)


def changes(model: Model, decisions: Mapping[str, Decision], result: Result) -> list[Change]:
    """What happened to each tensor of the model. Errors are those of rounding, not of what was moved elsewhere."""
    notes = {layer.tensor: layer.note for layer in result.layers}
    out = []
    for tensor in model.tensors:
        original = tensor.size * tensor.dtype.itemsize
        entry = result.entries.get(tensor.name)
        if entry is None:
            decision = decisions.get(tensor.name)
            reason = decision.reason if isinstance(decision, Kept) else "the graph does not use it"
            out.append(Change(tensor.name, tensor.shape, "kept", reason, original, None))
            continue
        found = Note("calibrated", notes[tensor.name]) if tensor.name in notes else result.note(tensor.name)
        before = result.moved.get(tensor.name, tensor.array)
        lost = difference(before.reshape(tensor.shape), entry.array)
        out.append(Change(tensor.name, tensor.shape, found.mode, found.why, original, lost))
    return out


class _Passes:
    """Progress over preparing and several passes, each of which has the same share."""

    def __init__(self, progress: Progress, passes: int):
        self._progress, self._passes, self._done = progress, passes, 0

    def next(self) -> None:
        self._done += 1

    def __call__(self, name: str, done: int, total: int, /) -> None:
        parts = max(self._passes, self._done) + 1
        part = f"pass {self._done}" if self._done else "preparing"
        here = self._done * 1000 + 1000 * done // max(1, total)
        self._progress(f"{part}: {name}" if name else "", here, parts * 1000)
