"""Descend from a rounding by sweeps, refits of the scales and moves: solve/descent.py for torch tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from comq_onnx.solve.effort import Effort
from comq_onnx.solve.gpu.moves import move_best_first
from comq_onnx.solve.gpu.problem import Part
from comq_onnx.solve.gpu.rounding import Rounding, common_factor, pool_if_shared
from comq_onnx.solve.gpu.step import step
from comq_onnx.solve.problem import block_slices

Tensor: TypeAlias = Any


def descend(part: Part, start: Rounding, effort: Effort) -> Rounding:
    """Sweep the codes and refit the scales in turn; at the end move single codes and pairs, best first."""
    if not effort.descend:
        return start
    now = start
    several = now.scale.shape[1] > 1
    for _ in range(effort.rounds + several):
        v = sweep(part, now)
        now = refit(part, now, v)
    v = sweep(part, now)
    v = move_best_first(part, now, v, effort.pairs)
    return now if several else refit(part, now, v)


def sweep(part: Part, now: Rounding) -> Tensor:
    """Sweep twice over the codes, which change in place, and return the gradient after that."""
    problem = part.problem
    v = part.gradient(now.codes, now.scale)
    low, high = problem.bounds(now.zero)
    own = problem.h.diagonal(dim1=1, dim2=2)
    for _ in range(2):
        for here in block_slices(v.shape[1]):
            change = step(
                v[:, here].clone(), problem.h[:, here, here], own[:, here], now.scale, low, high,
                problem.block[:, here], now.codes[:, here],
            )  # fmt: skip
            v.baddbmm_(problem.h[:, :, here], change, alpha=-1)
    return v


def refit(part: Part, now: Rounding, v: Tensor) -> Rounding:
    """Set the scales to the best for their codes: per block by least squares, else the closed form."""
    if now.scale.shape[1] > 1:
        return refit_blocks(part, now, v)
    slope = (now.codes * now.scale * v).sum(1)
    by = common_factor(pool_if_shared(part, slope), pool_if_shared(part, now.norm))
    return replace(now, scale=now.scale * (1 + by)[:, None], norm=now.norm * (1 + by) ** 2)


def refit_to_float(part: Part, now: Rounding) -> Rounding:
    """Set one scale a channel to the best for its codes where the target is the output of the float model."""
    if part.pull is None or now.scale.shape[1] > 1:
        return now
    slope = (now.codes * now.scale * part.pull).sum(1)
    by = common_factor(pool_if_shared(part, slope), pool_if_shared(part, now.norm))
    return replace(now, scale=now.scale * (1 + by)[:, None])


def refit_blocks(part: Part, now: Rounding, v: Tensor) -> Rounding:
    """Refit all scales of a channel at once, as solve/descent.py does."""
    problem, (groups, blocks, channels) = part.problem, now.scale.shape
    size = problem.grid.block_size or v.shape[1]
    by_block = torch.sort(problem.block, dim=1, stable=True).indices[:, :, None]

    def sum_blocks(x: Tensor) -> Tensor:
        """Add up [groups, in, channels] in each block: not scattered, whose order would change from run to run."""
        apart = torch.nn.functional.pad(torch.take_along_dim(x, by_block, 1), (0, 0, 0, blocks * size - x.shape[1]))
        return apart.unflatten(1, (blocks, size)).sum(2)

    slopes = sum_blocks(v * now.codes).mT.contiguous()
    products = torch.empty((groups, blocks, blocks, channels), device=v.device)
    for b in range(blocks):
        mine = by_block[:, b * size : (b + 1) * size]
        image = torch.take_along_dim(problem.h, mine.mT, 2) @ torch.take_along_dim(now.codes, mine, 1)
        products[:, b] = sum_blocks(image * now.codes)
    products = products.permute(0, 3, 1, 2).contiguous()
    diagonal = products.diagonal(dim1=2, dim2=3)
    # without this, blocks of zeros and blocks of equal codes make the system singular
    diagonal += 1e-4 * diagonal.mean(-1, keepdim=True) + float(np.finfo(np.float32).tiny)
    change = torch.linalg.solve(products.double(), slopes[..., None].double())[..., 0]
    scale = now.scale.mT
    moved = (scale + change).float()
    gain = 2 * (change * slopes).sum(-1) - torch.einsum("gca,gcab,gcb->gc", change, products.double(), change)
    ratio = moved / scale
    good = (gain > 0) & ((ratio > 0.5) & (ratio < 2)).all(-1)
    return replace(now, scale=torch.where(good[:, None], moved.mT, now.scale))
