"""`shrink quantize --mode calibrated`: bounds are met or nothing is written, and what it says is true."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import shrink
from shrink.calibrate.calibrated import parted
from shrink.calibrate.folding import fold
from shrink.calibrate.layers import layers
from shrink.calibrate.running import Graph
from shrink.export import Network
from shrink.metrics import peak_of
from tests.command import Outcome, run
from tests.zoo import NETWORKS, ZooNetwork

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402

Array = NDArray[Any]

ZOO = {zoo.name: zoo for zoo in NETWORKS}
DENSE, RESIDUAL = ZOO["dense"], ZOO["residual"]
MODELS = Path(__file__).parents[1] / "benchmarks" / "models"
has_chainer = pytest.mark.skipif(importlib.util.find_spec("chainer") is None, reason="Chainer is not installed")


def samples(zoo: ZooNetwork, folder: Path, count: int = 64) -> Path:
    path = folder / "samples.npz"
    np.savez(path, zoo.calibration[:count])
    return path


def calibrate(zoo: ZooNetwork, folder: Path, *more: object, count: int = 64) -> tuple[Outcome, Path]:
    output = folder / f"{zoo.name}.safetensors"
    arguments = ("--mode", "calibrated", "--calibrate", samples(zoo, folder, count), "-o", output, *more)
    return run("quantize", zoo.path, *arguments), output


def with_values_of(zoo: ZooNetwork, output: Path) -> Path:
    """The network as ONNX with the values of the written file."""
    proto = onnx.load(zoo.path)
    arrays = {tensor.name: tensor.array for tensor in shrink.load(output).tensors}
    assert set(arrays) <= {slot.name for slot in proto.graph.initializer}
    for slot in proto.graph.initializer:
        if slot.name in arrays:
            values = arrays[slot.name].astype(numpy_helper.to_array(slot).dtype).reshape(slot.dims)
            slot.CopyFrom(numpy_helper.from_array(values, slot.name))
    path = output.with_suffix(".decoded.onnx")
    path.write_bytes(proto.SerializeToString())
    return path


def folded(zoo: ZooNetwork) -> dict[str, Array]:
    """The values before they are rounded: what errors are measured against."""
    model = shrink.load(zoo.path)
    found = layers(model)
    graph = Graph(Network("", model, ((1, *zoo.calibration.shape[1:]),)), found)
    fold(graph, found, frozenset())
    return graph.weights


def psnr(zoo: ZooNetwork, output: Path, inputs: Array) -> float:
    original, other = zoo.outputs(inputs), zoo.outputs(inputs, with_values_of(zoo, output))
    return float(10 * np.log10(peak_of(original) ** 2 / np.mean(np.square(original.astype("f8") - other))))


def result(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert isinstance(found, dict)
    return found


def check_refused(outcome: Outcome, code: int, output: Path, *words: str) -> None:
    """One line, and nothing written, not even for a moment."""
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.stderr
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("shrink: error: ")
    for word in words:
        assert word in lines[0]
    assert not output.exists()


def held_out(zoo: ZooNetwork, count: int) -> NDArray[np.float32]:
    """Those of the first `count` samples that are measured on."""
    return np.stack([sample["x"] for sample in parted([{"x": x} for x in zoo.calibration[:count]], 0)[0]])


@pytest.mark.parametrize("name", ["dense", "residual"])
def test_the_psnr_is_kept_on_inputs_that_were_held_out(name: str, tmp_path: Path) -> None:
    """And it is what one measures oneself, with the written file and nothing of ours."""
    zoo = ZOO[name]
    outcome, output = calibrate(zoo, tmp_path, "--min-psnr", 42, "--json", count=24)
    said = result(outcome)
    measured = psnr(zoo, output, held_out(zoo, 24))
    assert said["psnr_db"] == pytest.approx(measured, abs=0.02)
    assert 42 <= said["psnr_db"] < 45
    assert said["worst_psnr_db"] <= said["mean_psnr_db"]
    assert said["calibration"] == {
        "source": "samples.npz",
        "samples": 24,
        "held_out": 6,
        "fitted": 18,
        "fitted_added": 16 if name == "residual" else 0,
    }
    # What calibration never saw at all is not much worse.
    assert psnr(zoo, output, zoo.evaluation[:64]) > 35
    assert said["output_bytes"] == output.stat().st_size < zoo.path.stat().st_size / 3


def test_json_tells_everything(tmp_path: Path) -> None:
    outcome, output = calibrate(RESIDUAL, tmp_path, "--step", 0.02, "--json", count=8)
    said = result(outcome)
    model = {tensor.name: tensor for tensor in shrink.load(RESIDUAL.path).tensors}
    assert said["step"] == 0.02
    assert said["passes"] == 1
    assert 0 < said["cosine"] <= 1
    tensors = {tensor["name"]: tensor for tensor in said["tensors"]}
    assert set(tensors) == set(model)
    rows = {layer["tensor"]: layer for layer in said["layers"]}
    assert set(rows) == {name for name, tensor in tensors.items() if tensor["mode"] == "calibrated"}
    assert {tensor["mode"] for tensor in tensors.values()} == {"calibrated", "bias", "constant"}
    for name, layer in rows.items():
        assert layer["shape"] == list(model[name].shape)
        assert layer["bits_per_weight"] == pytest.approx(8 * layer["size_bytes"] / model[name].size)
        assert layer["step"] > 0
        assert layer["sensitivity"] > 0
    read = {tensor.name: tensor.array for tensor in shrink.load(output).tensors}
    before = folded(RESIDUAL)
    for name, tensor in tensors.items():
        error = np.abs(read[name].astype("f8") - before[name]).max()
        assert error == pytest.approx(tensor["max_error"], rel=1e-6)
        assert (error == 0) == (tensor["mode"] == "constant")


def test_compare_says_that_numbers_were_moved(tmp_path: Path) -> None:
    _, output = calibrate(RESIDUAL, tmp_path, "--step", 0.02, count=8)
    told = "18 tensors are constant now: calibration moved the numbers into others."
    assert told in run("compare", RESIDUAL.path, output).stdout
    shrink.save(shrink.load(output), tmp_path / "again.safetensors")
    assert "constant now" not in run("compare", output, tmp_path / "again.safetensors").stdout


def test_it_says_when_other_pictures_do_worse(tmp_path: Path) -> None:
    """Calibrated on pictures that hardly vary, and used on others: the number is that of the synthetic pictures."""
    zoo = ZOO["upscaler"]
    flat = np.linspace(0.2, 0.8, 24, dtype="f4").reshape(-1, 1, 1, 1) + np.zeros((1, *zoo.calibration.shape[1:]), "f4")
    np.savez(tmp_path / "flat.npz", flat + np.linspace(0, 0.01, flat.shape[-1], dtype="f4"))
    line = ("--mode", "calibrated", "--calibrate", tmp_path / "flat.npz", "--step", 0.02)
    said = result(run("quantize", zoo.path, *line, "-o", tmp_path / "a.safetensors", "--json"))
    assert said["synthetic_psnr_db"] < said["psnr_db"] - 3
    outcome = run("quantize", zoo.path, *line, "-o", tmp_path / "b.safetensors")
    assert f"On synthetic pictures it keeps {said['synthetic_psnr_db']:.2f} dB only" in outcome.stdout
    alike = result(
        run("quantize", zoo.path, "--mode", "calibrated", "--step", 0.02, "-o", tmp_path / "c.safetensors", "--json")
    )
    assert alike["synthetic_psnr_db"] is None


def test_a_network_that_writes_adds_texts_to_few(tmp_path: Path) -> None:
    outcome, _ = calibrate(ZOO["lstm"], tmp_path, "--input", "1,32", "--step", 0.05, count=8)
    assert "Calibrated on 6 samples and 32 texts of its own, measured on 2 others (samples.npz)." in outcome.stdout


def test_the_size_is_kept_and_used(tmp_path: Path) -> None:
    outcome, output = calibrate(RESIDUAL, tmp_path, "--max-mb", 0.013, "--json", count=16)
    said = result(outcome)
    assert 12_500 < output.stat().st_size <= 13_000
    assert said["psnr_db"] == pytest.approx(psnr(RESIDUAL, output, held_out(RESIDUAL, 16)), abs=0.02)
    assert said["psnr_db"] > 38


def test_both_bounds(tmp_path: Path) -> None:
    outcome, output = calibrate(DENSE, tmp_path, "--min-psnr", 30, "--max-mb", 0.02, "--json")
    assert result(outcome)["psnr_db"] >= 30
    assert output.stat().st_size <= 20_000


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--min-psnr", 150], ("no step keeps 150 dB", "the closest came to ", " dB")),
        (["--max-mb", 0.001], ("the smallest that calibration makes of it is ", " bytes, over 1,000")),
        (["--min-psnr", 60, "--max-mb", 0.004], ("60 dB take ", " bytes, over 4,000")),
    ],
)
def test_a_bound_that_cannot_be_met(asked: list[object], words: tuple[str, ...], tmp_path: Path) -> None:
    outcome, output = calibrate(DENSE, tmp_path, *asked, count=8)
    check_refused(outcome, 4, output, *words)


def test_an_old_output_survives_a_bound_that_is_not_met(tmp_path: Path) -> None:
    (tmp_path / "dense.safetensors").write_text("precious")
    outcome, output = calibrate(DENSE, tmp_path, "--min-psnr", 150, "--force", count=8)
    assert outcome.code == 4
    assert output.read_text() == "precious"
    outcome, output = calibrate(DENSE, tmp_path, "--step", 0.1, count=8)
    assert (outcome.code, output.read_text()) == (2, "precious")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--mode calibrated", "wants to know how far it may go"),
        ("--mode calibrated --step 0.1 --min-psnr 40", "--step is one point"),
        ("--mode calibrated --step 0.1 --max-mb 1", "--step is one point"),
        ("--mode calibrated --step 0", "--step 0 is not above 0"),
        ("--mode calibrated --step 1.5", "--step 1.5 is not above 0 and at most 1"),
        ("--mode calibrated --step nan", "--step nan is not above 0"),
        ("--mode calibrated --min-psnr -3", "--min-psnr -3 is not above 0"),
        ("--mode calibrated --min-psnr 151", "--min-psnr 151 is not above 0 and at most 150"),
        ("--mode calibrated --min-psnr nan", "--min-psnr nan is not"),
        ("--mode calibrated --max-mb 0", "--max-mb 0 is not above 0"),
        ("--mode calibrated --max-mb inf", "--max-mb inf is not above 0"),
        ("--mode calibrated --max-mb x", "--max-mb"),
        ("--mode calibrated --step 0.1 --block 8", "mode calibrated takes no --block"),
        ("--mode calibrated --step 0.1 --sparsity 0.5", "mode calibrated takes no --sparsity"),
        ("--mode calibrated --step 0.1 --recipe no.toml", "mode calibrated takes no --recipe"),
        ("--mode calibrated,int8 --step 0.1", "belong to --mode calibrated"),
        ("--mode int8 --min-psnr 40", "belong to --mode calibrated"),
        ("--mode int8 --samples 3", "belong to --mode calibrated"),
        ("--mode int8 --network a.py:B", "belong to --mode calibrated"),
        ("--mode calibrated --step 0.1 --samples 0", "--samples"),
        ("--mode calibrated --step 0.1 --seed -1", "--seed"),
        ("--mode calibrated --step 0.1 --effort 3", "--effort"),
        ("--mode calibrated --step 0.1 --exclude *", "no tensor is left to quantize"),
        ("--mode calibrated --step 0.1 --exclude nothing", "nothing"),
        ("--mode calibrated --step 0.1 --input 3,3", "--input 3,3 does not fit"),
        ("--mode calibrated --step 0.1 --network what", "does not name a network"),
        ("--mode calibrated --step 0.1 --input-distribution what", "what"),
    ],
)
def test_what_makes_no_sense(arguments: str, words: str, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    check_refused(run("quantize", DENSE.path, *arguments.split(), "-o", output), 2, output, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.onnx", "a.npz"])
def test_formats_that_cannot_hold_it(name: str, tmp_path: Path) -> None:
    output = tmp_path / name
    outcome = run("quantize", DENSE.path, "--mode", "calibrated", "--step", 0.1, "-o", output)
    check_refused(outcome, 2, output, "cannot hold calibrated weights")


def test_weights_alone_have_no_graph(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"l/W": np.ones((20, 20), "f4")}
    np.savez(tmp_path / "gen.npz", **arrays)
    output = tmp_path / "a.safetensors"
    outcome = run("quantize", tmp_path / "gen.npz", "--mode", "calibrated", "--step", 0.1, "-o", output)
    check_refused(outcome, 2, output, "graph")


def weights_of(zoo: ZooNetwork) -> dict[str, Array]:
    return {tensor.name: tensor.array for tensor in shrink.load(zoo.path).tensors}


def test_only_what_is_wanted_changes(tmp_path: Path) -> None:
    before = weights_of(RESIDUAL)
    every = [name for name, array in before.items() if array.ndim > 1 and array.size >= 256]
    one = every[1]
    for flags, wanted in ((("--include", one), {one}), (("--exclude", one), set(every) - {one})):
        outcome, output = calibrate(RESIDUAL, tmp_path, "--step", 0.02, "--force", "--json", *flags, count=6)
        said = result(outcome)
        modes = {tensor["name"]: tensor["mode"] for tensor in said["tensors"]}
        assert {name for name, mode in modes.items() if mode == "calibrated"} <= wanted | set(before)
        assert {layer["tensor"] for layer in said["layers"]} == {n for n, mode in modes.items() if mode == "calibrated"}
        after = {tensor.name: tensor.array for tensor in shrink.load(output).tensors}
        for name, array in before.items():
            if modes[name] == "kept":
                np.testing.assert_array_equal(after[name], array)
        assert modes[one] == ("calibrated" if one in wanted else "kept")
        assert all(modes[name] == ("calibrated" if name in wanted else "kept") for name in every)


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    """With inputs that are made up: from the seed."""
    files = []
    for number, seed in enumerate((3, 3, 4)):
        output = tmp_path / f"{number}.safetensors"
        arguments = ("--mode", "calibrated", "--step", 0.05, "--samples", 6, "--seed", seed, "-o", output)
        outcome = run("quantize", RESIDUAL.path, *arguments)
        assert outcome.code == 0, outcome.stderr
        assert "made up" in outcome.stdout
        files.append(output.read_bytes())
    assert files[0] == files[1] != files[2]


def test_one_sample_is_told_to_be_little(tmp_path: Path) -> None:
    outcome, output = calibrate(RESIDUAL, tmp_path, "--step", 0.02, count=1)
    assert outcome.code == 0, outcome.stderr
    assert "Calibrated and measured on one sample (samples.npz)" in outcome.stdout
    assert all(np.isfinite(tensor.array).all() for tensor in shrink.load(output).tensors)


def test_the_table_says_what_it_did(tmp_path: Path) -> None:
    outcome, output = calibrate(DENSE, tmp_path, "--step", 0.02, count=8)
    assert outcome.code == 0, outcome.stderr
    assert "step 0.02, found in 1 pass." in outcome.stdout
    assert "Calibrated on 6 samples, measured on 2 others (samples.npz)." in outcome.stdout
    assert "made up" not in outcome.stdout
    assert "took over the mean error" in outcome.stdout
    assert f"Written: {output}" in outcome.stdout


def test_the_output_goes_beside_the_model(tmp_path: Path) -> None:
    model = tmp_path / "my net.onnx"
    model.write_bytes(DENSE.path.read_bytes())
    outcome = run("quantize", model, "--mode", "calibrated", "--step", 0.1, "--samples", 4)
    assert outcome.code == 0, outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my net.calibrated.safetensors", "my net.onnx"]


def test_an_open_shape_is_asked_for_and_taken(tmp_path: Path) -> None:
    lstm = ZOO["lstm"]
    outcome, output = calibrate(lstm, tmp_path, "--step", 0.05, count=4)
    check_refused(outcome, 2, output, "leaves the shape of its input tokens open", "--input tokens=")
    outcome, output = calibrate(lstm, tmp_path, "--step", 0.05, "--input", "tokens=1,32", "--json", count=4)
    assert result(outcome)["psnr_db"] > 15
    assert output.exists()


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    proto = onnx.load(DENSE.path)
    slot = max(proto.graph.initializer, key=lambda s: int(np.prod(s.dims)))
    array = numpy_helper.to_array(slot).copy()
    array.reshape(-1)[7] = np.nan
    slot.CopyFrom(numpy_helper.from_array(array, slot.name))
    path, output = tmp_path / "bad.onnx", tmp_path / "a.safetensors"
    path.write_bytes(proto.SerializeToString())
    outcome = run("quantize", path, "--mode", "calibrated", "--step", 0.1, "-o", output)
    check_refused(outcome, 3, output, str(path), slot.name, "not finite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.onnx"]


def test_a_damaged_graph(tmp_path: Path) -> None:
    proto = onnx.load(DENSE.path)
    proto.graph.node[0].op_type = "NoSuchOperator"
    path, output = tmp_path / "bad.onnx", tmp_path / "a.safetensors"
    path.write_bytes(proto.SerializeToString())
    outcome = run("quantize", path, "--mode", "calibrated", "--step", 0.1, "-o", output)
    check_refused(outcome, 3, output, str(path), "NoSuchOperator")


def test_samples_of_another_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", np.ones((4, 3), "f4"))
    output = tmp_path / "a.safetensors"
    arguments = ("--mode", "calibrated", "--step", 0.1, "--calibrate", tmp_path / "s.npz", "-o", output)
    outcome = run("quantize", DENSE.path, *arguments)
    assert outcome.code in (2, 3)
    check_refused(outcome, outcome.code, output, "s.npz")


def test_a_transformer_says_which_weights_are_in_no_layer(tmp_path: Path) -> None:
    """A table that is added to the inputs has no linear layer: it is quantized by its sensitivity alone."""
    table = np.random.default_rng(0).standard_normal((20, 20)).astype("f4")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "table"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [20, 20])],
        [helper.make_tensor_value_info("y", 1, [20, 20])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(table[::-1].copy(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path, output = tmp_path / "m.onnx", tmp_path / "a.safetensors"
    path.write_bytes(model.SerializeToString())
    arguments = ("--mode", "calibrated", "--step", 0.01, "--samples", 4, "-o", output, "--json")
    # Few weights are kept in ONNX: these are asked for.
    said = result(run("quantize", path, *arguments, "--include", "table", "--include", "w"))
    notes = {tensor["name"]: tensor["note"] for tensor in said["tensors"]}
    assert notes == {"table": "by sensitivity alone: the graph does not use it as a linear layer", "w": ""}


@has_chainer
def test_a_chainer_snapshot_without_input(tmp_path: Path) -> None:
    """The network tells its input, and what a trainer keeps besides is dropped, with the prefix of its names."""
    weights, network = MODELS / "cdcgan.npz", f"{MODELS / 'networks.py'}:Generator"
    outputs = []
    with np.load(weights) as file:
        arrays = dict(file)
    snapshot: dict[str, Any] = {f"updater/model:main/{name}": array for name, array in arrays.items()}
    snapshot["updater/iteration"] = np.array(3)
    np.savez(tmp_path / "snapshot.npz", **snapshot)
    for number, model in enumerate((weights, tmp_path / "snapshot.npz")):
        output = tmp_path / f"{number}.safetensors"
        arguments = (
            "--mode",
            "calibrated",
            "--step",
            0.05,
            "--samples",
            4,
            "--network",
            network,
        )
        outcome = run("quantize", model, *arguments, "-o", output, "--json")
        said = result(outcome)
        assert said["psnr_db"] > 25
        assert {tensor["mode"] for tensor in said["tensors"]} == {"calibrated", "bias", "float16", "kept"}
        outputs.append({tensor.name: tensor.array for tensor in shrink.load(output).tensors})
    assert set(outputs[0]) == set(outputs[1]) == set(arrays)
    for name in arrays:
        np.testing.assert_array_equal(outputs[0][name], outputs[1][name])
