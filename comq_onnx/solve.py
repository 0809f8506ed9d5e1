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
  mismatch"):
  with e = x - x^ and E = E[x^ e^T] the gradient becomes V = (W - Wq) H + W E^T / 2.
- If the layer has a bias, G and E are centred and the mean goes into the bias.
- A ridge, H = G + rho mean(diag G) I, keeps ill-conditioned Grams from fitting the calibration noise.
- The start is not W but the Babai (GPTQ) rounding of the unconstrained optimum on the reversed Cholesky H = M^T M, M
  lower:
  t_i = w*_i + (1 / M_ii) sum_{k<i} M_ik (w*_k - wq_k), for several scales, each channel keeping its best.
- Sweeps touch only what changes; at the end single codes flip, biggest decrease first.

Never worse than plain rounding: a channel whose `error` would be is rounded instead.

Shapes: weight [groups, out, in]; gram [groups, in, in]; inside the solver arrays are [groups, in, out], so that the
output channels, which are independent of one another, are the contiguous axis.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comq_onnx.grid import Array, Codes, Grid, QuantizedWeight, fit_minmax, fit_mse, round_to_grid, rtn

logger = logging.getLogger(__name__)

Matrix = npt.NDArray[np.float64]

RIDGE = 0.03
SCALE_CANDIDATES = (0.8, 0.88, 0.95, 1.0, 1.06, 1.13)
BLOCK = 128
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
    rounded = rtn(weight, grid)
    plain = channel_errors(weight, rounded.dequantize(), statistics)
    energy = max(float(_energy(weight, statistics).sum()), np.finfo(np.float64).tiny)
    if solver == "rtn":
        return Solution(rounded, None, float(plain.sum()) / energy, float(plain.sum()) / energy)

    centre = has_bias and solver == "comq"
    moments = statistics.centred() if centre else statistics
    solved = SOLVERS[solver](weight, moments, grid)
    best, error = _never_worse(weight, solved, rounded, moments)
    shift = _bias_shift(weight, best.dequantize(), statistics) if centre else None
    return Solution(best, shift, float(error.sum()) / energy, float(plain.sum()) / energy)


def _never_worse(
    weight: Array, solved: QuantizedWeight, rounded: QuantizedWeight, moments: Statistics
) -> tuple[QuantizedWeight, Matrix]:
    """The solution with every channel that plain rounding serves better replaced, and its errors [groups, out]."""
    ours = channel_errors(weight, solved.dequantize(), moments)
    theirs = channel_errors(weight, rounded.dequantize(), moments)
    worse = ours > theirs
    if solved.grid.per_tensor:
        worse = np.full_like(worse, ours.sum() > theirs.sum())
    if not worse.any():
        return solved, ours
    pick = worse[..., None]
    mixed = QuantizedWeight(
        np.where(pick, rounded.codes, solved.codes),
        np.where(pick, rounded.scale, solved.scale),
        np.where(pick, rounded.zero_point, solved.zero_point),
        solved.grid,
    )
    return mixed, np.where(worse, theirs, ours)


def channel_errors(weight: Array, quantized: Array, statistics: Statistics) -> Matrix:
    """E || W x - Wq x^ ||^2 of each output channel: [groups, out].

    With D = W - Wq it is D G D^T + 2 D E W^T + W S W^T: no difference of large numbers.
    """
    difference = weight - quantized
    error = _quadratic(difference, statistics.gram, difference)
    if statistics.cross is not None and statistics.residue is not None:
        error += 2 * _quadratic(difference, statistics.cross, weight) + _quadratic(weight, statistics.residue, weight)
    return np.asarray(np.maximum(error, 0), np.float64)


def _energy(weight: Array, statistics: Statistics) -> Matrix:
    """E || W x ||^2 of each output channel, x in the float model: [groups, out]."""
    energy = _quadratic(weight, statistics.gram, weight)
    if statistics.cross is not None and statistics.residue is not None:
        energy += 2 * _quadratic(weight, statistics.cross, weight) + _quadratic(weight, statistics.residue, weight)
    return energy


def _quadratic(left: Array, middle: Matrix, right: Array) -> Matrix:
    """left_c^T middle right_c for every channel c: [groups, out]."""
    product = left @ middle.astype(np.float32)
    return np.asarray(np.einsum("gmn,gmn->gm", product, right, dtype=np.float64), np.float64)


def _bias_shift(weight: Array, quantized: Array, statistics: Statistics) -> Array:
    """W E[x] - Wq E[x^]: [groups, out]."""
    shift = np.einsum("gmn,gn->gm", weight - quantized, statistics.mean)
    if statistics.mean_error is not None:
        shift += np.einsum("gmn,gn->gm", weight, statistics.mean_error)
    return np.asarray(shift, np.float32)


# The default solver ---------------------------------------------------------------------------------------------------


@dataclass
class _Problem:
    """min tr (Wq - W*)^T H (Wq - W*): arrays [groups, in, out], inputs in the visiting order of each group."""

    h: Array  # [groups, in, in], with ridge
    weight: Array  # W
    pull: Array  # W E^T / 2: the gradient that the inputs' own error leaves at Wq = W
    block: npt.NDArray[np.intp]  # [groups, in], the scale block of each input
    grid: Grid

    def gradient(self, wq: Array) -> Array:
        """V = H (W - Wq) + pull, minus half the objective's derivative."""
        return np.asarray(np.matmul(self.h, self.weight - wq) + self.pull, np.float32)

    def per_input(self, values: npt.NDArray[np.float32]) -> Array:
        """Scales or zero points [groups, blocks, out] spread over the inputs: [groups, in, out]."""
        return np.take_along_axis(values, self.block[:, :, None], axis=1)


def solve_comq(weight: Array, statistics: Statistics, grid: Grid) -> QuantizedWeight:
    """COMQ on the half-mismatch objective from a Babai start: see the module. weight [groups, out, in]."""
    problem, order, optimum = _pose(weight, statistics, grid)
    scale, zero = fit_mse(weight, grid)
    scale, zero_point = scale.swapaxes(1, 2).copy(), zero.swapaxes(1, 2).astype(np.float32)

    codes, scale = _babai_start(problem, optimum, scale, zero_point)
    scale = _refit_scale(problem, codes, scale)
    for _ in range(2):
        codes = _sweep(problem, codes, scale, zero_point)
        scale = _refit_scale(problem, codes, scale)
    codes = _flip(problem, codes, scale, zero_point)

    absolute = np.empty_like(codes)
    np.put_along_axis(absolute, order[:, :, None], codes + problem.per_input(zero_point), axis=1)
    return QuantizedWeight(
        absolute.swapaxes(1, 2).astype(np.int8),
        scale.swapaxes(1, 2).copy(),
        zero_point.swapaxes(1, 2).astype(np.int8),
        grid,
    )


def _pose(weight: Array, statistics: Statistics, grid: Grid) -> tuple[_Problem, npt.NDArray[np.intp], Array]:
    """The ridged problem in visiting order (decreasing H_ii), that order, and the unconstrained optimum W*."""
    gram = statistics.gram
    diagonal = np.einsum("gii->gi", gram)
    ridge = RIDGE * diagonal.mean(axis=1)
    h = gram + np.where(ridge > 0, ridge, 1.0)[:, None, None] * np.eye(gram.shape[1])
    order = np.argsort(-diagonal, axis=1, kind="stable")
    h = np.take_along_axis(np.take_along_axis(h, order[:, :, None], 1), order[:, None, :], 2)
    w = np.take_along_axis(weight.swapaxes(1, 2), order[:, :, None], 1)
    if statistics.cross is None:
        pull, optimum = np.zeros_like(w), w
    else:
        cross = np.take_along_axis(np.take_along_axis(statistics.cross, order[:, :, None], 1), order[:, None, :], 2)
        pull = np.matmul(0.5 * cross, w)
        optimum = (w + np.linalg.solve(h, pull)).astype(np.float32)
        pull = pull.astype(np.float32)
    block = grid.block_of(weight.shape[-1])[order]
    return _Problem(h.astype(np.float32), np.ascontiguousarray(w), pull, block, grid), order, optimum


def _reversed_cholesky(h: Array) -> Array:
    """M lower triangular with H = M^T M: the Cholesky factor of H read from its last row backwards."""
    flipped = np.linalg.cholesky(h[:, ::-1, ::-1].astype(np.float64))
    return flipped.swapaxes(1, 2)[:, ::-1, ::-1].astype(np.float32)


def _babai_start(problem: _Problem, optimum: Array, scale: Array, zero_point: Array) -> tuple[Array, Array]:
    """Babai-rounded codes [groups, in, out] at the best of several multiples of `scale`, chosen by each channel."""
    m = _reversed_cholesky(problem.h)
    unit = m / np.einsum("gii->gi", m)[:, :, None]  # rows over M_ii
    weight_of = np.einsum("gii->gi", m) ** 2
    best_loss: Array | None = None
    best_codes, best_scale = np.empty(0, np.float32), scale
    for factor in SCALE_CANDIDATES:
        tried = scale * np.float32(factor)
        codes, loss = _babai(unit, weight_of, optimum, problem, tried, zero_point)
        if problem.grid.per_tensor:
            loss = np.full_like(loss, loss.sum(dtype=np.float64))
        if best_loss is None:
            best_loss, best_codes, best_scale = loss, codes, tried
            continue
        better = (loss < best_loss)[:, None, :]
        best_loss = np.minimum(loss, best_loss)
        best_codes = np.where(better, codes, best_codes)
        best_scale = np.where(better, tried, best_scale)
    return best_codes, best_scale


def _babai(
    unit: Array, weight_of: Array, optimum: Array, problem: _Problem, scale: Array, zero_point: Array
) -> tuple[Array, Array]:
    """t_i = w*_i + sum_{k<i} M_ik / M_ii (w*_k - wq_k), q_i = clip(round(t_i / scale)); codes and sum M_ii^2 (t_i -
    wq_i)^2.

    Blocks of BLOCK inputs: inside, one input at a time; what earlier blocks contribute is one matrix product.
    """
    _, n, _ = optimum.shape
    steps, zero = problem.per_input(scale), problem.per_input(zero_point)
    low, high = problem.grid.qmin - zero, problem.grid.qmax - zero
    codes, gap = np.empty_like(optimum), np.empty_like(optimum)
    loss = np.zeros((optimum.shape[0], optimum.shape[2]), np.float32)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        target = optimum[:, start:stop].copy()
        if start:
            target += np.matmul(unit[:, start:stop, :start], gap[:, :start])
        for i in range(start, stop):
            t = target[:, i - start]
            if i > start:
                t = t + np.matmul(unit[:, i, None, start:i], gap[:, start:i])[:, 0]
            q = np.clip(np.rint(t / steps[:, i]), low[:, i], high[:, i])
            wq = q * steps[:, i]
            codes[:, i] = q
            gap[:, i] = optimum[:, i] - wq
            loss += weight_of[:, i, None] * (t - wq) ** 2
    return codes, loss


def _refit_scale(problem: _Problem, codes: Array, scale: Array) -> Array:
    """The closed-form best scale for fixed codes, <q, C> / <q, H q>, block after block; kept where it is a positive
    number."""
    steps = problem.per_input(scale)
    v = problem.gradient(codes * steps)
    if problem.grid.block_size is None:
        slope = np.einsum("gnm,gnm->gm", codes, v)
        curvature = np.einsum("gnm,gnm->gm", codes, np.matmul(problem.h, codes))
        if problem.grid.per_tensor:
            slope, curvature = np.full_like(slope, slope.sum()), np.full_like(curvature, curvature.sum())
        return _step_scale(scale[:, 0], slope, curvature)[:, None]
    scale = scale.copy()
    for b in range(scale.shape[1]):
        for g in range(scale.shape[0]):
            rows = np.flatnonzero(problem.block[g] == b)
            q = codes[g, rows]
            slope = np.einsum("nm,nm->m", q, v[g, rows])
            curvature = np.einsum("nm,nm->m", q, problem.h[g][np.ix_(rows, rows)] @ q)
            new = _step_scale(scale[g, b], slope, curvature)
            v[g] -= problem.h[g][:, rows] @ (q * (new - scale[g, b]))
            scale[g, b] = new
    return scale


def _step_scale(scale: Array, slope: Array, curvature: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        new = scale + slope / curvature
    return np.where((curvature > 0) & (new > scale * 0.1) & (new < scale * 10), new, scale).astype(np.float32)


def _sweep(problem: _Problem, codes: Array, scale: Array, zero_point: Array) -> Array:
    """One sweep of coordinate descent over the codes, all channels at once, working only where a code changes."""
    codes = codes.copy()
    steps, zero = problem.per_input(scale), problem.per_input(zero_point)
    low, high = problem.grid.qmin - zero, problem.grid.qmax - zero
    v = problem.gradient(codes * steps)
    diagonal = np.einsum("gii->gi", problem.h)
    n = codes.shape[1]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        before = codes[:, start:stop].copy()
        for i in range(start, stop):
            moved = np.rint(codes[:, i] + v[:, i] / (steps[:, i] * diagonal[:, i, None]))
            new = np.clip(moved, low[:, i], high[:, i])
            change = (new - codes[:, i]) * steps[:, i]
            if not change.any():
                continue
            codes[:, i] = new
            columns = np.flatnonzero(change.any(axis=0))
            v[:, start:stop, columns] -= problem.h[:, start:stop, i, None] * change[:, None, columns]
        delta = (codes[:, start:stop] - before) * steps[:, start:stop]
        columns = np.flatnonzero(delta.any(axis=(0, 1)))
        if columns.size and stop < n:
            v[:, stop:, columns] -= np.matmul(problem.h[:, stop:, start:stop], delta[:, :, columns])
    return codes


def _flip(problem: _Problem, codes: Array, scale: Array, zero_point: Array) -> Array:
    """Move single codes by one, in every channel the one that lowers the objective most, until none does."""
    codes = codes.copy()
    steps, zero = problem.per_input(scale), problem.per_input(zero_point)
    low, high = problem.grid.qmin - zero, problem.grid.qmax - zero
    v = problem.gradient(codes * steps)
    diagonal = np.einsum("gii->gi", problem.h)[:, :, None]
    for g in range(codes.shape[0]):
        live = np.arange(codes.shape[2])
        for _ in range(codes.shape[1]):
            q, s, gradient = codes[g][:, live], steps[g][:, live], v[g][:, live]
            curvature = diagonal[g] * s * s
            up = np.where(q < high[g][:, live], 2 * gradient * s - curvature, -np.inf)
            down = np.where(q > low[g][:, live], -2 * gradient * s - curvature, -np.inf)
            gain = np.maximum(up, down)
            at = gain.argmax(axis=0)
            column = np.arange(live.size)
            # below this the float32 gradient decides by noise, and flips could cycle
            going = gain[at, column] > 1e-4 * curvature[at, column]
            if not going.any():
                break
            at, column, live = at[going], column[going], live[going]
            move = np.where(up[at, column] >= down[at, column], np.float32(1), np.float32(-1))
            codes[g][at, live] += move
            v[g][:, live] -= problem.h[g][:, at] * (move * s[at, column])
    return codes


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
