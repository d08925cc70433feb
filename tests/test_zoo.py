"""The zoo: every network is what it says, knows what it was taught, and comes with inputs it has not seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from benchmarks import zoo as suite
from benchmarks.models.zoo import graphs
from shrink.networks.legacy import import_chainer
from tests.command import run
from tests.pages import needs_chainer
from tests.zoo import FOLDER, NETWORKS, ZooNetwork, keras_lstm

Array = NDArray[Any]

# What each is in the zoo for.
OPERATORS = {
    "dense": {"Gemm", "Relu"},
    "residual": {"Conv", "BatchNormalization", "Add", "ReduceMean"},
    "excitation": {"Conv", "BatchNormalization", "HardSigmoid", "Sigmoid", "Mul", "AveragePool"},
    "lstm": {"Gather", "LSTM", "Gemm", "Softmax"},
    "transformer": {"MatMul", "Softmax", "Erf", "ReduceMean", "Sub", "Pow", "Sqrt", "Div"},
    "upscaler": {"Conv", "ConvTranspose", "Concat", "Clip"},
}

every = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)


def graph_of(network: ZooNetwork) -> Any:
    return onnx.load(network.path).graph


@every
def test_it_does_what_it_was_trained_for(network: ZooNetwork) -> None:
    outputs = network.outputs(network.evaluation)
    assert len(outputs) == len(network.labels) > 5
    assert network.score(outputs) >= network.least
    # What the score is made of is not the same for all samples.
    assert network.score(np.roll(outputs, 1, axis=0)) < network.least / 2
    if network.kind == "image":
        assert 0 <= outputs.min() < outputs.max() <= 1


@every
def test_it_is_a_valid_model_of_its_kind(network: ZooNetwork) -> None:
    onnx.checker.check_model(onnx.load(network.path), full_check=True)
    assert OPERATORS[network.name] <= {node.op_type for node in graph_of(network).node}


@every
def test_calibration_and_evaluation_are_other_samples_of_the_same_shape(network: ZooNetwork) -> None:
    calibration, evaluation = network.calibration, network.evaluation
    assert calibration.shape[1:] == evaluation.shape[1:]
    assert calibration.dtype == evaluation.dtype
    assert calibration.dtype in (np.float32, np.int64)
    assert min(len(calibration), len(evaluation)) >= 10
    (taken,) = graph_of(network).input
    dims = [dim.dim_value for dim in taken.type.tensor_type.shape.dim][1:]
    assert [known or size for known, size in zip(dims, evaluation.shape[1:], strict=True)] == list(evaluation.shape[1:])
    assert taken.type.tensor_type.elem_type == onnx.helper.np_dtype_to_tensor_dtype(evaluation.dtype)
    rows = {row.tobytes() for row in calibration}
    assert len(rows) == len(calibration)
    assert not rows & {row.tobytes() for row in evaluation}


@every
def test_inspect_reads_it(network: ZooNetwork) -> None:
    done = run("inspect", network.path, "--json")
    assert done.code == 0, done.stderr
    tensors = json.loads(done.stdout)["tensors"]
    initializers = graph_of(network).initializer
    assert {tuple(tensor["shape"]) for tensor in tensors} == {tuple(tensor.dims) for tensor in initializers}
    assert len(tensors) == len(initializers)


def test_all_are_here_and_small() -> None:
    assert set(OPERATORS) == {network.name for network in NETWORKS}
    files = [path for path in FOLDER.iterdir() if path.suffix in (".onnx", ".npz")]
    assert {path.stem for path in files} == set(OPERATORS)
    assert len(files) == 2 * len(NETWORKS)
    assert sum(path.stat().st_size for path in files) <= 700_000


def test_photographs_are_enlarged_better_than_by_interpolation() -> None:
    from skimage.transform import resize

    (network,) = (n for n in NETWORKS if n.kind == "image")
    wanted = network.labels.shape[2:]
    bicubic = np.stack([np.clip(resize(x[0], wanted, order=3, mode="edge"), 0, 1)[None] for x in network.evaluation])
    assert network.score(network.outputs(network.evaluation)) > network.score(bicubic)


# Graphs made by hand


def trained_like(chain: Any) -> dict[str, Array]:
    """A chain's arrays, made random where they start as 0 or 1: a swap of two would show."""
    chainer = import_chainer()
    rng = np.random.default_rng(3)
    for parameter in chain.params():
        parameter.array[...] += 0.3 * rng.standard_normal(parameter.shape).astype(np.float32)
    snapshot = chainer.serializers.DictionarySerializer()
    snapshot.save(chain)
    return dict(snapshot.target)


def batches(model: Any, inputs: Array) -> Array:
    """The first output, for all inputs at once."""
    import onnxruntime  # type: ignore[import-untyped,unused-ignore]

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    return result


@needs_chainer
def test_the_transformers_graph_is_chainers_network() -> None:
    chainer = import_chainer()
    from benchmarks.models.zoo import networks

    chain = networks.Transformer()  # type: ignore[no-untyped-call]
    graph = graphs.transformer(trained_like(chain))
    rows = np.random.default_rng(0).random((5, 8, 8), np.float32)
    with chainer.using_config("train", False):
        np.testing.assert_allclose(batches(graph, rows), chain(rows).array, rtol=1e-4, atol=1e-4)


@needs_chainer
def test_the_lstms_graph_is_chainers_network() -> None:
    chainer = import_chainer()
    from benchmarks.models.zoo import networks

    chain = networks.TextLSTM()  # type: ignore[no-untyped-call]
    graph = graphs.text_lstm(trained_like(chain))
    tokens = np.random.default_rng(0).integers(0, 40, (5, 7))
    with chainer.using_config("train", False):
        logits = chain(tokens.astype(np.int32)).array.reshape(5, 7, 40)[:, -1]
    np.testing.assert_allclose(batches(graph, tokens), softmax(logits), rtol=1e-4, atol=1e-6)


def test_the_keras_lstms_graph_computes_what_keras_does(shared_models: Path, tmp_path: Path) -> None:
    import h5py  # type: ignore[import-untyped]

    network = keras_lstm(shared_models, tmp_path)
    with h5py.File(shared_models / "lstm-text-keras" / "lstm_text_generation.h5") as file:
        lstm, dense = (file[f"model_weights/{name}/{name}"] for name in ("lstm_1", "dense_1"))
        kernel, recurrent, bias = (lstm[f"{name}:0"][:] for name in ("kernel", "recurrent_kernel", "bias"))
        head, shift = dense["kernel:0"][:], dense["bias:0"][:]
    x = network.evaluation
    state = memory = np.zeros((len(x), 128))
    for step in range(x.shape[1]):
        gates = x[:, step] @ kernel + state @ recurrent + bias
        i, f, c, o = np.split(gates, 4, axis=1)
        i, f, o = (np.clip(0.2 * gate + 0.5, 0, 1) for gate in (i, f, o))
        memory = f * memory + i * np.tanh(c)
        state = o * np.tanh(memory)
    outputs = network.outputs(x)
    np.testing.assert_allclose(outputs, softmax(state @ head + shift), rtol=2e-3, atol=1e-5)
    assert network.score(outputs) >= network.least
    onnx.checker.check_model(onnx.load(network.path), full_check=True)


def softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = raised / raised.sum(axis=1, keepdims=True)
    return shares


# Training


@needs_chainer
def test_a_network_is_trained_anew_with_the_same_seed_to_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for name in ("a", "b"):
        assert suite.main(["dense", "--output", str(tmp_path / name)]) == 0
        made.append([(tmp_path / name / f"dense.{suffix}").read_bytes() for suffix in ("onnx", "npz")])
    assert made[0] == made[1]
    new, old = ZooNetwork("dense", tmp_path / "a" / "dense.onnx", "classes", 0.95), NETWORKS[0]
    # Samples are no sums, whose order could differ from machine to machine.
    for name in ("calibration", "evaluation", "labels"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
    assert new.score(new.outputs(new.evaluation)) >= new.least
    assert "dense: 0.9" in capsys.readouterr().out


def test_an_unknown_network_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["densse"])
    assert "there is no network 'densse': dense, residual" in capsys.readouterr().err
