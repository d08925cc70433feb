from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.samples import Damaged

TENSOR_NAMES = (
    "畳み込み/W",
    "bn/gamma",
    "bn/beta",
    "bn/mean",
    "bn/var",
    "fc.weight",
    "fc.bias",
    "model/slope",
    "形",
    "extra",
)


def make_proto(opset: int = 13, ir_version: int = 8) -> onnx.ModelProto:
    """A small convolutional network: conv, batch normalization, an activation, reshape, gemm."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return rng.standard_normal(shape).astype("f4")

    bias = normal(10)
    initializers = [
        numpy_helper.from_array(normal(8, 3, 3, 3), "畳み込み/W"),
        numpy_helper.from_array(normal(8), "bn/gamma"),
        numpy_helper.from_array(normal(8), "bn/beta"),
        numpy_helper.from_array(normal(8), "bn/mean"),
        numpy_helper.from_array(np.abs(normal(8)) + 1, "bn/var"),
        numpy_helper.from_array(normal(10, 8 * 6 * 6), "fc.weight"),
        # Its values are in float_data, not in raw_data.
        helper.make_tensor("fc.bias", TensorProto.FLOAT, [10], bias.tolist()),
        # Exporters begin names with a slash.
        numpy_helper.from_array(np.array(0.1, "f4"), "/model/slope"),
        numpy_helper.from_array(np.array([1, -1], "i8"), "形"),
        helper.make_tensor(
            "extra", TensorProto.FLOAT16, [3], np.array([1, 2, -3], "f2").view("u2").tolist(), raw=False
        ),
        # A type that NumPy does not have, which stays in the graph.
        helper.make_tensor("brain", TensorProto.BFLOAT16, [2], b"\x80\x3f\x00\x40", raw=True),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "畳み込み/W"], ["conv"], pads=[0, 0, 0, 0]),
        helper.make_node("BatchNormalization", ["conv", "bn/gamma", "bn/beta", "bn/mean", "bn/var"], ["bn"]),
        helper.make_node("PRelu", ["bn", "/model/slope"], ["act"]),
        helper.make_node("Reshape", ["act", "形"], ["flat"]),
        helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "sample",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def make(folder: Path) -> Path:
    path = folder / "分類器 net.onnx"
    path.write_bytes(make_proto().SerializeToString(deterministic=True))
    return path


def damaged(folder: Path) -> Iterator[Damaged]:
    good = make_proto()

    def put(label: str, data: bytes, *words: str, code: int = 3) -> Damaged:
        place = folder / label
        place.mkdir()
        path = place / "net.onnx"
        path.write_bytes(data)
        return Damaged(label, path, words, code)

    def changed(label: str, change: Callable[[onnx.ModelProto], object], *words: str, code: int = 3) -> Damaged:
        proto = onnx.ModelProto()
        proto.CopyFrom(good)
        change(proto)
        return put(label, proto.SerializeToString(), *words, code=code)

    def dims(*shape: int) -> Callable[[onnx.ModelProto], object]:
        def change(proto: onnx.ModelProto) -> None:
            del proto.graph.initializer[0].dims[:]
            proto.graph.initializer[0].dims.extend(shape)

        return change

    def external(location: str | None, **more: str) -> Callable[[onnx.ModelProto], object]:
        def change(proto: onnx.ModelProto) -> None:
            move_out(proto.graph.initializer[0], location, **more)

        return change

    def inner_external(proto: onnx.ModelProto) -> None:
        constant = numpy_helper.from_array(np.ones(3, "f4"), "const")
        move_out(constant, "../../../../etc/passwd")
        proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=constant))

    def typed(field: str, number: int, data_type: int) -> Callable[[onnx.ModelProto], object]:
        def change(proto: onnx.ModelProto) -> None:
            tensor = proto.graph.initializer.add(name="odd", data_type=data_type, dims=[1])
            getattr(tensor, field).append(number)

        return change

    def rename(name: str) -> Callable[[onnx.ModelProto], object]:
        return lambda proto: setattr(proto.graph.initializer[1], "name", name)

    raw = good.SerializeToString()
    moved = onnx.ModelProto.FromString(raw)
    external("w.bin")(moved)
    raw_external = moved.SerializeToString()
    yield put("empty-file", b"", "empty")
    yield put("truncated", raw[: len(raw) // 2], "damaged")
    yield put("garbage", bytes(range(255, -1, -1)) * 4, "not a readable ONNX model")
    yield put("no-graph", onnx.ModelProto(ir_version=8).SerializeToString(), "no graph")
    yield put("name-not-utf-8", raw.replace("畳み込み/W".encode(), b"\xff" * 14), "not a readable ONNX model", "UTF-8")
    yield put("location-not-utf-8", raw_external.replace(b"w.bin", b"\xff.bin"), "畳み込み/W", "UTF-8")
    yield changed("ten-terabytes", dims(1_600_000, 1_600_000), "畳み込み/W", "claim")
    yield changed("overflowing", dims(1 << 40, 1 << 40), "畳み込み/W", "claim")
    yield changed("overflowing-empty", dims(0, 1 << 62), "畳み込み/W", "claim")
    yield changed("negative-dims", dims(-8, -27), "畳み込み/W", "negative")
    yield changed("too-many-dims", dims(*[1] * 1000), "畳み込み/W", "dims")
    yield changed("short-data", dims(8, 3, 3, 4), "畳み込み/W", "claim 1152 bytes", "864")
    yield changed("short-floats", lambda p: p.graph.initializer[6].float_data.pop(), "fc.bias", "claim")
    yield changed("two-places", lambda p: p.graph.initializer[0].float_data.append(1), "畳み込み/W", "two places")
    yield changed("wrong-field", typed("float_data", 1, TensorProto.INT64), "odd", "float_data")
    yield changed("too-large-for-int8", typed("int32_data", 300, TensorProto.INT8), "odd", "does not fit")
    yield changed("too-small-for-uint8", typed("int32_data", -1, TensorProto.UINT8), "odd", "does not fit")
    yield changed("duplicate", rename("畳み込み/W"), "畳み込み/W", "two initializers")
    yield changed("output-too", rename("conv"), "conv", "output of a node")
    yield changed("no-name", rename(""), "empty name")
    yield changed("climbing-name", rename("/../../x"), "climbs")
    yield changed("control-name", rename("a\x1b[31m"), "control characters")
    yield changed("external-climbing", external("../../../../etc/passwd"), "畳み込み/W", "refused")
    yield changed("external-absolute", external("/etc/passwd"), "畳み込み/W", "refused")
    yield changed("external-inner", inner_external, "const", "refused")
    yield changed("external-nowhere", external(None), "畳み込み/W", "refers to ''")
    yield changed("external-folder", external("."), "畳み込み/W", "not a file")
    yield changed("external-missing", external("weights.bin"), "weights.bin", code=5)

    for label, location, more, words in (
        ("external-link", "link.bin", {}, ("link",)),
        ("external-offset", "data.bin", {"offset": "4000"}, ("past the end",)),
        ("external-huge-offset", "data.bin", {"offset": "9" * 18}, ("past the end",)),
        ("external-negative", "data.bin", {"offset": "-4"}, ("offset", "not a number")),
        ("external-length", "data.bin", {"length": "860"}, ("claim 864 bytes", "860")),
        ("external-length-text", "data.bin", {"length": "٣"}, ("length", "not a number")),
    ):
        case = changed(label, external(location, **more), "畳み込み/W", *words)
        (case.path.parent / "data.bin").write_bytes(bytes(4096))
        (case.path.parent / "link.bin").symlink_to("/etc/passwd")
        yield case


def move_out(tensor: TensorProto, location: str | None, **more: str) -> None:
    """Make the data of a tensor external. The data itself is dropped."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
