"""Running sums of a layer's input rows, numpy arrays or torch tensors on any device: all that the walk keeps of the
samples.

Products are float32 (never TF32), sums of them float64, on the device that the rows are on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx import arrays
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.patches import patch_gram, patch_sum

# rows that are added at once take at most so many bytes
CHUNK_BYTES = 1 << 28
# the positions are dealt to two halves for cross-validation in so many stretches
STRETCHES = 16


def halves(first: int, count: int, total: int) -> npt.NDArray[np.intp]:
    """Which half each of `count` positions from `first` on belongs to, of `total`: stretches of them in turn, so that
    neighbours are together and either half sees samples from everywhere."""
    return np.arange(first, first + count) * STRETCHES // total % 2


def parts(which: npt.NDArray[np.intp], inputs: int, groups: int) -> Iterator[tuple[npt.NDArray[np.intp], int]]:
    """Consecutive positions of one half, in parts whose rows take at most CHUNK_BYTES, with the half."""
    step = max(1, CHUNK_BYTES // (4 * inputs * groups))
    edges = [0, *(np.flatnonzero(np.diff(which)) + 1), len(which)]
    for begin, end in itertools.pairwise(edges):
        for start in range(begin, end, step):
            yield np.arange(start, min(start + step, end)), int(which[begin])


class MomentSums:
    """Running sums of a layer's input rows: products in float32, sums in float64; two halves of the samples apart."""

    def __init__(self) -> None:
        self._halves = (_Sums(), _Sums())

    @property
    def count(self) -> int:
        """How many positions there were."""
        return self._halves[0].count + self._halves[1].count

    def add(self, rows: Any, rows_hat: Any, half: int = 0) -> None:
        """Add rows [groups, positions, in] of the float model and of the quantized one (None: the same)."""
        hat = rows if rows_hat is None else rows_hat
        error = None if rows_hat is None else rows - rows_hat
        self._halves[half].add(hat, error, _gram, _sum, rows.shape[1])

    def add_patches(self, x: Any, x_hat: Any, kernel: tuple[int, ...], half: int = 0) -> None:
        """Add the rows that are the patches of padded inputs [n, channels, height, width], without building them."""
        hat = x if x_hat is None else x_hat
        error = None if x_hat is None else x - x_hat
        count = len(x) * (x.shape[2] - kernel[0] + 1) * (x.shape[3] - kernel[1] + 1)
        self._halves[half].add(
            hat, error, lambda a, b: patch_gram(a, b, kernel)[None], lambda a: patch_sum(a, kernel)[None], count
        )

    def statistics(self) -> Moments:
        """The moments of all rows, with those of the first half beside them where both halves have rows."""
        first, second = self._halves
        if first.count == 0 or second.count == 0:
            return (first if second.count == 0 else second).means()
        return replace((first + second).means(), half=replace(first.means(), residue=None))


class _Sums:
    """Sums over rows: x^ x^T, x^, x^ e^T, e e^T, e; the last three only where x^ is not x."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Any] = [None] * 5

    def add(
        self,
        hat: Any,
        error: Any,
        gram: Callable[[Any, Any], Any],
        total: Callable[[Any], Any],
        count: int,
    ) -> None:
        """Add `count` rows, given in a form of which `gram` makes products and `total` sums."""
        self._put(0, gram(hat, hat))
        self._put(1, total(hat))
        if error is not None:
            self._put(2, gram(hat, error))
            self._put(3, gram(error, error))
            self._put(4, total(error))
        self.count += count

    def _put(self, k: int, part: Any) -> None:
        total = self._sums[k]
        if total is None:
            self._sums[k] = arrays.double(part)
        else:
            total += part

    def __add__(self, other: _Sums) -> _Sums:
        both = _Sums()
        both.count = self.count + other.count
        both._sums = [
            a if b is None else b if a is None else a + b for a, b in zip(self._sums, other._sums, strict=True)
        ]
        return both

    def means(self) -> Moments:
        gram, mean, cross, residue, mean_error = (None if s is None else s / self.count for s in self._sums)
        assert gram is not None
        assert mean is not None
        return Moments(gram, mean, self.count, cross, residue, mean_error)


def _gram(a: Any, b: Any) -> Any:
    return arrays.single(a.swapaxes(1, 2) @ b)


def _sum(rows: Any) -> Any:
    return arrays.total(rows, axis=1)
