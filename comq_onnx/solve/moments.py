"""Gather the second moments of a layer's input: all that a solver knows of the samples.

`MomentSums` adds up input rows, numpy arrays or torch tensors on any device, and gives the `Moments`. Products are
float32 (never TF32), sums of them float64, on the device that the rows are on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx import arrays
from comq_onnx.solve.grams import gram, total
from comq_onnx.solve.patches import patch_gram, patch_sum

Matrix = npt.NDArray[np.float64]

# rows that are added at once take at most so many bytes
CHUNK_BYTES = 1 << 26
# numbers of a matrix that are centred at once
CENTRED_NUMBERS = 1 << 18
# the residue only measures a solution: of the rows that are added at once so many are enough for its shape
RESIDUE_ROWS = 512
# the positions are dealt to two halves for cross-validation in so many stretches
STRETCHES = 16


@dataclass(frozen=True)
class Moments:
    """Hold the second moments of a layer's input: x^ in the model quantized so far, x in the float model, e = x - x^.

    All are numpy arrays, or torch tensors on the device where the sums were made: then layers are solved there.

    gram: E[x^ x^T], [groups, in, in]
    mean: E[x^], [groups, in]
    count: how many input positions were seen
    cross: E[x^ e^T], [groups, in, in]; None where x^ is x
    residue: E[e e^T], its shape from some of the positions, [groups, in, in]; None where x^ is x
    mean_error: E[e], [groups, in]; None where x^ is x
    half: the same moments of one half of the samples, for cross-validation, which needs no residue; None without halves
    """

    gram: Matrix
    mean: Matrix
    count: int
    cross: Matrix | None = None
    residue: Matrix | None = None
    mean_error: Matrix | None = None
    half: Moments | None = None

    def centred(self) -> Moments:
        """Return the same moments about the mean; those of `half` too, about the mean of all."""
        return self._about(self.mean, self.mean_error)

    def _about(self, mean: Matrix, mean_error: Matrix | None) -> Moments:
        gram = _centre(self.gram, self.mean, self.mean, mean, mean)
        half = None if self.half is None else self.half._about(mean, mean_error)
        if self.cross is None or self.mean_error is None or mean_error is None:
            return Moments(gram, self.mean, self.count, half=half)
        own = self.mean_error
        cross = _centre(self.cross, self.mean, own, mean, mean_error)
        residue = None if self.residue is None else _centre(self.residue, own, own, mean_error, mean_error)
        return Moments(gram, self.mean, self.count, cross, residue, own, half)

    def group(self, g: int) -> Moments:
        """Return the moments of one group, as a stack of one."""
        return self.groups(slice(g, g + 1))

    def groups(self, which: slice | npt.NDArray[np.intp]) -> Moments:
        """Return the moments of the groups `which`."""

        def take(matrix: Matrix | None) -> Matrix | None:
            return None if matrix is None else arrays.at(matrix, which)

        half = None if self.half is None else self.half.groups(which)
        return Moments(
            arrays.at(self.gram, which), arrays.at(self.mean, which), self.count, take(self.cross), take(self.residue),
            take(self.mean_error), half,
        )  # fmt: skip

    def take(self, inputs: npt.NDArray[np.intp]) -> Moments:
        """Return the moments of the inputs at the indices `inputs`, in their order."""

        def of_matrix(matrix: Matrix | None) -> Matrix | None:
            return None if matrix is None else arrays.at(matrix, (slice(None), inputs[:, None], inputs))

        def of_vector(vector: Matrix | None) -> Matrix | None:
            return None if vector is None else arrays.at(vector, (slice(None), inputs))

        half = None if self.half is None else self.half.take(inputs)
        gram, mean = of_matrix(self.gram), of_vector(self.mean)
        assert gram is not None
        assert mean is not None
        cross, residue, mean_error = of_matrix(self.cross), of_matrix(self.residue), of_vector(self.mean_error)
        return Moments(gram, mean, self.count, cross, residue, mean_error, half)

    def on_host(self) -> Moments:
        """Return the same moments as numpy arrays."""
        names = ("gram", "mean", "cross", "residue", "mean_error")
        half = None if self.half is None else self.half.on_host()
        return replace(self, half=half, **{name: arrays.on_host(getattr(self, name)) for name in names})

    @property
    def has_folds(self) -> bool:
        """Tell whether there are two halves, each with samples."""
        return self.half is not None and 0 < self.half.count < self.count

    def folds(self) -> tuple[Moments, Moments] | None:
        """Return the moments of the two halves of the samples; None where they were not told apart."""
        first = self.half
        if first is None or not self.has_folds:
            return None
        rest = self.count - first.count

        def without_first(whole: Matrix, half: Matrix) -> Matrix:
            return (whole * self.count - half * first.count) / rest

        def if_known(whole: Matrix | None, half: Matrix | None) -> Matrix | None:
            return None if whole is None or half is None else without_first(whole, half)

        second = Moments(
            without_first(self.gram, first.gram), without_first(self.mean, first.mean), rest,
            if_known(self.cross, first.cross), None, if_known(self.mean_error, first.mean_error),
        )  # fmt: skip
        return replace(first, residue=None), second


def pooled(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all positions of several inputs, as of one weight that multiplies all of them."""
    total = sum(part.count for part in parts)

    def mean(name: str) -> Any:
        shares = [(getattr(part, name), part.count / total) for part in parts]
        # where x^ is x, there is no error
        known = [matrix * share for matrix, share in shares if matrix is not None]
        return sum(known[1:], known[0]) if known else None

    halves = [part.half for part in parts if part.half is not None]
    half = pooled(halves) if len(halves) == len(parts) else None
    names = ("cross", "residue", "mean_error")
    return Moments(mean("gram"), mean("mean"), total, half=half, **{name: mean(name) for name in names})


def _centre(moment: Matrix, left: Matrix, right: Matrix, a: Matrix, b: Matrix) -> Matrix:
    """Compute E[(l - a)(r - b)^T] from E[l r^T], left E[l] and right E[r]."""
    if arrays.is_tensor(moment):
        return moment - left[:, :, None] * b[:, None, :] - a[:, :, None] * (right - b)[:, None, :]
    # a few rows at once, so that no second matrix of this size is made
    centred = moment.copy()
    step = max(1, CENTRED_NUMBERS // (len(moment) * moment.shape[2]))
    for start in range(0, moment.shape[1], step):
        rows = slice(start, start + step)
        centred[:, rows] -= left[:, rows, None] * b[:, None] + a[:, rows, None] * (right - b)[:, None]
    return centred


# Sums -----------------------------------------------------------------------------------------------------------------


class MomentSums:
    """Add up a layer's input rows: products in float32, sums in float64, two halves of the samples apart."""

    def __init__(self) -> None:
        self._halves = (_Sums(), _Sums())

    @property
    def count(self) -> int:
        """Return how many positions were added."""
        return self._halves[0].count + self._halves[1].count

    def add(self, rows: Any, rows_hat: Any, half: int = 0) -> None:
        """Add input rows to one half.

        rows: [groups, positions, in] of the float model
        rows_hat: the same of the model quantized so far; None where they are equal
        half: 0 or 1
        """
        hat = rows if rows_hat is None else rows_hat
        error = None if rows_hat is None else rows - rows_hat
        some = None if error is None else _some(error, 1, error.shape[1])
        self._halves[half].add(hat, error, some, gram, total, rows.shape[1])

    def add_patches(self, x: Any, x_hat: Any, kernel: tuple[int, ...], half: int = 0) -> None:
        """Add the rows that are the patches of padded inputs [n, channels, height, width], without building them.

        x: of the float model
        x_hat: of the model quantized so far; None where they are equal
        kernel: height and width of a patch
        half: 0 or 1
        """
        count = len(x) * (x.shape[2] - kernel[0] + 1) * (x.shape[3] - kernel[1] + 1)
        hat = x if x_hat is None else x_hat
        error = None if x_hat is None else x - x_hat
        some = None if error is None else _some(error, 0, count)
        self._halves[half].add(
            hat, error, some, lambda a, b: patch_gram(a, b, kernel)[None], lambda a: patch_sum(a, kernel)[None], count
        )

    def plus(self, other: MomentSums) -> MomentSums:
        """Add the sums over other rows."""
        for mine, its in zip(self._halves, other._halves, strict=True):
            mine.plus(its)
        return self

    def __sizeof__(self) -> int:
        """Return about how many bytes they take."""
        return sum(half.bytes for half in self._halves)

    def moments(self) -> Moments:
        """Return the moments of all rows, with those of the first half beside them where both halves have rows."""
        first, second = self._halves
        if first.count == 0 or second.count == 0:
            return (first if second.count == 0 else second).means()
        return replace((first + second).means(), half=replace(first.means(), residue=None))


class _Sums:
    """Hold the sums over rows of x^ x^T, x^, x^ e^T, e e^T and e; the last three only where x^ is not x."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Any] = [None] * 5

    def add(
        self,
        hat: Any,
        error: Any,
        some_error: Any,
        gram: Callable[[Any, Any], Any],
        total: Callable[[Any], Any],
        count: int,
    ) -> None:
        """Add `count` rows, given in a form of which `gram` makes products and `total` sums.

        some_error: the rows of `error` that give the residue its shape
        """
        self._add_to(0, gram(hat, hat))
        self._add_to(1, total(hat))
        if error is not None:
            self._add_to(2, gram(hat, error))
            self._add_to(3, _scaled(gram, error, some_error))
            self._add_to(4, total(error))
        self.count += count

    def _add_to(self, k: int, part: Any) -> None:
        if self._sums[k] is None:
            self._sums[k] = arrays.double(part)
        else:
            self._sums[k] += part

    def plus(self, other: _Sums) -> None:
        """Add the sums over other rows, which stay as they are."""
        for k, part in enumerate(other._sums):
            if part is not None:
                # what is empty must not get the other's own matrix: sums change in place
                self._add_to(k, arrays.copied(part) if self._sums[k] is None else part)
        self.count += other.count

    @property
    def bytes(self) -> int:
        """Return how many bytes the sums take."""
        return sum(int(s.nbytes) for s in self._sums if s is not None)

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


def _scaled(gram: Callable[[Any, Any], Any], error: Any, some_error: Any) -> Any:
    """Return the sum of e e^T of which some rows tell the shape, and all rows the size.

    Few rows can hold most of the power: without it an error would seem certain that is chance.
    """
    power, some_power = arrays.power(error), arrays.power(some_error)
    if not some_power > 0:
        return gram(error, error)
    return gram(some_error, some_error) * (power / some_power)


def _some(rows: Any, axis: int, count: int) -> Any:
    """Return some of the rows, evenly spread along an axis, so that about RESIDUE_ROWS of `count` are left."""
    step = min(max(1, count // RESIDUE_ROWS), rows.shape[axis])
    return arrays.copied(rows[:, ::step] if axis else rows[::step])


# Positions ------------------------------------------------------------------------------------------------------------


def halves(first: int, count: int, total: int) -> npt.NDArray[np.intp]:
    """Return the half, 0 or 1, of each of `count` positions from `first` on, of `total`: [count].

    Stretches of positions go to the halves in turn, so that neighbours stay together and each half has samples from
    everywhere.
    """
    return np.arange(first, first + count) * STRETCHES // total % 2


def chunks(which: npt.NDArray[np.intp], inputs: int, groups: int) -> Iterator[tuple[npt.NDArray[np.intp], int]]:
    """Yield consecutive positions of one half, and that half; the rows of a chunk take at most CHUNK_BYTES.

    which: the half of each position, as `halves` gives them
    inputs, groups: a row has so many float32 numbers in each of so many groups
    """
    step = max(1, CHUNK_BYTES // (4 * inputs * groups))
    edges = [0, *(np.flatnonzero(np.diff(which)) + 1), len(which)]
    for begin, end in itertools.pairwise(edges):
        for start in range(begin, end, step):
            yield np.arange(start, min(start + step, end)), int(which[begin])
