"""Round one input after the other (Babai), at several scales at once: solve/rounding.py for torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from comq_onnx.solve.effort import Effort
from comq_onnx.solve.gpu.problem import Part
from comq_onnx.solve.gpu.step import step
from comq_onnx.solve.problem import BLOCK, block_slices
from comq_onnx.solve.rounding import ZERO_POINT_BITS

Tensor: TypeAlias = Any
# where no code is cut off, zero points beside one another give the same codes; as sums differ with the place of a
# column, a later candidate must be clearly better
CLEARLY_LESS = 1 - 1e-5


@dataclass(frozen=True)
class Rounding:
    """Hold the codes of some channels of all groups, inputs in visiting order.

    codes: less the zero point, [groups, in, channels]
    scale, zero: [groups, blocks, channels]
    norm: <wq, H wq>, or what it was before the last codes changed, [groups, channels]
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    norm: Tensor


def best_start(part: Part, scale: Tensor, zero: Tensor, effort: Effort) -> Rounding:
    """Round each channel at the best of several zero points, then at the best of several multiples of its scale."""
    grid = part.problem.grid
    whole = part.whole()
    zeros = [zero]
    if effort.zero_points and not grid.symmetric and grid.bits <= ZERO_POINT_BITS:
        zeros += [torch.clamp(zero + by, grid.qmin, grid.qmax) for by in (-1, 1)]
    best, loss = best_babai(part, whole, [scale] * len(zeros), zeros)
    if not effort.factors:
        return best
    scaled, other_loss = best_babai(
        part, whole, [scale * np.float32(factor) for factor in effort.factors], [best.zero] * len(effort.factors)
    )
    return select_channels(other_loss < CLEARLY_LESS * loss, scaled, best)


def best_babai(part: Part, whole: Tensor, scales: Sequence[Tensor], zeros: Sequence[Tensor]) -> tuple[Rounding, Tensor]:
    """Return the best Babai rounding of each channel and its loss, of several scales and zero points tried at once."""
    count, groups, channels = len(scales), len(whole), whole.shape[-1]
    scale, zero = torch.cat(list(scales), -1), torch.cat(list(zeros), -1)
    codes, own = babai_codes(part, scale, zero, whole)
    own = own.unflatten(-1, (count, channels))
    loss, cross, norm = pool_if_shared(part, own).unbind(1)
    by = common_factor(cross, norm)
    loss = loss - 2 * by * cross + by * by * norm
    pick = torch.zeros((groups, channels), dtype=torch.int64, device=whole.device)
    least = loss[:, 0]
    for k in range(1, count):
        better = loss[:, k] < CLEARLY_LESS * least
        pick, least = torch.where(better, k, pick), torch.where(better, loss[:, k], least)

    def picked(x: Tensor) -> Tensor:
        """Return the picked candidate of [groups, rows, count * channels]."""
        apart = x.unflatten(-1, (count, channels))
        return torch.take_along_dim(apart, pick[:, None, None], 2)[:, :, 0]

    factor = picked(by.flatten(1)[:, None])
    norms = picked((own[:, 2] * (1 + by) ** 2).flatten(1)[:, None])[:, 0]
    return Rounding(picked(codes), picked(scale) * (1 + factor), picked(zero), norms), least


def babai_codes(part: Part, scale: Tensor, zero: Tensor, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes [groups, in, columns] of Babai rounding, and the sums [groups, 3, columns] as on the CPU.

    scale, zero: [groups, blocks, columns], whose columns are the part's channels, or those several times over
    whole: part.whole(), None to compute it
    """
    problem = part.problem
    whole = part.whole() if whole is None else whole
    groups, inputs, channels = whole.shape
    times = scale.shape[-1] // channels
    low, high = problem.bounds(zero)
    codes, wq = (torch.zeros((groups, inputs, scale.shape[-1]), device=whole.device) for _ in range(2))
    sums = torch.zeros((groups, 3, scale.shape[-1]), device=whole.device)
    ones = torch.ones((groups, BLOCK), device=whole.device)
    for here in block_slices(inputs):
        full = whole[:, here].repeat(1, 1, times)
        v = full - problem.unit[:, here, : here.start] @ wq[:, : here.start]
        rows = problem.block[:, here]
        wq[:, here] = step(
            v, problem.unit[:, here, here], ones[:, : v.shape[1]], scale, low, high, rows, codes[:, here]
        )
        own = problem.root[:, here, None]
        y = own * (v - wq[:, here])
        image = own * full - y
        sums += torch.stack([(y * y).sum(1), (y * image).sum(1), (image * image).sum(1)], 1)
    return codes, sums


def pool_if_shared(part: Part, values: Tensor) -> Tensor:
    """Return a number for each channel [groups, ..., channels]: the sum over all channels if they share a scale."""
    if not part.problem.grid.per_tensor:
        return values
    return values.sum((0, -1), keepdim=True, dtype=torch.float64).to(values.dtype).expand_as(values)


def select_channels(mask: Tensor, one: Rounding, other: Rounding) -> Rounding:
    """Return the channels of `one` where the mask [groups, channels] holds, of `other` elsewhere."""
    pick = mask[:, None]
    return Rounding(
        torch.where(pick, one.codes, other.codes), torch.where(pick, one.scale, other.scale),
        torch.where(pick, one.zero, other.zero), torch.where(mask, one.norm, other.norm),
    )  # fmt: skip


def common_factor(slope: Tensor, norm: Tensor) -> Tensor:
    """Return <wq, V> / <wq, H wq>, by which share all scales of a channel should grow; 0 where it is not below 1/2."""
    by = slope / norm
    return torch.where((norm > 0) & (by.abs() < 0.5), by, 0.0).float()
