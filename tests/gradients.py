"""Single operators to differentiate, and what runs graphs and finds gradients by finite differences."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped,unused-ignore]
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from shrink.calibrate.gradients import differentiated

Array = NDArray[Any]
Values = dict[str, Array]
F32 = np.float32
EPSILON = 4e-3
value = helper.make_tensor_value_info


def spaced(*shape: int, low: float = -1.3, high: float = 1.3, seed: int = 0) -> Array:
    """All different, none near 0 when the range is symmetric: finite differences cross no kink."""
    n = int(np.prod(shape))
    steps = np.random.default_rng([seed, n]).permutation(n)
    return (low + (steps + 0.5) * (high - low) / max(n, 1)).reshape(shape).astype(F32)


def even(*shape: int, low: float = -1.3, high: float = 1.3, seed: int = 0) -> Array:
    """As `spaced`, with an even count of steps, so that none is 0."""
    n = int(np.prod(shape))
    return spaced(n + n % 2, low=low, high=high, seed=seed)[:n].reshape(shape)


def positive(*shape: int, seed: int = 0) -> Array:
    return spaced(*shape, low=0.5, high=2.0, seed=seed)


@dataclass(frozen=True)
class X:
    """An input of the graph with respect to which is differentiated."""

    values: Array


def x(*shape: int, seed: int = 0) -> X:
    return X(even(*shape, seed=seed))


def session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> Values:
    names = [o.name for o in model.graph.output]
    return dict(zip(names, session(model).run(None, dict(feeds)), strict=True))


def made(
    nodes: Sequence[onnx.NodeProto], inputs: Values, weights: Values, outputs: Sequence[str], opset: int, *,
    dynamic: bool = False,
) -> onnx.ModelProto:  # fmt: skip
    """A model whose outputs have the types and ranks that ONNX infers."""

    def info(name: str, array: Array) -> onnx.ValueInfoProto:
        dims = [f"{name}_{axis}" for axis in range(array.ndim)] if dynamic else list(array.shape)
        return value(name, helper.np_dtype_to_tensor_dtype(array.dtype), dims)

    graph = helper.make_graph(
        list(nodes), "graph", [info(n, a) for n, a in inputs.items()], [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    found = session(model).run(None, inputs)
    del model.graph.output[:]
    model.graph.output.extend(info(n, a) for n, a in zip(outputs, found, strict=True))
    return model


def cotangents(model: onnx.ModelProto, outputs: Values, seed: int = 1) -> Values:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(a.shape).astype(a.dtype) for name, a in outputs.items()}


def differences(model: onnx.ModelProto, inputs: Values, name: str, cotangent: Values) -> Array:
    """The gradient by one input, element by element."""
    engine, names = session(model), [o.name for o in model.graph.output]
    found = np.zeros(inputs[name].shape)
    for index in np.ndindex(*found.shape):
        ends = []
        for sign in (1, -1):
            moved = inputs[name].copy()
            moved[index] += sign * EPSILON
            given = dict(zip(names, engine.run(None, {**inputs, name: moved}), strict=True))
            ends.append((sum(float((given[n].astype(float) * c).sum()) for n, c in cotangent.items()), moved[index]))
        found[index] = (ends[0][0] - ends[1][0]) / (float(ends[0][1]) - float(ends[1][1]))
    return found


def compare(model: onnx.ModelProto, inputs: Values, at: Sequence[str], blocked: frozenset[str] = frozenset()) -> Values:
    """Checks the gradients at inputs of the model; returns all that the new model gives."""
    result, without = differentiated(model, at)
    assert without == blocked
    # It insists on shapes of outputs, which cannot always be known.
    if all(o.type.tensor_type.HasField("shape") for o in result.graph.output):
        onnx.checker.check_model(result, full_check=True)
    assert [o.version for o in result.opset_import] == [o.version for o in model.opset_import]
    outputs = run(model, inputs)
    cotangent = cotangents(model, outputs)
    found = run(result, {**inputs, **{f"cotangent:{n}": c for n, c in cotangent.items()}})
    for name, array in outputs.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
    for name in at:
        if name in without:
            assert f"gradient:{name}" not in found
        elif name in inputs:
            expected = differences(model, inputs, name, cotangent)
            gradient = found[f"gradient:{name}"]
            assert gradient.shape == inputs[name].shape
            assert gradient.dtype == inputs[name].dtype
            np.testing.assert_allclose(gradient, expected, rtol=1e-2, atol=2e-3 * max(1.0, np.abs(expected).max()))
    return found


@dataclass(frozen=True)
class Case:
    """One node. Operands: X, or a constant. `dynamic`: whether it works, at its newest opset, without known sizes."""

    kind: str
    operands: tuple[Any, ...]
    attributes: dict[str, Any]
    opsets: tuple[int, ...]
    dynamic: bool = True
    outputs: int = 1

    @property
    def label(self) -> str:
        said = ",".join(f"{k}={v}" for k, v in self.attributes.items())
        return f"{self.kind}({said})".replace(" ", "")

    def model(self, opset: int, *, dynamic: bool = False) -> tuple[onnx.ModelProto, Values]:
        inputs: Values = {}
        weights: Values = {}
        names = []
        for number, operand in enumerate(self.operands):
            name = f"{'x' if isinstance(operand, X) else 'w'}{number}" if operand is not None else ""
            names.append(name)
            if isinstance(operand, X):
                inputs[name] = operand.values
            elif operand is not None:
                weights[name] = np.asarray(operand)
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.kind, names, outputs, **self.attributes)
        return made([node], inputs, weights, outputs, opset, dynamic=dynamic), inputs


def case(
    kind: str, *operands: Any, at: Sequence[int] = (13,), dynamic: bool = True, n: int = 1, **attributes: Any
) -> Case:
    return Case(kind, operands, attributes, tuple(at), dynamic, n)


def weight(*shape: int) -> Array:
    return spaced(*shape, seed=7)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


IMAGE = (1, 2, 5, 6)
CONVOLUTIONS = [
    case("Conv", x(2, 2, 5, 4), weight(3, 2, 3, 3), at=(7, 11, 22)),
    case("Conv", x(*IMAGE), weight(3, 2, 3, 3), weight(3), at=(7, 13), pads=[1, 1, 1, 1], strides=[2, 2]),
    case("Conv", x(*IMAGE), weight(4, 1, 3, 2), at=(9, 13), group=2, pads=[2, 0, 1, 1], dilations=[2, 1],
         strides=[2, 3]),
    case("Conv", x(1, 4, 4, 5), weight(6, 2, 3, 2), at=(7, 13), group=2, pads=[2, 0, 1, 1], dilations=[2, 1]),
    case("Conv", x(1, 3, 4, 4), weight(3, 1, 3, 3), at=(7, 13), group=3, pads=[1, 1, 1, 1]),
    case("Conv", x(1, 2, 3, 3), weight(3, 2, 2, 1), at=(7, 13), pads=[2, 1, 0, 1]),
    case("Conv", x(*IMAGE), weight(2, 2, 3, 3), at=(11,), auto_pad="SAME_UPPER"),
    case("Conv", x(*IMAGE), weight(2, 2, 2, 2), at=(11,), auto_pad="SAME_LOWER"),
    case("Conv", x(*IMAGE), weight(2, 2, 2, 3), dynamic=False, auto_pad="SAME_UPPER", strides=[2, 2]),
    case("Conv", x(*IMAGE), weight(2, 2, 3, 4), dynamic=False, auto_pad="SAME_LOWER", strides=[3, 2]),
    case("Conv", x(*IMAGE), weight(2, 2, 2, 3), at=(7, 13), auto_pad="VALID", strides=[2, 2]),
    case("Conv", x(*IMAGE), weight(2, 2, 1, 1), at=(7, 13), strides=[3, 4]),
    case("Conv", x(1, 2, 9), weight(3, 2, 3), at=(7, 13), pads=[1, 0], strides=[2]),
    case("ConvTranspose", x(1, 3, 3, 2), weight(3, 2, 3, 3), at=(7, 11, 22)),
    case("ConvTranspose", x(1, 4, 3, 2), weight(4, 1, 4, 3), at=(7, 13), group=2, strides=[2, 2], pads=[1, 0, 1, 1]),
    case("ConvTranspose", x(1, 2, 3, 2), weight(2, 2, 3, 3), strides=[2, 3], output_padding=[1, 2], dilations=[2, 1]),
    case("ConvTranspose", x(1, 2, 3, 2), weight(2, 2, 3, 4), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("ConvTranspose", x(1, 2, 3, 2), weight(2, 2, 5, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    case("ConvTranspose", x(1, 2, 3, 2), weight(2, 2, 3, 3), dynamic=False, strides=[2, 2], output_shape=[6, 4]),
    case("ConvTranspose", x(1, 2, 4), weight(2, 3, 4), at=(7, 13), strides=[2], pads=[1, 1]),
]  # fmt: skip
POOLS = [
    case("MaxPool", x(*IMAGE), at=(7, 8, 12), kernel_shape=[2, 2], strides=[2, 2]),
    case("MaxPool", x(*IMAGE), at=(7, 12), kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    case("MaxPool", x(*IMAGE), at=(10, 13), dynamic=False, kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1),
    case("MaxPool", x(*IMAGE), at=(10, 13), kernel_shape=[2, 2], dilations=[2, 3]),
    case("MaxPool", x(*IMAGE), at=(11,), dynamic=False, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    case("MaxPool", x(2, 2, 7), at=(7, 13), kernel_shape=[3], strides=[2]),
    case("AveragePool", x(*IMAGE), at=(7, 11, 22), kernel_shape=[2, 2], strides=[2, 2]),
    case("AveragePool", x(*IMAGE), at=(7, 13), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 1]),
    case("AveragePool", x(*IMAGE), at=(7, 13), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    case("AveragePool", x(*IMAGE), at=(10, 13), dynamic=False, kernel_shape=[3, 4], strides=[2, 3], ceil_mode=1),
    case("GlobalAveragePool", x(2, 3, 2, 3), at=(7, 8, 13)),
    case("GlobalMaxPool", x(2, 3, 2, 3), at=(7, 13)),
]  # fmt: skip
MATRICES = [
    *(
        case("Gemm", x(*((3, 2) if a else (2, 3))), x(*((4, 3) if b else (3, 4)), seed=1), x(4, seed=2),
             at=(7, 9, 11, 13), transA=a, transB=b, alpha=0.5, beta=2.0)
        for a, b in itertools.product((0, 1), (0, 1))
    ),
    case("Gemm", x(2, 3), weight(3, 4), at=(11, 13)),
    case("Gemm", x(2, 3), weight(3, 4), x(2, 1), at=(7, 13)),
    case("MatMul", x(2, 3), x(3, 4, seed=1), at=(7, 9, 13)),
    case("MatMul", x(2, 2, 3), weight(3, 4), at=(7, 13)),
    case("MatMul", x(2, 2, 3), x(3, 4), at=(7, 13)),
    case("MatMul", x(2, 3, 2), x(2, 2, 3, seed=1), at=(7, 13)),
    case("MatMul", x(2, 3, 2), x(1, 2, 3, seed=1), at=(7, 13)),
    case("MatMul", x(2, 3), x(2, 2, 3, 2, seed=1), at=(7, 13)),
    case("MatMul", x(2, 1, 2, 3), x(3, 3, 2, seed=1), at=(7, 13)),
    case("MatMul", weight(4, 3), x(2, 3, 2), at=(7, 13)),
    case("MatMul", x(3), x(3, seed=1), at=(7, 13)),
    case("MatMul", x(3), x(3, 4, seed=1), at=(7, 13)),
    case("MatMul", x(2, 4, 3), x(3, seed=1), at=(7, 13)),
]  # fmt: skip
BROADCAST = [
    case(kind, X(positive(*a)), X(positive(*b, seed=1)), at=(7, 13, 14))
    for kind in ("Add", "Sub", "Mul", "Div")
    for a, b in (((2, 3), (2, 3)), ((2, 3, 2), (3, 1)), ((3,), (2, 1, 3)), ((2, 1, 3), (1, 4, 1)), ((2, 2), ()))
]
ELEMENTWISE = [
    *(
        case(kind, x(2, 6), at=at)
        for kind, at in {
            "Abs": (7, 13), "Neg": (7, 13), "Exp": (7, 13), "Erf": (9, 13), "Relu": (7, 13, 14), "LeakyRelu": (7, 16),
            "Elu": (7, 22), "Selu": (7, 22), "Celu": (12,), "Sigmoid": (7, 13), "HardSigmoid": (7, 22),
            "Tanh": (7, 13), "Softplus": (7, 22), "Softsign": (7, 22), "Gelu": (20,), "Mish": (18,), "Sin": (7, 22),
            "Cos": (7, 22), "Identity": (7, 13), "Dropout": (7, 10, 12, 13),
        }.items()
    ),
    *(case(kind, X(positive(2, 5)), at=(7, 13)) for kind in ("Log", "Sqrt", "Reciprocal")),
    case("Gelu", x(2, 6), at=(20,), approximate="tanh"),
    case("HardSwish", X(even(2, 8, low=-4.1, high=4.1)), at=(14, 22)),
    case("HardSigmoid", X(even(2, 8, low=-4.1, high=4.1)), at=(7, 22), alpha=0.3, beta=0.4),
    case("LeakyRelu", x(2, 6), at=(7, 16), alpha=0.3),
    case("Elu", x(2, 6), at=(7,), alpha=0.3),
    case("Celu", x(2, 6), at=(12,), alpha=0.3),
    case("Selu", x(2, 6), at=(7,), alpha=1.2, gamma=0.7),
    case("ThresholdedRelu", x(2, 6), at=(10, 22), alpha=0.4),
    case("PRelu", x(2, 3, 4), X(positive(3, 1)), at=(7, 9, 16)),
    case("PRelu", x(2, 3), weight(3), at=(7, 16)),
    case("Clip", x(2, 6), at=(7,), min=-0.6, max=0.9),
    case("Clip", x(2, 6), F32(-0.6), F32(0.9), at=(11, 13)),
    case("Clip", x(2, 6), None, F32(0.4), at=(11, 13)),
    case("Pow", X(positive(2, 5)), F32(1.7), at=(7, 12, 13)),
    case("Pow", x(2, 5), F32(2), at=(7, 13)),
    case("Pow", x(2, 5), ints(3)[0], at=(12, 15)),
    case("Pow", X(positive(2, 3)), np.array([1.5, 2, 3], F32), at=(7, 13)),
    case("Max", x(2, 3), x(3, seed=3), F32(0.1), at=(8, 13)),
    case("Min", x(2, 3), x(3, seed=3), F32(0.1), at=(8, 13)),
    case("Sum", x(2, 3), x(3, seed=3), x(2, 1), at=(8, 13)),
    case("Mean", x(2, 3), x(3, seed=3), x(2, 1), at=(8, 13)),
    case("Where", np.array([[True], [False]]), x(2, 3), x(3, seed=1), at=(9, 16)),
    case("Where", np.array([True, False, True]), x(2, 1), x(3, seed=1), at=(9, 16)),
    case("Dropout", x(2, 6), F32(0.5), np.array(False), at=(12, 13)),
]  # fmt: skip
NORMS = [
    case("BatchNormalization", x(2, 3, 2, 2), positive(3), weight(3), weight(3), positive(3), at=(7, 9, 14, 15)),
    case("BatchNormalization", x(4, 3), positive(3), weight(3), weight(3), positive(3), at=(7, 9, 15), epsilon=0.1),
    case("InstanceNormalization", x(2, 2, 3, 3), positive(2), weight(2), at=(7, 22)),
    case("LayerNormalization", x(2, 3, 4), positive(4), weight(4), at=(17,)),
    case("LayerNormalization", x(2, 3, 4), positive(3, 4), at=(17,), axis=1, epsilon=0.01),
    case("LayerNormalization", x(2, 3, 4), positive(3, 4), at=(17,), axis=-2),
    *(case(kind, x(2, 3, 4), at=(7, 11, 13)) for kind in ("Softmax", "LogSoftmax")),
    *(case(kind, x(2, 3, 4), at=(7, 11, 13), axis=2) for kind in ("Softmax", "LogSoftmax")),
    *(case(kind, x(2, 3, 4), at=(11, 13), axis=-1) for kind in ("Softmax", "LogSoftmax")),
    case("Softmax", x(2, 3, 2), at=(11, 13), axis=0),
]  # fmt: skip
_REDUCED = {"ReduceSum": 13, "ReduceMean": 18, "ReduceL2": 18, "ReduceSumSquare": 18, "ReduceLogSumExp": 18,
            "ReduceMax": 18, "ReduceMin": 18}  # fmt: skip
REDUCTIONS = [
    *(
        case(kind, x(2, 3, 4), at=(11, since - 1), axes=axes, keepdims=keep)
        for kind, since in _REDUCED.items()
        for axes, keep in (([1], 1), ([0, 2], 0), ([-1], 0))
    ),
    *(
        case(kind, x(2, 3, 4), ints(*axes), at=(since,), keepdims=keep)
        for kind, since in _REDUCED.items()
        for axes, keep in (([1], 1), ([2, 0], 0), ([-1], 0))
    ),
    *(case(kind, x(2, 3), at=(7, since), keepdims=keep) for kind, since in _REDUCED.items() for keep in (0, 1)),
    case("ReduceSum", x(2, 3), at=(13,), noop_with_empty_axes=1),
]
MOVES = [
    case("Concat", x(2, 1, 3), x(2, 2, 3, seed=1), weight(2, 1, 3), at=(7, 11, 13), axis=1),
    case("Concat", x(2, 3), x(2, 2, seed=1), at=(11, 13), axis=-1),
    case("Concat", x(2, 3), at=(7, 13), axis=0),
    case("Split", x(2, 5), at=(7, 11), n=2, axis=1, split=[2, 3]),
    case("Split", x(2, 5), ints(2, 3), at=(13, 18), n=2, axis=-1),
    case("Split", x(4, 2), at=(7, 13), n=2),
    case("Slice", x(4, 5), at=(7, 9), starts=[1, -4], ends=[3, 99], axes=[0, 1]),
    case("Slice", x(4, 5), at=(7, 9), starts=[1], ends=[-1]),
    case("Slice", x(4, 5), ints(1, -4), ints(3, 99), at=(10, 13)),
    case("Slice", x(4, 5), ints(-1, 0), ints(-99, 5), ints(1, 0), ints(-2, 3), at=(11, 13)),
    case("Slice", x(4, 5), ints(2), ints(1 << 62), ints(-1), at=(10, 13)),
    case("Slice", x(4, 5), ints(0), ints(-2), ints(1), at=(10, 13)),
    case("Pad", x(2, 3), at=(7, 10), pads=[1, 0, 2, 3]),
    case("Pad", x(2, 3), at=(10,), pads=[1, 2, 0, 1], mode="reflect", dynamic=False),
    case("Pad", x(2, 3), ints(1, 0, 2, 3), at=(11, 13, 18)),
    case("Pad", x(3, 4), ints(0, -1, 2, 1), F32(0.5), at=(11, 13)),
    case("Pad", x(2, 3), ints(2, 1), F32(0.5), ints(1), at=(18, 21)),
    case("Pad", x(3, 4), ints(2, 1, 1, 3), at=(11, 16, 18), mode="reflect"),
    case("Pad", x(3, 4), ints(2, 1, 1, 3), at=(16, 18), mode="edge"),
    case("Reshape", x(2, 6), ints(3, -1), at=(7, 13)),
    case("Flatten", x(2, 3, 2), at=(7, 13)),
    case("Flatten", x(2, 3, 2), at=(11, 13), axis=-1),
    case("Transpose", x(2, 3, 2), at=(7, 13)),
    case("Transpose", x(2, 3, 4), at=(7, 13), perm=[1, 2, 0]),
    case("Squeeze", x(2, 1, 3, 1), at=(7, 11), axes=[1, 3]),
    case("Squeeze", x(2, 1, 3, 1), ints(1), at=(13,)),
    case("Unsqueeze", x(2, 3), at=(7, 11), axes=[0, 3]),
    case("Unsqueeze", x(2, 3), ints(0, -1), at=(13,)),
    case("Expand", x(3, 1), ints(2, 1, 4), at=(8, 13)),
    case("Tile", x(2, 3), ints(2, 1), at=(16,)),
    case("Gather", x(4, 3), ints(2, 0), at=(11, 13)),
    case("Gather", x(4, 3), ints(-1)[0], at=(11, 13), axis=1),
    case("Gather", x(4, 3), ints(1, 1, -1), at=(16,)),
    case("GatherElements", x(4, 3), np.array([[0, 1, 0], [3, 3, 3]]), at=(16,)),
    case("GatherND", x(4, 3), np.array([[0, 1], [0, 1], [3, 2]]), at=(16,)),
    case("DepthToSpace", x(1, 8, 2, 3), at=(7, 11, 13), blocksize=2),
    case("DepthToSpace", x(1, 8, 2, 3), at=(11, 13), blocksize=2, mode="CRD", dynamic=False),
    case("SpaceToDepth", x(1, 2, 4, 6), at=(7, 13), blocksize=2),
]  # fmt: skip
SCALES = np.array([1, 1, 2, 3], F32)
RESIZED = [
    case("Upsample", x(1, 2, 2, 3), at=(7,), scales=[1.0, 1.0, 2.0, 3.0]),
    case("Upsample", x(1, 2, 2, 3), SCALES, at=(9,)),
    case("Upsample", x(1, 2, 2, 3), SCALES, at=(9,), mode="linear", dynamic=False),
    case("Resize", x(1, 2, 2, 3), SCALES, at=(10,)),
    case("Resize", x(1, 2, 2, 3), np.array([1, 1, 0.5, 2], F32), at=(10,), dynamic=False),
    case("Resize", x(1, 2, 2, 3), None, SCALES, at=(13, 18)),
    case("Resize", x(1, 2, 2, 3), None, None, ints(1, 2, 4, 9), at=(13, 18), dynamic=False),
    case("Resize", x(1, 2, 2, 3), None, SCALES[2:], at=(18, 19), axes=[2, 3]),
    *(
        case("Resize", x(1, 2, 3, 4), None, None, ints(1, 2, *size), at=(13, 19), dynamic=False, mode=mode,
             coordinate_transformation_mode=how)
        for mode in ("linear", "nearest", "cubic")
        for how in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
        for size in ((6, 8), (5, 3))
    ),
    case("Resize", x(1, 2, 2, 3), None, SCALES, at=(13,), nearest_mode="floor",
         coordinate_transformation_mode="asymmetric"),
    case("Resize", x(1, 2, 2, 3), None, SCALES, at=(13,), nearest_mode="ceil", dynamic=False),
    case("Resize", x(1, 2, 3, 2), None, np.array([1, 2, 2, 1], F32), at=(13,), dynamic=False),
]  # fmt: skip
CASES = [
    *CONVOLUTIONS, *POOLS, *MATRICES, *BROADCAST, *ELEMENTWISE, *NORMS, *REDUCTIONS, *MOVES, *RESIZED,
]  # fmt: skip
