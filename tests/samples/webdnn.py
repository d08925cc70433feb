from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.samples import Damaged

writable = False

Codes = NDArray[np.uint8]
Places = Mapping[str, tuple[int, int]]

N_IN, N_OUT = 12, 5

DENSE_KERNEL = """
dnn_fallback_kernel={
dense: function(inputs, outputs, option) {
    var x = inputs[0], W = inputs[1], b = inputs[2], y = outputs[0];
    for (var i = 0; i < option.n_out; i++) {
        var sum = b[i];
        for (var j = 0; j < option.n_in; j++) sum += W[i * option.n_in + j] * x[j];
        y[i] = sum;
    }
}
};
"""


def graph(places: Places, encoding: str = "eightbit", **more: Any) -> dict[str, Any]:
    """A WebAssembly or fallback graph whose allocations lie at {name: (offset, size)}."""
    return {
        "converted_at": 1555650185,
        "weight_encoding": encoding,
        "memory_layout": {
            "static": {
                "size": max((offset + size for offset, size in places.values()), default=0),
                "allocations": {n: {"name": n, "offset": o, "size": s} for n, (o, s) in places.items()},
            },
            "dynamic": {"size": 0, "allocations": {}},
        },
        "placeholders": {},
        "unresolved_value_lists": [],
        "inputs": [],
        "outputs": [],
        "licenses": {},
        **more,
    }


def webgl_graph(constants: Places, encoding: str = "raw") -> dict[str, Any]:
    """A WebGL graph with constants at {name: (offset, size)} and one texture for activations."""
    sizes = {**{n: s for n, (_, s) in constants.items()}, "activation": 64}
    texture = {"offset": -1, "width": 8, "height": 8, "channel_mode": "R"}
    return {
        "converted_at": 1555650185,
        "inputs": [],
        "outputs": [],
        "memory_layout": {
            "static": {"size": -1, "allocations": {n: {"name": n, "size": s, **texture} for n, s in sizes.items()}},
            "dynamic": {"size": -1, "allocations": {}},
            "mapping": {n: n for n in sizes},
        },
        "weight_encoding": encoding,
        "placeholders": [],
        "shader_sources": {},
        "exec_infos": [],
        "constants_map": {n: {"byte_offset": 4 * o, "size": s} for n, (o, s) in constants.items()},
        "licenses": {},
    }


def record(offset: int, codes: Codes, scale: float = 1.0, body: bytes | None = None) -> bytes:
    """One record of an eightbit file, as WebDNN's own converter writes it."""
    if body is None:
        body = zlib.compress(codes.tobytes(), 9)
    return struct.pack("<iifi", offset, len(body), scale, 0) + body


def records(parts: Sequence[tuple[Codes, float]]) -> bytes:
    out = b""
    offset = 0
    for codes, scale in parts:
        out += record(offset, codes, scale)
        offset += codes.size
    return out


def put_backend(folder: Path, backend: str, content: Mapping[str, Any], weights: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"graph_{backend}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / f"weight_{backend}.bin").write_bytes(weights)


def make(folder: Path) -> Path:
    """Three backends. The fallback one is a real dense layer y = W x + b that stock webdnn.js can run."""
    rng = np.random.default_rng(11)
    path = folder / "モデル webdnn"

    def codes(n: int) -> Codes:
        return rng.integers(0, 256, n).astype(np.uint8)

    put_backend(
        path,
        "webassembly",
        # Activations come first, as in a converted folder, and share room with each other.
        graph({"a4": (1088, 200), "a5": (1188, 300), "a1": (0, 864), "a2": (864, 32), "a3": (896, 192)}),
        records([(codes(864), 0.75), (codes(32), 1e-20), (codes(192), 3.5)]),
    )
    constants = {"畳み込み/W": (0, 288), "b": (288, 8), "v3": (296, 120)}
    put_backend(path, "webgl_4096", webgl_graph(constants), rng.standard_normal(416).astype("<f4").tobytes())
    n_weights = N_OUT * N_IN
    dense = {
        "entry_func_name": "dense",
        "inputs": ["x", "W", "b"],
        "outputs": ["y"],
        "call_option": {"n_in": N_IN, "n_out": N_OUT},
    }
    places = {
        "x": (n_weights + N_OUT, N_IN),
        "y": (n_weights + N_OUT + N_IN, N_OUT),
        "W": (0, n_weights),
        "b": (n_weights, N_OUT),
    }
    put_backend(
        path,
        "fallback",
        graph(places, "raw", kernel_source=DENSE_KERNEL, exec_infos=[dense], inputs=["x"], outputs=["y"]),
        rng.standard_normal(n_weights + N_OUT).astype("<f4").tobytes(),
    )
    (path / "kernels_fallback.js").write_text(DENSE_KERNEL)
    return path


def damaged(folder: Path) -> Iterator[Damaged]:
    a, b = np.arange(8, dtype=np.uint8), np.arange(200, 204, dtype=np.uint8)
    places = {"act": (12, 20), "A": (0, 8), "B": (8, 4)}
    good = graph(places)
    weights = record(0, a) + record(8, b)

    def put(
        label: str,
        *words: str,
        weights: bytes = weights,
        content: Mapping[str, Any] = good,
        text: bytes | None = None,
        backend: str = "webassembly",
    ) -> Damaged:
        path = folder / label
        put_backend(path, backend, content, weights)
        if text is not None:
            (path / f"graph_{backend}.json").write_bytes(text)
        return Damaged(label, path, words)

    def changed(**more: Any) -> dict[str, Any]:
        return {**good, **more}

    def raw(n: int) -> bytes:
        return np.arange(n, dtype="<f4").tobytes()

    def zipped(data: bytes) -> bytes:
        return zlib.compress(data, 9)

    bin_, json_ = "weight_webassembly.bin", "graph_webassembly.json"
    in_a, in_b = "tensor webassembly/A", "tensor webassembly/B"

    # The graph.
    yield put("not-json", json_, "JSON", text=b"{'weight_encoding': 'raw'}")
    yield put("not-utf8", json_, "JSON", text=b'{"weight_encoding": "\xff"}')
    yield put("nan", json_, "JSON", text=b'{"weight_encoding": "raw", "x": NaN}')
    yield put("nested", json_, "JSON", text=b"[" * 200_000)
    yield put("a-list", json_, "JSON object", text=b"[]")
    yield put("twice", json_, "twice", text=b'{"weight_encoding": "raw", "weight_encoding": "eightbit"}')
    yield put("no-layout", json_, "memory_layout", content={"weight_encoding": "raw"})
    yield put("odd-layout", json_, "memory_layout", content=changed(memory_layout={"static": [1, 2]}))
    yield put("encoding", json_, "encoding", "sixbit", content=changed(weight_encoding="sixbit"))
    yield put("encoding-list", json_, "encoding", content=changed(weight_encoding=["raw"]))
    huge = put("huge-graph", json_, "larger")
    with open(huge.path / json_, "r+b") as file:
        file.truncate(1 << 30)
    yield huge

    # Where tensors lie.
    yield put("negative", json_, in_a, "whole numbers", content=graph({**places, "A": (-4, 8)}))
    yield put("negative-size", json_, in_a, "whole numbers", content=graph({**places, "A": (0, -8)}))
    placeholder = graph(places)
    placeholder["memory_layout"]["static"]["allocations"]["A"]["size"] = {"eval": "placeholders['N']"}
    yield put("placeholder", json_, in_a, "whole numbers", content=placeholder)
    petabytes = {**places, "A": (0, 10**15)}
    yield put("petabytes", json_, in_a, "do not fit", content=graph(petabytes))
    outside = graph(places)
    outside["memory_layout"]["static"]["size"] = 11
    yield put("outside", json_, "act", "do not fit", content=outside)
    yield put("overlap", bin_, in_b, "overlaps", content=graph({**places, "B": (6, 4)}))
    yield put("climbing", "climbs", content=graph({"../../B": (8, 4), "A": (0, 8)}))
    yield put("control", "control characters", content=graph({"B\x1b[31m": (8, 4), "A": (0, 8)}))

    # Records.
    yield put("offset", bin_, in_b, "starts at value 9", weights=record(0, a) + record(9, b))
    yield put("swapped", bin_, in_a, "starts at value 8", weights=record(8, b) + record(0, a))
    yield put("negative-offset", bin_, in_a, "starts at value -1", weights=record(-1, a) + record(8, b))
    yield put("nan-scale", bin_, in_b, "scale", weights=record(0, a) + record(8, b, math.nan))
    yield put("infinite-scale", bin_, in_b, "scale", weights=record(0, a) + record(8, b, math.inf))
    yield put("negative-scale", bin_, in_b, "scale", weights=record(0, a) + record(8, b, -1.0))
    yield put("short-head", bin_, in_b, "head", weights=record(0, a) + bytes(7))
    yield put("short-body", bin_, in_b, "left", weights=weights[:-1])
    yield put("empty-body", bin_, in_b, "claims 0", weights=record(0, a) + record(8, b, body=b""))
    negative = struct.pack("<iifi", 8, -5, 1.0, 0)
    yield put("negative-body", bin_, in_b, "claims -5", weights=record(0, a) + negative)
    yield put("not-zlib", bin_, in_b, "damaged", weights=record(0, a) + record(8, b, body=b"no zlib at all"))
    cut_off = zipped(b.tobytes())[:-2]
    yield put("cut-off", bin_, in_b, "cut off", weights=record(0, a) + record(8, b, body=cut_off))
    trailing = zipped(b.tobytes()) + b"x"
    yield put("trailing", bin_, in_b, "past the end", weights=record(0, a) + record(8, b, body=trailing))
    wrong_sum = zipped(b.tobytes())[:-1] + b"\0"
    yield put("checksum", bin_, in_b, "damaged", weights=record(0, a) + record(8, b, body=wrong_sum))
    bomb = zipped(bytes(50_000_000))
    yield put("bomb", bin_, in_b, "more than", weights=record(0, a) + record(8, b, body=bomb))
    garbage = struct.pack("<iifi", 12, 4, math.nan, 0) + b"junk"
    yield put("garbage-after", bin_, "tensor webassembly/act", "scale", weights=weights + garbage)
    yield put("too-few", bin_, in_b, "ends at value 12", weights=record(0, a) + record(8, b[:2]))
    yield put("too-many", bin_, "act", "ends at value 32", weights=weights + record(12, b))

    # Raw weights, and WebGL's.
    as_raw = graph(places, "raw")
    yield put("raw-odd", bin_, "whole float32", content=as_raw, weights=raw(12) + b"x")
    yield put("raw-short", bin_, in_b, "ends at value 12", content=as_raw, weights=raw(11))
    yield put("raw-into-act", bin_, "act", "ends at value 32", content=as_raw, weights=raw(13))
    yield put("raw-long", bin_, "room for 32", content=as_raw, weights=raw(33))
    texture = webgl_graph({"A": (0, 8), "B": (8, 4)})
    gl_bin, gl_b = "weight_webgl_4096.bin", "tensor webgl_4096/B"
    yield put("webgl-short", gl_bin, gl_b, "ends at", content=texture, weights=raw(11), backend="webgl_4096")
    yield put("webgl-empty", gl_bin, "ends at", content=texture, weights=b"", backend="webgl_4096")
    yield put("webgl-long", gl_bin, "room for 12", content=texture, weights=raw(13), backend="webgl_4096")
    skewed = webgl_graph({"A": (0, 8), "B": (8, 4)})
    skewed["constants_map"]["B"]["byte_offset"] = 33
    yield put("webgl-skewed", gl_b, "start of a value", content=skewed, weights=raw(12), backend="webgl_4096")
    mapless = {**texture, "constants_map": [1]}
    yield put("webgl-map", "constants_map", content=mapless, weights=raw(12), backend="webgl_4096")

    # Files.
    missing = put("missing-weights", "weight_fallback.bin", "missing")
    put_backend(missing.path, "fallback", good, weights)
    (missing.path / "weight_fallback.bin").unlink()
    yield missing
    linked = put("link-out", bin_, "refused")
    (folder / "outside.bin").write_bytes(weights)
    (linked.path / bin_).unlink()
    (linked.path / bin_).symlink_to(folder / "outside.bin")
    yield linked
    circle = put("circle", "webassembly")
    (circle.path / bin_).unlink()
    (circle.path / bin_).symlink_to(bin_)
    yield circle
    not_a_file = put("weights-are-a-folder", bin_, "not a regular file")
    (not_a_file.path / bin_).unlink()
    (not_a_file.path / bin_).mkdir()
    yield not_a_file
