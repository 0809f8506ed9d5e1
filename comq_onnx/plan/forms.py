"""How the weight of a layer is written: its form, its grid and its container on a target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from comq_onnx.model.convolutions import ConvTranspose
from comq_onnx.model.layers import Layer
from comq_onnx.model.operators import Gather, Gemm, MatMul
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.solve.grid import Grid
from comq_onnx.targets.target import WIDTHS, Target

# what the nodes that join the bit planes of a layer take in a file, about
PLANE_NODE_BYTES = 1500


def form(layer: Layer, plan: ActivationPlan) -> str:
    """`integer`, `blocked`, `folded` or `looked up`: how the layer's weight is written."""
    if isinstance(layer.kind, Gather):
        return "looked up"
    if layer.name in plan.integer_layers:
        return "integer"
    if layer.nested:
        return "folded"
    if isinstance(layer.kind, MatMul) and len(layer.weight_shape) == 2:
        return "blocked"
    if isinstance(layer.kind, Gemm) and not layer.kind.trans_a:
        return "blocked"
    return "folded"


def may_add_bias(layer: Layer, plan: ActivationPlan) -> bool:
    """Whether a layer without a bias can be given one: a weight-only MatMul, whose kernel takes it in."""
    return isinstance(layer.kind, MatMul) and form(layer, plan) == "blocked"


def container_of(
    layer: Layer, bits: int, plan: ActivationPlan, target: Target, opset: int
) -> tuple[str, tuple[int, ...]]:
    """The container of a layer's codes, and the widths of the bit planes that take its place: none where they save less
    than the nodes that join them take, or in a weight-only MatMul that would lose its 4-bit kernel by them."""
    how = form(layer, plan)
    storage = target.integer if how == "integer" else target.weight_only
    container, planes = storage.container(bits, opset)[0], storage.planes(bits, opset)
    if int(np.prod(layer.weight_shape)) * (WIDTHS[container] - bits) < 8 * PLANE_NODE_BYTES:
        planes = ()
    if how == "blocked" and container != "INT8":
        columns = layer.kind.axis
        assert columns is not None
        if container == "INT2" and layer.weight_shape[columns] % target.int2_columns:
            container = "INT4"
        return container, ()
    return container, planes


def code_bytes(layer: Layer, bits: int, plan: ActivationPlan, target: Target, opset: int) -> int:
    """The bytes that the codes of a layer take in the file at some bits."""
    container, planes = container_of(layer, bits, plan, target, opset)
    count = int(np.prod(layer.weight_shape))
    return sum(-(-count * width // 8) for width in planes or (WIDTHS[container],))


def supported_grid(layer: Layer, grid: Grid, target: Target) -> Grid:
    """The grid a layer's graph form can carry on a target: blocks only along a matrix's inputs, one scale for grouped
    ConvTranspose, symmetric where a zero point would have no place."""
    kind = layer.kind
    if isinstance(kind, Gather):
        return Grid(grid.bits, symmetric=True)
    matrix = isinstance(kind, (MatMul, Gemm)) and len(layer.weight_shape) == 2 and not layer.nested
    matrix = matrix and not (isinstance(kind, Gemm) and kind.trans_a)
    if not (grid.symmetric or target.weight_zero_points):
        grid = replace(grid, symmetric=True)
    if grid.block_size is not None and (
        not matrix or grid.block_size >= kind.inputs or not target.takes_blocks(kind.inputs, grid.block_size)
    ):
        return Grid(grid.bits, grid.symmetric)
    if isinstance(kind, ConvTranspose) and kind.group > 1:
        return Grid(grid.bits, grid.symmetric, per_tensor=True)
    return grid
