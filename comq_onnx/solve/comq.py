"""Solve by the default method: COMQ from a Babai start, on the ridged half-mismatch objective (problem.py).

The paper's two closed forms are its moves: a code q_i <- clip(round(q_i + V_i / (scale H_ii))) and a scale
<q, H w*> / <q, H q>. Beyond the paper are

- the start: Babai (GPTQ) rounding at several scales and zero points, each channel keeping its best after the closed
  form of the scale (rounding.py);
- sweeps that cost only what changes, and at the end moves of one and two codes, best first (descent.py);
- scales per block refitted together, by least squares (descent.py);
- at the end one scale a channel for the whole mismatch (descent.py);
- the ridge, chosen on halves of the samples (ridge.py);
- at effort max, a beam of roundings (rounding.py) and bit-split refinement (bitsplit.py), kept where the objective
  falls;
- near-exact codes where a channel has few inputs (few_inputs.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from comq_onnx.solve.bitsplit import refine
from comq_onnx.solve.descent import descend, refit_to_float
from comq_onnx.solve.effort import EFFORTS, Effort
from comq_onnx.solve.few_inputs import has_few_inputs, solve_few_inputs
from comq_onnx.solve.grid import Array, Grid, QuantizedWeight, fit_mse
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.parallel import channel_slices, map_in_threads, single_threaded_blas
from comq_onnx.solve.problem import RIDGE, Part, Problem, arrange, pose, take_part
from comq_onnx.solve.ridge import choose_ridge
from comq_onnx.solve.rounding import Rounding, babai_codes, beam, best_start, better_of

GPTQ_RIDGE = 0.01


# makes the problem of each group, for a grid and a ridge
Posing = Callable[[Grid, float], list[Problem]]


def solve_comq(
    weight: Array, moments: Moments, grid: Grid, effort: str | Effort = "default", posing: Posing | None = None
) -> QuantizedWeight:
    """Quantize a weight [groups, out, in].

    moments: about the mean where a bias takes the mean of the error
    effort: a name in EFFORTS, or an Effort
    posing: what `pose_once` gives for the moments, where several weights or grids are solved on them
    """
    search = EFFORTS[effort] if isinstance(effort, str) else effort
    if has_few_inputs(weight.shape[-1], grid):
        return solve_few_inputs(weight, moments, grid, _ridge(weight, moments, grid, search), *fit_mse(weight, grid))
    return solve_posed(weight, pose_comq(weight, moments, grid, search, posing), grid, search)


def pose_comq(
    weight: Array, moments: Moments, grid: Grid, effort: Effort, posing: Posing | None = None
) -> list[Problem]:  # fmt: skip
    """Choose the ridge for a weight, and make the problem of each group."""
    return (posing or pose_once(moments))(grid, _ridge(weight, moments, grid, effort))


def solve_posed(weight: Array, problems: Sequence[Problem], grid: Grid, search: Effort) -> QuantizedWeight:
    """Quantize a weight [groups, out, in], or some channels of it from a multiple of PART on, which gives the same.

    problems: that of each group
    """
    scale, zero = fit_mse(weight, grid)
    tasks = [(g, channels) for g in range(len(weight)) for channels in channel_slices(weight.shape[1])]

    def take(g: int, channels: slice) -> Part:
        return take_part(problems[g], weight[g, channels], zero[g, channels].astype(np.float32))

    # those that share scales together: every choice is made on their sums
    sharing: list[list[tuple[int, slice]]] = [[task] for task in tasks]
    if grid.per_tensor:
        sharing = [tasks]
    elif grid.tied:
        sharing = [[(g, channels) for g in range(len(weight))] for channels in channel_slices(weight.shape[1])]
    found = map_in_threads(
        lambda some: _solve_parts([take(*task) for task in some], [scale[task] for task in some], search), sharing
    )
    pairs = zip(itertools.chain(*sharing), itertools.chain(*found), strict=True)
    return _assemble(weight, grid, [(g, p, problems[g], one) for (g, p), one in pairs])


def solve_gptq(weight: Array, moments: Moments, grid: Grid) -> QuantizedWeight:
    """Quantize a weight [groups, out, in] by GPTQ as it is commonly run: one pass of rounding, ridge GPTQ_RIDGE.

    Grid, clip and Gram are those of `solve_comq`; arXiv 2210.17323.
    """
    scale, zero = fit_mse(weight, grid)
    alone = Moments(moments.gram, moments.mean, moments.count)
    solved = []
    with single_threaded_blas():
        for g in range(len(weight)):
            problem = pose(arrange(alone.group(g)), grid, GPTQ_RIDGE)
            part = take_part(problem, weight[g], zero[g].astype(np.float32))
            codes, _ = babai_codes(problem, part.whole(), np.ascontiguousarray(scale[g].T), part.zero.T.copy())
            one = Rounding(codes.T, scale[g], part.zero, np.zeros(len(weight[g]), np.float32))
            solved.append((g, slice(None), problem, one))
    return _assemble(weight, grid, solved)


def pose_once(moments: Moments) -> Posing:
    """Return what makes the problems of moments for any grid: each ridge is factored once."""
    posed: dict[float, list[Problem]] = {}

    def on(grid: Grid, ridge: float) -> list[Problem]:
        if ridge not in posed:
            posed[ridge] = _pose_groups(moments, grid, ridge)
        return [problem.on(grid) for problem in posed[ridge]]

    return on


def _ridge(weight: Array, moments: Moments, grid: Grid, effort: Effort) -> float:
    return choose_ridge(weight, moments, grid) if effort.choose_ridge else RIDGE


def _pose_groups(moments: Moments, grid: Grid, ridge: float) -> list[Problem]:
    """Make the problem of each group."""
    groups = len(moments.gram)
    if groups == 1:
        with single_threaded_blas():
            return [pose(arrange(moments), grid, ridge)]
    return map_in_threads(lambda g: pose(arrange(moments.group(g)), grid, ridge), range(groups))


def _solve_parts(parts: Sequence[Part], scales: Sequence[Array], effort: Effort) -> list[Rounding]:
    """Return the best roundings of parts, from their MSE-best scales [channels, blocks].

    The parts share their scales: all of them one, or each channel its own with the same channel of the others.
    """
    wholes = [part.whole() for part in parts]
    best = descend(parts, best_start(parts, wholes, scales, effort), effort)
    if effort.beam:
        wide = [beam(part, whole, one, effort.beam) for part, whole, one in zip(parts, wholes, best, strict=True)]
        best = better_of(parts, best, descend(parts, wide, effort))
    if effort.bit_split:
        split = [replace(one, codes=refine(part, one.codes, one.scale, one.zero))
                 for part, one in zip(parts, best, strict=True)]  # fmt: skip
        best = better_of(parts, best, descend(parts, split, effort))
    return refit_to_float(parts, best)


def _assemble(weight: Array, grid: Grid, solved: Sequence[tuple[int, slice, Problem, Rounding]]) -> QuantizedWeight:
    """Put the roundings (group, channels, problem, rounding) together, inputs in the layer's order."""
    codes = np.empty(weight.shape, np.int8)
    blocks = grid.blocks(weight.shape[-1])
    scale = np.empty((*weight.shape[:2], blocks), np.float32)
    zero = np.empty((*weight.shape[:2], blocks), np.int8)
    for g, channels, problem, one in solved:
        scale[g, channels], zero[g, channels] = one.scale, one.zero
        back = np.empty_like(one.codes)
        back[:, problem.order] = one.codes + one.zero[:, problem.block]
        codes[g, channels] = back
    return QuantizedWeight(codes, scale, zero, grid)
