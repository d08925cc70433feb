"""A loopback server that misbehaves as it is told: each path has a script of answers, the last one repeats."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TYPES = {".html": "text/html", ".js": "text/javascript", ".wasm": "application/wasm"}


class Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    added: Mapping[str, str] = {}

    def do_GET(self) -> None:
        self.server.site.answer(self)

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """A whole answer. HTTP/1.0: the connection ends with it, so a body that is too short breaks it."""
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            **self.added,
            **headers,
        }.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        # A browser that gives up while it is sent is no fault of the server's.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


Answer = Callable[[Handler], None]


class _Server(http.server.ThreadingHTTPServer):
    site: Site


@dataclass
class Site:
    """`folders` are served well by their prefix; `scripts` answer single paths."""

    folders: Mapping[str, Path]
    url: str = ""
    scripts: dict[str, list[Answer]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    counter: int = 0

    def put(self, *answers: Answer, name: str = "") -> str:
        """The path, a new one or `name`, that gives these answers one after the other."""
        self.counter += 1
        path = name or f"/{self.counter}.safetensors"
        self.scripts[path] = list(answers)
        return path

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of each request for a path, names in lower case."""
        return [headers for asked, headers in self.requests if asked == path]

    def answer(self, handler: Handler) -> None:
        path = urllib.parse.unquote(handler.path.split("?")[0])
        self.requests.append((path, {k.lower(): v for k, v in handler.headers.items()}))
        if path in self.scripts:
            script = self.scripts[path]
            (script.pop(0) if len(script) > 1 else script[0])(handler)
            return
        for prefix, folder in self.folders.items():
            file = folder / path.removeprefix(prefix)
            if path.startswith(prefix) and ".." not in path and file.is_file():
                handler.send(200, file.read_bytes(), {"Content-Type": TYPES.get(file.suffix, "")})
                return
        status(404)(handler)


@contextlib.contextmanager
def faulty_server(folders: Mapping[str, Path]) -> Iterator[Site]:
    server = _Server(("127.0.0.1", 0), Handler)
    server.site = Site(folders, f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# Answers


def status(code: int, body: bytes = b"<!DOCTYPE html><h1>It did not work</h1>") -> Answer:
    return lambda handler: handler.send(code, body, {"Content-Type": "text/html; charset=utf-8"})


def whole(data: bytes, **headers: str) -> Answer:
    """The file; keywords are headers, as in content_type="text/html"; "" leaves one out."""
    return lambda handler: handler.send(200, data, _named(headers))


def gzipped(data: bytes, **headers: str) -> Answer:
    return lambda handler: handler.send(200, gzip.compress(data, 1), {"Content-Encoding": "gzip", **_named(headers)})


def cut(data: bytes, at: int, **headers: str) -> Answer:
    """The connection breaks after `at` bytes; without content_length="" the browser knows that more belongs there."""
    return lambda handler: handler.send(200, data[:at], {"Content-Length": str(len(data)), **_named(headers)})


def ranged(data: bytes, etag: str, *, breaks_after: int | None = None, heeds_if_range: bool = True) -> Answer:
    """A server that can send the rest of a file; it may break each time after some bytes, or splice files blindly."""

    def answer(handler: Handler) -> None:
        start = 0
        wanted = handler.headers.get("Range", "")
        if wanted and (not heeds_if_range or handler.headers.get("If-Range") == etag):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(data):
            status(416)(handler)
            return
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        end = len(data) if breaks_after is None else start + breaks_after
        handler.send(206 if start else 200, data[start:end], headers)

    return answer


def shared(answer: Answer) -> Answer:
    """The answer also for pages of other origins, which see few of its headers."""

    def wrapped(handler: Handler) -> None:
        handler.added = {"Access-Control-Allow-Origin": "*"}
        answer(handler)

    return wrapped


def later(event: threading.Event, answer: Answer) -> Answer:
    """Nothing until the event."""

    def wait(handler: Handler) -> None:
        event.wait(30)
        answer(handler)

    return wait


@dataclass
class Gauge:
    """How many requests wait at the same time, and the most that ever did."""

    waiting: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def slow(self, seconds: float, answer: Answer) -> Answer:
        """The answer, after a while for which the request counts."""

        def wait(handler: Handler) -> None:
            with self.lock:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
            time.sleep(seconds)
            with self.lock:
                self.waiting -= 1
            answer(handler)

        return wait


def hanging(data: bytes, at: int, event: threading.Event) -> Answer:
    """Some bytes, and then nothing until the event, which ends the connection."""

    def answer(handler: Handler) -> None:
        handler.send(200, data[:at], {"Content-Length": str(len(data))})
        handler.wfile.flush()
        event.wait(30)

    return answer


def watched(data: bytes, at: int, gone: threading.Event) -> Answer:
    """Some bytes, and then nothing; the event tells that the browser has ended the connection."""

    def answer(handler: Handler) -> None:
        handler.send(200, data[:at], {"Content-Length": str(len(data))})
        handler.wfile.flush()
        handler.connection.settimeout(30)
        with contextlib.suppress(TimeoutError):
            # A browser that sends no more: the connection has ended.
            with contextlib.suppress(ConnectionError):
                if handler.connection.recv(1):
                    return
            gone.set()

    return answer


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    return {key.replace("_", "-").title(): value for key, value in headers.items()}
