"""prune: the smallest weights become 0 (unstructured magnitude pruning), stored with a mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shrink.model import DTYPES, Quantized
from shrink.steps import Step

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Prune:
    """Sets the share `sparsity` of each tensor to 0; with scope "global", of all the tensors that it is used on.

    For a global share someone must look at all tensors first, and sets `threshold`: weights below it become 0, and
    the first `at_threshold` of those that have exactly that magnitude.

    Error of a value: its own magnitude where it became 0, none elsewhere.
    """

    sparsity: float = 0.5
    scope: str = "tensor"
    threshold: float | None = field(default=None, metadata={"set_by": "the pipeline"})
    at_threshold: int = field(default=0, metadata={"set_by": "the pipeline"})

    stores = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float) or not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is a share from 0 to 1, not {self.sparsity!r}")
        if self.scope not in ("tensor", "global"):
            raise ValueError(f"scope is 'tensor' or 'global', not {self.scope!r}")

    def quantize(self, name: str, x: F32) -> Quantized:
        pruned = np.where(self._doomed(np.abs(x).reshape(-1)).reshape(x.shape), np.float32(0), x)
        return Quantized.of(name, DTYPES["F32"], x.shape, (Step("cast.1", {"from": "F32"}),), pruned.tobytes())

    def bound(self, x: F32, quantized: Quantized) -> float:
        magnitude = np.abs(x).reshape(-1)
        return float(magnitude[self._doomed(magnitude)].max(initial=0.0))

    def _doomed(self, magnitude: F32) -> NDArray[np.bool_]:
        count = round(self.sparsity * magnitude.size)
        if self.threshold is not None:
            limit, at_limit = self.threshold, self.at_threshold
        elif count:
            limit = float(np.partition(magnitude, count - 1)[count - 1])
            # Of equal magnitudes at the limit the first ones go, so that exactly the asked share does.
            at_limit = count - int(np.count_nonzero(magnitude < limit))
        else:
            return np.zeros(magnitude.size, bool)
        doomed: NDArray[np.bool_] = np.less(magnitude, limit)
        doomed[np.flatnonzero(magnitude == limit)[:at_limit]] = True
        return doomed


MODES = {"prune": Prune()}
