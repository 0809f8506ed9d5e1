"""Choose the ridge: codes found on one half of the samples are judged on the other half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from comq_onnx.arrays import spread_indices
from comq_onnx.solve.few_inputs import FEW_INPUTS
from comq_onnx.solve.grid import Array, Codes, Grid, fit_mse
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.parallel import map_in_threads
from comq_onnx.solve.problem import RIDGE, Arranged, arrange, pose, take_part, visiting_order
from comq_onnx.solve.rounding import babai

# the ridges that are tried: from the middle outwards as long as the error on the other half falls
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# of so many channels in all, of so many groups
RIDGE_CHANNELS, RIDGE_GROUPS = 96, 4


def choose_ridge(weight: Array, moments: Moments, grid: Grid) -> float:
    """Return the ridge with which codes found on one half of the samples do best on the other; RIDGE without halves.

    A few channels of a few groups of the weight [groups, out, in] are Babai-rounded at the MSE-best scale.
    """
    if not moments.has_folds:
        return RIDGE
    groups = spread_indices(len(weight), RIDGE_GROUPS)
    channels = spread_indices(weight.shape[1], -(-RIDGE_CHANNELS // len(groups)))
    sample = np.ascontiguousarray(weight[np.ix_(groups, channels)])
    scale, zero = fit_mse(sample, grid)
    trials: list[_Trial] = []
    for k, g in enumerate(groups):
        first, second = _arrange_halves(moments.group(int(g)), weight.shape[-1])
        trials.append(_Trial(sample[k], scale[k], zero[k], grid, first, second))
        trials.append(_Trial(sample[k], scale[k], zero[k], grid, second, first))
    return search_ridge(lambda ridge: sum(map_in_threads(lambda trial: trial.held_out_error(ridge), trials)))


def search_ridge(error: Callable[[float], float]) -> float:
    """Return the ridge of RIDGES that is reached from RIDGE on, up and then down, as long as the error falls."""
    errors: dict[float, float] = {}

    def known_error(ridge: float) -> float:
        if ridge not in errors:
            errors[ridge] = error(ridge)
        return errors[ridge]

    k = RIDGES.index(RIDGE)
    for step in (1, -1):
        while 0 <= k + step < len(RIDGES) and known_error(RIDGES[k + step]) < known_error(RIDGES[k]):
            k += step
    return RIDGES[k]


def input_step(inputs: int) -> int:
    """Return 2 where every other input is enough to choose a ridge, else 1.

    Half the samples tell of half the inputs what all samples tell of all inputs.
    """
    return 2 if inputs >= 2 * FEW_INPUTS else 1


@dataclass(frozen=True)
class _Trial:
    """Describe one group's channels [channels, in] to be rounded on `seen` moments and judged on `unseen` ones."""

    weight: Array
    scale: Array
    zero: Codes
    grid: Grid
    seen: Arranged
    unseen: Arranged

    def held_out_error(self, ridge: float) -> float:
        """Return the objective on the unseen moments, summed over the channels."""
        part = take_part(pose(self.seen, self.grid, ridge), self.weight, self.zero.astype(np.float32))
        (one,), _ = babai([part], [part.whole()], [self.scale], [part.zero])
        unseen = replace(part.problem, h=self.unseen.gram, mismatch=self.unseen.mismatch)
        return float(take_part(unseen, self.weight, part.zero).objective(one.codes, one.scale).sum())


def _arrange_halves(moments: Moments, inputs: int) -> tuple[Arranged, Arranged]:
    """Return the two halves of one group's moments, of some of its inputs, in the visiting order of the whole."""
    order = visiting_order(moments.gram[0])[:: input_step(inputs)]
    halves = moments.take(order).folds()
    assert halves is not None
    first, second = (replace(arrange(half, np.arange(len(order))), order=order, inputs=inputs) for half in halves)
    return first, second
