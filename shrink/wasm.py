"""Compiled routines in Python: wasmtime, which is optional, runs them, in the memory of their own instance."""

from __future__ import annotations

import atexit
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import MissingDependency

__all__ = ["Instance"]

_PAGE = 65536
_PAGES_AT_MOST = 65536
_ALIGNED = 16


@functools.cache
def _compiled(path: Path) -> tuple[Any, Any]:
    """(engine, module), compiled once per process. Raises MissingDependency."""
    try:
        import wasmtime
    except ImportError:
        raise MissingDependency("wasmtime", "calibrate") from None
    engine = wasmtime.Engine()
    return engine, wasmtime.Module(engine, path.read_bytes())


# When the interpreter ends, wasmtime may go before what it made, which then complains.
atexit.register(_compiled.cache_clear)


class Instance:
    """One instance of a module, with the memory from `heap` on in the hands of the caller; for one thread at a time.

    Raises:
        MissingDependency: wasmtime is not installed.
    """

    def __init__(self, path: Path):
        engine, module = _compiled(path)
        import wasmtime

        self._store = wasmtime.Store(engine)
        exports = wasmtime.Instance(self._store, module, []).exports(self._store)
        self._functions: dict[str, Any] = {n: f for n, f in exports.items() if isinstance(f, wasmtime.Func)}
        memory = exports["memory"]
        if not isinstance(memory, wasmtime.Memory):
            raise TypeError("a module without memory")
        self._memory = memory
        self.heap = -(-self.call("heap") // _ALIGNED) * _ALIGNED

    def call(self, name: str, *arguments: float) -> int:
        """Call an exported function; its result as an unsigned number, 0 where it has none."""
        signed = (a - (a >> 31 << 32) if isinstance(a, int) else a for a in arguments)
        result: int | None = self._functions[name](self._store, *signed)
        return (result or 0) & 0xFFFFFFFF

    def lay_out(self, *sizes: int, start: int | None = None) -> list[int]:
        """Aligned addresses for blocks of so many bytes, from `start` or the heap on, and the one behind them.

        Memory grows when they do not fit; its content stays.

        Raises:
            MemoryError: they do not fit into 4 GiB, or there is no memory.
        """
        addresses = [self.heap if start is None else start]
        for size in sizes:
            addresses.append(addresses[-1] + -(-size // _ALIGNED) * _ALIGNED)
        missing = addresses[-1] + _ALIGNED - self._memory.data_len(self._store)
        if missing > 0:
            pages = -(-missing // _PAGE)
            if self._memory.size(self._store) + pages > _PAGES_AT_MOST:
                raise MemoryError(f"{addresses[-1]} bytes where WebAssembly has room for 4 GiB")
            import wasmtime

            try:
                self._memory.grow(self._store, pages)
            except wasmtime.WasmtimeError as error:
                raise MemoryError(str(error)) from None
        return addresses

    def view(self, address: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The memory at an address as an array. It is void once the memory grows."""
        count = int(np.prod(shape, dtype=np.int64))
        whole: NDArray[Any] = np.asarray(self._memory.get_buffer_ptr(self._store), np.uint8)
        values: NDArray[Any] = whole[address : address + count * np.dtype(dtype).itemsize].view(dtype)
        return values.reshape(shape)
