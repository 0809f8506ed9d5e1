"""Prepare what COMQ minimizes for one matrix for the closed forms: visiting order, ridge, triangular factor.

With D = W - Wq, x^ the input in the model quantized so far and e = x - x^, the target is half the float model's output
and half W x^, so the objective of a channel is, up to a constant,

    D H D^T + 2 D B^T,    H = G + rho mean(diag G) I,    B = W E^T / 2,    G = E[x^ x^T],  E = E[x^ e^T]

and V = D H + B is minus half its gradient. For rounding one input after the other H = M^T M with M lower triangular:
the objective is || M (w* - wq) ||^2 plus a constant, where M w* = M w + M^-T b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg import lapack

from comq_onnx.solve.grid import Array, Grid
from comq_onnx.solve.moments import Moments

# inputs that are rounded before the others see them in a matrix product
BLOCK = 128
# the ridge rho where there are no two halves of the samples to choose it with
RIDGE = 0.1
# how much of the difference to the float model's output a layer is to make up for
MISMATCH = 0.5


@dataclass(frozen=True)
class Problem:
    """Describe one group's problem; inputs in visiting order, from the one with the largest G_ii on.

    order: the inputs in visiting order, [in]
    h: H, [in, in]
    unit: M over its diagonal, [in, in], with ones on the diagonal; what is above it must not be read
    root: the diagonal of M, [in]
    mismatch: E / 2, [in, in]; None where x^ is x
    block: the block of the scale of each input, [in]
    grid: the grid of the weight
    """

    order: npt.NDArray[np.intp]
    h: Array
    unit: Array
    root: Array
    mismatch: Array | None
    block: npt.NDArray[np.intp]
    grid: Grid

    @property
    def bounds(self) -> tuple[np.float32, np.float32]:
        """Return the lowest and the highest code in the type that kernels take."""
        return np.float32(self.grid.qmin), np.float32(self.grid.qmax)

    def on(self, grid: Grid) -> Problem:
        """Return the same problem for codes of another grid."""
        return replace(self, block=grid.block_of(len(self.order))[self.order], grid=grid)


@dataclass(frozen=True)
class Arranged:
    """Hold a group's moments in visiting order, in float32.

    order: the inputs in visiting order, [in]; some of the layer's, or all
    gram: G, [in, in]
    mismatch: E / 2, [in, in]; None where x^ is x
    noise: what centring leaves of constant inputs in the Gram
    inputs: how many inputs the layer has
    """

    order: npt.NDArray[np.intp]
    gram: Array
    mismatch: Array | None
    noise: float
    inputs: int


def visiting_order(gram: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Return the inputs in decreasing order of their power G_ii; gram [in, in]."""
    return np.argsort(-np.diag(gram), kind="stable")


def arrange(moments: Moments, order: npt.NDArray[np.intp] | None = None) -> Arranged:
    """Put the moments of one group (a stack of one) in `order`; None for visiting_order."""
    if order is None:
        order = visiting_order(moments.gram[0])
    mismatch = None
    if moments.cross is not None:
        mismatch = np.float32(MISMATCH) * _ordered(moments.cross[0], order)
    noise = float(noise_of(moments.mean)[0])
    return Arranged(order, _ordered(moments.gram[0], order), mismatch, noise, len(moments.gram[0]))


def noise_of(mean: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what centring leaves of constant inputs in the Gram of each group; mean: of the inputs, [groups, in]."""
    return np.asarray(1e-6 * (mean**2).sum(axis=1))


def _ordered(matrix: npt.NDArray[np.float64], order: npt.NDArray[np.intp]) -> Array:
    return np.asarray(matrix.astype(np.float32)[np.ix_(order, order)])


def pose(arranged: Arranged, grid: Grid, ridge: float = RIDGE) -> Problem:
    """Make the problem of a group: H is its Gram with a ridge, and M the factor of H.

    The ridge is `ridge` times the mean of the Gram's diagonal, at least the noise, and larger where there is no factor.
    Raises numpy.linalg.LinAlgError where `gram` is no Gram matrix.
    """
    h = arranged.gram.copy()
    diagonal = np.diag(h).copy()
    added = max(ridge * float(diagonal.mean(dtype=np.float64)), arranged.noise) or 1.0
    most = max(float(diagonal.sum(dtype=np.float64)), added)
    while True:
        np.fill_diagonal(h, diagonal + np.float32(added))
        try:
            unit, root = factor(h)
            break
        except scipy.linalg.LinAlgError:
            # moments that are off by more than the ridge: sums of huge and tiny inputs
            if not added <= most:
                raise
            added *= 10
    return Problem(
        arranged.order, h, unit, root, arranged.mismatch, grid.block_of(arranged.inputs)[arranged.order], grid
    )


def factor(h: Array) -> tuple[Array, Array]:
    """Return M over its diagonal [n, n] and the diagonal [n], with H = M^T M and M lower triangular.

    M is the Cholesky factor of H in reversed order, read backwards. Raises numpy.linalg.LinAlgError where H is not
    positive definite.
    """
    reverse = h[::-1, ::-1].copy()  # ascontiguousarray does not copy a single number, and this is overwritten
    try:
        lower = _cholesky(reverse)
    except scipy.linalg.LinAlgError:
        lower = scipy.linalg.cholesky(h[::-1, ::-1].astype(np.float64), lower=True).astype(np.float32)
    m = np.ascontiguousarray(lower.T[::-1, ::-1])
    root = np.diag(m).copy()
    m /= root[:, None]
    return m, root


def _cholesky(a: Array) -> Array:
    """Overwrite `a` with its lower Cholesky factor.

    It is made a block of columns at a time, so that almost all work is matrix products: measured 1.7 times as fast as
    LAPACK's.
    """
    for here in block_slices(len(a)):
        start, below = here.start, slice(here.stop, None)
        if start:
            a[here, here] -= a[here, :start] @ a[here, :start].T
        a[here, here] = scipy.linalg.cholesky(a[here, here], lower=True, check_finite=False)
        if here.stop < len(a):
            if start:
                a[below, here] -= a[below, :start] @ a[here, :start].T
            inverse, _ = lapack.strtri(a[here, here], lower=1)
            a[below, here] = a[below, here] @ inverse.T
    return a


def block_slices(inputs: int) -> Iterator[slice]:
    """Yield slices of consecutive inputs, BLOCK at a time."""
    return (slice(start, min(start + BLOCK, inputs)) for start in range(0, inputs, BLOCK))


@dataclass(frozen=True)
class Part:
    """Describe some channels of a problem, inputs in visiting order.

    w: W, [channels, in]
    pull: B, [channels, in]; None where x^ is x
    zero: zero points, [channels, blocks]
    """

    problem: Problem
    w: Array
    pull: Array | None
    zero: Array

    def gradient(self, codes: Array, scale: Array) -> Array:
        """Compute V = (W - Wq) H + B, [channels, in], from small numbers: no difference of large ones."""
        v = (self.w - codes * scale[:, self.problem.block]) @ self.problem.h
        return v if self.pull is None else v + self.pull

    def objective(self, codes: Array, scale: Array) -> npt.NDArray[np.float64]:
        """Compute D H D^T + 2 D B^T of each channel: [channels]."""
        d = self.w - codes * scale[:, self.problem.block]
        v = d @ self.problem.h
        total = np.einsum("cn,cn->c", d, v if self.pull is None else v + 2 * self.pull, dtype=np.float64)
        return np.asarray(total)

    def optimum(self) -> Array:
        """Return W* = W + B H^-1, [channels, in]: the best weight if there were no grid."""
        if self.pull is None:
            return self.w
        m = np.tril(self.problem.unit) * self.problem.root[:, None]
        half = scipy.linalg.solve_triangular(m, self.pull.T, trans=1, lower=True, check_finite=False)
        return self.w + np.asarray(scipy.linalg.solve_triangular(m, half, lower=True, check_finite=False).T, np.float32)

    def whole(self) -> Array:
        """Return M w* over M's diagonal, [in, channels]: what Babai rounding starts from."""
        problem = self.problem
        w = np.ascontiguousarray(self.w.T)
        whole = np.empty_like(w)
        for here in block_slices(len(w)):
            before = slice(0, here.start)
            whole[here] = problem.unit[here, before] @ w[before] + np.tril(problem.unit[here, here]) @ w[here]
        if self.pull is not None:
            # M^-T b, M = root * unit
            rest = scipy.linalg.solve_triangular(
                problem.unit, self.pull.T, trans=1, lower=True, unit_diagonal=True, check_finite=False
            )
            whole += rest / (problem.root**2)[:, None]
        return whole


def take_part(problem: Problem, weight: Array, zero: Array) -> Part:
    """Take channels of a problem: their weight [channels, in], inputs as in the layer, and zeros [channels, blocks]."""
    w = np.ascontiguousarray(weight[:, problem.order])
    pull = None if problem.mismatch is None else w @ problem.mismatch.T
    return Part(problem, w, pull, zero)
