"""Weights written into a graph, each in its form."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.plan.forms import WeightForm
from comq_onnx.plan.solved import Solved
from comq_onnx.solve.grid import Array, QuantizedWeight
from comq_onnx.write.biases import add_bias, fit_bias, float_bias, is_open_product, set_bias
from comq_onnx.write.codes import pack, shared_constant, store

Numbers = npt.NDArray[Any]


def emit_layer(model: ir.Model, nodes: dict[str, ir.Node], layer: Layer, solved: Solved) -> None:
    node = nodes[layer.name]
    solution = solved.solutions[layer.name]
    form = solved.plan.form(layer)
    if form is WeightForm.LOOKED_UP:
        _emit_gather(model, node, layer, solution.weight, solved)
        return
    bias = float_bias(model, layer, solution)
    if form is WeightForm.INTEGER:
        grid = solved.activation_grids[layer.input]
        exact = solved.plan.target.integer_bias and not is_open_product(node)
        weight = fit_bias(solution.weight, bias, grid.scale) if exact else solution.weight
        dequantized = _dequantize(model, node, layer, weight, solved)
        _set_weight(node, layer, dequantized)
        set_bias(model, nodes, layer, bias, dequantized if exact else None, grid.scale)
        if layer.op == "Gemm":
            # alpha has gone into the scales
            node.attributes.pop("alpha", None)
        return
    if form is WeightForm.BLOCKED:
        if layer.op == "Gemm":
            node = _gemm_as_matmul(model, node, layer, bias, solved.plan.activations)
        else:
            set_bias(model, nodes, layer, bias, None, None)
            adder = nodes[layer.bias_node] if layer.bias_node is not None else None
            if adder is None and bias is not None:
                adder = add_bias(model, node, layer, bias)
            if adder is not None:
                adder.op_type = _adding(adder, solved.plan.activations)
        _set_weight(node, layer, _dequantize_blocks(model, node, layer, solution.weight, solved), matmul=True)
        return
    set_bias(model, nodes, layer, bias, None, None)
    _set_weight(node, layer, _unpack_at_load(model, node, layer, solution.weight, solved))


def stored_bytes(model: ir.Model, layer: Layer) -> int:
    """What the weight of a layer takes in an emitted `model`: codes, scales and zero points."""
    names = (f"{layer.weight}.codes", f"{layer.name}.scale", f"{layer.name}.zero_point")
    values = (model.graph.initializers.get(name) for name in names)
    return sum(v.const_value.nbytes for v in values if v is not None and v.const_value is not None)


def _set_weight(node: ir.Node, layer: Layer, value: ir.Value, matmul: bool = False) -> None:
    node.replace_input_with(1 if matmul else layer.kind.weight_index, value)


def channel_scale(layer: Layer, weight: QuantizedWeight) -> Array:
    """Scales as DequantizeLinear wants them: [channels] along the layer's axis, or rank 0 for one per tensor; with the
    alpha of a Gemm, whose emitted form has none."""
    alpha = np.float32(layer.kind.alpha)
    if weight.grid.per_tensor:
        return np.asarray(weight.scale.flat[0] * alpha, np.float32)
    return np.asarray(weight.scale.reshape(-1) * alpha, np.float32)


def _codes(model: ir.Model, layer: Layer, codes: Numbers, weight: QuantizedWeight, solved: Solved) -> ir.Value:
    container, planes = solved.plan.container(layer, weight.grid.bits)
    return store(model, layer.weight, codes, container, planes)


def _dequantize(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved) -> ir.Value:
    """codes -> Cast to INT8 where packed -> DequantizeLinear along the channels; the zero point of a matrix always
    written: without it ONNX Runtime does not fuse a Gemm."""
    codes = _codes(model, layer, layer.kind.from_matrix(weight.codes), weight, solved)
    if codes.dtype != ir.DataType.INT8:
        codes = graphs.insert(node, "Cast", [codes], {"to": ir.DataType.INT8}, f"{layer.name}.int8")
    scale = channel_scale(layer, weight)
    zero = weight.zero_point.flat[0] if weight.grid.per_tensor else weight.zero_point.reshape(-1)
    parts = [codes, graphs.add_initializer(model.graph, f"{layer.name}.scale", scale)]
    if weight.zero_point.any() or layer.op in ("MatMul", "Gemm"):
        parts.append(graphs.add_initializer(model.graph, f"{layer.name}.zero_point", np.asarray(zero, np.int8)))
    attributes = {} if weight.grid.per_tensor else {"axis": layer.kind.axis}
    return graphs.insert(node, "DequantizeLinear", parts, attributes, f"{layer.name}.weight")


def _dequantize_blocks(
    model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved
) -> ir.Value:
    """A weight-only MatMul's weight [in, out] in blocks along the inputs; per channel where the opset or the target has
    no blocks.

    A channel's one scale is repeated for every block: the same weight, and the form that becomes MatMulNBits.
    """
    inputs = weight.codes.shape[-1]
    grid = weight.grid
    block = grid.block_size or solved.plan.target.block_of(inputs, grid.bits)
    if solved.plan.opset < 21 or block is None:
        return _dequantize_columns(model, node, layer, weight, solved)
    of = np.minimum(np.arange(-(-inputs // block)) * block, inputs - 1) // (grid.block_size or inputs)
    scale = np.asarray(weight.scale[0][:, of].T * _alpha(layer), np.float32)
    zero = weight.zero_point[0][:, of].T
    codes = _codes(model, layer, weight.codes[0].T, weight, solved)
    parts = [codes, graphs.add_initializer(model.graph, f"{layer.name}.scale", scale)]
    if zero.any():
        assert codes.dtype is not None
        packed = pack(zero, codes.dtype.name)
        parts.append(graphs.add_initializer(model.graph, f"{layer.name}.zero_point", packed))
    return graphs.insert(node, "DequantizeLinear", parts, {"axis": 0, "block_size": block}, f"{layer.name}.weight")


def _dequantize_columns(
    model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved
) -> ir.Value:
    codes = _codes(model, layer, weight.codes[0].T, weight, solved)
    scale = channel_scale(layer, weight)
    zero = weight.zero_point.flat[0] if weight.grid.per_tensor else weight.zero_point.reshape(-1)
    parts = [codes, graphs.add_initializer(model.graph, f"{layer.name}.scale", scale)]
    if weight.zero_point.any():
        assert codes.dtype is not None
        packed = pack(np.asarray(zero), codes.dtype.name)
        parts.append(graphs.add_initializer(model.graph, f"{layer.name}.zero_point", packed))
    attributes = {} if weight.grid.per_tensor else {"axis": 1}
    return graphs.insert(node, "DequantizeLinear", parts, attributes, f"{layer.name}.weight")


def _alpha(layer: Layer) -> np.float32:
    return np.float32(layer.kind.alpha)


def _unpack_at_load(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved) -> ir.Value:
    """codes -> floats (-> Sub zero point) -> Mul scale, all constant: folded when the runtime loads the model."""

    # a stack of INT4 matrices times one number is what TensorRT fails to compile
    single = weight.grid.per_tensor and layer.kind.takes_scalar_scale

    def spread(numbers: Numbers) -> Numbers:
        return np.asarray(numbers.flat[0]) if single else layer.kind.spread_scale(numbers[..., 0])

    if layer.nested:
        # in the main graph, where every runtime folds constants, and once for all iterations
        node = next(iter(model.graph))
    codes = _codes(model, layer, layer.kind.from_matrix(weight.codes), weight, solved)
    value = _as_float(model, node, codes, solved.plan.target.unpack, f"{layer.name}.float")
    if weight.zero_point.any():
        zero = spread(weight.zero_point).astype(np.float32)
        part = graphs.add_initializer(model.graph, f"{layer.name}.zero_point", zero)
        value = graphs.insert(node, "Sub", [value, part], {}, f"{layer.name}.steps")
    part = graphs.add_initializer(model.graph, f"{layer.name}.scale", np.asarray(spread(weight.scale), np.float32))
    return graphs.insert(node, "Mul", [value, part], {}, f"{layer.name}.weight")


def _as_float(model: ir.Model, node: ir.Node, codes: ir.Value, unpack: str, name: str) -> ir.Value:
    """Codes as floats of the same numbers: by a Cast, or by a DequantizeLinear of scale 1."""
    if unpack == "Cast":
        return graphs.insert(node, "Cast", [codes], {"to": ir.DataType.FLOAT}, name)
    one = shared_constant(model.graph, "comq_onnx.one", np.asarray(1, np.float32))
    return graphs.insert(node, "DequantizeLinear", [codes, one], {}, name)


def _emit_gather(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved) -> None:
    indices = node.inputs[1]
    codes = _codes(model, layer, weight.codes[0], weight, solved)
    scale = graphs.add_initializer(model.graph, f"{layer.name}.scale", weight.scale[0])
    attributes = {"axis": 0}
    if solved.plan.target.unpack != "Cast":
        table = _as_float(model, node, codes, solved.plan.target.unpack, f"{layer.name}.float")
        value = graphs.insert(node, "Gather", [table, indices], attributes, f"{layer.name}.row")
    else:
        if codes.dtype != ir.DataType.INT8:
            # folded at load: ONNX Runtime looks nothing up in packed tables
            codes = graphs.insert(node, "Cast", [codes], {"to": ir.DataType.INT8}, f"{layer.name}.int8")
        found = graphs.insert(node, "Gather", [codes, indices], attributes, f"{layer.name}.row_codes")
        value = _as_float(model, node, found, solved.plan.target.unpack, f"{layer.name}.row")
    if weight.zero_point.any():
        zeros = graphs.add_initializer(model.graph, f"{layer.name}.zero_point", weight.zero_point[0].astype(np.float32))
        offset = graphs.insert(node, "Gather", [zeros, indices], attributes, f"{layer.name}.row_zero_point")
        value = graphs.insert(node, "Sub", [value, offset], {}, f"{layer.name}.row_steps")
    step = graphs.insert(node, "Gather", [scale, indices], attributes, f"{layer.name}.row_scale")
    # the last node takes over the name of what the lookup made
    out = node.outputs[0]
    product = ir.node("Mul", [value, step], name=f"{layer.name}.rows")
    _take_over(node, out, product)


def _adding(node: ir.Node, plan: ActivationPlan) -> str:
    """The op that adds the bias of a weight-only MatMul. Where the sum gets quantized ONNX Runtime takes MatMul, Add
    and QuantizeLinear for a Gemm, runs it in float and never makes it MatMulNBits; a Sum it leaves alone."""
    return "Sum" if str(node.outputs[0].name) in plan.values else "Add"


def _gemm_as_matmul(model: ir.Model, node: ir.Node, layer: Layer, bias: Array | None, plan: ActivationPlan) -> ir.Node:
    """x W + b instead of Gemm: with transB a Gemm never becomes MatMulNBits."""
    third = node.inputs[2] if len(node.inputs) > 2 else None
    addend: ir.Value | None = None
    if bias is not None:
        addend = graphs.add_initializer(model.graph, f"{layer.name}.bias", bias)
    elif third is not None and layer.kind.beta != 0:
        addend = third
        if layer.kind.beta != 1:
            beta = graphs.add_initializer(model.graph, f"{layer.name}.beta", np.asarray(layer.kind.beta, np.float32))
            addend = graphs.insert(node, "Mul", [third, beta], {}, f"{layer.name}.scaled_bias")
    product = ir.node("MatMul", [node.inputs[0], node.inputs[1]], name=f"{layer.name}.matmul")
    if addend is None:
        _take_over(node, node.outputs[0], product)
        return product
    product.outputs[0].name = f"{layer.name}.product"
    assert node.graph is not None
    node.graph.insert_before(node, product)
    _take_over(
        node, node.outputs[0], ir.node(_adding(node, plan), [product.outputs[0], addend], name=f"{layer.name}.add")
    )
    return product


def _take_over(node: ir.Node, out: ir.Value, replacement: ir.Node) -> None:
    """Put `replacement` in the place of `node`: its output gets the old one's name, type and readers."""
    new = replacement.outputs[0]
    new.name, new.type, new.shape = out.name, out.type, out.shape
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, replacement)
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
