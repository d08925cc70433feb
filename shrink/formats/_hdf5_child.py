"""What runs in the child: it reads a foreign HDF5 file, or writes one of ours. See `_hdf5_process`.

This file is loaded by its path, alone and without the rest of shrink, whose import would cost more than reading most
models. A reading child can open nothing but the model. It walks the file itself, refuses whatever a saved model has
no use for (links, storage in other files, objects, unknown filters, sizes that no bytes stand behind) and answers
two requests:

    {"do": "index"}                   -> JSON: groups with their attributes, datasets with dtype and shape
    {"do": "values", "name": path}    -> the values, little-endian, C order, in frames

A reply is a run of frames, a kind (D data, J the end, with JSON, E an error, with JSON) and a length before each.
For a writing child see `_write`.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import json
import math
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["DEFLATE_RATIO", "FILL_BYTES_AT_MOST", "FRAME", "Array", "Attribute", "numbers", "serve"]

Array = NDArray[Any]
Attribute = str | list[str] | dict[str, Any]
"""Text, a list of texts, or numbers as {"dtype": "<f8", "shape": [2], "base64": …}."""

FRAME = struct.Struct(">cQ")

# Deflate cannot do better than 1032 to 1; a dataset that claims more is not believed. What no stored bytes stand
# behind is a fill value; a file may hold this much of it in all.
DEFLATE_RATIO = 1032
FILL_BYTES_AT_MOST = 16 << 20

_OBJECTS_AT_MOST = 100_000
_DEPTH_AT_MOST = 64
_NAME_BYTES_AT_MOST = 4096
_ATTRIBUTES_AT_MOST = 1000
_TEXT_BYTES_AT_MOST = 64 << 20

_SLAB_BYTES = 8 << 20


class _Refused(Exception):
    """What the child answers with E: what is wrong, and the dataset it is wrong with."""

    def __init__(self, what: str, name: str | None = None):
        super().__init__(what)
        self.what = what
        self.name = name


def serve() -> None:
    """The child: take requests from stdin, answer on stdout, end when stdin does."""
    # An interrupt reaches the whole process group; the parent ends us in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not get between the frames.
    out = os.dup(1)
    os.dup2(2, 1)

    def send(kind: bytes, data: bytes | memoryview) -> None:
        for part in (FRAME.pack(kind, len(data)), data):
            view = memoryview(part)
            while len(view):
                view = view[os.write(out, view) :]

    def send_json(kind: bytes, value: object) -> None:
        send(kind, json.dumps(value, separators=(",", ":")).encode())

    try:
        import h5py  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        send_json(b"E", {"missing": "h5py"})
        return
    requests = sys.stdin.buffer
    start = json.loads(requests.readline())
    path = bytes.fromhex(start["path"])
    if start["do"] == "write":
        try:
            _write(path, requests, lambda answer: send_json(b"J", answer))
        except Exception as error:
            errno = error.errno if isinstance(error, OSError) else None
            send_json(b"E", {"what": str(error) or type(error).__name__, "errno": errno})
        # Not the ordinary end: what the library cannot write it would try to write again, and crash.
        os._exit(0)
    # Soon nothing more can be opened, so these are now: codecs, and the system's word on how much memory is mapped.
    for encoding in ("ascii", "latin-1", "utf-8"):
        codecs.lookup(encoding)
    statm = None
    with contextlib.suppress(OSError):
        statm = os.open("/proc/self/statm", os.O_RDONLY)
    file: _Foreign | None = None
    for line in requests:
        request = json.loads(line)
        _limit(request["cpu_s"], request["memory_bytes"], statm)
        try:
            if file is None:
                file = _Foreign(path, start["size_bytes"])
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


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused(f"{what} is not UTF-8") from None


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
        self._once(self.root, "")
        self._walk(self.root, "", 0)
        return {"groups": self.groups, "datasets": self.datasets}

    def _walk(self, group: Any, prefix: str, depth: int) -> None:
        from h5py import h5d, h5g, h5o, h5t

        if depth > _DEPTH_AT_MOST:
            raise _Refused(f"its groups are nested more than {_DEPTH_AT_MOST} deep")
        self.groups.append((prefix, self._attributes(group, prefix)))
        for link, kind in self._links(group, prefix):
            name = self._name(link, prefix)
            self._must_be_hard(kind, name)
            item = h5o.open(group, link)
            self._once(item, name)
            if isinstance(item, h5g.GroupID):
                self._walk(item, name, depth + 1)
            elif isinstance(item, h5d.DatasetID):
                self._dataset(item, name)
            elif isinstance(item, h5t.TypeID):
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

        group.links.iterate(take, info=True)
        if len(links) > _OBJECTS_AT_MOST:
            raise _Refused(f"it holds more than {_OBJECTS_AT_MOST} objects", prefix or None)
        return sorted(links)

    def _name(self, link: bytes, prefix: str) -> str:
        name = _utf8(link, "a name")
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
        if self.stored_bytes > self.size_bytes or self.fill_bytes > FILL_BYTES_AT_MOST:
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
        return _Described(dtype, shape, stored, stored * (DEFLATE_RATIO if packs else 1), rows)

    def _dtype(self, tid: Any, name: str | None) -> np.dtype[Any]:
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
        plain: np.dtype[Any] = np.dtype(dtype.str)
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
            raise _Refused(f"a group has more than {_ATTRIBUTES_AT_MOST} attributes")
        found: dict[str, Attribute] = {}
        for i in range(count):
            attribute = h5a.open(group, index=i)
            name = _utf8(attribute.name, "the name of an attribute")
            try:
                found[name] = self._attribute(attribute)
            except _Refused as refused:
                of = f" of the group {prefix}" if prefix else ""
                raise _Refused(f"the attribute {name}{of}: {refused.what}") from None
        return found

    def _attribute(self, attribute: Any) -> Attribute:
        from h5py import h5s, h5t

        tid = attribute.get_type()
        space = attribute.get_space()
        extent = space.get_simple_extent_type()
        if extent == h5s.NULL:
            raise _Refused("it has no value")
        shape = tuple(int(n) for n in space.shape) if extent == h5s.SIMPLE else ()
        nbytes = math.prod(shape) * int(tid.get_size())
        if nbytes > min(_TEXT_BYTES_AT_MOST, self.size_bytes):
            raise _Refused(f"it claims to hold {nbytes} bytes")
        if tid.get_class() != h5t.STRING:
            dtype = self._dtype(tid, None)
            values: Array = np.empty(shape, dtype)
            if values.size:
                attribute.read(values)
            little = dtype.newbyteorder("<")
            text = base64.b64encode(values.astype(little, copy=False).tobytes()).decode("ascii")
            return {"dtype": little.str, "shape": list(shape), "base64": text}
        if len(shape) > 1:
            raise _Refused("it is a table of texts, which is not supported")
        varying = tid.is_variable_str()
        texts: Array = np.empty(shape, tid.dtype if varying else np.dtype(f"S{tid.get_size()}"))
        if texts.size:
            # A memory type of the same character set, or the library refuses to convert.
            attribute.read(texts, None if varying else tid)
        padding = h5t.STR_NULLPAD if varying else tid.get_strpad()
        decoded = [self._text(item, padding) for item in texts.reshape(-1).tolist()]
        return decoded if shape else decoded[0]

    def _text(self, value: bytes | str, padding: int) -> str:
        from h5py import h5t

        item = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value or b""
        if padding == h5t.STR_NULLTERM:
            item = item.partition(b"\0")[0]
        elif padding == h5t.STR_SPACEPAD:
            item = item.rstrip(b" ")
        self.text_bytes += len(item)
        if self.text_bytes > _TEXT_BYTES_AT_MOST:
            raise _Refused(f"the attributes together hold more than {_TEXT_BYTES_AT_MOST} bytes of text")
        return _utf8(item, "its text")

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
        if described.nbytes > described.believed_bytes + FILL_BYTES_AT_MOST:
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
            yield np.ascontiguousarray(slab.astype(little, copy=False)).reshape(-1).view(np.uint8).data


def _write(path: bytes, requests: BinaryIO, answer: Callable[[object], None]) -> None:
    """Write the file that the requests describe; each is answered when it is done.

    {"do": "put", "path", "dtype", "shape", "pack"}, then the values' bytes     -> stored bytes
    {"do": "none", "path"}                      an HDF5 "empty" dataset
    {"do": "group", "path"}
    {"do": "attribute", "group", "name", "value", "width"}      width: bytes of each text in a list
    {"do": "close"}
    """
    import h5py

    # Bounds of its own: the oldest form of everything, whatever the library's default is today.
    with h5py.File(path, "w", libver=("earliest", "v108")) as file:
        for line in requests:
            request = json.loads(line)
            stored = 0
            if request["do"] == "put":
                stored = _write_values(file, request, requests)
            elif request["do"] == "none":
                file.create_dataset(request["path"], data=h5py.Empty("f"), track_times=False)
            elif request["do"] == "group":
                file.create_group(request["path"], track_order=False)
            elif request["do"] == "attribute":
                attributes, name, value = file[f"/{request['group']}"].attrs, request["name"], request["value"]
                if isinstance(value, str):
                    attributes.create(name, value.encode(), dtype=h5py.string_dtype("ascii"))
                elif isinstance(value, list):
                    # NumPy makes an empty list float64, and so does Keras.
                    width = f"S{request['width']}"
                    attributes.create(name, np.array([v.encode() for v in value], width) if value else np.empty(0))
                else:
                    attributes.create(name, numbers(value))
            else:
                file.close()
            answer({"stored": stored})


def _write_values(file: Any, request: Mapping[str, Any], requests: BinaryIO) -> int:
    dtype, shape = np.dtype(request["dtype"]), tuple(request["shape"])
    data = bytearray(math.prod(shape) * dtype.itemsize)
    view = memoryview(data)
    while len(view):
        count = requests.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]
    packing: dict[str, Any] = {}
    if request["pack"]:
        packing = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
    values: Array = np.frombuffer(data, dtype).reshape(shape)
    dataset = file.create_dataset(request["path"], data=values, track_times=False, **packing)
    return int(dataset.id.get_storage_size()) if values.size else 0


def numbers(value: Mapping[str, Any]) -> Array | None:
    """The array that a numeric attribute stands for, None when it does not stand for one."""
    try:
        dtype, shape, text = np.dtype(str(value["dtype"])), value["shape"], value["base64"]
        if dtype.kind not in "biuf" or not all(type(n) is int for n in shape):
            return None
        values: Array = np.frombuffer(base64.b64decode(text, validate=True), dtype).reshape(shape)
    except (KeyError, TypeError, ValueError):
        return None
    return values
