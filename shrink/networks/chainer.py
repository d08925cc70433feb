"""Chainer networks: from a class in a user's file and a snapshot to an ONNX model with the same weights."""

from __future__ import annotations

import ast
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import BadInput, MissingDependency, UsageError, printable
from shrink.files import read_all
from shrink.formats import onnx as onnx_format
from shrink.model import Entry, Model
from shrink.networks.legacy import import_chainer, import_onnx_chainer
from shrink.pipeline import drop_state

__all__ = ["guessed_input", "is_network", "load", "numbered", "run", "seeded_inputs", "to_onnx", "variables"]

F32 = NDArray[np.float32]

_SPEC = re.compile(r"(?P<path>.+\.py):(?P<call>[^:/\\]+(\(.*\))?)", re.DOTALL)
# Sizes of pictures that networks are often made for; the first that one takes is used.
_SIDES = (64, 96, 128, 224, 256, 32, 28)
_SOURCE_AT_MOST = 10_000_000
# The version that belongs to opset 11, the newest that onnx_chainer writes; newer ones only shut out older runtimes.
_IR_VERSION = 6


def is_network(spec: str) -> bool:
    """Whether this names a network in a Python file, as in `networks.py:Generator` or `networks.py:Generator(100)`."""
    return _SPEC.fullmatch(spec) is not None


def load(spec: str, weights: Model) -> Any:
    """The chain that `spec` names, with these weights.

    This runs the file as if the user had: what lies beside it is run where it imports it, and not otherwise.
    Arguments are literals: `networks.py:Generator(100)`. A name without arguments is called too, unless it is a chain
    already.

    Raises:
        UsageError: `spec` is not FILE.py:NAME or FILE.py:NAME(literals), the file has no such name, or the name is a
            chain already and gets arguments.
        BadInput: the file or the call fails, gives no chain, or weights and parameters are not the same.
        MissingDependency: Chainer is not installed.
    """
    chainer = import_chainer()
    found = _SPEC.fullmatch(spec)
    if not found:
        raise UsageError(f"{printable(spec)} does not name a network", hint="FILE.py:NAME or FILE.py:NAME(100)")
    path = Path(found["path"])
    name, arguments, keywords = _call(found["call"])
    made = getattr(_run_file(path), name, None)
    if made is None:
        raise UsageError(f"there is no {name} in it", file=path)
    if isinstance(made, chainer.Link):
        if arguments or keywords:
            raise UsageError(f"{name} is a network already and takes no arguments", file=path, hint=f"give :{name}")
    else:
        try:
            made = made(*arguments, **keywords)
        except Exception as error:
            raise BadInput(f"{name} failed: {_said(error)}", file=path) from error
    if not isinstance(made, chainer.Link):
        raise BadInput(f"{name} gives {type(made).__name__}, not a Chainer network", file=path)
    _fill(made, drop_state(weights))
    return made


def run(chain: Any, inputs: Sequence[F32]) -> list[F32]:
    """What the network makes of the inputs, as in use: no training, nothing recorded."""
    chainer = import_chainer()
    with chainer.using_config("train", False), chainer.using_config("enable_backprop", False):
        return [v.array for v in variables(chain(*inputs))]


def guessed_input(chain: Any) -> tuple[int, ...] | None:
    """A shape, batch of one first, that the network takes as its only input; None where none of the likely ones does.

    Tried are those that fit one of its links, in their order: vectors for dense ones, pictures for convolutions.
    """
    for link in chain.links():
        weight = getattr(link, "W", None)
        if weight is None or getattr(weight, "array", None) is None:
            continue
        kind, shape = type(link).__name__, weight.array.shape
        shapes: list[tuple[int, ...]] = []
        if kind == "Linear":
            shapes = [(1, shape[1])]
        elif kind in ("Convolution2D", "DilatedConvolution2D", "DepthwiseConvolution2D"):
            channels = shape[1] * getattr(link, "groups", 1)
            shapes = [(1, channels, side, side) for side in _SIDES]
        elif kind == "Deconvolution2D":
            shapes = [(1, shape[0], side, side) for side in (1, 4, 8, *_SIDES)]
        for candidate in shapes:
            try:
                run(chain, [np.zeros(candidate, np.float32)])
            except Exception:
                # Whatever it says, it does not take that.
                continue
            return candidate
    return None


def variables(result: Any) -> list[Any]:
    """What a network returned, in order."""
    if isinstance(result, Mapping):
        return list(result.values())
    return list(result) if isinstance(result, list | tuple) else [result]


def seeded_inputs(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> list[F32]:
    """Normally distributed inputs of these shapes, always the same."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def to_onnx(chain: Any, input_shapes: Sequence[tuple[int, ...]], weights: Model) -> tuple[Model, float]:
    """The network as an ONNX model, and the largest |error| of its outputs on a seeded input, against Chainer's own.

    Tensors have the names they have in `weights`; those that are encoded there stay so.

    Raises:
        BadInput: the network does not run on such inputs, or onnx_chainer cannot express it.
        MissingDependency: chainer, onnx or onnxruntime is not installed.
    """
    onnx_chainer = import_onnx_chainer()
    import onnx

    inputs = seeded_inputs(input_shapes)
    file = weights.source.path
    try:
        expected = run(chain, inputs)
    except Exception as error:
        shapes = " and ".join(",".join(map(str, s)) for s in input_shapes)
        raise BadInput(f"the network does not take an input of {shapes}: {_said(error)}") from error
    kept = {t.name: t for t in drop_state(weights).tensors}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions, and what it names itself
            proto = onnx_chainer.export(
                chain,
                list(inputs),  # a copy, for it puts variables into it
                input_names=numbered("input", len(inputs)),
                output_names=numbered("output", len(expected)),
            )
        _tidy(proto, list(kept))
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise BadInput(f"onnx_chainer cannot export the network: {_said(error)}") from error
    max_error = _max_error(proto.SerializeToString(), inputs, expected)
    model = onnx_format.from_proto(proto, file)
    tensors = tuple(_as_stored(tensor, kept.get(tensor.name)) for tensor in model.tensors)
    return Model(tensors, model.source, model.attributes, model.graph), max_error


def _call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """`Generator(100, bias=False)` -> its name and literals."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if isinstance(call.func, ast.Name) and all(k.arg for k in call.keywords):
            arguments = [ast.literal_eval(a) for a in call.args]
            return call.func.id, arguments, {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        pass
    raise UsageError(f"{printable(text)} is not a name with literals as arguments", hint="as in Generator(100)")


def _run_file(path: Path) -> ModuleType:
    module = ModuleType("shrink_network")
    module.__file__ = str(path)
    # Where dataclasses and the like look for the module of a class.
    sys.modules[module.__name__] = module
    source = read_all(path, at_most=_SOURCE_AT_MOST)
    _make_importable(os.path.abspath(path.parent))
    try:
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        raise BadInput(f"running it failed: {_said(error)}", file=path) from error
    return module


# The folder of the network that was loaded last, where it had to be put on sys.path.
_folder_on_path: str | None = None


def _make_importable(folder: str) -> None:
    """Let a network file import what lies in its folder, as it can when Python itself runs it.

    The folder comes last, so that a neighbour called json.py hides nothing. It stays until the next network is loaded,
    for the chain may import when it is called, which exporting it does again and again. What was imported from it is
    forgotten then: a neighbour of one network must not be taken for the other's of the same name.
    """
    global _folder_on_path
    last, _folder_on_path = _folder_on_path, None
    if last is not None:
        if last in sys.path:
            sys.path.remove(last)
        for name in [name for name, module in sys.modules.items() if _lies_in(last, name, module)]:
            del sys.modules[name]
    if folder not in map(os.path.abspath, sys.path):
        sys.path.append(folder)
        _folder_on_path = folder


def _lies_in(folder: str, name: str, module: Any) -> bool:
    """Whether a module was found by `folder` on sys.path: it, or the package that it belongs to, lies right there."""
    spec = getattr(sys.modules.get(name.partition(".")[0], module), "__spec__", None)
    if spec is None:
        return False
    places = list(spec.submodule_search_locations or ())
    # What is built in has an origin too, which is no path.
    places += [spec.origin] if spec.has_location else []
    return any(os.path.dirname(os.path.abspath(place)) == folder for place in places)


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # Chainer's own check of shapes says on the later lines what it expects and what it got.
    text = " ".join(" ".join(lines if type(error).__name__ == "InvalidType" else lines[:1]).split())
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__, at_most=300)


def _fill(chain: Any, weights: Model) -> None:
    """Set every parameter and persistent value; the names on both sides are the same, and so are the shapes."""
    serializers = import_chainer().serializers
    wanted = serializers.DictionarySerializer()
    wanted.save(chain)
    given = {t.name: t for t in weights.tensors}

    def fault(name: str, what: str) -> BadInput:
        return BadInput(what, file=weights.source.path, tensor=name)

    for name in wanted.target:
        if name not in given:
            raise fault(name, "the network needs it, but it is not there")
    for name, tensor in given.items():
        if name not in wanted.target:
            raise fault(name, "the network has no such parameter")
        value = wanted.target[name]
        # Parameters that take their shape from the first input have none yet.
        has_shape = value is not None and not (isinstance(value, np.ndarray) and value.dtype == object)
        if has_shape and np.shape(value) != tensor.shape:
            raise fault(name, f"it has the shape {tensor.shape}, the network wants {np.shape(value)}")
    values = {name: _float32(tensor.array) for name, tensor in given.items()}
    try:
        serializers.NpzDeserializer(values).load(chain)
    except Exception as error:
        raise BadInput(f"the network does not take these values: {_said(error)}", file=weights.source.path) from error
    # As large as the weights, and only training has a use for them.
    chain.cleargrads()


def _float32(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def numbered(name: str, count: int) -> list[str]:
    """The names of a network's inputs or outputs: `input`, or `input_0`, `input_1` … where there are several."""
    return [name] if count == 1 else [f"{name}_{number}" for number in range(count)]


def _tidy(proto: Any, names: Sequence[str]) -> None:
    """Names of weights as in `names`, inputs without weights, outputs in the network's order, a lower IR version."""
    from onnx_chainer.onnx_helper import cleanse_param_name

    own = {cleanse_param_name(f"/{name}"): name for name in names}
    graph = proto.graph
    for tensor in graph.initializer:
        tensor.name = own.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [own.get(name, name) for name in node.input]
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [i for i in graph.input if own.get(i.name, i.name) not in initializers]
    del graph.input[:]
    graph.input.extend(inputs)
    outputs = sorted(graph.output, key=lambda output: (len(output.name), output.name))  # …_9, …_10
    del graph.output[:]
    graph.output.extend(outputs)
    proto.ir_version = _IR_VERSION


def _max_error(model: bytes, inputs: Sequence[F32], expected: Sequence[F32]) -> float:
    try:
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        raise MissingDependency("onnxruntime", "chainer") from None
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        outputs = session.run(None, dict(zip(names, inputs, strict=True)))
    except Exception as error:
        raise BadInput(f"ONNX Runtime does not run what onnx_chainer exported: {_said(error)}") from error
    return max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(outputs, expected, strict=True))


def _as_stored(tensor: Entry, stored: Entry | None) -> Entry:
    """The tensor as it is stored among the weights, where those are the values that the graph has."""
    if stored is None or stored.shape != tensor.shape:
        return tensor
    same = np.array_equal(_float32(stored.array), tensor.array, equal_nan=True)
    return stored if same else tensor
