"""What the suites share: the page of their tables, and the networks that they measure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import shrink
from benchmarks import nncodec, subjects, unet
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
        nncodec.encoded({}, -38)
