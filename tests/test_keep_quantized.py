"""`shrink quantize --keep-quantized`: weights of 8 bits in the file and in ONNX Runtime, with the values measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shrink import formats, given, pipeline
from shrink import recipe as recipes
from shrink.calibrate.calibrated import Calibrator, parted
from shrink.calibrate.inputs import Calibration
from shrink.calibrate.layout import Layout
from shrink.calibrate.quantizing import merged
from shrink.calibrate.resuming import identity_of
from shrink.calibrate.rounding import rounded
from shrink.errors import BadInput
from shrink.export import Network
from shrink.formats import onnx as onnx_format
from shrink.metrics import peak_of
from shrink.model import Entry, Quantized
from tests.command import Outcome, run
from tests.zoo import NETWORKS, ZooNetwork

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper, version_converter  # noqa: E402

Array = NDArray[Any]

ZOO = {zoo.name: zoo for zoo in NETWORKS}
OPSET = 13


def opset_of(proto: Any) -> int:
    return int(next(o.version for o in proto.opset_import if o.domain == ""))


def converted(zoo: ZooNetwork, folder: Path) -> ZooNetwork:
    """The network in an opset that has scales per channel."""
    proto = onnx.load(zoo.path)
    if opset_of(proto) < OPSET:
        proto = version_converter.convert_version(proto, OPSET)
    path = folder / zoo.path.name
    path.write_bytes(proto.SerializeToString(deterministic=True))
    shutil.copy(zoo.path.with_suffix(".npz"), path.with_suffix(".npz"))
    np.savez(folder / "samples.npz", samples(zoo))
    return dataclasses.replace(zoo, path=path)


def samples(zoo: ZooNetwork) -> Array:
    return zoo.calibration[: 8 if zoo.kind == "image" else 64]


def keep(zoo: ZooNetwork, folder: Path, *more: object) -> tuple[Outcome, Path]:
    output = folder / "small.onnx"
    shape = ",".join(map(str, (1, *zoo.calibration.shape[1:])))
    arguments = ("--mode", "calibrated", "--keep-quantized", "--calibrate", folder / "samples.npz", "--input", shape)
    return run("quantize", zoo.path, *arguments, "-o", output, *more), output


def result(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.stderr
    found: dict[str, Any] = json.loads(outcome.stdout)
    return found


def arrays_of(proto: Any) -> dict[str, Array]:
    return {slot.name: numpy_helper.to_array(slot) for slot in proto.graph.initializer}


def expanded(proto: Any) -> dict[str, Array]:
    """What each DequantizeLinear behind an int8 initializer gives, worked out here, in float32, by its output or that
    of the Reshape which makes a matrix of it."""
    arrays = arrays_of(proto)
    reshapes = [n for n in proto.graph.node if n.op_type == "Reshape" and n.input[1] in arrays]
    matrices = {n.input[0]: (n.output[0], arrays[n.input[1]]) for n in reshapes}
    found = {}
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scale = (arrays[name] for name in node.input)
        assert (codes.dtype, scale.dtype) == (np.dtype(np.int8), np.dtype(np.float32))
        if scale.ndim:
            axis = next(a.i for a in node.attribute if a.name == "axis")
            assert scale.shape == (codes.shape[axis],)
            scale = scale.reshape([-1 if number == axis else 1 for number in range(codes.ndim)])
        name, shape = matrices.get(node.output[0], (node.output[0], codes.shape))
        found[name] = (codes.astype(np.float32) * scale).reshape(shape)
    return found


def check_reaches_its_nodes_through_dequantizing_only(proto: Any, weights: dict[str, tuple[int, ...]]) -> None:
    arrays = arrays_of(proto)
    users: dict[str, list[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node.op_type)
    values = expanded(proto)
    for name, shape in weights.items():
        assert name not in arrays
        assert values[name].shape == shape
    for name, array in arrays.items():
        if array.dtype == np.int8:
            assert set(users[name]) == {"DequantizeLinear"}
            assert np.abs(array.astype(int)).max() <= 127


def with_values(original: Path, values: dict[str, Array], path: Path) -> Path:
    """The original network with these values as plain initializers."""
    proto = onnx.load(original)
    for slot in proto.graph.initializer:
        if slot.name in values:
            typed = values[slot.name].astype(numpy_helper.to_array(slot).dtype).reshape(slot.dims)
            slot.CopyFrom(numpy_helper.from_array(typed, slot.name))
    path.write_bytes(proto.SerializeToString())
    return path


def plain_and_expanded(path: Path) -> dict[str, Array]:
    """All float values of a written file by their names in the original: also of biases."""
    proto = onnx.load(path)
    arrays = arrays_of(proto)
    cast = {n.output[0]: arrays[n.input[0]] for n in proto.graph.node if n.op_type == "Cast" and n.input[0] in arrays}
    return {**arrays, **cast, **expanded(proto)}


def psnr(original: Array, other: Array) -> float:
    return float(10 * np.log10(peak_of(original) ** 2 / np.mean(np.square(original.astype("f8") - other))))


@pytest.mark.parametrize("name", ["dense", "excitation", "lstm", "transformer", "upscaler"])
def test_onnx_runtime_gets_what_was_measured(name: str, tmp_path: Path) -> None:
    """With its default options; and the bound is kept, as one measures it oneself."""
    zoo = converted(ZOO[name], tmp_path)
    bound = 42
    said = result(keep(zoo, tmp_path, "--min-psnr", bound, "--json")[0])
    output = tmp_path / "small.onnx"
    proto = onnx.load(output)
    onnx.checker.check_model(proto, full_check=True)
    weights = {layer["tensor"]: tuple(layer["shape"]) for layer in said["layers"]}
    assert len(weights) >= 3
    check_reaches_its_nodes_through_dequantizing_only(proto, weights)
    assert said["output_bytes"] == output.stat().st_size < zoo.path.stat().st_size

    # The choice is made by the seed, 0.
    held_out = np.stack([sample["x"] for sample in parted([{"x": x} for x in samples(zoo)], 0)[0]])
    assert said["calibration"]["held_out"] == len(held_out)
    plain = with_values(zoo.path, plain_and_expanded(output), tmp_path / "plain.onnx")
    ours = zoo.outputs(held_out, output)
    np.testing.assert_allclose(ours, zoo.outputs(held_out, plain), rtol=1e-5, atol=1e-5 * np.abs(ours).max())
    measured = psnr(zoo.outputs(held_out), ours)
    assert said["psnr_db"] == pytest.approx(measured, abs=0.02)
    assert bound <= said["psnr_db"] < bound + 4


@pytest.mark.parametrize("name", ["dense", "transformer", "upscaler"])
def test_onnx_runtime_keeps_them_in_8_bits(name: str, tmp_path: Path) -> None:
    """The graph that it runs, with all its optimizations, has no float weights; as --mode int8 makes it, it has."""
    zoo = converted(ZOO[name], tmp_path)
    said = result(keep(zoo, tmp_path, "--step", 0.005, "--json")[0])
    shapes = [tuple(layer["shape"]) for layer in said["layers"]]
    largest = sum(int(np.prod(shape)) for shape in shapes)
    int8 = tmp_path / "int8.onnx"
    assert run("quantize", zoo.path, "--mode", "int8", "-o", int8).code == 0

    def optimized(path: Path) -> dict[str, int]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        arrays = arrays_of(onnx.load(tmp_path / "optimized.onnx"))
        return {kind: sum(a.size for a in arrays.values() if a.dtype == kind) for kind in ("int8", "float32")}

    kept, folded = optimized(tmp_path / "small.onnx"), optimized(int8)
    assert kept["int8"] == largest
    assert folded["int8"] == 0
    assert kept["float32"] < folded["float32"] - 0.9 * largest


@pytest.mark.parametrize("name", ["dense", "excitation", "lstm", "transformer", "upscaler"])
def test_the_best_that_8_bits_hold_is_better_than_int8(name: str, tmp_path: Path) -> None:
    """On inputs that it has not seen, in a file that is no larger but for a few names."""
    zoo = converted(ZOO[name], tmp_path)
    int8 = tmp_path / "int8.onnx"
    assert run("quantize", zoo.path, "--mode", "int8", "-o", int8).code == 0
    most = int8.stat().st_size + 2000
    said = result(keep(zoo, tmp_path, "--max-mb", most / 1e6, "--json")[0])
    assert said["passes"] == 1
    assert said["output_bytes"] == (tmp_path / "small.onnx").stat().st_size <= most
    unseen = zoo.evaluation[:48]
    original = zoo.outputs(unseen)
    ours, theirs = (psnr(original, zoo.outputs(unseen, path)) for path in (tmp_path / "small.onnx", int8))
    assert ours > theirs + (1 if name == "lstm" else 3), (ours, theirs)


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        (("--max-mb", 0.05), ("weights of 8 bits take ", " over 50,000")),
        (("--min-psnr", 120), ("no step keeps 120 dB", "the closest came to 7")),
        (("--min-psnr", 40, "--max-mb", 0.05), ("40 dB take ", "over 50,000")),
    ],
)
def test_what_8_bits_do_not_hold(bound: tuple[object, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    outcome, output = keep(converted(ZOO["dense"], tmp_path), tmp_path, *bound)
    check_refused(outcome, 4, output, *words)


def check_refused(outcome: Outcome, code: int, output: Path, *words: str) -> None:
    assert (outcome.code, outcome.stdout) == (code, ""), outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert not [word for word in words if word not in outcome.stderr], outcome.stderr
    assert not output.exists()


def test_opsets_that_have_no_scales_per_channel(tmp_path: Path) -> None:
    """It is said before anything is calibrated."""
    np.savez(tmp_path / "samples.npz", samples(ZOO["dense"]))
    outcome, output = keep(ZOO["dense"], tmp_path, "--min-psnr", 40)
    check_refused(outcome, 3, output, "opset is 11", "need 13 or newer", "onnx.version_converter")
    model = formats.sniff(ZOO["dense"].path).read(ZOO["dense"].path)
    with pytest.raises(BadInput, match="opset is 11"):
        onnx_format.write(model, model.tensors, output, None, keep_quantized=True)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--mode calibrated --step 0.1 --keep-quantized -o {}/a.safetensors", "name the output .onnx"),
        ("--mode calibrated --step 0.1 --keep-quantized -o {}/a.npz", "name the output .onnx"),
        ("--mode int8 --keep-quantized -o {}/a.onnx", "belong to --mode calibrated"),
        ("--mode calibrated --keep-quantized -o {}/a.onnx", "wants to know how far it may go"),
    ],
)
def test_what_makes_no_sense(arguments: str, words: str, tmp_path: Path) -> None:
    zoo = converted(ZOO["dense"], tmp_path)
    before = set(tmp_path.iterdir())
    outcome = run("quantize", zoo.path, *arguments.format(tmp_path).split())
    check_refused(outcome, 2, tmp_path / "a.onnx", words)
    assert set(tmp_path.iterdir()) == before


def test_weights_alone_have_no_graph(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"l/W": np.ones((40, 40), "f4")}
    np.savez(tmp_path / "gen.npz", **arrays)
    outcome = run("quantize", tmp_path / "gen.npz", "--mode", "calibrated", "--step", 0.1, "--keep-quantized")
    check_refused(outcome, 2, tmp_path / "gen.calibrated.onnx", "graph")


def test_it_is_named_after_the_model(tmp_path: Path) -> None:
    zoo = converted(ZOO["dense"], tmp_path)
    outcome = run(
        "quantize", zoo.path, "--mode", "calibrated", "--keep-quantized", "--step", 0.02,
        "--calibrate", tmp_path / "samples.npz",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"dense.onnx", "dense.npz", "samples.npz", "dense.calibrated.onnx"}


# --- graphs of every kind ----------------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


@dataclasses.dataclass(frozen=True)
class Graph:
    """A network whose weight `w` is to have scales along `axis`, or one scale for all where that is None."""

    name: str
    nodes: list[Any]
    shape: tuple[int, ...]
    axis: int | None
    input: tuple[int, ...] = (1, 32)
    kind: Any = np.float32
    ids: int = 0

    def written(self, folder: Path) -> Network:
        tensors = {"w": normal(*self.shape).astype(self.kind)}
        if any("v" in n.input for n in self.nodes):
            tensors["v"] = normal(32, 48, seed=1)
        if any("dims" in n.input for n in self.nodes):
            tensors["dims"] = np.array([32, 48])
        numbers = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.float64: TensorProto.DOUBLE}
        of_input = TensorProto.INT64 if self.ids else numbers[self.kind]
        graph = helper.make_graph(
            self.nodes,
            "made",
            [helper.make_tensor_value_info("x", of_input, list(self.input))],
            [helper.make_tensor_value_info("y", numbers[self.kind], None)],
            [numpy_helper.from_array(array, name) for name, array in tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        path = folder / "made.onnx"
        path.write_bytes(model.SerializeToString(deterministic=True))
        return given.network(str(path), None, ())[0]

    def samples(self) -> list[dict[str, Array]]:
        rng = np.random.default_rng(7)
        if self.ids:
            return [{"x": rng.integers(0, self.ids, self.input)} for _ in range(8)]
        return [{"x": rng.standard_normal(self.input).astype(self.kind)} for _ in range(8)]


PICTURE = (1, 32, 9, 7)
MADE = (
    Graph("dense", [node("MatMul", "x w", "y")], (32, 48), 1),
    Graph("dense, transposed", [node("Gemm", "x w", "y", transB=1)], (48, 32), 0),
    Graph("convolution", [node("Conv", "x w", "y")], (24, 32, 3, 3), 0, PICTURE),
    Graph("depthwise", [node("Conv", "x w", "y", group=32)], (32, 1, 7, 7), 0, (1, 32, 12, 12)),
    Graph("in groups", [node("Conv", "x w", "y", group=4)], (24, 8, 3, 3), 0, PICTURE),
    Graph("deconvolution", [node("ConvTranspose", "x w", "y", strides=[2, 2])], (32, 10, 4, 4), 1, PICTURE),
    Graph("uneven", [node("ConvTranspose", "x w", "y", strides=[2, 3])], (32, 10, 3, 5), 1, PICTURE),
    Graph("deconvolution in groups", [node("ConvTranspose", "x w", "y", group=2)], (32, 6, 3, 3), 1, PICTURE),
    Graph(
        "recurrent, both ways",
        [node("Constant", "", "r", value=numpy_helper.from_array(normal(2, 30, 10) / np.float32(4))),
         node("GRU", "x w r", "y", hidden_size=10, direction="bidirectional")],
        (2, 30, 32), 1, (6, 1, 32),
    ),
    Graph("embedding", [node("Gather", "w x", "y")], (60, 32), 1, (1, 12), ids=60),
    Graph(
        "tied embedding",
        [node("Gather", "w x", "e"), node("Transpose", "w", "t", perm=[1, 0]), node("MatMul", "e t", "y")],
        (60, 32), None, (1, 12), ids=60,
    ),
    Graph("elementwise", [node("MatMul", "x v", "h"), node("Mul", "h w", "y")], (40, 48), None),
    Graph("float16", [node("MatMul", "x w", "y")], (32, 64), 1, kind=np.float16),
    Graph("float64", [node("MatMul", "x w", "y")], (32, 48), 1, kind=np.float64),
    Graph(
        "laid out anew",
        [node("Reshape", "w dims", "m"), node("MatMul", "x m", "y")],
        (4, 8, 48), 2,
    ),
    Graph(
        "outputs in two axes",
        [node("Reshape", "w dims", "m"), node("MatMul", "x m", "y")],
        (32, 4, 12), 2,
    ),
    Graph(
        "outputs and inputs in one axis",
        [node("Reshape", "w dims", "m"), node("MatMul", "x m", "y")],
        (1536, 1), None,
    ),
)  # fmt: skip


def axis_of(entry: Entry) -> int | None:
    assert isinstance(entry, Quantized)
    axis: int | None = entry.steps[-1].params["axis"]
    return axis


def outputs_of(path: Path, samples: list[dict[str, Array]]) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.stack([session.run(["y"], sample)[0] for sample in samples])


@pytest.mark.parametrize("graph", MADE, ids=lambda graph: graph.name)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_weight(graph: Graph, tmp_path: Path) -> None:
    network = graph.written(tmp_path)
    model, samples = network.model, graph.samples()
    names = [t.name for t in model.tensors if len(t.shape) >= 2]
    calibrator = Calibrator(network, Calibration(tuple(samples), "made"), names, keep_quantized=True)
    for step in (1e-8, 0.02):
        found = calibrator.at(step)
        assert axis_of(found.entries["w"]) == graph.axis
        assert {layer.tensor for layer in found.layers} == set(names)
        assert all(layer.step > 0 for layer in found.layers)
        assert found.quality.psnr_db >= (35 if step < 0.01 else 28)
        path = tmp_path / "small.onnx"
        onnx_format.write(model, merged(model, found.entries), path, None, keep_quantized=True)
        proto = onnx.load(path)
        stored = [slot for slot in proto.graph.initializer if slot.data_type == TensorProto.INT8]
        assert [np.prod(slot.dims) for slot in stored] == [model[name].size for name in names]
        largest = max(np.prod(s.dims) for s in proto.graph.initializer if s.data_type != TensorProto.INT8)
        assert largest <= 96
        values = {name: found.entries[name].array for name in names}
        plain = with_values(tmp_path / "made.onnx", values, tmp_path / "plain.onnx")
        ours, measured = outputs_of(path, samples), outputs_of(plain, samples)
        # ONNX Runtime computes float16 in float32 where it is expanded, and rounds to float16 where it is stored.
        close = 2e-3 if graph.kind == np.float16 else 1e-5
        np.testing.assert_allclose(ours, measured, rtol=close, atol=close * float(np.abs(measured).max()))


def test_what_is_small_or_not_of_8_bits_is_written_as_ever(tmp_path: Path) -> None:
    """Other modes' entries come out as without the flag."""
    zoo = converted(ZOO["transformer"], tmp_path)
    model = formats.sniff(zoo.path).read(zoo.path)
    for mode in ("float16", "eightbit", "int4"):
        decisions = pipeline.decided(model, recipes.from_flags(mode, (), (), None, {}))
        paths = [tmp_path / "with.onnx", tmp_path / "without.onnx"]
        for path in paths:
            entries = pipeline.quantized(model, decisions)
            onnx_format.write(model, entries, path, None, keep_quantized=path is paths[0])
        assert paths[0].read_bytes() == paths[1].read_bytes()


# --- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("groups", [1, 3])
def test_codes_fit_8_bits_and_steps_are_no_wider_than_that_takes(seed: int, groups: int) -> None:
    """Also where taking errors back makes codes larger than weights: inputs that are all nearly the same."""
    rng = np.random.default_rng([seed, groups])
    outputs, inputs = 12, 30
    alike = rng.standard_normal((200, 1)) + 0.05 * rng.standard_normal((groups, 200, inputs))
    h = np.einsum("gni,gnj->gij", alike, alike) / 200
    g = np.broadcast_to(np.eye(outputs), (groups, outputs, outputs)).copy()
    w = rng.standard_normal((groups, outputs, inputs)) * np.logspace(-3, 3, outputs)[:, None]
    numbers = np.arange(groups * outputs)
    place = Layout((groups * outputs, inputs), (0,), numbers.reshape(groups, outputs), numbers, None)
    nowhere = np.zeros(w.shape, np.bool_)
    made = rounded(w, nowhere, h, g, 1e-6, place, 127)
    codes = np.abs(made.codes).max(axis=2).reshape(-1)
    assert codes.max() <= 127
    assert codes.min() >= 100
    steps = made.row_steps.reshape(groups, outputs, 1)
    np.testing.assert_array_equal(made.values, made.codes.astype(np.float32) * steps)
    np.testing.assert_array_less(np.abs(w).max(axis=2).reshape(-1), 128 * made.row_steps.astype(np.float64))
    # It is the feedback that is kept, not plain rounding.
    error = made.values - w
    plain = np.rint(w / steps) * steps - w
    ours, theirs = (np.einsum("goi,gij,goj->", e, h, e) for e in (error, plain))
    assert ours < 0.5 * theirs


def test_wide_codes_do_not_change_with_the_parameter(tmp_path: Path) -> None:
    """Where codes are small anyway, it is the grid of half octaves as ever."""
    w = normal(1, 6, 8).astype(np.float64)
    h, g = np.eye(8)[None], np.eye(6)[None]
    place = Layout((6, 8), (0,), np.arange(6)[None], np.arange(6), None)
    nowhere = np.zeros(w.shape, np.bool_)
    first, second = rounded(w, nowhere, h, g, 0.1, place), rounded(w, nowhere, h, g, 0.1, place, 127)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.row_steps, np.float32(first.scale * 2.0 ** (first.row_exponents / 2)))


def test_it_is_work_of_its_own(tmp_path: Path) -> None:
    """What an interrupted run has left is not taken for that of another kind."""
    network = MADE[0].written(tmp_path)
    samples = Calibration(tuple(MADE[0].samples()), "made")
    one, other = (identity_of(network, samples, ["w"], 0, 1, keep_quantized=keep) for keep in (False, True))
    assert one != other
