"""`shrink curve`: what is measured, against files and outputs that come about without it, and the command."""

from __future__ import annotations

import itertools
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink import given as arguments
from shrink.bench import curve
from shrink.bench.curve import CALIBRATED, MODES, Plan, checked, measure, steps_around
from shrink.bench.curve_page import share_at
from shrink.calibrate.calibrated import parted
from shrink.calibrate.inputs import Calibration, inputs_of
from shrink.cli_calibrate import Calibrating, calibration_of, is_made_up
from shrink.errors import BadInput, OutputError, UsageError
from shrink.metrics import peak_of
from tests import zoo
from tests.command import Outcome, run
from tests.pages import needs_chainer

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
pytest.importorskip("wasmtime", reason="wasmtime is not installed")

Document = dict[str, Any]

DENSE = zoo.NETWORKS[0]


@pytest.fixture(scope="module")
def plan() -> Plan:
    network, _ = arguments.network(str(DENSE.path), None, ("1,64",))
    samples = tuple({"input": x[None]} for x in DENSE.calibration)
    return Plan(network, Calibration(samples, "digits"), command="shrink curve dense.onnx")


@pytest.fixture(scope="module")
def few(plan: Plan) -> Plan:
    """Where it is not the numbers that count."""
    return replace(plan, calibration=Calibration(plan.calibration.samples[:16], "digits"), modes=("int8",), points=2)


@pytest.fixture(scope="module")
def document(plan: Plan) -> Document:
    return measure(plan)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "digits.npz"
    np.savez(path, input=DENSE.calibration)
    return path


def named(document: Document, mode: str) -> Document:
    return next(point for point in document["points"] if point["mode"] == mode)


def calibrated(document: Document) -> list[Document]:
    return [point for point in document["points"] if point["mode"] == CALIBRATED]


# --- What is measured ------------------------------------------------------------------------------------------


def test_every_mode_and_a_calibrated_curve(document: Document) -> None:
    assert [point["mode"] for point in document["points"]] == ["float32", *MODES, *[CALIBRATED] * curve.POINTS]
    assert document["partial"] is False
    assert document["not_measured"] == []
    assert document["model"] == {
        "file": "dense.onnx",
        "weights": 50_826,
        "outputs": [{"name": "output", "shape": [1, 10], "kind": "classes", "peak": pytest.approx(28.90, abs=0.01)}],
    }
    assert document["calibration"] == {
        "source": "digits",
        "made_up": False,
        "samples": 64,
        "held_out": 16,
        "unseen": True,
        "seed": 0,
        "effort": 1,
    }
    # What was measured is what can be read back, and nothing is lost by that.
    assert checked(json.loads(curve.as_bytes(document))) == checked(document)


def test_the_original_is_exact_and_what_all_others_are_a_share_of(document: Document) -> None:
    first = document["points"][0]
    assert first["exact"] is True
    assert first["psnr_db"] is first["worst_psnr_db"] is None
    assert first["share"] == 1
    assert 4 * 50_826 < first["size_bytes"] < 4 * 50_826 + 4000
    for point in document["points"][1:]:
        assert point["share"] == point["size_bytes"] / first["size_bytes"]
        assert point["worst_psnr_db"] <= point["psnr_db"] <= point["mean_psnr_db"]


@pytest.mark.parametrize("mode", ["int8", "eightbit", "prune,int8"])
def test_sizes_and_outputs_are_those_of_the_file_that_quantize_writes(
    document: Document, tmp_path: Path, mode: str
) -> None:
    small, plain = tmp_path / "small.safetensors", tmp_path / "plain.onnx"
    assert run("quantize", DENSE.path, "--mode", mode, "-o", small).code == 0
    assert run("restore", small, "-o", plain).code == 0
    point = named(document, mode)
    assert point["size_bytes"] == small.stat().st_size
    held_out = np.concatenate([sample["x"] for sample in parted([{"x": x[None]} for x in DENSE.calibration], 0)[0]])
    before, after = DENSE.outputs(held_out), DENSE.outputs(held_out, plain)
    error = np.mean((before.astype("f8") - after) ** 2, axis=1) / peak_of(before) ** 2
    assert point["psnr_db"] == pytest.approx(-10 * math.log10(error.mean()), abs=0.01)
    assert point["worst_psnr_db"] == pytest.approx(-10 * math.log10(error.max()), abs=0.01)


def test_the_curve_goes_from_fine_to_coarse(document: Document) -> None:
    points = calibrated(document)
    steps, sizes, figures = ([p[key] for p in points] for key in ("step", "size_bytes", "psnr_db"))
    assert steps == sorted(steps)
    assert sizes == sorted(sizes, reverse=True)
    assert figures == sorted(figures, reverse=True)
    assert 60 < figures[0] < 75
    assert 15 < figures[-1] < 32
    ratios = [b / a for a, b in itertools.pairwise(steps)]
    assert max(ratios) / min(ratios) < 1.02


def test_calibrated_is_smaller_than_int8_where_it_is_as_accurate(document: Document) -> None:
    for mode in ("int8", "eightbit"):
        other = named(document, mode)
        # The measured steps may end a little short of it.
        share = share_at(document, min(other["psnr_db"], max(p["psnr_db"] for p in calibrated(document))))
        assert share is not None
        assert share < other["share"]


def test_every_tensor_has_its_place_in_the_table_of_a_point(plan: Plan, document: Document) -> None:
    for point in calibrated(document):
        layers, kept = point["layers"], point["kept"]
        names = [entry["tensor"] for entry in (*layers, *kept)]
        assert sorted(names) == sorted(entry.name for entry in plan.network.model.tensors)
        assert [layer["tensor"] for layer in layers] == ["l1/W", "l2/W", "l3/W"]
        for layer in layers:
            weights = math.prod(layer["shape"])
            assert layer["bits_per_weight"] == pytest.approx(8 * layer["size_bytes"] / weights)
            assert layer["sensitivity"] > 0
            assert layer["step"] > 0
        assert all(entry["reason"] for entry in kept)
        # The rest is the graph and the header.
        rest = point["size_bytes"] - sum(entry["size_bytes"] for entry in (*layers, *kept))
        assert 0 < rest < 4000


def test_the_same_plan_gives_the_same_document(few: Plan) -> None:
    assert curve.as_bytes(measure(few)) == curve.as_bytes(measure(few))


def test_a_document_is_heard_of_after_every_point(few: Plan) -> None:
    heard: list[int] = []

    def hear(document: Document) -> None:
        assert document["partial"] is True
        assert checked(json.loads(curve.as_bytes(document)))["points"]
        heard.append(len(document["points"]))
        if heard[-1] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(replace(few, modes=("int8", "int4"), points=9), hear)
    assert heard == [1, 2, 3, 4]


def test_progress_goes_on_to_its_end(few: Plan) -> None:
    heard: list[tuple[str, int, int]] = []
    found = measure(few, progress=lambda name, done, total: heard.append((name, done, total)))
    assert {total for _, _, total in heard} == {heard[0][2]}
    assert heard[-1][1] == heard[-1][2]
    names = " ".join(name for name, _, _ in heard)
    assert "int8" in names
    assert all(f"step {point['step']:g}: l2/W" in names for point in calibrated(found))
    during = [done for name, done, _ in heard if not name.startswith("original")]
    assert during == sorted(during)


def test_one_sample_is_calibrated_on_and_measured_on() -> None:
    upscaler = next(network for network in zoo.NETWORKS if network.name == "upscaler")
    sample = upscaler.calibration[:1]
    network, _ = arguments.network(str(upscaler.path), None, (",".join(map(str, sample.shape)),))
    single = Calibration(({inputs_of(network)[0].name: sample},), "one picture")
    found = measure(Plan(network, single, modes=(), points=2))
    assert found["calibration"]["unseen"] is False
    assert found["calibration"]["held_out"] == found["calibration"]["samples"] == 1
    assert all(point["psnr_db"] > 10 for point in calibrated(found))


def test_what_a_mode_cannot_store_is_named(tmp_path: Path) -> None:
    """A graph that cuts off at infinity: to quantize, a constant that is not finite is a broken one."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(1)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["h"]), helper.make_node("Min", ["h", "limits"], ["y"])],
        "network",
        [value("x", TensorProto.FLOAT, [1, 64])],
        [value("y", TensorProto.FLOAT, [1, 32])],
        [
            numpy_helper.from_array(rng.standard_normal((64, 32)).astype("f4"), "W"),
            numpy_helper.from_array(np.full(32, np.inf, "f4"), "limits"),
        ],
    )
    path = tmp_path / "cut.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    network, _ = arguments.network(str(path), None, ())
    found = measure(Plan(network, calibration_of(network, Calibrating(samples=8)), modes=("int8",), points=2))
    assert [entry["what"] for entry in found["not_measured"]] == ["int8"]
    assert "are infinite" in found["not_measured"][0]["why"]
    assert len(calibrated(found)) == 2


@given(
    st.floats(1e-6, 1.0),
    st.one_of(st.none(), st.floats(-20, 150), st.just(math.inf)),
    st.integers(2, 40),
)
def test_steps_are_a_geometric_progression_through_the_first(first: float, psnr: float | None, points: int) -> None:
    steps = steps_around(first, psnr, points)
    assert len(steps) == points
    assert steps == sorted(steps)
    assert steps[-1] / steps[0] == pytest.approx(100, rel=0.02)
    assert min(abs(step / first - 1) for step in steps) < 0.006
    if psnr is not None and 25 <= psnr <= 65:
        # As far as 6 dB for each doubling go, they end at 65 and 25 dB, give or take half of what lies between two.
        half = 20 / (points - 1) + 0.1
        assert psnr + 20 * math.log10(first / steps[0]) == pytest.approx(65, abs=half)
        assert psnr + 20 * math.log10(first / steps[-1]) == pytest.approx(25, abs=half)


# --- Documents from anywhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shrink_curve": 2}, "another version"),
        ({"shrink_curve": True}, "another version"),
        ({"title": 5}, "title is not text"),
        ({"points": {}}, "points is not a list"),
        ({"points": [{}]}, "points[0].mode is missing"),
        ({"points": [{"mode": "a", "label": "a", "size_bytes": -1}]}, "size_bytes is not a count"),
        ({"points": [{"mode": "a", "label": "a", "size_bytes": 1, "share": 0}]}, "share is below"),
        ({"model": None}, "model is not an object"),
        ({"calibration": {}}, "calibration.source is missing"),
    ],
)
def test_malformed_documents(document: Document, change: Document, words: str) -> None:
    with pytest.raises(BadInput) as caught:
        checked({**document, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "{}", "[]", '{"shrink_bench": 1}', '{"shrink_curve": 1}', "\xff"])
def test_what_is_no_document_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput) as caught:
        curve.read(path)
    assert caught.value.file == path
    with pytest.raises(OutputError):
        curve.read(tmp_path / "missing.json")


# --- Options of calibration ------------------------------------------------------------------------------------


def test_samples_of_an_embedding_are_tokens_that_it_has() -> None:
    lstm = next(network for network in zoo.NETWORKS if network.name == "lstm")
    network, _ = arguments.network(str(lstm.path), None, (",".join(map(str, (1, *lstm.calibration.shape[1:]))),))
    found = calibration_of(network, Calibrating(samples=8))
    values = np.concatenate([next(iter(sample.values())).reshape(-1) for sample in found.samples])
    assert values.dtype == lstm.calibration.dtype
    assert values.min() >= 0
    assert values.max() > 1


def test_options_say_what_the_samples_are(samples: Path) -> None:
    network, _ = arguments.network(str(DENSE.path), None, ("1,64",))
    found = calibration_of(network, Calibrating(samples, samples=10))
    assert found.source == "10 of 64 samples in digits.npz"
    drawn = calibration_of(network, Calibrating(input_distribution="uniform:0:1", samples=3, seed=7))
    assert len(drawn.samples) == 3
    assert all(sample["input"].min() >= 0 and sample["input"].max() <= 1 for sample in drawn.samples)
    again = calibration_of(network, Calibrating(input_distribution="uniform:0:1", samples=3, seed=7))
    assert all(np.array_equal(a["input"], b["input"]) for a, b in zip(drawn.samples, again.samples, strict=True))
    assert not is_made_up(Calibrating(samples), found)
    assert not is_made_up(Calibrating(input_distribution="uniform:0:1"), drawn)
    assert is_made_up(Calibrating(), calibration_of(network, Calibrating(samples=2)))
    with pytest.raises(UsageError, match="not from both"):
        calibration_of(network, Calibrating(samples, input_distribution="normal"))
    with pytest.raises(UsageError, match="does not go up"):
        calibration_of(network, Calibrating(input_range="1,-1"))


# --- The command -----------------------------------------------------------------------------------------------

QUICK = ("--input", "1,64", "--modes", "int8,prune+int8", "--points", "2")


def fails(outcome: Outcome, code: int, *words: str) -> None:
    """One line that says why, on stderr alone."""
    assert outcome.code == code, outcome
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("shrink: error: ")
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


def test_a_page_and_its_data(samples: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    page = tmp_path / "c.html"
    outcome = run("curve", DENSE.path, "--calibrate", samples, *QUICK, "-o", page)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.html", "c.json"]
    found = curve.read(tmp_path / "c.json")
    assert [p["mode"] for p in found["points"]] == ["float32", "int8", "prune,int8", CALIBRATED, CALIBRATED]
    assert found["calibration"]["source"] == "digits.npz"
    assert found["command"].startswith(f"shrink curve {DENSE.path} --input 1,64 --calibrate {samples}")
    assert page.read_text().startswith("<!DOCTYPE html>")
    lines = [line.split() for line in outcome.stdout.splitlines()]
    for point in found["points"]:
        assert any(line[:1] == [point["mode"]] and f"{point['size_bytes']:,}" in line for line in lines)
    assert "Calibrated on 48 samples, measured on 16 others (digits.npz)." in outcome.stdout
    assert f"Written: {page}" in outcome.stdout
    before = page.read_bytes()
    fails(run("curve", DENSE.path, *QUICK, "-o", page), 2, "c.html: exists already", "--force")
    assert page.read_bytes() == before
    assert run("curve", DENSE.path, "--calibrate", samples, *QUICK, "-o", page, "--force").code == 0


def test_data_alone(samples: Path, tmp_path: Path) -> None:
    data = tmp_path / "c.json"
    outcome = run("curve", DENSE.path, "--calibrate", samples, *QUICK, "-o", data, "--json")
    assert outcome.code == 0, outcome.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    assert checked(json.loads(outcome.stdout)) == curve.read(data)


def test_json_without_a_file_writes_nothing(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(DENSE.path.read_bytes())
    given = ("--input-distribution", "uniform:0:1", "--samples", "8", "--seed", "3", "--effort", "0")
    outcome = run("curve", model, *QUICK, *given, "--json")
    assert outcome.code == 0, outcome.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    found = json.loads(outcome.stdout)
    asked = {"source": "uniform:0:1", "samples": 8, "held_out": 2, "unseen": True, "seed": 3, "effort": 0}
    assert found["calibration"] | asked == found["calibration"]


def test_it_goes_beside_the_model_unless_told(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    model = tmp_path / "m.onnx"
    model.write_bytes(DENSE.path.read_bytes())
    outcome = run("curve", model, *QUICK, "--samples", "8")
    assert outcome.code == 0, outcome.stderr
    assert "The inputs are made up." in outcome.stdout
    assert "The inputs are made up." in (tmp_path / "m.curve.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.curve.html", "m.curve.json", "m.onnx"]


def test_synthetic_pictures_are_made_up_even_where_they_are_asked_for() -> None:
    upscaler = next(network for network in zoo.NETWORKS if network.name == "upscaler")
    shape = ",".join(map(str, (1, *upscaler.calibration.shape[1:])))
    network, _ = arguments.network(str(upscaler.path), None, (shape,))
    for asked in (Calibrating(samples=2), Calibrating(input_distribution="pictures", samples=2)):
        assert is_made_up(asked, calibration_of(network, asked))


@needs_chainer
def test_a_chainer_network(tmp_path: Path) -> None:
    models = Path(zoo.FOLDER).parent
    network, weights = f"{models / 'networks.py'}:Generator", models / "cdcgan.npz"
    given = ("--weights", weights, "--input", "1,110", "--input-distribution", "normal,onehot:10", "--samples", "8")
    outcome = run("curve", network, *given, "--modes", "int8", "--points", "2", "-o", tmp_path / "gan.json")
    assert outcome.code == 0, outcome.stderr
    assert "As ONNX it differs from Chainer" in outcome.stdout
    found = curve.read(tmp_path / "gan.json")
    assert found["title"] == "Generator"
    assert found["model"]["outputs"][0]["kind"] == "image"
    assert {layer["kind"] for layer in calibrated(found)[0]["layers"]} == {"dense", "deconv"}


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        (["m.onnx", "--modes", "int8,"], 2, ["--modes", "empty name"]),
        (["m.onnx", "--modes", "sevenbit"], 2, ["sevenbit"]),
        (["m.onnx", "--modes", "int8,int8"], 2, ["twice"]),
        (["m.onnx", "--modes", "calibrated"], 2, ["calibrated"]),
        (["m.onnx", "--points", "1"], 2, ["--points"]),
        (["m.onnx", "--effort", "3"], 2, ["--effort"]),
        (["m.onnx", "--samples", "0"], 2, ["--samples"]),
        (["m.onnx", "--seed", "-1"], 2, ["--seed"]),
        (["m.onnx", "--weights", "w.npz"], 2, ["--weights"]),
        (["m.onnx", "--input-distribution", "gauss"], 2, ["gauss"]),
        (["m.onnx", "--input-range", "0,1"], 2, ["gets none"]),
        (["m.onnx", "--calibrate", "missing.npz"], 5, ["missing.npz"]),
        (["m.onnx", "--calibrate", "m.onnx"], 3, ["m.onnx"]),
        (["missing.onnx"], 5, ["missing.onnx"]),
        (["w.npz"], 2, ["w.npz", "only weights"]),
        (["m.onnx", "-o", "c.txt"], 2, ["c.txt", ".html"]),
        (["m.onnx", "-o", "m.onnx", "--force"], 2, ["m.onnx"]),
        (["m.onnx", "-o", "no/such/c.html"], 5, ["its folder does not exist"]),
    ],
)
def test_what_makes_no_sense_is_one_line_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], code: int, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.onnx").write_bytes(DENSE.path.read_bytes())
    np.savez(tmp_path / "w.npz", W=np.ones((20, 20), "f4"))
    fails(run("curve", *given, "--input", "1,64"), code, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "w.npz"]


def test_a_page_does_not_replace_an_input(tmp_path: Path, samples: Path) -> None:
    model = tmp_path / "m.html"
    model.write_bytes(DENSE.path.read_bytes())
    fails(run("curve", model, *QUICK, "-o", model, "--force"), 2, "that is the model itself")
    data = tmp_path / "x.json"
    data.write_bytes(samples.read_bytes())
    given = (*QUICK, "--calibrate", data, "-o", tmp_path / "x.html", "--force")
    fails(run("curve", model, *given), 2, "x.json: that is the model itself")
    assert data.read_bytes() == samples.read_bytes()


def test_nothing_to_quantize(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, numpy_helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "network",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.eye(4, dtype="f4"), "W")],
    )
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    fails(run("curve", path), 2, "tiny.onnx", "no weights that could be quantized")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.onnx"]


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed")
    page = tmp_path / "c.html"
    given = ["curve", DENSE.path, "--input", "1,64", "--modes", "int8", "--points", "100", "-o", page]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "shrink", *map(str, given)], stdout=subprocess.PIPE, stderr=theirs, text=True
    )
    os.close(theirs)
    try:
        # The first step names itself on the bar; at the second one the first is measured.
        shown, deadline = b"", time.monotonic() + 120
        while shown.count(b"step 0.") < 6 and time.monotonic() < deadline:
            ready, _, _ = select.select([ours], [], [], 0.5)
            shown += os.read(ours, 1 << 16) if ready else b""
        child.send_signal(signal.SIGINT)
        said, _ = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    assert child.returncode == 130, shown
    found = curve.read(tmp_path / "c.json")
    assert found["partial"] is True
    assert [p["mode"] for p in found["points"]][:2] == ["float32", "int8"]
    assert len(found["points"]) < 102
    assert "<strong>Partial.</strong>" in page.read_text()
    assert "Interrupted: this is what had been measured." in said
