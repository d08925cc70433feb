"""A network on ONNX Runtime on this machine, whose weights can be exchanged from run to run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shrink.bench.plan import Values
from shrink.errors import BadInput, MissingDependency, printable
from shrink.export import Network
from shrink.formats._onnx_proto import NAMED_DTYPES, Reader, clear, parse

if TYPE_CHECKING:
    from onnx import TensorProto

__all__ = ["Native"]

# The scales of a Resize, the bounds of a Clip: ONNX Runtime wants to know such numbers while it builds the session.
_FEW = 8
# ONNX Runtime takes initializers for constants, which cannot be exchanged, below this version.
_IR_WITH_DEFAULTS = 4


class Native:
    """A session with the network's weights, on the CPU.

    With `exchange`, weights of more than a few values are inputs with a default too, which `run` can override. So one
    session serves all variants of the same graph, and nothing but the weights differs between their outputs.

    Raises:
        BadInput: the graph and the weights do not fit together, or ONNX Runtime does not run it.
        MissingDependency: onnx or onnxruntime is not installed.
    """

    def __init__(self, network: Network, *, exchange: bool = True):
        try:
            import onnxruntime  # type: ignore[import-untyped,unused-ignore]
        except ImportError:
            raise MissingDependency("onnxruntime", "bench") from None
        model = network.model
        self._file = model.source.path
        proto = parse(model.graph or b"", self._file)
        reader = Reader(self._file)
        entries = {entry.name: entry for entry in model.tensors}
        named = {info.name for info in proto.graph.input}
        self._initializers: dict[str, str] = {}
        # ONNX Runtime reads these whenever it likes.
        self._held: list[Any] = []
        names, values = [], []
        for slot in proto.graph.initializer:
            if reader.storage(slot) != "external":
                continue
            name = slot.external_data[0].value
            if name not in entries:
                raise BadInput("the graph needs it, but the model does not have it", file=self._file, tensor=name)
            array = _as_in_graph(entries[name].array, slot)
            if array.dtype.kind != "f" or array.size <= _FEW:
                clear(slot)
                slot.raw_data = array.tobytes()
                continue
            self._held.append(array)
            names.append(slot.name)
            values.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
            if not exchange:
                continue
            self._initializers[name] = slot.name
            if slot.name not in named:
                info = proto.graph.input.add(name=slot.name)
                info.type.tensor_type.elem_type = slot.data_type
                for n in slot.dims:
                    info.type.tensor_type.shape.dim.add(dim_value=n)
        proto.ir_version = max(proto.ir_version, _IR_WITH_DEFAULTS)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if names:
            options.add_external_initializers(names, values)
        self._held.append(values)
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise BadInput(f"ONNX Runtime does not take the network: {_said(error)}", file=self._file) from error
        self.outputs = [output.name for output in self._session.get_outputs()]

    @classmethod
    def of(cls, network: Network) -> Native:
        """One whose weights can be exchanged, or where an operator wants them to be constant, one where they cannot."""
        try:
            return cls(network)
        except BadInput:
            return cls(network, exchange=False)

    def exchangeable(self, name: str) -> bool:
        """Whether `run` can be given other values for this weight."""
        return name in self._initializers

    def run(self, feeds: Values, weights: Mapping[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
        """The outputs for one sample, with other values for the `weights` named. Raises BadInput."""
        given = {self._initializers[name]: array for name, array in (weights or {}).items()}
        try:
            found = self._session.run(None, {**feeds, **given})
        except Exception as error:
            raise BadInput(f"ONNX Runtime does not run the network: {_said(error)}", file=self._file) from error
        return dict(zip(self.outputs, map(np.asarray, found), strict=True))


def _as_in_graph(values: NDArray[Any], slot: TensorProto) -> NDArray[Any]:
    dtype = NAMED_DTYPES[slot.data_type]
    if values.size != math.prod(slot.dims):
        raise BadInput(f"its shape is {list(values.shape)}, the graph's is {list(slot.dims)}", tensor=slot.name)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(dtype, copy=False)).reshape(tuple(slot.dims))


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__, at_most=300)
