"""The default solver on torch tensors, where the moments are such: comq.py's steps, for a GPU.

The same objective, start, descent and choices as on the CPU, so the same codes up to ties; what differs is the order
of sums. All groups are one batch; all channels, zero points and scales are columns of one tensor [groups, in, columns].
A pass over the inputs, be it Babai rounding or a sweep, is two kernels in turn: the step inside a block of BLOCK inputs
(step.py), and a matrix product for what the block did to the inputs behind it. The moves at the end, best first, go on
in all channels at once until none has any left.

Method.on_device says what is solved here; the rest (the paper's algorithm, a beam, bit planes, problems of few inputs)
is solved on the CPU from the same moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from comq_onnx.solve.comq import (
    FLIP_TOLERANCE,
    GPTQ_RIDGE,
    RIDGE_CHANNELS,
    RIDGE_GROUPS,
    RIDGES,
    SMALL,
    ZERO_POINT_BITS,
    Effort,
    spread,
)
from comq_onnx.solve.gpu.step import step
from comq_onnx.solve.grid import SHRINKS, Array, Grid, QuantizedWeight, fit_mse, fit_span
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.problem import BLOCK, MISMATCH, RIDGE

Tensor: TypeAlias = Any
# a tensor [groups, in, columns] of the search holds at most so many numbers: more channels are solved in turn
MOST_NUMBERS = 1 << 27
WALL = 1e30
# where no code is cut off, zero points beside one another give the same codes; as sums differ with the place of a
# column, a later candidate must be better by more than that
FIRST = 1 - 1e-5


def round_to_nearest(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """grid.rtn of a weight [groups, out, in]: the same codes."""
    scale, zero = fit_span(*_spans(weight, grid), grid)
    block = torch.as_tensor(grid.block_of(weight.shape[-1]), device=weight.device)
    steps, offset = (torch.as_tensor(x, device=weight.device)[..., block] for x in (scale, zero.astype(np.float32)))
    codes = torch.clamp(torch.round(weight / steps) + offset, grid.qmin, grid.qmax)
    return QuantizedWeight(codes.to(torch.int8).cpu().numpy(), scale, zero, grid)


def solve_comq(weight: Tensor, moments: Moments, grid: Grid, search: Effort) -> QuantizedWeight:
    """comq.solve_comq of a weight [groups, out, in] on the device of the moments."""
    ridge = choose_ridge(weight, moments, grid) if search.choose_ridge else RIDGE
    return _solved(weight, pose(arrange(moments), grid, ridge), search)


def solve_gptq(weight: Tensor, moments: Moments, grid: Grid) -> QuantizedWeight:
    """comq.solve_gptq of a weight [groups, out, in] on the device of the moments."""
    alone = Moments(moments.gram, moments.mean, moments.count)
    return _solved(weight, pose(arrange(alone), grid, GPTQ_RIDGE), None)


def _solved(weight: Tensor, problem: Problem, search: Effort | None) -> QuantizedWeight:
    """search: None for one pass of rounding at the MSE-best scale."""
    grid, (groups, out, inputs) = problem.grid, weight.shape
    scale, zero = _fit_mse(weight, grid)
    candidates = 1 if search is None else max(len(search.factors), 3)
    width = out if grid.per_tensor else max(1, MOST_NUMBERS // (groups * inputs * candidates))
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, out, width):
        some = slice(start, start + width)
        part = take_part(problem, weight[:, some])
        begun = scale[:, some].mT.contiguous(), zero[:, some].mT.contiguous()
        if search is None:
            found = Rounding(_round_all(part, *begun)[0], *begun, begun[0][:, 0])
        else:
            found = _descend(part, _start(part, *begun, search), search)
        whole = found.codes + problem.rows(found.zero)
        back = torch.empty_like(whole).scatter_(1, problem.order[:, :, None].expand_as(whole), whole)
        codes[:, some] = back.mT.to(torch.int8)
        scale[:, some], zero[:, some] = found.scale.mT, found.zero.mT
    return QuantizedWeight(codes.cpu().numpy(), scale.cpu().numpy(), zero.to(torch.int8).cpu().numpy(), grid)


# The clip -------------------------------------------------------------------------------------------------------------
def _in_blocks(weight: Tensor, grid: Grid) -> Tensor:
    """[groups, out, in] as [groups, out, blocks, block size], with zeros behind the last input."""
    inputs = weight.shape[-1]
    size = grid.block_size or inputs
    padded = torch.nn.functional.pad(weight, (0, grid.blocks(inputs) * size - inputs))
    return padded.reshape(*weight.shape[:2], -1, size)


def _spans(weight: Tensor, grid: Grid) -> tuple[Array, Array]:
    # the zeros behind the last input change nothing: a span has 0 in it
    blocks = _in_blocks(weight, grid)
    return blocks.amin(-1).cpu().numpy(), blocks.amax(-1).cpu().numpy()


def _fit_mse(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """grid.fit_mse: scale and zero point [groups, out, blocks] with the least rounding error, among SHRINKS."""
    span = _spans(weight, grid)
    blocks = _in_blocks(weight, grid)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for shrink in SHRINKS:
        scale, zero = (
            torch.as_tensor(x.astype(np.float32), device=weight.device) for x in fit_span(*span, grid, float(shrink))
        )
        steps = blocks * (1 / scale)[..., None]
        low, high = ((bound - zero)[..., None] for bound in (grid.qmin, grid.qmax))
        steps -= torch.minimum(torch.maximum(torch.round(steps), low), high)
        error = steps.square_().sum(-1).double() * scale.double() ** 2
        if grid.per_tensor:
            error = error.sum().expand_as(error)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            best = tuple(torch.where(better, x, y) for x, y in zip((error, scale, zero), best, strict=True))
    assert best is not None
    return best[1], best[2]


# The problem ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arranged:
    """MomentSums in visiting order, float32: problem.Arranged of all groups at once."""

    order: Tensor  # [groups, in]
    gram: Tensor  # [groups, in, in]
    mismatch: Tensor | None  # [groups, in, in]
    noise: Tensor  # [groups]
    inputs: int


@dataclass(frozen=True)
class Problem:
    """problem.Problem of all groups at once; inputs in visiting order."""

    order: Tensor  # [groups, in]
    h: Tensor  # [groups, in, in]
    unit: Tensor  # [groups, in, in], zeros above the diagonal
    root: Tensor  # [groups, in]
    mismatch: Tensor | None  # [groups, in, in]
    block: Tensor  # [groups, in]
    grid: Grid

    def rows(self, of_blocks: Tensor) -> Tensor:
        """[groups, blocks, columns] as a number for each input [groups, in, columns]."""
        shape = (*self.block.shape, of_blocks.shape[-1])
        if of_blocks.shape[1] == 1:
            return of_blocks.expand(shape)
        return torch.take_along_dim(of_blocks, self.block[:, :, None].expand(shape), 1)

    def bounds(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest code less the zero point."""
        return self.grid.qmin - zero, self.grid.qmax - zero


@dataclass(frozen=True)
class Part:
    """Some channels of all groups, in visiting order."""

    problem: Problem
    w: Tensor  # [groups, in, channels]
    pull: Tensor | None  # B, [groups, in, channels]

    def gradient(self, codes: Tensor, scale: Tensor) -> Tensor:
        """V = H (W - Wq) + B."""
        v = self.problem.h @ (self.w - codes * self.problem.rows(scale))
        return v if self.pull is None else v + self.pull

    def objective(self, codes: Tensor, scale: Tensor) -> Tensor:
        """D H D^T + 2 D B^T of each channel, [groups, channels], float64."""
        d = self.w - codes * self.problem.rows(scale)
        v = self.problem.h @ d
        return (d.double() * (v if self.pull is None else v + 2 * self.pull)).sum(1)

    def whole(self) -> Tensor:
        """M w* over M's diagonal."""
        problem = self.problem
        whole = problem.unit @ self.w
        if self.pull is not None:
            rest = torch.linalg.solve_triangular(problem.unit.mT, self.pull, upper=True, unitriangular=True)
            whole += rest / problem.root[:, :, None] ** 2
        return whole


@dataclass(frozen=True)
class Rounding:
    """Codes less the zero point [groups, in, channels], in visiting order; scale and zero [groups, blocks, channels];
    norm [groups, channels] is <wq, H wq>, or was before the last codes changed."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    norm: Tensor


def arrange(moments: Moments, order: Tensor | None = None) -> Arranged:
    """problem.arrange, all groups at once; order [groups, in]."""
    gram: Tensor = moments.gram
    if order is None:
        order = visiting_order(gram)
    mismatch = None if moments.cross is None else MISMATCH * _ordered(moments.cross, order)
    return Arranged(order, _ordered(gram, order), mismatch, _noise(moments.mean), gram.shape[-1])


def visiting_order(gram: Tensor) -> Tensor:
    """Inputs [groups, in] in decreasing order of their power."""
    return torch.sort(-gram.diagonal(dim1=1, dim2=2), dim=-1, stable=True).indices


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    rows = torch.take_along_dim(matrix.float(), order[:, :, None], 1)
    return torch.take_along_dim(rows, order[:, None, :], 2)


def pose(arranged: Arranged, grid: Grid, ridge: float) -> Problem:
    """problem.pose, all groups at once. Raises numpy.linalg.LinAlgError for what is no Gram at all."""
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
    """M with H = M^T M, M lower triangular, and the groups where there is none."""
    reverse = h.flip(1, 2)
    lower, info = torch.linalg.cholesky_ex(reverse)
    if bool((info > 0).any()):
        again, still = torch.linalg.cholesky_ex(reverse.double())
        bad = info > 0
        lower, info = torch.where(bad[:, None, None], again.float(), lower), torch.where(bad, still, 0)
    return lower.mT.flip(1, 2), info > 0


def take_part(problem: Problem, weight: Tensor) -> Part:
    """The part of channels `weight` [groups, channels, in], as the layer has them."""
    w = torch.take_along_dim(weight.mT, problem.order[:, :, None], 1)
    return Part(problem, w, None if problem.mismatch is None else problem.mismatch @ w)


# The start ------------------------------------------------------------------------------------------------------------
def _pooled(part: Part, values: Tensor) -> Tensor:
    """A number for each channel [groups, ..., channels]; the sum over all where they share a scale."""
    if not part.problem.grid.per_tensor:
        return values
    return values.sum((0, -1), keepdim=True, dtype=torch.float64).to(values.dtype).expand_as(values)


def _start(part: Part, scale: Tensor, zero: Tensor, search: Effort) -> Rounding:
    """Babai-rounded codes at the best of several zero points, then of several multiples of the scale."""
    grid = part.problem.grid
    whole = part.whole()
    zeros = [zero]
    if search.zero_points and not grid.symmetric and grid.bits <= ZERO_POINT_BITS:
        zeros += [torch.clamp(zero + by, grid.qmin, grid.qmax) for by in (-1, 1)]
    best, loss = _best(part, whole, [scale] * len(zeros), zeros)
    if not search.factors:
        return best
    scaled, other_loss = _best(
        part, whole, [scale * np.float32(factor) for factor in search.factors], [best.zero] * len(search.factors)
    )
    return _merge(other_loss < FIRST * loss, scaled, best)


def _best(part: Part, whole: Tensor, scales: Sequence[Tensor], zeros: Sequence[Tensor]) -> tuple[Rounding, Tensor]:
    """The best Babai rounding of each channel, of several scales and zero points tried at once, and its loss."""
    count, groups, channels = len(scales), len(whole), whole.shape[-1]
    scale, zero = torch.cat(list(scales), -1), torch.cat(list(zeros), -1)
    codes, own = _round_all(part, scale, zero, whole)
    own = own.unflatten(-1, (count, channels))
    loss, cross, norm = _pooled(part, own).unbind(1)
    by = _common_factor(cross, norm)
    loss = loss - 2 * by * cross + by * by * norm
    pick = torch.zeros((groups, channels), dtype=torch.int64, device=whole.device)
    least = loss[:, 0]
    for k in range(1, count):
        better = loss[:, k] < FIRST * least
        pick, least = torch.where(better, k, pick), torch.where(better, loss[:, k], least)

    def taken(x: Tensor) -> Tensor:
        """The picked candidate of [groups, rows, count * channels]."""
        apart = x.unflatten(-1, (count, channels))
        return torch.take_along_dim(apart, pick[:, None, None], 2)[:, :, 0]

    factor = taken(by.flatten(1)[:, None])
    norms = taken((own[:, 2] * (1 + by) ** 2).flatten(1)[:, None])[:, 0]
    return Rounding(taken(codes), taken(scale) * (1 + factor), taken(zero), norms), least


def _merge(mask: Tensor, one: Rounding, other: Rounding) -> Rounding:
    """The channels of `one` where the mask [groups, channels] holds, of `other` elsewhere."""
    pick = mask[:, None]
    return Rounding(
        torch.where(pick, one.codes, other.codes), torch.where(pick, one.scale, other.scale),
        torch.where(pick, one.zero, other.zero), torch.where(mask, one.norm, other.norm),
    )  # fmt: skip


def _common_factor(slope: Tensor, norm: Tensor) -> Tensor:
    """<wq, V> / <wq, H wq>, 0 where that cannot be told."""
    by = slope / norm
    return torch.where((norm > 0) & (by.abs() < 0.5), by, 0.0).float()


def _blocks_of(inputs: int) -> Iterator[slice]:
    return (slice(start, min(start + BLOCK, inputs)) for start in range(0, inputs, BLOCK))


def _round_all(part: Part, scale: Tensor, zero: Tensor, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The codes [groups, in, columns] and the sums [groups, 3, columns] of Babai rounding; scale and zero [groups,
    blocks, columns], whose columns are the part's channels, or those several times over."""
    problem = part.problem
    whole = part.whole() if whole is None else whole
    groups, inputs, channels = whole.shape
    times = scale.shape[-1] // channels
    low, high = problem.bounds(zero)
    codes, wq = (torch.zeros((groups, inputs, scale.shape[-1]), device=whole.device) for _ in range(2))
    sums = torch.zeros((groups, 3, scale.shape[-1]), device=whole.device)
    ones = torch.ones((groups, BLOCK), device=whole.device)
    for here in _blocks_of(inputs):
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


# The descent ----------------------------------------------------------------------------------------------------------
def _descend(part: Part, start: Rounding, search: Effort) -> Rounding:
    """comq._descend: sweep the codes and refit the scales in turn, then move single codes and pairs, best first."""
    if not search.descend:
        return start
    now = start
    several = now.scale.shape[1] > 1
    for _ in range(search.rounds + several):
        v = _sweep(part, now)
        now = _refit(part, now, v)
    v = _sweep(part, now)
    v = _flip(part, now, v, search.pairs)
    return now if several else _refit(part, now, v)


def _sweep(part: Part, now: Rounding) -> Tensor:
    """Two sweeps over the codes, in place; the gradient after them."""
    problem = part.problem
    v = part.gradient(now.codes, now.scale)
    low, high = problem.bounds(now.zero)
    own = problem.h.diagonal(dim1=1, dim2=2)
    for _ in range(2):
        for here in _blocks_of(v.shape[1]):
            change = step(
                v[:, here].clone(), problem.h[:, here, here], own[:, here], now.scale, low, high,
                problem.block[:, here], now.codes[:, here],
            )  # fmt: skip
            v.baddbmm_(problem.h[:, :, here], change, alpha=-1)
    return v


def _refit(part: Part, now: Rounding, v: Tensor) -> Rounding:
    """The best scales for fixed codes: per block by least squares, else the closed form."""
    if now.scale.shape[1] > 1:
        return _refit_blocks(part, now, v)
    slope = (now.codes * now.scale * v).sum(1)
    by = _common_factor(_pooled(part, slope), _pooled(part, now.norm))
    return replace(now, scale=now.scale * (1 + by)[:, None], norm=now.norm * (1 + by) ** 2)


def _refit_blocks(part: Part, now: Rounding, v: Tensor) -> Rounding:
    """comq._refit_blocks: all scales of a channel at once, where the objective falls and they stay positive."""
    problem, (groups, blocks, channels) = part.problem, now.scale.shape
    size = problem.grid.block_size or v.shape[1]
    by_block = torch.sort(problem.block, dim=1, stable=True).indices[:, :, None]

    def summed(x: Tensor) -> Tensor:
        """[groups, in, channels] added up in each block: not scattered, whose order would change from run to run."""
        apart = torch.nn.functional.pad(torch.take_along_dim(x, by_block, 1), (0, 0, 0, blocks * size - x.shape[1]))
        return apart.unflatten(1, (blocks, size)).sum(2)

    slopes = summed(v * now.codes).mT.contiguous()
    products = torch.empty((groups, blocks, blocks, channels), device=v.device)
    for b in range(blocks):
        mine = by_block[:, b * size : (b + 1) * size]
        image = torch.take_along_dim(problem.h, mine.mT, 2) @ torch.take_along_dim(now.codes, mine, 1)
        products[:, b] = summed(image * now.codes)
    products = products.permute(0, 3, 1, 2).contiguous()
    diagonal = products.diagonal(dim1=2, dim2=3)
    # blocks of zeros, and blocks that say the same
    diagonal += 1e-4 * diagonal.mean(-1, keepdim=True) + float(np.finfo(np.float32).tiny)
    change = torch.linalg.solve(products.double(), slopes[..., None].double())[..., 0]
    scale = now.scale.mT
    moved = (scale + change).float()
    gain = 2 * (change * slopes).sum(-1) - torch.einsum("gca,gcab,gcb->gc", change, products.double(), change)
    good = (gain > 0) & ((moved > 0.5 * scale) & (moved < 2 * scale)).all(-1)
    return replace(now, scale=torch.where(good[:, None], moved.mT, now.scale))


# Moves, best first ----------------------------------------------------------------------------------------------------
@dataclass
class _Moves:
    """Channels that are not at their end yet, inputs along the last axis: [channels, in] each, but for `which`, the
    column of the whole that each is, and `group`."""

    which: Tensor
    group: Tensor
    v: Tensor
    q: Tensor
    size: Tensor
    own: Tensor
    low: Tensor
    high: Tensor

    def take(self, index: Tensor) -> _Moves:
        return _Moves(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def _flip(part: Part, now: Rounding, v: Tensor, pairs: int) -> Tensor:
    """kernels.flip: in each channel the move of one code that lowers the objective most, then of two; codes change in
    their place. Returns the gradient after it."""
    problem, (groups, inputs, channels) = part.problem, v.shape
    pairs = min(pairs, inputs)

    def columns(x: Tensor) -> Tensor:
        return x.expand(groups, inputs, channels).mT.reshape(-1, inputs).clone(memory_format=torch.contiguous_format)

    slope, q, size = columns(v), columns(now.codes), columns(problem.rows(now.scale))
    low, high = (columns(problem.rows(bound)) for bound in problem.bounds(now.zero))
    group = torch.arange(groups, device=v.device).repeat_interleave(channels)
    own = problem.h.diagonal(dim1=1, dim2=2)[group] * size * size
    left = everything = _Moves(torch.arange(len(q), device=v.device), group, slope, q, size, own, low, high)

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


def _move(h: Tensor, left: _Moves, pairs: int) -> Tensor:
    """One move in each channel, of its best code or of the best of its pairs; which channels found one."""
    up, down = left.q < left.high, left.q > left.low
    double = 2 * left.v * left.size
    gain = torch.maximum(torch.where(up, double, -WALL), torch.where(down, -double, -WALL)) - left.own
    most, at = gain.max(1)
    one = at[:, None]
    sign = torch.where(torch.take_along_dim(left.v, one, 1) > 0, 1.0, -1.0)
    found = (most > 0) & (most > FLIP_TOLERANCE * torch.take_along_dim(left.own, one, 1)[:, 0])
    _apply(h, left, one, torch.where(found[:, None], sign, 0.0))
    if not pairs or bool(found.all()):
        return found
    rest = (~found).nonzero()[:, 0]
    cost, some = gain[rest].topk(pairs, 1)
    moved = _move_pairs(h, left.take(rest), some, cost > -WALL / 2)
    _apply(h, left, some, moved, rest)
    found[rest] = (moved != 0).any(1)
    return found


def _apply(h: Tensor, left: _Moves, at: Tensor, moved: Tensor, rows: Tensor | None = None) -> None:
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


def _move_pairs(h: Tensor, few: _Moves, at: Tensor, there: Tensor) -> Tensor:
    """kernels._move_pairs: by how much each of a few codes `at` [channels, few] is moved, one or two at a time, the
    best first; `there`: which of the few are codes that can move."""
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
        good = before & able[:, :, None] & able[:, None, :] & (gain > FLIP_TOLERANCE * both_own)
        gain = torch.where(good, gain, 0.0) + torch.diag_embed(
            torch.where(able & (one > FLIP_TOLERANCE * own), one, 0.0)
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


# The ridge ------------------------------------------------------------------------------------------------------------
def choose_ridge(weight: Tensor, moments: Moments, grid: Grid) -> float:
    """comq.choose_ridge: the ridge with which codes found on one half of the samples do best on the other."""
    if not moments.has_folds:
        return RIDGE
    groups, out, inputs = weight.shape
    some = spread(groups, RIDGE_GROUPS)
    rows = spread(out, -(-RIDGE_CHANNELS // len(some)))
    few = moments.groups(some)
    sample = weight[torch.as_tensor(some, device=weight.device)][:, torch.as_tensor(rows, device=weight.device)]
    scale, zero = fit_mse(np.ascontiguousarray(sample.cpu().numpy()), grid)
    # half the samples tell of half the inputs what all tell of all
    order = visiting_order(few.gram)[:, :: 2 if inputs >= 2 * SMALL else 1]
    halves = few.folds()
    assert halves is not None
    first, second = (
        replace(arrange(half, order), noise=_noise(torch.take_along_dim(half.mean, order, 1)), inputs=inputs)
        for half in halves
    )
    begun = [torch.as_tensor(x.astype(np.float32), device=weight.device).mT.contiguous() for x in (scale, zero)]

    def held_out(seen: Arranged, unseen: Arranged, ridge: float) -> float:
        part = take_part(pose(seen, grid, ridge), sample)
        one, _ = _best(part, part.whole(), begun[:1], begun[1:])
        judge = take_part(replace(part.problem, h=unseen.gram, mismatch=unseen.mismatch), sample)
        return float(judge.objective(one.codes, one.scale).sum())

    errors: dict[float, float] = {}

    def error(ridge: float) -> float:
        if ridge not in errors:
            errors[ridge] = held_out(first, second, ridge) + held_out(second, first, ridge)
        return errors[ridge]

    k = RIDGES.index(RIDGE)
    for by in (1, -1):
        while 0 <= k + by < len(RIDGES) and error(RIDGES[k + by]) < error(RIDGES[k]):
            k += by
    return RIDGES[k]


def _noise(mean: Tensor) -> Tensor:
    """What centring leaves of constant inputs, [groups], from their means [groups, in]."""
    return 1e-6 * (mean**2).sum(-1)


# What it costs --------------------------------------------------------------------------------------------------------
class Judge:
    """judge.Judge on the device of the moments: the output error of one layer's quantized weights."""

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        """weight [groups, out, in]; moments: centred."""
        self._weight = weight
        gram, mean, cross, residue, mean_error = (
            getattr(moments, name) for name in ("gram", "mean", "cross", "residue", "mean_error")
        )
        self._mean: Tensor = mean
        self._gram: Tensor = gram.float()
        self._cross: Tensor | None = None
        self._rest = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
        self._offset = torch.zeros_like(self._rest)
        if cross is not None and residue is not None and mean_error is not None:
            self._cross = weight @ cross.float().mT
            self._rest = _dot(weight @ residue.float(), weight)
            self._offset = torch.einsum("gmn,gn->gm", weight.double(), mean_error)
            mean = mean + mean_error
        energy = self._variance(weight) + torch.einsum("gmn,gn->gm", weight.double(), mean) ** 2
        self.energy = energy.cpu().numpy()

    def __call__(self, quantized: QuantizedWeight) -> tuple[np.ndarray, np.ndarray]:
        """The variance and the mean of the error: [groups, out] each."""
        device = self._weight.device
        block = torch.as_tensor(quantized.grid.block_of(self._weight.shape[-1]), device=device)
        codes, scale, zero = (
            torch.as_tensor(x, device=device).float() for x in (quantized.codes, quantized.scale, quantized.zero_point)
        )
        difference = self._weight - (codes - zero[..., block]) * scale[..., block]
        offset = self._offset + torch.einsum("gmn,gn->gm", difference.double(), self._mean)
        return self._variance(difference).cpu().numpy(), offset.cpu().numpy()

    def _variance(self, difference: Tensor) -> Tensor:
        variance = _dot(difference @ self._gram, difference) + self._rest
        if self._cross is not None:
            variance = variance + 2 * _dot(difference, self._cross)
        return variance.clamp(min=0)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(-1, dtype=torch.float64)
