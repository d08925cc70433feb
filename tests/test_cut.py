"""Graphs in stages: the fewest, each within the limit and a model of its own, together the very bits of the whole."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shrink import parts
from shrink.errors import BadInput, BoundNotMet, UsageError
from shrink.progress import silent
from shrink.split import Plan
from shrink.split._partition import Unit, divide
from shrink.split.cut import Graph, Stage, cut, examine, plan, stage_models
from tests import browser as browsers

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tests" / "node_modules" / "onnxruntime-web"
GOLDEN = ROOT / "tests" / "golden" / "stages"
needs_package = pytest.mark.skipif(
    not (PACKAGE / "package.json").is_file(), reason="onnxruntime-web is not installed: run `npm ci` in tests/"
)

Values = dict[str, NDArray[Any]]
SOURCE = Path("model.onnx")
value = helper.make_tensor_value_info
F32 = TensorProto.FLOAT


class Net:
    """A graph that is written layer by layer; every method returns the name of what it computes."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: dict[str, NDArray[Any]] = {}
        self.channels: dict[str, int] = {}
        self.functions: list[Any] = []
        self.opsets = {"": 17}

    def op(self, kind: str, *inputs: str, channels: int | None = None, **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        self.channels[name] = channels if channels is not None else self.channels.get(inputs[0] if inputs else "", 0)
        return name

    def weight(self, *shape: int, scale: float | None = None) -> str:
        fan = int(np.prod(shape[1:])) or 1
        return self.constant((self.rng.standard_normal(shape) * (scale or (1 / fan) ** 0.5)).astype("f4"))

    def constant(self, values: NDArray[Any]) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = values
        return name

    def conv(self, x: str, out: int, kernel: int = 3, stride: int = 1) -> str:
        into = self.channels[x]
        w, b = self.weight(out, into, kernel, kernel), self.weight(out, scale=0.1)
        pad = [kernel // 2] * 4
        return self.op("Conv", x, w, b, channels=out, pads=pad, strides=[stride, stride], kernel_shape=[kernel] * 2)

    def deconv(self, x: str, out: int) -> str:
        w = self.weight(self.channels[x], out, 2, 2)
        return self.op("ConvTranspose", x, w, channels=out, strides=[2, 2], kernel_shape=[2, 2])

    def norm(self, x: str) -> str:
        n = self.channels[x]
        scale, var = (self.constant((self.rng.random(n) + 0.5).astype("f4")) for _ in range(2))
        return self.op("BatchNormalization", x, scale, self.weight(n, scale=0.1), self.weight(n, scale=0.1), var)

    def dense(self, x: str, out: int) -> str:
        return self.op(
            "Gemm", x, self.weight(out, self.channels[x]), self.weight(out, scale=0.1), channels=out, transB=1
        )

    def linear(self, x: str, out: int, bias: bool = True) -> str:
        y = self.op("MatMul", x, self.weight(self.channels[x], out, scale=self.channels[x] ** -0.5), channels=out)
        return self.op("Add", y, self.weight(out, scale=0.1)) if bias else y

    def scalar(self, number: float) -> str:
        return self.constant(np.array(number, "f4"))

    def layer_norm(self, x: str, decomposed: bool) -> str:
        n = self.channels[x]
        scale, bias = self.constant((self.rng.random(n) + 0.5).astype("f4")), self.weight(n, scale=0.1)
        if not decomposed:
            return self.op("LayerNormalization", x, scale, bias, axis=-1)
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1]))
        squares = self.op("ReduceMean", self.op("Pow", centred, self.scalar(2)), axes=[-1])
        root = self.op("Sqrt", self.op("Add", squares, self.scalar(1e-5)))
        return self.op("Add", self.op("Mul", self.op("Div", centred, root), scale), bias)

    def gelu(self, x: str) -> str:
        inner = self.op("Erf", self.op("Div", x, self.scalar(2**0.5)))
        return self.op("Mul", self.op("Mul", x, self.op("Add", inner, self.scalar(1))), self.scalar(0.5))

    def attention(self, x: str, heads: int, width: int, bias: bool) -> str:
        n = self.channels[x]
        split = self.constant(np.array([0, 0, heads, width], "i8"))
        q, k, v = (self.op("Reshape", self.linear(x, heads * width, bias), split) for _ in range(3))
        q, v = (self.op("Transpose", y, perm=[0, 2, 1, 3]) for y in (q, v))
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = self.op("Softmax", self.op("Div", scores, self.scalar(width**0.5)), axis=-1)
        y = self.op("Transpose", self.op("MatMul", scores, v), perm=[0, 2, 1, 3])
        y = self.op("Reshape", y, self.constant(np.array([0, 0, heads * width], "i8")), channels=heads * width)
        return self.linear(y, n, bias)

    def model(self, inputs: Mapping[str, Sequence[Any]], outputs: Sequence[str], ir_version: int = 9) -> Any:
        graph = helper.make_graph(
            self.nodes,
            "network",
            [value(name, F32, shape) for name, shape in inputs.items()],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [numpy_helper.from_array(values, name) for name, values in self.weights.items()],
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        made = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=self.functions)
        inferred = {i.name: i for i in onnx.shape_inference.infer_shapes(made).graph.output}
        del made.graph.output[:]
        made.graph.output.extend(inferred[name] for name in outputs)
        onnx.checker.check_model(made, full_check=True)
        return made


# --- random networks -------------------------------------------------------------------------------------------

ACTIVATIONS = ["Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "silu", "none"]
CHANNELS = st.sampled_from([3, 4, 8, 12, 16, 24, 32])


def activate(net: Net, x: str, kind: str) -> str:
    if kind == "silu":
        return net.op("Mul", x, net.op("Sigmoid", x))
    if kind == "Clip":
        return net.op("Clip", x, net.scalar(0), net.scalar(6))
    return x if kind == "none" else net.op(kind, x)


def block(draw: Any, net: Net, x: str, out: int) -> str:
    y = net.conv(x, out, draw(st.sampled_from([1, 3])))
    if draw(st.booleans()):
        y = net.norm(y)
    return activate(net, y, draw(st.sampled_from(ACTIVATIONS)))


@st.composite
def pictures(draw: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Convolutions with residuals, branches, gates, pools and what is skipped to a way up, as a U-Net has."""
    net = Net(draw(st.integers(0, 1000)))
    net.channels["x"] = draw(CHANNELS)
    shape = (1, net.channels["x"], 16, 16)
    x = "x"
    skips: list[str] = []
    results: list[str] = []
    for _ in range(draw(st.integers(2, 7))):
        kind = draw(
            st.sampled_from(["plain", "residual", "projected", "down", "up", "branches", "dense", "gate", "result"])
        )
        n = net.channels[x]
        if kind == "plain":
            x = block(draw, net, x, draw(CHANNELS))
        elif kind == "residual":
            y = net.conv(block(draw, net, x, n), n)
            y = net.norm(y) if draw(st.booleans()) else y
            x = activate(net, net.op("Add", *draw(st.permutations([x, y]))), draw(st.sampled_from(ACTIVATIONS)))
        elif kind == "projected":
            out = draw(CHANNELS)
            x = activate(net, net.op("Add", block(draw, net, x, out), net.norm(net.conv(x, out, 1))), "Relu")
        elif kind == "down" and len(skips) < 3:
            skips.append(x)
            pool = draw(st.sampled_from(["MaxPool", "AveragePool", "stride"]))
            x = net.conv(x, n, 3, 2) if pool == "stride" else net.op(pool, x, kernel_shape=[2, 2], strides=[2, 2])
        elif kind == "up" and skips:
            skip = skips.pop()
            y = activate(net, net.deconv(activate(net, x, "Relu"), draw(CHANNELS)), draw(st.sampled_from(ACTIVATIONS)))
            x = net.op("Concat", y, skip, axis=1, channels=net.channels[y] + net.channels[skip])
        elif kind == "branches":
            branches = [block(draw, net, x, draw(CHANNELS)) for _ in range(2)]
            if draw(st.booleans()):
                pooled = net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
                branches.append(net.conv(pooled, draw(CHANNELS), 1))
            x = net.op("Concat", *branches, axis=1, channels=sum(net.channels[b] for b in branches))
        elif kind == "dense":
            y = net.conv(activate(net, net.norm(x), "Relu"), draw(CHANNELS))
            x = net.op("Concat", x, y, axis=1, channels=n + net.channels[y])
        elif kind == "gate":
            y = net.conv(net.conv(net.op("GlobalAveragePool", x), 4, 1), n, 1)
            x = net.op("Mul", x, net.op("Sigmoid", y))
        elif kind == "result":
            results.append(x)
    if draw(st.booleans()):
        x = net.op("Flatten", net.op("GlobalAveragePool", x), axis=1)
        x = net.op("Softmax", net.dense(x, 10), axis=1)
    results = [name for name in dict.fromkeys(results) if name not in ("x", x)]
    assume(x != "x")
    batch = draw(st.sampled_from([1, "N"]))
    return net.model({"x": [batch, *shape[1:]]}, [*results, x]), {"x": shape}


@st.composite
def vectors(draw: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Dense layers, with two inputs that meet."""
    net = Net(draw(st.integers(0, 1000)))
    net.channels |= {"x": 10, "y": 6}
    width = draw(st.sampled_from([5, 16, 40]))
    x, y = net.dense("x", width), net.dense("y", width)
    for _ in range(draw(st.integers(1, 5))):
        h = activate(net, x, draw(st.sampled_from(ACTIVATIONS)))
        h = net.dense(h, width) if draw(st.booleans()) else net.linear(h, width)
        x = net.op("Add", h, x) if draw(st.booleans()) else h
    x = net.op("Concat", x, y, axis=1, channels=2 * width) if draw(st.booleans()) else net.op("Add", x, y)
    x = net.op("Softmax", net.dense(x, 7), axis=1)
    return net.model({"x": ["N", 10], "y": ["N", 6]}, [x]), {"x": (1, 10), "y": (1, 6)}


@st.composite
def sequences(draw: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Transformers, with the normalization before or behind each branch, as one operator or many."""
    net = Net(draw(st.integers(0, 1000)))
    width, heads = draw(st.sampled_from([(16, 2), (32, 4)]))
    net.channels["x"] = width
    first, decomposed, bias = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    x = net.layer_norm("x", decomposed) if draw(st.booleans()) else net.linear("x", width)
    for _ in range(draw(st.integers(1, 3))):
        for branch in ("attention", "dense"):
            h = net.layer_norm(x, decomposed) if first else x
            if branch == "attention":
                h = net.attention(h, heads, width // heads, bias)
            else:
                h = net.linear(net.gelu(net.linear(h, 4 * width, bias)), width, bias)
            x = net.op("Add", h, x)
            x = x if first else net.layer_norm(x, decomposed)
    return net.model({"x": ["N", 7, width]}, [net.linear(x, 11)]), {"x": (1, 7, width)}


def run(model: Any, feeds: Values) -> Values:
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    wanted = {info.name for info in session.get_inputs()}
    return dict(zip(names, session.run(names, {n: v for n, v in feeds.items() if n in wanted}), strict=True))


def run_stages(models: Sequence[Any], feeds: Values) -> Values:
    held = dict(feeds)
    for model in models:
        held |= run(model, {info.name: held[info.name] for info in model.graph.input})
    return held


def feeds_of(shapes: Mapping[str, tuple[int, ...]]) -> Values:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


def check_stages(model: Any, graph: Graph, stages: Sequence[Stage], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Valid models of the size that was said, with no input or output too many, that compute the very same bits."""
    models = stage_models(graph, stages)
    held = set(shapes)
    needed = {info.name for info in model.graph.output}
    for number, (stage, made) in enumerate(zip(stages, models, strict=True)):
        onnx.checker.check_model(made, full_check=True)
        assert made.ByteSize() <= stage.size_bytes
        assert set(stage.inputs) <= held
        held |= set(stage.outputs)
        used = {name for node in made.graph.node for name in node.input}
        assert set(stage.inputs) <= used | needed
        later = {name for other in stages[number + 1 :] for name in other.inputs}
        assert set(stage.outputs) <= later | needed
    assert needed <= held
    feeds = feeds_of(shapes)
    whole, chained = run(model, feeds), run_stages(models, feeds)
    for name, values in whole.items():
        assert chained[name].dtype == values.dtype
        assert chained[name].tobytes() == values.tobytes(), f"{name} in {len(stages)} stages"


@pytest.mark.parametrize("kind", [pictures, vectors, sequences])
def test_stages_compute_the_bits_of_the_whole(kind: Callable[[], Any]) -> None:
    pytest.importorskip("onnxruntime")

    @given(kind(), st.integers(1, 12))
    def property_(made: Any, share: int) -> None:
        model, shapes = made
        limit = max(1000, model.ByteSize() // share)
        graph = examine(type(model).FromString(model.SerializeToString()), SOURCE, list(shapes.values()))
        check_stages(model, graph, cut(graph, {}, limit), shapes)

    property_()


# --- the division ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=9),
    st.integers(60, 200),
)
def test_no_other_division_has_fewer_stages_or_less_crossing(layers: list[tuple[int, int, int]], limit: int) -> None:
    """Against all divisions of a chain in which some tensors skip ahead."""
    units, reads = [], []
    for number, (size, _, skip) in enumerate(layers):
        read = frozenset({f"t{number - 1}", f"t{max(0, number - 1 - skip)}"}) if number else frozenset[str]()
        reads.append(read)
        units.append(Unit((), read, (f"t{number}",), frozenset(), size))
    sizes = {f"t{number}": crossing for number, (_, crossing, _) in enumerate(layers)}
    graph = Graph(onnx.ModelProto(), SOURCE, {}, (), (), {}, sizes, {}, frozenset())
    found = divide(graph, units, limit, {}, dict.fromkeys(sizes, 0), 0)

    def crossing(cut_at: int) -> int:
        return sum(sizes[f"t{n}"] for n in range(cut_at) if any(f"t{n}" in later for later in reads[cut_at:]))

    best = None
    for count in range(len(units)):
        for inner in itertools.combinations(range(1, len(units)), count):
            edges = (0, *inner, len(units))
            if all(sum(u.own_bytes for u in units[a:b]) <= limit for a, b in itertools.pairwise(edges)):
                cost = (len(edges) - 1, sum(map(crossing, inner)))
                best = cost if best is None or cost < best else best
    assert found.cost == best


def chain(layers: int, width: int = 64) -> Any:
    net = Net()
    net.channels["x"] = width
    x = "x"
    for _ in range(layers):
        x = net.op("Relu", net.dense(x, width))
    return net.model({"x": ["N", width]}, [x])


def stages_of(model: Any, limit: int, shapes: Sequence[tuple[int, ...]] | None = None) -> tuple[Graph, Any]:
    graph = examine(type(model).FromString(model.SerializeToString()), SOURCE, shapes)
    return graph, cut(graph, {}, limit)


def test_what_waits_is_counted_and_results_and_inputs_are_not() -> None:
    net = Net()
    net.channels["x"] = 8
    early = net.op("Relu", net.dense("x", 32))
    late = net.op("Relu", net.dense(net.op("Relu", net.dense(early, 16)), 8))
    y = net.op("Concat", net.dense(late, 32), early, "x", axis=1)
    for outputs, expected in (([y], 4 * (32 + 16)), ([y, early], 4 * 16)):
        graph, stages = stages_of(net.model({"x": ["N", 8]}, outputs), 3000, [(1, 8)])
        assert [stage.crossing_bytes for stage in stages][-1] == 0
        (second,) = (stage for stage in stages if "relu3" in stage.outputs)
        assert second.crossing_bytes == expected
        del graph


def test_another_order_is_taken_where_it_needs_less() -> None:
    """Two towers that take turns in the file: side by side, both would be kept at every cut."""
    net = Net()
    net.channels["x"] = 64
    a = b = "x"
    for _ in range(3):
        a, b = net.op("Relu", net.dense(a, 64)), net.op("Relu", net.dense(b, 64))
    model = net.model({"x": ["N", 64]}, [net.dense(net.op("Concat", a, b, axis=1, channels=128), 4)])
    _, stages = stages_of(model, 2 * 17_000)
    assert [stage.crossing_bytes for stage in stages] == [256, 256, 512, 0]


# --- what else a graph may hold --------------------------------------------------------------------------------


def small_parts(model: Any, feeds: Values, limit: int = 1000) -> list[Any]:
    """The stages as models, at a limit that makes a stage of every layer, checked against the whole."""
    shapes = {info.name: feeds[info.name].shape for info in model.graph.input if info.name in feeds}
    graph, stages = stages_of(model, limit, list(shapes.values()))
    models = stage_models(graph, stages)
    for made in models:
        onnx.checker.check_model(made, full_check=True)
    whole, chained = run(model, feeds), run_stages(models, feeds)
    assert all(chained[name].tobytes() == values.tobytes() for name, values in whole.items())
    return models


def test_graphs_inside_nodes_take_what_they_use_from_outside() -> None:
    pytest.importorskip("onnxruntime")
    net = Net()
    net.channels["x"] = 16
    h = net.op("Relu", net.dense("x", 32))
    scale, shift = net.weight(32), net.op("Relu", net.dense(h, 32))
    branches = [
        helper.make_graph([helper.make_node(op, [h, other], ["r"])], op, [], [value("r", F32, [1, 32])])
        for op, other in (("Mul", scale), ("Sub", shift))
    ]
    truth = net.constant(np.array(False))
    y = net.op("If", truth, then_branch=branches[0], else_branch=branches[1], channels=32)
    model = net.model({"x": [1, 16]}, [net.dense(y, 8)])
    models = small_parts(model, {"x": np.ones((1, 16), "f4")})
    (holder,) = [m for m in models if any(n.op_type == "If" for n in m.graph.node)]
    assert len(models) >= 3
    assert {h, shift} <= {i.name for i in holder.graph.input} | {o for n in holder.graph.node for o in n.output}
    assert scale in {i.name for i in holder.graph.initializer}


def test_functions_and_metadata_and_opsets_go_along() -> None:
    pytest.importorskip("onnxruntime")
    net = Net()
    net.channels["x"] = 16
    net.opsets["own"] = 1
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    net.functions = [helper.make_function("own", "Twist", ["a"], ["c"], body, [helper.make_opsetid("", 17)])]
    h = net.op("Twist", net.dense("x", 32), domain="own", channels=32)
    model = net.model({"x": [1, 16]}, [net.dense(net.op("Relu", net.dense(h, 32)), 8)])
    helper.set_model_props(model, {"licence": "free"})
    models = small_parts(model, {"x": np.ones((1, 16), "f4")})
    assert len(models) >= 3
    assert [len(m.functions) for m in models] == [int(any(n.domain == "own" for n in m.graph.node)) for m in models]
    assert all(m.metadata_props[0].value == "free" and len(m.opset_import) == 2 for m in models)


def test_a_shared_weight_and_what_is_computed_of_weights_lie_in_each_stage() -> None:
    pytest.importorskip("onnxruntime")
    net = Net()
    net.channels["x"] = 32
    codes = net.constant(net.rng.integers(-9, 9, (32, 32)).astype("i1"))
    w = net.op("Mul", net.op("Cast", codes, to=F32), net.scalar(0.05))
    x = "x"
    for _ in range(4):
        x = net.op("Relu", net.op("Gemm", x, w, net.weight(32), transB=1))
    model = net.model({"x": [1, 32]}, [x])
    models = small_parts(model, {"x": np.ones((1, 32), "f4")}, 1700)
    assert len(models) > 2
    for made in models:
        assert [n.op_type for n in made.graph.node][:3] == ["Cast", "Mul", "Gemm"]


def test_ir_version_3_lists_initializers_among_the_inputs() -> None:
    pytest.importorskip("onnxruntime")
    model = chain(3)
    model.ir_version = 3
    model.graph.input.extend(value(i.name, F32, list(i.dims)) for i in model.graph.initializer)
    onnx.checker.check_model(model)
    graph, stages = stages_of(model, 20_000)
    assert len(stages) == 3
    assert all(len(stage.inputs) == 1 for stage in stages)
    for made in stage_models(graph, stages):
        onnx.checker.check_model(made, full_check=True)
        assert {i.name for i in made.graph.initializer} < {i.name for i in made.graph.input}


def test_the_order_of_nodes_does_not_matter() -> None:
    pytest.importorskip("onnxruntime")
    model = chain(4)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    graph, stages = stages_of(model, 20_000)
    assert len(stages) == 4
    for made in stage_models(graph, stages):
        onnx.checker.check_model(made, full_check=True)


# --- malformed graphs ------------------------------------------------------------------------------------------


def circle(model: Any) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def unknown(model: Any) -> None:
    model.graph.node[1].input[0] = "nobody\x1b"


def twice(model: Any) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def lost_result(model: Any) -> None:
    model.graph.output[0].name = "lost"


def two_inputs(model: Any) -> None:
    model.graph.input.add().CopyFrom(model.graph.input[0])


def no_nodes(model: Any) -> None:
    del model.graph.node[:]
    model.graph.output[0].name = "x"


def text_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (circle, "circle"),
        (unknown, "nothing computes it"),
        (twice, "computed twice"),
        (lost_result, "nothing computes it"),
        (two_inputs, "two inputs"),
        (text_input, "not of numbers"),
    ],
)
def test_a_malformed_graph_is_one_clear_error(tmp_path: Path, harm: Callable[[Any], None], says: str) -> None:
    model = chain(3)
    harm(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match=says) as caught:
        plan(tmp_path / "model.onnx", 20_000, tmp_path)
    assert "\x1b" not in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


def test_external_data_elsewhere_is_refused(tmp_path: Path) -> None:
    model = chain(2)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="outside its own folder"):
        plan(folder / "model.onnx", 20_000, folder)
    assert [f.name for f in folder.iterdir()] == ["model.onnx"]


def test_an_open_input_asks_for_its_shape(tmp_path: Path) -> None:
    net = Net()
    net.channels["x"] = 3
    onnx.save(net.model({"x": ["N", 3, "h", "w"]}, [net.conv(net.conv("x", 4), 4)]), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="--input x="):
        plan(tmp_path / "model.onnx", 20_000, tmp_path)
    with pytest.raises(UsageError, match="does not fit"):
        plan(tmp_path / "model.onnx", 20_000, tmp_path, input_shapes=[(1, 4, 8, 8)])
    assert plan(tmp_path / "model.onnx", 20_000, tmp_path, input_shapes=[(1, 3, 8, 8)]).files


# --- files -----------------------------------------------------------------------------------------------------


def written(model: Any, folder: Path, limit: int, **options: Any) -> Plan:
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    made = plan(folder / "model.onnx", limit, folder, **options)
    made.write(silent)
    return made


def index_of(folder: Path) -> dict[str, Any]:
    content, _ = parts.read_json(folder / "model.stages.json")
    return content


def files_in(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("limit", [10_000, 20_000, 60_000, 1_000_000])
def test_every_file_is_within_the_limit_and_as_the_plan_says(tmp_path: Path, limit: int) -> None:
    net = Net()
    net.channels["x"] = 40
    x = net.op("Relu", net.dense("x", 64))
    for width in (64, 200, 40):
        x = net.op("Relu", net.dense(x, width))
    made = written(net.model({"x": ["N", 40]}, [x]), tmp_path, limit)
    present = files_in(tmp_path)
    del present["model.onnx"]
    assert {file.name: file.size_bytes for file in made.files} == {name: len(data) for name, data in present.items()}
    assert all(len(data) <= limit for data in present.values())
    assert made.files[-1].name == "model.stages.json"
    index = index_of(tmp_path)
    for stage in index["stages"]:
        for part in (stage, *stage.get("data", [])):
            assert parts.integrity(present[part["file"]]) == part["integrity"]
            assert len(present[part["file"]]) == part["bytes"]
        onnx.checker.check_model(str(tmp_path / stage["file"]), full_check=True)
    assert any("bit for bit" in note for note in made.notes) or not _has_runtime()
    assert any("one stage" in note for note in made.notes) == (len(index["stages"]) == 1)


def _has_runtime() -> bool:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return False
    return True


def test_an_index_over_the_limit_is_cut_too(tmp_path: Path) -> None:
    made = written(chain(60, 45), tmp_path, 10_000)
    assert len([f for f in made.files if f.name.endswith(".onnx")]) == 60
    assert (tmp_path / "model.stages.json").stat().st_size <= 10_000
    assert "index" in json.loads((tmp_path / "model.stages.json").read_bytes())["shrink"]
    assert len(index_of(tmp_path)["stages"]) == 60


def test_the_index_is_as_it_was(tmp_path: Path) -> None:
    """The stored format: a page written for it must go on working."""
    net = Net()
    net.channels["x"] = 32
    h = net.op("Relu", net.dense("x", 32))
    y = net.op("Concat", net.dense(net.op("Relu", net.dense(h, 64)), 8), h, axis=1)
    written(net.model({"x": ["N", 32]}, [y, h]), tmp_path, 10_000)
    found = index_of(tmp_path)
    for stage in found["stages"]:
        for part in (stage, *stage.get("data", [])):
            # What a library writes may differ from version to version.
            part["bytes"], part["integrity"] = "number", "sha256"
    assert found == json.loads((GOLDEN / "model.stages.json").read_bytes())


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    written(chain(3), tmp_path / "a", 20_000)
    written(chain(3), tmp_path / "b", 20_000)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


def test_a_plan_alone_leaves_nothing(tmp_path: Path) -> None:
    onnx.save(chain(3), tmp_path / "model.onnx")
    made = plan(tmp_path / "model.onnx", 20_000, tmp_path / "new")
    assert len(made.files) == 4
    del made
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


def test_again_and_over_others(tmp_path: Path) -> None:
    written(chain(3), tmp_path, 20_000)
    before = files_in(tmp_path)
    again = written(chain(3), tmp_path, 20_000)
    assert any("exactly so already" in note for note in again.notes)
    with pytest.raises(UsageError, match="exists already"):
        written(chain(4), tmp_path, 20_000)
    (tmp_path / "model.onnx").write_bytes(before["model.onnx"])
    assert files_in(tmp_path) == before
    written(chain(4), tmp_path, 20_000, force=True)
    listed = {stage["file"] for stage in index_of(tmp_path)["stages"]}
    assert files_in(tmp_path).keys() == {"model.onnx", "model.stages.json", *listed}


def test_in_the_folder_of_a_page_the_names_of_stages_hold_a_hash(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>")
    found: list[set[str]] = []
    for layers in (3, 4):
        made = written(chain(layers), tmp_path, 20_000, force=True)
        listed = {stage["file"] for stage in index_of(tmp_path)["stages"]}
        assert files_in(tmp_path).keys() == {"index.html", "model.onnx", "model.stages.json", *listed}
        assert {f.name for f in made.files} == {"model.stages.json", *listed}
        assert all(re.fullmatch(r"model-[0-9a-f]{8}-stage-\d-of-\d\.onnx", name) for name in listed)
        assert "exactly so already" in " ".join(written(chain(layers), tmp_path, 20_000).notes)
        found.append(listed)
    assert not found[0] & found[1]


def test_stages_made_on_another_file_system_are_put_in_place(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=elsewhere) as system, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", system)
        written(chain(3), tmp_path / "a", 20_000, dry_run=True)
    written(chain(3), tmp_path / "b", 20_000)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


def test_killed_at_any_write_there_is_the_old_set_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    replace = os.replace
    for deadline in itertools.count():
        folder = tmp_path / str(deadline)
        written(chain(3), folder, 20_000)
        other = chain(3)
        other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
        onnx.save(other, folder / "model.onnx")
        made = plan(folder / "model.onnx", 20_000, folder, force=True)
        left = deadline

        def dying(source: Any, target: Any) -> None:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)
        try:
            made.write(silent)
            break
        except Killed:
            pass
        finally:
            monkeypatch.setattr(os, "replace", replace)
        for stage in index_of(folder)["stages"]:
            assert parts.integrity((folder / stage["file"]).read_bytes()) == stage["integrity"]
    assert deadline >= 4


def test_a_stage_that_no_data_file_helps_says_the_limit_that_works(tmp_path: Path) -> None:
    net = Net()
    net.channels["x"] = 8
    model = net.model({"x": [1, 8]}, [net.dense("x", 8)])
    model.graph.node[0].doc_string = "long " * 4000
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BoundNotMet, match="smallest limit that works is about 2"):
        plan(tmp_path / "model.onnx", 12_000, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]


def test_a_quantized_model_is_cut_too(tmp_path: Path) -> None:
    from tests.command import run as command

    onnx.save(chain(4, 128), tmp_path / "whole.onnx")
    assert command("quantize", tmp_path / "whole.onnx", "--mode", "int8", "-o", tmp_path / "model.onnx").code == 0
    made = plan(tmp_path / "model.onnx", 25_000, tmp_path)
    made.write(silent)
    assert len(index_of(tmp_path)["stages"]) == 4
    assert sum(f.size_bytes for f in made.files) < 90_000


# --- the browser -----------------------------------------------------------------------------------------------

PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script type="module">
import * as ort from "./ort/ort.js";
import { openStages } from "./shrink/stages.js";
const wasmPaths = { mjs: new URL("ort/module.js", location).href, wasm: new URL("ort/ort.wasm", location).href };
Object.assign(ort.env.wasm, { numThreads: 1, wasmPaths });
ort.env.logLevel = "error";
const tensor = ({ data, dims }) => new ort.Tensor("float32", Float32Array.from(data), dims);
const plain = (results) =>
  Object.fromEntries(Object.entries(results).map(([name, t]) => [name, Array.from(new Uint32Array(t.data.buffer.slice(
    t.data.byteOffset, t.data.byteOffset + t.data.byteLength)))]));
const feedsOf = (feeds) => Object.fromEntries(Object.entries(feeds).map(([name, f]) => [name, tensor(f)]));
window.whole = async (feeds) => plain(await (await ort.InferenceSession.create("model.onnx")).run(feedsOf(feeds)));
window.stages = async (feeds, sequential, runs = 1) => {
  const seen = [];
  const live = { now: 0, most: 0 };
  const counting = {
    InferenceSession: {
      async create(...given) {
        const session = await ort.InferenceSession.create(...given);
        live.most = Math.max(live.most, ++live.now);
        return { run: (f) => session.run(f), release: () => (live.now--, session.release()) };
      },
    },
  };
  try {
    const onProgress = (p) => seen.push(p);
    const network = await openStages(counting, "model.stages.json", { sequential, onProgress });
    let results;
    for (let n = 0; n < runs; n++) results = plain(await network.run(feedsOf(feeds)));
    await network.close();
    return { results, progress: seen.at(-1), live };
  } catch (error) {
    return { code: error.code, message: error.message, live };
  }
};
window.ready = true;
</script>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsers.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small U-Net, whole and in stages, one of which has data files; and a page."""
    folder = tmp_path_factory.mktemp("stages")
    net = Net(3)
    net.channels["x"] = 3
    skips, x = [], "x"
    for width in (16, 24, 96):
        x = net.op("LeakyRelu", net.norm(net.conv(x, width, 3, 2)))
        skips.append(x)
    for width, skip in ((24, skips[1]), (16, skips[0])):
        up = net.op("Relu", net.deconv(x, width))
        x = net.op("Concat", up, skip, axis=1, channels=2 * width)
    results = [net.op("Tanh", net.deconv(x, 3)), skips[1]]
    written(net.model({"x": ["N", 3, 32, 32]}, results), folder, 30_000)
    (folder / "shrink").mkdir()
    for file in (ROOT / "shrink" / "web").glob("*.js"):
        (folder / "shrink" / file.name).write_bytes(file.read_bytes())
    (folder / "ort").mkdir()
    # Many a server gives .mjs another type than that of a script.
    names = {
        "ort.js": "ort.wasm.min.mjs",
        "module.js": "ort-wasm-simd-threaded.mjs",
        "ort.wasm": "ort-wasm-simd-threaded.wasm",
    }
    for name, original in names.items():
        (folder / "ort" / name).symlink_to(PACKAGE / "dist" / original)
    (folder / "index.html").write_text(PAGE)
    assert len(index_of(folder)["stages"]) > 2
    assert any("data" in stage for stage in index_of(folder)["stages"])
    return folder


def opened(page: Page, url: str) -> None:
    page.goto(f"{url}/index.html")
    page.wait_for_function("window.ready", timeout=8000)


def feeds_for_page() -> dict[str, Any]:
    x = feeds_of({"x": (1, 3, 32, 32)})["x"]
    return {"x": {"data": x.ravel().tolist(), "dims": list(x.shape)}}


@needs_package
@pytest.mark.parametrize("sequential", [False, True])
def test_the_browser_computes_the_bits_of_the_whole(browser: Browser, site: Path, sequential: bool) -> None:
    with browsers.serve(site) as url:
        page = browser.new_page()
        opened(page, url)
        whole = page.evaluate("feeds => whole(feeds)", feeds_for_page())
        found = page.evaluate("([feeds, sequential]) => stages(feeds, sequential, 2)", [feeds_for_page(), sequential])
        page.close()
    assert "message" not in found, found
    assert found["results"] == whole
    stages = index_of(site)["stages"]
    total = sum(part["bytes"] for stage in stages for part in (stage, *stage.get("data", [])))
    assert found["progress"] == {"loaded": total, "total": total}
    assert found["live"] == {"now": 0, "most": 1 if sequential else len(stages)}


@needs_package
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (lambda folder: (folder / index_of(folder)["stages"][1]["file"]).unlink(), "http"),
        (lambda folder: shortened(folder / index_of(folder)["stages"][1]["file"]), "truncated"),
        (lambda folder: flipped(folder / index_of(folder)["stages"][-1]["file"]), "corrupt"),
        (lambda folder: renamed(folder, "../model.onnx"), "corrupt"),
        (lambda folder: renamed(folder, "\x1b[2J.onnx"), "corrupt"),
        (lambda folder: (folder / "model.stages.json").write_text("<!doctype html>"), "corrupt"),
        (lambda folder: (folder / "model.stages.json").write_text('{"version": 2}'), "unsupported"),
    ],
)
def test_the_browser_says_what_is_wrong(
    browser: Browser, site: Path, tmp_path: Path, harm: Callable[[Path], Any], code: str, sequential: bool
) -> None:
    folder = tmp_path / "harmed"
    folder.mkdir()
    for file in site.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
        else:
            (folder / file.name).symlink_to(file.resolve())
    harm(folder)
    with browsers.serve(folder) as url:
        page = browser.new_page()
        opened(page, url)
        found = page.evaluate("([feeds, sequential]) => stages(feeds, sequential)", [feeds_for_page(), sequential])
        page.close()
    assert found["code"] == code, found
    assert found["live"]["now"] == 0


@needs_package
def test_the_browser_reads_an_index_in_parts(browser: Browser, site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for file in site.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    text = parts.as_bytes(index_of(site))
    top, index_parts = parts.fit_index(text, "model.stages", 700)
    for name, data in (("model.stages.json", top), *index_parts):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)
    assert len(index_parts) > 2
    with browsers.serve(folder) as url:
        page = browser.new_page()
        opened(page, url)
        found = page.evaluate("feeds => stages(feeds, false)", feeds_for_page())
        whole = page.evaluate("feeds => whole(feeds)", feeds_for_page())
        page.close()
        (folder / index_parts[0][0]).write_bytes(bytes(len(index_parts[0][1])))
        # A browser that has seen nothing: one second is the same Last-Modified, and the first page's cache would do.
        page = browser.new_page()
        opened(page, url)
        harmed = page.evaluate("feeds => stages(feeds, false)", feeds_for_page())
        page.close()
    assert found["results"] == whole
    assert harmed["code"] == "corrupt"


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def renamed(folder: Path, name: str) -> None:
    index = index_of(folder)
    index["stages"][0]["file"] = name
    (folder / "model.stages.json").write_text(json.dumps(index))
