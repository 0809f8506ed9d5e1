"""Solve slowly: the layer objective and the solvers' steps, in float64 and as they are written in a paper."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from comq_onnx.solve.grid import Grid, fit_minmax, fit_mse
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.paper import SHRINK
from comq_onnx.solve.problem import RIDGE


def moments_of(x: np.ndarray, x_hat: np.ndarray | None = None, halves: bool = False) -> Moments:
    """Compute the moments of rows.

    x: of the float model, [groups, positions, in]
    x_hat: of the quantized model; None where they are equal
    halves: with the moments of every other row beside them
    """
    hat = (x if x_hat is None else x_hat).astype(np.float64)
    count = x.shape[1]
    half = None
    if halves and count > 1:
        half = replace(moments_of(x[:, ::2], None if x_hat is None else x_hat[:, ::2]), residue=None)

    def moment(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a.swapaxes(1, 2) @ b / count

    if x_hat is None:
        return Moments(moment(hat, hat), hat.mean(axis=1), count, half=half)
    e = x - hat
    return Moments(moment(hat, hat), hat.mean(axis=1), count, moment(hat, e), moment(e, e), e.mean(axis=1), half)


def relative_error(
    weight: np.ndarray,
    quantized: np.ndarray,
    x: np.ndarray,
    x_hat: np.ndarray | None = None,
    shift: np.ndarray | None = None,
) -> float:
    """Compute ||Wq X^ + shift - W X||^2 / ||W X||^2 of weights [groups, out, in], rows [groups, positions, in]."""
    hat = (x if x_hat is None else x_hat).astype(np.float64)
    wanted = x.astype(np.float64) @ weight.astype(np.float64).swapaxes(1, 2)
    got = hat @ quantized.astype(np.float64).swapaxes(1, 2)
    if shift is not None:
        got = got + shift[:, None].astype(np.float64)
    return float(((got - wanted) ** 2).sum() / max((wanted**2).sum(), np.finfo(np.float64).tiny))


# The paper ------------------------------------------------------------------------------------------------------------


def paper(
    weight: np.ndarray, x: np.ndarray, grid: Grid, order: str, sweeps: int = 3, shrink: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Solve one matrix [out, in] on its rows [positions, in] as the paper does.

    Returns the codes less the zero point [out, in], and the scales [out].
    """
    w, x = weight.astype(np.float64), x.astype(np.float64)
    scale, zero = fit_minmax(weight[None], grid, SHRINK.get(grid.bits, 1.0) if shrink is None else shrink)
    scale, zero = scale[0, :, 0].astype(np.float64), zero[0, :, 0].astype(int)
    norms = (x**2).sum(axis=0)
    wq, q = w.copy(), np.zeros_like(w)
    for _ in range(sweeps):
        for c in range(len(w)):
            greedy = np.argsort(-np.abs(w[c]) * np.sqrt(norms), kind="stable")
            for i in greedy if order == "greedy" else range(w.shape[1]):
                # the residual without input i, along x_i
                best = x[:, i] @ (x @ (w[c] - wq[c]) + x[:, i] * wq[c, i]) / norms[i]
                q[c, i] = np.clip(np.rint(best / scale[c]), grid.qmin - zero[c], grid.qmax - zero[c])
                wq[c, i] = q[c, i] * scale[c]
        above, below = ((x @ q.T) * (x @ w.T)).sum(axis=0), ((x @ q.T) ** 2).sum(axis=0)
        scale = np.full_like(scale, above.sum() / below.sum()) if grid.per_tensor else above / below
        wq = q * scale[:, None]
    return q, scale


# GPTQ -----------------------------------------------------------------------------------------------------------------


def gptq(weight: np.ndarray, gram: np.ndarray, grid: Grid, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Solve one group's matrix of weight [groups, out, in] by GPTQ (arXiv 2210.17323, algorithm 1) as commonly written.

    Inputs are visited in decreasing order of power.

    gram: of this group, [in, in]

    Returns the codes less the zero point, and how near each came to a tie.
    """
    scale, zero = (a[group].astype(np.float64) for a in fit_mse(weight, grid))
    order, block = np.argsort(-np.diag(gram), kind="stable"), grid.block_of(len(gram))
    w = weight[group].astype(np.float64)[:, order]
    damped = gram[np.ix_(order, order)] + 0.01 * np.diag(gram).mean() * np.eye(len(gram))
    u = np.linalg.cholesky(np.linalg.inv(damped)).T  # upper, U^T U = H^-1
    codes, near = np.empty_like(w), np.empty_like(w)
    for k, i in enumerate(order):
        step, low, high = scale[:, block[i]], grid.qmin - zero[:, block[i]], grid.qmax - zero[:, block[i]]
        codes[:, i], near[:, i] = round_clipped(w[:, k] / step, low, high)
        error = (w[:, k] - codes[:, i] * step) / u[k, k]
        w[:, k:] -= error[:, None] * u[k, k:]
    return codes, near


def round_clipped(t: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return clip(round(t)), and how far t is from where that becomes another number."""
    q = np.clip(np.rint(t), low, high)
    return q, np.minimum(
        np.where(q < high, np.abs(q + 0.5 - t), np.inf), np.where(q > low, np.abs(t - q + 0.5), np.inf)
    )


# COMQ -----------------------------------------------------------------------------------------------------------------


class Objective:
    """Compute what `solve_comq` minimizes, in float64: D H D^T + D E W^T for D = W - Wq, with the ridge in H."""

    def __init__(self, weight: np.ndarray, moments: Moments, ridge: float = RIDGE, whole: bool = False) -> None:
        """Keep the terms; whole: all of the mismatch, D H D^T + 2 D E W^T, as for the last scales."""
        self.weight, n = weight.astype(np.float64), moments.gram.shape[1]
        added = ridge * np.einsum("gii->g", moments.gram) / n
        # what is left of a constant input
        added = np.maximum(added, 1e-6 * (moments.mean**2).sum(axis=1))
        self.h = moments.gram + np.where(added > 0, added, 1)[:, None, None] * np.eye(n)
        cross = np.zeros_like(moments.gram) if moments.cross is None else moments.cross
        self.pull = (1 + whole) * self.weight @ cross.swapaxes(1, 2)

    def __call__(self, quantized: np.ndarray) -> np.ndarray:
        """Compute the objective of each channel: [groups, out]."""
        d = self.weight - quantized.astype(np.float64)
        return ((d @ self.h) * d + d * self.pull).sum(axis=-1)

    def gradient(self, quantized: np.ndarray) -> np.ndarray:
        """Compute V = D H + W E^T / 2: [groups, out, in]."""
        return (self.weight - quantized.astype(np.float64)) @ self.h + self.pull / 2

    def optimum(self) -> np.ndarray:
        """Return the weight with the least objective: [groups, out, in]."""
        return self.weight + np.linalg.solve(self.h, self.pull.swapaxes(1, 2) / 2).swapaxes(1, 2)

    def terms(self, quantized: np.ndarray) -> np.ndarray:
        """Add up the sizes of the terms of the objective, of which float32 may lose some eps: [groups, out]."""
        d = np.abs(self.weight - quantized)
        return ((d @ np.abs(self.h)) * d + d * np.abs(self.pull)).sum(axis=-1)

    def after_one_step(self, quantized: np.ndarray, channel: tuple[int, int], i: int, by: float) -> float:
        """Return by how much one channel's objective changes when the weight of its input i does."""
        moved = quantized.astype(np.float64)
        before = self(moved)[channel]
        moved[(*channel, i)] += by
        return float(self(moved)[channel] - before)

    def after_any_step(self, quantized: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Return the same for every input of every channel, a step down and a step up: [2, groups, out, in]."""
        slope = 2 * self.gradient(quantized)
        curved = step**2 * np.einsum("gii->gi", self.h)[:, None]
        return np.stack([curved + step * slope, curved - step * slope])


def lower_factor(h: np.ndarray) -> np.ndarray:
    """Return M, lower triangular, with H = M^T M."""
    return np.linalg.cholesky(h.astype(np.float64)[::-1, ::-1]).T[::-1, ::-1]


def babai(
    h: np.ndarray, optimum: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Round by Babai: q_i = clip(round(t_i / scale)), t_i = w*_i + sum_{k<i} M_ik / M_ii (w*_k - wq_k).

    optimum, scale, low, high: [channels, in]

    Returns the codes [channels, in], and how near each came to a tie.
    """
    m = lower_factor(h)
    wanted = optimum.astype(np.float64)
    codes, near, gap = np.empty_like(wanted), np.empty_like(wanted), np.zeros_like(wanted)
    for i in range(len(h)):
        t = wanted[:, i] + gap[:, :i] @ m[i, :i] / m[i, i]
        codes[:, i], near[:, i] = round_clipped(t / scale[:, i], low[:, i], high[:, i])
        gap[:, i] = wanted[:, i] - codes[:, i] * scale[:, i]
    return codes, near


def beam(
    h: np.ndarray, optimum: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray, width: int
) -> list[tuple[float, list[float]]]:
    """Return the losses || M (w* - wq) ||^2 and codes of one channel's `width` roundings, the best first.

    Each rounding goes on with the nearest code and the one on the other side of its target; the best `width` live on.
    """
    m = lower_factor(h)
    alive: list[tuple[float, list[float]]] = [(0.0, [])]
    for i in range(len(h)):
        born = []
        for loss, codes in alive:
            gap = optimum[:i] - np.asarray(codes) * scale[:i]
            t = optimum[i] + m[i, :i] @ gap / m[i, i]
            near = float(np.clip(np.rint(t / scale[i]), low[i], high[i]))
            for q in (near, near + (1 if t > near * scale[i] else -1)):
                if low[i] <= q <= high[i]:
                    born.append((loss + float(m[i, i] * (t - q * scale[i])) ** 2, [*codes, q]))
        alive = sorted(born, key=lambda one: one[0])[:width]
    return alive


def sweep(
    h: np.ndarray, pull: np.ndarray, w: np.ndarray, q: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, float]:
    """Set q_i <- clip(round(q_i + V_i / (scale H_ii))) once over one channel's codes [in], V = H (w - wq) + b.

    Returns the codes, and how near one came to a tie.
    """
    q, near = q.astype(np.float64), np.inf
    for i in range(len(q)):
        v = h[i].astype(np.float64) @ (w - q * scale) + pull[i]
        (q[i],), (one,) = round_clipped(np.asarray([q[i] + v / (scale[i] * h[i, i])]), low[i], high[i])
        near = min(near, float(one))
    return q, near


def best_first(
    h: np.ndarray, pull: np.ndarray, w: np.ndarray, q: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray,
    tolerance: float,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Move one code by one, the move first that lowers the objective most.

    Moves end when the objective falls by less than `tolerance` of the code's curvature.

    Returns the codes, and the least margin of a decision over the next best, in units of the curvature.
    """
    q, near = q.astype(np.float64), np.inf
    own = np.diag(h).astype(np.float64) * scale**2
    while True:
        v = h.astype(np.float64) @ (w - q * scale) + pull
        up = np.where(q < high, 2 * scale * v - own, -np.inf)
        down = np.where(q > low, -2 * scale * v - own, -np.inf)
        gains = np.maximum(up, down)
        i, order = int(np.argmax(gains)), np.sort(gains)
        stop = gains[i] <= tolerance * own[i]
        near = min(near, abs(gains[i] / own[i] - tolerance))
        if stop:
            return q, near
        if len(q) > 1:
            near = min(near, float(order[-1] - order[-2]) / own[i])
        q[i] += 1 if up[i] > down[i] else -1


def bit_planes(
    h: np.ndarray, pull: np.ndarray, w: np.ndarray, q: np.ndarray, scale: np.ndarray, low: np.ndarray, high: np.ndarray,
    count: int,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Refine each of the `count` bit planes of one channel's codes [in] once, the highest first.

    alpha_b <- alpha_b + <t_b, V> / <t_b, H t_b>, then a sweep of the plane.

    Returns the codes without the alphas, and how near one came to a tie.
    """
    h, near = h.astype(np.float64), np.inf
    planes = [np.sign(q) * (np.abs(q).astype(int) >> b & 1) for b in range(count)]
    values = [plane * 2.0**b * scale for b, plane in enumerate(planes)]
    for b in reversed(range(count)):
        v, norm = h @ (w - sum(values)) + pull, values[b] @ h @ values[b]
        by = values[b] @ v / norm if norm > 0 else 0.0
        step = scale * 2.0**b * (1 + (by if abs(by) < 0.5 else 0.0))
        rest = w - sum(values) + values[b]
        planes[b], one = sweep(h, pull, rest, planes[b], step, np.full(len(q), -1.0), np.full(len(q), 1.0))
        values[b], near = planes[b] * step, min(near, one)
    return np.clip(sum(plane * 2.0**b for b, plane in enumerate(planes)), low, high), near


def every_code(low: int, high: int, n: int) -> np.ndarray:
    """Return all vectors of n codes: [(high - low + 1)^n, n]."""
    return np.asarray(list(itertools.product(range(low, high + 1), repeat=n)), np.float64)


def steps(n: int, pairs: bool = True) -> Iterator[np.ndarray]:
    """Yield all moves of one code by one, and of two codes by one each: [in]."""
    one = [(i, by) for i in range(n) for by in (-1, 1)]
    for k, (i, by) in enumerate(one):
        move = np.zeros(n)
        move[i] = by
        yield move
        for j, other in one[k + 1 :] if pairs else []:
            if j != i:
                both = move.copy()
                both[j] = other
                yield both
