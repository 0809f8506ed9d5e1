"""Solve problems of few inputs near-exactly, such as depthwise convolutions have: all groups and channels at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from comq_onnx.solve.compiled import compiled
from comq_onnx.solve.grid import Array, Codes, Grid, QuantizedWeight
from comq_onnx.solve.moments import Matrix, Moments
from comq_onnx.solve.problem import MISMATCH, arrange, noise_of, pose
from comq_onnx.solve.rounding import common_factor

# problems of at most so many inputs are solved near-exactly
FEW_INPUTS = 32
SCALE_FACTORS = np.append(np.linspace(0.6, 1.3, 24), 1.0)
# the most promising of these factors, by Babai rounding alone, are followed to the end
FOLLOWED = 6


def has_few_inputs(inputs: int, grid: Grid) -> bool:
    """Tell whether a layer of so many inputs is solved here: few of them, and one scale a channel alone."""
    return inputs <= FEW_INPUTS and not (grid.per_tensor or grid.tied) and grid.blocks(inputs) == 1


def solve_few_inputs(
    weight: Array, moments: Moments, grid: Grid, ridge: float, start_scale: Array, start_zero: Codes
) -> QuantizedWeight:
    """Quantize a weight [groups, out, in] of few inputs, from scales and zero points [groups, out, 1]."""
    order = np.argsort(-np.einsum("gii->gi", moments.gram), axis=1, kind="stable")
    h, unit = _pose(moments, order, grid, ridge)
    optimum = np.take_along_axis(weight, order[:, None, :], axis=2)
    if moments.cross is not None:
        pull = optimum @ (np.float32(MISMATCH) * _ordered(moments.cross, order)).swapaxes(1, 2)
        optimum = optimum + np.linalg.solve(h, pull.swapaxes(1, 2)).swapaxes(1, 2)
    optimum = np.ascontiguousarray(optimum.swapaxes(1, 2))
    q, scale = np.empty_like(optimum), np.empty(start_scale.shape[:2], np.float32)
    search_codes(
        h, unit, optimum, start_scale[..., 0], start_zero[..., 0].astype(np.float32), grid.qmin, grid.qmax,
        SCALE_FACTORS, q, scale,
    )  # fmt: skip
    if moments.cross is not None:
        scale = refit_to_float(q, scale, h, pull)
    codes = np.empty(weight.shape, np.float32)
    np.put_along_axis(codes, np.broadcast_to(order[:, None, :], codes.shape), q.swapaxes(1, 2), axis=2)
    return QuantizedWeight((codes + start_zero).astype(np.int8), scale[..., None], start_zero, grid)


def refit_to_float(codes: Array, scale: Array, h: Array, pull: Array) -> Array:
    """Return the scales [groups, out] that are best for the output of the float model, as descent.refit_to_float does.

    codes: less the zero point, [groups, in, out]
    h, pull: H [groups, in, in] and B [groups, out, in]
    """
    wq = codes * scale[:, None]
    norm = np.einsum("gnm,gnk,gkm->gm", wq, h, wq)
    return scale * (1 + common_factor(np.einsum("gnm,gmn->gm", wq, pull), norm))


def _pose(moments: Moments, order: npt.NDArray[np.intp], grid: Grid, ridge: float) -> tuple[Array, Array]:
    """Return H and M over its diagonal of all groups, [groups, in, in], as `pose` makes them of one.

    order: the inputs of each group in visiting order, [groups, in]
    """
    h = _ordered(moments.gram, order)
    diagonal = np.einsum("gii->gi", h)
    added = np.maximum(ridge * diagonal.mean(axis=1, dtype=np.float64), noise_of(moments.mean))
    diagonal += np.where(added > 0, added, 1.0)[:, None].astype(np.float32)
    try:
        lower = np.linalg.cholesky(h[:, ::-1, ::-1])
    except np.linalg.LinAlgError:
        # one of them needs a larger ridge
        problems = [pose(arrange(moments.group(g)), grid, ridge) for g in range(len(h))]
        return np.stack([p.h for p in problems]), np.stack([p.unit for p in problems])
    m = lower.swapaxes(1, 2)[:, ::-1, ::-1]
    return h, np.ascontiguousarray(m / np.einsum("gii->gi", m)[:, :, None])


def _ordered(matrices: Matrix, order: npt.NDArray[np.intp]) -> Array:
    """Put the inputs of matrices [groups, in, in] in order, in float32."""
    rows = np.take_along_axis(matrices.astype(np.float32), order[:, :, None], axis=1)
    return np.take_along_axis(rows, order[:, None, :], axis=2)


@compiled
def search_codes(h, unit, optimum, start, zero, qmin, qmax, factors, codes, scale):  # type: ignore[no-untyped-def]
    """Find near-exact codes and the scale of every channel of problems with few inputs.

    For each factor on the start scale: Babai rounding. From the FOLLOWED best of them: refits of the scale and moves of
    one and two codes in turn until no move lowers the objective; the least objective wins.

    h, unit: H and M over its diagonal, [groups, n, n]
    optimum: the weight without a grid, [groups, n, m]
    start, zero: scale and zero point to start from, [groups, m]
    qmin, qmax: the lowest and the highest code
    factors: multiples of the start scale
    codes, scale: written; codes less the zero point [groups, n, m], scale [groups, m]
    """
    groups, n, columns = optimum.shape
    for g in range(groups):
        # one array: numba compiles each way to make one
        room = np.zeros((7, n), np.float64)
        gap, kept, v, reach, work = room[0], room[1], room[2], room[3], room[4:]
        tried, losses = np.zeros((factors.size, n), np.float64), np.zeros((1, factors.size), np.float64)[0]
        for i in range(n):
            for k in range(n):
                reach[i] = max(reach[i], abs(h[g, i, k])) if k != i else reach[i]
        for c in range(columns):
            low, high = qmin - zero[g, c], qmax - zero[g, c]
            for f in range(factors.size):
                s = np.float64(start[g, c]) * factors[f]
                _round(unit[g], optimum[g, :, c], s, low, high, gap, tried[f])
                losses[f] = _loss(h[g], optimum[g, :, c], _refit(h[g], optimum[g, :, c], tried[f], s), tried[f])
            best = np.inf
            for f in np.argsort(losses)[:FOLLOWED]:
                q, s = tried[f], np.float64(start[g, c]) * factors[f]
                for _ in range(8):
                    s = _refit(h[g], optimum[g, :, c], q, s)
                    if not _move_codes(h[g], reach, optimum[g, :, c], s, low, high, q, v, work):
                        break
                loss = _loss(h[g], optimum[g, :, c], s, q)
                if loss < best:
                    best = loss
                    scale[g, c] = s
                    for i in range(n):
                        kept[i] = q[i]
            for i in range(n):
                codes[g, i, c] = kept[i]


@compiled
def _round(unit, optimum, s, low, high, gap, q):  # type: ignore[no-untyped-def]
    """Round one input after the other to the scale s; q is written, gap is scratch."""
    for i in range(q.size):
        t = np.float64(optimum[i])
        for k in range(i):
            t += unit[i, k] * gap[k]
        q[i] = min(max(np.rint(t / s), low), high)
        gap[i] = optimum[i] - q[i] * s


@compiled
def _refit(h, optimum, q, s):  # type: ignore[no-untyped-def]
    """Return the best scale of the codes q by its closed form; s where there is none."""
    above, below = 0.0, 0.0
    for i in range(q.size):
        for k in range(q.size):
            above += q[i] * h[i, k] * optimum[k]
            below += q[i] * h[i, k] * q[k]
    # float32, or the codes would be judged at a scale that is not the one written
    return np.float64(np.float32(above / below)) if below > 0 and above * s > 0 else s


@compiled
def _loss(h, optimum, s, q):  # type: ignore[no-untyped-def]
    """Return the objective of the codes q at the scale s."""
    loss = 0.0
    for i in range(q.size):
        for k in range(q.size):
            loss += (optimum[i] - q[i] * s) * h[i, k] * (optimum[k] - q[k] * s)
    return loss


@compiled
def _move_codes(h, reach, optimum, s, low, high, q, v, work):  # type: ignore[no-untyped-def]
    """Move one code or two by one each, the best move first, until none lowers the objective; tell whether any did.

    reach: the largest |H_ik| of each input i, k != i, [n]
    q, v: codes and gradient of one channel [n]; q changes in place, v is written.
    work: room for the gains and costs of moves, [3, n]
    """
    n = q.size
    for i in range(n):
        v[i] = 0.0
        for k in range(n):
            v[i] += h[i, k] * (optimum[k] - q[k] * s)
    # what a code gains by a step down and by one up, and what either costs
    down, up, cost = work
    for i in range(n):
        cost[i] = h[i, i] * s * s
    any_moved = False
    for _ in range(16 * n):
        top = -np.inf
        for i in range(n):
            down[i] = -np.inf if q[i] - 1 < low else -2 * s * v[i]
            up[i] = -np.inf if q[i] + 1 > high else 2 * s * v[i]
            larger = (down[i] if down[i] > up[i] else up[i]) - cost[i]
            top = larger if larger > top else top
        best, at, other, first, second = 0.0, -1, -1, 0.0, 0.0
        for i in range(n):
            for d in (-1.0, 1.0):
                own = (down[i] if d < 0 else up[i]) - cost[i]
                if own == -np.inf:
                    continue
                if own > best:
                    best, at, other, first, second = own, i, -1, d, 0.0
                # no second code makes it better; sums of a few numbers in float64 are off by less than 1e-9
                bend = 2 * d * s * s
                widest = abs(bend) * reach[i]
                if own + top + widest + 1e-9 * (abs(own) + abs(top) + widest) <= best:
                    continue
                most = -np.inf
                for k in range(i):
                    lower, higher = own + down[k] - cost[k] + bend * h[i, k], own + up[k] - cost[k] - bend * h[i, k]
                    larger = lower if lower > higher else higher
                    most = larger if larger > most else most
                if most > best:
                    for k in range(i - 1, -1, -1):
                        if own + up[k] - cost[k] - bend * h[i, k] == most:
                            other, second = k, 1.0
                        if own + down[k] - cost[k] + bend * h[i, k] == most:
                            other, second = k, -1.0
                    best, at, first = most, i, d
        if at < 0 or best <= 1e-6 * h[at, at] * s * s:
            break
        any_moved = True
        q[at] += first
        for i in range(n):
            v[i] -= h[i, at] * first * s
        if other >= 0:
            q[other] += second
            for i in range(n):
                v[i] -= h[i, other] * second * s
    return any_moved
