"""What the command writes for Chainer, loaded by Chainer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
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


PREFIX = "updater/model:main/"
WEIGHTS: dict[str, Any] = {"c1/W": np.ones((40, 30), "f4"), "c2/W": np.full((40, 30), 2, "f4")}


def trainer_snapshot(folder: Path, suffix: str, *models: str) -> Path:
    path = folder / f"snapshot{suffix}"
    arrays = {f"updater/model:{model}/{name}": values for model in models for name, values in WEIGHTS.items()}
    arrays |= {"updater/iteration": np.array(7), "updater/optimizer:main/c1/W/m": np.ones((40, 30), "f4")}
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, values in arrays.items():
                file[name] = values
    return path


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("glob", ["c1/W", f"{PREFIX}c1/W", "updater/model:*/c1/*", "c1*", "*main/c1*"])
def test_rules_know_both_names_of_a_trainer_snapshot(glob: str, suffix: str, tmp_path: Path) -> None:
    source, out, recipe = trainer_snapshot(tmp_path, suffix, "main"), tmp_path / "out.npz", tmp_path / "recipe.toml"
    recipe.write_text(f'mode = "float16"\n[[rule]]\ntensors = "{glob}"\nmode = "keep"\n')
    half, whole = np.dtype("f2"), np.dtype("f4")
    cases: list[tuple[list[object], Any, Any]] = [
        (["--mode", "float16", "--exclude", glob], whole, half),
        (["--mode", "float16", "--include", glob], half, whole),
        (["--recipe", recipe], whole, half),
    ]
    for given, first, second in cases:
        for more, prefix in [([], ""), (["--keep-all"], PREFIX)]:
            done = run("quantize", source, *given, *more, "--force", "-o", out)
            assert done.code == 0, done.stderr
            written = shrink.load(out)
            assert (written[f"{prefix}c1/W"].dtype, written[f"{prefix}c2/W"].dtype) == (first, second)


@pytest.mark.parametrize(
    ("models", "glob"),
    [
        (["main"], "updater/model:other/c1/W"),
        (["main"], "updater/optimizer:main/c1/W/m"),
        # With several models no name is short: which of them would it mean?
        (["gen", "dis"], "c1/W"),
    ],
)
def test_names_that_a_trainer_snapshot_has_not(models: list[str], glob: str, tmp_path: Path) -> None:
    source = trainer_snapshot(tmp_path, ".npz", *models)
    done = run("quantize", source, "--mode", "float16", "--exclude", glob, "-o", tmp_path / "out.npz")
    assert done.code == 2
    assert "fits no tensor" in done.stderr


def test_an_ordinary_snapshot_has_no_long_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "gen.npz", **WEIGHTS)
    rule = ["--exclude", "*main/c1*"]
    done = run("quantize", tmp_path / "gen.npz", "--mode", "float16", *rule, "-o", tmp_path / "out.npz")
    assert done.code == 2
