"""Measure what a quantized weight costs, on the moments alone and apart from how any solver sees it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from comq_onnx.solve.grid import Array, QuantizedWeight
from comq_onnx.solve.moments import Matrix, Moments
from comq_onnx.solve.parallel import channel_slices, map_in_threads


class OutputError:
    """Measure the output error of a layer's quantized weights, channel by channel.

    With D = W - Wq the error W x - Wq x^ = D x^ + W e has mean D E[x^] + W E[e], which a bias can take away, and
    variance D G D^T + 2 D E W^T + W S W^T (G, E, S centred): sums of small numbers, no difference of large ones.

    energy: E (W x)^2 of each channel, x in the float model, [groups, out]
    """

    def __init__(self, weight: Array, centred: Moments) -> None:
        """Prepare what all quantized weights have in common.

        weight: the float weight, [groups, out, in]
        centred: the moments about the mean
        """
        self._weight, self._mean = weight, centred.mean
        self._gram = centred.gram.astype(np.float32)
        self._cross: Array | None = None
        self._rest = np.zeros(weight.shape[:2])
        self._offset = np.zeros(weight.shape[:2])
        mean = centred.mean
        if centred.cross is not None and centred.residue is not None and centred.mean_error is not None:
            self._cross = _multiply(weight, centred.cross.swapaxes(1, 2).astype(np.float32))
            residue = centred.residue.astype(np.float32)
            self._rest = _by_parts(weight, lambda g, w, _: _dot(w @ residue[g], w))
            self._offset = np.einsum("gmn,gn->gm", weight, centred.mean_error)
            mean = mean + centred.mean_error
        self.energy: Matrix = _by_parts(weight, self._variance) + np.einsum("gmn,gn->gm", weight, mean) ** 2

    def of(self, quantized: QuantizedWeight) -> tuple[Matrix, Matrix]:
        """Return the variance and the mean of the error of each channel: [groups, out] each."""
        offset = self._offset.copy()

        def variance(g: int, w: Array, channels: slice) -> Matrix:
            d = w - quantized.part(g, channels).dequantize()[0]
            offset[g, channels] += d @ self._mean[g]
            return self._variance(g, d, channels)

        return _by_parts(self._weight, variance), offset

    def _variance(self, g: int, difference: Array, channels: slice) -> Matrix:
        variance = _dot(difference @ self._gram[g], difference) + self._rest[g, channels]
        if self._cross is not None:
            variance += 2 * _dot(difference, self._cross[g, channels])
        return np.asarray(np.maximum(variance, 0), np.float64)


def _dot(left: Array, right: Array) -> Matrix:
    return np.asarray(np.einsum("mn,mn->m", left, right), np.float64)


def _by_parts(weight: Array, function: Callable[[int, Array, slice], Matrix]) -> Matrix:
    """Return a number for each channel [groups, out]: function(group, weight of some channels, which channels)."""
    found = np.empty(weight.shape[:2])

    def fill(task: tuple[int, slice]) -> None:
        g, channels = task
        found[g, channels] = function(g, weight[g, channels], channels)

    map_in_threads(fill, [(g, channels) for g in range(len(weight)) for channels in channel_slices(weight.shape[1])])
    return found


def _multiply(rows: Array, matrix: Array) -> Array:
    """Multiply rows [groups, out, in] by a matrix [groups, in, in]."""
    found = np.empty_like(rows)

    def fill(task: tuple[int, slice]) -> None:
        g, channels = task
        found[g, channels] = rows[g, channels] @ matrix[g]

    map_in_threads(fill, [(g, channels) for g in range(len(rows)) for channels in channel_slices(rows.shape[1])])
    return found
