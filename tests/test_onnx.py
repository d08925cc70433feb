"""ONNX files: what is read is what onnx itself reads, and what is written computes the same in ONNX Runtime."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shrink import container, formats
from shrink.codebooks import EIGHTBIT_TABLE
from shrink.coders import pack
from shrink.errors import BadInput, MissingDependency, OutputError, ShrinkError, UsageError
from shrink.formats import _onnx_write
from shrink.formats import onnx as format_onnx
from shrink.model import DTYPES, Entry, Model, Quantized, Tensor
from shrink.steps import Step, groups

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from tests.samples import Damaged  # noqa: E402
from tests.samples import onnx as sample  # noqa: E402

Array = NDArray[Any]

IR_VERSIONS = {6: 3, 7: 3, 9: 4, 11: 6, 13: 7, 17: 8, 21: 10}
OPSETS = [opset for opset in IR_VERSIONS if opset >= 7]
LEVELS = {
    "as-written": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "optimized": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def run(
    path: Path, feeds: dict[str, Array], level: str = "optimized", outputs: Sequence[str] | None = None
) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values: list[Array] = session.run(outputs, feeds)
    return values


def same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def save(proto: Any, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return path


def adding(weights: dict[str, Array], opset: int, ir_version: int | None = None) -> Any:
    """y = x + the sum of every weight's sum, and every weight as an output of its own."""
    nodes, outputs, total = [], [], "x"
    for i, (name, values) in enumerate(weights.items()):
        # ReduceMean's axes became an input in opset 18; without axes it is the same in all.
        source = name
        if values.dtype != np.float32:
            source = f"cast{i}"
            nodes.append(helper.make_node("Cast", [name], [source], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("ReduceMean", [source], [f"mean{i}"], keepdims=0))
        nodes.append(helper.make_node("Add", [total, f"mean{i}"], [f"sum{i}"]))
        total = f"sum{i}"
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        outputs.append(helper.make_tensor_value_info(name, kind, values.shape))
    initializers = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])]
    ir_version = ir_version or IR_VERSIONS[opset]
    if ir_version < 4:
        inputs += outputs
    final = helper.make_tensor_value_info(total, TensorProto.FLOAT, [2])
    graph = helper.make_graph(nodes, "adding", inputs, [final, *outputs], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def write(model: Model, entries: Iterable[Entry], path: Path) -> Any:
    """Write, check with ONNX's own checker, and give back what was written."""
    format_onnx.write(model, entries, path, None)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


def read_proto(proto: Any, folder: Path, name: str = "model.onnx") -> Model:
    return format_onnx.read(save(proto, folder / name))


# Encoded tensors, made by hand: random codes, scales and zero points.


def affine(
    name: str,
    shape: tuple[int, ...],
    bits: int,
    axis: int | None,
    block: int | None,
    scale: str = "F32",
    zero: bool = False,
) -> Quantized:
    rng = np.random.default_rng([bits, *shape])
    rows, _, blocks = groups(shape, axis, block)
    count, n_groups = math.prod(shape), rows * blocks
    scales = (rng.standard_normal(n_groups) * 10.0 ** rng.integers(-6, 3, n_groups)).astype("<f4")
    scales[0] = 1e-40  # a denormal number
    stored = scales.tobytes() if scale == "F32" else (scales.view("<u4") >> 16).astype("<u2").tobytes()
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    zeros = rng.integers(low, high, n_groups).astype("i1").tobytes() if zero else b""
    codes = rng.integers(low, high, count).astype("i1")
    if bits == 8:
        body = codes.tobytes()
    else:
        halves = np.append(codes, np.zeros(count % 2, "i1")).view("u1") & 15
        body = (halves[0::2] | halves[1::2] << 4).tobytes()
    step = Step("affine.1", {"bits": bits, "axis": axis, "block": block, "scale": scale, "zero": zero})
    return Quantized.of(name, DTYPES["F32"], shape, (step,), stored + zeros + body)


def codebook(name: str, shape: tuple[int, ...], table: str | list[float], scale: float) -> Quantized:
    size = len(EIGHTBIT_TABLE) if isinstance(table, str) else len(table)
    codes = np.random.default_rng(3).integers(0, size, shape).astype("u1")
    step = Step("codebook.1", {"table": table, "scale": scale})
    return Quantized.of(name, DTYPES["F32"], shape, (step,), codes.tobytes())


def float16(name: str, shape: tuple[int, ...], dtype: str = "F32", zeros: float = 0.0) -> Quantized:
    rng = np.random.default_rng(5)
    values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 4, shape)).astype("<f2")
    values[rng.random(shape) < zeros] = 0
    values.reshape(-1)[:4] = [-0.0, 6e-8, 65504, -6e-8]
    return Quantized.of(name, DTYPES[dtype], shape, (Step("cast.1", {"from": "F16"}),), values.tobytes())


def sparse_affine(name: str, shape: tuple[int, ...]) -> Quantized:
    """Mostly zero codes, so that packing stores a mask."""
    bare = affine(name, shape, 8, 0, None)
    head = 4 * shape[0]
    codes = np.frombuffer(bare.payload, "u1")[head:].copy()
    codes[np.random.default_rng(6).random(codes.size) < 0.8] = 0
    packed = pack(Quantized.of(name, bare.dtype, shape, bare.steps, bare.payload[:head] + codes.tobytes()), 9)
    assert [s.name for s in packed.steps][-2:] == ["sparse.1", "affine.1"]
    return packed


def planes_float16(name: str, shape: tuple[int, ...]) -> Quantized:
    packed = pack(float16(name, shape, zeros=0.1), 9)
    assert [s.name for s in packed.steps][1:] == ["planes.1", "cast.1"]
    return packed


ENCODED: tuple[Quantized, ...] = (
    float16("f16", (40, 30)),
    float16("f16 conv", (16, 8, 3, 3)),
    codebook("eightbit", (8, 100), "eightbit", 0.037),
    codebook("eightbit 符号", (3, 5, 7, 11), "eightbit", 1e-30),
    codebook("table of 17", (41, 31), [0.1 * i - 0.7 for i in range(17)], 0.3),
    affine("int8 tensor", (30, 41), 8, None, None),
    affine("int8 tensor zero", (30, 41), 8, None, None, zero=True),
    affine("int8 axis 0", (20, 33), 8, 0, None),
    affine("int8 axis 1 zero", (20, 33), 8, 1, None, zero=True),
    affine("int8 conv", (16, 4, 3, 3), 8, 0, None, zero=True),
    affine("int8 conv axis 1", (8, 16, 3, 3), 8, 1, None, zero=True),
    affine("int8 kernel", (3, 3, 4, 16), 8, 3, None, "BF16", zero=True),
    affine("int8 vector", (2000,), 8, None, 100),
    affine("int8 blocks", (10, 128), 8, 0, 32),
    affine("int8 blocks short", (10, 130), 8, 0, 32, "BF16", zero=True),
    affine("int8 blocks axis 2", (5, 6, 7, 8), 8, 2, 64, zero=True),
    affine("int4 tensor odd", (37, 41), 4, None, None),
    affine("int4 axis 0 odd", (41, 37), 4, 0, None, zero=True),
    affine("int4 axis 1 odd", (41, 37), 4, 1, None, zero=True),
    affine("int4 axis 1", (40, 30), 4, 1, None),
    affine("int4 blocks", (16, 128), 4, 0, 32),
    affine("int4 blocks zero", (16, 128), 4, 0, 32, "BF16", zero=True),
    affine("int4 blocks short odd", (13, 133), 4, 0, 32, "BF16"),
    affine("int4 blocks short zero odd", (13, 133), 4, 0, 32, zero=True),
    affine("int4 blocks axis 1", (133, 13), 4, 1, 32, "BF16", zero=True),
    affine("int4 blocks conv", (8, 16, 3, 3), 4, 0, 32, "BF16", zero=True),
    affine("int4 blocks conv axis 1", (8, 16, 3, 3), 4, 1, 32, "BF16", zero=True),
    affine("int4 blocks tensor odd", (7, 11, 13), 4, None, 32, "BF16"),
    affine("int4 one block", (40, 30), 4, 0, 64, "BF16"),
    pack(codebook("eightbit packed", (30, 100), "eightbit", 0.5), 9),
    sparse_affine("int8 sparse", (20, 100)),
    planes_float16("f16 packed", (60, 100)),
)  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("opset", OPSETS)
def test_every_encoding_computes_the_decoded_values_bit_for_bit(opset: int, level: str, tmp_path: Path) -> None:
    decoded = {q.name: q.array for q in ENCODED}
    original = save(adding(decoded, opset), tmp_path / "float32.onnx")
    small = tmp_path / "small.onnx"
    written = write(format_onnx.read(original), ENCODED, small)
    assert {o.version for o in written.opset_import} == {opset}
    assert all(node.domain == "" for node in written.graph.node)

    x = np.array([0.5, -2], "f4")
    outputs = [o.name for o in written.graph.output]
    expected = run(original, {"x": x}, level, outputs)
    for name, got, want in zip(outputs, run(small, {"x": x}, level, outputs), expected, strict=True):
        assert same_bits(got, want), name
        assert name not in decoded or same_bits(got, decoded[name]), name

    # Nothing is left in float32, and nothing takes more bytes than its codes and parameters do.
    stored = {i.name: i for i in written.graph.initializer}
    assert not decoded.keys() & stored.keys()
    for entry in ENCODED:
        parts = [i for n, i in stored.items() if n.startswith(entry.name + ".")]
        nbytes = sum(len(i.raw_data) for i in parts)
        assert nbytes == least_bytes(entry, opset), entry.name


def least_bytes(entry: Quantized, opset: int) -> int:
    """What the codes and parameters of an encoded tensor take, not packed."""
    step = entry.steps[-1]
    if step.name == "cast.1":
        return 2 * entry.size
    if step.name == "codebook.1":
        return entry.size + 4 * (256 if step.params["table"] == "eightbit" else 17)
    rows, _, blocks = groups(entry.shape, step.params["axis"], step.params["block"])
    scale_bytes = 2 if step.params["scale"] == "BF16" and opset >= 13 else 4
    codes = -(-entry.size * step.params["bits"] // 8)
    return int(codes + rows * blocks * (scale_bytes + bool(step.params["zero"])))


@pytest.mark.parametrize("opset", OPSETS)
def test_optimized_weights_are_constants_again(opset: int, tmp_path: Path) -> None:
    """Expanding costs nothing at each inference: ONNX Runtime folds it when it loads."""
    decoded = {q.name: q.array for q in ENCODED}
    small = tmp_path / "small.onnx"
    write(read_proto(adding(decoded, opset), tmp_path), ENCODED, small)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert {node.op_type for node in nodes} <= {"Add"}


@pytest.mark.parametrize("dtype", ["F16", "F64"])
def test_encoded_tensors_of_other_float_types(dtype: str, tmp_path: Path) -> None:
    bare = affine("w", (20, 33), 8, 0, None)
    scales = np.abs(np.random.default_rng(1).standard_normal(20)).astype("<f4")
    payload = scales.tobytes() + bare.payload[80:]
    entries = [
        Quantized.of("w", DTYPES[dtype], bare.shape, bare.steps, payload),
        float16("h", (30, 20), dtype),
    ]
    decoded = {e.name: e.array for e in entries}
    original = save(adding(decoded, 13), tmp_path / "original.onnx")
    small = tmp_path / "small.onnx"
    written = write(format_onnx.read(original), entries, small)
    # What is float16 already is no smaller in another form.
    assert {i.name for i in written.graph.initializer} & {"w", "h"} == ({"h"} if dtype == "F16" else set())
    assert small.stat().st_size < original.stat().st_size
    for level in LEVELS:
        for got, want in zip(run(small, {"x": np.zeros(2, "f4")}, level, ["w", "h"]), decoded.values(), strict=True):
            assert same_bits(got, want)


def test_sample_network_gives_the_same_output_and_keeps_what_it_has(tmp_path: Path) -> None:
    path = sample.make(tmp_path)
    model = formats.sniff(path).read(path)
    assert tuple(t.name for t in model.tensors) == sample.TENSOR_NAMES
    for tensor, initializer in zip(model.tensors, onnx.load(path).graph.initializer, strict=False):
        assert same_bits(tensor.array, numpy_helper.to_array(initializer))
    assert not any(tensor.array.flags.writeable for tensor in model.tensors)

    copy = tmp_path / "copy.onnx"
    written = write(model, model.tensors, copy)
    before = {i.name: i for i in onnx.load(path).graph.initializer}
    after = {i.name: i for i in written.graph.initializer}
    assert before.keys() == after.keys()
    for name in before:
        assert same_bits(numpy_helper.to_array(before[name]), numpy_helper.to_array(after[name]))
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype("f4")
    assert same_bits(*run(path, {"x": x}), *run(copy, {"x": x}))

    again = format_onnx.read(copy)
    other = tmp_path / "again.onnx"
    write(again, again.tensors, other)
    assert other.read_bytes() == copy.read_bytes()
    assert again.graph is not None
    assert again.source.size_bytes == copy.stat().st_size


def test_quantized_network_equals_the_float32_one_of_its_decoded_weights(tmp_path: Path) -> None:
    model = format_onnx.read(sample.make(tmp_path))
    conv = model["畳み込み/W"]
    fc = affine("fc.weight", (10, 288), 4, 0, 32, "BF16", zero=True)
    quantized: list[Entry] = []
    for entry in model.tensors:
        if entry.name == "fc.weight":
            quantized.append(fc)
        elif entry.name == conv.name:
            half = conv.array.astype("<f2").tobytes()
            quantized.append(Quantized.of(conv.name, conv.dtype, conv.shape, (Step("cast.1", {"from": "F16"}),), half))
        else:
            quantized.append(entry)
    write(model, quantized, tmp_path / "small.onnx")
    plain = write(model, [Tensor.of(e.name, e.array) for e in quantized], tmp_path / "plain.onnx")
    # ONNX Runtime sums in another order where a weight is a constant, so as written it must not be one here either.
    for initializer in plain.graph.initializer:
        if initializer.name in ("fc.weight", conv.name):
            plain.graph.node.insert(0, helper.make_node("Identity", [initializer.name + "'"], [initializer.name]))
            initializer.name += "'"
    save(plain, tmp_path / "plain.onnx")
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype("f4")
    for level in LEVELS:
        assert same_bits(*run(tmp_path / "small.onnx", {"x": x}, level), *run(tmp_path / "plain.onnx", {"x": x}, level))


def test_graph_survives_our_container(tmp_path: Path) -> None:
    decoded = {q.name: q.array for q in ENCODED}
    model = read_proto(adding(decoded, 17), tmp_path)
    packed = tmp_path / "packed.safetensors"
    for level in (None, 9):
        container.write(ENCODED, packed, source="onnx", attributes={}, graph=model.graph, level=level)
        contents = container.read(packed)
        again = Model(contents.entries, model.source, contents.attributes, contents.graph)
        write(model, ENCODED, tmp_path / "direct.onnx")
        write(again, again.tensors, tmp_path / "through.onnx")
        # A float16 tensor comes back from there as a plain one.
        assert level is not None or isinstance(again["f16"], Tensor)
        assert (tmp_path / "through.onnx").read_bytes() == (tmp_path / "direct.onnx").read_bytes()


def test_graph_holds_no_data(tmp_path: Path) -> None:
    weights = {"a": np.ones((1000, 1000), "f4"), "b": np.arange(1000)}
    model = read_proto(adding(weights, 13), tmp_path)
    assert model.graph is not None
    assert len(model.graph) < 1000
    assert [t.array.sum() for t in model.tensors] == [1_000_000, 499_500]


def test_small_tensors_stay_as_they_are_where_nodes_would_cost_more(tmp_path: Path) -> None:
    entry = affine("w", (8,), 8, None, None)
    written = write(read_proto(adding({"w": entry.array}, 13), tmp_path), [entry], tmp_path / "small.onnx")
    assert [i.name for i in written.graph.initializer] == ["w"]
    assert same_bits(numpy_helper.to_array(written.graph.initializer[0]), entry.array)


@pytest.mark.parametrize(
    ("shape", "axis", "block"), [((0, 5), 0, None), ((5, 0), 0, 32), ((3, 0), None, None), ((), None, None)]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_empty_tensors_and_scalars(
    shape: tuple[int, ...], axis: int | None, block: int | None, bits: int, tmp_path: Path
) -> None:
    rows, _, blocks = groups(shape, axis, block)
    step = Step("affine.1", {"bits": bits, "axis": axis, "block": block, "scale": "F32", "zero": False})
    payload = np.ones(rows * blocks, "<f4").tobytes() + bytes([7] * math.prod(shape))
    entry = Quantized.of("w", DTYPES["F32"], shape, (step,), payload)
    written = write(read_proto(adding({"w": entry.array}, 13), tmp_path), [entry], tmp_path / "small.onnx")
    assert same_bits(numpy_helper.to_array(written.graph.initializer[0]), entry.array)


TYPES = [
    (TensorProto.FLOAT, "float_data", [1.5, -0.0, 3e38]),
    (TensorProto.DOUBLE, "double_data", [1.5, -1e300, 0.1]),
    (TensorProto.FLOAT16, "int32_data", [0x3C00, 0xFBFF, 0x8001]),
    (TensorProto.INT8, "int32_data", [-128, 0, 127]),
    (TensorProto.UINT8, "int32_data", [0, 128, 255]),
    (TensorProto.INT16, "int32_data", [-32768, 0, 32767]),
    (TensorProto.UINT16, "int32_data", [0, 7, 65535]),
    (TensorProto.INT32, "int32_data", [-(2**31), 0, 2**31 - 1]),
    (TensorProto.INT64, "int64_data", [-(2**63), 0, 2**63 - 1]),
    (TensorProto.UINT32, "uint64_data", [0, 7, 2**32 - 1]),
    (TensorProto.UINT64, "uint64_data", [0, 7, 2**64 - 1]),
    (TensorProto.BOOL, "int32_data", [0, 1, 1]),
]


def holding(*tensors: Any, nodes: Sequence[Any] = ()) -> Any:
    """A model that computes nothing of note, with these initializers."""
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["x"], ["y"])],
        "holding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
def test_every_type_and_place_of_values(raw: bool, tmp_path: Path) -> None:
    tensors = []
    for number, field, values in TYPES:
        tensor = TensorProto(name=f"t{number}", data_type=number, dims=[1, 3])
        getattr(tensor, field).extend(values)
        tensors.append(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name) if raw else tensor)
    tensors.append(TensorProto(name="none", data_type=TensorProto.FLOAT, dims=[0, 5]))
    proto = holding(*tensors)
    expected = [numpy_helper.to_array(t) for t in tensors]
    model = read_proto(proto, tmp_path)
    assert {t.dtype for t in model.tensors} == set(DTYPES.values())
    for read_back, want in zip(model.tensors, expected, strict=True):
        assert same_bits(read_back.array, want)
    written = write(model, model.tensors, tmp_path / "copy.onnx")
    for initializer, want in zip(written.graph.initializer, expected, strict=True):
        assert same_bits(numpy_helper.to_array(initializer), want)


def test_other_types_sparse_and_constants_stay_in_the_graph(tmp_path: Path) -> None:
    brain = helper.make_tensor("brain", TensorProto.BFLOAT16, [2], b"\x80\x3f\x00\x40", raw=True)
    words = TensorProto(name="words", data_type=TensorProto.STRING, dims=[2], string_data=[b"a", "ü".encode()])
    proto = holding(brain, words, numpy_helper.from_array(np.ones(3, "f4"), "w"))
    constant = numpy_helper.from_array(np.arange(5, dtype="f4"), "const")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=constant))
    sparse = proto.graph.sparse_initializer.add(dims=[10])
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([1, 2], "f4"), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([3, 4], "i8"), "sparse_indices"))
    model = read_proto(proto, tmp_path)
    assert [t.name for t in model.tensors] == ["w"]
    format_onnx.write(model, model.tensors, tmp_path / "copy.onnx", None)
    written = onnx.load(tmp_path / "copy.onnx")
    assert list(written.graph.initializer)[:2] == [brain, words]
    assert written.graph.node == proto.graph.node
    assert written.graph.sparse_initializer == proto.graph.sparse_initializer


def test_external_data_is_read_in_place_and_embedded_where_it_stays_in_the_graph(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weight, inner = rng.standard_normal((30, 20)).astype("f4"), rng.standard_normal(7).astype("f4")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "重み.bin").write_bytes(bytes(16) + weight.tobytes() + inner.tobytes() + b"\x80\x3f\x00\x40")
    where = {"location": "parts/重み.bin"}
    w, c, b = (numpy_helper.from_array(weight, "w"), numpy_helper.from_array(inner, "c"), TensorProto(name="brain"))
    b.dims.append(2)
    b.data_type = TensorProto.BFLOAT16
    sample.move_out(w, **where, offset="16", length="2400", checksum="unused")
    sample.move_out(c, **where, offset="2416", length="28")
    sample.move_out(b, **where, offset="2444")
    proto = holding(w, b, nodes=[helper.make_node("Constant", [], ["const"], value=c)])
    model = read_proto(proto, tmp_path)
    assert model.source.size_bytes == (tmp_path / "model.onnx").stat().st_size + 2448
    copy = tmp_path / "copy.onnx"
    written = write(model, model.tensors, copy)
    (tmp_path / "parts" / "重み.bin").unlink()
    assert same_bits(numpy_helper.to_array(written.graph.initializer[1]), weight)
    assert same_bits(numpy_helper.to_array(written.graph.node[0].attribute[0].t), inner)
    assert written.graph.initializer[0].raw_data == b"\x80\x3f\x00\x40"
    # Values are read when asked for.
    with pytest.raises(OutputError, match="No such file"):
        _ = model["w"].array


def test_external_data_cannot_be_embedded_beyond_its_dims(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(4096))
    brain = TensorProto(name="brain", data_type=TensorProto.BFLOAT16, dims=[2])
    sample.move_out(brain, "data.bin")
    with pytest.raises(BadInput, match=r"tensor brain: .*larger than"):
        read_proto(holding(brain), tmp_path)


def test_names_in_use_are_not_taken_again(tmp_path: Path) -> None:
    half, codes = float16("w", (30, 30)), codebook("v", (30, 30), "eightbit", 1.0)
    proto = adding({"w": half.array, "v": codes.array}, 13)
    for name in ("w.f16", "v.codes", "v.index", "v.table"):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(1, "f4"), name))
    proto.graph.node.append(helper.make_node("Identity", ["x"], ["v.index.1"]))
    model = read_proto(proto, tmp_path)
    entries = [half if e.name == "w" else codes if e.name == "v" else e for e in model.tensors]
    written = write(model, entries, tmp_path / "small.onnx")
    assert {"w.f16", "w.f16.1", "v.codes.1", "v.table.1"} <= {i.name for i in written.graph.initializer}
    got = run(tmp_path / "small.onnx", {"x": np.zeros(2, "f4")}, outputs=["w", "v"])
    assert same_bits(got[0], half.array)
    assert same_bits(got[1], codes.array)


def test_initializers_among_the_inputs(tmp_path: Path) -> None:
    """IR version 3 lists them all; the one that becomes a computed value must leave, and constants stay constant."""
    half = float16("w", (30, 30))
    v = np.ones((2, 2), "f4")
    old = read_proto(adding({"w": half.array, "v": v}, 7, ir_version=3), tmp_path)
    plain = write(old, old.tensors, tmp_path / "plain.onnx")
    assert (plain.ir_version, [i.name for i in plain.graph.input]) == (3, ["x", "w", "v"])
    small = write(old, [half, old["v"]], tmp_path / "small.onnx")
    assert (small.ir_version, [i.name for i in small.graph.input]) == (4, ["x"])

    proto = adding({"w": half.array, "v": v}, 13)
    proto.graph.input.extend(proto.graph.output[1:])
    new = read_proto(proto, tmp_path)
    kept = write(new, [half, new["v"]], tmp_path / "kept.onnx")
    assert (kept.ir_version, [i.name for i in kept.graph.input]) == (7, ["x", "v"])
    assert same_bits(run(tmp_path / "kept.onnx", {"x": np.zeros(2, "f4")}, outputs=["w"])[0], half.array)


def test_subgraphs_see_the_expanded_tensor_and_keep_their_own(tmp_path: Path) -> None:
    entry = affine("w", (20, 40), 4, 0, 32, "BF16")
    own = numpy_helper.from_array(np.full((20, 40), 2, "f4"), "own")
    out = [helper.make_tensor_value_info("o", TensorProto.FLOAT, [20, 40])]
    then = helper.make_graph([helper.make_node("Mul", ["w", "own"], ["o"])], "then", [], out, [own])
    other = helper.make_graph([helper.make_node("Identity", ["w"], ["o"])], "else", [], out)
    graph = helper.make_graph(
        [helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=other)],
        "branches",
        [helper.make_tensor_value_info("yes", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [20, 40])],
        [numpy_helper.from_array(entry.array, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    model = read_proto(proto, tmp_path)
    assert [t.name for t in model.tensors] == ["w"]
    write(model, [entry], tmp_path / "small.onnx")
    for level in LEVELS:
        for yes, factor in ((True, 2), (False, 1)):
            (got,) = run(tmp_path / "small.onnx", {"yes": np.array(yes)}, level)
            assert same_bits(got, entry.array * np.float32(factor))


def test_leading_slashes_are_no_part_of_the_tensor_name(tmp_path: Path) -> None:
    values = [np.full(2, i, "f4") for i in range(3)]
    model = read_proto(adding(dict(zip(["/a", "a", "//a"], values, strict=True)), 13), tmp_path)
    assert [t.name for t in model.tensors] == ["a.1", "a", "a.2"]
    written = write(model, model.tensors[::-1], tmp_path / "copy.onnx")
    got = {i.name: numpy_helper.to_array(i)[0] for i in written.graph.initializer}
    assert got == {"/a": 0, "a": 1, "//a": 2}


def refused(model: Model, entries: Iterable[Entry], path: Path, words: str, kind: type[ShrinkError] = BadInput) -> None:
    with pytest.raises(kind, match=words):
        format_onnx.write(model, entries, path, None)
    assert not path.exists()
    assert not list(path.parent.glob(".*"))


def test_entries_that_do_not_fit_the_graph(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    w = np.ones((20, 30), "f4")
    model = read_proto(adding({"w": w}, 13), tmp_path)
    good = model["w"]
    refused(model, [], out, "tensor w: the graph needs it")
    refused(model, [good, Tensor.of("v", w)], out, "tensor v: the graph has no initializer")
    refused(model, [Tensor.of("w", w.T)], out, r"tensor w: its shape is \[30, 20\], the graph's is \[20, 30\]")
    refused(model, [Tensor.of("w", w.astype("i4"))], out, "tensor w: its values are int32, the graph's are float32")
    refused(model, [good, good], out, "tensor w: the graph has no initializer")
    refused(Model((good,), model.source), [good], out, "only weights", UsageError)
    refused(Model((good,), model.source, graph=b"\xff" * 40), [good], out, "damaged")
    cut = Quantized.of(
        "w", good.dtype, good.shape, (Step("codebook.1", {"table": "eightbit", "scale": 1.0}),), bytes(9)
    )
    refused(model, [cut], out, "tensor w: codebook.1 gives 9 values")
    # What only training needs is not in a graph, and not missed there.
    write(model, [good, Tensor.of("adam/m", w, "state")], out)
    # A wider type is rounded to the graph's.
    written = write(model, [Tensor.of("w", w.astype("f8") / 3)], out)
    assert same_bits(numpy_helper.to_array(written.graph.initializer[0]), w / np.float32(3))


def test_a_graph_from_a_hostile_container_refers_to_nothing_outside(tmp_path: Path) -> None:
    constant = numpy_helper.from_array(np.ones(3, "f4"), "const")
    sample.move_out(constant, "/etc/passwd")
    proto = holding(nodes=[helper.make_node("Constant", [], ["c"], value=constant)])
    source = read_proto(holding(), tmp_path).source
    hostile = Model((), source, graph=proto.SerializeToString())
    refused(hostile, [], tmp_path / "out.onnx", "tensor const: the graph refers to data outside")
    twice = holding(*(TensorProto(name=n, data_type=1, dims=[2]) for n in "ab"))
    for initializer in twice.graph.initializer:
        sample.move_out(initializer, "a")
    entry = Tensor.of("a", np.ones(2, "f4"))
    refused(Model((entry,), source, graph=twice.SerializeToString()), [entry], tmp_path / "out.onnx", "not valid")


def test_old_opsets_take_plain_tensors_only(tmp_path: Path) -> None:
    half = float16("w", (30, 30))
    model = read_proto(adding({"w": half.array}, 6), tmp_path)
    refused(model, [half], tmp_path / "out.onnx", "tensor w: the graph's opset is 6, quantized tensors need 7")
    write(model, model.tensors, tmp_path / "plain.onnx")


def test_files_beyond_what_a_message_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = read_proto(adding({"w": np.ones(1000, "f4")}, 13), tmp_path)
    out = tmp_path / "out.onnx"
    write(model, model.tensors, out)
    size = out.stat().st_size
    monkeypatch.setattr(_onnx_write, "AT_MOST_BYTES", size - 1)
    refused(model, model.tensors, tmp_path / "new.onnx", f"holds at most {size - 1} bytes")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sample.make(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency, match=r"shrink\[onnx\]"):
        format_onnx.read(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    cases: list[Damaged] = list(sample.damaged(tmp_path))
    assert len(cases) > 20
    for case in cases:
        with pytest.raises(ShrinkError) as error:
            formats.sniff(case.path).read(case.path)
        assert error.value.exit_code == case.exit_code, case.label
        assert all(word in str(error.value) for word in case.words), (case.label, str(error.value))


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[rng.integers(len(data)) :]


@pytest.mark.parametrize("damage", [_flip, _cut])
def test_random_damage_never_escapes_the_error_tree(
    damage: Callable[[bytearray, np.random.Generator], None], tmp_path: Path
) -> None:
    proto = sample.make_proto()
    for initializer in proto.graph.initializer:
        # Less data, so that most flips hit the structure.
        if len(initializer.raw_data) > 64:
            initializer.raw_data = initializer.raw_data[:64]
            del initializer.dims[:]
            initializer.dims.append(16)
    good = proto.SerializeToString()
    rng = np.random.default_rng(11)
    outcomes = {"read": 0, "refused": 0}
    path = tmp_path / "net.onnx"
    for _ in range(200):
        data = bytearray(good)
        damage(data, rng)
        path.write_bytes(data)
        try:
            model = format_onnx.read(path)
            format_onnx.write(model, model.tensors, tmp_path / "copy.onnx", None)
            outcomes["read"] += 1
        except (BadInput, OutputError):
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20
    assert damage is _cut or outcomes["read"] > 20
