"""The same weights as other tools encode them: their formulas, or the tools themselves where they are installed."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.bench.plan import Variant
from shrink.bench.size import gzip
from shrink.codebooks import EIGHTBIT_TABLE
from shrink.errors import MissingDependency, ShrinkError, printable
from shrink.files import file_size
from shrink.formats import onnx as onnx_format
from shrink.formats._onnx_proto import Reader, parse
from shrink.model import Entry
from shrink.networks.legacy import import_webdnn
from shrink.progress import Progress

__all__ = [
    "peers",
    "sqnr_db",
    "tensorflowjs_affine",
    "tensorflowjs_float16",
    "webdnn_decode",
    "webdnn_encoder",
    "weights_sqnr_db",
]

F32 = NDArray[np.float32]
Weights = Mapping[str, F32]

_TENSORFLOWJS = "by the formulas of tensorflowjs 4.22's converter"
# ONNX Runtime's quantizer reads the whole file, several times over.
_ONNX_AT_MOST = 1_000_000_000


def peers(first: Variant, progress: Progress) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The document's `peers`, and what could not be measured: which, and why.

    Bytes are those of the weights alone, and of the whole file for ONNX Runtime. SQNR is over all weights of two
    dimensions or more, against the original's.
    """
    weights = {t.name: np.ascontiguousarray(t.array, np.float32) for t in first.network.model.tensors if _counts(t)}
    rows: list[dict[str, Any]] = []
    missing: list[tuple[str, str]] = []
    if not all(np.all(np.isfinite(x)) for x in weights.values()):
        return rows, [("other tools' encodings", "a weight is NaN or infinite")]
    for number, (name, measured) in enumerate(_PEERS):
        progress(f"peers: {name}", number, len(_PEERS))
        row: dict[str, Any] = {"name": name, "bytes": None, "gzip": None, "sqnr_db": None, "note": None}
        try:
            row |= measured(first, weights)
        except ShrinkError as error:
            row["note"] = f"not measured: {error.message}"
            missing.append((name, str(error)))
        rows.append(row)
    progress("peers", len(_PEERS), len(_PEERS))
    return rows, missing


def sqnr_db(first: Variant, other: Variant) -> float | None:
    """SQNR of a variant's weights of two dimensions or more, as for the peers; None where nothing differs."""
    weights = {t.name: np.asarray(t.array, np.float32) for t in first.network.model.tensors if _counts(t)}
    theirs = {t.name: t for t in other.network.model.tensors if t.name in weights and t.shape == weights[t.name].shape}
    if any(x.ndim > 1 and name not in theirs for name, x in weights.items()):
        # A graph of its own, whose weights are others.
        return None
    return weights_sqnr_db(weights, {name: t.array for name, t in theirs.items()})


def _counts(entry: Entry) -> bool:
    return entry.dtype.kind == "f" and entry.size > 0


def weights_sqnr_db(weights: Weights, decoded: Mapping[str, NDArray[Any]]) -> float | None:
    """Over all weights of two dimensions or more; None where nothing differs or there are none."""
    signal = noise = 0.0
    for name, x in weights.items():
        if x.ndim > 1 and name in decoded:
            signal += float(np.square(x, dtype=np.float64).sum())
            noise += float(np.square(x - decoded[name].astype(np.float64)).sum())
    return 10 * float(np.log10(signal / noise)) if noise > 0 and signal > 0 else None


# WebDNN


def webdnn_encoder() -> tuple[Callable[[F32], bytes], Callable[[F32], object]]:
    """WebDNN 1.2.11's own eightbit encoder: one tensor to the bytes of its file, and weights to codes only.

    Raises:
        MissingDependency: the package is not installed.
    """
    import_webdnn()
    from webdnn.backend.code_generator.allocator import Allocation
    from webdnn.encoder import constant_encoder_eightbit as module

    encoder = module.ConstantEncoderEightbit()

    def whole(x: F32) -> bytes:
        data: bytes = encoder._single_encode(x.reshape(-1), Allocation(x.size, 0))
        return data

    class NoDeflate:
        @staticmethod
        def compress(data: bytes, level: int) -> bytes:
            return b""

    def codes(x: F32) -> object:
        deflate, module.zlib = module.zlib, NoDeflate
        try:
            return encoder._single_encode(x.reshape(-1), Allocation(x.size, 0))
        finally:
            module.zlib = deflate

    return whole, codes


def webdnn_decode(data: bytes, table: NDArray[np.float64]) -> F32:
    """What WebDNN's browser side makes of one tensor's bytes: offset, length, scale, a reserved word, zlib codes."""
    scale = float(np.frombuffer(data, "<f4", 1, 8)[0])
    codes = np.frombuffer(zlib.decompress(data[16:]), np.uint8)
    return (table * scale).astype(np.float32)[codes]


def _webdnn(first: Variant, weights: Weights) -> dict[str, Any]:
    encode = webdnn_encoder()[0]
    # All zeros have no scale, and its encoder divides by it.
    encoded = {name: encode(x) for name, x in weights.items() if np.any(x)}
    decoded = {name: webdnn_decode(data, EIGHTBIT_TABLE).reshape(weights[name].shape) for name, data in encoded.items()}
    note = "WebDNN 1.2.11's own encoder, zlib included"
    return {"bytes": sum(map(len, encoded.values())), "sqnr_db": weights_sqnr_db(weights, decoded), "note": note}


# TensorFlow.js


def tensorflowjs_affine(x: F32, bits: int) -> tuple[NDArray[Any], float, float]:
    """TensorFlow.js 4.22's uint8 and uint16, as in its converter's quantization.py: codes, scale, minimum."""
    highest = (1 << bits) - 1
    low, high = float(x.min()), float(x.max())
    scale = (high - low) / highest or 1.0
    if low <= 0 <= high:
        zero = round(-low / scale)
        low, high = -zero * scale, (highest - zero) * scale
    codes = np.round((np.clip(x, low, high) - low) / scale).astype(np.uint8 if bits == 8 else np.uint16)
    return codes, scale, low


def tensorflowjs_float16(x: F32) -> NDArray[Any]:
    """TensorFlow.js 4.22's float16: NumPy's cast."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16)


def _tensorflowjs(bits: int) -> Callable[[Variant, Weights], dict[str, Any]]:
    def measured(first: Variant, weights: Weights) -> dict[str, Any]:
        decoded, stored = {}, []
        for name, x in weights.items():
            codes, scale, low = tensorflowjs_affine(x, bits)
            decoded[name] = codes * scale + low
            stored.append(codes)
        return _plain(stored, weights, decoded)

    return measured


def _tensorflowjs_float16(first: Variant, weights: Weights) -> dict[str, Any]:
    halves = {name: tensorflowjs_float16(x) for name, x in weights.items()}
    return _plain(list(halves.values()), weights, halves)


def _plain(stored: list[NDArray[Any]], weights: Weights, decoded: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    stream = zlib.compressobj(9, wbits=31)
    packed = sum(len(stream.compress(x.tobytes())) for x in stored) + len(stream.flush())
    return {
        "bytes": sum(x.nbytes for x in stored),
        "gzip": packed,
        "sqnr_db": weights_sqnr_db(weights, decoded),
        "note": f"{_TENSORFLOWJS}; its weight shards, as they are and under gzip -9",
    }


# ONNX Runtime


def _onnxruntime(first: Variant, weights: Weights) -> dict[str, Any]:
    """ONNX Runtime's own dynamic quantization to int8, of what operators it knows."""
    if sum(x.nbytes for x in weights.values()) > _ONNX_AT_MOST:
        raise ShrinkError("its quantizer needs several times the memory of so large a network")
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "small.onnx"
        model = first.network.model
        onnx_format.write(model, model.tensors, whole, None)
        version, values = _dynamic_int8(whole, small)
        size, packed = file_size(small), gzip(small)
    slots = _slots(first)
    found = {
        name: back
        for name, x in weights.items()
        if (back := _dequantized(slots.get(name, name), x, values)) is not None
    }
    if not found:
        raise ShrinkError("it knows none of the operators that have this network's weights")
    count = sum(x.ndim > 1 for x in weights.values())
    note = f"ONNX Runtime {version}'s own quantize_dynamic, {len(found)} of {count} weights; the whole .onnx file"
    return {"bytes": size, "gzip": packed, "sqnr_db": weights_sqnr_db(weights, {**weights, **found}), "note": note}


def _dynamic_int8(whole: Path, small: Path) -> tuple[str, dict[str, NDArray[Any]]]:
    """ONNX Runtime's version, and the initializers of what it made."""
    try:
        import onnx
        from onnxruntime import __version__ as version  # type: ignore[import-untyped,unused-ignore]
        from onnxruntime.quantization import (  # type: ignore[import-untyped,unused-ignore]
            QuantType,
            quantize_dynamic,
        )
    except ImportError:
        raise MissingDependency("onnxruntime", "bench") from None
    try:
        with _no_logging(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_dynamic(whole, small, weight_type=QuantType.QInt8)
        made = onnx.load(small).graph.initializer
        return version, {i.name: onnx.numpy_helper.to_array(i) for i in made}
    except Exception as error:
        lines = str(error).strip().splitlines()
        said = printable(lines[0] if lines else type(error).__name__)
        raise ShrinkError(f"its quantizer fails: {said}") from None


@contextlib.contextmanager
def _no_logging() -> Iterator[None]:
    """It advises on the root logger to prepare the model first, which changes nothing about its weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _dequantized(slot: str, weight: F32, values: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """What the codes of a weight stand for; None where it was not quantized."""
    parts = [values.get(f"{slot}_{part}") for part in ("quantized", "scale", "zero_point")]
    codes, scale, zero = parts
    if codes is None or scale is None or zero is None:
        return None
    back: NDArray[Any] = (codes.astype(np.float64) - zero) * scale
    # A Gemm that transposes its weight becomes a multiplication that does not; of a square one only the values tell.
    fitting = [x for x in (back, back.T) if x.shape == weight.shape]
    return min(fitting, key=lambda x: float(np.square(x - weight).sum()), default=None)


def _slots(first: Variant) -> dict[str, str]:
    """The graph's name of each weight."""
    path = first.network.model.source.path
    reader = Reader(path)
    slots = parse(first.network.model.graph or b"", path).graph.initializer
    return {slot.external_data[0].value: slot.name for slot in slots if reader.storage(slot) == "external"}


_PEERS: tuple[tuple[str, Callable[[Variant, Weights], dict[str, Any]]], ...] = (
    ("WebDNN eightbit", _webdnn),
    ("TensorFlow.js uint8", _tensorflowjs(8)),
    ("TensorFlow.js uint16", _tensorflowjs(16)),
    ("TensorFlow.js float16", _tensorflowjs_float16),
    ("ONNX Runtime dynamic int8", _onnxruntime),
)
