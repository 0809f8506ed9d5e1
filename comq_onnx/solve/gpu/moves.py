"""Move codes by one, the best move first, in all channels at once: kernels.move_best_first for torch tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from comq_onnx.solve.descent import MOVE_TOLERANCE
from comq_onnx.solve.gpu.problem import Part
from comq_onnx.solve.gpu.rounding import Rounding

Tensor: TypeAlias = Any
WALL = 1e30


@dataclass
class _Channels:
    """Hold channels in which moves are left, inputs along the last axis.

    which: the row of all channels that each one is, [channels]
    group: the group of each, [channels]
    v: the gradient, [channels, in]
    q: the codes less the zero point, [channels, in]
    size: the scale of each code, [channels, in]
    own: scale^2 H_ii, the curvature of each code, [channels, in]
    low, high: the bounds of each code, [channels, in]
    """

    which: Tensor
    group: Tensor
    v: Tensor
    q: Tensor
    size: Tensor
    own: Tensor
    low: Tensor
    high: Tensor

    def take(self, index: Tensor) -> _Channels:
        return _Channels(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def move_best_first(part: Part, now: Rounding, v: Tensor, pairs: int) -> Tensor:
    """Move codes until no move is left in any channel; codes change in place. Return the gradient after that.

    In each channel the code moves first that lowers the objective most; when none is left, two of `pairs` codes move.
    """
    problem, (groups, inputs, channels) = part.problem, v.shape
    pairs = min(pairs, inputs)

    def rows(x: Tensor) -> Tensor:
        return x.expand(groups, inputs, channels).mT.reshape(-1, inputs).clone(memory_format=torch.contiguous_format)

    slope, q, size = rows(v), rows(now.codes), rows(problem.rows(now.scale))
    low, high = (rows(problem.rows(bound)) for bound in problem.bounds(now.zero))
    group = torch.arange(groups, device=v.device).repeat_interleave(channels)
    own = problem.h.diagonal(dim1=1, dim2=2)[group] * size * size
    left = everything = _Channels(torch.arange(len(q), device=v.device), group, slope, q, size, own, low, high)

    def keep() -> None:
        if left is not everything:
            slope[left.which], q[left.which] = left.v, left.q

    for _ in range(2 * inputs):
        busy = _move(problem.h, left, pairs)
        count = int(busy.sum())
        if count <= 3 * len(busy) // 4:
            keep()
            left = left.take(busy.nonzero()[:, 0])
            if not count:
                break
    keep()
    now.codes.copy_(q.reshape(groups, channels, inputs).mT)
    return slope.reshape(groups, channels, inputs).mT


def _move(h: Tensor, left: _Channels, pairs: int) -> Tensor:
    """Make one move in each channel, of its best code or of the best of its pairs; return which channels found one."""
    up, down = left.q < left.high, left.q > left.low
    double = 2 * left.v * left.size
    gain = torch.maximum(torch.where(up, double, -WALL), torch.where(down, -double, -WALL)) - left.own
    most, at = gain.max(1)
    one = at[:, None]
    sign = torch.where(torch.take_along_dim(double, one, 1) > 0, 1.0, -1.0)
    found = (most > 0) & (most > MOVE_TOLERANCE * torch.take_along_dim(left.own, one, 1)[:, 0])
    _apply(h, left, one, torch.where(found[:, None], sign, 0.0))
    if not pairs or bool(found.all()):
        return found
    rest = (~found).nonzero()[:, 0]
    cost, some = gain[rest].topk(pairs, 1)
    moved = _move_pairs(h, left.take(rest), some, cost > -WALL / 2)
    _apply(h, left, some, moved, rest)
    found[rest] = (moved != 0).any(1)
    return found


def _apply(h: Tensor, left: _Channels, at: Tensor, moved: Tensor, rows: Tensor | None = None) -> None:
    """Change the codes `at` [channels, few] by `moved`, the gradient with them; rows: which channels, None for all."""
    rows = torch.arange(len(at), device=at.device) if rows is None else rows
    # the few that move first, so that only those are gone through
    order = torch.sort((moved != 0).byte(), dim=1, descending=True, stable=True).indices
    at, moved = torch.take_along_dim(at, order, 1), torch.take_along_dim(moved, order, 1)
    for k in range(int((moved != 0).sum(1).max())):
        going = (moved[:, k] != 0).nonzero()[:, 0]
        of, i, by = rows[going], at[going, k], moved[going, k]
        left.q[of, i] += by
        left.v[of] -= (by * left.size[of, i])[:, None] * h[left.group[of], i]


def _move_pairs(h: Tensor, few: _Channels, at: Tensor, there: Tensor) -> Tensor:
    """Return by how much each of a few codes `at` [channels, few] moves, one or two at a time, the best first.

    there: which of the few are codes that can move, [channels, few]
    """
    v, own, q, size = (torch.take_along_dim(x, at, 1) for x in (few.v, few.own, few.q, few.size))
    low, high = (torch.take_along_dim(x, at, 1) for x in (few.low, few.high))
    slope = v * size
    near = h[few.group[:, None, None], at[:, :, None], at[:, None, :]] * size[:, :, None] * size[:, None, :]
    moved = torch.zeros_like(q)
    before = torch.ones(near.shape[1:], device=at.device).tril(-1).bool()
    both_own = own[:, :, None] + own[:, None, :]
    for _ in range(4 * at.shape[1]):
        sign = torch.where(slope > 0, 1.0, -1.0)
        able = there & (q + sign >= low) & (q + sign <= high)
        one = 2 * slope.abs() - own
        # of a after b what they gain together, on the diagonal what one does
        gain = one[:, :, None] + one[:, None, :] - 2 * sign[:, :, None] * sign[:, None, :] * near
        good = before & able[:, :, None] & able[:, None, :] & (gain > MOVE_TOLERANCE * both_own)
        gain = torch.where(good, gain, 0.0) + torch.diag_embed(
            torch.where(able & (one > MOVE_TOLERANCE * own), one, 0.0)
        )
        most, best = gain.clamp(min=0).flatten(1).max(1)
        if not bool((most > 0).any()):
            break
        first, second = best // at.shape[1], best % at.shape[1]
        going = torch.zeros_like(moved)
        for which in (second, first):
            going.scatter_(1, which[:, None], torch.take_along_dim(sign, which[:, None], 1))
        going = torch.where((most > 0)[:, None], going, 0.0)
        q, moved = q + going, moved + going
        slope = slope - (near * going[:, :, None]).sum(1)
    return moved
