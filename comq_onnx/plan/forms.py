"""Choose how the weight of a layer is written on a target: its form, its grid and its container."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from enum import Enum

import numpy as np

from comq_onnx.model.layers import Layer
from comq_onnx.options.options import LEAST_BLOCK
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.solve.grid import Grid
from comq_onnx.targets.target import WIDTHS, Target

# blocks of a weight-only MatMul, and uint16 activations, came with this opset
BLOCKS_OPSET = 21
# about how many bytes the nodes that join the bit planes of a layer take in a file
PLANE_NODE_BYTES = 1500


class WeightForm(Enum):
    """Name the ways in which a weight is written, from the fastest to the most general.

    INTEGER: codes -> (Cast to INT8) -> DequantizeLinear per channel. The layer's input is quantized, and its bias is
        int32 of scale s_x * s_w (float where the target wants that, or where an int32 bias would be dequantized at
        every call). ONNX Runtime folds the Cast at load and runs its int8 kernels; the file holds 4 (2) bits a weight.
    BLOCKED: for a weight-only MatMul, codes in blocks along the inputs -> DequantizeLinear; it becomes MatMulNBits,
        which is faster than floats where there are few rows or many weights.
    FOLDED: for any other weight-only layer, codes -> Cast to FLOAT -> Mul by the scale. Runtimes fold both at load: the
        file is small, and the layer as fast as the float one. A DequantizeLinear would run at every call in ONNX
        Runtime. TensorRT takes codes only from a DequantizeLinear, so one of scale 1 stands there for the Cast. Scales
        that do not broadcast against the weight (per group and output of a ConvTranspose, per block of a convolution)
        multiply codes of another shape, and a Reshape makes the weight of the product.
    LOOKED_UP: for embeddings of more than a few rows, Gather of codes -> Cast -> Mul by the Gather of scales. Only the
        rows that are looked up become floats.
    """

    INTEGER = "integer"
    BLOCKED = "blocked"
    FOLDED = "folded"
    LOOKED_UP = "looked up"


def form_of(layer: Layer, activations: ActivationPlan, unpacked: Set[str] = frozenset()) -> WeightForm:
    """Choose how the weight of a layer is written.

    unpacked: the names of products and tables that are FOLDED where they could be BLOCKED or LOOKED_UP
    """
    if layer.kind.is_lookup:
        return WeightForm.FOLDED if layer.name in unpacked else WeightForm.LOOKED_UP
    # no runtime has an integer kernel for wider activations: the layer reads them as floats again
    if layer.name in activations.integer_layers and np.iinfo(activations.dtype).bits == 8:
        return WeightForm.INTEGER
    if layer.nested and not layer.in_branch:
        return WeightForm.FOLDED
    return WeightForm.BLOCKED if layer.kind.is_matrix and layer.name not in unpacked else WeightForm.FOLDED


def may_add_bias(layer: Layer, form: WeightForm) -> bool:
    """Tell whether a layer without a bias can be given one: a weight-only MatMul, whose kernel adds biases too."""
    return layer.kind.bias_index is None and form is WeightForm.BLOCKED and not layer.is_normalized


def container_of(layer: Layer, form: WeightForm, bits: int, target: Target, opset: int) -> tuple[str, tuple[int, ...]]:
    """Return the container of a layer's codes, and the widths of the bit planes that are stored in its place.

    There are no planes, (), where they save less than the nodes that join them take, and in a weight-only MatMul that
    would lose its 4-bit kernel by them.
    """
    storage = target.integer if form is WeightForm.INTEGER else target.weight_only
    container, planes = storage.container(bits, opset)[0], storage.planes(bits, opset)
    if int(np.prod(layer.weight_shape)) * (WIDTHS[container] - bits) < 8 * PLANE_NODE_BYTES:
        planes = ()
    if form is WeightForm.BLOCKED and container != "INT8":
        if container == "INT2" and layer.kind.outputs % target.int2_columns:
            container = "INT4"
        return container, ()
    return container, planes


def code_bytes(layer: Layer, form: WeightForm, bits: int, target: Target, opset: int) -> int:
    """Return the bytes that the codes of a layer take in the file at `bits` bits."""
    container, planes = container_of(layer, form, bits, target, opset)
    count = int(np.prod(layer.weight_shape))
    return sum(-(-count * width // 8) for width in planes or (WIDTHS[container],))


def may_overflow(layer: Layer, activations: ActivationPlan, target: Target) -> bool:
    """Tell whether x86 CPUs without VNNI could add two products of a layer to more than 16 bits hold.

    Their kernels multiply uint8 activations by int8 codes, and add the products of neighbouring inputs with saturation.
    """
    if layer.name not in activations.integer_layers or activations.dtype != "uint8":
        return False
    kind = layer.kind
    exact = target.exact_depthwise and kind.is_depthwise and kind.outputs == kind.groups
    return not exact


def supported_grid(layer: Layer, form: WeightForm, grid: Grid, target: Target) -> Grid:
    """Return the grid nearest to `grid` that the form of a layer can hold on a target.

    Where the target takes no zero points the grid is symmetric.
    """
    if form is WeightForm.LOOKED_UP:
        return Grid(grid.bits, symmetric=True, signed=target.signed_scales)
    if not (grid.symmetric or target.weight_zero_points):
        grid = replace(grid, symmetric=True)
    grid = replace(grid, signed=grid.symmetric and target.signed_scales)
    return grid if grid.block_size is None else replace(grid, block_size=_block(layer, form, grid.block_size, target))


def _block(layer: Layer, form: WeightForm, wanted: int, target: Target) -> int | None:
    """Return the number of inputs that share a scale: `wanted`, or the next smaller that can be written.

    None for a scale per channel: where a block is no smaller than one, and in integer layers.
    """
    inputs = layer.kind.inputs
    if wanted >= inputs or form not in (WeightForm.BLOCKED, WeightForm.FOLDED):
        return None
    sizes = [wanted >> k for k in range(wanted.bit_length()) if wanted >> k >= LEAST_BLOCK]
    if form is WeightForm.BLOCKED:
        return next((size for size in sizes if target.takes_blocks(inputs, size)), None)
    return next((size for size in sizes if layer.kind.takes_blocks(size)), None)
