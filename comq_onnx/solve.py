"""COMQ: quantize a weight by coordinate minimization of the layer's output error, on Gram matrices.

For a layer Y = W X (X holds one input position a column) and its quantized weight Wq, COMQ (Zhang, Yang, Liu,
Kailkhura, Yin, Xin: "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization", arXiv 2403.07134)
minimizes

    || Wq X - W X ||^2,    Wq = scale * Q,    Q integer

one coordinate at a time, everything else fixed. With the Gram G = E[x x^T] and V = (W - Wq) G both steps are closed
forms:

    q_i   <- clip(round(q_i + V_i / (scale G_ii)))            (the paper's eq. for a code)
    scale <- <q, G w> / <q, G q>                              (the paper's eq. for a scale)

`solve_paper` is the authors' algorithm: from Q = W (float), K sweeps, each channel in decreasing order of ||x_i||
|w_i|. `solve_comq`, the default, keeps the two closed forms and goes beyond the paper in what surrounds them:

- The inputs are x^ of the model quantized so far, the target is half the float model's output and half W x^ ("half
  mismatch"): with e = x - x^ and E = E[x^ e^T] the gradient becomes V = (W - Wq) H + W E^T / 2.
- If the layer has a bias, G and E are centred and the mean goes into the bias.
- A ridge, H = G + rho mean(diag G) I, keeps ill-conditioned Grams from fitting the calibration noise.
- The start is not W but the Babai (GPTQ) rounding of the unconstrained optimum on the reversed Cholesky H = M^T M, M
  lower: t_i = w*_i + (1 / M_ii) sum_{k<i} M_ik (w*_k - wq_k), for several scales, each channel keeping its best.
- Sweeps touch only what changes; at the end single codes flip, biggest decrease first.

Never worse than plain rounding: a channel whose `error` would be is rounded instead.

Shapes: weight [groups, out, in]; gram [groups, in, in]; inside the solver arrays are [in, out], group after group, so
that the output channels, which are independent of one another, are the contiguous axis.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve

from comq_onnx import kernels
from comq_onnx.grid import Array, Codes, Grid, QuantizedWeight, fit_minmax, fit_mse, round_to_grid, rtn

logger = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float64]

RIDGE = 0.03
SCALE_CANDIDATES = (0.8, 0.88, 0.95, 1.0, 1.06, 1.13)
# problems of at most so many inputs are solved near-exactly
SMALL = 32
SMALL_SCALE_CANDIDATES = np.linspace(0.6, 1.3, 24)
BLOCK = 128
FLIP_TOLERANCE = 1e-4
# the authors' factors on the initial scale for few bits (arXiv 2403.07134, section 4)
PAPER_SHRINK = {2: 0.65, 3: 0.8}


@dataclass(frozen=True)
class Statistics:
    """Second moments of a layer's input: x^ in the model quantized so far, x in the float model, e = x - x^.

    gram E[x^ x^T], cross E[x^ e^T], residue E[e e^T]: [groups, in, in]; mean E[x^], mean_error E[e]: [groups, in];
    count: how many input positions were seen. `cross` and `residue` are None where x^ is x.
    """

    gram: Matrix
    mean: Matrix
    count: int
    cross: Matrix | None = None
    residue: Matrix | None = None
    mean_error: Matrix | None = None

    def centred(self) -> Statistics:
        """The same moments about the mean."""

        def outer(a: Matrix, b: Matrix) -> Matrix:
            return a[:, :, None] * b[:, None, :]

        gram = self.gram - outer(self.mean, self.mean)
        if self.cross is None or self.residue is None or self.mean_error is None:
            return Statistics(gram, self.mean, self.count)
        cross = self.cross - outer(self.mean, self.mean_error)
        residue = self.residue - outer(self.mean_error, self.mean_error)
        return Statistics(gram, self.mean, self.count, cross, residue, self.mean_error)


@dataclass(frozen=True)
class Solution:
    """A layer's quantized weight, what to add to its bias, and what it costs.

    error and rtn_error are ||X^ Wq + shift - X W||^2 / ||X W||^2, for plain rounding on the same grid without a shift;
    shift [groups, out] is None where the layer has no bias to carry it.
    """

    weight: QuantizedWeight
    shift: Array | None
    error: float
    rtn_error: float


def error_db(error: float) -> float:
    """10 log10 of a relative squared error; -200 for none at all."""
    return 10 * float(np.log10(max(error, 1e-20)))


def solve(weight: Array, statistics: Statistics, grid: Grid, solver: str = "comq", has_bias: bool = False) -> Solution:
    """Quantize one layer's weight [groups, out, in] on `grid` with `solver`: `comq`, `paper` or `rtn`.

    has_bias: a shift of the bias may carry the mean of the error. Raises ValueError for a solver that does not exist.
    """
    if solver not in SOLVERS:
        raise ValueError(f"no solver {solver!r}; there are {', '.join(SOLVERS)}")
    judge = _Judge(weight, statistics)
    rounded = rtn(weight, grid)
    variance, offset = judge(rounded)
    plain = variance + offset**2
    if solver == "rtn":
        return Solution(rounded, None, float(plain.sum()) / judge.energy, float(plain.sum()) / judge.energy)
    centre = has_bias and solver == "comq"
    solved = SOLVERS[solver](weight, statistics.centred() if centre else statistics, grid)
    ours, shift = judge(solved)
    theirs = variance if centre else plain
    ours = ours if centre else ours + shift**2
    worse = ours > theirs
    if grid.per_tensor:
        worse = np.full_like(worse, ours.sum() > theirs.sum())
    error = float(np.where(worse, theirs, ours).sum()) / judge.energy
    best = _take_channels(worse, rounded, solved)
    shipped_shift = np.where(worse, offset, shift).astype(np.float32) if centre else None
    return Solution(best, shipped_shift, error, float(plain.sum()) / judge.energy)


def _take_channels(mask: npt.NDArray[np.bool_], first: QuantizedWeight, second: QuantizedWeight) -> QuantizedWeight:
    """The channels of `first` where mask [groups, out] holds, of `second` elsewhere."""
    if not mask.any():
        return second
    pick = mask[..., None]
    return QuantizedWeight(
        np.where(pick, first.codes, second.codes),
        np.where(pick, first.scale, second.scale),
        np.where(pick, first.zero_point, second.zero_point),
        second.grid,
    )


class _Judge:
    """The output error of one layer's quantized weights, channel by channel.

    With D = W - Wq the error W x - Wq x^ = D x^ + W e has mean D E[x^] + W E[e], which a bias can take away, and
    variance D G D^T + 2 D E W^T + W S W^T (G, E, S centred): sums of small numbers, no difference of large ones.
    """

    def __init__(self, weight: Array, statistics: Statistics) -> None:
        moments = statistics.centred()
        self._weight, self._mean = weight, moments.mean
        self._gram = moments.gram.astype(np.float32)
        self._cross: Array | None = None
        self._rest = np.zeros(weight.shape[:2])
        self._offset = np.zeros(weight.shape[:2])
        mean = moments.mean
        if moments.cross is not None and moments.residue is not None and moments.mean_error is not None:
            self._cross = np.matmul(weight, moments.cross.swapaxes(1, 2).astype(np.float32))
            self._rest = _dot(np.matmul(weight, moments.residue.astype(np.float32)), weight)
            self._offset = np.einsum("gmn,gn->gm", weight, moments.mean_error)
            mean = mean + moments.mean_error
        # E || W x ||^2 of the whole layer, x in the float model
        energy = self._variance(weight) + np.einsum("gmn,gn->gm", weight, mean) ** 2
        self.energy = max(float(energy.sum()), float(np.finfo(np.float64).tiny))

    def __call__(self, quantized: QuantizedWeight) -> tuple[Matrix, Matrix]:
        """The variance and the mean of the error: [groups, out] each."""
        difference = self._weight - quantized.dequantize()
        return self._variance(difference), np.einsum("gmn,gn->gm", difference, self._mean) + self._offset

    def _variance(self, difference: Array) -> Matrix:
        variance = _dot(np.matmul(difference, self._gram), difference) + self._rest
        if self._cross is not None:
            variance += 2 * _dot(difference, self._cross)
        return np.asarray(np.maximum(variance, 0), np.float64)


def _dot(left: Array, right: Array) -> Matrix:
    """The dot product of each channel's inputs: [groups, out]."""
    return np.asarray(np.einsum("gmn,gmn->gm", left, right), np.float64)


def _quadratic(left: Array, middle: Matrix, right: Array) -> Matrix:
    """left_c^T middle right_c for every channel c: [groups, out]."""
    return _dot(np.matmul(left, middle.astype(np.float32)), right)


# The default solver ---------------------------------------------------------------------------------------------------


@dataclass
class _Problem:
    """min tr (Wq - W*)^T H (Wq - W*) for one group: arrays [in, out], inputs in visiting order."""

    h: Array  # [in, in], with ridge
    m: Array  # lower triangular, H = M^T M
    optimum: Array  # W*
    pull: Array  # H W*: V = pull - H Wq is minus half the gradient
    block: npt.NDArray[np.intp]  # [in], the scale block of each input
    zero: Array  # [blocks, out]
    grid: Grid

    def gradient(self, codes: Array, scale: Array) -> Array:
        """V = H (W* - Wq)."""
        return np.asarray(self.pull - self.h @ (codes * scale[self.block]), np.float32)


def solve_comq(weight: Array, statistics: Statistics, grid: Grid) -> QuantizedWeight:
    """COMQ on the half-mismatch objective from a Babai start: see the module. weight [groups, out, in]."""
    start_scale, start_zero = fit_mse(weight, grid)
    if weight.shape[-1] <= SMALL and not grid.per_tensor and start_scale.shape[-1] == 1:
        return _solve_small(weight, statistics, grid, start_scale, start_zero)
    codes = np.empty(weight.shape, np.int8)
    scale = np.empty_like(start_scale)
    orders = [np.argsort(-np.diag(gram), kind="stable") for gram in statistics.gram]
    problems = (_pose(weight, statistics, grid, g, order, start_zero) for g, order in enumerate(orders))
    solved: Iterable[tuple[_Problem, Array, Array]]
    if grid.per_tensor and len(orders) > 1:
        solved = _solve_shared(list(problems), float(start_scale.flat[0]))
    else:
        starts = (np.ascontiguousarray(s.T) for s in start_scale)
        solved = ((p, *_descend(p, *_start(p, s))) for p, s in zip(problems, starts, strict=True))
    for g, (problem, q, s) in enumerate(solved):
        codes[g][:, orders[g]] = (q + problem.zero[problem.block]).T
        scale[g] = s.T
    return QuantizedWeight(codes, scale, start_zero, grid)


def _solve_small(
    weight: Array, statistics: Statistics, grid: Grid, start_scale: Array, start_zero: Codes
) -> QuantizedWeight:
    """Problems of few inputs, all groups and channels at once: see kernels.solve_small."""
    orders = np.argsort(-np.einsum("gii->gi", statistics.gram), axis=1, kind="stable")
    posed = [_pose(weight, statistics, grid, g, order, start_zero) for g, order in enumerate(orders)]
    h, optimum = np.stack([p.h for p in posed]), np.stack([p.optimum for p in posed])
    unit = np.stack([p.m / np.diag(p.m)[:, None] for p in posed])
    q, scale = np.empty_like(optimum), np.empty(start_scale.shape[:2], np.float32)
    kernels.solve_small(
        h, unit, optimum, start_scale[..., 0], start_zero[..., 0].astype(np.float32), grid.qmin, grid.qmax,
        SMALL_SCALE_CANDIDATES, q, scale,
    )  # fmt: skip
    codes = np.empty(weight.shape, np.float32)
    np.put_along_axis(codes, np.broadcast_to(orders[:, None, :], codes.shape), q.swapaxes(1, 2), axis=2)
    return QuantizedWeight((codes + start_zero).astype(np.int8), scale[..., None], start_zero, grid)


def _pose(
    weight: Array, statistics: Statistics, grid: Grid, g: int, order: npt.NDArray[np.intp], zero: Codes
) -> _Problem:
    """Group g's ridged problem in visiting order (decreasing G_ii), with its unconstrained optimum W*."""
    gram = statistics.gram[g][np.ix_(order, order)]
    # what centring leaves of a constant input is rounding noise: the ridge stands above that too
    noise = 1e-6 * float((statistics.mean[g] ** 2).sum())
    ridge = max(RIDGE * float(np.diag(gram).mean()), noise)
    gram[np.diag_indices_from(gram)] += ridge if ridge > 0 else 1.0
    # M is this factor read backwards: H = M^T M, M lower triangular
    factor = np.linalg.cholesky(gram[::-1, ::-1])
    h = gram.astype(np.float32)
    w = np.ascontiguousarray(weight[g].T[order])
    optimum, pull = w, h @ w
    if statistics.cross is not None:
        mismatch = (0.5 * statistics.cross[g][np.ix_(order, order)]).astype(np.float32) @ w
        rest = cho_solve((factor.astype(np.float32), True), mismatch[::-1], check_finite=False)[::-1]
        optimum, pull = w + rest, pull + mismatch
    block = grid.block_of(weight.shape[-1])[order]
    m = np.ascontiguousarray(factor.T[::-1, ::-1], np.float32)
    return _Problem(h, m, optimum, pull, block, np.ascontiguousarray(zero[g].T, np.float32), grid)


def _start(problem: _Problem, scale: Array) -> tuple[Array, Array]:
    """Babai-rounded codes [in, out] at the best of several multiples of `scale` [blocks, out], each channel
    choosing."""
    power = np.diag(problem.m) ** 2
    unit = problem.m / np.diag(problem.m)[:, None]
    best_loss, best_codes, best_scale = np.empty(0, np.float32), np.empty(0, np.float32), scale
    for factor in SCALE_CANDIDATES:
        tried = scale * np.float32(factor)
        codes, loss = _babai(problem, unit, power, tried)
        if problem.grid.per_tensor:
            loss = np.full_like(loss, loss.sum(dtype=np.float64))
        if not best_loss.size:
            best_loss, best_codes, best_scale = loss, codes, tried
            continue
        better = np.flatnonzero(loss < best_loss)
        best_loss[better] = loss[better]
        best_codes[:, better] = codes[:, better]
        best_scale[:, better] = tried[:, better]
    return best_codes, best_scale


def _babai(problem: _Problem, unit: Array, power: Array, scale: Array) -> tuple[Array, Array]:
    """t_i = w*_i + sum_{k<i} M_ik / M_ii (w*_k - wq_k), q_i = clip(round(t_i / scale)).

    Returns the codes and sum M_ii^2 (t_i - wq_i)^2 of each channel. Blocks of BLOCK inputs: inside, one input at a
    time; what earlier blocks contribute is one matrix product.
    """
    optimum, grid = problem.optimum, problem.grid
    n = optimum.shape[0]
    codes, gap = np.empty_like(optimum), np.empty_like(optimum)
    loss = np.zeros(optimum.shape[1], np.float32)
    for start in range(0, n, BLOCK):
        here = slice(start, min(start + BLOCK, n))
        target = optimum[here] + unit[here, :start] @ gap[:start]
        kernels.babai_block(
            target, np.ascontiguousarray(unit[here, here]), optimum[here], scale, problem.zero, problem.block[here],
            np.float32(grid.qmin), np.float32(grid.qmax), power[here], codes[here], gap[here], loss,
        )  # fmt: skip
    return codes, loss


def _solve_shared(problems: list[_Problem], start: float) -> list[tuple[_Problem, Array, Array]]:
    """Several groups with one scale between them: every choice of it is made on their sums."""

    def spread(scale: float) -> list[Array]:
        return [np.full((1, p.optimum.shape[1]), scale, np.float32) for p in problems]

    units = [p.m / np.diag(p.m)[:, None] for p in problems]
    tried = []
    for factor in SCALE_CANDIDATES:
        rounded = [
            _babai(p, unit, np.diag(p.m) ** 2, s)
            for p, unit, s in zip(problems, units, spread(start * factor), strict=True)
        ]
        tried.append((sum(float(loss.sum()) for _, loss in rounded), factor, [codes for codes, _ in rounded]))
    _, factor, codes = min(tried, key=lambda one: one[0])
    scale = start * factor
    for _ in range(3):
        scale = _common_scale(problems, codes, scale)
        for p, q, s in zip(problems, codes, spread(scale), strict=True):
            _sweep(p, q, s, p.gradient(q, s))
    scale = _common_scale(problems, codes, scale)
    scales = spread(scale)
    for p, q, s in zip(problems, codes, scales, strict=True):
        _flip(p, q, s)
    return list(zip(problems, codes, scales, strict=True))


def _common_scale(problems: list[_Problem], codes: list[Array], scale: float) -> float:
    """The one scale that is best for all groups' codes."""
    above = sum(float(np.einsum("nm,nm->", q, p.pull, dtype=np.float64)) for p, q in zip(problems, codes, strict=True))
    below = sum(float(np.einsum("nm,nm->", q, p.h @ q, dtype=np.float64)) for p, q in zip(problems, codes, strict=True))
    return above / below if below > 0 and above > 0 else scale


def _descend(problem: _Problem, codes: Array, scale: Array) -> tuple[Array, Array]:
    """Refit the scale and sweep the codes in turn, then flip single codes."""
    v = problem.gradient(codes, scale)
    for _ in range(2):
        scale, v = _refit_scale(problem, codes, scale, v)
        _sweep(problem, codes, scale, v)
    scale, _ = _refit_scale(problem, codes, scale, v)
    _flip(problem, codes, scale)
    return codes, scale


def _flip(problem: _Problem, codes: Array, scale: Array) -> None:
    """Move single codes, best first, in place; on a gradient computed anew, since the running one drifts."""
    v = np.ascontiguousarray(problem.gradient(codes, scale).T)
    grid = problem.grid
    kernels.flip(
        v, problem.h, scale, problem.zero, problem.block, np.float32(grid.qmin), np.float32(grid.qmax), codes,
        np.float32(FLIP_TOLERANCE),
    )  # fmt: skip


def _refit_scale(problem: _Problem, codes: Array, scale: Array, v: Array) -> tuple[Array, Array]:
    """The closed-form best scale for fixed codes and the gradient at it.

    One scale a channel: scale = <q, H W*> / <q, H q>, where H q = (H W* - V) / scale needs no product. Several: one
    after the other, the rest fixed.
    """
    if problem.grid.block_size is None:
        hq = (problem.pull - v) / scale
        slope, curvature = np.einsum("nm,nm->m", codes, v), np.einsum("nm,nm->m", codes, hq)
        if problem.grid.per_tensor:
            slope, curvature = np.full_like(slope, slope.sum()), np.full_like(curvature, curvature.sum())
        new = _step_scale(scale[0], slope, curvature)[None]
        return new, problem.pull - hq * new
    scale, v = scale.copy(), v.copy()
    for b in range(scale.shape[0]):
        rows = np.flatnonzero(problem.block == b)
        q = codes[rows]
        curvature = np.einsum("nm,nm->m", q, problem.h[np.ix_(rows, rows)] @ q)
        new = _step_scale(scale[b], np.einsum("nm,nm->m", q, v[rows]), curvature)
        v -= problem.h[:, rows] @ (q * (new - scale[b]))
        scale[b] = new
    return scale, v


def _step_scale(scale: Array, slope: Array, curvature: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        new = scale + slope / curvature
    return np.where((curvature > 0) & (new > scale * 0.1) & (new < scale * 10), new, scale).astype(np.float32)


def _sweep(problem: _Problem, codes: Array, scale: Array, v: Array) -> None:
    """One sweep of coordinate descent over all codes, in place; outside a block only changed channels cost anything."""
    n, grid = codes.shape[0], problem.grid
    delta = np.empty((min(BLOCK, n), codes.shape[1]), np.float32)
    for start in range(0, n, BLOCK):
        here = slice(start, min(start + BLOCK, n))
        change = delta[: here.stop - start]
        kernels.sweep_block(
            v[here], np.ascontiguousarray(problem.h[here, here]), scale, problem.zero, problem.block[here],
            np.float32(grid.qmin), np.float32(grid.qmax), codes[here], change,
        )  # fmt: skip
        columns = np.flatnonzero(change.any(axis=0))
        for rest in (slice(0, start), slice(here.stop, n)):
            if columns.size and rest.start < rest.stop:
                v[rest, columns] -= problem.h[rest, here] @ change[:, columns]


# The paper's solver ---------------------------------------------------------------------------------------------------


def solve_paper(
    weight: Array,
    statistics: Statistics,
    grid: Grid,
    sweeps: int = 3,
    order: str = "greedy",
    shrink: float | None = None,
) -> QuantizedWeight:
    """The authors' COMQ (arXiv 2403.07134) on the Gram of the inputs, weight [groups, out, in].

    Q starts as W (float); the scale as the span of W over 2^bits - 1 times `shrink` (PAPER_SHRINK where None); a sweep
    visits each channel's inputs in decreasing order of ||x_i|| |w_i| (`greedy`) or as they lie (`cyclic`), then refits
    the scale. A per-tensor grid is the paper's per-layer variant.
    """
    factor = PAPER_SHRINK.get(grid.bits, 1.0) if shrink is None else shrink
    scale, zero_point = fit_minmax(weight, grid, factor)
    codes = np.empty(weight.shape, np.int8)
    scale = scale.copy()
    inputs = weight.shape[-1]
    block = grid.block_of(inputs)
    wq = weight.copy()
    v = np.zeros_like(weight)  # (W - Wq) G
    q = np.zeros_like(weight)
    for _ in range(sweeps):
        for g, gram in enumerate(statistics.gram.astype(np.float32)):
            low = grid.qmin - zero_point[g][:, block].astype(np.float32)
            high = grid.qmax - zero_point[g][:, block].astype(np.float32)
            visits = _visits(weight[g], gram, order)
            _paper_sweep(gram, visits, q[g], wq[g], v[g], scale[g][:, block], low, high)
        scale = _paper_scale(weight, q, scale, statistics.gram, grid)
        wq = q * scale[..., block]
        v = np.matmul(weight - wq, statistics.gram.astype(np.float32))
    codes = (q + zero_point[..., block]).astype(np.int8)
    return QuantizedWeight(codes, scale, zero_point, grid)


def _visits(weight: Array, gram: Array, order: str) -> npt.NDArray[np.intp]:
    """The order in which each channel's inputs are visited: [out, in]."""
    if order == "cyclic":
        return np.tile(np.arange(weight.shape[1]), (weight.shape[0], 1))
    return np.argsort(-np.abs(weight) * np.sqrt(np.maximum(np.diag(gram), 0)), axis=1, kind="stable")


def _paper_sweep(
    gram: Array, visits: npt.NDArray[np.intp], q: Array, wq: Array, v: Array, steps: Array, low: Array, high: Array
) -> None:
    """q_i <- clip(round((V_i + G_ii wq_i) / (scale G_ii))) along each channel's own order; arrays [out, in], in
    place."""
    rows = np.arange(q.shape[0])
    for i in visits.T:
        curvature = gram[i, i]
        step = steps[rows, i]
        with np.errstate(divide="ignore", invalid="ignore"):
            target = wq[rows, i] + v[rows, i] / curvature
        target = np.where(curvature > 0, target, wq[rows, i])  # a dead input: plain rounding
        new = np.clip(np.rint(target / step), low[rows, i], high[rows, i])
        change = new * step - wq[rows, i]
        q[rows, i] = new
        wq[rows, i] += change
        v -= change[:, None] * gram[i]


def _paper_scale(weight: Array, q: Array, scale: Array, gram: Matrix, grid: Grid) -> Array:
    """scale <- <q, G w> / <q, G q> over a channel or the whole layer, block after block where there are several."""
    if grid.block_size is not None:
        scale = scale.copy()
        block = grid.block_of(weight.shape[-1])
        for b in range(scale.shape[-1]):
            rest = weight - np.where(block == b, 0, q * scale[..., block])
            part = np.where(block == b, q, 0)
            scale[..., b] = _best_scale(scale[..., b], _quadratic(part, gram, rest), _quadratic(part, gram, part))
        return scale
    above, below = _quadratic(q, gram, weight), _quadratic(q, gram, q)
    if grid.per_tensor:
        above, below = np.full_like(above, above.sum()), np.full_like(below, below.sum())
    return _best_scale(scale[..., 0], above, below)[..., None]


def _best_scale(scale: Array, above: Matrix, below: Matrix) -> Array:
    good = (below > 0) & (above > 0)
    return np.where(good, above / np.where(good, below, 1), scale).astype(np.float32)


SOLVERS: dict[str, Callable[[Array, Statistics, Grid], QuantizedWeight]] = {
    "comq": solve_comq,
    "paper": solve_paper,
    "rtn": lambda weight, _statistics, grid: rtn(weight, grid),
}


def round_rows(weight: Array, grid: Grid) -> Solution:
    """Quantize a table [1, rows, columns] that only gets looked up (an embedding): plain rounding at the MSE-best
    scale."""
    best = round_to_grid(weight, *fit_mse(weight, grid), grid)
    energy = max(float((weight.astype(np.float64) ** 2).sum()), np.finfo(np.float64).tiny)

    def cost(quantized: QuantizedWeight) -> float:
        return float(((quantized.dequantize().astype(np.float64) - weight) ** 2).sum()) / energy

    return Solution(best, None, cost(best), cost(rtn(weight, grid)))


def check_codes(weight: QuantizedWeight) -> Codes:
    """The codes, after making sure that they lie on the grid and the scales are positive numbers. Raises ValueError."""
    if weight.codes.min() < weight.grid.qmin or weight.codes.max() > weight.grid.qmax:
        raise ValueError(f"codes outside [{weight.grid.qmin}, {weight.grid.qmax}]")
    if not (np.isfinite(weight.scale).all() and (weight.scale > 0).all()):
        raise ValueError("a scale is not a positive number")
    return weight.codes
