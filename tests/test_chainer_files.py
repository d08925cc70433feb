"""What the command writes for Chainer, loaded by Chainer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shrink
from shrink.networks import chainer as networks
from shrink.networks.legacy import import_chainer
from tests.command import run

MODELS = Path(__file__).parents[1] / "benchmarks" / "models"


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("way", ["float16", "prune", "restored"])
def test_chainer_loads_what_the_command_writes(way: str, suffix: str, tmp_path: Path) -> None:
    out, snapshot = tmp_path / f"out{suffix}", MODELS / "cdcgan.npz"
    if way == "restored":
        small = tmp_path / "small.safetensors"
        assert run("quantize", snapshot, "--mode", "eightbit", "-o", small).code == 0
        assert run("restore", small, "-o", out).code == 0
    else:
        assert run("quantize", snapshot, "--mode", way, "-o", out).code == 0
    serializers = import_chainer().serializers
    network = networks.load(f"{MODELS / 'networks.py'}:Generator", shrink.load(snapshot))
    parameters(network)["/l0/W"].array[...] = 0
    (serializers.load_npz if suffix == ".npz" else serializers.load_hdf5)(out, network)
    written = shrink.load(out)
    for name, parameter in parameters(network).items():
        assert parameter.array.dtype == np.float32
        assert np.array_equal(parameter.array, written[name[1:]].array.astype("f4")), name
    assert network.bn1.avg_var.min() > 0


def parameters(network: Any) -> dict[str, Any]:
    return dict(network.namedparams())
