"""ONNX with its weights in several files: stock ONNX Runtime computes the same bits, joining gives the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shrink import parts
from shrink.errors import BadInput, BoundNotMet, IntegrityError, ShrinkError, UsageError
from shrink.progress import silent
from shrink.serve import Server
from shrink.split import Plan, _onnx_graph, onnx_data
from tests.browser import chromium

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

Array = NDArray[Any]
Content = dict[str, bytes]

LIMIT = 10_000
ORT_WEB = Path(__file__).parent / "node_modules" / "onnxruntime-web" / "dist"
LEVELS = (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)


def weights(*shape: int, seed: int = 0, dtype: str = "f4") -> Array:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * 0.2).astype(dtype)


def model_of(
    nodes: list[Any],
    inputs: dict[str, list[int]],
    output: str,
    initializers: list[Any],
    *,
    opset: int = 17,
    ir: int = 8,
    dtype: int = TensorProto.FLOAT,
    rank: int = 2,
) -> Any:
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    if ir < 4:
        given += [helper.make_tensor_value_info(i.name, i.data_type, list(i.dims)) for i in initializers]
    made = helper.make_tensor_value_info(output, dtype, [None] * rank)
    graph = helper.make_graph(nodes, "network", given, [made], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


def save(proto: Any, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return path


def plan(source: Path, limit: int, folder: Path, *, force: bool = False) -> Plan:
    made = onnx_data.plan(source, limit, folder, force=force)
    assert [f.name for f in made.files][-1] == f"{source.stem}.onnx.index.json"
    return made


def split(source: Path, limit: int, folder: Path, *, force: bool = False) -> Plan:
    """Split a file, and check what holds of every split."""
    made = plan(source, limit, folder, force=force)
    made.write(silent)
    for file in made.files:
        assert (folder / file.name).stat().st_size == file.size_bytes <= limit, file
    return made


def joined(source: Path, folder: Path, out: Path) -> bytes:
    onnx_data.join(folder / f"{source.stem}.onnx.index.json", out, force=True)
    return out.read_bytes()


def run(model: Path, feeds: dict[str, Array], level: Any = LEVELS[1]) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    values: list[Array] = session.run(None, feeds)
    return values


def assert_same_bits(a: list[Array], b: list[Array]) -> None:
    assert [(x.dtype, x.shape, x.tobytes()) for x in a] == [(x.dtype, x.shape, x.tobytes()) for x in b]


def content(folder: Path) -> Content:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def op_types(model: Path) -> list[str]:
    return [node.op_type for node in onnx.load(model, load_external_data=False).graph.node]


# --- networks --------------------------------------------------------------------------------------------------


def image(opset: int = 17, ir: int = 8) -> Any:
    """Convolutions with batch norm, which is fused into them, and transposed ones."""
    values = {
        "逆/W": weights(16, 24, 4, 4),
        "c1/W": weights(40, 3, 5, 5),
        "c1/b": weights(40),
        "c2/W": weights(16, 40, 3, 3),
        **{f"bn/{n}": np.abs(weights(16, seed=i)) + 0.5 for i, n in enumerate(("gamma", "beta", "mean", "var"))},
    }
    nodes = [
        helper.make_node("Conv", ["x", "c1/W", "c1/b"], ["c1"], pads=[2, 2, 2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "c2/W"], ["c2"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c2", *(f"bn/{n}" for n in ("gamma", "beta", "mean", "var"))], ["b2"]),
        helper.make_node("ConvTranspose", ["b2", "逆/W"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1]),
    ]
    tensors = [numpy_helper.from_array(v, n) for n, v in values.items()]
    return model_of(nodes, {"x": [1, 3, 12, 12]}, "y", tensors, opset=opset, ir=ir, rank=4)


def dense(opset: int = 17, ir: int = 8) -> Any:
    """Products of matrices, one of them of a single row larger than any file."""
    values = {"fc/W": weights(90, 70), "fc/b": weights(90), "m": weights(90, 130), "wide": weights(1, 6000)}
    nodes = [
        helper.make_node("Gemm", ["x", "fc/W", "fc/b"], ["h"], transB=1),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "m"], ["n"]),
        helper.make_node("ReduceMean", ["n"], ["one"], axes=[1], keepdims=1),
        helper.make_node("MatMul", ["one", "wide"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(v, n) for n, v in values.items()]
    return model_of(nodes, {"x": [2, 70]}, "y", tensors, opset=opset, ir=ir)


def recurrent() -> Any:
    values = {"W": weights(1, 4 * 32, 20), "R": weights(1, 4 * 32, 32), "B": weights(1, 8 * 32)}
    nodes = [
        helper.make_node("LSTM", ["x", "W", "R", "B"], ["", "y"], hidden_size=32),
    ]
    tensors = [numpy_helper.from_array(v, n) for n, v in values.items()]
    return model_of(nodes, {"x": [7, 1, 20]}, "y", tensors, rank=3)


def branches() -> Any:
    """Weights of the outer graph that inner ones use, weights of the inner ones, and weights in Constant nodes."""
    value = helper.make_tensor_value_info

    def inner(name: str) -> Any:
        constant = helper.make_node(
            "Constant", [], [f"{name}.k"], value=numpy_helper.from_array(weights(40, 90, seed=5))
        )
        nodes = [
            constant,
            helper.make_node("MatMul", ["x", "outer"], [f"{name}.a"]),
            helper.make_node("MatMul", [f"{name}.a", f"{name}.own"], [f"{name}.b"]),
            helper.make_node("MatMul", [f"{name}.b", f"{name}.k"], [f"{name}.y"]),
        ]
        own = numpy_helper.from_array(weights(80, 40, seed=len(name)), f"{name}.own")
        return helper.make_graph(nodes, name, [], [value(f"{name}.y", TensorProto.FLOAT, [None, None])], [own])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["z"], then_branch=inner("then"), else_branch=inner("otherwise")),
        helper.make_node("Constant", [], ["last"], value=numpy_helper.from_array(weights(90, 60, seed=9))),
        helper.make_node("MatMul", ["z", "last"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(weights(50, 80), "outer"),
        numpy_helper.from_array(np.array(0, "f4"), "zero"),
    ]
    return model_of(nodes, {"x": [3, 50]}, "y", tensors)


def loop() -> Any:
    """A body that runs several times on a weight from outside."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "outer"], ["product"]),
            helper.make_node("Tanh", ["product"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            value("i", TensorProto.INT64, []),
            value("go", TensorProto.BOOL, []),
            value("state", TensorProto.FLOAT, [2, 60]),
        ],
        [value("on", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, [2, 60])],
    )
    tensors = [numpy_helper.from_array(weights(60, 60), "outer"), numpy_helper.from_array(np.array(4), "times")]
    return model_of([helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)], {"x": [2, 60]}, "y", tensors)


def data_bytes(proto: Any) -> int:
    """Bytes of the weights that leave the graph, each up to the next multiple of 64."""

    def inside(graph: Any) -> Iterator[int]:
        yield from (len(i.raw_data) for i in graph.initializer)
        for attribute in (a for node in graph.node for a in node.attribute):
            yield len(attribute.t.raw_data)
            if attribute.HasField("g"):
                yield from inside(attribute.g)

    return sum(-(-size // 64) * 64 for size in inside(proto.graph) if size >= 1024)


NETWORKS = {"image": image, "dense": dense, "recurrent": recurrent, "branches": branches, "loop": loop}


def feeds(proto: Any) -> dict[str, Array]:
    names = {i.name for i in proto.graph.initializer}
    return {
        i.name: weights(*(d.dim_value for d in i.type.tensor_type.shape.dim), seed=3)
        for i in proto.graph.input
        if i.name not in names
    }


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("limit", [LIMIT, 23_456, 40_000])
def test_onnx_runtime_computes_the_same_bits(tmp_path: Path, network: str, limit: int) -> None:
    proto = NETWORKS[network]()
    source = save(proto, tmp_path / "model.onnx")
    made = split(source, limit, tmp_path / "out")
    graph = tmp_path / "out" / "model.split.onnx"
    onnx.checker.check_model(str(graph), full_check=True)
    assert_same_bits(run(graph, feeds(proto)), run(source, feeds(proto)))
    as_written = run(graph, feeds(proto), LEVELS[0]), run(source, feeds(proto), LEVELS[0])
    if network == "recurrent":
        # Without folding, ONNX Runtime does not see that weights are constant, and multiplies LSTM's in other blocks.
        np.testing.assert_allclose(*as_written, rtol=1e-4)
    else:
        assert_same_bits(*as_written)
    assert len([f for f in made.files if f.name.endswith(".data")]) == -(-data_bytes(proto) // limit)
    assert joined(source, tmp_path / "out", tmp_path / "joined.onnx") == source.read_bytes()


@pytest.mark.parametrize("network", [image, dense])
@pytest.mark.parametrize(("opset", "ir"), [(7, 3), (8, 3), (9, 4), (11, 6), (13, 7), (17, 8)])
def test_every_opset(tmp_path: Path, network: Callable[..., Any], opset: int, ir: int) -> None:
    proto = network(opset, ir)
    source = save(proto, tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.split.onnx"))
    assert_same_bits(run(tmp_path / "model.split.onnx", feeds(proto)), run(source, feeds(proto)))
    assert onnx.load(tmp_path / "model.split.onnx", load_external_data=False).ir_version == ir


def test_rows_where_they_are_small_and_flat_pieces_where_not(tmp_path: Path) -> None:
    source = save(dense(), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    graph = onnx.load(tmp_path / "model.split.onnx", load_external_data=False).graph
    pieces = {i.name: list(i.dims) for i in graph.initializer if "piece" in i.name}
    assert all(len(dims) == (1 if name.startswith("wide") else 2) for name, dims in pieces.items())
    assert sum(d[0] for n, d in pieces.items() if n.startswith("fc/W")) == 90
    assert [n.output[0] for n in graph.node if n.op_type == "Reshape"] == ["wide"]
    first = next(i for i, n in enumerate(graph.node) if n.op_type not in ("Concat", "Reshape"))
    assert all(n.op_type not in ("Concat", "Reshape") for n in graph.node[first:])


# --- kinds of tensors ------------------------------------------------------------------------------------------


def typed(data_type: int, values: Array) -> Any:
    """A tensor whose values are in a field of their type."""
    return helper.make_tensor("w", data_type, values.shape, values.ravel().tolist())


HALVES = weights(90, 70, dtype="f2")
# The tensor, and whether its bytes in the file are those of the data files.
KINDS: dict[str, tuple[Any, bool]] = {
    "float_data": (typed(TensorProto.FLOAT, weights(60, 70)), True),
    "double_data": (typed(TensorProto.DOUBLE, weights(60, 70, dtype="f8")), True),
    "int64_data": (typed(TensorProto.INT64, np.arange(-100, 4100).reshape(60, 70)), False),
    "int32_data": (typed(TensorProto.INT8, np.arange(18_000).astype("i1").reshape(60, 300)), False),
    "float16": (numpy_helper.from_array(HALVES, "w"), True),
    "float16 in int32_data": (helper.make_tensor("w", TensorProto.FLOAT16, [90, 70], HALVES.ravel().tolist()), False),
    "bool": (numpy_helper.from_array(weights(200, 70) > 0, "w"), True),
    "uint8": (numpy_helper.from_array(np.arange(14_000).reshape(200, 70).astype("u1"), "w"), True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tensor(tmp_path: Path, kind: str) -> None:
    tensor, own = KINDS[kind]
    nodes = [helper.make_node("Identity", ["w"], ["y"])]
    proto = model_of(nodes, {}, "y", [tensor], dtype=tensor.data_type, rank=len(tensor.dims))
    source = save(proto, tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    graph = tmp_path / "model.split.onnx"
    onnx.checker.check_model(str(graph))
    assert "Concat" in op_types(graph)
    assert_same_bits(run(graph, {}), run(source, {}))
    assert_same_bits(run(graph, {}), [numpy_helper.to_array(tensor)])
    assert joined(source, tmp_path, tmp_path / "joined.onnx") == source.read_bytes()
    rest = sum(p.stat().st_size for p in tmp_path.glob("*.rest-*"))
    assert (rest < 1000) == own


def test_small_and_string_tensors_stay_in_the_graph(tmp_path: Path) -> None:
    tensors = [
        numpy_helper.from_array(weights(200, 70), "w"),
        numpy_helper.from_array(np.array([200 * 70]), "shape"),
        numpy_helper.from_array(np.array(["a word of some length"] * 200, object), "words"),
    ]
    nodes = [helper.make_node("Reshape", ["w", "shape"], ["y"]), helper.make_node("Identity", ["words"], ["z"])]
    source = save(model_of(nodes, {}, "y", tensors), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    graph = onnx.load(tmp_path / "model.split.onnx", load_external_data=False).graph
    inside = {i.name for i in graph.initializer if i.data_location != TensorProto.EXTERNAL}
    assert inside == {"shape", "words"}


def test_sparse_initializers_stay(tmp_path: Path) -> None:
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [3], [0, 5, 9])
    nodes = [helper.make_node("Identity", ["w"], ["y"]), helper.make_node("Identity", ["sparse"], ["z"])]
    proto = model_of(nodes, {}, "y", [numpy_helper.from_array(weights(200, 70), "w")])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10]))
    source = save(proto, tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    assert_same_bits(run(tmp_path / "model.split.onnx", {}), run(source, {}))
    assert joined(source, tmp_path, tmp_path / "joined.onnx") == source.read_bytes()


def test_a_weight_that_may_be_fed_is_cut_only_where_it_must(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(weights(n, 70), f"w{n}") for n in (30, 31, 50)]
    nodes = [helper.make_node("Concat", ["w30", "w31", "w50"], ["y"], axis=0)]
    proto = model_of(nodes, {}, "y", tensors)
    proto.graph.input.extend(helper.make_tensor_value_info(t.name, TensorProto.FLOAT, list(t.dims)) for t in tensors)
    source = save(proto, tmp_path / "model.onnx")
    made = split(source, LIMIT, tmp_path)
    graph = tmp_path / "model.split.onnx"
    assert made.notes[0] == "these weights were inputs as well, which they can no longer be: w50"
    assert {i.name for i in onnx.load(graph, load_external_data=False).graph.input} == {"w30", "w31"}
    fed = {"w30": weights(30, 70, seed=8)}
    assert_same_bits(run(graph, fed), run(source, fed))


def test_inner_graphs_that_give_their_weights_out(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info

    def inner(seed: int) -> Any:
        own = numpy_helper.from_array(weights(60, 70, seed=seed), "own")
        return helper.make_graph([], f"g{seed}", [], [value("own", TensorProto.FLOAT, [60, 70])], [own])

    nodes = [
        helper.make_node("Cast", ["x"], ["yes"], to=TensorProto.BOOL),
        helper.make_node("If", ["yes"], ["y"], then_branch=inner(1), else_branch=inner(2)),
    ]
    source = save(model_of(nodes, {"x": []}, "y", []), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    graph = tmp_path / "model.split.onnx"
    onnx.checker.check_model(str(graph))
    for x in (0, 1):
        given = {"x": np.array(x, "f4")}
        assert_same_bits(run(graph, given), run(source, given))
        assert_same_bits(run(graph, given), [weights(60, 70, seed=2 - x)])


def test_names_that_are_taken(tmp_path: Path) -> None:
    taken = ["w/piece1", "w/flat", "w/shape", "w/reshape", "w/join"]
    tensors = [numpy_helper.from_array(weights(1, 6000), "w"), *(numpy_helper.from_array(weights(1), n) for n in taken)]
    nodes = [helper.make_node("Concat", ["w", *taken[:0]], ["y"], axis=1)]
    nodes += [helper.make_node("Identity", [n], [f"{n}.y"], name=n) for n in taken]
    source = save(model_of(nodes, {}, "y", tensors), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.split.onnx"))
    assert_same_bits(run(tmp_path / "model.split.onnx", {}), run(source, {}))


# --- external data ---------------------------------------------------------------------------------------------


def test_external_data_is_taken_in(tmp_path: Path) -> None:
    proto = image()
    whole = save(proto, tmp_path / "whole.onnx")
    folder = tmp_path / "external"
    folder.mkdir()
    source = folder / "model.onnx"
    onnx.save_model(proto, source, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    made = split(source, 30_000, tmp_path / "out")
    assert "external data is taken in" in made.notes[0]
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []
    expected = run(whole, feeds(proto))
    assert_same_bits(run(tmp_path / "out" / "model.split.onnx", feeds(proto)), expected)
    del made
    joined(source, tmp_path / "out", tmp_path / "joined.onnx")
    assert_same_bits(run(tmp_path / "joined.onnx", feeds(proto)), expected)
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_external_data_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(60_000))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[15_000], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    folder = tmp_path / "in"
    folder.mkdir()
    source = save(model_of([helper.make_node("Identity", ["w"], ["y"])], {}, "y", [tensor]), folder / "model.onnx")
    with pytest.raises(BadInput, match="outside its own folder"):
        onnx_data.plan(source, LIMIT, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob(".*")] == []


# --- in a browser ----------------------------------------------------------------------------------------------

PAGE = """<!doctype html><link rel=icon href=data:><script src=dist/ort.wasm.min.js></script><script>
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("dist/", location).href;
async function run(model, data, feeds) {
    const externalData = data.map((path) => ({ path, data: path }));
    const session = await ort.InferenceSession.create(model, externalData.length > 0 ? { externalData } : {});
    const given = {};
    for (const [name, [dims, values]] of Object.entries(feeds)) given[name] = new ort.Tensor("float32", values, dims);
    const outputs = Object.values(await session.run(given));
    const bytes = ({ buffer, byteOffset, byteLength }) => Array.from(new Uint8Array(buffer, byteOffset, byteLength));
    return outputs.map(({ dims, data }) => [dims, bytes(data)]);
}
</script>"""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.skipif(not ORT_WEB.is_dir(), reason="onnxruntime-web is not installed: run `npm ci` in tests/")
def test_onnx_runtime_web_takes_the_files(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(PAGE)
    (tmp_path / "dist").mkdir()
    for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copyfile(ORT_WEB / name, tmp_path / "dist" / name)
    data = {}
    for network, make in NETWORKS.items():
        source = save(make(), tmp_path / f"{network}.onnx")
        data[network] = [f.name for f in split(source, LIMIT, tmp_path).files if f.name.endswith(".data")]
    with served(tmp_path) as url, chromium() as browser:
        page = browser.new_page()
        page.goto(f"{url}index.html")
        call = "([model, data, feeds]) => run(model, data, feeds)"
        for network, make in NETWORKS.items():
            given = {n: [list(x.shape), x.ravel().tolist()] for n, x in feeds(make()).items()}
            whole = page.evaluate(call, [f"{network}.onnx", [], given])
            assert page.evaluate(call, [f"{network}.split.onnx", data[network], given]) == whole, network
            assert len({*whole[0][1]}) > 10
        # What it says of a file that was not given is a number.
        with pytest.raises(Exception, match=r"Page.evaluate"):
            page.evaluate(call, ["loop.split.onnx", data["loop"][1:], given])


# --- random models ---------------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> Any:
    """Sums of products with weights of any size, kept in any way, some of them twice."""
    nodes, tensors, terms = [], [], []
    for number in range(draw(st.integers(1, 5))):
        rows, columns = draw(st.integers(1, 120)), draw(st.integers(1, 90))
        dtype = draw(st.sampled_from(["f4", "f2", "i8", "u1"]))
        values = (weights(rows, columns, seed=number) * 100).astype(dtype)
        name = draw(st.sampled_from(["w", "層/W", "/a b"])) + str(number)
        raw = draw(st.booleans())
        tensor = numpy_helper.from_array(values, name)
        if not raw and dtype != "f2":
            tensor = helper.make_tensor(name, tensor.data_type, values.shape, values.ravel().tolist())
        if draw(st.booleans()) and raw:
            nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        else:
            tensors.append(tensor)
        nodes.append(helper.make_node("Cast", [name], [f"{number}.f"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("ReduceMean", [f"{number}.f"], [f"{number}.m"], axes=[0, 1], keepdims=1))
        terms.append(f"{number}.m")
    nodes.append(helper.make_node("Sum", terms, ["y"]))
    proto = model_of(nodes, {}, "y", tensors)
    proto.doc_string = draw(st.sampled_from(["", "said of it"]))
    return proto


@given(proto=models(), limit=st.integers(LIMIT, 60_000))
def test_joining_undoes_splitting(tmp_path_factory: pytest.TempPathFactory, proto: Any, limit: int) -> None:
    folder = tmp_path_factory.mktemp("model")
    source = save(proto, folder / "model.onnx")
    made = split(source, limit, folder)
    graph = folder / "model.split.onnx"
    onnx.checker.check_model(str(graph))
    assert_same_bits(run(graph, {}), run(source, {}))
    assert joined(source, folder, folder / "joined.bin") == source.read_bytes()
    sizes = [f.size_bytes for f in made.files if f.name.endswith(".data")]
    assert len(sizes) <= max(1, -(-sum(sizes) // limit)) + 1
    assert set(content(folder)) == {f.name for f in made.files} | {"model.onnx", "joined.bin"}


@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 5_000), st.sampled_from([0, 1, 2, 4, 8]), st.integers(1, 700)), max_size=30
    ),
    limit=st.integers(10_000, 50_000),
)
def test_weights_are_laid_out_over_the_fewest_files(sizes: list[tuple[int, int, int]], limit: int) -> None:
    given = [
        _onnx_graph.Weight(str(i), min(n * k, limit) if not k else n * k * row, b"", k, k * row)
        for i, (n, k, row) in enumerate((n, k, row) if k else (n, 0, 1) for n, k, row in sizes)
    ]
    given = [w if w.itemsize else _onnx_graph.Weight(w.name, 700, b"", 0, 0) for w in given]
    files = _onnx_graph.arrange(given, limit)
    total = 0
    covered = dict.fromkeys(range(len(given)), 0)
    for pieces in files:
        assert pieces
        end = 0
        for piece in pieces:
            weight = given[piece.weight]
            assert piece.offset % 64 == 0
            assert end <= piece.offset < end + 64
            assert piece.start == covered[piece.weight]
            assert piece.size_bytes == weight.size_bytes or piece.size_bytes % weight.itemsize == 0
            covered[piece.weight] += piece.size_bytes
            end = piece.end
        assert end <= limit
        total += end
    assert covered == {i: w.size_bytes for i, w in enumerate(given)}
    assert len(files) <= -(-total // limit) + 1


# --- limits ----------------------------------------------------------------------------------------------------


def test_a_graph_over_the_limit_is_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", [f"v{i}" if i else "w"], [f"v{i + 1}"]) for i in range(1000)]
    proto = model_of(nodes, {}, "v1000", [numpy_helper.from_array(weights(200, 70), "w")])
    source = save(proto, tmp_path / "model.onnx")
    with pytest.raises(BoundNotMet, match=r"the graph is \d{5} bytes even without its weights, .*--cut") as caught:
        onnx_data.plan(source, LIMIT, tmp_path)
    assert caught.value.exit_code == 4
    size = int(str(caught.value).split("the graph is ")[1].split()[0])
    assert sorted(content(tmp_path)) == ["model.onnx"]
    split(source, size, tmp_path)


def test_many_small_weights_leave_the_graph_too_where_it_is_full(tmp_path: Path) -> None:
    tensors = [numpy_helper.from_array(weights(100, seed=i), f"w{i}") for i in range(60)]
    proto = model_of([helper.make_node("Sum", [t.name for t in tensors], ["y"])], {}, "y", tensors, rank=1)
    source = save(proto, tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    assert_same_bits(run(tmp_path / "model.split.onnx", {}), run(source, {}))
    assert joined(source, tmp_path, tmp_path / "joined.onnx") == source.read_bytes()


def test_values_of_four_bits_are_not_cut(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.UINT4, dims=[30_000], raw_data=bytes(15_000))
    nodes = [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)]
    source = save(model_of(nodes, {}, "y", [tensor], opset=21, ir=10, rank=1), tmp_path / "model.onnx")
    with pytest.raises(BoundNotMet, match=r"tensor w: its 15000 bytes .* smallest limit that works is 15000 bytes"):
        onnx_data.plan(source, LIMIT, tmp_path)
    split(source, 15_000, tmp_path)
    assert_same_bits(run(tmp_path / "model.split.onnx", {}), run(source, {}))


def test_an_index_over_the_limit_is_cut_as_well(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["w"], ["y"])]
    proto = model_of(nodes, {}, "y", [numpy_helper.from_array(weights(1000, 190), "w")])
    source = save(proto, tmp_path / "model.onnx")
    made = split(source, LIMIT, tmp_path)
    assert sum("-index-" in f.name for f in made.files) >= 2
    assert joined(source, tmp_path, tmp_path / "joined.onnx") == source.read_bytes()


# --- once more -------------------------------------------------------------------------------------------------


def test_splitting_is_deterministic(tmp_path: Path) -> None:
    source = save(image(), tmp_path / "model.onnx")
    for name in "ab":
        split(source, LIMIT, tmp_path / name)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_planning_writes_nothing(tmp_path: Path) -> None:
    source = save(image(), tmp_path / "model.onnx")
    plan(source, LIMIT, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


def test_the_same_split_again_does_nothing(tmp_path: Path) -> None:
    source = save(image(), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = split(source, LIMIT, tmp_path)
    assert again.notes == ("it is split exactly so already: nothing is written",)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_another_split_needs_force_and_removes_the_old(tmp_path: Path) -> None:
    source = save(image(), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    before = content(tmp_path)
    save(image(13, 7), source)
    with pytest.raises(UsageError, match=r"index\.json: exists already .--force"):
        onnx_data.plan(source, LIMIT, tmp_path)
    made = split(source, LIMIT, tmp_path, force=True)
    assert any("hold a hash" in note for note in made.notes)
    assert set(content(tmp_path)) == {f.name for f in made.files} | {"model.onnx"}
    assert_same_bits(run(tmp_path / "model.split.onnx", feeds(image())), run(source, feeds(image())))
    assert joined(source, tmp_path, tmp_path / "joined.onnx") == source.read_bytes() != before["model.onnx"]


def test_in_the_folder_of_a_page_the_names_of_parts_hold_a_hash(tmp_path: Path) -> None:
    old, new = save(image(), tmp_path / "old.onnx"), save(dense(), tmp_path / "new.onnx")
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "index.html").write_text("<p>")
    found: list[set[str]] = []
    for proto, model in ((image(), old), (dense(), new)):
        source = folder / "model.onnx"
        source.write_bytes(model.read_bytes())
        made = split(source, LIMIT, folder, force=True)
        there = set(content(folder)) - {"index.html", "model.onnx", "model.split.onnx", "model.onnx.index.json"}
        assert {f.name for f in made.files} == there | {"model.split.onnx", "model.onnx.index.json"}
        assert all(re.match(r"model\.(split|rest|onnx)-[0-9a-f]{8}-", name) for name in there)
        assert len({name.split("-")[1] for name in there}) == 1
        assert_same_bits(run(folder / "model.split.onnx", feeds(proto)), run(source, feeds(proto)))
        assert joined(source, folder, tmp_path / "joined.onnx") == model.read_bytes()
        assert "exactly so already" in split(source, LIMIT, folder).notes[0]
        found.append(there)
    assert not found[0] & found[1]


def test_the_graph_of_a_split_is_not_split(tmp_path: Path) -> None:
    source = save(image(), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    with pytest.raises(UsageError, match=r"split already .split the file it was made of"):
        onnx_data.plan(tmp_path / "model.split.onnx", LIMIT, tmp_path)


class Killed(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


def test_a_kill_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(image(), tmp_path / "old.onnx").read_bytes()
    new = save(image(13, 7), tmp_path / "new.onnx").read_bytes()
    replace, wanted = os.replace, feeds(image())
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        source = folder / "model.onnx"
        source.write_bytes(old)
        split(source, 30_000, folder)
        source.write_bytes(new)
        left = step

        def counted(a: str, b: str) -> None:
            nonlocal left
            if left <= 0:  # threads may come together here
                raise Killed
            left -= 1
            replace(a, b)

        made = plan(source, 30_000, folder, force=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted)
            try:
                made.write(silent)
            except Killed:
                made = None  # type: ignore[assignment]
        assert joined(source, folder, folder / "joined.onnx") == (old if made is None else new)
        assert len(run(folder / "model.split.onnx", wanted)) == 1
        if made is not None:
            break
        split(source, 30_000, folder, force=True)
        assert joined(source, folder, folder / "joined.onnx") == new
    assert 3 < step < 20


# --- bad input -------------------------------------------------------------------------------------------------


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    source = save(image(), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path / "out")
    index = tmp_path / "out" / "model.onnx.index.json"
    names = sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".data", ".bin"))
    for name in names:
        path = tmp_path / "out" / name
        data = path.read_bytes()
        other = next(n for n in names if n != name)
        for bad, said in (
            (None, "is missing"),
            (data[:-1], "is shorter than it was written"),
            (data + b"\0", "is longer than it was written"),
            (bytes([data[0] ^ 1]) + data[1:], "its content is not what was written"),
            ((tmp_path / "out" / other).read_bytes(), "part "),
        ):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            with pytest.raises(IntegrityError, match=f"part {name}: .*{said.removeprefix('part ')}"):
                onnx_data.join(index, tmp_path / "joined.onnx")
            assert not (tmp_path / "joined.onnx").exists()
            path.write_bytes(data)
    onnx_data.join(index, tmp_path / "joined.onnx")


def test_where_joining_writes(tmp_path: Path) -> None:
    source = save(image(), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path / "out")
    index = tmp_path / "out" / "model.onnx.index.json"
    assert onnx_data.join(index) == tmp_path / "out" / "model.onnx"
    with pytest.raises(UsageError, match="exists already"):
        onnx_data.join(index)
    assert onnx_data.join(index, tmp_path, force=True) == source
    own = {p.name for p in (tmp_path / "out").iterdir()} - {"model.onnx"}
    assert len(own) > 5
    for name in own:
        with pytest.raises(UsageError, match="made of"):
            onnx_data.join(index, tmp_path / "out" / name, force=True)


MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda ours: None,
    "a later version": lambda ours: {**ours, "version": 2},
    "a version that is no number": lambda ours: {**ours, "version": True},
    "no layout": lambda ours: {k: v for k, v in ours.items() if k != "layout"},
    "a layout that is no list": lambda ours: {**ours, "layout": 7},
    "a place of two numbers": lambda ours: {**ours, "layout": [[0, 0]]},
    "a place of texts": lambda ours: {**ours, "layout": [["0", 0, 1]]},
    "a place before the start": lambda ours: {**ours, "layout": [[0, -1, 1], *ours["layout"]]},
    "a place past the end": lambda ours: {**ours, "layout": [[0, 10**9, 1], *ours["layout"]]},
    "no such part": lambda ours: {**ours, "layout": [[99, 0, 1], *ours["layout"]]},
    "too few places": lambda ours: {**ours, "layout": ours["layout"][1:]},
    "a name elsewhere": lambda ours: {**ours, "file": "../model.onnx"},
    "no name": lambda ours: {**ours, "file": None},
    "a graph elsewhere": lambda ours: {**ours, "graph": "/etc/passwd"},
    "no hash": lambda ours: {**ours, "integrity": "md5-x"},
    "no parts": lambda ours: {**ours, "parts": []},
    "parts that are none": lambda ours: {**ours, "parts": [1]},
    "a part elsewhere": lambda ours: {**ours, "parts": [{**ours["parts"][0], "file": "../x"}, *ours["parts"][1:]]},
    "a part twice": lambda ours: {**ours, "parts": [ours["parts"][0], *ours["parts"]]},
    "a part that skips": lambda ours: {**ours, "parts": [{**p, "skip": 1} for p in ours["parts"]]},
    "an endless file": lambda ours: {**ours, "bytes": 10**30},
    "places in another order": lambda ours: {**ours, "layout": ours["layout"][::-1]},
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_index_is_refused(tmp_path: Path, what: str) -> None:
    source = save(image(), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    index = tmp_path / "model.onnx.index.json"
    index.write_text(json.dumps({"shrink": MALFORMED[what](json.loads(index.read_text())["shrink"])}))
    with pytest.raises(BadInput):
        onnx_data.join(index, tmp_path / "joined.onnx")
    assert not (tmp_path / "joined.onnx").exists()


def test_an_index_cannot_make_much_of_little(tmp_path: Path) -> None:
    """Each part as it was listed, but its bytes used again and again: a disk could be filled with that."""
    source = save(image(), tmp_path / "model.onnx")
    split(source, LIMIT, tmp_path)
    index = tmp_path / "model.onnx.index.json"
    said = json.loads(index.read_text())
    ours = said["shrink"]
    said["shrink"] = {**ours, "layout": ours["layout"] * 50, "bytes": ours["bytes"] * 50}
    index.write_text(json.dumps(said))
    with pytest.raises(BadInput, match="longer than its parts"):
        onnx_data.join(index, tmp_path / "joined.onnx")
    assert not (tmp_path / "joined.onnx").exists()


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "text": lambda data: b"<!DOCTYPE html>" * 500,
    "cut short": lambda data: data[:-100],
    "a length past the end": lambda data: data[:2] + b"\x3a\xff\xff\xff\x7f" + data[2:],
    "a number without end": lambda data: b"\xff" * 2000,
    "a group": lambda data: b"\x0b" + data,
    "field 0": lambda data: b"\x00\x00" + data,
    "dims of other values": lambda data: data.replace(b"\x08\x5a\x08\x46", b"\x08\x5a\x08\x47", 1),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_model_is_refused(tmp_path: Path, what: str) -> None:
    good = save(dense(), tmp_path / "model.onnx").read_bytes()
    bad = DAMAGED[what](good)
    assert bad != good
    (tmp_path / "model.onnx").write_bytes(bad)
    with pytest.raises(BadInput):
        onnx_data.plan(tmp_path / "model.onnx", LIMIT, tmp_path)
    assert sorted(content(tmp_path)) == ["model.onnx"]


def test_graphs_inside_graphs_without_end(tmp_path: Path) -> None:
    data = bytes(2000)
    for _ in range(300):
        for number in (6, 5, 1):  # an attribute's graph, a node's attribute, a graph's node
            data = bytes([number << 3 | 2]) + _length(len(data)) + data
    (tmp_path / "model.onnx").write_bytes(b"\x3a" + _length(len(data)) + data)
    with pytest.raises(BadInput):
        onnx_data.plan(tmp_path / "model.onnx", LIMIT, tmp_path)


def _length(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_is_an_error_or_joins_to_the_same(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    tensors = [numpy_helper.from_array(weights(20, 40), "w"), numpy_helper.from_array(weights(7), "v")]
    proto = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [1, 20]}, "y", tensors)
    data = bytearray(proto.SerializeToString())
    # Not within the values, where nothing can be noticed.
    places = [*range(60), *range(len(data) - 120, len(data))]
    for place, value in changes:
        data[places[place % len(places)]] = value
    source = folder / "model.onnx"
    source.write_bytes(data)
    try:
        split(source, LIMIT, folder)
    except ShrinkError:
        assert sorted(content(folder)) == ["model.onnx"]
    else:
        assert joined(source, folder, folder / "joined.bin") == data


def test_the_index_says_where_weights_are(tmp_path: Path) -> None:
    source = save(image(), tmp_path / "model.onnx")
    made = split(source, LIMIT, tmp_path)
    ours = parts.read_json(tmp_path / "model.onnx.index.json")[0]["shrink"]
    data = [f.name for f in made.files if f.name.endswith(".data")]
    assert [p["file"] for p in ours["parts"]][: len(data)] == data
    assert ours["decoded_bytes"] == sum(len(i.raw_data) for i in image().graph.initializer if len(i.raw_data) >= 1024)
    assert ours["graph"] == "model.split.onnx"
    graph = onnx.load(tmp_path / "model.split.onnx", load_external_data=False).graph
    for name, numbers in ours["tensors"].items():
        said = [i for i in graph.initializer if i.name == name or i.name.startswith(f"{name}/piece")]
        assert [data.index(i.external_data[0].value) + 1 for i in said] == numbers
