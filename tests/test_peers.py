"""eightbit beside WebDNN's own encoder, the real package: no larger, and closer to the original."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import shrink
from benchmarks.peers import webdnn_decode, webdnn_encoder
from shrink.codebooks import EIGHTBIT_TABLE
from shrink.pipeline import drop_state
from tests.command import run


def sqnr_db(original: dict[str, np.ndarray], decoded: dict[str, np.ndarray]) -> float:
    signal = sum(float(np.square(x, dtype=np.float64).sum()) for x in original.values())
    noise = sum(float(np.square(x - decoded[n].astype(np.float64)).sum()) for n, x in original.items())
    return 10 * math.log10(signal / noise) if noise else math.inf


@pytest.mark.parametrize(
    "name",
    ["waifu2x/upconv7_scale_rgb.npz", "waifu2x/vgg7_noise0_y.npz", "lstm-text-keras/lstm_text_generation.h5"],
)
def test_eightbit_is_no_larger_and_closer_than_webdnns(name: str, shared_models: Path, tmp_path: Path) -> None:
    model = drop_state(shrink.load(shared_models / name))
    original = {t.name: t.array for t in model.tensors}
    encoded = {n: webdnn_encoder()[0](x) for n, x in original.items()}
    theirs = {n: webdnn_decode(data, EIGHTBIT_TABLE).reshape(original[n].shape) for n, data in encoded.items()}
    out = tmp_path / "out.safetensors"
    assert run("quantize", shared_models / name, "--mode", "eightbit", "-o", out).code == 0
    ours = {t.name: t.array for t in shrink.load(out).tensors}
    assert out.stat().st_size <= sum(map(len, encoded.values()))
    assert sqnr_db(original, ours) > sqnr_db(original, theirs)


def test_a_folder_that_webdnn_coded_gets_smaller_and_loses_nothing(shared_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(shared_models / "squeezenet-webdnn", folder)
    assert run("quantize", folder, "--mode", "eightbit").code == 0
    before, after = (d / "weight_webassembly.bin" for d in (folder, tmp_path / "model.eightbit"))
    assert after.stat().st_size < before.stat().st_size
    original = {t.name: t.array for t in shrink.load(folder).tensors}
    assert sqnr_db(original, {t.name: t.array for t in shrink.load(tmp_path / "model.eightbit").tensors}) == math.inf
