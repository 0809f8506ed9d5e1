"""Solve as the authors of COMQ do (arXiv 2403.07134), on the Gram of the inputs: the baseline.

From Q = W (float) and the scale of the span of W, K sweeps of the two closed forms

    q_i <- clip(round((V_i + G_ii wq_i) / (scale G_ii))),    scale <- <q, G w> / <q, G q>,    V = (W - Wq) G

Each channel's inputs are visited in decreasing order of ||x_i|| |w_i| (`greedy`) or as they lie (`cyclic`). A
per-tensor grid is the paper's per-layer variant.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from comq_onnx.solve import kernels
from comq_onnx.solve.grid import Array, Grid, QuantizedWeight, fit_minmax
from comq_onnx.solve.moments import Matrix, Moments
from comq_onnx.solve.parallel import channel_slices, map_in_threads, single_threaded_blas

ORDERS = ("greedy", "cyclic")
SWEEPS = 3
# the authors' factors on the initial scale for few bits (arXiv 2403.07134, section 4)
SHRINK = {2: 0.65, 3: 0.8}


def solve_paper(
    weight: Array,
    moments: Moments,
    grid: Grid,
    order: str = "greedy",
    sweeps: int = SWEEPS,
    shrink: float | None = None,
) -> QuantizedWeight:
    """Quantize a weight [groups, out, in].

    order: one of ORDERS
    sweeps: how often all codes are visited
    shrink: the factor on the initial scale; None for that of SHRINK
    """
    scale, zero_point = fit_minmax(weight, grid, SHRINK.get(grid.bits, 1.0) if shrink is None else shrink)
    block = grid.block_of(weight.shape[-1])
    grams = moments.gram.astype(np.float32)
    wq, v = weight.copy(), np.zeros_like(weight)  # V = (W - Wq) G
    q = np.zeros_like(weight)

    def sweep(task: tuple[int, slice]) -> None:
        g, p = task
        kernels.paper_sweep(
            v[g, p], grams[g], _visits(weight[g, p], grams[g], order), scale[g, p], zero_point[g, p].astype(np.float32),
            block, np.float32(grid.qmin), np.float32(grid.qmax), q[g, p], wq[g, p],
        )  # fmt: skip

    for _ in range(sweeps):
        map_in_threads(sweep, [(g, p) for g in range(len(weight)) for p in channel_slices(weight.shape[1])])
        with single_threaded_blas():
            scale = _fit_scale(weight, q, scale, grams, grid)
            wq = q * scale[..., block]
            v = np.matmul(weight - wq, grams)
    return QuantizedWeight((q + zero_point[..., block]).astype(np.int8), scale, zero_point, grid)


def _visits(weight: Array, gram: Array, order: str) -> npt.NDArray[np.intp]:
    """Return the inputs of each channel in the order in which they are visited: [out, in]."""
    if order == "cyclic":
        return np.tile(np.arange(weight.shape[1]), (weight.shape[0], 1))
    return np.argsort(-np.abs(weight) * np.sqrt(np.maximum(np.diag(gram), 0)), axis=1, kind="stable")


def _fit_scale(weight: Array, q: Array, scale: Array, grams: Array, grid: Grid) -> Array:
    """Set scale <- <q, G w> / <q, G q> over a channel or the whole layer, block after block where there are several."""
    if grid.block_size is not None:
        scale = scale.copy()
        block = grid.block_of(weight.shape[-1])
        for b in range(scale.shape[-1]):
            rest = weight - np.where(block == b, 0, q * scale[..., block])
            part = np.where(block == b, q, 0)
            above, below = _pooled(_dot(part, grams, rest), grid), _pooled(_dot(part, grams, part), grid)
            scale[..., b] = _best_scale(scale[..., b], above, below)
        return scale
    above, below = _pooled(_dot(q, grams, weight), grid), _pooled(_dot(q, grams, q), grid)
    return _best_scale(scale[..., 0], above, below)[..., None]


def _pooled(numbers: Matrix, grid: Grid) -> Matrix:
    """Return for each channel of each group [groups, out] the sum over all that share its scale."""
    axes = (0, 1) if grid.per_tensor else 0 if grid.tied else ()
    return np.broadcast_to(numbers.sum(axis=axes, keepdims=True), numbers.shape)


def _dot(left: Array, grams: Array, right: Array) -> Matrix:
    """Compute left_c^T G right_c for every channel c: [groups, out]."""
    return np.asarray(np.einsum("gmn,gmn->gm", np.matmul(left, grams), right), np.float64)


def _best_scale(scale: Array, above: Matrix, below: Matrix) -> Array:
    good = (below > 0) & (above > 0)
    return np.where(good, above / np.where(good, below, 1), scale).astype(np.float32)
