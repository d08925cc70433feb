"""The baseline: a network behind a server, asked by a page in a real Chromium."""

from __future__ import annotations

import http.client
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from shrink.bench import server
from shrink.bench._page import absence
from shrink.bench.document import checked
from shrink.bench.plan import BrowserOptions, Values
from shrink.errors import MissingDependency, OutputError

pytest.importorskip("flask", reason="Flask is not installed")

needs_browser = pytest.mark.skipif(absence(None) is not None, reason=str(absence(None) or "there is a browser"))

OPTIONS = BrowserOptions(runs=4, seconds=0)
SAMPLE: Values = {"z": np.arange(6, dtype="f4").reshape(1, 6), "n": np.array([3], "i8")}


def picture(feeds: Values) -> dict[str, Any]:
    return {"scores": np.ones((1, 5), "f4"), "image": np.full((1, 3, 16, 16), feeds["z"].mean() / 6, "f4")}


@needs_browser
def test_requests_are_timed_until_the_picture_is_there() -> None:
    asked: list[Values] = []

    def run(feeds: Values) -> Values:
        asked.append(feeds)
        time.sleep(0.03)
        return picture(feeds)

    told: list[tuple[str, int, int]] = []
    found = server.measure(run, SAMPLE, OPTIONS, lambda *step: told.append(step))
    assert len(found["samples"]) == 4
    assert min(found["samples"]) >= 30
    assert found["median"] >= 30
    assert found["p95"] >= found["median"]
    assert "Flask" in found["note"]
    assert [(done, total) for _, done, total in told] == [(0, 1000), (250, 1000), (500, 1000), (750, 1000)]
    # The runs before the first that counts are asked for as well.
    assert len(asked) > 4
    for feeds in asked:
        assert feeds.keys() == SAMPLE.keys()
        assert all(np.array_equal(feeds[name], SAMPLE[name]) for name in SAMPLE)
    document = {
        "shrink_bench": 1,
        "title": "",
        "created": "",
        "partial": False,
        "variants": [{"name": "float32"}],
        "not_measured": [],
    }
    assert checked(document | {"server": found})["server"] == found


@needs_browser
def test_a_network_without_a_picture_is_timed_too() -> None:
    found = server.measure(lambda feeds: {"y": np.ones((1, 5), "f8")}, SAMPLE, OPTIONS)
    assert len(found["samples"]) == 4


@needs_browser
def test_a_server_that_fails_or_does_not_answer_is_told() -> None:
    def fails(feeds: Values) -> Values:
        raise RuntimeError("planted")

    with pytest.raises(OutputError, match="the server answers 500"):
        server.measure(fails, SAMPLE, OPTIONS)

    def waits(feeds: Values) -> Values:
        time.sleep(4)
        return picture(feeds)

    with pytest.raises(OutputError, match="no answer within 2 s"):
        server.measure(waits, SAMPLE, OPTIONS, patience_s=2)


def test_the_server_refuses_what_it_does_not_serve() -> None:
    body = SAMPLE["z"].tobytes() + SAMPLE["n"].tobytes()
    cases = [
        ("POST", "/run", body, 200),
        ("POST", "/run", body[:-1], 400),
        ("POST", "/run", body + b"0", 413),
        ("POST", "/run", b"", 400),
        ("GET", "/run", None, 404),
        ("GET", "/bench.html", None, 200),
        ("GET", "/show.js", None, 200),
        ("GET", "/..%2fserver.py", None, 404),
        ("GET", "/", None, 404),
    ]
    with server._served(server._app(picture, SAMPLE)) as url:
        for method, path, data, status in cases:
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
            connection.request(method, path, body=data)
            response = connection.getresponse()
            content = response.read()
            connection.close()
            assert response.status == status, (method, path)
            if (method, status) == ("POST", 200):
                assert response.headers["X-Dims"] == "[1, 3, 16, 16]"
                assert np.array_equal(np.frombuffer(content, "<f4"), picture(SAMPLE)["image"].reshape(-1))


def test_without_a_browser_or_flask_the_reason_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"Playwright is not installed|no browser at .*nowhere"):
        server.measure(picture, SAMPLE, BrowserOptions(chromium=tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "flask", None)
    with pytest.raises(MissingDependency, match="flask"):
        server.measure(picture, SAMPLE, OPTIONS)
