"""Measure what a quantized weight costs, on the moments alone and apart from how any solver sees it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from comq_onnx.solve.grid import Array, QuantizedWeight
from comq_onnx.solve.moments import Matrix, Moments
from comq_onnx.solve.parallel import channel_slices, group_slices, map_in_threads


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
            cross, residue = centred.cross.swapaxes(1, 2).astype(np.float32), centred.residue.astype(np.float32)
            self._cross = np.empty_like(weight)

            def prepare(g: slice, channels: slice) -> None:
                assert self._cross is not None
                w = weight[g, channels]
                self._cross[g, channels] = w @ cross[g]
                self._rest[g, channels] = _dot(w @ residue[g], w)

            _by_parts(weight, prepare)
            self._offset = np.einsum("gmn,gn->gm", weight, centred.mean_error)
            mean = mean + centred.mean_error
        self.energy: Matrix = self._variance(lambda g, m: weight[g, m]) + np.einsum("gmn,gn->gm", weight, mean) ** 2

    def of(self, quantized: QuantizedWeight) -> tuple[Matrix, Matrix]:
        """Return the variance and the mean of the error of each channel: [groups, out] each."""
        offset = self._offset.copy()

        def difference(g: slice, channels: slice) -> Array:
            d = self._weight[g, channels] - quantized.part(g, channels).dequantize()
            offset[g, channels] += np.einsum("gmn,gn->gm", d, self._mean[g])
            return d

        return self._variance(difference), offset

    def _variance(self, difference: Callable[[slice, slice], Array]) -> Matrix:
        """Return the variance of the error of each channel; difference: that of the weights in a part."""
        found = np.empty(self._weight.shape[:2])

        def fill(g: slice, channels: slice) -> None:
            d = difference(g, channels)
            variance = _dot(d @ self._gram[g], d) + self._rest[g, channels]
            if self._cross is not None:
                variance += 2 * _dot(d, self._cross[g, channels])
            found[g, channels] = np.maximum(variance, 0)

        _by_parts(self._weight, fill)
        return found


def _dot(left: Array, right: Array) -> Matrix:
    return np.asarray(np.einsum("gmn,gmn->gm", left, right), np.float64)


def _by_parts(weight: Array, function: Callable[[slice, slice], None]) -> None:
    """Call function(which groups, which channels) for all parts of a weight."""
    map_in_threads(
        lambda task: function(*task),
        [(g, channels) for g in group_slices(*weight.shape[:2]) for channels in channel_slices(weight.shape[1])],
    )
