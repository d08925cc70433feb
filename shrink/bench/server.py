"""The baseline that a network in the browser is compared with: the same network behind a server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shrink.bench import timing
from shrink.bench._page import PAGE, Chromium, PageProblem, absence, executable
from shrink.bench.plan import BrowserOptions, Values
from shrink.errors import MissingDependency, OutputError
from shrink.metrics import kind_of
from shrink.progress import Progress, silent

if TYPE_CHECKING:
    from flask import Flask

__all__ = ["measure"]

_SHOW = Path(__file__).parents[1] / "web" / "pages" / "show.js"
_PATIENCE_S = 300.0
_TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8"}


def measure(
    run: Callable[[Values], Values],
    sample: Values,
    options: BrowserOptions,
    progress: Progress = silent,
    *,
    patience_s: float = _PATIENCE_S,
) -> dict[str, Any]:
    """Milliseconds from a page's request to the picture on its screen: a document's `server`.

    The page sends the sample to a small Flask server on this machine, which answers with the first output that is a
    picture, or the first one, of `run`, as float32.

    Raises:
        MissingDependency: Flask or Playwright is not installed.
        OutputError: there is no browser, or it does not get the answer.
    """
    try:
        import flask  # noqa: F401
    except ImportError:
        raise MissingDependency("flask", "bench") from None
    why, path = absence(options.chromium), executable(options.chromium)
    if why is not None or path is None:
        raise OutputError(why or "there is no browser")
    with _served(_app(run, sample)) as url:
        try:
            samples = asyncio.run(_requests(url, sample, path, options, progress, patience_s))
        except PageProblem as problem:
            raise OutputError(str(problem)) from None
    return {
        **timing.distribution(samples),
        "note": f"Flask {version('flask')} on this machine, which answers one page at a time: "
        "a visitor waits for the way to the server and for other visitors as well",
    }


async def _requests(
    url: str, sample: Values, path: Path, options: BrowserOptions, progress: Progress, patience_s: float
) -> list[float]:
    from playwright.async_api import async_playwright

    body = base64.b64encode(b"".join(_bytes(values) for values in sample.values())).decode()
    async with async_playwright() as playwright:
        chromium = Chromium(playwright, path, (), patience_s)
        try:
            visit = await chromium.open(f"{url}bench.html")
            for _ in range(timing.WARM_UP):
                await visit.call("request", "run", body)
            samples: list[float] = []
            start = time.monotonic()
            while not _is_over(len(samples), spent := time.monotonic() - start, options):
                progress("requests to the server", int(1000 * timing.share(len(samples), spent, options)), 1000)
                samples.append(round(await visit.call("request", "run", body), 4))
            await visit.close()
        finally:
            await chromium.close()
    return samples


def _is_over(runs: int, seconds: float, options: BrowserOptions) -> bool:
    return timing.is_enough(runs, seconds, options) or timing.is_too_long(runs, seconds, options)


def _bytes(values: Any) -> bytes:
    values = np.asarray(values)
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()


def _app(run: Callable[[Values], Values], sample: Values) -> Flask:
    from flask import Flask, Response, request

    app = Flask("shrink", static_folder=None)
    # What fails is told by the page that hears of it.
    app.logger.disabled = True
    arrays = {name: np.asarray(values) for name, values in sample.items()}
    expected = sum(values.nbytes for values in arrays.values())
    app.config["MAX_CONTENT_LENGTH"] = expected
    files = {file.name: file.read_bytes() for file in (*PAGE.iterdir(), _SHOW)}

    @app.get("/<name>")
    def page(name: str) -> Response:
        if name not in files:
            return Response(status=404)
        return Response(files[name], content_type=_TYPES[Path(name).suffix])

    @app.post("/run")
    def answer() -> Response:
        data = request.get_data()
        if len(data) != expected:
            return Response(status=400)
        feeds, at = {}, 0
        for name, values in arrays.items():
            feeds[name] = np.frombuffer(data, values.dtype.newbyteorder("<"), values.size, at).reshape(values.shape)
            at += values.nbytes
        outputs = [np.asarray(values) for values in run(feeds).values()]
        shown = next((values for values in outputs if kind_of(values.shape) == "image"), outputs[0])
        return Response(
            shown.astype("<f4").tobytes(),
            content_type="application/octet-stream",
            headers={"X-Dims": json.dumps(shown.shape)},
        )

    return app


@contextlib.contextmanager
def _served(app: Flask) -> Iterator[str]:
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        # One connection for all requests, and no waiting for more to send.
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log(self, type: str, message: str, *arguments: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
