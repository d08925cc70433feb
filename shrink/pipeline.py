"""Quantizing a model and going back, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, UsageError
from shrink.model import DTYPES, Entry, Model, Quantized, Tensor
from shrink.progress import Progress, silent
from shrink.quantizers import Kept
from shrink.quantizers.prune import Prune
from shrink.recipe import Decision, Recipe, wants

__all__ = ["Change", "Difference", "decided", "difference", "drop_state", "quantized", "restored"]

F32 = NDArray[np.float32]

_TILE = 1 << 18
_TRAINER_MODEL = re.compile(r"^updater/model:([^/]*)/")


@dataclass(frozen=True)
class Difference:
    """How far values are from the original: largest |error|, root mean square of the error and of the original.

    All are NaN where either holds NaN.
    """

    max_error: float
    rmse: float
    signal_rms: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio; infinite where nothing differs."""
        if not self.rmse > 0:
            return self.rmse if math.isnan(self.rmse) else math.inf
        return 20 * math.log10(self.signal_rms / self.rmse) if self.signal_rms else -math.inf


@dataclass(frozen=True)
class Change:
    """What happened to one tensor. `mode` is "kept" with the reason in `note`, or what it became."""

    name: str
    shape: tuple[int, ...]
    mode: str
    note: str
    original_bytes: int
    difference: Difference | None


def drop_state(model: Model) -> Model:
    """The model without what only training needs.

    The weights of a trainer snapshot with one model lose the snapshot's prefix, so that the result is an ordinary
    snapshot of that model.
    """
    kept = [t for t in model.tensors if t.role == "weight"]
    models = {m.group(1) if (m := _TRAINER_MODEL.match(t.name)) else None for t in kept}
    if "trainer" in model.attributes and len(models) == 1 and None not in models:
        kept = [dataclasses.replace(t, name=_TRAINER_MODEL.sub("", t.name)) for t in kept]
    attributes = {k: v for k, v in model.attributes.items() if k != "trainer"}
    return dataclasses.replace(model, tensors=tuple(kept), attributes=attributes)


def decided(model: Model, recipe: Recipe, *, to_webdnn: bool = False) -> dict[str, Decision]:
    """The recipe's decision for every weight of the model.

    `to_webdnn`: the result becomes a WebDNN folder, whose eightbit form holds coded tensors only.

    Raises:
        UsageError: rules that disagree, fit nothing, or ask what the output cannot hold.
    """
    weights = [t for t in model.tensors if t.role == "weight"]
    every = to_webdnn and "eightbit" in recipe.stores
    if every and (recipe.default is None or recipe.rules):
        raise UsageError(
            "a WebDNN folder is eightbit as a whole, so single tensors cannot be chosen",
            hint="or write a .safetensors file",
        )
    # WebDNN's layouts are flat: they say how many values a tensor has, not its shape.
    decisions = wants(recipe, weights, flat=model.source.format == "webdnn", every=every)
    return _with_global_thresholds(model, decisions)


def quantized(
    model: Model,
    decisions: dict[str, Decision],
    progress: Progress = silent,
    on_change: Callable[[Change], None] = lambda change: None,
) -> Iterator[Entry]:
    """The tensors of the model, each as its decision says, as they are asked for; `on_change` hears of each.

    Raises:
        BadInput: a tensor holds NaN or infinity.
    """
    total = sum(t.size_bytes for t in model.tensors)
    done = 0
    for tensor in model.tensors:
        progress(tensor.name, done, total)
        decision = decisions.get(tensor.name, Kept("training state"))
        try:
            entry, change = _quantized(tensor, decision)
        except BadInput as error:
            error.file = error.file or model.source.path
            raise
        on_change(change)
        yield entry
        done += tensor.size_bytes
        progress(tensor.name, done, total)


def restored(model: Model) -> Iterator[Entry]:
    """The tensors with plain values again: what was encoded is float32, the rest as it was."""
    for entry in model.tensors:
        yield _plain(entry) if isinstance(entry, Quantized) or entry.dtype == DTYPES["F16"] else entry


def _plain(entry: Entry) -> Tensor:
    dtype = DTYPES["F32"] if entry.dtype == DTYPES["F16"] else entry.dtype
    return Tensor(entry.name, dtype, entry.shape, lambda: entry.array.astype(dtype, copy=False), entry.role)


def _quantized(tensor: Entry, decision: Decision) -> tuple[Entry, Change]:
    original_bytes = tensor.size * tensor.dtype.itemsize

    def kept(reason: str) -> tuple[Entry, Change]:
        return tensor, Change(tensor.name, tensor.shape, "kept", reason, original_bytes, None)

    if isinstance(decision, Kept):
        if tensor.dtype.kind == "f":
            _finite(tensor)
        return kept(decision.reason)
    stores = decision[-1].stores
    original = _finite(tensor)
    if _stored_as(tensor) == stores and len(decision) == 1 and stores != "float32":
        return kept(f"is {stores} already")
    x, result, became, notes = original, None, "", []
    for quantizer in decision:
        outcome = quantizer.quantize(tensor.name, x)
        if isinstance(outcome, Kept):
            notes.append(f"not {quantizer.stores}: {outcome.reason}")
            break
        result, became, x = outcome, quantizer.stores, outcome.array
    if result is None:
        return kept(", ".join(notes))
    notes += _zero_channels(x)
    change = Change(tensor.name, tensor.shape, became, ", ".join(notes), original_bytes, difference(original, x))
    return dataclasses.replace(result, role=tensor.role), change


def _stored_as(entry: Entry) -> str:
    if entry.dtype == DTYPES["F16"]:
        return "float16"
    if isinstance(entry, Quantized):
        step = entry.steps[-1]
        if step.name == "codebook.1" and step.params.get("table") == "eightbit":
            return "eightbit"
        if step.name == "affine.1":
            return f"int{step.params.get('bits')}"
        if step.name == "cast.1" and step.params.get("from") == "F16":
            return "float16"
    return "float32"


def _finite(tensor: Entry) -> F32:
    """The values as float32.

    Raises:
        BadInput: some are NaN, infinite, or beyond float32.
    """
    values = tensor.array
    if values.size and not (np.isfinite(values.max()) and np.isfinite(values.min())):
        count = values.size - int(np.count_nonzero(np.isfinite(values)))
        nan = int(np.count_nonzero(np.isnan(values)))
        what = "NaN" if nan == count else "infinite" if nan == 0 else "NaN or infinite"
        raise BadInput(f"{count} of {values.size} weights are {what}", tensor=tensor.name)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(values, np.float32)
    if x.dtype != values.dtype and x.size and not (np.isfinite(x.max()) and np.isfinite(x.min())):
        raise BadInput("holds values beyond float32", tensor=tensor.name)
    return x


def _zero_channels(x: F32) -> list[str]:
    if x.ndim < 2 or not x.size:
        return []
    zero = len(x) - int(np.count_nonzero(x.reshape(len(x), -1).any(axis=1)))
    return [f"{zero} of {len(x)} channels are all zero"] if zero else []


def difference(original: NDArray[np.floating], other: NDArray[np.floating]) -> Difference:
    """How far `other` is from `original`, in float64, a cache-sized piece at a time."""
    a, b = original.reshape(-1), other.reshape(-1)
    largest = noise = signal = 0.0
    for start in range(0, a.size, _TILE):
        piece = a[start : start + _TILE].astype(np.float64)
        error = piece - b[start : start + _TILE]
        largest = max(largest, float(max(error.max(), -error.min())))
        # Not BLAS, whose threads would fight over so small a piece.
        noise += float(np.einsum("i,i->", error, error))
        signal += float(np.einsum("i,i->", piece, piece))
    if math.isnan(noise):
        return Difference(math.nan, math.nan, math.nan)
    count = max(a.size, 1)
    return Difference(largest, math.sqrt(noise / count), math.sqrt(signal / count))


def _with_global_thresholds(model: Model, decisions: dict[str, Decision]) -> dict[str, Decision]:
    """Prune with scope "global" needs one threshold for all the tensors it is used on: find it here."""
    groups: dict[Prune, list[str]] = {}
    for name, chain in decisions.items():
        if isinstance(chain, tuple) and isinstance(chain[0], Prune) and chain[0].scope == "global":
            groups.setdefault(chain[0], []).append(name)
    out = dict(decisions)
    for prune, names in groups.items():
        threshold = _magnitude_at([t for t in model.tensors if t.name in names], prune.sparsity)
        for name in names:
            chain = decisions[name]
            if isinstance(chain, tuple):
                out[name] = (dataclasses.replace(prune, threshold=threshold), *chain[1:])
    return out


def _magnitude_at(tensors: list[Entry], share: float) -> float:
    """The magnitude that `share` of all the weights do not exceed, exactly, in two passes over the tensors.

    Non-negative floats sort like their bit patterns: the first pass counts by the upper half of the bits, the
    second by the lower half of those that share the upper half found.
    """
    wanted = round(share * sum(t.size for t in tensors))
    if wanted == 0:
        return -1.0

    def bits(tensor: Entry) -> NDArray[np.uint32]:
        return np.abs(_finite(tensor)).reshape(-1).view(np.uint32)

    upper = np.zeros(1 << 16, np.int64)
    for tensor in tensors:
        upper += np.bincount(bits(tensor) >> 16, minlength=1 << 16)
    high = int(np.searchsorted(np.cumsum(upper), wanted))
    rest = wanted - int(upper[:high].sum())
    lower = np.zeros(1 << 16, np.int64)
    for tensor in tensors:
        pattern = bits(tensor)
        lower += np.bincount(pattern[pattern >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low = int(np.searchsorted(np.cumsum(lower), rest))
    return float(np.uint32(high << 16 | low).view(np.float32))
