"""Take weights apart for the solver where their kind is solved as several matrices, and put solutions together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from comq_onnx.calibrate.finite import finite_weight
from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.model.op_kind import OpKind
from comq_onnx.solve.grid import Array, Grid, QuantizedWeight
from comq_onnx.solve.layer import Solution


def solved_weight(prepared: Prepared, layer: Layer) -> Array:
    """Return the weight of a layer as its solver takes it, [groups, out, in].

    Raises ModelError where it is not finite or too large.
    """
    kind = layer.kind
    weight = finite_weight(prepared, layer)
    if kind.solved_as is kind:
        return weight
    return np.ascontiguousarray(kind.solved_as.to_matrix(kind.from_matrix(weight)))


def solved_grid(kind: OpKind, grid: Grid) -> Grid:
    """Return the grid of a weight of that kind as its solver takes it."""
    if kind.solved_as is kind:
        return grid
    size = grid.block_size and kind.solved_as.inputs // grid.blocks(kind.inputs)
    return replace(grid, tied=True, block_size=size)


def as_solved(kind: OpKind, weight: QuantizedWeight) -> QuantizedWeight:
    """Return a quantized weight as the solver of its kind would give it."""
    if kind.solved_as is kind:
        return weight
    groups = kind.solved_as.groups
    return QuantizedWeight(
        kind.solved_as.to_matrix(kind.from_matrix(weight.codes)),
        np.repeat(weight.scale, groups, axis=0), np.repeat(weight.zero_point, groups, axis=0),
        solved_grid(kind, weight.grid),
    )  # fmt: skip


def as_stored(kind: OpKind, solution: Solution, grid: Grid) -> Solution:
    """Return a solution as the weight is stored; grid: that of the weight, `solved_grid` was made of."""
    if kind.solved_as is kind:
        return solution
    found = solution.weight
    codes = kind.to_matrix(kind.solved_as.from_matrix(found.codes))
    stored = QuantizedWeight(np.ascontiguousarray(codes), found.scale[:1], found.zero_point[:1], grid)
    return replace(solution, weight=stored, shift=None if solution.shift is None else solution.shift[:1])
