"""The default solver: COMQ from a Babai start, on the ridged half-mismatch objective (problem.py).

The paper's two closed forms are its moves: a code q_i <- clip(round(q_i + V_i / (scale H_ii))) and a scale
<q, H w*> / <q, H q>. Beyond the paper are

- the start: Babai (GPTQ) rounding t_i = w*_i + (1 / M_ii) sum_{k<i} M_ik (w*_k - wq_k) at several scales and zero
  points, each channel keeping its best after the closed form of the scale;
- sweeps that cost only what changes, and at the end moves of one and two codes, best first;
- scales per block refitted together, by least squares;
- the ridge, chosen on halves of the samples;
- at effort max, a beam of roundings and bit-split refinement (bitsplit.py), kept where the objective falls;
- near-exact codes where a channel has few inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx.solve import kernels
from comq_onnx.solve.bitsplit import refine
from comq_onnx.solve.grid import Array, Codes, Grid, QuantizedWeight, fit_mse
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.parallel import each, parts, single_threaded_blas
from comq_onnx.solve.problem import BLOCK, RIDGE, Arranged, Part, Problem, arrange, pose, take_part, visiting_order

# problems of at most so many inputs are solved near-exactly
SMALL = 32
SMALL_SCALE_CANDIDATES = np.append(np.linspace(0.6, 1.3, 24), 1.0)
FLIP_TOLERANCE = 1e-4
GPTQ_RIDGE = 0.01
# the ridges that are tried: from the middle outwards as long as the error on the other half falls
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
RIDGE_CHANNELS, RIDGE_GROUPS = 96, 4
# zero points beside the best-fitting one are tried where a step is a good part of the range
ZERO_POINT_BITS = 4


@dataclass(frozen=True)
class Effort:
    """How long to search: factors on the scale beside 1, further rounds of sweeps and refits, codes among which pairs
    are sought (0: none), width of the beam (0: none); descend False stops at the start."""

    factors: tuple[float, ...]
    rounds: int
    pairs: int = 0
    beam: int = 0
    bit_split: bool = False
    choose_ridge: bool = True
    zero_points: bool = True
    descend: bool = True


EFFORTS = {
    "fast": Effort((), 0, choose_ridge=False, zero_points=False),
    "default": Effort((0.8, 0.88, 0.95, 1.06, 1.13), 0, pairs=24),
    "max": Effort((0.7, 0.76, 0.81, 0.85, 0.89, 0.93, 0.97, 1.03, 1.07, 1.12, 1.18), 3, 64, 8, True),
}


@dataclass(frozen=True)
class Rounding:
    """Some channels' codes less the zero point [channels, in], in visiting order, as float32; scale and zero
    [channels, blocks]; norm [channels] is <wq, H wq>, or was before the last codes changed."""

    codes: Array
    scale: Array
    zero: Array
    norm: Array


def solve_comq(weight: Array, moments: Moments, grid: Grid, effort: str | Effort = "default") -> QuantizedWeight:
    """Quantize a weight [groups, out, in]: see the module. effort: a name in EFFORTS, or one of another make."""
    scale, zero = fit_mse(weight, grid)
    search = EFFORTS[effort] if isinstance(effort, str) else effort
    ridge = choose_ridge(weight, moments, grid) if search.choose_ridge else RIDGE
    if weight.shape[-1] <= SMALL and not grid.per_tensor and scale.shape[-1] == 1:
        return _solve_small(weight, moments, grid, ridge, scale, zero)
    groups = range(len(weight))
    channels = parts(weight.shape[1])
    if len(weight) == 1:
        with single_threaded_blas():
            problems = [pose(arrange(moments), grid, ridge)]
    else:
        problems = each(lambda g: pose(arrange(moments.group(g)), grid, ridge), groups)
    tasks = [(g, p) for g in groups for p in channels]

    def begin(g: int, p: slice) -> tuple[Part, Array]:
        part = take_part(problems[g], weight[g, p], zero[g, p].astype(np.float32))
        return part, scale[g, p]

    if grid.per_tensor:
        # one scale for all: every choice is made on their sums
        with single_threaded_blas():
            taken, scales = zip(*(begin(g, p) for g, p in tasks), strict=True)
            solved = _solve_parts(taken, scales, search)
    else:

        def alone(task: tuple[int, slice]) -> Rounding:
            part, own = begin(*task)
            return _solve_parts([part], [own], search)[0]

        solved = each(alone, tasks)
    return _assemble(weight, grid, [(g, p, problems[g], one) for (g, p), one in zip(tasks, solved, strict=True)])


def _assemble(weight: Array, grid: Grid, solved: Sequence[tuple[int, slice, Problem, Rounding]]) -> QuantizedWeight:
    """The roundings of all parts as one weight, inputs in their own order."""
    codes = np.empty(weight.shape, np.int8)
    blocks = grid.blocks(weight.shape[-1])
    scale = np.empty((*weight.shape[:2], blocks), np.float32)
    zero = np.empty((*weight.shape[:2], blocks), np.int8)
    for g, p, problem, one in solved:
        scale[g, p], zero[g, p] = one.scale, one.zero
        back = np.empty_like(one.codes)
        back[:, problem.order] = one.codes + one.zero[:, problem.block]
        codes[g, p] = back
    return QuantizedWeight(codes, scale, zero, grid)


def _solve_parts(taken: Sequence[Part], scales: Sequence[Array], search: Effort) -> list[Rounding]:
    """The best roundings of parts from their MSE-fit scales [channels, blocks]; the parts share one scale where the
    grid is per tensor, otherwise there is one of them."""
    wholes = [part.whole() for part in taken]
    best = _descend(taken, _start(taken, wholes, scales, search), search)
    if search.beam:
        wide = [_beam(part, whole, one, search.beam) for part, whole, one in zip(taken, wholes, best, strict=True)]
        best = _better(taken, best, _descend(taken, wide, search))
    if search.bit_split:
        split = [replace(one, codes=refine(part, one.codes, one.scale, one.zero))
                 for part, one in zip(taken, best, strict=True)]  # fmt: skip
        best = _better(taken, best, _descend(taken, split, search))
    return best


def _pooled(taken: Sequence[Part], values: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """A number for each channel [..., channels]; the sum over all channels of all parts where they share a scale."""
    if not taken[0].problem.grid.per_tensor:
        return list(values)
    total = sum(value.sum(axis=-1, keepdims=True, dtype=np.float64) for value in values)
    return [np.broadcast_to(total, value.shape).astype(value.dtype) for value in values]


def _better(taken: Sequence[Part], first: Sequence[Rounding], second: Sequence[Rounding]) -> list[Rounding]:
    """Of two roundings, the one with the lower objective, channel by channel."""
    before, after = (
        _pooled(taken, [part.objective(one.codes, one.scale) for part, one in zip(taken, roundings, strict=True)])
        for roundings in (first, second)
    )
    return [_merge(b < a, two, one) for a, b, one, two in zip(before, after, first, second, strict=True)]


def _merge(mask: npt.NDArray[np.bool_], one: Rounding, other: Rounding) -> Rounding:
    """The channels of `one` where the mask holds, of `other` elsewhere."""
    pick = mask[:, None]
    return Rounding(
        np.where(pick, one.codes, other.codes),
        np.where(pick, one.scale, other.scale),
        np.where(pick, one.zero, other.zero),
        np.where(mask, one.norm, other.norm),
    )


# The start ------------------------------------------------------------------------------------------------------------


def _start(taken: Sequence[Part], wholes: Sequence[Array], scales: Sequence[Array], search: Effort) -> list[Rounding]:
    """Babai-rounded codes at the best of several zero points and multiples of the scale, each channel choosing."""
    zeros = [part.zero for part in taken]
    best, best_loss = _babai(taken, wholes, scales, zeros)

    def attempt(scales: Sequence[Array], zeros: Sequence[Array]) -> None:
        nonlocal best, best_loss
        tried, loss = _babai(taken, wholes, scales, zeros)
        best = [_merge(b < a, two, one) for a, b, one, two in zip(best_loss, loss, best, tried, strict=True)]
        best_loss = [np.minimum(a, b) for a, b in zip(best_loss, loss, strict=True)]

    grid = taken[0].problem.grid
    if search.zero_points and not grid.symmetric and grid.bits <= ZERO_POINT_BITS:
        for by in (-1, 1):
            attempt(scales, [np.clip(zero + np.float32(by), grid.qmin, grid.qmax) for zero in zeros])
    zeros = [one.zero for one in best]
    for factor in search.factors:
        attempt([scale * np.float32(factor) for scale in scales], zeros)
    return best


def _babai(
    taken: Sequence[Part], wholes: Sequence[Array], scales: Sequence[Array], zeros: Sequence[Array]
) -> tuple[list[Rounding], list[Array]]:
    """q_i = clip(round(t_i / scale)), t_i = (M w*)_i / M_ii - sum_{k<i} M_ik / M_ii wq_k, then the scale's closed form.

    Returns the roundings and || M (w* - wq) ||^2 of each channel.
    """
    rounded = [
        _round_all(part.problem, whole, np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T))
        for part, whole, scale, zero in zip(taken, wholes, scales, zeros, strict=True)
    ]
    found, losses = [], []
    sums = _pooled(taken, [sums for _, sums in rounded])
    for (codes, own), (loss, cross, norm), scale, zero in zip(rounded, sums, scales, zeros, strict=True):
        by = _common_factor(cross, norm)
        found.append(Rounding(np.ascontiguousarray(codes.T), scale * (1 + by)[:, None], zero, own[2] * (1 + by) ** 2))
        losses.append(loss - 2 * by * cross + by * by * norm)
    return found, losses


def _common_factor(slope: Array, norm: Array) -> Array:
    """How much larger all scales of a channel should be: <wq, V> / <wq, H wq>, 0 where that cannot be told."""
    with np.errstate(divide="ignore", invalid="ignore"):
        by = slope / norm
    return np.where((norm > 0) & (np.abs(by) < 0.5), by, 0).astype(np.float32)


def _round_all(problem: Problem, whole: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
    """The codes [in, channels] and the sums [3, channels] of Babai rounding; scale and zero [blocks, channels].

    Blocks of BLOCK inputs: inside, one input at a time; what earlier blocks took is one matrix product.
    """
    codes, wq = np.empty_like(whole), np.empty_like(whole)
    sums = np.zeros((3, whole.shape[1]), np.float32)
    for start in range(0, len(whole), BLOCK):
        here = slice(start, min(start + BLOCK, len(whole)))
        target = whole[here] - problem.unit[here, :start] @ wq[:start]
        kernels.babai_block(
            whole[here], target, np.ascontiguousarray(problem.unit[here, here]), scale, zero, problem.block[here],
            *problem.bounds, problem.root[here], codes[here], wq[here], sums,
        )  # fmt: skip
    return codes, sums


def _beam(part: Part, whole: Array, best: Rounding, width: int) -> Rounding:
    """The best of `width` roundings of each channel that are kept side by side, at the scale of `best`."""
    problem, (n, channels) = part.problem, whole.shape
    scale, zero = np.ascontiguousarray(best.scale.T), np.ascontiguousarray(best.zero.T)
    codes, wq = np.empty((2, n, channels, width), np.float32)
    loss = np.full((channels, width), np.inf, np.float32)
    loss[:, 0] = 0
    origin = np.empty((channels, width), np.intp)
    for start in range(0, n, BLOCK):
        here = slice(start, min(start + BLOCK, n))
        taken = problem.unit[here, :start] @ wq[:start].reshape(start, channels * width)
        kernels.beam_block(
            whole[here][..., None] - taken.reshape(-1, channels, width),
            np.ascontiguousarray(problem.unit[here, here]), scale, zero, problem.block[here], *problem.bounds,
            problem.root[here], codes[here], wq[here], loss, origin,
        )  # fmt: skip
        for history in (codes, wq):
            history[:start] = np.take_along_axis(history[:start], origin[None], axis=2)
    return replace(best, codes=np.ascontiguousarray(codes[..., 0].T))


# The descent ----------------------------------------------------------------------------------------------------------


def _descend(taken: Sequence[Part], start: Sequence[Rounding], search: Effort) -> list[Rounding]:
    """Sweep the codes and refit the scales in turn, at the end move single codes and pairs, best first. `start` keeps
    its arrays.

    One scale a channel is the best for the start's codes already, and is refitted once more at the end, where it costs
    no product; several scales are refitted together before.
    """
    if not search.descend:
        return list(start)
    now = [replace(one, codes=one.codes.copy()) for one in start]
    several = now[0].scale.shape[1] > 1
    for _ in range(search.rounds + several):
        gradients = _sweep(taken, now)
        now = _refit(taken, now, gradients)
    gradients = _sweep(taken, now)
    for part, one, v in zip(taken, now, gradients, strict=True):
        problem = part.problem
        kernels.flip(
            v, problem.h, one.scale, one.zero, problem.block, *problem.bounds, one.codes, np.float32(FLIP_TOLERANCE),
            search.pairs,
        )  # fmt: skip
    return now if several else _refit(taken, now, gradients)


def _sweep(taken: Sequence[Part], now: Sequence[Rounding]) -> list[Array]:
    """Two sweeps over the codes, in place; the gradients after them."""
    gradients = [part.gradient(one.codes, one.scale) for part, one in zip(taken, now, strict=True)]
    for part, one, v in zip(taken, now, gradients, strict=True):
        for _ in range(2):
            problem = part.problem
            kernels.sweep(v, problem.h, one.scale, one.zero, problem.block, *problem.bounds, one.codes)
    return gradients


def _refit(taken: Sequence[Part], now: Sequence[Rounding], gradients: Sequence[Array]) -> list[Rounding]:
    """The best scales for fixed codes, from the gradient at the present ones: per block by least squares, else the
    closed form <q, H w*> / <q, H q> = scale (1 + <wq, V> / <wq, H wq>)."""
    if now[0].scale.shape[1] > 1:
        return [_refit_blocks(part, one, v) for part, one, v in zip(taken, now, gradients, strict=True)]
    slopes = [np.einsum("cn,cn->c", one.codes * one.scale, v) for one, v in zip(now, gradients, strict=True)]
    factors = [
        _common_factor(slope, norm)
        for slope, norm in zip(_pooled(taken, slopes), _pooled(taken, [one.norm for one in now]), strict=True)
    ]
    return [replace(one, scale=one.scale * (1 + by)[:, None], norm=one.norm * (1 + by) ** 2)
            for one, by in zip(now, factors, strict=True)]  # fmt: skip


def _refit_blocks(part: Part, one: Rounding, v: Array) -> Rounding:
    """All scales of a channel at once: with q_b the codes of block b, the changes d solve

        sum_a <q_b, H q_a> d_a = <q_b, V>

    kept for the channels whose objective falls and whose scales stay positive.
    """
    problem, blocks = part.problem, one.scale.shape[1]
    rows = [np.flatnonzero(problem.block == b) for b in range(blocks)]
    by_block = np.concatenate(rows)
    edges = np.concatenate([[0], np.cumsum([len(r) for r in rows])[:-1]])
    codes = np.ascontiguousarray(one.codes[:, by_block])
    products = np.empty((len(codes), blocks, blocks), np.float32)
    for b, r in enumerate(rows):
        image = one.codes[:, r] @ problem.h[np.ix_(r, by_block)]
        products[:, b] = np.add.reduceat(image * codes, edges, axis=1)
    slopes = np.add.reduceat(v[:, by_block] * codes, edges, axis=1)
    diagonal = np.einsum("cbb->cb", products)
    # blocks of zeros, and blocks that say the same
    diagonal += 1e-4 * diagonal.mean(axis=1, keepdims=True) + np.float32(np.finfo(np.float32).tiny)
    change = np.linalg.solve(products.astype(np.float64), slopes[..., None].astype(np.float64))[..., 0]
    moved = (one.scale + change).astype(np.float32)
    gain = 2 * np.einsum("cb,cb->c", change, slopes) - np.einsum("ca,cab,cb->c", change, products, change)
    good = (gain > 0) & ((moved > 0.5 * one.scale) & (moved < 2 * one.scale)).all(axis=1)
    return replace(one, scale=np.where(good[:, None], moved, one.scale))


def solve_gptq(weight: Array, moments: Moments, grid: Grid) -> QuantizedWeight:
    """GPTQ as it is commonly run, on the same grid, clip and Gram: one pass of rounding, ridge GPTQ_RIDGE."""
    scale, zero = fit_mse(weight, grid)
    alone = Moments(moments.gram, moments.mean, moments.count)
    solved = []
    with single_threaded_blas():
        for g in range(len(weight)):
            problem = pose(arrange(alone.group(g)), grid, GPTQ_RIDGE)
            part = take_part(problem, weight[g], zero[g].astype(np.float32))
            codes, _ = _round_all(problem, part.whole(), np.ascontiguousarray(scale[g].T), part.zero.T.copy())
            one = Rounding(codes.T, scale[g], part.zero, np.zeros(len(weight[g]), np.float32))
            solved.append((g, slice(None), problem, one))
    return _assemble(weight, grid, solved)


# The ridge ------------------------------------------------------------------------------------------------------------


def choose_ridge(weight: Array, moments: Moments, grid: Grid) -> float:
    """The ridge with which codes found on one half of the samples do best on the other; RIDGE without halves.

    A few channels of a few groups, Babai-rounded at the MSE-best scale; every other ridge of RIDGES from RIDGE on,
    outwards as long as the error falls. weight [groups, out, in].
    """
    if not moments.has_folds:
        return RIDGE
    inputs = weight.shape[-1]
    some = spread(len(weight), RIDGE_GROUPS)
    rows = spread(weight.shape[1], -(-RIDGE_CHANNELS // len(some)))
    sample = np.ascontiguousarray(weight[np.ix_(some, rows)])
    scale, zero = fit_mse(sample, grid)
    trials: list[tuple[int, Arranged, Arranged]] = []
    for k, g in enumerate(some):
        # half the samples tell of half the inputs what all tell of all
        order = visiting_order(moments.gram[g])[:: 2 if inputs >= 2 * SMALL else 1]
        halves = moments.group(int(g)).take(order).folds()
        assert halves is not None
        first, second = (replace(arrange(half, np.arange(len(order))), order=order, inputs=inputs) for half in halves)
        trials += [(k, first, second), (k, second, first)]

    def held_out(trial: tuple[int, Arranged, Arranged], ridge: float) -> float:
        k, seen, unseen = trial
        part = take_part(pose(seen, grid, ridge), sample[k], zero[k].astype(np.float32))
        (one,), _ = _babai([part], [part.whole()], [scale[k]], [part.zero])
        judge = take_part(replace(part.problem, h=unseen.gram, mismatch=unseen.mismatch), sample[k], part.zero)
        return float(judge.objective(one.codes, one.scale).sum())

    errors: dict[float, float] = {}

    def error(ridge: float) -> float:
        if ridge not in errors:
            errors[ridge] = sum(each(lambda trial: held_out(trial, ridge), trials))
        return errors[ridge]

    k = RIDGES.index(RIDGE)
    for step in (1, -1):
        while 0 <= k + step < len(RIDGES) and error(RIDGES[k + step]) < error(RIDGES[k]):
            k += step
    return RIDGES[k]


def spread(total: int, most: int) -> npt.NDArray[np.intp]:
    """At most `most` of `total` indices, evenly spread."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).astype(np.intp))


# Few inputs -----------------------------------------------------------------------------------------------------------


def _solve_small(
    weight: Array, moments: Moments, grid: Grid, ridge: float, start_scale: Array, start_zero: Codes
) -> QuantizedWeight:
    """Problems of few inputs, all groups and channels at once: see kernels.solve_small."""
    posed = [pose(arrange(moments.group(g)), grid, ridge) for g in range(len(weight))]
    taken = [take_part(p, w, z.astype(np.float32)) for p, w, z in zip(posed, weight, start_zero, strict=True)]
    optimum = np.stack([part.optimum().T for part in taken])
    q, scale = np.empty_like(optimum), np.empty(start_scale.shape[:2], np.float32)
    kernels.solve_small(
        np.stack([p.h for p in posed]), np.stack([p.unit for p in posed]), optimum, start_scale[..., 0],
        start_zero[..., 0].astype(np.float32), grid.qmin, grid.qmax, SMALL_SCALE_CANDIDATES, q, scale,
    )  # fmt: skip
    codes = np.empty(weight.shape, np.float32)
    orders = np.stack([p.order for p in posed])
    np.put_along_axis(codes, np.broadcast_to(orders[:, None, :], codes.shape), q.swapaxes(1, 2), axis=2)
    return QuantizedWeight((codes + start_zero).astype(np.int8), scale[..., None], start_zero, grid)
