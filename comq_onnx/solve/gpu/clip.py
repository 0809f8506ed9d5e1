"""Fit scale and zero point to the span of a weight on its device: solve/grid.py for torch tensors."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import numpy as np
import torch

from comq_onnx.solve.grid import SHRINKS, Array, Grid, QuantizedWeight, fit_span, signs

Tensor: TypeAlias = Any


def round_to_nearest(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Round a weight [groups, out, in] to the nearest codes of its min-max grid: the same codes as grid.rtn."""
    scale, zero = fit_span(*_spans(weight, grid), grid)
    block = torch.as_tensor(grid.block_of(weight.shape[-1]), device=weight.device)
    steps, offset = (torch.as_tensor(x, device=weight.device)[..., block] for x in (scale, zero.astype(np.float32)))
    codes = torch.clamp(torch.round(weight / steps) + offset, grid.qmin, grid.qmax)
    return QuantizedWeight(codes.to(torch.int8).cpu().numpy(), scale, zero, grid)


def fit_mse(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point [groups, out, blocks] with the least rounding error, among grid.SHRINKS.

    Where the grid has signed scales, among those of both signs.
    """
    span = _spans(weight, grid)
    blocks = _split_blocks(weight, grid)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for (sign, factor), shrink in itertools.product(signs(grid), SHRINKS):
        scale, zero = (
            torch.as_tensor(x.astype(np.float32), device=weight.device) for x in fit_span(*span, grid, float(shrink))
        )
        scale = float(sign) * scale
        steps = blocks * (1 / scale)[..., None]
        low, high = ((bound - zero)[..., None] for bound in (grid.qmin, grid.qmax))
        steps -= torch.minimum(torch.maximum(torch.round(steps), low), high)
        error = steps.square_().sum(-1).double() * scale.double() ** 2 * factor
        if grid.per_tensor:
            error = error.sum().expand_as(error)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            best = tuple(torch.where(better, x, y) for x, y in zip((error, scale, zero), best, strict=True))
    assert best is not None
    return best[1], best[2]


def _split_blocks(weight: Tensor, grid: Grid) -> Tensor:
    """Reshape [groups, out, in] to [groups, out, blocks, block size], with zeros behind the last input."""
    inputs = weight.shape[-1]
    size = grid.block_size or inputs
    padded = torch.nn.functional.pad(weight, (0, grid.blocks(inputs) * size - inputs))
    return padded.reshape(*weight.shape[:2], -1, size)


def _spans(weight: Tensor, grid: Grid) -> tuple[Array, Array]:
    """Return the least and the largest number of each block: [groups, out, blocks] each."""
    # the zeros behind the last input change nothing: a span has 0 in it
    blocks = _split_blocks(weight, grid)
    return blocks.amin(-1).cpu().numpy(), blocks.amax(-1).cpu().numpy()
