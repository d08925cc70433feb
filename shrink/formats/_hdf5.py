"""HDF5 for the formats that are made of it: foreign files are read in a guarded child process, ours written here.

One flipped bit can make the HDF5 library crash, loop or allocate without end, so no foreign file is opened in this
process. The child runs this very file (see `_Child`), alone and without the rest of shrink, and can open nothing
but the model. It walks the file itself, refuses whatever a saved model has no use for (links, storage in other
files, objects, unknown filters, sizes that no bytes stand behind) and answers two requests:

    {"do": "index"}                   -> JSON: groups with their attributes, datasets with dtype and shape
    {"do": "values", "name": path}    -> the values, little-endian, C order, in frames

A reply is a run of frames, a kind (D data, J the end, with JSON, E an error, with JSON) and a length before each.
What the child says is checked like the file itself, because a damaged file may have damaged the child.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHILD = "_shrink_hdf5_child"
if __name__ != _CHILD:
    # The child loads this file by its path: importing shrink there would cost more than reading most models.
    from shrink.errors import BadInput, MissingDependency, OutputError, printable
    from shrink.files import atomic_file, io_errors
    from shrink.model import check_name, dtype_code

__all__ = ["SIGNATURE", "Attribute", "Dataset", "File", "Output", "holds_keras", "is_hdf5", "opened", "writing"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"

Array = NDArray[Any]
Attribute = str | list[str] | dict[str, Any]
"""Text, a list of texts, or numbers as {"dtype": "<f8", "shape": [2], "base64": …}."""

# Deflate cannot do better than 1032 to 1; a dataset that claims more is not believed. What no stored bytes stand
# behind is a fill value; a file may hold this much of it in all.
_DEFLATE_RATIO = 1032
_FILL_BYTES_AT_MOST = 16 << 20

_OBJECTS_AT_MOST = 100_000
_DEPTH_AT_MOST = 64
_NAME_BYTES_AT_MOST = 4096
_ATTRIBUTES_AT_MOST = 1000
_TEXT_BYTES_AT_MOST = 64 << 20
_NUMBER_BYTES_AT_MOST = 1 << 16
_JSON_BYTES_AT_MOST = 256 << 20

_SLAB_BYTES = 8 << 20
_FRAME = struct.Struct(">cQ")

# What a request may cost: a fixed share, and more for many values.
_CPU_S = 20.0
_WALL_S = 60.0
_CPU_BYTES_PER_S = 4 << 20
_WALL_BYTES_PER_S = 1 << 20
_MEMORY_BYTES = 512 << 20
_CHILDREN_AT_MOST = 4

_CRASHED = "the HDF5 reader crashed on it: the file is damaged"


# ----------------------------------------------------------------------------------------------- the child's side


class _Refused(Exception):
    """What the child answers with E: what is wrong, and the dataset it is wrong with."""

    def __init__(self, what: str, name: str | None = None):
        super().__init__(what)
        self.what = what
        self.name = name


def serve() -> None:
    """The child: read requests from stdin, answer on stdout, end when stdin does."""
    # An interrupt reaches the whole process group; the parent ends us in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not get between the frames.
    out = os.dup(1)
    os.dup2(2, 1)

    def send(kind: bytes, data: bytes | memoryview) -> None:
        for part in (_FRAME.pack(kind, len(data)), data):
            view = memoryview(part)
            while len(view):
                view = view[os.write(out, view) :]

    def send_json(kind: bytes, value: object) -> None:
        send(kind, json.dumps(value, separators=(",", ":")).encode())

    try:
        import h5py  # noqa: F401
    except ImportError:
        send_json(b"E", {"missing": "h5py"})
        return
    requests = sys.stdin.buffer
    start = json.loads(requests.readline())
    # Opened now, because soon nothing more can be: the system's word on how much memory is mapped.
    statm = None
    with contextlib.suppress(OSError):
        statm = os.open("/proc/self/statm", os.O_RDONLY)
    file: _Foreign | None = None
    for line in requests:
        request = json.loads(line)
        _limit(request["cpu_s"], request["memory_bytes"], statm)
        try:
            if file is None:
                file = _Foreign(bytes.fromhex(start["file"]), start["size_bytes"])
                _no_more_files()
            if request["do"] == "index":
                send_json(b"J", file.index())
            else:
                for part in file.values(request["name"]):
                    send(b"D", part)
                send_json(b"J", {})
        except _Refused as refused:
            send_json(b"E", {"what": refused.what, "name": refused.name})
        except BrokenPipeError:
            return
        except Exception as error:
            # The library's own words, in whatever exception the binding chose for them.
            what = str(error) or type(error).__name__
            send_json(b"E", {"what": f"it is not readable as HDF5: {what}", "name": request.get("name")})


def _limit(cpu_s: float, memory_bytes: int, statm: int | None) -> None:
    """Bound what this request may use. Where the system has no such limits, the parent's clock remains."""
    try:
        import resource
    except ImportError:
        return

    def limit(what: int, value: int) -> None:
        hard = resource.getrlimit(what)[1]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + cpu_s))
    limit(resource.RLIMIT_CORE, 0)
    if statm is not None:
        # What is mapped by now, mostly libraries, comes on top.
        pages = int(os.pread(statm, 100, 0).split()[0])
        limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes)


def _no_more_files() -> None:
    """From here on no path in the file can be followed, whatever the library thinks of it."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


@dataclass(frozen=True)
class _Described:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    stored_bytes: int
    believed_bytes: int
    slab_rows: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Foreign:
    """A foreign file, open in the child."""

    def __init__(self, path: bytes, size_bytes: int):
        from h5py import h5f, h5g

        self.size_bytes = size_bytes
        self.file = h5f.open(path, h5f.ACC_RDONLY)
        self.root = h5g.open(self.file, b"/")
        self.seen: set[tuple[int, int]] = set()
        self.groups: list[tuple[str, dict[str, Attribute]]] = []
        self.datasets: list[tuple[str, str | None, tuple[int, ...] | None]] = []
        self.stored_bytes = 0
        self.fill_bytes = 0
        self.text_bytes = 0

    def index(self) -> dict[str, Any]:
        self._walk(self.root, "", 0)
        return {"groups": self.groups, "datasets": self.datasets}

    def _walk(self, group: Any, prefix: str, depth: int) -> None:
        from h5py import h5d, h5g, h5o, h5t

        if depth > _DEPTH_AT_MOST:
            raise _Refused(f"its groups are nested more than {_DEPTH_AT_MOST} deep")
        self._once(group, prefix)
        self.groups.append((prefix, self._attributes(group, prefix)))
        for link, kind in self._links(group, prefix):
            name = self._name(link, prefix)
            self._must_be_hard(kind, name)
            item = h5o.open(group, link)
            if isinstance(item, h5g.GroupID):
                self._walk(item, name, depth + 1)
            elif isinstance(item, h5d.DatasetID):
                self._once(item, name)
                self._dataset(item, name)
            elif isinstance(item, h5t.TypeID):
                self._once(item, name)
                self._dtype(item, name)
            else:
                raise _Refused("it is neither a group nor a dataset", name)

    def _once(self, item: Any, name: str) -> None:
        """Refuse a second way to the same object: a cycle, or one dataset that poses as many."""
        from h5py import h5o

        info = h5o.get_info(item)
        key = (info.fileno, info.addr)
        if key in self.seen:
            raise _Refused("the same object is in the file twice", name)
        self.seen.add(key)
        if len(self.seen) > _OBJECTS_AT_MOST:
            raise _Refused(f"it holds more than {_OBJECTS_AT_MOST} objects")

    def _links(self, group: Any, prefix: str) -> list[tuple[bytes, int]]:
        links: list[tuple[bytes, int]] = []

        def take(name: bytes, info: Any) -> bool:
            links.append((name, info.type))
            return len(links) > _OBJECTS_AT_MOST

        if group.links.iterate(take, info=True):
            raise _Refused(f"it holds more than {_OBJECTS_AT_MOST} objects", prefix or None)
        return sorted(links)

    def _name(self, link: bytes, prefix: str) -> str:
        try:
            name = link.decode("utf-8")
        except UnicodeDecodeError:
            raise _Refused("a name is not UTF-8", prefix or None) from None
        path = f"{prefix}/{name}" if prefix else name
        if name in ("", ".") or "/" in name or len(path.encode()) > _NAME_BYTES_AT_MOST:
            raise _Refused("its name is not valid in HDF5", path[:200])
        return path

    def _must_be_hard(self, kind: int, name: str) -> None:
        from h5py import h5l

        if kind != h5l.TYPE_HARD:
            words = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}
            raise _Refused(f"it is {words.get(kind, 'a user-defined link')}, which is never followed", name)

    def _dataset(self, dataset: Any, name: str) -> None:
        described = self._described(dataset, name)
        if described is None:
            self.datasets.append((name, None, None))
            return
        self.stored_bytes += described.stored_bytes
        self.fill_bytes += max(0, described.nbytes - described.believed_bytes)
        if self.stored_bytes > self.size_bytes or self.fill_bytes > _FILL_BYTES_AT_MOST:
            raise _Refused(f"{described.stored_bytes} stored bytes claim to hold {described.nbytes}", name)
        self.datasets.append((name, described.dtype.newbyteorder("<").str, described.shape))

    def _described(self, dataset: Any, name: str) -> _Described | None:
        """What a dataset claims to be, checked; None for an empty one, which has no values at all."""
        from h5py import h5d, h5s

        plan = dataset.get_create_plist()
        layout = plan.get_layout()
        if layout == h5d.VIRTUAL:
            raise _Refused("it is a virtual dataset, whose values lie elsewhere", name)
        # Only a contiguous dataset can have its bytes in other files.
        if layout not in (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED):
            raise _Refused("its layout is not supported", name)
        if plan.get_external_count():
            raise _Refused("its values lie in another file (external storage), which is never opened", name)
        dtype = self._dtype(dataset.get_type(), name)
        space = dataset.get_space()
        extent = space.get_simple_extent_type()
        if extent == h5s.NULL:
            return None
        shape = tuple(int(n) for n in space.shape) if extent == h5s.SIMPLE else ()
        packs = self._filters(plan, name)
        stored = int(dataset.get_storage_size())
        rows = chunk_rows = 1
        if shape:
            row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
            if layout == h5d.CHUNKED:
                chunk_rows = max(1, int(plan.get_chunk()[0]))
            rows = chunk_rows * max(1, _SLAB_BYTES // (row_bytes * chunk_rows))
        if not 0 <= stored <= self.size_bytes:
            raise _Refused(f"it claims {stored} stored bytes in a file of {self.size_bytes}", name)
        return _Described(dtype, shape, stored, stored * (_DEFLATE_RATIO if packs else 1), rows)

    def _dtype(self, tid: Any, name: str) -> np.dtype[Any]:
        """The NumPy dtype of a plain number type. Everything else is refused, and so is a number that differs from
        NumPy's in a detail such as the width of its exponent."""
        from h5py import h5t

        words = {
            h5t.OPAQUE: "opaque bytes",
            h5t.COMPOUND: "records",
            h5t.REFERENCE: "references to other objects",
            h5t.VLEN: "objects of varying length",
            h5t.STRING: "text",
            h5t.ARRAY: "arrays",
        }
        kind = tid.get_class()
        if kind not in (h5t.INTEGER, h5t.FLOAT, h5t.ENUM):
            raise _Refused(f"it holds {words.get(kind, 'something')} and not numbers, which is not supported", name)
        dtype: np.dtype[Any] = tid.dtype
        if dtype.kind not in "biuf" or (kind == h5t.ENUM and dtype.kind != "b") or dtype.itemsize != tid.get_size():
            raise _Refused(f"values of type {dtype} are not supported", name)
        plain = np.dtype(dtype.str)
        if not tid.equal(h5t.py_create(plain)):
            raise _Refused("its numbers are of an unusual type, which is not supported", name)
        return plain

    def _filters(self, plan: Any, name: str) -> bool:
        """Whether a dataset is compressed, by the filters that come with every HDF5 library; no other is allowed."""
        from h5py import h5z

        known = (h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_LZF)
        codes = [plan.get_filter(i)[0] for i in range(plan.get_nfilters())]
        for code in codes:
            if code not in known or codes.count(code) > 1:
                raise _Refused(f"it is packed with the HDF5 filter {code}, which is not supported", name)
        packing = [code for code in codes if code in (h5z.FILTER_DEFLATE, h5z.FILTER_LZF)]
        if len(packing) > 1:
            raise _Refused("it is compressed twice", name)
        return bool(packing)

    def _attributes(self, group: Any, prefix: str) -> dict[str, Attribute]:
        from h5py import h5a

        count = h5a.get_num_attrs(group)
        if count > _ATTRIBUTES_AT_MOST:
            raise _Refused(f"a group has more than {_ATTRIBUTES_AT_MOST} attributes", prefix or None)
        found: dict[str, Attribute] = {}
        for i in range(count):
            attribute = h5a.open(group, index=i)
            try:
                name = attribute.name.decode("utf-8")
            except UnicodeDecodeError:
                raise _Refused("the name of an attribute is not UTF-8", prefix or None) from None
            found[name] = self._attribute(attribute, f"{prefix}@{name}")
        return found

    def _attribute(self, attribute: Any, name: str) -> Attribute:
        """`name` is what errors call it: the group's path, an @, the attribute's own name."""
        from h5py import h5s, h5t

        tid = attribute.get_type()
        space = attribute.get_space()
        extent = space.get_simple_extent_type()
        if extent == h5s.NULL:
            raise _Refused("this attribute has no value", name)
        shape = tuple(int(n) for n in space.shape) if extent == h5s.SIMPLE else ()
        nbytes = math.prod(shape) * int(tid.get_size())
        if nbytes > min(_TEXT_BYTES_AT_MOST, self.size_bytes):
            raise _Refused(f"this attribute claims to hold {nbytes} bytes", name)
        if tid.get_class() != h5t.STRING:
            dtype = self._dtype(tid, name)
            if nbytes > _NUMBER_BYTES_AT_MOST:
                raise _Refused(f"this attribute claims to hold {nbytes} bytes", name)
            values: Array = np.empty(shape, dtype)
            if values.size:
                attribute.read(values)
            little = dtype.newbyteorder("<")
            text = base64.b64encode(values.astype(little, copy=False).tobytes()).decode("ascii")
            return {"dtype": little.str, "shape": list(shape), "base64": text}
        if len(shape) > 1:
            raise _Refused("this attribute is a table of texts, which is not supported", name)
        varying = tid.is_variable_str()
        texts: Array = np.empty(shape, tid.dtype if varying else np.dtype(f"S{tid.get_size()}"))
        if texts.size:
            # A memory type of the same character set, or the library refuses to convert.
            attribute.read(texts, None if varying else tid)
        padding = h5t.STR_NULLPAD if varying else tid.get_strpad()
        decoded = [self._text(item, padding, name) for item in texts.reshape(-1).tolist()]
        return decoded if shape else decoded[0]

    def _text(self, value: bytes | str, padding: int, name: str) -> str:
        from h5py import h5t

        item = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value or b""
        if padding == h5t.STR_NULLTERM:
            item = item.partition(b"\0")[0]
        elif padding == h5t.STR_SPACEPAD:
            item = item.rstrip(b" ")
        self.text_bytes += len(item)
        if self.text_bytes > _TEXT_BYTES_AT_MOST:
            raise _Refused(f"its attributes hold more than {_TEXT_BYTES_AT_MOST} bytes of text")
        try:
            return item.decode("utf-8")
        except UnicodeDecodeError:
            raise _Refused("the text of this attribute is not UTF-8", name) from None

    def values(self, name: str) -> Iterator[memoryview]:
        """The values of one dataset, slab by slab, checked again: this child may not be the one that made the index."""
        from h5py import h5d, h5g, h5o, h5s, h5t

        item = self.root
        for part in name.encode().split(b"/"):
            if not isinstance(item, h5g.GroupID):
                raise _Refused("it is not where the index says", name)
            self._must_be_hard(item.links.get_info(part).type, name)
            item = h5o.open(item, part)
        if not isinstance(item, h5d.DatasetID):
            raise _Refused("it is not where the index says", name)
        described = self._described(item, name)
        if described is None:
            raise _Refused("it has no values", name)
        if described.nbytes > described.believed_bytes + _FILL_BYTES_AT_MOST:
            raise _Refused(f"{described.stored_bytes} stored bytes claim to hold {described.nbytes}", name)
        if described.nbytes == 0:
            return
        memory = h5t.py_create(described.dtype)
        little = described.dtype.newbyteorder("<")
        shape = described.shape
        for start in range(0, shape[0] if shape else 1, described.slab_rows):
            if shape:
                count = (min(described.slab_rows, shape[0] - start), *shape[1:])
                space = item.get_space()
                space.select_hyperslab((start, *(0 for _ in shape[1:])), count)
                slab: Array = np.empty(count, described.dtype)
                item.read(h5s.create_simple(count), space, slab, memory)
            else:
                slab = np.empty((), described.dtype)
                item.read(h5s.ALL, h5s.ALL, slab, memory)
            yield memoryview(np.ascontiguousarray(slab.astype(little, copy=False)).reshape(-1).view(np.uint8))


# ---------------------------------------------------------------------------------------------- the parent's side

_BOOT = (
    "import sys, json, importlib.util as u;"
    "sys.path += [p for p in json.loads(sys.argv[1]) if p not in sys.path];"
    "s = u.spec_from_file_location(sys.argv[3], sys.argv[2]); m = u.module_from_spec(s);"
    "sys.modules[s.name] = m; s.loader.exec_module(m); m.serve()"
)


class _Crash(Exception):
    """The child ended, fell silent, or said what it never says."""


class _Gone(Exception):
    """The child was closed to make room for another before it was asked."""


class _Answer(Exception):
    """The child refused the file: its words, not yet fit to print."""

    def __init__(self, what: str, name: str | None):
        super().__init__(what)
        self.what = what
        self.name = name


class _Child:
    """One running child. It lives until it is closed, its `File` is gone, or this process ends."""

    def __init__(self, path: str, size_bytes: int):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HDF5_")}
        # No filter plugins, no locks left on the file, and no threads for arithmetic that is not done.
        environment |= {"HDF5_PLUGIN_PRELOAD": "::", "HDF5_USE_FILE_LOCKING": "BEST_EFFORT"}
        environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = json.dumps([p for p in sys.path if p])
        self.owner = os.getpid()
        self.lock = threading.Lock()
        self.closed = False
        self._process = subprocess.Popen(
            # -I: neither the folder we are in nor the user's variables decide what is imported.
            [sys.executable, "-I", "-c", _BOOT, paths, os.path.abspath(__file__), _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        try:
            self._send({"file": os.fsencode(path).hex(), "size_bytes": size_bytes})
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

    def ask(self, request: Mapping[str, object], into: bytearray, wall_s: float) -> Any:
        """The JSON that ends the reply, with the data before it in `into`, which it must fill exactly.

        Raises:
            _Answer: the child refused. It can be asked again.
            _Gone: it is closed already.
            _Crash: it failed in any other way, or took longer than `wall_s` seconds. It is closed.
        """
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        with self.lock:
            if self.closed:
                raise _Gone
            timer = threading.Timer(wall_s, stop)
            timer.daemon = True
            timer.start()
            try:
                self._send(request)
                return self._reply(into)
            except _Answer:
                raise
            except BaseException as error:
                self.close()
                if late.is_set():
                    raise _Crash(f"the HDF5 reader did not finish in {wall_s:.0f} s: the file is damaged") from None
                if isinstance(error, (OSError, ValueError, RecursionError)):
                    raise _Crash(_CRASHED) from None
                raise
            finally:
                timer.cancel()
                timer.join()

    def _send(self, message: Mapping[str, object]) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        pipe = self._process.stdin
        if pipe is None:
            raise _Crash(_CRASHED)
        with contextlib.suppress(BrokenPipeError):
            # A child that is gone shows itself when its reply is missing.
            while len(line):
                line = line[pipe.write(line) or 0 :]

    def _reply(self, into: bytearray) -> Any:
        view = memoryview(into)
        done = 0
        while True:
            head = bytearray(_FRAME.size)
            self._fill(memoryview(head))
            kind, length = _FRAME.unpack(head)
            if kind == b"D" and length <= len(view) - done:
                self._fill(view[done : done + length])
                done += length
                continue
            if kind not in (b"J", b"E") or length > _JSON_BYTES_AT_MOST:
                raise _Crash(_CRASHED)
            text = bytearray(length)
            self._fill(memoryview(text))
            value = json.loads(text)
            if kind == b"J":
                if done != len(view):
                    raise _Crash(_CRASHED)
                return value
            if not isinstance(value, dict):
                raise _Crash(_CRASHED)
            if value.get("missing"):
                self.close()
                raise MissingDependency("h5py", "h5")
            name = value.get("name")
            raise _Answer(str(value.get("what")), name if isinstance(name, str) else None)

    def _fill(self, view: memoryview) -> None:
        pipe = self._process.stdout
        while len(view):
            count = pipe.readinto(view) if pipe is not None else 0  # type: ignore[attr-defined]
            if not count:
                raise _Crash(_CRASHED)
            view = view[count:]


_running_lock = threading.Lock()
_running: list[_Child] = []


def _started(path: str, size_bytes: int) -> _Child:
    """A new child. More than a few at a time are not kept: the one that has been idle longest ends."""
    with _running_lock:
        _running[:] = [c for c in _running if not c.closed and c.owner == os.getpid()]
        for old in _running[: max(0, len(_running) - _CHILDREN_AT_MOST + 1)]:
            if old.lock.acquire(blocking=False):
                try:
                    old.close()
                finally:
                    old.lock.release()
        child = _Child(path, size_bytes)
        _running.append(child)
        return child


def _used(child: _Child) -> None:
    with _running_lock:
        if child in _running:
            _running.remove(child)
            _running.append(child)


@dataclass(frozen=True)
class Dataset:
    """`dtype` is little-endian. Both are None for an HDF5 "empty" dataset, which has no values."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int, ...] | None


_Identity = tuple[int, int, int, int]


def _identity(path: str, shown: Path) -> _Identity:
    with io_errors(shown):
        facts = os.stat(path)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


class File:
    """A foreign HDF5 file: its index, and its values when asked for.

    `groups` maps the path of every group ("" is the root) to its attributes; `datasets` are in the order of a walk
    by name. Names have no leading slash.

    Raises:
        BadInput: the file is malformed, or holds what a saved model has no use for.
        OutputError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._where = os.path.abspath(path)
        self._identity = _identity(self._where, path)
        self.size_bytes = self._identity[2]
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._ending: weakref.finalize[Any, Any] | None = None
        try:
            self.groups, self.datasets = self._index(self._ask({"do": "index"}, bytearray()))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the child. It starts again when values are asked for."""
        if self._ending is not None:
            self._ending()
        self._child = self._ending = None

    def load(self, dataset: Dataset) -> Array:
        """The values of a dataset of this file, in C order.

        Raises:
            BadInput: they are damaged, or the file has changed.
        """
        if dataset.dtype is None or dataset.shape is None:
            raise BadInput("it has no values", file=self.path, tensor=dataset.name)
        try:
            data = bytearray(math.prod(dataset.shape) * dataset.dtype.itemsize)
        except (MemoryError, OverflowError):
            raise BadInput("it does not fit into memory", file=self.path, tensor=dataset.name) from None
        self._ask({"do": "values", "name": dataset.name}, data, dataset.name)
        if dataset.dtype.kind == "b" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
            raise BadInput("its truth values are neither 0 nor 1", file=self.path, tensor=dataset.name)
        return np.frombuffer(data, dataset.dtype).reshape(dataset.shape)

    def _ask(self, request: Mapping[str, object], into: bytearray, name: str | None = None) -> Any:
        costs = {"cpu_s": _CPU_S + len(into) / _CPU_BYTES_PER_S, "memory_bytes": _MEMORY_BYTES + 3 * len(into)}
        try:
            while True:
                with contextlib.suppress(_Gone):
                    return self._alive().ask({**request, **costs}, into, _WALL_S + len(into) / _WALL_BYTES_PER_S)
        except _Answer as answer:
            which = printable(answer.name) if answer.name is not None else name
            raise BadInput(printable(answer.what), file=self.path, tensor=which) from None
        except _Crash as crash:
            raise BadInput(str(crash), file=self.path, tensor=name) from None

    def _alive(self) -> _Child:
        with self._lock:
            child = self._child
            if child is None or child.closed or child.owner != os.getpid():
                self.close()
                if _identity(self._where, self.path) != self._identity:
                    raise BadInput("the file has changed since its index was read", file=self.path)
                with io_errors(self.path):
                    self._child = child = _started(self._where, self.size_bytes)
                self._ending = weakref.finalize(self, child.close)
            else:
                _used(child)
            return child

    def _index(self, said: Any) -> tuple[dict[str, dict[str, Attribute]], tuple[Dataset, ...]]:
        """The index as the child said it, believed only after the same checks that the file gets."""
        crashed = BadInput(_CRASHED, file=self.path)
        if not (isinstance(said, dict) and isinstance(said.get("groups"), list)):
            raise crashed
        groups: dict[str, dict[str, Attribute]] = {}
        datasets: dict[str, Dataset] = {}
        try:
            for name, attributes in said["groups"]:
                if not isinstance(name, str) or name in groups or not isinstance(attributes, dict):
                    raise crashed
                if name:
                    check_name(name, file=self.path)
                if not all(_is_attribute(a) for a in attributes.values()):
                    raise crashed
                groups[name] = attributes
            for name, code, shape in said["datasets"]:
                if not isinstance(name, str) or name in groups or name in datasets:
                    raise crashed
                check_name(name, file=self.path)
                datasets[name] = self._dataset(name, code, shape, crashed)
        except (TypeError, ValueError, KeyError):
            raise crashed from None
        if "" not in groups:
            raise crashed
        return groups, tuple(datasets.values())

    def _dataset(self, name: str, code: Any, shape: Any, crashed: BadInput) -> Dataset:
        if code is None and shape is None:
            return Dataset(name, None, None)
        if not isinstance(code, str) or not isinstance(shape, list) or len(shape) > 32:
            raise crashed
        if not all(type(n) is int and n >= 0 for n in shape):
            raise crashed
        dtype = np.dtype(code)
        dtype_code(dtype, file=self.path, tensor=name)
        nbytes = math.prod(shape) * dtype.itemsize
        # A length of zero makes any shape empty, which NumPy does not believe beyond what it can count.
        if math.prod(n for n in shape if n) * dtype.itemsize >= 1 << 62:
            raise BadInput("its shape is not valid", file=self.path, tensor=name)
        if nbytes > _DEFLATE_RATIO * self.size_bytes + _FILL_BYTES_AT_MOST:
            raise BadInput(f"{self.size_bytes} bytes claim to hold {nbytes}", file=self.path, tensor=name)
        return Dataset(name, dtype, tuple(shape))


def _is_attribute(value: object) -> bool:
    if isinstance(value, str):
        return True
    if isinstance(value, list):
        return all(isinstance(v, str) for v in value)
    return isinstance(value, dict) and _numbers(value) is not None


def _numbers(value: Mapping[str, Any]) -> Array | None:
    """The array that a numeric attribute stands for, None when it does not stand for one."""
    try:
        dtype, shape, text = np.dtype(str(value["dtype"])), value["shape"], value["base64"]
        if dtype.kind not in "biuf" or not all(type(n) is int for n in shape):
            return None
        return np.frombuffer(base64.b64decode(text, validate=True), dtype).reshape(shape)
    except (KeyError, TypeError, ValueError):
        return None


def is_hdf5(head: bytes) -> bool:
    return head.startswith(SIGNATURE)


# What was looked at last: sniffing asks two formats about a file and then reads it, with one child for all three.
_last_lock = threading.Lock()
_last: tuple[str, _Identity, File | BadInput] | None = None


def opened(path: Path) -> File:
    """The file at `path`, from the last look at it where there was one.

    Raises:
        BadInput: see `File`.
        OutputError: it cannot be read.
        MissingDependency: h5py is not installed.
    """
    global _last
    with _last_lock:
        found = _look(path)
        # Whoever reads the file owns the child from now on: it ends with the model.
        _last = None
        if isinstance(found, BadInput):
            raise found
        return found


def holds_keras(path: Path) -> bool:
    """Whether the HDF5 file at `path` is a Keras model. False for a damaged file, which `opened` will refuse."""
    with _last_lock:
        found = _look(path)
    if isinstance(found, BadInput):
        return False
    return "model_weights" in found.groups or any(a in ("layer_names", "layer_names0") for a in found.groups[""])


def _look(path: Path) -> File | BadInput:
    global _last
    where = os.path.abspath(path)
    identity = _identity(where, path)
    if _last is not None and _last[:2] == (where, identity):
        return _last[2]
    found: File | BadInput
    try:
        found = File(path)
    except BadInput as error:
        found = error.with_traceback(None)
    _last = (where, identity, found)
    return found


# ------------------------------------------------------------------------------------------------------- writing

# HDF5 keeps an attribute in its object's header, which holds 64 KiB; Keras splits longer lists at this size.
_LIST_BYTES_AT_MOST = 64512


class Output:
    """An HDF5 file being written: readable by every HDF5 library since 1.8, and the same bytes each time."""

    def __init__(self, file: Any, path: Path):
        self._file = file
        self._path = path
        self._groups = {""}
        self.stored: dict[str, int] = {}
        self._datasets: set[str] = set()

    def put(self, name: str, values: Array, path: str, *, pack: bool) -> None:
        """Write the tensor `name` at `path`; with `pack`, shuffled and deflated. A scalar cannot be packed."""
        self._claim(path, name)
        little = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
        packing: dict[str, Any] = {}
        if pack and little.size > 1:
            packing = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
        dataset = self._file.create_dataset(path, data=little, dtype=little.dtype, track_times=False, **packing)
        self.stored[name] = int(dataset.id.get_storage_size()) if little.size else 0

    def put_empty(self, path: str) -> None:
        """An HDF5 "empty" dataset, as Chainer writes for None."""
        import h5py  # type: ignore[import-untyped]

        self._claim(path, path)
        self._file.create_dataset(path, data=h5py.Empty("f"), track_times=False)

    def _claim(self, path: str, tensor: str) -> None:
        check_name(path, file=self._path)
        above, _, last = path.rpartition("/")
        if last in ("", "."):
            raise BadInput("HDF5 cannot hold a name with an empty part", file=self._path, tensor=tensor)
        self.group(above, tensor=tensor)
        if path in self._groups or path in self._datasets:
            raise BadInput("HDF5 cannot hold two things of this name", file=self._path, tensor=tensor)
        self._datasets.add(path)

    def group(self, path: str, *, tensor: str | None = None) -> None:
        """Make the group at `path` and those above it, where they are not there yet."""
        if path in self._groups:
            return
        check_name(path, file=self._path)
        above, _, last = path.rpartition("/")
        if last in ("", ".") or path in self._datasets:
            what = "two things of this name" if path in self._datasets else "a name with an empty part"
            raise BadInput(f"HDF5 cannot hold {what}", file=self._path, tensor=tensor or path)
        self.group(above, tensor=tensor)
        self._file.create_group(path, track_order=False)
        self._groups.add(path)

    def attribute(self, group: str, name: str, value: Attribute) -> None:
        """Set an attribute as Keras does: a text as variable-length bytes, a list as fixed-length ones."""
        import h5py

        check_name(name, file=self._path)
        attributes = self._file[f"/{group}"].attrs
        if isinstance(value, str):
            attributes.create(name, self._bytes(value, name), dtype=h5py.string_dtype("ascii"))
            return
        if isinstance(value, list):
            # NumPy makes an empty list float64, and so does Keras.
            items = np.array([self._bytes(v, name) for v in value]) if value else np.empty(0)
            if items.nbytes <= _LIST_BYTES_AT_MOST:
                attributes.create(name, items)
                return
            if items.dtype.itemsize > _LIST_BYTES_AT_MOST:
                raise BadInput(f"an entry of the attribute {printable(name)} is too long for HDF5", file=self._path)
            for i, part in enumerate(np.array_split(items, -(-items.nbytes // (_LIST_BYTES_AT_MOST // 2)))):
                attributes.create(f"{name}{i}", part)
            return
        numbers = _numbers(value)
        if numbers is None or numbers.nbytes > _LIST_BYTES_AT_MOST:
            raise BadInput(f"the attribute {printable(name)} is not valid", file=self._path)
        attributes.create(name, numbers, dtype=numbers.dtype)

    def _bytes(self, text: str, name: str) -> bytes:
        if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise BadInput(f"HDF5 cannot hold the text of the attribute {printable(name)}", file=self._path)
        return text.encode()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Output]:
    """An HDF5 file that appears at `path` when the block ends well.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
        MissingDependency: h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise MissingDependency("h5py", "h5") from None
    with atomic_file(path) as out:
        try:
            # Bounds of its own: the oldest form of everything, whatever the library's default is today.
            with h5py.File(out.name, "w", libver=("earliest", "v108")) as file:
                yield Output(file, path)
        except OSError as error:
            # The binding puts the library's inner state into the words of an error; the number says enough.
            raise OSError(error.errno, os.strerror(error.errno)) if error.errno else error from error
        except RuntimeError as error:
            # How the binding says that the last bytes did not reach the disk.
            raise OutputError(f"it cannot be written: {printable(error)}", file=path) from error
