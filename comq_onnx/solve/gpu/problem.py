"""Prepare the problems of all groups at once, on the device of the moments: solve/problem.py for torch tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from comq_onnx.solve.grid import Grid
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.problem import MISMATCH

Tensor: TypeAlias = Any


@dataclass(frozen=True)
class Arranged:
    """Hold the moments of all groups in visiting order, in float32.

    order: the inputs in visiting order, [groups, in]; some of the layer's, or all
    gram: G, [groups, in, in]
    mismatch: E / 2, [groups, in, in]; None where x^ is x
    noise: what centring leaves of constant inputs in the Gram, [groups]
    inputs: how many inputs the layer has
    """

    order: Tensor
    gram: Tensor
    mismatch: Tensor | None
    noise: Tensor
    inputs: int


@dataclass(frozen=True)
class Problem:
    """Describe the problems of all groups; inputs in visiting order.

    order: the inputs in visiting order, [groups, in]
    h: H, [groups, in, in]
    unit: M over its diagonal, [groups, in, in], zeros above the diagonal
    root: the diagonal of M, [groups, in]
    mismatch: E / 2, [groups, in, in]; None where x^ is x
    block: the block of the scale of each input, [groups, in]
    grid: the grid of the weight
    """

    order: Tensor
    h: Tensor
    unit: Tensor
    root: Tensor
    mismatch: Tensor | None
    block: Tensor
    grid: Grid

    def rows(self, of_blocks: Tensor) -> Tensor:
        """Repeat a number for each block [groups, blocks, columns] for each input [groups, in, columns]."""
        shape = (*self.block.shape, of_blocks.shape[-1])
        if of_blocks.shape[1] == 1:
            return of_blocks.expand(shape)
        return torch.take_along_dim(of_blocks, self.block[:, :, None].expand(shape), 1)

    def bounds(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest code less the zero point."""
        return self.grid.qmin - zero, self.grid.qmax - zero


@dataclass(frozen=True)
class Part:
    """Describe some channels of all groups, inputs in visiting order.

    w: W, [groups, in, channels]
    pull: B, [groups, in, channels]; None where x^ is x
    """

    problem: Problem
    w: Tensor
    pull: Tensor | None

    def gradient(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Compute V = H (W - Wq) + B, [groups, in, channels]."""
        v = self.problem.h @ (self.w - codes * self.problem.rows(scale))
        return v if self.pull is None else v + self.pull

    def objective(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Compute D H D^T + 2 D B^T of each channel: [groups, channels], float64."""
        d = self.w - codes * self.problem.rows(scale)
        v = self.problem.h @ d
        return (d.double() * (v if self.pull is None else v + 2 * self.pull)).sum(1)

    def whole(self) -> Tensor:
        """Return M w* over M's diagonal, [groups, in, channels]: what Babai rounding starts from."""
        problem = self.problem
        whole = problem.unit @ self.w
        if self.pull is not None:
            rest = torch.linalg.solve_triangular(problem.unit.mT, self.pull, upper=True, unitriangular=True)
            whole += rest / problem.root[:, :, None] ** 2
        return whole


def arrange(moments: Moments, order: Tensor | None = None) -> Arranged:
    """Put the moments of all groups in `order` [groups, in]; None for visiting_order."""
    gram: Tensor = moments.gram
    if order is None:
        order = visiting_order(gram)
    mismatch = None if moments.cross is None else MISMATCH * _ordered(moments.cross, order)
    return Arranged(order, _ordered(gram, order), mismatch, centring_noise(moments.mean), gram.shape[-1])


def visiting_order(gram: Tensor) -> Tensor:
    """Return the inputs [groups, in] in decreasing order of their power G_ii."""
    return torch.sort(-gram.diagonal(dim1=1, dim2=2), dim=-1, stable=True).indices


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    rows = torch.take_along_dim(matrix.float(), order[:, :, None], 1)
    return torch.take_along_dim(rows, order[:, None, :], 2)


def centring_noise(mean: Tensor) -> Tensor:
    """Return what centring leaves of constant inputs in the Gram, [groups], from the means [groups, in]."""
    return 1e-6 * (mean**2).sum(-1)


def pose(arranged: Arranged, grid: Grid, ridge: float) -> Problem:
    """Make the problem of each group, with a ridge of its own.

    Raises numpy.linalg.LinAlgError where `gram` is no Gram matrix.
    """
    diagonal = arranged.gram.diagonal(dim1=1, dim2=2)
    added = torch.maximum(ridge * diagonal.mean(-1, dtype=torch.float64), arranged.noise)
    added = torch.where(added == 0, 1.0, added)
    most = torch.maximum(diagonal.sum(-1, dtype=torch.float64), added)
    while True:
        h = arranged.gram + torch.diag_embed(added.float()[:, None].expand_as(diagonal))
        m, failed = _factor(h)
        if not bool(failed.any()):
            break
        # moments that are off by more than the ridge: sums of huge and tiny inputs
        if not bool((added <= most)[failed].all()):
            raise np.linalg.LinAlgError("the moments are no Gram")
        added = torch.where(failed, added * 10, added)
    root = m.diagonal(dim1=1, dim2=2).clone()
    block = torch.as_tensor(grid.block_of(arranged.inputs), device=h.device)[arranged.order]
    return Problem(arranged.order, h, m / root[:, :, None], root, arranged.mismatch, block, grid)


def _factor(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return M with H = M^T M, M lower triangular, and a mask [groups] of the groups where there is none."""
    reverse = h.flip(1, 2)
    lower, info = torch.linalg.cholesky_ex(reverse)
    if bool((info > 0).any()):
        again, still = torch.linalg.cholesky_ex(reverse.double())
        bad = info > 0
        lower, info = torch.where(bad[:, None, None], again.float(), lower), torch.where(bad, still, 0)
    return lower.mT.flip(1, 2), info > 0


def take_part(problem: Problem, weight: Tensor) -> Part:
    """Take channels of all groups: their weight [groups, channels, in], inputs as in the layer."""
    w = torch.take_along_dim(weight.mT, problem.order[:, :, None], 1)
    return Part(problem, w, None if problem.mismatch is None else problem.mismatch @ w)
