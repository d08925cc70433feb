"""The README's first command, for real: its page in Chromium, with sliders that redraw both networks."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quickstart
from benchmarks.__main__ import suites
from shrink.serve import Server
from tests.browser import chromium

ROOT = Path(__file__).parents[1]


def test_every_suite_is_listed() -> None:
    assert {"all", "decode", "latency", "quickstart", "size", "speed", "train"} <= set(suites())
    assert all(suites().values())


def test_from_a_snapshot_to_two_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not (ROOT / "tests" / "node_modules" / "onnxruntime-web").exists():
        pytest.skip("onnxruntime-web is not installed in tests/node_modules")
    monkeypatch.chdir(ROOT / "tests")
    assert quickstart._run(tmp_path / "out") == 0
    said = capfd.readouterr().out
    assert "float32: 705 kB of weights" in said
    assert "eightbit: " in said
    assert (tmp_path / "out" / "page.png").read_bytes().startswith(b"\x89PNG")

    server = Server(tmp_path / "out" / "site")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with chromium() as browser:
            page = browser.new_page()
            page.goto(server.url)
            page.locator("#result:not([hidden])").wait_for()
            before = shown(page)
            sliders = page.locator("#labels input")
            assert sliders.count() == 10
            assert sliders.first.get_attribute("step") == "0.001"
            sliders.nth(3).fill("0")
            sliders.nth(8).fill("0.75")
            page.locator("#labels output", has_text="0.750").wait_for()
            # The picture is drawn after the number is shown: wait for the input that the page drew last.
            while shown(page)["label"] != [0, 0, 0, 0, 0, 0, 0, 0, 0.75, 0]:
                page.wait_for_timeout(20)
            after = shown(page)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert np.abs(np.subtract(before["float32"], after["float32"])).max() > 0.3
    for name in (before, after):
        difference = np.abs(np.subtract(name["float32"], name["eightbit"])).max()
        assert 0 < difference < 0.12


def shown(page: object) -> dict[str, list[float]]:
    """Label and pictures that the page drew last."""
    out: dict[str, list[float]] = page.evaluate(  # type: ignore[attr-defined]
        """async () => {
            const { last } = await import("./sliders.js");
            const { input, outputs } = last;
            const label = [...input.slice(100)];
            return { label, float32: [...outputs.float32.data], eightbit: [...outputs.eightbit.data] };
        }"""
    )
    return out
