"""The slow truth: the layer objective and the solvers' steps, written on X itself in float64."""

from __future__ import annotations

import numpy as np

from comq_onnx.grid import Grid, fit_minmax
from comq_onnx.solve import PAPER_SHRINK, RIDGE, Statistics


def statistics(x: np.ndarray, x_hat: np.ndarray | None = None) -> Statistics:
    """The moments of rows x [groups, positions, in] of the float model and x_hat of the quantized one."""
    hat = (x if x_hat is None else x_hat).astype(np.float64)
    count = x.shape[1]

    def moment(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a.swapaxes(1, 2) @ b / count

    if x_hat is None:
        return Statistics(moment(hat, hat), hat.mean(axis=1), count)
    e = x - hat
    return Statistics(moment(hat, hat), hat.mean(axis=1), count, moment(hat, e), moment(e, e), e.mean(axis=1))


def relative_error(
    weight: np.ndarray,
    quantized: np.ndarray,
    x: np.ndarray,
    x_hat: np.ndarray | None = None,
    shift: np.ndarray | None = None,
) -> float:
    """||Wq X^ + shift - W X||^2 / ||W X||^2 of weights [groups, out, in], rows [groups, positions, in]."""
    hat = (x if x_hat is None else x_hat).astype(np.float64)
    wanted = x.astype(np.float64) @ weight.astype(np.float64).swapaxes(1, 2)
    got = hat @ quantized.astype(np.float64).swapaxes(1, 2)
    if shift is not None:
        got = got + shift[:, None].astype(np.float64)
    return float(((got - wanted) ** 2).sum() / max((wanted**2).sum(), np.finfo(np.float64).tiny))


def paper(weight: np.ndarray, x: np.ndarray, grid: Grid, order: str, sweeps: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """COMQ on one matrix [out, in] and its rows [positions, in]: codes less the zero point, scales [out]."""
    w, x = weight.astype(np.float64), x.astype(np.float64)
    scale, zero = fit_minmax(weight[None], grid, PAPER_SHRINK.get(grid.bits, 1.0))
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


class Objective:
    """What `solve_comq` minimizes, in float64: D H D^T + D E W^T for D = W - Wq, with the ridge in H."""

    def __init__(self, weight: np.ndarray, moments: Statistics) -> None:
        self.weight = weight.astype(np.float64)
        mean = np.einsum("gii->g", moments.gram) / moments.gram.shape[1]
        self.h = moments.gram + np.where(mean > 0, RIDGE * mean, 1)[:, None, None] * np.eye(moments.gram.shape[1])
        cross = np.zeros_like(moments.gram) if moments.cross is None else moments.cross
        self.pull = self.weight @ cross.swapaxes(1, 2)

    def __call__(self, quantized: np.ndarray) -> np.ndarray:
        """The objective of each channel: [groups, out]."""
        d = self.weight - quantized.astype(np.float64)
        return ((d @ self.h) * d + d * self.pull).sum(axis=-1)

    def after_one_step(self, quantized: np.ndarray, channel: tuple[int, int], i: int, by: float) -> float:
        """What one channel's objective changes by when its input i's weight does."""
        moved = quantized.astype(np.float64)
        before = self(moved)[channel]
        moved[(*channel, i)] += by
        return float(self(moved)[channel] - before)

    def after_any_step(self, quantized: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The same for every input of every channel, a step down and a step up: [2, groups, out, in]."""
        slope = 2 * (self.weight - quantized.astype(np.float64)) @ self.h + self.pull
        curved = step**2 * np.einsum("gii->gi", self.h)[:, None]
        return np.stack([curved + step * slope, curved - step * slope])
