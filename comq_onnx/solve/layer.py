"""Solve one layer: quantize its weight so that the layer's output changes least, on Gram matrices of its input.

For a layer Y = W X (X holds one input position a column) and its quantized weight Wq, COMQ (Zhang, Yang, Liu,
Kailkhura, Yin, Xin: "COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization", arXiv 2403.07134)
minimizes

    || Wq X - W X ||^2,    Wq = scale * Q,    Q integer

by coordinate minimization: one coordinate at a time, everything else fixed. With the Gram G = E[x x^T] and
V = (W - Wq) G both steps are closed forms:

    q_i   <- clip(round(q_i + V_i / (scale G_ii)))            (the paper's eq. for a code)
    scale <- <q, G w> / <q, G q>                              (the paper's eq. for a scale)

Methods: `comq`, the default, keeps the two closed forms and goes beyond the paper in what surrounds them (comq.py);
`paper` is the authors' algorithm (paper.py); `gptq` is one Babai pass at the MSE-best scale, without mean, mismatch or
descent (Frantar et al., arXiv 2210.17323, with inputs in decreasing order of their power); `rtn` is plain rounding.

The rest of the project adds to every method: inputs of the model quantized so far, and no channel that costs more than
with plain rounding.

Shapes: weight [groups, out, in]; gram [groups, in, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx import arrays
from comq_onnx.solve.comq import Posing, pose_comq, pose_once, solve_comq, solve_gptq, solve_posed
from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.few_inputs import has_few_inputs
from comq_onnx.solve.grid import Array, Grid, QuantizedWeight, fit_mse, round_to_grid, rtn
from comq_onnx.solve.moments import Matrix, Moments
from comq_onnx.solve.output_error import OutputError
from comq_onnx.solve.paper import ORDERS, SWEEPS, solve_paper
from comq_onnx.solve.problem import Problem

METHODS = ("comq", "paper", "gptq", "rtn")
# the mean of an error is put into the bias where it is so many times what chance makes of it: beside loud samples the
# outputs of quiet ones would be lost in a shift that is chance
SIGNIFICANT = 2.0
# all channels of a layer together must be so many standard deviations beyond chance
TOGETHER = 3.0


@dataclass(frozen=True)
class Method:
    """Choose a solver and its parameters.

    solver: one of METHODS
    effort: of comq, one of EFFORTS
    order, sweeps: of the paper; one of ORDERS, and how often all codes are visited
    shrink: of the paper, the factor on the initial scale; None for the one of the bits

    Raises ValueError for a name that does not exist.
    """

    solver: str = "comq"
    effort: str = "default"
    order: str = "greedy"
    sweeps: int = SWEEPS
    shrink: float | None = None

    def __post_init__(self) -> None:
        for what, name, names in (
            ("solver", self.solver, METHODS), ("effort", self.effort, EFFORTS), ("order", self.order, ORDERS)
        ):  # fmt: skip
            if name not in names:
                raise ValueError(f"no {what} {name!r}; there are {', '.join(names)}")

    def __call__(self, weight: Array, moments: Moments, grid: Grid, posing: Posing | None = None) -> QuantizedWeight:
        """Quantize a weight [groups, out, in] on the CPU; posing: as `solve_comq` takes it."""
        if self.solver == "comq":
            return solve_comq(weight, moments, grid, self.effort, posing)
        if self.solver == "paper":
            return solve_paper(weight, moments, grid, self.order, self.sweeps, self.shrink)
        return solve_gptq(weight, moments, grid) if self.solver == "gptq" else rtn(weight, grid)

    def on_device(self, inputs: int, grid: Grid) -> bool:
        """Tell whether a layer of so many inputs is solved on the device where its moments lie, not on the CPU."""
        if self.solver != "comq" or grid.tied:
            return self.solver != "paper" and not grid.tied
        effort = EFFORTS[self.effort]
        return not (has_few_inputs(inputs, grid) or effort.beam or effort.bit_split)


COMQ = Method()


@dataclass(frozen=True)
class Solution:
    """Hold a layer's quantized weight, the shift of its bias, and the error of its output.

    weight: the quantized weight
    shift: to be added to the bias, [groups, out]; None where the layer has no bias to carry it
    error: ||X^ Wq + shift - X W||^2 / ||X W||^2
    rtn_error: the same for plain rounding on the same grid, without a shift
    """

    weight: QuantizedWeight
    shift: Array | None
    error: float
    rtn_error: float


def error_db(error: float) -> float:
    """Return 10 log10 of a relative squared error; -200 for an error of 0."""
    return 10 * float(np.log10(max(error, 1e-20)))


def solve(
    weight: Array, moments: Moments, grid: Grid, method: Method = COMQ, has_bias: bool = False
) -> Solution:  # fmt: skip
    """Quantize one layer's weight [groups, out, in] on `grid`.

    has_bias: a shift of the bias may carry the mean of the error; only comq makes one
    """
    return solve_together([weight], moments, grid, method, has_bias)[0]


def solve_together(
    weights: Sequence[Array], moments: Moments, grid: Grid, method: Method = COMQ, has_bias: bool = False
) -> list[Solution]:
    """Solve layers that read the same input: what depends on the input is computed once.

    weights: [groups, out, in] each, with any number of outputs; a single one where the grid is per tensor
    """
    return _solve(weights, moments, moments.centred(), grid, method, has_bias)


def errors_at(
    weight: Array, moments: Moments, grids: Sequence[Grid], method: Method = COMQ, has_bias: bool = False
) -> list[float]:  # fmt: skip
    """Return the relative error of the solution of a weight [groups, out, in] on each grid, all tied or none."""
    centred = moments.centred()
    shifts = has_bias and method.solver == "comq"
    if arrays.is_tensor(centred.gram) and method.on_device(weight.shape[-1], grids[0]):
        return [_solve([weight], moments, centred, grid, method, has_bias)[0].error for grid in grids]
    given, centred = _taken(moments, centred, grids[0], shifts).on_host(), centred.on_host()
    errors, posing, of_all = OutputError(weight, centred), pose_once(given), np.arange(weight.shape[1])
    found = (_candidates(weight, errors, method(weight, given, grid, posing), centred.count) for grid in grids)
    return [_choose(one, of_all, shifts).error for one in found]


def judge(weight: Array, moments: Moments, quantized: QuantizedWeight, method: Method, has_bias: bool) -> Solution:
    """Return a weight that was quantized on other moments, with the shift and the errors that it has on these."""
    moments = moments.on_host()
    errors = OutputError(weight, moments.centred())
    of_all = np.arange(weight.shape[1])
    rounded_error, error = errors.of(rtn(weight, quantized.grid)), errors.of(quantized)
    candidates = Candidates(quantized, quantized, error, error, errors.energy, moments.count)
    found = _choose(candidates, of_all, has_bias and method.solver == "comq")
    energy = max(float(errors.energy.sum()), float(np.finfo(np.float64).tiny))
    return replace(found, rtn_error=float((rounded_error[0] + rounded_error[1] ** 2).sum()) / energy)


def round_rows(weight: Array, grid: Grid) -> Solution:
    """Quantize a table [1, rows, columns] that is only looked up (an embedding): round it at the MSE-best scale."""
    best = round_to_grid(weight, *fit_mse(weight, grid), grid)
    energy = max(float((weight.astype(np.float64) ** 2).sum()), np.finfo(np.float64).tiny)

    def error(quantized: QuantizedWeight) -> float:
        return float(((quantized.dequantize().astype(np.float64) - weight) ** 2).sum()) / energy

    return Solution(best, None, error(best), error(rtn(weight, grid)))


def round_plainly(weight: Array, grid: Grid) -> Solution:
    """Round a weight [groups, out, in] to its own grid, as `rtn` does; its errors are those of the weight."""
    quantized = rtn(weight, grid)
    energy = max(float((weight.astype(np.float64) ** 2).sum()), np.finfo(np.float64).tiny)
    error = float(((quantized.dequantize().astype(np.float64) - weight) ** 2).sum()) / energy
    return Solution(quantized, None, error, error)


def blank(weight: Array, grid: Grid) -> Solution:
    """Make a solution of the right shapes without solving, to measure how many bytes it takes in a file."""
    shape = (*weight.shape[:2], 1 if grid.per_tensor else grid.blocks(weight.shape[-1]))
    zero_point = np.full(shape, 0 if grid.symmetric else 1, np.int8)
    quantized = QuantizedWeight(np.zeros(weight.shape, np.int8), np.ones(shape, np.float32), zero_point, grid)
    return Solution(quantized, np.zeros(weight.shape[:2], np.float32), 0.0, 0.0)


# A layer in parts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posed:
    """Hold what all channels of layers that are solved as one have in common.

    weight: of all of them, [1, out, in]
    centred: the moments about the mean, as float32 numbers, without halves
    problem: what the solver minimizes
    grid: of the weight
    """

    weight: Array
    centred: Moments
    problem: Problem
    grid: Grid


def in_parts(method: Method, groups: int, inputs: int, grid: Grid) -> bool:
    """Tell whether parts of the channels of a layer can be solved apart; inputs: of a channel."""
    sharing = groups > 1 or grid.per_tensor or grid.tied
    return method.solver == "comq" and not sharing and not has_few_inputs(inputs, grid)


def pose(weights: Sequence[Array], moments: Moments, grid: Grid, method: Method, has_bias: bool) -> Posed:
    """Prepare layers that read the same input to be solved in parts; weights, has_bias: as for `solve_together`."""
    whole, centred = _joined(weights), moments.centred()
    (problem,) = pose_comq(whole, _taken(moments, centred, grid, has_bias), grid, EFFORTS[method.effort])
    matrices: dict[str, Any] = {name: getattr(centred, name) for name in ("gram", "cross", "residue")}
    single: dict[str, Any] = {name: None if one is None else one.astype(np.float32) for name, one in matrices.items()}
    return Posed(whole, replace(centred, half=None, **single), problem, grid)


def solve_part(posed: Posed, method: Method, channels: slice) -> Candidates:
    """Round and solve some channels, one of `parallel.channel_slices`."""
    weight = posed.weight[:, channels]
    solved = solve_posed(weight, [posed.problem], posed.grid, EFFORTS[method.effort])
    return _candidates(weight, OutputError(weight, posed.centred), solved, posed.centred.count)


def join_parts(parts: Sequence[Candidates], channels: Sequence[int], has_bias: bool) -> list[Solution]:
    """Return the solution of each layer, as `solve_together` does; channels: how many each has."""

    def joined(arrays_of: Sequence[Any]) -> Any:
        return np.concatenate(arrays_of, axis=1)

    def weight(them: Sequence[QuantizedWeight]) -> QuantizedWeight:
        codes, scale, zero_point = (
            joined([getattr(one, name) for one in them]) for name in ("codes", "scale", "zero_point")
        )
        return QuantizedWeight(codes, scale, zero_point, them[0].grid)

    def error(them: Sequence[tuple[Matrix, Matrix]]) -> tuple[Matrix, Matrix]:
        return joined([one[0] for one in them]), joined([one[1] for one in them])

    whole = Candidates(
        weight([one.rounded for one in parts]), weight([one.solved for one in parts]),
        error([one.rounded_error for one in parts]), error([one.solved_error for one in parts]),
        joined([one.energy for one in parts]), parts[0].count,
    )  # fmt: skip
    return _divided(whole, channels, has_bias)


# Solving --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """Hold a weight as it was rounded and as it was solved, with what each costs.

    rounded_error, solved_error: variance and mean of each channel's error, [groups, out] each
    energy: E (W x)^2 of each channel, [groups, out]
    count: how many positions these are means of
    """

    rounded: QuantizedWeight
    solved: QuantizedWeight
    rounded_error: tuple[Matrix, Matrix]
    solved_error: tuple[Matrix, Matrix]
    energy: Matrix
    count: int


def _solve(
    weights: Sequence[Array], moments: Moments, centred: Moments, grid: Grid, method: Method, has_bias: bool
) -> list[Solution]:
    """Solve layers of one input; centred: `moments` about the mean."""
    shifts = has_bias and method.solver == "comq"
    if arrays.is_tensor(centred.gram) and not method.on_device(weights[0].shape[-1], grid):
        moments, centred = moments.on_host(), centred.on_host()
    whole = _joined(weights)
    find = _find_on_device if arrays.is_tensor(centred.gram) else _find_on_host
    candidates = find(whole, _taken(moments, centred, grid, shifts), centred, grid, method)
    return _divided(candidates, [w.shape[1] for w in weights], shifts)


def _joined(weights: Sequence[Array]) -> Array:
    """Return the weights of layers as one, in one order of numbers in memory, which a product's bytes may depend on."""
    return np.ascontiguousarray(weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1))


def _divided(candidates: Candidates, channels: Sequence[int], shifts: bool) -> list[Solution]:
    """Return the solution of each layer; channels: how many each has."""
    ends = np.cumsum(channels)
    return [_choose(candidates, k, shifts) for k in np.split(np.arange(ends[-1]), ends[:-1])]


def _taken(moments: Moments, centred: Moments, grid: Grid, shifts: bool) -> Moments:
    """Return the moments that a solver is given; shifts: whether a bias takes the mean of the error."""
    # a bias takes one number of a channel away, not one of each of its tied groups: these keep their means
    return centred if shifts and not grid.tied else moments


def _find_on_host(weight: Array, moments: Moments, centred: Moments, grid: Grid, method: Method) -> Candidates:
    """Round and solve a weight on the CPU; moments: what the solver is given."""
    return _candidates(weight, OutputError(weight, centred), method(weight, moments, grid), centred.count)


def _candidates(weight: Array, errors: OutputError, solved: QuantizedWeight, count: int) -> Candidates:
    """Put a weight as it was solved beside what plain rounding makes of it; errors: what each costs."""
    rounded = rtn(weight, solved.grid)
    return Candidates(rounded, solved, errors.of(rounded), errors.of(solved), errors.energy, count)


def _find_on_device(weight: Array, moments: Moments, centred: Moments, grid: Grid, method: Method) -> Candidates:
    """Round and solve a weight on the device of the moments, which are torch tensors."""
    import torch

    from comq_onnx.solve.gpu import clip, output_error, solver

    device: Any = centred.gram.device
    tensor = torch.as_tensor(weight, device=device)
    rounded = clip.round_to_nearest(tensor, grid)
    solved = rounded
    if method.solver == "comq":
        solved = solver.solve_comq(tensor, moments, grid, EFFORTS[method.effort])
    elif method.solver == "gptq":
        solved = solver.solve_gptq(tensor, moments, grid)
    errors = output_error.OutputError(tensor, centred)
    return Candidates(rounded, solved, errors.of(rounded), errors.of(solved), errors.energy, centred.count)


def _choose(candidates: Candidates, k: npt.NDArray[np.intp], shifts: bool) -> Solution:
    """Take the channels k of a layer as solved, but as rounded where solving made them worse.

    shifts: a shift of the bias takes the mean of the error of what is solved
    """
    variance, offset = (numbers[:, k] for numbers in candidates.solved_error)
    rounded_variance, rounded_offset = (numbers[:, k] for numbers in candidates.rounded_error)
    plain = rounded_variance + rounded_offset**2
    grid = candidates.solved.grid
    carried = _carried(variance, offset, candidates.count, grid) * shifts
    rounded_carried = _carried(rounded_variance, rounded_offset, candidates.count, grid) * shifts
    error = variance + (offset - carried) ** 2
    rounded_error = rounded_variance + (rounded_offset - rounded_carried) ** 2
    worse = error > rounded_error
    if grid.per_tensor:
        worse = np.full_like(worse, error.sum() > rounded_error.sum())
    elif grid.tied:
        worse = np.broadcast_to(error.sum(axis=0) > rounded_error.sum(axis=0), worse.shape)
    energy = max(float(candidates.energy[:, k].sum()), float(np.finfo(np.float64).tiny))
    shift = np.where(worse, rounded_carried, carried).astype(np.float32) if shifts else None
    rounded, solved = (one.part(slice(None), k) for one in (candidates.rounded, candidates.solved))
    best = _select_channels(worse, rounded, solved)
    total = float(np.where(worse, rounded_error, error).sum())
    return Solution(best, shift, total / energy, float(plain.sum()) / energy)


def _carried(variance: Matrix, offset: Matrix, count: int, grid: Grid) -> Matrix:
    """Return the part of the mean errors [groups, out] that a bias is to take away: what is more than chance.

    Tied groups have one bias.
    """
    if not grid.tied:
        return _significant(variance, offset, count)
    mean = offset.mean(axis=0, keepdims=True)
    spread = (variance + (offset - mean) ** 2).mean(axis=0, keepdims=True)
    return np.broadcast_to(_significant(spread, mean, count * len(offset)), offset.shape)


def _significant(variance: Matrix, offset: Matrix, count: int) -> Matrix:
    """Return the mean errors [groups, out] that are more than chance, and 0 for all others.

    The mean of `count` errors of mean 0 has a variance of variance / count. Of many channels some are beyond
    SIGNIFICANT by chance: none count where all together are not. By chance their squares, over those variances, add up
    to the number of channels, give or take the root of twice that number.
    """
    # without a variance nothing is chance; a bound keeps the ratio finite
    by_chance = np.maximum(variance / count, np.maximum(1e-12 * offset**2, np.finfo(np.float64).tiny))
    squares = offset**2 / by_chance
    if squares.sum() <= squares.size + TOGETHER * np.sqrt(2 * squares.size):
        return np.zeros_like(offset)
    return np.where(squares > SIGNIFICANT**2, offset, 0.0)


def _select_channels(mask: npt.NDArray[np.bool_], first: QuantizedWeight, second: QuantizedWeight) -> QuantizedWeight:
    """Return the channels of `first` where mask [groups, out] holds, of `second` elsewhere."""
    if not mask.any():
        return second
    pick = mask[..., None]
    return QuantizedWeight(
        np.where(pick, first.codes, second.codes),
        np.where(pick, first.scale, second.scale),
        np.where(pick, first.zero_point, second.zero_point),
        second.grid,
    )
