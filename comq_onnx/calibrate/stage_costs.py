"""Predict which share of a walk each stage takes, so that progress tells the time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from comq_onnx.calibrate.layer_moments import enough_positions
from comq_onnx.calibrate.stages import Stage
from comq_onnx.model.layers import Layer
from comq_onnx.model.op_kind import OpKind
from comq_onnx.solve.grid import Array

# operations of a layer: the moments of its input, once for x^ x^T and half as much for x^ e^T; and the sweeps and
# roundings of the solver
MOMENTS, SOLVER = 3, 16
# seconds, about, on one core: an operation of a large product, one of the solver, a number of a tensor that is run and
# looked at, one of a window, and what each stage and each run of it take beside
PRODUCT_S, SOLVER_S, NUMBER_S, WINDOW_S, STAGE_S, RUN_S = 1e-11, 3e-11, 2e-9, 1e-9, 0.03, 5e-4

# the shape of the input of each layer, by the name of the value
Shapes = Mapping[str, tuple[int, ...]]


def stage_shares(
    parts: Sequence[Stage], shapes: Shapes, like: Sequence[tuple[int, ...]], needed: Sequence[int], total: int,
    runs: int, fewer: int,
) -> list[float]:  # fmt: skip
    """Return the share of the walk that is done after each stage, from 0 to 1.

    shapes: those that are known, for one sample, or for one batch if `needed` and `total` count batches
    like: the shapes of the model's inputs, for as much: a layer of unknown shape has as many positions as the largest
    needed: how many samples each stage needs
    total: the number of samples
    runs: the number of batches
    fewer: the number of positions that moments are made from is divided by this
    """
    usual = max((int(np.prod(shape[:-1])) for shape in like if len(shape) > 1), default=1)
    costs, passes = np.zeros(len(parts)), np.zeros(len(parts))
    for i, stage in enumerate(parts):
        costs[i] = STAGE_S + RUN_S * runs
        for layer in stage.layers:
            shape = shapes.get(layer.input, ())
            like_it = np.broadcast_to(np.float32(0), shape)
            costs[i] += _solving(layer, needed[i] * _positions(layer.kind.solved_as, like_it, usual), fewer)
            passes[i] += _passing(layer, _positions(layer.kind, like_it, usual))
    here = np.array(needed)
    costs += 2 * here * passes
    # samples that wait run in float ahead, and quantized once a stage needs them
    costs[0] += float(((total - here) * passes).sum())
    before = np.cumsum(passes) - passes
    costs[1:] += np.maximum(0, here[1:] - here[:-1]) * before[1:]
    return [float(share) for share in np.cumsum(costs) / costs.sum()]


def _positions(kind: OpKind, x: Array, usual: int) -> int:
    """Return the positions of an input; usual: where its shape is not known."""
    return kind.positions(x) if x.ndim > 1 else usual


def _passing(layer: Layer, positions: int) -> float:
    """Predict the seconds in which one sample passes a layer once; positions: of the sample."""
    kind = layer.kind
    if kind.is_lookup:
        return 0.0
    read = kind.inputs * kind.groups // int(np.prod(kind.kernel or (1,)))
    return positions * (2 * kind.inputs * kind.outputs * PRODUCT_S + (read + kind.outputs) * NUMBER_S)


def _solving(layer: Layer, positions: int, fewer: int) -> float:
    """Predict the seconds for the moments and the solution of a layer; positions: of all samples that it needs."""
    kind = layer.kind.solved_as
    if kind.is_lookup:
        return 0.0
    taken = min(positions, enough_positions(kind, fewer)) * kind.groups
    window = WINDOW_S * kind.inputs if kind.kernel else 0.0
    solver = SOLVER * kind.inputs**2 * kind.outputs * SOLVER_S
    return taken * (MOMENTS * kind.inputs**2 * PRODUCT_S + window) + solver
