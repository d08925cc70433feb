"""Chainer `.npz`: snapshots of `save_npz`, trainer snapshots, and any other npz of plain arrays.

A trainer snapshot keeps its weights under `updater/model:<name>/` beside the optimizer's state; what is not a
weight there has the role `state`.
"""

from __future__ import annotations

import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from shrink.errors import BadInput
from shrink.files import atomic_file, file_size, io_errors
from shrink.formats._trainer import is_trainer, role_of
from shrink.model import Entry, Model, Source, Tensor, check_name, check_shape, dtype_code, plain_values

NAME = "chainer-npz"
SUFFIX = ".npz"
HOLDS = frozenset({"float32", "float16"})

_NPY_HEADER_AT_MOST = 10_000
# Deflate cannot do better than 1032 to 1; a member that claims more is not believed.
_DEFLATE_RATIO = 1032
# A fixed moment in place of the clock, so that the same model gives the same bytes. The earliest a zip can hold.
_EPOCH = (1980, 1, 1, 0, 0, 0)

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    tokenize.TokenError,  # from NumPy's reading of an old header
)


def sniff(path: Path, head: bytes) -> bool:
    return head[:4] in (b"PK\x03\x04", b"PK\x05\x06") or path.suffix.lower() == SUFFIX


def read(path: Path) -> Model:
    with io_errors(path):
        try:
            archive = zipfile.ZipFile(path)
        except _DAMAGE as error:
            raise BadInput(f"not a readable zip archive: {error}", file=path) from None
        if "model.weights.h5" in archive.namelist():
            raise BadInput("a Keras 3 model, whose weights are a file in it", file=path, hint="unzip model.weights.h5")
        # The archive stays open as long as its tensors: opening it reads the whole directory.
        members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            name = _tensor_name(member.filename, path)
            check_name(name, file=path)
            if name in members:
                raise BadInput("the archive holds this name twice", file=path, tensor=name)
            members[name] = member
        of_trainer = is_trainer(members)
        size = file_size(path)
        tensors = [_tensor(archive, member, name, path, of_trainer, size) for name, member in members.items()]
    return Model(tuple(tensors), Source(NAME, path, size), {"trainer": "1"} if of_trainer else {})


def _tensor_name(filename: str, path: Path) -> str:
    if not filename.endswith(".npy"):
        raise BadInput("the archive holds something else than arrays", file=path, tensor=filename)
    return filename[: -len(".npy")]


def _tensor(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, path: Path, of_trainer: bool, archive_bytes: int
) -> Tensor:
    def bad(what: str) -> BadInput:
        return BadInput(what, file=path, tensor=name)

    if member.compress_size > archive_bytes or member.file_size > _DEFLATE_RATIO * member.compress_size + 1024:
        raise bad(f"{member.compress_size} compressed bytes claim to hold {member.file_size}")
    try:
        with archive.open(member) as file:
            shape, fortran, dtype = _npy_header(file, bad)
            header_bytes = file.tell()
    except _DAMAGE as error:
        raise bad(f"its data is damaged: {error}") from None
    if dtype.hasobject:
        raise bad("it holds pickled objects, which are never loaded")
    little = dtype.newbyteorder("<")
    dtype_code(little, file=path, tensor=name)
    check_shape(shape, file=path, tensor=name)
    count = 1
    for n in shape:
        count *= n
    if header_bytes + count * dtype.itemsize != member.file_size:
        raise bad(
            f"its header claims {count * dtype.itemsize} bytes of values, {member.file_size - header_bytes} are there"
        )

    def load() -> NDArray[Any]:
        try:
            with io_errors(path), archive.open(member) as file:
                file.read(header_bytes)
                values = np.frombuffer(_exactly(file, count * dtype.itemsize, bad), dtype)
        except _DAMAGE as error:
            raise bad(f"its data is damaged: {error}") from None
        values = values.reshape(shape, order="F" if fortran else "C")
        return np.ascontiguousarray(values.astype(little, copy=False)).reshape(shape)

    return Tensor(name, little, shape, load, role_of(name, of_trainer))


def _npy_header(file: IO[bytes], bad: Callable[[str], BadInput]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise bad(f"npy version {version} is not supported")
    with warnings.catch_warnings():
        # Python 2 wrote shapes such as (16L, 3L), which NumPy reads, with a warning.
        warnings.simplefilter("ignore")
        shape, fortran, dtype = readers[version](file, max_header_size=_NPY_HEADER_AT_MOST)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise bad("its shape is not valid")
    return tuple(shape), fortran, dtype


def _exactly(file: IO[bytes], length: int, bad: Callable[[str], BadInput]) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    done = 0
    while done < length:
        part = file.readinto(view[done : done + (1 << 20)])  # type: ignore[attr-defined]
        if not part:
            raise bad("the data ends early")
        done += part
    # Reading past the last byte is what makes zipfile check the CRC.
    if file.read(1):
        raise bad("there is more data than the header says")
    return data


def write(model: Model, entries: Iterable[Entry], path: Path, level: int | None) -> dict[str, int]:
    """An npz that `numpy.load` and `chainer.serializers.load_npz` take; deflated like `save_npz` does."""
    with atomic_file(path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        for entry in entries:
            member = zipfile.ZipInfo(entry.name + ".npy", _EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = 0o644 << 16
            with archive.open(member, "w", force_zip64=True) as file:
                npy.write_array(file, np.asarray(plain_values(entry)), allow_pickle=False)
        return {m.filename[: -len(".npy")]: m.compress_size for m in archive.infolist()}
