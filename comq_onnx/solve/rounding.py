"""Round one input after the other (Babai): the start of the descent, from the best of several scales and zero points.

With H = M^T M, M lower triangular, and w* the weight without a grid, input i is rounded from

    t_i = (M w*)_i / M_ii - sum_{k<i} M_ik / M_ii wq_k,    q_i = clip(round(t_i / scale))

and the objective of the codes is || M (w* - wq) ||^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx.solve import kernels
from comq_onnx.solve.effort import Effort
from comq_onnx.solve.grid import Array
from comq_onnx.solve.problem import Part, Problem, block_slices

# zero points beside the best-fitting one are tried up to so many bits, where a step is a good part of the range
ZERO_POINT_BITS = 4


@dataclass(frozen=True)
class Rounding:
    """Hold the codes of some channels, inputs in visiting order.

    codes: less the zero point, as float32, [channels, in]
    scale, zero: [channels, blocks]
    norm: <wq, H wq>, or what it was before the last codes changed, [channels]
    """

    codes: Array
    scale: Array
    zero: Array
    norm: Array


def best_start(
    parts: Sequence[Part], wholes: Sequence[Array], scales: Sequence[Array], effort: Effort
) -> list[Rounding]:
    """Round each channel at the best of several zero points, then at the best of several multiples of its scale.

    wholes: Part.whole() of each part
    scales: [channels, blocks] of each part
    """
    zeros = [part.zero for part in parts]
    best, best_loss = babai(parts, wholes, scales, zeros)

    def attempt(scales: Sequence[Array], zeros: Sequence[Array]) -> None:
        nonlocal best, best_loss
        tried, loss = babai(parts, wholes, scales, zeros)
        best = [select_channels(b < a, two, one) for a, b, one, two in zip(best_loss, loss, best, tried, strict=True)]
        best_loss = [np.minimum(a, b) for a, b in zip(best_loss, loss, strict=True)]

    grid = parts[0].problem.grid
    if effort.zero_points and not grid.symmetric and grid.bits <= ZERO_POINT_BITS:
        for by in (-1, 1):
            attempt(scales, [np.clip(zero + np.float32(by), grid.qmin, grid.qmax) for zero in zeros])
    zeros = [one.zero for one in best]
    for factor in effort.factors:
        attempt([scale * np.float32(factor) for scale in scales], zeros)
    return best


def babai(
    parts: Sequence[Part], wholes: Sequence[Array], scales: Sequence[Array], zeros: Sequence[Array]
) -> tuple[list[Rounding], list[Array]]:
    """Round at the given scales and zero points, then set each scale to its closed form.

    Returns the roundings, and || M (w* - wq) ||^2 of each channel.
    """
    rounded = [
        babai_codes(part.problem, whole, np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T))
        for part, whole, scale, zero in zip(parts, wholes, scales, zeros, strict=True)
    ]
    found, losses = [], []
    pooled = pool_if_shared(parts, [sums for _, sums in rounded])
    for (codes, own), (loss, cross, norm), scale, zero in zip(rounded, pooled, scales, zeros, strict=True):
        by = common_factor(cross, norm)
        found.append(Rounding(np.ascontiguousarray(codes.T), scale * (1 + by)[:, None], zero, own[2] * (1 + by) ** 2))
        losses.append(loss - 2 * by * cross + by * by * norm)
    return found, losses


def babai_codes(problem: Problem, whole: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
    """Return the codes [in, channels] of Babai rounding, and the sums [3, channels] of kernels.babai_block.

    Inside a block of inputs one is rounded after the other; what earlier blocks took is one matrix product.

    whole: Part.whole(), [in, channels]
    scale, zero: [blocks, channels]
    """
    codes, wq = np.empty_like(whole), np.empty_like(whole)
    sums = np.zeros((3, whole.shape[1]), np.float32)
    for here in block_slices(len(whole)):
        target = whole[here] - problem.unit[here, : here.start] @ wq[: here.start]
        kernels.babai_block(
            whole[here], target, np.ascontiguousarray(problem.unit[here, here]), scale, zero, problem.block[here],
            *problem.bounds, problem.root[here], codes[here], wq[here], sums,
        )  # fmt: skip
    return codes, sums


def beam(part: Part, whole: Array, start: Rounding, width: int) -> Rounding:
    """Keep `width` roundings of each channel side by side, at the scale of `start`, and return the best of them."""
    problem, (n, channels) = part.problem, whole.shape
    scale, zero = np.ascontiguousarray(start.scale.T), np.ascontiguousarray(start.zero.T)
    codes, wq = np.empty((2, n, channels, width), np.float32)
    loss = np.full((channels, width), np.inf, np.float32)
    loss[:, 0] = 0
    origin = np.empty((channels, width), np.intp)
    for here in block_slices(n):
        before = slice(0, here.start)
        taken = problem.unit[here, before] @ wq[before].reshape(here.start, channels * width)
        kernels.beam_block(
            whole[here][..., None] - taken.reshape(-1, channels, width),
            np.ascontiguousarray(problem.unit[here, here]), scale, zero, problem.block[here], *problem.bounds,
            problem.root[here], codes[here], wq[here], loss, origin,
        )  # fmt: skip
        for history in (codes, wq):
            history[before] = np.take_along_axis(history[before], origin[None], axis=2)
    return replace(start, codes=np.ascontiguousarray(codes[..., 0].T))


# Comparing roundings --------------------------------------------------------------------------------------------------


def pool_if_shared(parts: Sequence[Part], values: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Return a number for each channel [..., channels]: the sum over all channels of all parts that share a scale."""
    grid = parts[0].problem.grid
    if not (grid.per_tensor or grid.tied):
        return list(values)
    axes = -1 if grid.per_tensor else ()
    total = sum(value.sum(axis=axes, keepdims=True, dtype=np.float64) for value in values)
    return [np.broadcast_to(total, value.shape).astype(value.dtype) for value in values]


def better_of(parts: Sequence[Part], first: Sequence[Rounding], second: Sequence[Rounding]) -> list[Rounding]:
    """Return of two roundings the one with the lower objective, channel by channel; the first where they are equal."""
    before, after = (
        pool_if_shared(
            parts, [part.objective(one.codes, one.scale) for part, one in zip(parts, roundings, strict=True)]
        )
        for roundings in (first, second)
    )
    return [select_channels(b < a, two, one) for a, b, one, two in zip(before, after, first, second, strict=True)]


def select_channels(mask: npt.NDArray[np.bool_], one: Rounding, other: Rounding) -> Rounding:
    """Return the channels of `one` where the mask [channels] holds, of `other` elsewhere."""
    pick = mask[:, None]
    return Rounding(
        np.where(pick, one.codes, other.codes),
        np.where(pick, one.scale, other.scale),
        np.where(pick, one.zero, other.zero),
        np.where(mask, one.norm, other.norm),
    )


def common_factor(slope: Array, norm: Array) -> Array:
    """Return <wq, V> / <wq, H wq>, by which share all scales of a channel should grow; 0 where it is not below 1/2."""
    with np.errstate(divide="ignore", invalid="ignore"):
        by = slope / norm
    return np.where((norm > 0) & (np.abs(by) < 0.5), by, 0).astype(np.float32)
