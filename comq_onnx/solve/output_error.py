"""What a quantized weight costs, measured on the moments alone and apart from how any solver sees it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from comq_onnx.solve.grid import Array, QuantizedWeight
from comq_onnx.solve.moments import Matrix, Moments
from comq_onnx.solve.parallel import each, parts


class Judge:
    """The output error of one layer's quantized weights, channel by channel.

    With D = W - Wq the error W x - Wq x^ = D x^ + W e has mean D E[x^] + W E[e], which a bias can take away, and
    variance D G D^T + 2 D E W^T + W S W^T (G, E, S centred): sums of small numbers, no difference of large ones.
    """

    def __init__(self, weight: Array, moments: Moments) -> None:
        """weight [groups, out, in]; moments: centred."""
        self._weight, self._mean = weight, moments.mean
        self._gram = moments.gram.astype(np.float32)
        self._cross: Array | None = None
        self._rest = np.zeros(weight.shape[:2])
        self._offset = np.zeros(weight.shape[:2])
        mean = moments.mean
        if moments.cross is not None and moments.residue is not None and moments.mean_error is not None:
            self._cross = _products(weight, moments.cross.swapaxes(1, 2).astype(np.float32))
            residue = moments.residue.astype(np.float32)
            self._rest = _by_parts(weight, lambda g, w, _: _dot(w @ residue[g], w))
            self._offset = np.einsum("gmn,gn->gm", weight, moments.mean_error)
            mean = mean + moments.mean_error
        # E (W x)^2 of each channel, x in the float model
        self.energy: Matrix = _by_parts(weight, self._variance) + np.einsum("gmn,gn->gm", weight, mean) ** 2

    def __call__(self, quantized: QuantizedWeight) -> tuple[Matrix, Matrix]:
        """The variance and the mean of the error: [groups, out] each."""
        offset = self._offset.copy()

        def variance(g: int, w: Array, p: slice) -> Matrix:
            d = w - quantized.part(g, p).dequantize()[0]
            offset[g, p] += d @ self._mean[g]
            return self._variance(g, d, p)

        return _by_parts(self._weight, variance), offset

    def _variance(self, g: int, difference: Array, p: slice) -> Matrix:
        variance = _dot(difference @ self._gram[g], difference) + self._rest[g, p]
        if self._cross is not None:
            variance += 2 * _dot(difference, self._cross[g, p])
        return np.asarray(np.maximum(variance, 0), np.float64)


def _dot(left: Array, right: Array) -> Matrix:
    return np.asarray(np.einsum("mn,mn->m", left, right), np.float64)


def _by_parts(weight: Array, function: Callable[[int, Array, slice], Matrix]) -> Matrix:
    """A number for each channel [groups, out]: function(group, weight of some channels, which) a part at a time."""
    found = np.empty(weight.shape[:2])

    def fill(task: tuple[int, slice]) -> None:
        g, p = task
        found[g, p] = function(g, weight[g, p], p)

    each(fill, [(g, p) for g in range(len(weight)) for p in parts(weight.shape[1])])
    return found


def _products(rows: Array, matrix: Array) -> Array:
    """rows [groups, out, in] times matrix [groups, in, in]."""
    found = np.empty_like(rows)

    def fill(task: tuple[int, slice]) -> None:
        g, p = task
        found[g, p] = rows[g, p] @ matrix[g]

    each(fill, [(g, p) for g in range(len(rows)) for p in parts(rows.shape[1])])
    return found
