"""The second moments of a layer's input: all that a solver knows of the samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from comq_onnx import arrays

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's input: x^ in the model quantized so far, x in the float model, e = x - x^.

    gram E[x^ x^T], cross E[x^ e^T], residue E[e e^T]: [groups, in, in]; mean E[x^], mean_error E[e]: [groups, in];
    count: how many input positions were seen. `cross` and `residue` are None where x^ is x. half: the same moments of
    some half of the samples, for cross-validation (its residue is not needed). Numpy arrays, or torch tensors on the
    device where the sums were made: then layers are solved there.
    """

    gram: Matrix
    mean: Matrix
    count: int
    cross: Matrix | None = None
    residue: Matrix | None = None
    mean_error: Matrix | None = None
    half: Moments | None = None

    def centred(self) -> Moments:
        """The same moments about the mean (those of `half` too: about the mean of all)."""
        return self._about(self.mean, self.mean_error)

    def _about(self, mean: Matrix, mean_error: Matrix | None) -> Moments:
        gram = _centred(self.gram, self.mean, self.mean, mean, mean)
        half = None if self.half is None else self.half._about(mean, mean_error)
        if self.cross is None or self.mean_error is None or mean_error is None:
            return Moments(gram, self.mean, self.count, half=half)
        own = self.mean_error
        cross = _centred(self.cross, self.mean, own, mean, mean_error)
        residue = None if self.residue is None else _centred(self.residue, own, own, mean_error, mean_error)
        return Moments(gram, self.mean, self.count, cross, residue, own, half)

    def group(self, g: int) -> Moments:
        """The moments of one group, as a stack of one."""
        return self.groups(slice(g, g + 1))

    def groups(self, which: slice | npt.NDArray[np.intp]) -> Moments:
        """The moments of some of the groups."""

        def some(matrix: Matrix | None) -> Matrix | None:
            return None if matrix is None else arrays.at(matrix, which)

        half = None if self.half is None else self.half.groups(which)
        return Moments(
            arrays.at(self.gram, which), arrays.at(self.mean, which), self.count, some(self.cross), some(self.residue),
            some(self.mean_error), half,
        )  # fmt: skip

    def take(self, inputs: npt.NDArray[np.intp]) -> Moments:
        """The moments of some of the inputs."""

        def some(matrix: Matrix | None) -> Matrix | None:
            return None if matrix is None else arrays.at(matrix, (slice(None), inputs[:, None], inputs))

        def few(vector: Matrix | None) -> Matrix | None:
            return None if vector is None else arrays.at(vector, (slice(None), inputs))

        half = None if self.half is None else self.half.take(inputs)
        gram, mean = some(self.gram), few(self.mean)
        assert gram is not None
        assert mean is not None
        return Moments(gram, mean, self.count, some(self.cross), some(self.residue), few(self.mean_error), half)

    def on_host(self) -> Moments:
        """The same moments as numpy arrays."""
        names = ("gram", "mean", "cross", "residue", "mean_error")
        half = None if self.half is None else self.half.on_host()
        return replace(self, half=half, **{name: arrays.on_host(getattr(self, name)) for name in names})

    @property
    def has_folds(self) -> bool:
        """Whether there are two halves."""
        return self.half is not None and 0 < self.half.count < self.count

    def folds(self) -> tuple[Moments, Moments] | None:
        """The moments of the two halves of the samples; None where they were not told apart."""
        first = self.half
        if first is None or not self.has_folds:
            return None
        rest = self.count - first.count

        def other_half(whole: Matrix, half: Matrix) -> Matrix:
            return (whole * self.count - half * first.count) / rest

        def other(whole: Matrix | None, half: Matrix | None) -> Matrix | None:
            return None if whole is None or half is None else other_half(whole, half)

        second = Moments(
            other_half(self.gram, first.gram), other_half(self.mean, first.mean), rest, other(self.cross, first.cross),
            None, other(self.mean_error, first.mean_error),
        )  # fmt: skip
        return replace(first, residue=None), second


def _centred(moment: Matrix, left: Matrix, right: Matrix, a: Matrix, b: Matrix) -> Matrix:
    """E[(l - a)(r - b)^T] from E[l r^T], left E[l] and right E[r]; row by row, so that there is one such matrix."""
    if arrays.is_tensor(moment):
        return moment - left[:, :, None] * b[:, None, :] - a[:, :, None] * (right - b)[:, None, :]
    centred = moment.copy()
    for g, i in np.ndindex(moment.shape[:2]):
        centred[g, i] -= left[g, i] * b[g] + a[g, i] * (right[g] - b[g])
    return centred
