"""The child process that HDF5 is kept in, from the outside: starting it, asking it, ending it.

One flipped bit can make the HDF5 library crash, loop or allocate without end, and a full disk makes it crash when a
file is closed. So it is never loaded in this process: a child of ours reads foreign files and writes our own.
What it says is checked like a foreign file itself, because a damaged file may have damaged the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from shrink.errors import MissingDependency
from shrink.formats import _hdf5_child
from shrink.formats._hdf5_child import FRAME

__all__ = ["CRASHED", "Child", "Crash", "Gone", "Refused", "started", "used"]

CRASHED = "the HDF5 reader crashed on it: the file is damaged"

_CHILDREN_AT_MOST = 4
_JSON_BYTES_AT_MOST = 256 << 20
# The signal that ends a child which has used its CPU time, where there is one.
_OUT_OF_TIME = getattr(signal, "SIGXCPU", 1 << 16)

_BOOT = (
    "import sys, json, importlib.util as u;"
    "sys.path += [p for p in json.loads(sys.argv[1]) if p not in sys.path];"
    "s = u.spec_from_file_location(sys.argv[3], sys.argv[2]); m = u.module_from_spec(s);"
    "sys.modules[s.name] = m; s.loader.exec_module(m); m.serve()"
)


class Crash(Exception):
    """The child ended, fell silent, or said what it never says."""


class Gone(Exception):
    """The child was closed to make room for another before it was asked."""


class Refused(Exception):
    """The child refused the file: its words, not yet fit to print."""

    def __init__(self, what: str, name: str | None, errno: int | None):
        super().__init__(what)
        self.what = what
        self.name = name
        self.errno = errno


class Child:
    """One running child. It lives until it is closed, its `File` is gone, or this process ends.

    `do` is "read" or "write"; `size_bytes` is the size of the file to read.
    """

    def __init__(self, do: str, path: str, size_bytes: int = 0):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HDF5_")}
        # No filter plugins, no threads for arithmetic that is not done, and no lock that would keep others from the
        # file for as long as the child lives.
        environment |= {"HDF5_PLUGIN_PRELOAD": "::", "HDF5_USE_FILE_LOCKING": "FALSE"}
        environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = json.dumps([p for p in sys.path if p])
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.closed = False
        self._process = subprocess.Popen(
            # -I: neither the folder we are in nor the user's variables decide what is imported.
            [sys.executable, "-I", "-c", _BOOT, paths, os.path.abspath(_hdf5_child.__file__), "_shrink_hdf5_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        try:
            self._send(
                json.dumps({"do": do, "path": os.fsencode(path).hex(), "size_bytes": size_bytes}).encode() + b"\n"
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child and wait for it. A fork of ours closes its pipes only: the child is not its own."""
        if self.closed:
            return
        self.closed = True
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        else:
            self._process.returncode = 0

    def ask(
        self, request: Mapping[str, object], data: bytes | memoryview = b"", *, into: bytearray, wall_s: float
    ) -> Any:
        """The JSON that ends the reply, with the data before it in `into`, which it must fill exactly.

        `data` follows the request.

        Raises:
            Refused: the child refused. It can be asked again.
            Gone: it is closed already.
            Crash: it failed in any other way, or took longer than `wall_s` seconds. It is closed.
        """
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        with self.lock:
            if self.closed:
                raise Gone
            timer = threading.Timer(wall_s, stop)
            timer.daemon = True
            timer.start()
            try:
                self._send(json.dumps(request).encode() + b"\n")
                self._send(data)
                return self._reply(into)
            except Refused:
                raise
            except BaseException as error:
                self.close()
                if late.is_set() or self._process.returncode == -_OUT_OF_TIME:
                    raise Crash("the HDF5 reader does not come to an end with it: the file is damaged") from None
                if isinstance(error, (OSError, ValueError, RecursionError)):
                    raise Crash(CRASHED) from None
                raise
            finally:
                timer.cancel()
                timer.join()
                if late.is_set():
                    # Its time was over just when the reply had come.
                    self.close()

    def _send(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        pipe = self._process.stdin
        if pipe is None:
            raise Crash(CRASHED)
        with contextlib.suppress(BrokenPipeError):
            # A child that is gone shows itself when its reply is missing.
            while len(left):
                left = left[pipe.write(left) or 0 :]

    def _reply(self, into: bytearray) -> Any:
        view = memoryview(into)
        done = 0
        while True:
            head = bytearray(FRAME.size)
            self._fill(memoryview(head))
            kind, length = FRAME.unpack(head)
            if kind == b"D" and length <= len(view) - done:
                self._fill(view[done : done + length])
                done += length
                continue
            if kind not in (b"J", b"E") or length > _JSON_BYTES_AT_MOST:
                raise Crash(CRASHED)
            text = bytearray(length)
            self._fill(memoryview(text))
            value = json.loads(text)
            if kind == b"J":
                if done != len(view):
                    raise Crash(CRASHED)
                return value
            if not isinstance(value, dict):
                raise Crash(CRASHED)
            if value.get("missing"):
                self.close()
                raise MissingDependency("h5py", "h5")
            name, errno = value.get("name"), value.get("errno")
            raise Refused(
                str(value.get("what")),
                name if isinstance(name, str) else None,
                errno if isinstance(errno, int) else None,
            )

    def _fill(self, view: memoryview) -> None:
        pipe = self._process.stdout
        while len(view):
            count = pipe.readinto(view) if pipe is not None else 0  # type: ignore[attr-defined]
            if not count:
                raise Crash(CRASHED)
            view = view[count:]


_running_lock = threading.Lock()
_running: list[Child] = []


def started(path: str, size_bytes: int) -> Child:
    """A new child. More than a few at a time are not kept: the one that has been idle longest ends."""
    with _running_lock:
        _running[:] = [c for c in _running if not c.closed and c.owner == os.getpid()]
        for old in _running[: max(0, len(_running) - _CHILDREN_AT_MOST + 1)]:
            if old.lock.acquire(blocking=False):
                try:
                    old.close()
                finally:
                    old.lock.release()
        child = Child("read", path, size_bytes)
        _running.append(child)
        return child


def used(child: Child) -> None:
    with _running_lock:
        if child in _running:
            _running.remove(child)
            _running.append(child)
