"""File size and weight error of every mode on real trained models, beside WebDNN and TensorFlow.js.

    python -m benchmarks size [MODEL ...] [-o reports/size.json]

Without a model: those of ../shared/models. Bytes are those of the whole file that shrink writes, header and kept
tensors included; WebDNN's are those of its weight file, TensorFlow.js's those of its weight shards (codes
only) under gzip -9. SQNR is over all weights of two dimensions or more, against the values of the original.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

import shrink
from benchmarks import peers
from shrink.errors import MissingDependency
from shrink.formats import safetensors
from shrink.pipeline import drop_state
from shrink.steps import EIGHTBIT_TABLE

SHARED = Path(__file__).parents[1].parent / "shared" / "models"
MODELS = (
    SHARED / "waifu2x" / "upconv7_scale_rgb.npz",
    SHARED / "waifu2x" / "vgg7_noise0_y.npz",
    SHARED / "lstm-text-keras" / "lstm_text_generation.h5",
)
MODES = ("float16", "int8", "eightbit", "int4", "prune", "prune,int8", "prune,eightbit")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks size", description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/size.json"))
    options = parser.parse_args(arguments)
    result = {}
    for path in options.models or MODELS:
        if not path.exists():
            print(f"{path.name}: not measured, {path} is not here\n")
            continue
        result[path.name] = rows = measured(path)
        table = [
            [
                r["mode"],
                f"{r['bytes']:,}",
                f"{r['share']:.1%}",
                "exact" if r["sqnr_db"] is None else f"{r['sqnr_db']:.2f}",
            ]
            if "bytes" in r
            else [r["mode"], r["not_measured"], "", ""]
            for r in rows
        ]
        headers = [path.name, "bytes", "of float32", "SQNR dB"]
        print(tabulate(table, headers, disable_numparse=True, colalign=("left", "right", "right", "right")), end="\n\n")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measured(path: Path) -> list[dict[str, Any]]:
    model = drop_state(shrink.load(path))
    arrays = {t.name: t.array for t in model.tensors if t.dtype.kind == "f" and t.size}
    weights = {name: x for name, x in arrays.items() if x.ndim > 1}
    float_bytes = sum(4 * x.size for x in arrays.values())
    signal = sum(float(np.square(x, dtype=np.float64).sum()) for x in weights.values())

    def row(mode: str, size: int, decoded: dict[str, Any]) -> dict[str, Any]:
        noise = sum(float(np.square(x - decoded[n].astype(np.float64)).sum()) for n, x in weights.items())
        sqnr = 10 * float(np.log10(signal / noise)) if noise else None
        return {"mode": mode, "bytes": size, "share": size / float_bytes, "sqnr_db": sqnr}

    rows = [row("float32 (this file)", path.stat().st_size, arrays)]
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            out = Path(folder) / "out.safetensors"
            shrink.save(shrink.quantize(model, mode), out)
            rows.append(
                row(f"shrink {mode}", out.stat().st_size, {t.name: t.array for t in safetensors.read(out).tensors})
            )
    try:
        encode = peers.webdnn_encoder()[0]
    except MissingDependency as error:
        rows.append({"mode": "WebDNN eightbit", "not_measured": f"not measured: {error}"})
    else:
        encoded = {name: encode(x) for name, x in arrays.items()}
        decoded = {
            name: peers.webdnn_decode(data, EIGHTBIT_TABLE).reshape(arrays[name].shape)
            for name, data in encoded.items()
        }
        rows.append(row("WebDNN eightbit", sum(map(len, encoded.values())), decoded))
    quantized = {name: peers.tensorflowjs_uint8(x) for name, x in arrays.items()}
    size = len(gzip.compress(b"".join(codes.tobytes() for codes, _, _ in quantized.values()), 9))
    decoded = {name: codes * scale + low for name, (codes, scale, low) in quantized.items()}
    rows.append(row("TensorFlow.js uint8, gzip", size, decoded))
    return rows
