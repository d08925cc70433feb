"""Networks of every odd kind are quantized to valid results or refused in one line; the trained ones beat int8."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shrink import container, given, metrics, pipeline
from shrink import recipe as recipes
from shrink.calibrate.calibrated import Calibrator, Result
from shrink.calibrate.inputs import Calibration, calibration, inputs_of
from shrink.calibrate.quantizing import Target, Work, merged, quantized
from shrink.errors import ShrinkError
from shrink.export import Network
from shrink.formats import safetensors
from shrink.model import Entry
from shrink.progress import silent
from tests.zoo import NETWORKS, ZooNetwork, keras_lstm

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

Array = NDArray[Any]
Values = dict[str, Array]

MODELS = Path(__file__).parents[1] / "benchmarks" / "models"
TYPES = {np.dtype("f4"): TensorProto.FLOAT, np.dtype("f2"): TensorProto.FLOAT16, np.dtype("f8"): TensorProto.DOUBLE}
TYPES |= {np.dtype("i8"): TensorProto.INT64}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


@dataclass(frozen=True)
class Odd:
    """Nodes, what goes in (shape and type of each input), what comes out, tensors; samples are normal if not given.

    `at_least` is the PSNR in dB that a step of 0.01 of the peak has to keep.
    """

    name: str
    nodes: Sequence[Any]
    tensors: Mapping[str, Array]
    inputs: Mapping[str, tuple[Sequence[int | str], str]] = field(default_factory=lambda: {"x": ([1, 8], "f4")})
    outputs: Sequence[str] = ("y",)
    samples: Callable[[int], Values] | None = None
    count: int = 8
    at_least: float = 30.0
    also_inputs: Sequence[str] = ()
    shapes: tuple[str, ...] = ()
    opset: int = 13

    def network(self, folder: Path) -> Network:
        types = [(name, TYPES[np.dtype(kind)], list(shape)) for name, (shape, kind) in self.inputs.items()]
        types += [(name, TYPES[self.tensors[name].dtype], list(self.tensors[name].shape)) for name in self.also_inputs]
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info(*given_type) for given_type in types],
            [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        for output in model.graph.output:
            output.ClearField("type")
        model = onnx.shape_inference.infer_shapes(model)
        path = folder / f"{self.name.replace(' ', '-')}.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        return given.network(str(path), None, self.shapes)[0]

    def calibration(self, network: Network) -> Calibration:
        if self.samples is not None:
            return Calibration(tuple(self.samples(number) for number in range(self.count)), "made")
        wanted = inputs_of(network)
        return Calibration(
            tuple({i.name: normal(*i.shape, seed=n + 1).astype(i.dtype) for i in wanted} for n in range(self.count)),
            "made",
        )


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def matmul(*sizes: int, seed: int = 0) -> tuple[list[Any], dict[str, Array]]:
    """Dense layers with a bias and Relu between them: nodes from x to y, and their tensors w0, b0, w1, …"""
    nodes: list[Any] = []
    tensors: dict[str, Array] = {}
    last = len(sizes) - 2
    for number, (before, after) in enumerate(itertools.pairwise(sizes)):
        source, target = ("x" if number == 0 else f"r{number - 1}"), ("y" if number == last else f"h{number}")
        nodes.append(node("Gemm", f"{source} w{number} b{number}", target))
        tensors |= {f"w{number}": normal(before, after, seed=seed), f"b{number}": normal(after, seed=seed)}
        if number < last:
            nodes.append(node("Relu", f"h{number}", f"r{number}"))
    return nodes, tensors


PICTURE: Mapping[str, tuple[Sequence[int | str], str]] = {"x": ([1, 4, 9, 7], "f4")}


def dead_channels() -> Odd:
    w0 = normal(6, 4, 3, 3)
    w0[2] = 0
    w1 = normal(5, 6, 3, 3)
    w1[:, 4] = 0
    return Odd(
        "dead channels",
        [node("Conv", "x w0", "h"), node("Relu", "h", "r"), node("Conv", "r w1 b1", "y")],
        {"w0": w0, "w1": w1, "b1": normal(5)},
        PICTURE,
    )


def scaled(name: str, factor: float, **more: Any) -> Odd:
    nodes, tensors = matmul(8, 16, 6)
    return Odd(name, nodes, {n: (t * np.float32(factor)).astype(np.float32) for n, t in tensors.items()}, **more)


def deconv(name: str, kernel: tuple[int, int], strides: tuple[int, int], **attributes: Any) -> Odd:
    groups = attributes.get("group", 1)
    return Odd(
        name,
        [node("ConvTranspose", "x w b", "y", strides=list(strides), **attributes)],
        {"w": normal(4, 6 // groups, *kernel), "b": normal(6)},
        PICTURE,
    )


def ids(shape: tuple[int, ...], below: int) -> Callable[[int], Values]:
    return lambda number: {"i": np.random.default_rng([number, 5]).integers(0, below, shape)}


TOKENS: Mapping[str, tuple[Sequence[int | str], str]] = {"i": ([1, 12], "i8")}


def branch(inner: str) -> Any:
    """A graph inside a node, of the values `h` and `k` outside."""
    output = helper.make_tensor_value_info(inner, TensorProto.FLOAT, None)
    return helper.make_graph(
        [node("Add", "h k", f"{inner}_sum"), node("Relu", f"{inner}_sum", inner)], inner, [], [output]
    )


BRANCH = node("If", "c", "o", then_branch=branch("then"), else_branch=branch("else"))


ODD = (
    Odd("plain", *matmul(8, 16, 6)),
    Odd("one sample", *matmul(8, 16, 6), count=1),
    Odd("fewer samples than inputs", *matmul(8, 60, 40, 6), count=2, at_least=10),
    dead_channels(),
    Odd("one output", *matmul(8, 16, 1)),
    Odd("one input", *matmul(1, 16, 6), inputs={"x": ([1, 1], "f4")}),
    Odd("one of each", *matmul(1, 1), inputs={"x": ([1, 1], "f4")}),
    Odd(
        "duplicate columns",
        [node("Concat", "x x", "c", axis=1), node("MatMul", "c w", "y")],
        {"w": normal(16, 6)},
    ),
    Odd("inputs of zeros", *matmul(8, 16, 6), samples=lambda n: {"x": np.zeros((1, 8), "f4")}),
    Odd(
        "nothing but zeros",
        [node("MatMul", "x w", "y")],
        {"w": normal(8, 6)},
        samples=lambda n: {"x": np.zeros((1, 8), "f4")},
    ),
    scaled("all weights zero", 0),
    Odd(
        "no effect",
        [node("MatMul", "x w", "h"), node("Mul", "h zero", "z"), node("MatMul", "x v", "k"), node("Add", "k z", "y")],
        {"w": normal(8, 6), "v": normal(8, 6), "zero": np.zeros(1, "f4")},
    ),
    Odd(
        "not on the way to an output",
        [node("MatMul", "x w", "h"), node("MatMul", "h u", "lost"), node("MatMul", "x v", "y")],
        {"w": normal(8, 6), "u": normal(6, 6), "v": normal(8, 6)},
    ),
    scaled("huge weights", 1e15, at_least=25),
    scaled("tiny weights", 1e-15),
    Odd("weights of 1e30", [node("MatMul", "x w", "y")], {"w": normal(8, 6) * np.float32(1e30)}),
    Odd("weights of 1e-30", [node("MatMul", "x w", "y")], {"w": normal(8, 6) * np.float32(1e-30)}),
    Odd(
        "rows of 1e30 and of 1e-30",
        [node("MatMul", "x w", "y")],
        {"w": (normal(8, 6) * np.float32(10) ** np.array([30, -30, 0, 20, -20, 10], "f4")).astype("f4")},
    ),
    Odd(
        "columns of 1e15 and of 1e-15",
        [node("Mul", "x s", "h"), node("MatMul", "h w", "y")],
        {"w": normal(8, 6) * np.logspace(15, -15, 8, dtype="f4")[:, None], "s": np.logspace(-15, 15, 8, dtype="f4")},
        at_least=0,
    ),
    Odd(
        "columns of 10 and of 0.1",
        [node("Mul", "x s", "h"), node("MatMul", "h w", "y")],
        {"w": normal(8, 6) * np.logspace(1, -1, 8, dtype="f4")[:, None], "s": np.logspace(-1, 1, 8, dtype="f4")},
    ),
    Odd(
        "huge and of no effect",
        [node("MatMul", "x w", "h"), node("Mul", "h zero", "z"), node("MatMul", "x v", "k"), node("Add", "k z", "y")],
        {"w": normal(8, 6) * np.float32(1e30), "v": normal(8, 6), "zero": np.zeros(1, "f4")},
    ),
    Odd(
        "next to no effect",
        [node("MatMul", "x w", "h"), node("Mul", "h little", "z"), node("MatMul", "x v", "k"), node("Add", "k z", "y")],
        {"w": normal(8, 6), "v": normal(8, 6), "little": np.full(1, 1e-36, "f4")},
    ),
    Odd(
        "next to no inputs",
        [node("Mul", "x little", "z"), node("MatMul", "z w", "h"), node("MatMul", "x v", "k"), node("Add", "k h", "y")],
        {"w": normal(8, 6), "v": normal(8, 6), "little": np.full(1, 1e-36, "f4")},
    ),
    Odd("depthwise", [node("Conv", "x w b", "y", group=4)], {"w": normal(4, 1, 3, 3), "b": normal(4)}, PICTURE),
    Odd("two to a group", [node("Conv", "x w b", "y", group=2)], {"w": normal(6, 2, 3, 3), "b": normal(6)}, PICTURE),
    deconv("deconvolution", (4, 4), (2, 2)),
    deconv("stride that does not divide", (3, 5), (2, 3), pads=[1, 1, 1, 1]),
    deconv("stride larger than the kernel", (2, 2), (3, 3)),
    deconv("deconvolution in groups", (3, 3), (2, 2), group=2),
    Odd("embedding", [node("Gather", "t i", "e"), node("MatMul", "e w", "y")],
        {"t": normal(50, 8), "w": normal(8, 6)}, TOKENS, samples=ids((1, 12), 50), at_least=20),
    Odd("tied embedding",
        [node("Gather", "t i", "e"), node("MatMul", "e w", "h"), node("Transpose", "t", "tt", perm=[1, 0]),
         node("MatMul", "h tt", "y")],
        {"t": normal(50, 8), "w": normal(8, 8)}, TOKENS, samples=ids((1, 12), 50)),
    Odd("used twice", [node("MatMul", "x w", "h"), node("Tanh", "h", "r"), node("MatMul", "r w", "y")],
        {"w": normal(8, 8)}),
    Odd("elementwise", [node("MatMul", "x w", "h"), node("Mul", "h m", "p"), node("MatMul", "p v", "y")],
        {"w": normal(8, 8), "m": normal(4, 8), "v": normal(8, 6)}, at_least=25),
    Odd("float16", [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "y")],
        {"w": normal(8, 16).astype("f2"), "v": normal(16, 6).astype("f2")}, {"x": ([1, 8], "f2")}),
    Odd("float64", [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "y")],
        {"w": normal(8, 16).astype("f8"), "v": normal(16, 6).astype("f8")}, {"x": ([1, 8], "f8")}),
    Odd("open batch", *matmul(8, 16, 6), inputs={"x": (["n", 8], "f4")}),
    Odd("open batch, given", *matmul(8, 16, 6), inputs={"x": (["n", 8], "f4")}, shapes=("5,8",)),
    Odd("a tensor that nothing uses", matmul(8, 16, 6)[0], {**matmul(8, 16, 6)[1], "unused": normal(16)}),
    Odd("a branch inside", [node("MatMul", "x w", "h"), BRANCH, node("MatMul", "o v", "y")],
        {"w": normal(8, 6), "v": normal(6, 6), "c": np.array(True), "k": normal(6)}),
    Odd("a slope that is not finite",
        [node("MatMul", "x w", "h"), node("PRelu", "h s", "r"), node("Clip", "r l m", "q"), node("MatMul", "q v", "y")],
        {"w": normal(8, 6), "v": normal(6, 6), "s": np.array([1, np.inf, 1, 1, 1, 1], "f4"), "l": np.float32(-1),
         "m": np.float32(1)}, at_least=0),
    Odd("a weight that is an input too", *matmul(8, 16, 6), also_inputs=("w0", "b1")),
    Odd("two outputs", [node("MatMul", "x w", "h"), node("MatMul", "h v", "y"), node("ArgMax", "y", "best", axis=1)],
        {"w": normal(8, 6), "v": normal(6, 6)}, outputs=("h", "best", "y")),
    Odd("two inputs", [node("MatMul", "x w", "h"), node("Gather", "t i", "e"), node("Add", "h e", "y")],
        {"w": normal(8, 6), "t": normal(9, 6)}, {"x": ([1, 8], "f4"), "i": ([1], "i8")},
        samples=lambda n: {"x": normal(1, 8, seed=n), "i": np.array([n % 9])}, count=16, at_least=15),
    Odd("an input that nothing reads", *matmul(8, 16, 6), inputs={"x": ([1, 8], "f4"), "unread": ([1, 3], "f4")}),
    Odd("an output that is an input", *matmul(8, 16, 6), outputs=("y", "x")),
    Odd("an output that is a weight", *matmul(8, 16, 6), outputs=("y", "w1")),
    Odd("operator without gradient",
        [node("MatMul", "x w", "h"), node("TopK", "h k", "t n", axis=1), node("MatMul", "t v", "y")],
        {"w": normal(8, 6), "k": np.array([4]), "v": normal(4, 6)}, at_least=25),
    Odd("recurrent", [node("LSTM", "x w r b", "s y", hidden_size=5)],
        {"w": normal(1, 20, 8), "r": normal(1, 20, 5), "b": normal(1, 40)}, {"x": ([6, 1, 8], "f4")}, at_least=25),
    Odd("both ways", [node("GRU", "x w r b", "y", hidden_size=5, direction="bidirectional")],
        {"w": normal(2, 15, 8), "r": normal(2, 15, 5), "b": normal(2, 30)}, {"x": ([6, 1, 8], "f4")}, at_least=25),
)  # fmt: skip


def weights_of(network: Network) -> list[str]:
    return [t.name for t in network.model.tensors if len(t.shape) >= 2 and t.dtype.kind == "f"]


def check_valid(calibrator: Calibrator, result: Result, folder: Path) -> None:
    """All values are finite, of the right shape, small enough, and written and read again those that were measured."""
    model = calibrator.network.model
    for name, entry in result.entries.items():
        assert (entry.name, entry.shape) == (name, model[name].shape)
        assert np.isfinite(entry.array).all()
    path = folder / "written.safetensors"
    container.write(merged(model, result.entries), path, source="onnx", attributes={}, graph=model.graph, level=3)
    read = {entry.name: entry.array for entry in safetensors.read(path).tensors}
    for name, entry in result.entries.items():
        np.testing.assert_array_equal(read[name], entry.array)
    assert calibrator.quality_of(read) == result.quality
    for layer in result.layers:
        assert 0 < layer.step < math.inf
        assert 0 <= layer.sensitivity < math.inf
        assert layer.size_bytes > 0
    assert math.isfinite(result.quality.cosine)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
@pytest.mark.filterwarnings("error")
def test_odd_networks(odd: Odd, tmp_path: Path) -> None:
    network = odd.network(tmp_path)
    calibrator = Calibrator(network, odd.calibration(network), weights_of(network))
    for step in (0.01, 0.3):
        result = calibrator.at(step)
        assert set(weights_of(network)) <= set(result.entries)
        assert {layer.tensor for layer in result.layers} == set(weights_of(network))
        check_valid(calibrator, result, tmp_path)
        if step == 0.01:
            assert result.quality.psnr_db >= odd.at_least


def at(odd: Odd, folder: Path, step: float = 0.01) -> Result:
    network = odd.network(folder)
    return Calibrator(network, odd.calibration(network), weights_of(network)).at(step)


def test_what_is_no_linear_layer_is_quantized_by_its_sensitivity_and_says_so(tmp_path: Path) -> None:
    notes = {}
    for odd in ODD:
        if odd.name in ("elementwise", "tied embedding", "plain", "used twice", "embedding"):
            notes[odd.name] = {layer.tensor: layer.note for layer in at(odd, tmp_path).layers}
    said = "by sensitivity alone: the graph does not use it as a linear layer"
    assert notes == {
        "plain": {"w0": "", "w1": ""},
        "used twice": {"w": ""},
        "embedding": {"t": "", "w": ""},
        "elementwise": {"m": said, "w": "", "v": ""},
        "tied embedding": {"t": said, "w": ""},
    }


def with_value(value: float, *shape: int, at: int = -1) -> Array:
    array = normal(*shape)
    array.reshape(-1)[at] = value
    return array


RELU = [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "y")]
LOG = [node("MatMul", "x w", "h"), node("Log", "h", "k"), node("MatMul", "k v", "y")]
SIDE = [node("Gemm", "x w b", "lost"), node("MatMul", "x v", "y")]
LOOKED_UP = [node("Gather", "w i", "h"), node("MatMul", "h v", "y")]
NOT_FINITE = "holds values that are not finite"
MORE_TOKENS: dict[str, Any] = {"inputs": TOKENS, "samples": ids((1, 12), 40)}
NONE_MORE: dict[str, Any] = {}
REFUSED: tuple[tuple[Odd, str], ...] = (
    *(
        (Odd(f"{value} {name}", nodes, tensors, **more), NOT_FINITE)
        for value in (math.nan, math.inf, -math.inf)
        for name, nodes, tensors, more in (
            ("in a weight", RELU, {"w": with_value(value, 8, 6), "v": normal(6, 6)}, NONE_MORE),
            ("on a side path", SIDE, {"w": with_value(value, 8, 6), "b": normal(6), "v": normal(8, 6)}, NONE_MORE),
            ("in a bias", SIDE, {"w": normal(8, 6), "b": with_value(value, 6), "v": normal(8, 6)}, NONE_MORE),
            (
                "never looked up",
                LOOKED_UP,
                {"w": with_value(value, 50, 6), "v": normal(6, 6)},
                MORE_TOKENS,
            ),
        )
    ),
    (
        Odd("outputs overflow", RELU, {"w": normal(8, 6) * np.float32(1e30), "v": normal(6, 6) * np.float32(1e30)}),
        "outputs on the calibration inputs are not finite",
    ),
    (
        Odd("squares overflow", RELU, {"w": normal(8, 6) * np.float32(1e25), "v": normal(6, 6) * np.float32(1e-25)}),
        "tensor v: the values that go into it are too large to square",
    ),
    (Odd("NaN", LOG, {"w": normal(8, 6), "v": normal(6, 6)}), "outputs on the calibration inputs are not finite"),
    (
        Odd("NaN inside", [*LOG[:3], node("IsNaN", "y", "n"), node("Cast", "n", "z", to=1)],
            {"w": normal(8, 6), "v": normal(6, 6)}, outputs=("z",)),
        "tensor v: a value that goes into it is not finite",
    ),
    (
        Odd("numbers of classes", [node("MatMul", "x w", "h"), node("ArgMax", "h", "y", axis=1)], {"w": normal(8, 6)}),
        "puts out no numbers",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("odd", "words"), REFUSED, ids=lambda value: getattr(value, "name", ""))
@pytest.mark.filterwarnings("error")
def test_refused_in_one_line(odd: Odd, words: str, tmp_path: Path) -> None:
    with pytest.raises(ShrinkError) as caught:
        at(odd, tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code in (2, 3)


def test_what_is_not_quantized_may_hold_anything(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Max", "h m", "y")]
    mask = with_value(-math.inf, 8, 6)
    odd = Odd("mask", nodes, {"w": normal(8, 6), "m": mask})
    network = odd.network(tmp_path)
    result = Calibrator(network, odd.calibration(network), ["w"]).at(0.01)
    assert set(result.entries) == {"w"}
    assert result.quality.psnr_db > 30


def test_a_finer_step_is_better_and_larger_and_the_same_step_gives_the_same(tmp_path: Path) -> None:
    network = ODD[0].network(tmp_path)
    calibrator = Calibrator(network, ODD[0].calibration(network), weights_of(network))
    results = [calibrator.at(10.0**-n) for n in range(1, 6)]
    sizes, qualities = [r.size_bytes for r in results], [r.quality.psnr_db for r in results]
    assert sizes == sorted(sizes)
    assert qualities == sorted(qualities)
    assert qualities[-1] > 80
    again = calibrator.at(results[1].step)
    for name, entry in results[1].entries.items():
        np.testing.assert_array_equal(again.entries[name].array, entry.array)
    assert again == dataclasses.replace(results[1], entries=again.entries)


# --- trained networks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A trained network, samples for calibration, and others on which it is judged."""

    network: Network
    calibration: Calibration
    evaluation: Calibration


def of_zoo(zoo: ZooNetwork) -> Trained:
    shape = ",".join(map(str, (1, *zoo.evaluation.shape[1:])))
    with_batch = given.network(str(zoo.path), None, (shape,))[0]
    name = inputs_of(with_batch)[0].name

    def samples(values: Array) -> Calibration:
        return Calibration(tuple({name: value[None]} for value in values), zoo.name)

    return Trained(with_batch, samples(zoo.calibration), samples(zoo.evaluation[:48]))


def of_chainer(spec: str, weights: Path, shape: str, count: int) -> Trained:
    if importlib.util.find_spec("chainer") is None:
        pytest.skip("Chainer is not installed")
    network = given.network_of(weights, str(MODELS / spec), (shape,))[0]
    wanted = inputs_of(network)
    # The networks make pictures of noise and a class, or of pictures: those are synthetic here, from other seeds.
    distribution = "normal,onehot:10" if spec.endswith("Generator") else None
    seen, unseen = (
        calibration(wanted, distribution=distribution, count=number, seed=seed)
        for number, seed in ((count, 0), (4, 12345))
    )
    return Trained(network, seen, unseen)


def trained(name: str, request: pytest.FixtureRequest, folder: Path) -> Trained:
    if name == "cdcgan":
        return of_chainer("networks.py:Generator", MODELS / "cdcgan.npz", "1,110", 32)
    if name == "vgg7":
        shared = request.getfixturevalue("shared_models")
        return of_chainer("waifu2x.py:VGG7", shared / "waifu2x" / "vgg7_noise0_y.npz", "1,1,48,48", 4)
    if name == "keras-lstm":
        return of_zoo(keras_lstm(request.getfixturevalue("shared_models"), folder))
    return of_zoo(next(zoo for zoo in NETWORKS if zoo.name == name))


def psnr_of(subject: Trained, arrays: Mapping[str, Array]) -> float:
    """PSNR in dB of the network's first output with these values, on the samples that calibration has not seen."""
    from shrink.calibrate.running import Graph

    graph = Graph(subject.network, [])
    types = {name: value.dtype for name, value in subject.evaluation.samples[0].items()}

    def outputs() -> Array:
        program = graph.program(types, graph.outputs[:1])
        return np.stack([program.run(sample)[graph.outputs[0]] for sample in subject.evaluation.samples])

    original = outputs()
    for name, values in arrays.items():
        graph.put(name, values)
    squares = np.mean(np.square(outputs().astype(np.float64) - original))
    return float(10 * np.log10(metrics.peak_of(original) ** 2 / squares))


def stored_bytes(network: Network, entries: Mapping[str, Entry], folder: Path) -> int:
    path = folder / "size.safetensors"
    merging = merged(network.model, entries)
    container.write(merging, path, source="onnx", attributes={}, graph=network.model.graph, level=3)
    return path.stat().st_size


@pytest.mark.parametrize("name", [*(zoo.name for zoo in NETWORKS), "keras-lstm", "cdcgan", "vgg7"])
def test_never_worse_than_int8_at_its_size(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """On samples that calibration has not seen, and by far, in a file of at most the same size."""
    subject = trained(name, request, tmp_path)
    network = subject.network
    decisions = pipeline.decided(network.model, recipes.from_flags("int8", (), (), None, {}))
    int8 = {entry.name: entry for entry in pipeline.quantized(network.model, decisions)}
    size = stored_bytes(network, int8, tmp_path)
    work = Work(network, subject.calibration, network.model, decisions)
    found = quantized(work, Target(max_bytes=size), lambda e: stored_bytes(network, e, tmp_path), None, silent)
    entries = found.result.entries
    assert stored_bytes(network, entries, tmp_path) <= size
    ours = psnr_of(subject, {name: entry.array for name, entry in entries.items()})
    theirs = psnr_of(subject, {name: entry.array for name, entry in int8.items()})
    # An LSTM makes much of little: it is measured on few sentences, and best by less.
    assert ours >= theirs + (0 if "lstm" in name else 3), (ours, theirs)


def pooled(positions: int) -> Odd:
    """The mean over positions of a dense layer, where all positions of a sample have nearly the same inputs."""

    def sample(number: int) -> Values:
        same, own = normal(1, 1, 12, seed=number), normal(1, positions, 12, seed=number, scale=0.1)
        return {"x": same + own}

    return Odd(
        f"pooled {positions}",
        [node("MatMul", "x w", "h"), node("ReduceMean", "h", "y", axes=[1], keepdims=0)],
        {"w": normal(12, 20)},
        {"x": ([1, positions, 12], "f4")},
        samples=sample,
        count=40,
    )


def test_errors_that_add_up_over_positions_are_weighed(tmp_path: Path) -> None:
    """Gradients take positions one by one and do not know of it; what the layer costs when it alone is rounded tells.
    Whatever the number of positions, the same bits keep the same accuracy."""
    found = []
    for positions in (1, 16):
        odd = pooled(positions)
        network = odd.network(tmp_path)
        result = Calibrator(network, odd.calibration(network), ["w"]).at(0.004)
        found.append((result.quality.psnr_db, result.layers[0].bits_per_weight, result.layers[0].sensitivity))
    (one_db, one_bits, one_cost), (many_db, many_bits, many_cost) = found
    assert one_db > 40
    assert many_db == pytest.approx(one_db, abs=3)
    assert many_bits == pytest.approx(one_bits, abs=0.6)
    assert many_cost == pytest.approx(one_cost, rel=0.5)
