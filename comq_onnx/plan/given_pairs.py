"""Read the grids of QuantizeLinear and DequantizeLinear nodes that the source has for its activations.

Where such a node has the form that the target runs, its grid is taken over: the value is rounded once, and no second
pair is written beside the source's.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.plan.activation_grid import ActivationGrid


def given_grid(value: ir.Value, dtype: str) -> ActivationGrid | None:
    """Return the grid on which the source itself rounds a value; None where it does not, or in another form.

    The value comes out of a DequantizeLinear, or goes into a QuantizeLinear.

    dtype: the type of the codes that the target takes
    """
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return grid_of(producer, dtype)
    quantizers = (node for node, index in value.uses() if node.op_type == "QuantizeLinear" and index == 0)
    return next((grid for node in quantizers if (grid := grid_of(node, dtype)) is not None), None)


def grid_of(node: ir.Node, dtype: str) -> ActivationGrid | None:
    """Return the grid of a QuantizeLinear or a DequantizeLinear of an activation; None for weights and other forms.

    The form is that of our own pairs: a constant scale and zero point of rank 0, and codes of type `dtype`.
    """
    if node.domain not in ("", "ai.onnx") or len(node.inputs) < 3 or graphs.is_constant(node.inputs[0]):
        return None
    scale, zero = graphs.constant(node.inputs[1]), graphs.constant(node.inputs[2])
    if (
        scale is None
        or zero is None
        or scale.ndim
        or zero.ndim
        or scale.dtype != np.float32
        or str(zero.dtype) != dtype
    ):
        return None
    if not (np.isfinite(scale) and scale > 0) or (zero.dtype.kind == "i" and zero != 0):
        return None
    return ActivationGrid(np.float32(scale), int(zero), dtype)


def dequantized(value: ir.Value, grid: ActivationGrid) -> ir.Value | None:
    """Return the value that is `value` rounded to `grid`, where the graph has it already; None where it does not.

    It is the value itself where a DequantizeLinear makes it, or else what a pair of nodes in its graph makes of it.
    """
    producer = value.producer()
    home = producer.graph if producer is not None else value.graph
    if producer is not None and producer.op_type == "DequantizeLinear":
        return value if grid_of(producer, grid.dtype) == grid else None
    for quantize, index in value.uses():
        if quantize.op_type != "QuantizeLinear" or index or quantize.graph is not home:
            continue
        for node, place in quantize.outputs[0].uses():
            behind = node.op_type == "DequantizeLinear" and place == 0 and node.graph is home
            if behind and grid_of(quantize, grid.dtype) == grid == grid_of(node, grid.dtype):
                return node.outputs[0]
    return None


def is_between_pairs(node: ir.Node, made: ir.Value) -> bool:
    """Tell whether a layer reads what a DequantizeLinear of the source makes, and a QuantizeLinear reads its result.

    made: the output of the layer, or of the activation function that is fused into it
    """
    read = node.inputs[0]
    producer = None if read is None else read.producer()
    dequantized = producer is not None and producer.op_type == "DequantizeLinear"
    return dequantized and any(reader.op_type == "QuantizeLinear" for reader, _ in made.uses())
