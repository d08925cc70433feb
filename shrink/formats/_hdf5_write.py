"""HDF5 files of ours, written by a child, see `_hdf5_process`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from shrink.errors import BadInput, OutputError, printable
from shrink.files import atomic_file
from shrink.formats._hdf5_child import Array, Attribute, numbers
from shrink.formats._hdf5_process import Child, Crash, Gone, Refused
from shrink.model import check_name

__all__ = ["Output", "writing"]

# HDF5 keeps an attribute in its object's header, which holds 64 KiB; Keras splits longer lists at this size.
_LIST_BYTES_AT_MOST = 64512

# A packed dataset pays 2 KiB and more for the index of its chunks: less than this is not worth packing.
_PACKED_BYTES_AT_LEAST = 4096

# No foreign bytes are read here, so this bounds only how long a disk may take over one tensor.
_WRITING_WALL_S = 3600.0


class Output:
    """An HDF5 file being written: readable by every HDF5 library since 1.8, and the same bytes each time.

    `stored` are the bytes that each tensor takes, by its name.
    """

    def __init__(self, child: Child, path: Path):
        self._child = child
        self._path = path
        self._groups = {""}
        self._datasets: set[str] = set()
        self.stored: dict[str, int] = {}

    def put(self, name: str, values: Array, path: str, *, pack: bool) -> None:
        """Write the tensor `name` at `path`; with `pack`, shuffled and deflated where that can pay."""
        self._claim(path, name)
        little = np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False)).reshape(values.shape)
        pack = pack and little.nbytes >= _PACKED_BYTES_AT_LEAST
        request = {"path": path, "dtype": little.dtype.str, "shape": little.shape, "pack": pack}
        self.stored[name] = self._ask({"do": "put", **request}, little.reshape(-1).view(np.uint8).data)

    def put_none(self, path: str) -> None:
        """An HDF5 "empty" dataset, as Chainer writes for None."""
        self._claim(path, path)
        self._ask({"do": "none", "path": path})

    def group(self, path: str, *, tensor: str | None = None) -> None:
        """Make the group at `path` and those above it, where they are not there yet."""
        if path in self._groups:
            return
        self._possible(path, tensor or path)
        self.group(path.rpartition("/")[0], tensor=tensor)
        self._ask({"do": "group", "path": path})
        self._groups.add(path)

    def attribute(self, group: str, name: str, value: Attribute) -> None:
        """Set an attribute of a group as Keras does: a text as variable-length bytes, a list as fixed-length ones."""
        check_name(name, file=self._path)
        shown = printable(name)
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        if any("\0" in text or any("\ud800" <= c <= "\udfff" for c in text) for text in texts):
            raise BadInput(f"HDF5 cannot hold the text of the attribute {shown}", file=self._path)
        parts: dict[str, Attribute] = {name: value}
        width = max((len(text.encode()) for text in texts), default=0) or 1
        if isinstance(value, list) and width * len(value) > _LIST_BYTES_AT_MOST:
            if width > _LIST_BYTES_AT_MOST:
                raise BadInput(f"an entry of the attribute {shown} is too long for HDF5", file=self._path)
            step = _LIST_BYTES_AT_MOST // width
            parts = {f"{name}{i // step}": value[i : i + step] for i in range(0, len(value), step)}
        elif isinstance(value, dict):
            values = numbers(value)
            if values is None or values.nbytes > _LIST_BYTES_AT_MOST:
                raise BadInput(f"the attribute {shown} is not valid", file=self._path)
        for part, content in parts.items():
            self._ask({"do": "attribute", "group": group, "name": part, "value": content, "width": width})

    def close(self) -> None:
        """Have the last bytes written. Only then is the file whole."""
        self._ask({"do": "close"})

    def _ask(self, request: Mapping[str, object], data: bytes | memoryview = b"") -> int:
        try:
            said = self._child.ask(request, data, into=bytearray(), wall_s=_WRITING_WALL_S)
        except Refused as answer:
            what = os.strerror(answer.errno) if answer.errno else f"it cannot be written: {printable(answer.what)}"
            raise OutputError(what, file=self._path) from None
        except (Crash, Gone):
            raise OutputError("the HDF5 library crashed while writing it", file=self._path) from None
        return int(said.get("stored", 0))

    def _claim(self, path: str, tensor: str) -> None:
        self._possible(path, tensor)
        self.group(path.rpartition("/")[0], tensor=tensor)
        self._datasets.add(path)

    def _possible(self, path: str, tensor: str) -> None:
        """Refuse what HDF5 would take for something else: an empty part, or a path that is taken."""
        check_name(path, file=self._path)
        if path.rpartition("/")[2] in ("", "."):
            raise BadInput("HDF5 cannot hold a name with an empty part", file=self._path, tensor=tensor)
        if path in self._groups or path in self._datasets:
            raise BadInput("HDF5 cannot hold two things of this name", file=self._path, tensor=tensor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Output]:
    """An HDF5 file that appears at `path` when the block ends well.

    Raises:
        OutputError: it cannot be written; nothing is left behind.
        MissingDependency: h5py is not installed.
    """
    with atomic_file(path) as out:
        child = Child("write", os.path.abspath(out.name))
        try:
            output = Output(child, path)
            yield output
            output.close()
        finally:
            child.close()
