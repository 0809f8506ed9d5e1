"""Write the biases of quantized layers: as floats, or as int32 with the scale of the products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer
from comq_onnx.solve.grid import LEAST_SCALE, Array, QuantizedWeight
from comq_onnx.solve.layer import Solution


def is_open_product(node: ir.Node) -> bool:
    """Tell whether a node is a MatMul whose input has more than two axes, not all of known size.

    ONNX Runtime takes any other MatMul and its Add for a Gemm, which runs in integers only with an int32 bias. With
    this one it would dequantize an int32 bias at every call.
    """
    value = node.inputs[0]
    shape = value.shape if value is not None else None
    return (
        node.op_type == "MatMul" and shape is not None and len(shape) > 2 and not all(isinstance(d, int) for d in shape)
    )


def add_bias(model: ir.Model, node: ir.Node, layer: Layer, bias: Array) -> ir.Node:
    """Insert the Add of a bias [out] behind a MatMul that has none, and return it; the sum takes the product's name."""
    addend = graphs.add_initializer(model.graph, f"{layer.name}.bias", bias)
    return graphs.append(node.outputs[0], "Add", [addend], f"{layer.name}.add_bias", f"{layer.name}.product")


def float_bias(model: ir.Model, layer: Layer, solution: Solution) -> Array | None:
    """Return the float bias [out] with the solution's shift; None where there is neither."""
    bias = None
    if layer.bias is not None:
        tensor = model.graph.initializers[layer.bias].const_value
        assert tensor is not None
        bias = layer.kind.own_bias(tensor.numpy())
    if solution.shift is None:
        return bias
    shift = solution.shift.reshape(-1)
    return shift if bias is None else bias + shift


def set_bias(
    model: ir.Model,
    nodes: dict[str, ir.Node],
    layer: Layer,
    bias: Array | None,
    weight: ir.Value | None,
    input_scale: np.float32 | None,
) -> None:
    """Write the bias of a layer where it has one: as float32, or as int32 of scale s_x * s_w.

    nodes: the nodes of the model, by name
    bias: the new bias, [out]; None where nothing is written
    weight: the dequantized weight, whose scale is s_w
    input_scale: s_x; the bias is float32 where this or `weight` is None
    """
    if bias is None or layer.bias_node is None:
        return
    adder = nodes[layer.bias_node]
    if layer.kind.is_recurrent:
        # one initializer holds the biases of both weights of the node
        bias = layer.kind.with_own_bias(graphs.constant(adder.inputs[3]), bias)
    if weight is None or input_scale is None:
        value = graphs.add_initializer(model.graph, f"{layer.name}.bias", bias)
    else:
        value = _integer_bias(model, adder, layer, bias, weight, input_scale)
    if adder.name != layer.node:
        index = next(i for i, v in enumerate(adder.inputs) if v is not None and v.name == layer.bias)
        adder.replace_input_with(index, value)
        return
    place = layer.kind.bias_index
    assert place is not None
    if len(adder.inputs) <= place:
        adder.resize_inputs(place + 1)
    adder.replace_input_with(place, value)
    # beta has gone into the bias
    adder.attributes.pop("beta", None)


def _integer_bias(
    model: ir.Model, adder: ir.Node, layer: Layer, bias: Array, weight: ir.Value, input_scale: np.float32
) -> ir.Value:
    """Write int32 codes -> DequantizeLinear.

    The scales of channels are not stored again: they are multiplied when the model is loaded.
    """
    dequantize = weight.producer()
    assert dequantize is not None
    weight_scale = dequantize.inputs[1]
    assert weight_scale is not None
    assert weight_scale.const_value is not None
    product = input_scale * np.asarray(weight_scale.const_value.numpy(), np.float32)
    most = np.iinfo(np.int32).max
    codes = np.clip(np.rint(bias.astype(np.float64) / product), -most, most).astype(np.int32)
    parts = [graphs.add_initializer(model.graph, f"{layer.name}.bias_codes", codes)]
    if product.ndim:
        factor = graphs.add_initializer(model.graph, f"{layer.name}.input_scale", np.asarray(input_scale))
        parts.append(graphs.insert(adder, "Mul", [weight_scale, factor], {}, f"{layer.name}.bias_scale"))
    else:
        scale = np.full(bias.shape, product, np.float32)
        parts.append(graphs.add_initializer(model.graph, f"{layer.name}.bias_scale", scale))
    return graphs.insert(adder, "DequantizeLinear", parts, {"axis": 0}, f"{layer.name}.bias")


def fit_bias(weight: QuantizedWeight, bias: Array | None, input_scale: np.float32) -> QuantizedWeight:
    """Return the weight of an integer layer with other scales in channels whose bias they would not suit.

    The bias becomes int32 of scale s_x * s_w; a float one too, since ONNX Runtime makes it int32 itself and clips it.
    So a channel gets a larger scale where its bias does not fit (its weights are almost zero beside it, as a folded
    BatchNorm leaves some), and where the product of the scales would lose bits. A channel of zeros takes any scale: it
    gets the one at which its bias is most exact. Where a weight of one scale has such channels, each channel has one.

    bias: the bias, [out]
    input_scale: s_x
    """
    if weight.scale.shape[-1] != 1:
        return weight
    size = np.zeros(weight.scale.shape) if bias is None else np.abs(bias.astype(np.float64)).reshape(weight.scale.shape)
    needed = np.maximum(size / 2**30, LEAST_SCALE) / np.float64(input_scale)
    needed = np.minimum(needed, np.finfo(np.float32).max)
    steps = weight.codes - weight.zero_point.astype(np.float64)
    needed = np.where(weight.scale < 0, -needed, needed)
    changed = (np.abs(needed) > np.abs(weight.scale)) | (~steps.any(axis=-1, keepdims=True) & (size > 0))
    if not changed.any():
        return weight
    scale = np.where(changed, needed, weight.scale).astype(np.float32)
    steps = np.rint(steps * (weight.scale.astype(np.float64) / scale))
    codes = (steps + weight.zero_point).astype(np.int8)
    return QuantizedWeight(codes, scale, weight.zero_point, replace(weight.grid, per_tensor=False))
