"""Second moments of what goes into a layer, gathered sample by sample in bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shrink.calibrate._positions import Indices, Rows
from shrink.calibrate.layers import Layer, Use, naming
from shrink.errors import BadInput

__all__ = ["Covariance"]

Array = NDArray[Any]
F32 = NDArray[np.float32]

# Rows are gathered until they fill this much, and are then multiplied at once: one large product is quick.
_BUFFER_BYTES = 32 << 20
_BUFFER_ROWS = 1 << 16
# Products are made in squares of at most this many columns, of which only the upper ones are needed.
_BLOCK = 2560
# Rows made at once, in values.
_CHUNK = 1 << 20
_FLOAT64_INPUTS = 4096
_LEAST_POSITIONS, _POSITIONS_PER_INPUT = 4096, 8


class Covariance:
    """The mean of x xᵀ over all positions, where x is the row of inputs at a position; the mean is not taken off.

    Of a sample with more than `positions_at_most` positions (8 per input and at least 4096, where it is None) only
    that many are looked at, spread evenly over it and chosen by the seed, and count as much as all of them. A sample
    is one item of a convolution's batch, and otherwise what one call of `add` gives. Sums are float64, or float32
    where there are more than 4096 inputs; besides them about 100 MB are used.

    Where the layer is `diagonal`, only the diagonal is gathered, and `matrix` is (groups, inputs).

    With `weights` (groups, outputs, inputs), `add` and `collect` want reference values too: what would go in if
    nothing before the layer had changed. Then `cross` is the mean of (weights · reference) xᵀ, by which one finds the
    weights that give the reference's outputs for these inputs.
    """

    def __init__(
        self, layer: Layer, *, positions_at_most: int | None = None, seed: int = 0, weights: F32 | None = None
    ):
        self.layer = layer
        self.count = 0
        """Positions so far."""
        self._limit = positions_at_most or max(_LEAST_POSITIONS, _POSITIONS_PER_INPUT * layer.inputs)
        self._random = np.random.default_rng([seed, layer.groups, layer.inputs])
        kind = np.float64 if layer.inputs <= _FLOAT64_INPUTS or layer.diagonal else np.float32
        self._sum: Array = np.zeros((layer.groups, *[layer.inputs] * (1 if layer.diagonal else 2)), kind)
        self._total = np.zeros((layer.groups, layer.inputs))
        # The sum becomes the mean in place, and the sum again when more is added: there is no room for both.
        self._is_mean = False
        self._counted = 0
        per_row = 4 * layer.groups * layer.inputs
        self._rows_at_most = max(1, min(_BUFFER_ROWS, _BUFFER_BYTES // per_row))
        width = -(-layer.inputs // -(-layer.inputs // _BLOCK))
        spans = [slice(start, start + width) for start in range(0, layer.inputs, width)]
        self._squares = list(itertools.combinations_with_replacement(spans, 2))
        self._buffer: F32 | None = None
        self._filled = 0
        self._weights = None if weights is None or layer.diagonal else weights
        outputs = 0 if self._weights is None else layer.outputs
        self._cross: Array = np.zeros((layer.groups, outputs, layer.inputs), kind if outputs else np.float32)
        self._target_total = np.zeros((layer.groups, outputs))
        self._targets: F32 | None = None

    def add(
        self,
        x: Array,
        use: Use | None = None,
        initial: Array | None = None,
        reference: tuple[Array, Array | None] | None = None,
    ) -> None:
        """Take in the value at `use.input` (the layer's first use, if none is named), batches as they come.

        `initial` is the value at `use.initial`, where that names one: the initial states of a recurrent layer.
        `reference` are the two without changes.

        Raises:
            BadInput: it does not have the shape that the layer needs, or holds NaN or infinity.
        """
        use = use or self.layer.uses[0]
        with naming(self.layer.tensor):
            if isinstance(use.reads, Indices):
                self._count(use.reads.numbers(x, self.layer.inputs))
            else:
                groups, inputs = self.layer.groups, self.layer.inputs
                rows = use.reads.rows(x, groups, inputs, initial)
                if self._weights is None:
                    self._take(rows, None)
                    return
                if reference is None:
                    raise ValueError("with weights, a reference is needed")
                before = use.reads.rows(reference[0], groups, inputs, reference[1])
                if (before.count, before.samples) != (rows.count, rows.samples):
                    raise BadInput("its inputs have another shape than without changes")
                self._take(rows, before)

    def collect(self, values: Mapping[str, Array], reference: Mapping[str, Array] | None = None) -> None:
        """`add` for all uses of the layer, from values by name. Raises BadInput, also where one is missing."""
        for use in self.layer.uses:
            for name in use.needs:
                if name not in values or (reference is not None and name not in reference):
                    raise BadInput(f"the value {name!r} that goes into it is not there", tensor=self.layer.tensor)
            given = None
            if reference is not None:
                given = (reference[use.input], reference[use.initial] if use.initial else None)
            self.add(values[use.input], use, values[use.initial] if use.initial else None, given)

    @property
    def matrix(self) -> Array:
        """(groups, inputs, inputs), symmetric, or its diagonal (groups, inputs) where the layer is `diagonal`.

        Read-only, and a view that changes when more is added. Zeros where nothing was.

        Raises:
            BadInput: values are so large that their squares are not finite.
        """
        self._flush()
        if not self._is_mean and self.count:
            if not self.layer.diagonal:
                for rows, columns in self._squares:
                    if rows != columns:
                        self._sum[:, columns, rows] = self._sum[:, rows, columns].swapaxes(1, 2)
            self._counted = self.count
            self._sum /= self._counted
            self._is_mean = True
        diagonal = self._sum if self.layer.diagonal else np.diagonal(self._sum, axis1=1, axis2=2)
        if not np.isfinite(diagonal).all():
            raise BadInput("the values that go into it are too large to square", tensor=self.layer.tensor)
        view: Array = self._sum.view()
        view.flags.writeable = False
        return view

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of the inputs, (groups, inputs). Zeros where nothing was added."""
        return self._total / max(1, self.count)

    @property
    def cross(self) -> Array:
        """The mean of (weights · reference) xᵀ, (groups, outputs, inputs), without bias.

        Raises:
            BadInput: values are so large that their products are not finite.
        """
        self._flush()
        if not np.isfinite(self._cross).all():
            raise BadInput("the values that go into it are too large to multiply", tensor=self.layer.tensor)
        return self._cross / max(1, self.count)

    def forget(self) -> None:
        """Let go of the sums, which may be large; the means and the count stay."""
        self._flush()
        self._sum = self._sum[:, :0]
        self._buffer = self._targets = None

    @property
    def target_mean(self) -> NDArray[np.float64]:
        """The mean of weights · reference, (groups, outputs)."""
        return self._target_total / max(1, self.count)

    def _count(self, numbers: NDArray[np.int64]) -> None:
        found = np.bincount(numbers, minlength=self.layer.inputs)
        self._back_to_sum()
        self._sum += found
        self._total += found
        self.count += numbers.size

    def _take(self, rows: Rows, before: Rows | None) -> None:
        limit = self._limit * rows.samples
        positions = np.arange(min(rows.count, limit))
        weight = 1.0
        if rows.count > limit:
            # One from each stretch, anywhere in it: even steps could fall on the same columns of a picture.
            weight = rows.count / limit
            positions = ((positions + self._random.random(limit)) * weight).astype(np.int64)
        root = np.float32(math.sqrt(weight))
        at_once = max(1, _CHUNK // (self.layer.groups * self.layer.inputs))
        done = 0
        while done < len(positions):
            out, targets = self._room(min(at_once, len(positions) - done))
            chosen = positions[done : done + out.shape[1]]
            if before is not None and self._weights is not None:
                before.write(chosen, out)
                with np.errstate(all="ignore"):
                    np.matmul(out, self._weights.swapaxes(1, 2), out=targets)
                    self._target_total += targets.sum(axis=1, dtype=np.float64) * weight
            rows.write(chosen, out)
            with np.errstate(invalid="ignore"):
                self._total += out.sum(axis=1, dtype=np.float64) * weight
            if root != 1:
                out *= root
                targets *= root
            done += out.shape[1]
        self.count += rows.count
        if not (np.isfinite(self._total).all() and np.isfinite(self._target_total).all()):
            raise BadInput("a value that goes into it is not finite")

    def _room(self, rows: int) -> tuple[F32, F32]:
        """Parts of the buffers that are free, of at most so many rows."""
        if self._filled == self._rows_at_most:
            self._flush()
        if self._buffer is None:
            self._buffer = np.empty((self.layer.groups, self._rows_at_most, self.layer.inputs), np.float32)
        if self._targets is None:
            self._targets = np.empty((self.layer.groups, self._rows_at_most, self._cross.shape[1]), np.float32)
        start = self._filled
        self._filled = min(start + rows, self._rows_at_most)
        return self._buffer[:, start : self._filled], self._targets[:, start : self._filled]

    def _flush(self) -> None:
        if self._buffer is None or not self._filled:
            return
        self._back_to_sum()
        rows = self._buffer[:, : self._filled]
        targets = self._targets[:, : self._filled] if self._targets is not None else None
        self._filled = 0
        # What is not finite is an error of its own.
        with np.errstate(all="ignore"):
            if self.layer.diagonal:
                self._sum += np.einsum("gpi,gpi->gi", rows, rows)
                return
            if targets is not None and targets.shape[2]:
                product = targets.swapaxes(1, 2) @ rows
                if not np.isfinite(product).all():
                    # Outputs may be large where inputs, squared, are not too large.
                    product = targets.swapaxes(1, 2).astype(np.float64) @ rows
                self._cross += product
            for i, j in self._squares:
                # With itself it is a symmetric product, at half the price.
                self._sum[:, i, j] += rows[:, :, i].swapaxes(1, 2) @ rows[:, :, j]

    def _back_to_sum(self) -> None:
        if self._is_mean:
            self._sum *= self._counted
            self._is_mean = False
