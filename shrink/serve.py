"""A web server for one folder, for this machine only: what a static host does, with the headers that threads need."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import socket
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from shrink.errors import OutputError

__all__ = ["Server"]

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
}
_HEADERS = {
    # Both together make the page cross-origin isolated, without which there are no threads.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Who exports again wants to see the new page.
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Accept-Ranges": "bytes",
}
_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?")
_CHUNK = 1 << 18


class Server(http.server.ThreadingHTTPServer):
    """Serves `folder` on 127.0.0.1; port 0 is one that is free. `url` is the address.

    Raises:
        OutputError: the folder is none, or the port is in use.
    """

    daemon_threads = True
    # Elsewhere than on Windows this only lets a port be used again at once after the last server ended.
    allow_reuse_address = os.name != "nt"

    def __init__(self, folder: Path, port: int = 0, log: Callable[[str], None] = lambda line: None):
        if not folder.is_dir():
            raise OutputError("there is no such folder", file=folder)
        try:
            super().__init__(("127.0.0.1", port), partial(_Handler, folder.resolve(), log))
        except OSError as error:
            raise OutputError(
                f"port {port} cannot be used: {error.strerror or error}", hint="choose another --port"
            ) from None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that goes away in the middle of a file is no error of ours.
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "shrink"
    sys_version = ""
    timeout = 60
    # Else the system holds back the last bytes of each answer, on this machine alone for 40 ms a file.
    disable_nagle_algorithm = True

    def __init__(self, folder: Path, log: Callable[[str], None], *arguments: Any):
        self.folder = folder
        self.log = log
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if not self._is_for_us():
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = self._path()
        if path is not None and path.is_dir():
            address = urlsplit(self.path)
            if not address.path.endswith("/"):
                # Else the page's own links would start one folder too high.
                self._redirect("/" + address.path.strip("/") + "/" + (f"?{address.query}" if address.query else ""))
                return
            path = self._inside(path / "index.html")
        try:
            file = open(path, "rb") if path is not None and path.is_file() else None  # noqa: SIM115
        except OSError:
            file = None
        if path is None or file is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with file:
            self._send(file, path.suffix.lower(), with_body=with_body)

    def _send(self, file: IO[bytes], suffix: str, *, with_body: bool) -> None:
        size = os.fstat(file.fileno()).st_size
        # Parts are for GET alone; and no name of a version fits, as we give none.
        ranged = with_body and "If-Range" not in self.headers
        asked = _part(self.headers.get("Range", ""), size) if ranged else None
        part = range(size) if asked is None else asked
        if asked is not None and not asked:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
        elif asked is not None:
            self.send_response(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Range", f"bytes {part.start}-{part.stop - 1}/{size}")
        else:
            self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", _TYPES.get(suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if with_body:
            self._copy(file, part)

    def _redirect(self, address: str) -> None:
        self.send_response(HTTPStatus.PERMANENT_REDIRECT)
        self.send_header("Location", address)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _is_for_us(self) -> bool:
        """Someone else's DNS may point a name at this machine, and its page would read the folder."""
        host = (self.headers.get("Host") or "").partition(":")[0]
        return host in ("127.0.0.1", "localhost")

    def _path(self) -> Path | None:
        """What the address names in our folder, None where that is nothing."""
        try:
            name = unquote(urlsplit(self.path).path, errors="strict")
        except ValueError:
            return None
        if "\0" in name or "\\" in name:
            return None
        path = self._inside(self.folder / name.strip("/"))
        return None if path is not None and name.endswith("/") and not path.is_dir() else path

    def _inside(self, path: Path) -> Path | None:
        try:
            path = path.resolve()
            return path if path.is_relative_to(self.folder) and path.exists() else None
        except (OSError, RuntimeError, ValueError):
            return None

    def _copy(self, file: IO[bytes], part: range) -> None:
        file.seek(part.start)
        left = len(part)
        with contextlib.suppress(ConnectionError, socket.timeout):
            while left and (data := file.read(min(left, _CHUNK))):
                self.wfile.write(data)
                left -= len(data)
        if left:
            self.close_connection = True

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_error(self, format: str, *arguments: Any) -> None:
        # The line of the request says it too.
        pass

    def log_message(self, format: str, *arguments: Any) -> None:
        self.log(format % arguments)


def _part(asked: str, size: int) -> range | None:
    """The bytes that a Range header asks for, none where the file ends before; None where RFC 9110 has it ignored."""
    match = _RANGE.fullmatch(asked.strip())
    if not match or match.groups() == (None, None):
        return None
    first, last = match.groups()
    if first is None:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(size, int(last) + 1) if last else size)
