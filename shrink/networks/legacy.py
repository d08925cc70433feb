"""Chainer 7.8.1, its onnx_chainer and WebDNN 1.2.11 on today's Python, NumPy and onnx.

They name things that are gone. Their files are mended as Python reads them, line by line, in memory: neither what is
installed nor anybody's `numpy`, `collections` or `onnx` changes.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, ModuleType
from typing import Any

from shrink.errors import MissingDependency

__all__ = ["import_chainer", "import_onnx_chainer", "import_webdnn"]

_DTYPE_NUMBERS = (
    "from onnx.mapping import NP_TYPE_TO_TENSOR_TYPE",
    "import numpy, onnx; NP_TYPE_TO_TENSOR_TYPE = {numpy.dtype(t): onnx.helper.np_dtype_to_tensor_dtype(numpy.dtype(t))"
    " for t in '?bBhHiIqQefd'}",
)
_LIFETIMES = """
        for a in allocations.values():
            if a.begin == _T_UNKNOWN:
                a.begin = 0

            if a.end == _T_UNKNOWN:
                a.end = T_LAST
"""
# Module -> what is replaced there, and by what.
_MENDS: dict[str, Sequence[tuple[str, str]]] = {
    # It warns of old GPU libraries and of macOS's BLAS, with modules that newer Pythons do not have.
    "chainer._environment_check": [
        ("import numpy.distutils.system_info\n", ""),
        ("import pkg_resources\n", ""),
        ("    _check_osx_numpy_backend()\n", ""),
        ("    _check_optional_dependencies()\n", ""),
    ],
    "chainer.functions.array.as_strided": [
        ("np.sctypes['int']", "(np.int8, np.int16, np.int32, np.int64)"),
        ("np.sctypes['float']", "(np.float16, np.float32, np.float64)"),
    ],
    "chainer.functions.array.resize_images": [("dtype=numpy.float)", "dtype=float)")],
    "onnx_chainer.export": [_DTYPE_NUMBERS],
    "onnx_chainer.functions.array": [_DTYPE_NUMBERS],
    "onnx_chainer.functions.math": [_DTYPE_NUMBERS],
    # The table says how to spell constants in readable numbers; in none of its types they stay bytes.
    "onnx_chainer.context": [("onnx.mapping.STORAGE_TENSOR_TYPE_TO_FIELD.get(", "{}.get(")],
    "webdnn": [
        ("import pkg_resources", "import importlib.metadata"),
        ('pkg_resources.require("webdnn")[0].version', 'importlib.metadata.version("webdnn")'),
    ],
    "webdnn.graph.operators.util": [("from collections import Collection", "from collections.abc import Collection")],
    # In an f-string, where Python 3.12 and later take no bare loop.
    "webdnn.graph.operators.elementwise": [
        ("{y_shape_dict[a] for a in y_axes}", "{[y_shape_dict[a] for a in y_axes]}"),
    ],
    "webdnn.util.json": [("np.int64, np.int)", "np.int64, int)"), ("np.float64, np.float)", "np.float64, float)")],
    # A slip of WebDNN's own: indented into the loop before it, this gives a buffer that is not free yet away for good,
    # so that none is ever used again.
    "webdnn.backend.code_generator.allocator": [
        (_LIFETIMES, "\n".join(line[4:] for line in _LIFETIMES.split("\n"))),
    ],
    "webdnn.backend.webassembly.graph_descriptor": [("np.fromstring(", "np.frombuffer(")],
}


def import_chainer() -> ModuleType:
    """Chainer. Raises MissingDependency."""
    return _import("chainer", extra="chainer")


def import_onnx_chainer() -> ModuleType:
    """Chainer's own exporter to ONNX. Raises MissingDependency."""
    import_chainer()
    _import("onnx", extra="onnx")
    return _import("onnx_chainer", extra="chainer")


def import_webdnn() -> ModuleType:
    """WebDNN's converter, with its front end for Chainer and its back end for WebAssembly. Raises MissingDependency."""
    import_chainer()
    webdnn = _import("webdnn", extra="webdnn")
    _import("webdnn.frontend.chainer", extra="webdnn")
    _import("webdnn.backend.webassembly.generator", extra="webdnn")
    return webdnn


def _import(name: str, *, extra: str) -> ModuleType:
    try:
        with warnings.catch_warnings(), _mending():
            # Spellings that only warn today, as a backslash in a string; and that they are old.
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise MissingDependency(name, extra) from None
        raise
    if module.__spec__ is not None and not module.__spec__.has_location:
        # A folder of that name beside a network file, which Python takes for a package where nothing is installed.
        raise MissingDependency(name, extra)
    return module


@contextmanager
def _mending() -> Iterator[None]:
    sys.meta_path.insert(0, _Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)


class _Finder:
    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname in _MENDS else None
        if spec and spec.origin:
            spec.loader = _Mender(fullname, spec.origin)
        return spec


class _Mender(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Not by way of the bytecode on disk, which other importers share.
        return self.source_to_code(mended(fullname, self.get_data(self.path)), self.path)


def mended(module: str, source: bytes) -> bytes:
    for old, new in _MENDS[module]:
        source = source.replace(old.encode(), new.encode())
    return source
