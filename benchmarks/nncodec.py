"""NNCodec, Fraunhofer's implementation of ISO/IEC 15938-17 (NNC), as a peer.

It wants numpy<2 and brings PyTorch, so it cannot be where the tests are, and is run from an environment of its own:

    python -m venv build/nncodec && build/nncodec/bin/pip install nncodec==2.1.3
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.errors import ShrinkError

__all__ = ["ABSENT", "QPS", "SWEEP", "VERSION", "Encoded", "encoded"]

VERSION = "2.1.3"
QPS = (-38, -32)
"""Its quality: -38 stands near 8 bits a weight, -32 is what it does unless told."""

SWEEP = tuple(range(-48, -7))
"""From where nothing is lost that anybody sees to where a network is of no use; its step doubles every 4."""

ABSENT = f"nncodec {VERSION} is not in build/nncodec (it wants numpy<2 and brings PyTorch: see benchmarks/nncodec.py)"

_PYTHON = Path(__file__).parents[1] / "build" / "nncodec" / "bin" / "python"
_TIMEOUT_S = 1800

_SCRIPT = """
import contextlib, os, sys, time
import numpy as np
from nncodec.nn import decode, encode
folder, *settings = sys.argv[1:]
with np.load(os.path.join(folder, "in.npz")) as file:
    weights = {name: file[name] for name in file.files}
for setting in settings:
    qp, searched = setting.split(",")
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        start = time.perf_counter()
        stream = encode(weights, {"qp": int(qp), "opt_qp": searched == "searched", "verbose": False})
        seconds = time.perf_counter() - start
        decoded = decode(stream)
    arrays = {f"w{i}": np.asarray(decoded[name]) for i, name in enumerate(weights)}
    np.savez(os.path.join(folder, f"{setting}.npz"), **arrays)
    print(setting, len(stream), seconds)
"""


@dataclass(frozen=True)
class Encoded:
    """The bytes of the stream, what it decodes to, and the seconds that encoding took.

    `searched` says that it chose the qp of each tensor itself, around this one (its opt_qp).
    """

    qp: int
    searched: bool
    size_bytes: int
    decoded: dict[str, NDArray[np.float32]]
    seconds: float


def encoded(
    weights: Mapping[str, NDArray[np.float32]], qps: Sequence[int], *, searched: Sequence[bool] = (False,)
) -> Iterator[Encoded]:
    """What it makes of these weights at each qp, with dependent quantization, as it does unless told.

    Raises:
        ShrinkError: it is not installed, or it fails.
    """
    if not _PYTHON.exists():
        raise ShrinkError(ABSENT)
    with tempfile.TemporaryDirectory() as name:
        # Its parameters have dots in their names, as PyTorch's have.
        given: dict[str, Any] = {key.replace("/", "."): x for key, x in weights.items()}
        np.savez(Path(name, "in.npz"), **given)
        wanted = [(qp, how) for how in searched for qp in qps]
        settings = [f"{qp},{'searched' if how else 'given'}" for qp, how in wanted]
        command = [str(_PYTHON), "-W", "ignore", "-c", _SCRIPT, name, *settings]
        try:
            # It writes files of its own into the folder where it runs.
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=name)
        except subprocess.TimeoutExpired:
            raise ShrinkError(f"nncodec gave nothing within {_TIMEOUT_S} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise ShrinkError(f"nncodec fails: {lines[-1] if lines else done.returncode}")
        lines = done.stdout.splitlines()[-len(settings) :]
        for (qp, how), setting, line in zip(wanted, settings, lines, strict=True):
            _, size, seconds = line.split()
            with np.load(Path(name, f"{setting}.npz")) as file:
                decoded = {key: file[f"w{i}"].reshape(x.shape) for i, (key, x) in enumerate(weights.items())}
            yield Encoded(qp, how, int(size), decoded, float(seconds))
