"""Solve by the default method on a GPU: the steps of comq.py for moments that are torch tensors.

Objective, start, descent and choices are those of the CPU, and so are the codes up to ties; only the order of sums
differs. All groups are one batch; all channels, zero points and scales are columns of one tensor [groups, in, columns].
A pass over the inputs, be it Babai rounding or a sweep, is two kernels in turn: the step inside a block of BLOCK inputs
(step.py), and a matrix product for what the block did to the inputs behind it. The moves at the end, best first, go on
in all channels at once until none has any left (moves.py).

Method.on_device tells what is solved here; the rest (the paper's algorithm, a beam, bit planes, problems of few inputs)
is solved on the CPU from the same moments.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from comq_onnx.solve.comq import GPTQ_RIDGE
from comq_onnx.solve.effort import Effort
from comq_onnx.solve.gpu.clip import fit_mse
from comq_onnx.solve.gpu.descent import descend, refit_to_float
from comq_onnx.solve.gpu.problem import Problem, arrange, pose, take_part
from comq_onnx.solve.gpu.ridge import choose_ridge
from comq_onnx.solve.gpu.rounding import Rounding, babai_codes, best_start
from comq_onnx.solve.grid import Grid, QuantizedWeight
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.problem import RIDGE

Tensor: TypeAlias = Any
# a tensor [groups, in, columns] of the search holds at most so many numbers: more channels are solved in turn
MOST_NUMBERS = 1 << 27


def solve_comq(weight: Tensor, moments: Moments, grid: Grid, effort: Effort) -> QuantizedWeight:
    """Quantize a weight [groups, out, in] on the device of the moments, as comq.solve_comq does."""
    ridge = choose_ridge(weight, moments, grid) if effort.choose_ridge else RIDGE
    return _solve(weight, pose(arrange(moments), grid, ridge), effort)


def solve_gptq(weight: Tensor, moments: Moments, grid: Grid) -> QuantizedWeight:
    """Quantize a weight [groups, out, in] on the device of the moments, as comq.solve_gptq does."""
    alone = Moments(moments.gram, moments.mean, moments.count)
    return _solve(weight, pose(arrange(alone), grid, GPTQ_RIDGE), None)


def _solve(weight: Tensor, problem: Problem, effort: Effort | None) -> QuantizedWeight:
    """Solve as many channels at once as fit; effort: None for one pass of rounding at the MSE-best scale."""
    grid, (groups, out, inputs) = problem.grid, weight.shape
    scale, zero = fit_mse(weight, grid)
    candidates = 1 if effort is None else max(len(effort.factors), 3)
    width = out if grid.per_tensor else max(1, MOST_NUMBERS // (groups * inputs * candidates))
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, out, width):
        some = slice(start, start + width)
        part = take_part(problem, weight[:, some])
        begun = scale[:, some].mT.contiguous(), zero[:, some].mT.contiguous()
        if effort is None:
            found = Rounding(babai_codes(part, *begun)[0], *begun, begun[0][:, 0])
        else:
            found = refit_to_float(part, descend(part, best_start(part, *begun, effort), effort))
        whole = found.codes + problem.rows(found.zero)
        back = torch.empty_like(whole).scatter_(1, problem.order[:, :, None].expand_as(whole), whole)
        codes[:, some] = back.mT.to(torch.int8)
        scale[:, some], zero[:, some] = found.scale.mT, found.zero.mT
    return QuantizedWeight(codes.cpu().numpy(), scale.cpu().numpy(), zero.to(torch.int8).cpu().numpy(), grid)
