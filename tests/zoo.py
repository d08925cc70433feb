"""Small trained networks of many kinds, to try quantizers on: those of benchmarks/models/zoo, and a Keras LSTM.

`NETWORKS` are in the repository; `keras_lstm` makes one more of a file that may not be here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import shrink
from benchmarks.models.zoo import graphs, samples
from benchmarks.models.zoo.samples import Kind

Array = NDArray[Any]

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "models" / "zoo"


@dataclass(frozen=True)
class ZooNetwork:
    """An ONNX file, and the npz of the same name beside it, which is read when it is first needed.

    Inputs are as the network takes them, float32 or int64, a sample a row, of the shape of one without its batch.
    `least` is a bound for `score` of the network's outputs for its `evaluation` inputs.
    """

    name: str
    path: Path
    kind: Kind
    least: float

    @cached_property
    def calibration(self) -> Array:
        """(m, …): other samples than those for evaluation."""
        return self._inputs("calibration")

    @cached_property
    def evaluation(self) -> Array:
        """(n, …): what the network has not been trained on."""
        return self._inputs("evaluation")

    @cached_property
    def labels(self) -> Array:
        """(n,): what is right; of images the pictures themselves, uint8."""
        return self._stored["labels"]

    def outputs(self, inputs: Array, path: Path | None = None) -> Array:
        """What the network, or a variant of it at `path`, makes of these inputs, one at a time: (n, …)."""
        return samples.run(path or self.path, inputs)

    def score(self, outputs: Array) -> float:
        """How good these outputs for the evaluation inputs are: the share that is right, of images the PSNR in dB."""
        return samples.score(self.kind, outputs, self.labels)

    @cached_property
    def _stored(self) -> dict[str, Array]:
        with np.load(self.path.with_suffix(".npz"), allow_pickle=False) as file:
            return dict(file)

    def _inputs(self, name: str) -> Array:
        scale = self._stored.get("scale")
        return samples.as_input(self._stored[name], None if scale is None else float(scale))


NETWORKS: tuple[ZooNetwork, ...] = (
    ZooNetwork("dense", FOLDER / "dense.onnx", "classes", 0.95),
    ZooNetwork("residual", FOLDER / "residual.onnx", "classes", 0.95),
    ZooNetwork("excitation", FOLDER / "excitation.onnx", "classes", 0.95),
    ZooNetwork("lstm", FOLDER / "lstm.onnx", "sequence", 0.45),
    ZooNetwork("transformer", FOLDER / "transformer.onnx", "classes", 0.95),
    ZooNetwork("upscaler", FOLDER / "upscaler.onnx", "image", 30.0),
)


def keras_lstm(shared: Path, folder: Path) -> ZooNetwork:
    """The Keras model of `shared`/lstm-text-keras as ONNX, written into `folder`.

    Its samples are the sentences that came with it, 50 for calibration and 50 for evaluation: 39 characters, one-hot,
    and the 40th as label.
    """
    source = shared / "lstm-text-keras"
    model = shrink.load(source / "lstm_text_generation.h5")
    arrays = {tensor.name: tensor.array for tensor in model.tensors if tensor.role != "state"}
    settings = json.loads((source / "model_setting.json").read_text(encoding="utf-8"))
    number = settings["char_indices"]
    sentences = np.array([[number[character] for character in line] for line in settings["example_sentences"]])
    one_hot = np.eye(settings["n_chars"], dtype=np.uint8)[sentences[:, :-1]]
    path = folder / "keras-lstm.onnx"
    path.write_bytes(graphs.keras_lstm(arrays).SerializeToString(deterministic=True))
    stored = {"calibration": one_hot[0::2], "evaluation": one_hot[1::2], "labels": sentences[1::2, -1]}
    np.savez_compressed(path.with_suffix(".npz"), scale=np.float32(1), **stored)
    return ZooNetwork("keras-lstm", path, "sequence", 0.3)
