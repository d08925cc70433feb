"""A network and its stages, run once on the same input in ONNX Runtime: whether they compute the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, printable
from shrink.formats import onnx as onnx_format
from shrink.formats._onnx_proto import NAMED_DTYPES
from shrink.model import Model
from shrink.split._stages import RANDOM, Graph, graph_inputs

__all__ = ["Link", "compared"]

Values = dict[str, NDArray[Any]]

_WHOLE = ".whole.onnx"
# Only errors: what a runtime warns of is said of the original too.
_ERRORS = 3


@dataclass(frozen=True)
class Link:
    """A stage as a file, and the names of what it takes and gives."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def compared(model: Model, graph: Graph, folder: Path, chain: Sequence[Link]) -> str:
    """A sentence on how the stages' results differ from the whole network's. `folder` may be written to.

    Raises:
        BadInput: the network runs, and its stages do not.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return "not compared with the whole network: onnxruntime is not installed"
    random = sorted({op.name for op in graph.ops} & RANDOM)
    if random:
        return f"not compared with the whole network: it draws random numbers ({', '.join(random)})"
    feeds = _feeds(graph)
    whole = folder / _WHOLE
    try:
        onnx_format.write(model, model.tensors, whole, None)
        expected = _run(onnxruntime, whole, feeds, graph.outputs)
    except Exception as error:
        return f"not compared with the whole network: ONNX Runtime does not run it: {_said(error)}"
    finally:
        whole.unlink(missing_ok=True)
    try:
        return _difference(expected, _run_chain(onnxruntime, chain, feeds, graph.outputs))
    except Exception as error:
        raise BadInput(f"ONNX Runtime runs it, but not its stages: {_said(error)}", file=graph.source) from error


def _feeds(graph: Graph) -> Values:
    rng = np.random.default_rng(0)
    feeds = {}
    for info in graph_inputs(graph.proto):
        dtype, shape = NAMED_DTYPES[info.type.tensor_type.elem_type], graph.input_shapes[info.name]
        # Integers are indices as a rule: 0 and 1 are there in every table.
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feeds[info.name] = np.asarray(values).astype(dtype)
    return feeds


def _run(onnxruntime: Any, path: Path, feeds: Mapping[str, Any], outputs: Sequence[str]) -> Values:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {info.name for info in session.get_inputs()}
    run = onnxruntime.RunOptions()
    run.log_severity_level = _ERRORS
    values = session.run(list(outputs), {name: value for name, value in feeds.items() if name in taken}, run)
    return dict(zip(outputs, values, strict=True))


def _run_chain(onnxruntime: Any, chain: Sequence[Link], feeds: Values, outputs: Sequence[str]) -> Values:
    held = dict(feeds)
    results: Values = {}
    for number, link in enumerate(chain):
        given = _run(onnxruntime, link.path, {name: held[name] for name in link.inputs}, link.outputs)
        held |= given
        results |= {name: value for name, value in given.items() if name in outputs}
        later = {name for other in chain[number + 1 :] for name in other.inputs}
        held = {name: value for name, value in held.items() if name in later}
    return results


def _difference(whole: Values, chained: Values) -> str:
    if all(_same_bits(whole[name], chained[name]) for name in whole):
        return "run in stages it computes what the whole network computes, bit for bit (ONNX Runtime, a random input)"
    worst = 0.0
    for name, values in whole.items():
        a, b = np.asarray(values), np.asarray(chained[name])
        if a.shape != b.shape or a.dtype != b.dtype or a.dtype.kind not in "fiub":
            return f"run in stages it gives another {printable(name)} than the whole network (ONNX Runtime)"
        # Where both are infinite alike, there is no difference.
        with np.errstate(invalid="ignore"):
            worst = max(worst, float(np.max(np.abs(a.astype("f8") - b.astype("f8")), initial=0.0, where=a != b)))
    return f"run in stages it differs from the whole network by {worst:.3g} at most (ONNX Runtime, a random input)"


def _same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype != object:
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(np.array_equal(a, b))


def _said(error: BaseException) -> str:
    return printable(" ".join(str(error).split()), at_most=200)
