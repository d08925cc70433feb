"""What the suites share: the page of their tables, and the networks that they measure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import shrink
from benchmarks import calibrated, nncodec, subjects, unet
from benchmarks.bounds import Curve, at, decibels, interpolated, tables
from benchmarks.tables import Table, published
from shrink.errors import ShrinkError
from shrink.networks import chainer
from shrink.networks.legacy import import_chainer
from tests.pages import needs_chainer

TABLE = Table(
    "gen",
    ["", "bytes", "SQNR dB"],
    [["float32", "3,713,178", "exact"], ["<script>x</script>", "17", "4.25"], ["peer", "not measured: it is not here"]],
    ["Median of 3."],
)


def test_a_table_is_printed_and_shown_with_the_numbers_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published({"models": [1]}, "Sizes of all.\n\nFirst\nparagraph.\n\nSecond.", [TABLE], tmp_path / "size.json")
    said = capsys.readouterr().out
    page = (tmp_path / "size.html").read_text()
    for text in (said, page):
        for cell in ("3,713,178", "exact", "4.25", "not measured: it is not here", "Median of 3."):
            assert text.count(cell) == 1, cell
    assert "<title>Sizes of all</title>" in page
    assert "<p>First paragraph.</p>" in page
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    assert "default-src &#39;none&#39;" in page
    result = json.loads((tmp_path / "size.json").read_text())
    assert result["models"] == [1]
    assert result["machine"]["cores"]


def test_every_subject_has_what_the_suites_need(tmp_path: Path) -> None:
    names = [subject.name for subject in subjects.SUBJECTS]
    assert names[0] == "cdcgan"
    assert len(set(names)) == len(names)
    for subject in subjects.SUBJECTS:
        assert (subject.network is None) == (subject.inputs is None)
        if subject.inputs is not None:
            assert subject.inputs().ndim >= 2
    with pytest.raises(SystemExit, match="no model 'gen': cdcgan"):
        subjects.chosen(["gen"])


@needs_chainer
def test_the_u_net_fits_its_network() -> None:
    import_chainer()
    from benchmarks.models import networks

    network = {name.strip("/"): p.shape for name, p in networks.UNet().namedparams()}  # type: ignore[no-untyped-call]
    snapshot = unet.shapes()
    assert {name: shape for name, shape in snapshot.items() if not name.endswith(("avg_mean", "avg_var"))} == network
    assert sum(map(math.prod, snapshot.values())) == 54_429_315


@needs_chainer
@pytest.mark.parametrize(("name", "factor"), [("vgg7", 1), ("upconv7", 2)])
def test_waifu2x_networks_make_the_same_picture_of_a_picture(name: str, factor: int, tmp_path: Path) -> None:
    (subject,) = subjects.chosen([name])
    weights = subject.weights(tmp_path)
    if not weights.exists():
        pytest.skip(f"{weights} is not here")
    if subject.network is None or subject.inputs is None:
        pytest.fail("it has no network")
    given = subject.inputs()[:1]
    (picture,) = chainer.run(chainer.load(subject.network, shrink.load(weights)), [given])
    n, c, h, w = picture.shape
    smaller = picture.reshape(n, c, h // factor, factor, w // factor, factor).mean(axis=(3, 5))
    centre = given[:, :, 7:-7, 7:-7]
    assert smaller.shape == centre.shape
    assert np.corrcoef(smaller.ravel(), centre.ravel())[0, 1] > 0.99


def test_an_absent_nncodec_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nncodec, "_PYTHON", tmp_path / "python")
    with pytest.raises(ShrinkError, match=r"not in build/nncodec .*numpy<2"):
        list(nncodec.encoded({}, [-38]))


def test_what_a_bound_takes_is_read_between_the_points_that_no_other_beats() -> None:
    points = [(30.0, 0.05), (40.0, 0.1), (50.0, 0.4), (44.0, 0.5), (39.0, 0.11)]
    assert interpolated(points, 45.0) == pytest.approx(0.2)
    assert interpolated(points, 40.0) == pytest.approx(0.1)
    assert interpolated(points, 35.0) == pytest.approx(math.sqrt(0.05 * 0.1))
    assert interpolated(points, 29.9) is None
    assert interpolated(points, 50.1) is None
    assert interpolated([], 45.0) is None


def test_cosines_are_read_by_how_far_they_are_from_one() -> None:
    assert decibels(0.99) == pytest.approx(20)
    assert interpolated([(0.9, 0.1), (0.999, 0.4)], 0.99, decibels) == pytest.approx(0.2)


def test_a_tool_without_a_knob_has_only_the_point_that_it_has() -> None:
    curve = Curve("int8", [{"cosine": 0.9, "mean_psnr_db": 46.0, "share": 0.25, "payload": None}], swept=False)
    assert [at(curve, "mean_psnr_db", bound, "share") for bound in (45.0, 46.0, 46.1)] == [0.25, 0.25, None]
    assert at(curve, "mean_psnr_db", 45.0, "payload") is None


def test_nothing_that_calibration_sees_is_evaluated(tmp_path: Path) -> None:
    for name in ("zoo dense", "zoo lstm", "zoo upscaler"):
        trial = subjects.TRIALS[name](tmp_path)
        assert len(trial.calibrations) == 2
        unseen = {row.tobytes() for row in trial.inputs}
        assert len(unseen) == len(trial.inputs)
        for calibration in trial.calibrations.values():
            for sample in calibration.samples:
                (value,) = sample.values()
                assert value[0].shape == trial.inputs[0].shape
                assert value[0].dtype == trial.inputs.dtype
                assert value[0].tobytes() not in unseen
    with pytest.raises(SystemExit, match="no model 'gen': cdcgan"):
        subjects.trials(["gen"])
    assert "unet" not in subjects.trials([])
    assert subjects.trials(["unet"]) == ["unet"]


def test_calibrated_is_measured_beside_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(nncodec, "_PYTHON", tmp_path / "python")
    trial = subjects.TRIALS["zoo dense"](tmp_path)
    found = calibrated.measured(trial, (0.2, 0.1, 0.05))
    curves = {curve["name"]: curve for curve in found["curves"]}
    assert dict(found["not_measured"])["NNCodec 2.1.3"].startswith("not measured: nncodec 2.1.3 is not in")
    own = curves["calibrated, on inputs of its own"]
    assert len(own["points"]) == 9
    for point in own["points"]:
        assert 0 < point["payload"] < point["share"] < 0.25
        assert point["worst_psnr_db"] <= point["mean_psnr_db"]
    # A finer step takes more, and is better, but for what chance does.
    fine, coarse = own["points"][1], own["points"][-1]
    assert fine["bytes"] > coarse["bytes"]
    assert fine["mean_psnr_db"] > coarse["mean_psnr_db"] + 8
    shares = own["shares"]
    assert shares[0] > shares[1] > shares[2]
    for int8 in (curves["shrink int8"], curves["ONNX Runtime dynamic int8"], curves["TensorFlow.js uint8 + brotli"]):
        (point,) = int8["points"]
        assert 0.2 < point["share"] < 0.3
        assert 50 < point["mean_psnr_db"] < 80
    text = "\n".join(cell for table in tables({"zoo dense": found}) for row in table.rows for cell in row)
    assert f"{shares[1]:.1%}" in text
    assert (
        "measured elsewhere" in " ".join(note for table in tables({"zoo dense": found}) for note in table.notes).lower()
    )
