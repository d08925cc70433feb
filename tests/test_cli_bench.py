"""`shrink bench` and `shrink report` as a user meets them: files, streams, exit codes, and what Ctrl-C leaves."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from shrink.bench import document, size, summary
from shrink.errors import MissingDependency, OutputError
from tests.command import Outcome, run
from tests.pages import PACKAGE, ROOT, chromium, needs_package

FIXTURE = ROOT / "tests" / "samples_bench" / "document.json"
RUNTIME = ("--runtime", PACKAGE)
QUICK = (*RUNTIME, "--runs", "2", "--seconds", "0", "--visits", "1", "--samples", "2")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 16 × 16 pixels out of 20 numbers."""
    rng = np.random.default_rng(3)
    value = helper.make_tensor_value_info
    shape = numpy_helper.from_array(np.array([1, 1, 16, 16]), "shape")
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["h"]),
            helper.make_node("Sigmoid", ["h"], ["s"]),
            helper.make_node("Reshape", ["s", "shape"], ["y"]),
        ],
        "network",
        [value("x", TensorProto.FLOAT, [1, 20])],
        [value("y", TensorProto.FLOAT, [1, 1, 16, 16])],
        [numpy_helper.from_array(rng.standard_normal((20, 256)).astype("f4"), "W"), shape],
    )
    path = tmp_path_factory.mktemp("network") / "gen.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def fails(outcome: Outcome, code: int, *words: str) -> None:
    """One line that says why, on stderr alone."""
    assert outcome.code == code, outcome
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("shrink: error: ")
    assert outcome.stderr.count("\n") == 1
    for word in words:
        assert word in outcome.stderr


# --- shrink bench ----------------------------------------------------------------------------------------------


@needs_package
def test_a_report_and_its_numbers(network: Path, tmp_path: Path) -> None:
    with chromium():
        pass
    page = tmp_path / "gen.html"
    outcome = run("bench", network, "--modes", "eightbit,prune+int8", "--backends", "wasm", *QUICK, "-o", page)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    found = document.read(tmp_path / "gen.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gen.html", "gen.json"]
    assert found["partial"] is False
    assert [v["name"] for v in found["variants"]] == ["float32", "eightbit", "prune+int8"]
    assert [v["mode"] for v in found["variants"]] == [None, "eightbit", "prune,int8"]
    assert found["inputs"] == {"source": "seeded", "count": 2, "labels": False}
    for variant in found["variants"]:
        assert variant["latency"]["wasm"]["problem"] is None
        assert len(variant["latency"]["wasm-1"]["warm"]["samples"]) == 2
        assert variant["accuracy"]["wasm"]["wrong"] is False
    assert f"shrink bench {network} --modes eightbit,prune+int8 --backends wasm" in found["command"]
    assert found["command"].endswith(f"--samples 2 -o {page}") or f"--output {page}" in found["command"]
    html = page.read_text()
    assert html.startswith("<!DOCTYPE html>")
    assert "prune+int8" in html
    # The table says what the numbers say.
    headers, rows = summary.table(found)
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert all([cell for text in row for cell in text.split()] in lines for row in rows)
    assert "worst PSNR dB" in headers
    assert outcome.stdout.count(": ship it") + outcome.stdout.count("do not ship") >= 1
    assert f"Written: {page}" in outcome.stdout
    assert "PSNR and SSIM: the peak is 1." in outcome.stdout
    assert "Not measured: webgpu: it was left out, with --backends" in outcome.stdout
    # The same network with any number of threads.
    assert [sorted(v["accuracy"]) for v in found["variants"]] == [["native", "wasm", "wasm-1"]] * 3


@needs_package
def test_variants_on_disk_data_and_json(network: Path, tmp_path: Path) -> None:
    small, data = tmp_path / "small.onnx", tmp_path / "x.npz"
    assert run("quantize", network, "--mode", "float16", "-o", small).code == 0
    np.savez(data, x=np.random.default_rng(0).standard_normal((3, 20)).astype("f4"))
    page = tmp_path / "r.html"
    given = ("bench", network, small, "--data", data, "--backends", "none", *RUNTIME, "-o", page)
    outcome = run(*given, "--json")
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["report"] == str(page)
    assert result["data"] == str(tmp_path / "r.json")
    assert result["partial"] is False
    assert result["psnr_peak"] == 1.0
    original, variant = result["variants"]
    assert [original["name"], variant["name"]] == ["float32", "small"]
    assert 50 < variant["psnr"] < 120
    assert 0 < variant["file-mb"] < original["file-mb"]
    assert set(summary.METRICS) <= set(variant)
    assert variant["warm-ms"] is None
    assert document.read(tmp_path / "r.json")["inputs"]["count"] == 3
    # Measured once: a second time asks first, and leaves what is there.
    before = page.read_bytes()
    fails(run(*given), 2, "r.html: exists already", "--force")
    assert page.read_bytes() == before
    assert run(*given, "--force").code == 0


@needs_package
def test_checks_that_fail_are_told_one_by_one_after_everything_is_written(network: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    limits = ("--fail-under", "psnr=200", "--fail-over", "file-mb=1", "--fail-over", "warm-ms=1000")
    outcome = run("bench", network, "--modes", "float16,int8", "--backends", "none", *RUNTIME, *limits, "-o", page)
    assert outcome.code == 4
    failed = outcome.stderr.splitlines()
    assert len(failed) == 4
    assert all(line.startswith("shrink: error: the check is not met: ") for line in failed)
    assert sum("psnr>=200" in line for line in failed) == 2
    # A bound on what was not measured does not hold.
    assert sum("warm-ms<=1000: not measured" in line for line in failed) == 2
    assert "met: float16 file-mb<=1: 0.0" in outcome.stdout
    checks = document.read(tmp_path / "r.json")["checks"]
    assert [check["met"] for check in checks] == [False, False, True, True, False, False]
    assert page.exists()


@needs_package
def test_checks_that_hold(network: Path, tmp_path: Path) -> None:
    limits = ("--fail-under", "psnr=20", "--fail-over", "file-mb=1")
    given = ("bench", network, "--modes", "int8", "--backends", "none", *RUNTIME, *limits)
    outcome = run(*given, "-o", tmp_path / "r.html")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""


@needs_package
def test_the_report_goes_beside_the_model_unless_told(network: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(network.read_bytes())
    assert run("bench", model, "--modes", "int8", "--backends", "none", *RUNTIME).code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bench.html", "m.bench.json", "m.onnx"]


@needs_package
def test_without_a_browser_the_rest_is_measured_and_the_reason_stands_there(network: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    outcome = run("bench", network, "--modes", "int8", *QUICK, "--chromium", tmp_path / "nowhere", "-o", page)
    assert outcome.code == 0, outcome.stderr
    found = document.read(tmp_path / "r.json")
    assert found["browser"] is None
    assert {"wasm", "wasm-1", "webgpu"} <= {entry["what"] for entry in found["not_measured"]}
    assert "there is no browser at" in outcome.stdout
    assert "there is no browser at" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--modes", "eightbit,"], 2, ["--modes", "empty name"]),
        (["--modes", "sevenbit"], 2, ["sevenbit"]),
        (["--modes", "int8,int8"], 2, ["twice"]),
        (["--backends", "webgl"], 2, ["webgl", "wasm, webgpu"]),
        (["--backends", "wasm,wasm"], 2, ["twice"]),
        (["--network", "5g"], 2, ["5g", "10mbit"]),
        (["--runs", "0"], 2, ["--runs"]),
        (["--runs", "100001"], 2, ["--runs"]),
        (["--fail-under", "psnr"], 2, ["psnr", "no bound"]),
        (["--fail-under", "beauty=3"], 2, ["beauty", "known: psnr"]),
        (["--fail-over", "psnr=nan"], 2, ["no bound"]),
        (["--weights", "w.npz"], 2, ["--weights"]),
        (["--labels", "y.npy"], 2, ["--labels belong to --data"]),
        (["missing.onnx"], 5, ["missing.onnx"]),
        (["MODEL", "--modes", "int8"], 2, ["--modes", "give one of the two"]),
        (["--data", "missing.npz"], 5, ["missing.npz"]),
        (["-o", "r.json"], 2, ["r.json", ".html"]),
        (["-o", "no/such/r.html"], 5, ["no/such/r.html", "its folder does not exist"]),
    ],
)
def test_what_makes_no_sense_is_one_line_and_no_file(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path("m.onnx")
    model.write_bytes(network.read_bytes())
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]
    fails(run("bench", model, *given), code, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_weights_alone_cannot_be_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", W=np.ones((20, 20), "f4"))
    fails(run("bench", tmp_path / "w.npz"), 2, "w.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["w.npz"]


def test_a_report_does_not_replace_an_input(network: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.html"
    model.write_bytes(network.read_bytes())
    fails(run("bench", model, "-o", model, "--force"), 2, "that is an input")
    assert model.read_bytes() == network.read_bytes()


# --- Ctrl-C ----------------------------------------------------------------------------------------------------


@needs_package
def test_ctrl_c_keeps_what_is_measured(network: Path, tmp_path: Path) -> None:
    """In a terminal: the bar says what is being measured, and Ctrl-C goes to every process there."""
    with chromium():
        pass
    page, output = tmp_path / "r.html", tmp_path / "said"
    command = ["bench", network, "--modes", "int8", "--backends", "wasm", *RUNTIME, "--visits", "1", "--runs", "100000"]
    with open(output, "wb") as said:
        code, shown = _in_a_terminal([*command, "-o", page], said.fileno(), until=b"warm runs on wasm-1, round 4")
    assert code == 130, shown
    assert b"shrink: error: interrupted" in shown
    assert b"%" in shown
    found = document.read(tmp_path / "r.json")
    assert found["partial"] is True
    assert [v["name"] for v in found["variants"]] == ["float32", "int8"]
    for variant in found["variants"]:
        assert variant["size"]["file"] > 0
        assert variant["accuracy"]["native"] is not None
        assert len(variant["latency"]["wasm-1"]["warm"]["samples"]) >= 2
    html = page.read_text()
    assert "<strong>Partial.</strong>" in html
    assert "Interrupted: this is what had been measured." in output.read_text()


@needs_package
def test_an_error_on_the_way_keeps_what_is_measured(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*given: object, **more: object) -> None:
        raise MissingDependency("brotli", "bench")

    monkeypatch.setattr(size, "under_brotli", stops)
    page = tmp_path / "r.html"
    given = ("bench", network, "--modes", "int8", "--backends", "none", *RUNTIME, "--fail-under", "psnr=1", "-o", page)
    outcome = run(*given)
    assert outcome.code == 5
    assert outcome.stderr == "shrink: error: this needs the package brotli (pip install 'shrink[bench]')\n"
    assert outcome.stdout.startswith("Stopped by an error: this is what had been measured.\n")
    assert "Not measured: the rest: this needs the package brotli" in outcome.stdout
    found = document.read(tmp_path / "r.json")
    assert found["partial"] is True
    assert [v["accuracy"]["native"]["psnr_db"] is not None for v in found["variants"]] == [True, True]
    assert "this needs the package brotli" in page.read_text()
    # What cannot be written does not hide what happened first.
    page.unlink()
    (tmp_path / "r.json").unlink()

    def full(*given: object, **more: object) -> None:
        raise OutputError("No space left on device", file="r.json")

    monkeypatch.setattr(document, "write", full)
    outcome = run(*given)
    assert outcome.code == 5
    lines = outcome.stderr.splitlines()
    assert lines[0] == "shrink: error: what had been measured is lost: r.json: No space left on device"
    assert "this needs the package brotli" in lines[1]
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_an_error_before_anything_is_measured_leaves_nothing(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*given: object, **more: object) -> None:
        raise MissingDependency("brotli", "bench")

    monkeypatch.setattr(size, "sizes", stops)
    given = ("bench", network, "--modes", "int8", "--backends", "none", *RUNTIME, "-o", tmp_path / "r.html")
    fails(run(*given), 5, "this needs the package brotli")
    assert list(tmp_path.iterdir()) == []


@needs_package
def test_ctrl_c_before_anything_is_measured_leaves_nothing(network: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    code, shown = _in_a_terminal(["bench", network, *RUNTIME, "-o", page], subprocess.DEVNULL, until=b"measuring")
    if (tmp_path / "r.json").exists():
        # The first sizes were faster than the interrupt.
        assert document.read(tmp_path / "r.json")["partial"] is True
    else:
        assert list(tmp_path.iterdir()) == []
    assert code == 130, shown


def _in_a_terminal(arguments: list[Any], stdout: int, until: bytes) -> tuple[int, bytes]:
    """Run the command with a terminal for stdin and stderr, press Ctrl-C once it shows `until`, and wait."""
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "shrink", *map(str, arguments)]
    child = subprocess.Popen(command, stdin=theirs, stdout=stdout, stderr=theirs, preexec_fn=take_terminal)
    os.close(theirs)
    shown, pressed = b"", False
    deadline = time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([ours], [], [], 0.5)
            if ready:
                try:
                    read = os.read(ours, 1 << 16)
                except OSError:  # the other end is closed: the command has ended
                    break
                if not read:
                    break
                shown += read
            if not pressed and until in shown:
                os.write(ours, b"\x03")
                pressed = True
        return child.wait(timeout=60), shown
    finally:
        child.kill()
        child.wait()
        os.close(ours)


# --- shrink report ---------------------------------------------------------------------------------------------


def test_a_report_is_rendered_again_the_same(tmp_path: Path) -> None:
    data = tmp_path / "gen.json"
    data.write_bytes(FIXTURE.read_bytes())
    outcome = run("report", data)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr == ""
    page = tmp_path / "gen.html"
    assert f"Written: {page}" in outcome.stdout
    other = tmp_path / "other.html"
    assert run("report", data, "-o", other, "--json").code == 0
    assert other.read_bytes() == page.read_bytes()
    page.write_text(page.read_text().replace("</main>", "<p>old</p></main>"))
    assert run("report", data).code == 0
    assert other.read_bytes() == page.read_bytes()
    page.write_text("<!DOCTYPE html><title>My thesis</title>")
    fails(run("report", data), 2, "gen.html: exists already")
    fails(run("report", data, "-o", tmp_path / "gen.txt"), 2, "a report is an .html file")
    assert data.read_bytes() == FIXTURE.read_bytes()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["it is not JSON"]),
        ("{}", ["not the document of a benchmark"]),
        ("[" * 100_000, ["it is not JSON"]),
        ('{"shrink_bench": 2}', ["another version"]),
        ('{"shrink_bench": 1}', ["title is missing"]),
    ],
)
def test_what_is_no_document_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    data = tmp_path / "gen.json"
    data.write_text(text)
    fails(run("report", data), 3, "gen.json", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["gen.json"]


def test_a_missing_document(tmp_path: Path) -> None:
    fails(run("report", tmp_path / "gen.json"), 5, "gen.json")


def test_hostile_names_are_inert_in_the_terminal(tmp_path: Path) -> None:
    found = json.loads(FIXTURE.read_text())
    hostile = "<script>\x1b[31m\u202etxt.exe"
    found["variants"][1]["name"] = hostile
    found["not_measured"] = [{"what": hostile, "why": hostile}]
    data = tmp_path / "gen.json"
    data.write_text(json.dumps(found))
    outcome = run("report", data)
    assert outcome.code == 0, outcome.stderr
    assert "\x1b" not in outcome.stdout
    assert "\u202e" not in outcome.stdout
    assert "<script>\\x1b[31m\\u202etxt.exe" in outcome.stdout
