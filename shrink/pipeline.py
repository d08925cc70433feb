"""Quantizing a model and going back, one tensor in memory at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, UsageError, blaming
from shrink.formats._trainer import model_prefix
from shrink.model import DTYPES, Entry, Model, Quantized, Source, Tensor
from shrink.progress import Progress, silent
from shrink.quantizers import Kept
from shrink.quantizers.prune import Prune
from shrink.recipe import Decision, Recipe, Rule, wants

__all__ = ["Change", "Difference", "decided", "difference", "drop_state", "quantized", "restored", "stored_as"]

F32 = NDArray[np.float32]

_TILE = 1 << 18
# What a result is called, where that is not what it stores.
_BECAME = {"float32": "pruned"}
# Below this, what the description of an encoded tensor costs outweighs what coding saves. In ONNX that takes nodes
# and a table; in WebDNN's flat layouts what is smaller is taken for a bias.
_FEWEST_WEIGHTS = 256
_FEWEST_WEIGHTS_IN = {"onnx": 1024, "webdnn": 1024}


@dataclass(frozen=True)
class Difference:
    """How far values are from the original: largest |error|, root mean square of the error and of the original.

    All are NaN where either holds NaN, infinity or numbers too large to square.
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
    source = model.source
    if prefix := _only_prefix(model):
        kept = [dataclasses.replace(t, name=t.name.removeprefix(prefix)) for t in kept]
        source = _Shortened(source.format, source.path, source.size_bytes, prefix)
    attributes = {k: v for k, v in model.attributes.items() if k != "trainer"}
    return dataclasses.replace(model, tensors=tuple(kept), source=source, attributes=attributes)


@dataclass(frozen=True)
class _Shortened(Source):
    """The source of weights whose names have lost `prefix`. It is in the names that `inspect` shows."""

    prefix: str


def _only_prefix(model: Model) -> str:
    """What the names of all weights of a trainer snapshot with one model begin with; empty for any other model."""
    prefixes = {model_prefix(t.name) for t in model.tensors if t.role == "weight"}
    return prefixes.pop() if "trainer" in model.attributes and len(prefixes) == 1 else ""


@dataclass(frozen=True)
class _EitherName(Rule):
    """A rule that fits a tensor by its name or by its other one, which is with or without the snapshot's prefix."""

    others: Mapping[str, str]

    def fits(self, name: str) -> bool:
        return super().fits(name) or super().fits(self.others[name])


def _by_either_name(recipe: Recipe, model: Model) -> Recipe:
    """The recipe for a trainer snapshot with one model, or its weights: its rules may say both the names of each."""
    names = [t.name for t in model.tensors]
    if isinstance(model.source, _Shortened):
        others = {name: model.source.prefix + name for name in names}
    elif prefix := _only_prefix(model):
        others = {name: name.removeprefix(prefix) for name in names}
    else:
        return recipe
    rules = (_EitherName(rule.globs, rule.quantizers, rule.said_by, others) for rule in recipe.rules)
    return dataclasses.replace(recipe, rules=tuple(rules))


def decided(model: Model, recipe: Recipe, *, to_webdnn: bool = False, fewest: int | None = None) -> dict[str, Decision]:
    """The recipe's decision for every weight of the model. Rules may name those of a trainer snapshot with its prefix
    or without, whether or not `drop_state` has taken it off.

    `fewest` is the size from which a tensor is worth it, where that is not the usual one.
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
    source = model.source.format
    fewest = fewest or _FEWEST_WEIGHTS_IN.get(source, _FEWEST_WEIGHTS)
    decisions = wants(_by_either_name(recipe, model), weights, flat=source == "webdnn", every=every, fewest=fewest)
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
        with blaming(model.source.path):
            entry, change = _quantized(tensor, decisions.get(tensor.name, Kept("training state", asked=True)))
        on_change(change)
        yield entry
        done += tensor.size_bytes
        progress(tensor.name, done, total)


def restored(model: Model) -> Iterator[Entry]:
    """The tensors with plain values again: what was encoded is float32, the rest as it was."""
    for entry in model.tensors:
        is_plain = isinstance(entry, Tensor) and entry.dtype != DTYPES["F16"]
        yield entry if is_plain else _plain(entry, model.source.path)


def _plain(entry: Entry, path: Path) -> Tensor:
    dtype = DTYPES["F32"] if entry.dtype == DTYPES["F16"] else entry.dtype

    def load() -> NDArray[Any]:
        with blaming(path):
            return entry.array.astype(dtype, copy=False)

    return Tensor(entry.name, dtype, entry.shape, load, entry.role)


def _quantized(tensor: Entry, decision: Decision) -> tuple[Entry, Change]:
    original_bytes = tensor.size * tensor.dtype.itemsize

    def kept(reason: str) -> tuple[Entry, Change]:
        return tensor, Change(tensor.name, tensor.shape, "kept", reason, original_bytes, None)

    if isinstance(decision, Kept):
        values = tensor.array
        # What the user keeps on purpose may hold anything; what shrink keeps by itself would spoil the result unseen.
        if not decision.asked:
            _refuse_nonfinite(values, tensor.name)
        return kept(decision.reason)
    stores = decision[-1].stores
    values = tensor.array
    original = _finite(values, tensor.name)
    if stored_as(tensor) == stores and len(decision) == 1 and stores != "float32":
        return kept(f"is {stores} already")
    x, result, became, notes = original, None, "", []
    for quantizer in decision:
        outcome = quantizer.quantize(tensor.name, x)
        if isinstance(outcome, Kept):
            notes.append(f"not {quantizer.stores}: {outcome.reason}")
            break
        result, became, x = outcome, _BECAME.get(quantizer.stores, quantizer.stores), outcome.array
    if result is None:
        return kept(", ".join(notes))
    notes += _zero_channels(x)
    change = Change(tensor.name, tensor.shape, became, ", ".join(notes), original_bytes, difference(values, x))
    return dataclasses.replace(result, role=tensor.role), change


def stored_as(entry: Entry) -> str:
    """What a format must hold to take this tensor: "float32", "float16", "eightbit", "int8", "int4" or "calibrated"."""
    if entry.dtype == DTYPES["F16"]:
        return "float16"
    if isinstance(entry, Quantized):
        step = entry.steps[-1]
        if step.name == "codebook.1" and step.params.get("table") == "eightbit":
            return "eightbit"
        if step.name == "grid.1":
            return "calibrated"
        if step.name == "affine.1":
            return f"int{step.params.get('bits')}"
        if step.name == "cast.1" and step.params.get("from") == "F16":
            return "float16"
    return "float32"


def _finite(values: NDArray[Any], name: str) -> F32:
    """The values as float32.

    Raises:
        BadInput: some are NaN, infinite, or beyond float32.
    """
    _refuse_nonfinite(values, name)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(values, np.float32)
    if x.dtype != values.dtype and not _all_finite(x):
        raise BadInput("holds values beyond float32", tensor=name)
    return x


def _refuse_nonfinite(values: NDArray[Any], name: str) -> None:
    if _all_finite(values):
        return
    count = values.size - int(np.count_nonzero(np.isfinite(values)))
    nan = int(np.count_nonzero(np.isnan(values)))
    what = "NaN" if nan == count else "infinite" if nan == 0 else "NaN or infinite"
    raise BadInput(f"{count} of {values.size} weights are {what}", tensor=name)


def _all_finite(values: NDArray[Any]) -> bool:
    if values.dtype.kind != "f" or not values.size:
        return True
    # NaN and infinity show in the extremes, which cost no memory.
    return bool(np.isfinite(values.max()) and np.isfinite(values.min()))


def _zero_channels(x: F32) -> list[str]:
    if x.ndim < 2 or not x.size:
        return []
    zero = len(x) - int(np.count_nonzero(x.reshape(len(x), -1).any(axis=1)))
    return [f"{zero} of {len(x)} channels are all zero"] if zero else []


@np.errstate(over="ignore", invalid="ignore")
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
    if not (math.isfinite(noise) and math.isfinite(signal)):
        return Difference(math.nan, math.nan, math.nan)
    count = max(a.size, 1)
    return Difference(largest, math.sqrt(noise / count), math.sqrt(signal / count))


def _with_global_thresholds(model: Model, decisions: dict[str, Decision]) -> dict[str, Decision]:
    """Prune with scope "global" needs one threshold for all the tensors it is used on: find it here."""
    groups: dict[Prune, list[str]] = {}
    for name, chain in decisions.items():
        if isinstance(chain, Kept):
            continue
        if any(isinstance(q, Prune) and q.scope == "global" for q in chain[1:]):
            raise UsageError("prune with scope global looks at the original weights", hint="name it first: prune,int8")
        if isinstance(chain[0], Prune) and chain[0].scope == "global":
            groups.setdefault(chain[0], []).append(name)
    out = dict(decisions)
    for prune, names in groups.items():
        chosen = set(names)
        tensors = [t for t in model.tensors if t.name in chosen]
        with blaming(model.source.path):
            pruned = _at_threshold(tensors, prune)
        for name, quantizer in pruned.items():
            chain = decisions[name]
            if isinstance(chain, tuple):
                out[name] = (quantizer, *chain[1:])
    return out


def _at_threshold(tensors: list[Entry], prune: Prune) -> dict[str, Prune]:
    """For each tensor the quantizer that does its part of setting exactly `sparsity` of all weights to 0.

    Non-negative floats sort like their bit patterns: a first pass counts by the upper half of the bits, a second by
    the lower half of those that share the upper half found. Of equal magnitudes the first ones go, in tensor order.
    """
    wanted = round(prune.sparsity * sum(t.size for t in tensors))
    if wanted == 0:
        return {t.name: dataclasses.replace(prune, threshold=0.0) for t in tensors}

    def bits(tensor: Entry) -> NDArray[np.uint32]:
        return np.abs(_finite(tensor.array, tensor.name)).reshape(-1).view(np.uint32)

    upper = np.zeros(1 << 16, np.int64)
    for tensor in tensors:
        upper += np.bincount(bits(tensor) >> 16, minlength=1 << 16)
    high = int(np.searchsorted(np.cumsum(upper), wanted))
    below = int(upper[:high].sum())
    lower = np.zeros(1 << 16, np.int64)
    for tensor in tensors:
        pattern = bits(tensor)
        lower += np.bincount(pattern[pattern >> 16 == high] & 0xFFFF, minlength=1 << 16)
    sums = np.cumsum(lower)
    low = int(np.searchsorted(sums, wanted - below))
    left = wanted - below - (int(sums[low - 1]) if low else 0)
    limit = np.uint32(high << 16 | low)
    out = {}
    for tensor in tensors:
        here = min(left, int(np.count_nonzero(bits(tensor) == limit))) if left else 0
        out[tensor.name] = dataclasses.replace(prune, threshold=float(limit.view(np.float32)), at_threshold=here)
        left -= here
    return out
