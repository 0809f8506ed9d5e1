"""Choose the ridge on halves of the samples: solve/ridge.py for torch tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from comq_onnx.arrays import spread_indices
from comq_onnx.solve.gpu.problem import Arranged, arrange, centring_noise, pose, take_part, visiting_order
from comq_onnx.solve.gpu.rounding import best_babai
from comq_onnx.solve.grid import Grid, fit_mse
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.problem import RIDGE
from comq_onnx.solve.ridge import RIDGE_CHANNELS, RIDGE_GROUPS, input_step, search_ridge

Tensor: TypeAlias = Any


def choose_ridge(weight: Tensor, moments: Moments, grid: Grid) -> float:
    """Return the ridge with which codes found on one half of the samples do best on the other; RIDGE without halves."""
    if not moments.has_folds:
        return RIDGE
    groups, out, inputs = weight.shape
    some = spread_indices(groups, RIDGE_GROUPS)
    channels = spread_indices(out, -(-RIDGE_CHANNELS // len(some)))
    sample = weight[torch.as_tensor(some, device=weight.device)][:, torch.as_tensor(channels, device=weight.device)]
    clip = fit_mse(np.ascontiguousarray(sample.cpu().numpy()), grid)
    scale, zero = (torch.as_tensor(x.astype(np.float32), device=weight.device).mT.contiguous() for x in clip)
    first, second = _arrange_halves(moments.groups(some), inputs)

    def held_out_error(seen: Arranged, unseen: Arranged, ridge: float) -> float:
        part = take_part(pose(seen, grid, ridge), sample)
        one, _ = best_babai(part, part.whole(), [scale], [zero])
        judged = take_part(replace(part.problem, h=unseen.gram, mismatch=unseen.mismatch), sample)
        return float(judged.objective(one.codes, one.scale).sum())

    return search_ridge(lambda ridge: held_out_error(first, second, ridge) + held_out_error(second, first, ridge))


def _arrange_halves(moments: Moments, inputs: int) -> tuple[Arranged, Arranged]:
    """Return the two halves of the moments, of some of the inputs, in the visiting order of the whole."""
    order = visiting_order(moments.gram)[:, :: input_step(inputs)]
    halves = moments.folds()
    assert halves is not None
    first, second = (
        replace(arrange(half, order), noise=centring_noise(torch.take_along_dim(half.mean, order, 1)), inputs=inputs)
        for half in halves
    )
    return first, second
