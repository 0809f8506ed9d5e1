"""Write weights into a graph, each in its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.plan.forms import WeightForm
from comq_onnx.plan.solved import Solved
from comq_onnx.solve.grid import MAX_BITS, Array, QuantizedWeight
from comq_onnx.write.biases import add_bias, fit_bias, float_bias, is_open_product, set_bias
from comq_onnx.write.codes import for_one_reader, pack, shared_constant, store

Numbers = npt.NDArray[Any]


def emit_layer(model: ir.Model, nodes: dict[str, ir.Node], layer: Layer, solved: Solved) -> None:
    """Rewrite a layer of `model` in place: its weight in its form, with the bias that belongs to it.

    nodes: the nodes of the model, by name
    """
    node, solution = nodes[layer.node], solved.solutions[layer.name]
    form = solved.plan.form(layer)
    if form is WeightForm.LOOKED_UP:
        _emit_gather(model, node, layer, solution.weight, solved)
        return
    bias = float_bias(model, layer, solution)
    if form is WeightForm.INTEGER:
        _emit_integer(model, nodes, layer, solution.weight, bias, solved)
    elif form is WeightForm.BLOCKED:
        _emit_product(model, nodes, layer, solution.weight, bias, solved)
    else:
        set_bias(model, nodes, layer, bias, None, None)
        unpacked = _unpack_at_load(model, node, layer, solution.weight, solved)
        node.replace_input_with(layer.kind.weight_index, unpacked)


def stored_bytes(model: ir.Model, layer: Layer) -> int:
    """Return the bytes that the weight of a layer takes in an emitted `model`: codes, scales and zero points."""
    planes = (f"{layer.weight}.codes.plane_{k}" for k in range(MAX_BITS))
    names = (f"{layer.weight}.codes", *planes, f"{layer.name}.scale", f"{layer.name}.zero_point")
    values = (model.graph.initializers.get(name) for name in names)
    return sum(v.const_value.nbytes for v in values if v is not None and v.const_value is not None)


def channel_scale(weight: QuantizedWeight) -> Array:
    """Return the scales as DequantizeLinear takes them: [channels], or of rank 0 where the weight has one scale."""
    return np.asarray(weight.scale.flat[0] if weight.grid.per_tensor else weight.scale.reshape(-1), np.float32)


# Integer layers
# ----------------------------------------------------------------------------------------------------------------------


def _emit_integer(
    model: ir.Model,
    nodes: dict[str, ir.Node],
    layer: Layer,
    weight: QuantizedWeight,
    bias: Array | None,
    solved: Solved,
) -> None:
    """Write an integer layer; its bias is int32 where the target takes that."""
    node, input_scale = nodes[layer.node], solved.activation_grids[layer.input].scale
    integer_bias = solved.plan.target.integer_bias and not is_open_product(node)
    weight = fit_bias(weight, bias, input_scale)
    dequantized = _dequantize(model, node, layer, weight, solved)
    node.replace_input_with(layer.kind.weight_index, dequantized)
    set_bias(model, nodes, layer, bias, dequantized if integer_bias else None, input_scale)
    if layer.op == "Gemm" and bias is None and (addend := _gemm_addend(model, node, layer, None)) is not None:
        _add_behind(node, layer, addend)


def _dequantize(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved) -> ir.Value:
    """Write codes -> Cast to INT8 where they are packed -> DequantizeLinear along the channels."""
    codes = _codes(model, layer, layer.kind.from_matrix(weight.codes), solved)
    if codes.dtype != ir.DataType.INT8:
        codes = graphs.insert(node, "Cast", [codes], {"to": ir.DataType.INT8}, f"{layer.name}.int8")
    # without a zero point ONNX Runtime does not fuse a Gemm
    with_zero = layer.op in ("MatMul", "Gemm")
    return _dequantize_channels(model, node, layer, weight, codes, "INT8", layer.kind.axis, with_zero)


def _dequantize_channels(
    model: ir.Model,
    node: ir.Node,
    layer: Layer,
    weight: QuantizedWeight,
    codes: ir.Value,
    container: str,
    axis: int | None,
    with_zero: bool,
) -> ir.Value:
    """Write the DequantizeLinear of codes with a scale per channel along `axis`, or one for all.

    container: the type of the codes
    with_zero: whether a zero point of 0 is written too
    """
    zero = np.asarray(weight.zero_point.flat[0] if weight.grid.per_tensor else weight.zero_point.reshape(-1))
    packed = pack(zero, container) if with_zero or zero.any() else None
    attributes = {} if weight.grid.per_tensor else {"axis": axis}
    return _insert_dequantize(model, node, layer, codes, channel_scale(weight), packed, attributes)


def _insert_dequantize(
    model: ir.Model,
    node: ir.Node,
    layer: Layer,
    codes: ir.Value,
    scale: Array,
    zero: Numbers | None,
    attributes: Mapping[str, Any],
) -> ir.Value:
    """Insert the DequantizeLinear of a weight before its layer; zero: its zero point, None where it has none."""
    parts = [codes, graphs.add_initializer(model.graph, f"{layer.name}.scale", scale)]
    if zero is not None:
        parts.append(graphs.add_initializer(model.graph, f"{layer.name}.zero_point", zero))
    return graphs.insert(node, "DequantizeLinear", parts, attributes, f"{layer.name}.weight")


# Weight-only matrix products
# ----------------------------------------------------------------------------------------------------------------------


def _emit_product(
    model: ir.Model,
    nodes: dict[str, ir.Node],
    layer: Layer,
    weight: QuantizedWeight,
    bias: Array | None,
    solved: Solved,
) -> None:
    """Write a weight-only MatMul, or a Gemm as one, with its bias behind it."""
    node, activations = nodes[layer.node], solved.plan.activations
    if layer.op == "Gemm":
        node = _gemm_as_matmul(model, node, layer, bias, activations)
    else:
        set_bias(model, nodes, layer, bias, None, None)
        adder = nodes[layer.bias_node] if layer.bias_node is not None else None
        if adder is None and bias is not None:
            adder = add_bias(model, node, layer, bias)
        if adder is not None:
            adder.op_type = _adding_op(adder, activations)
    # the weight of a MatMul is its second input
    node.replace_input_with(1, _dequantize_blocks(model, node, layer, weight, solved))


def _dequantize_blocks(
    model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved
) -> ir.Value:
    """Write the weight [in, out] of a weight-only MatMul in blocks along the inputs.

    The one scale of a channel is repeated for every block: the same weight, in the form that becomes MatMulNBits. Where
    the opset or the target has no blocks, there is a scale per channel.
    """
    table = solved.table_of(layer)
    if table is not None:
        return _dequantize_table(model, node, layer, table, weight, solved)
    inputs, grid = weight.codes.shape[-1], weight.grid
    block = grid.block_size or solved.plan.target.block_of(inputs, grid.bits)
    stored = _codes(model, layer, weight.codes[0].T, solved)
    assert stored.dtype is not None
    container = stored.dtype.name
    codes = stored
    if not solved.plan.target.runs_outside_ort:
        # ONNX Runtime makes a MatMulNBits only of constants that nothing else reads
        codes = for_one_reader(model.graph, node, stored, f"{layer.name}.codes")
    if solved.plan.opset < 21 or block is None:
        return _dequantize_channels(model, node, layer, weight, codes, container, axis=1, with_zero=False)
    # the block of the solution that each stored block lies in
    source = np.minimum(np.arange(-(-inputs // block)) * block, inputs - 1) // (grid.block_size or inputs)
    scale = np.asarray(weight.scale[0][:, source].T, np.float32)
    zero = weight.zero_point[0][:, source].T
    parts = [codes, _block_part(model, node, layer, stored, "scale", scale)]
    if zero.any():
        parts.append(_block_part(model, node, layer, stored, "zero_point", pack(zero, container)))
    attributes = {"axis": 0, "block_size": block}
    return graphs.insert(node, "DequantizeLinear", parts, attributes, f"{layer.name}.weight")


def _dequantize_table(
    model: ir.Model, node: ir.Node, layer: Layer, table: Layer, weight: QuantizedWeight, solved: Solved
) -> ir.Value:
    """Write the weight [in, out] of a weight-only MatMul from the codes of an embedding, [out, in], and its scales.

    ONNX Runtime transposes them when it loads the model, and makes the same MatMulNBits of the result.
    """
    graph, (outputs, inputs) = model.graph, weight.codes.shape[1:]
    block = solved.plan.target.block_of(inputs, weight.grid.bits)
    assert block is not None
    stored = codes = _codes(model, table, weight.codes[0], solved)
    packed = codes.dtype == ir.DataType.INT4
    if packed:
        codes = graphs.insert(node, "Cast", [codes], {"to": ir.DataType.INT8}, f"{layer.name}.int8")
    codes = graphs.insert(
        node, "Transpose", [codes], {"perm": [1, 0]}, f"{layer.name}.turned" if packed else f"{layer.name}.codes"
    )
    if packed:
        codes = graphs.insert(node, "Cast", [codes], {"to": ir.DataType.INT4}, f"{layer.name}.codes")
    codes.type, codes.shape = (
        ir.TensorType(ir.DataType.INT4 if packed else ir.DataType.INT8),
        ir.Shape((inputs, outputs)),
    )
    row = _part(model, table, stored, "scale", weight.scale[0])
    row = graphs.insert(node, "Transpose", [row], {"perm": [1, 0]}, f"{layer.name}.row_scale")
    shape = graphs.add_initializer(graph, f"{layer.name}.scale_shape", np.array([-(-inputs // block), outputs]))
    scale = graphs.insert(node, "Expand", [row, shape], {}, f"{layer.name}.scale")
    attributes = {"axis": 0, "block_size": block}
    return graphs.insert(node, "DequantizeLinear", [codes, scale], attributes, f"{layer.name}.weight")


def _block_part(model: ir.Model, node: ir.Node, layer: Layer, codes: ir.Value, part: str, numbers: Numbers) -> ir.Value:
    """Store the scales or the zero points of blocks, once where another layer of the same codes has the same ones."""
    return for_one_reader(model.graph, node, _part(model, layer, codes, part, numbers), f"{layer.name}.{part}")


def _part(model: ir.Model, layer: Layer, codes: ir.Value, part: str, numbers: Numbers) -> ir.Value:
    """Store what belongs to codes, such as their scales, once for all layers that have the same."""
    known = codes.meta.get(part)
    if known is not None and np.array_equal(known.const_value.numpy(), numbers):
        return known  # type: ignore[no-any-return]
    value = graphs.add_initializer(model.graph, f"{layer.name}.{part}", numbers)
    codes.meta.setdefault(part, value)
    return value


def _adding_op(node: ir.Node, plan: ActivationPlan) -> str:
    """Return the op that adds the bias of a weight-only MatMul: Add, or Sum where the result is quantized.

    ONNX Runtime takes MatMul, Add and QuantizeLinear for a Gemm, runs it in float and never makes it MatMulNBits. It
    leaves a Sum alone.
    """
    made = node.outputs[0]
    rounded = str(made.name) in plan.values or any(reader.op_type == "QuantizeLinear" for reader, _ in made.uses())
    return "Sum" if rounded else "Add"


def _gemm_as_matmul(model: ir.Model, node: ir.Node, layer: Layer, bias: Array | None, plan: ActivationPlan) -> ir.Node:
    """Replace a Gemm by x W + b, and return the MatMul: with transB a Gemm never becomes MatMulNBits."""
    addend = _gemm_addend(model, node, layer, bias)
    product = ir.node("MatMul", [node.inputs[0], node.inputs[1]], name=f"{layer.name}.matmul")
    if addend is None:
        _take_over(node, product)
        return product
    product.outputs[0].name = f"{layer.name}.product"
    assert node.graph is not None
    node.graph.insert_before(node, product)
    # what is no bias per channel would make a float Gemm again
    op = _adding_op(node, plan) if bias is not None else "Sum"
    _take_over(node, ir.node(op, [product.outputs[0], addend], name=f"{layer.name}.add"))
    return product


def _gemm_addend(model: ir.Model, node: ir.Node, layer: Layer, bias: Array | None) -> ir.Value | None:
    """Return what a Gemm adds to its product: `bias` where given, else its third input times beta, else None."""
    if bias is not None:
        return graphs.add_initializer(model.graph, f"{layer.name}.bias", bias)
    third = node.inputs[2] if len(node.inputs) > 2 else None
    if third is None or layer.kind.beta in (0, 1):
        return None if layer.kind.beta == 0 else third
    beta = graphs.add_initializer(model.graph, f"{layer.name}.beta", np.asarray(layer.kind.beta, np.float32))
    return graphs.insert(node, "Mul", [third, beta], {}, f"{layer.name}.scaled_bias")


def _add_behind(node: ir.Node, layer: Layer, addend: ir.Value) -> None:
    """Take the third input out of a Gemm and add `addend` behind it: only a bias per channel has an integer kernel."""
    node.resize_inputs(2)
    node.attributes.pop("beta", None)
    graphs.append(node.outputs[0], "Sum", [addend], f"{layer.name}.add", f"{layer.name}.product")


# Layers whose weight is unpacked when the model is loaded
# ----------------------------------------------------------------------------------------------------------------------


def _unpack_at_load(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved) -> ir.Value:
    """Write codes -> floats (-> Sub zero point) -> Mul scale (-> Reshape), all constant: folded at load."""
    # a stack of INT4 matrices times one number is what TensorRT fails to compile
    single = weight.grid.per_tensor and layer.kind.takes_scalar_scale

    def spread(numbers: Numbers) -> Numbers:
        return np.asarray(numbers.flat[0]) if single else layer.kind.spread_scale(numbers)

    if layer.nested:
        # in the main graph, where every runtime folds constants, and once for all iterations
        node = next(iter(model.graph))
    shape = layer.weight_shape if weight.grid.per_tensor else layer.kind.scaled_shape(weight.scale.shape[-1])
    codes = _codes(model, layer, layer.kind.from_matrix(weight.codes).reshape(shape), solved)
    value = _as_float(model, node, codes, solved.plan.target.unpack, f"{layer.name}.float")
    if weight.zero_point.any():
        zero = spread(weight.zero_point).astype(np.float32)
        part = graphs.add_initializer(model.graph, f"{layer.name}.zero_point", zero)
        value = graphs.insert(node, "Sub", [value, part], {}, f"{layer.name}.steps")
    part = graphs.add_initializer(model.graph, f"{layer.name}.scale", np.asarray(spread(weight.scale), np.float32))
    if shape == layer.weight_shape:
        return graphs.insert(node, "Mul", [value, part], {}, f"{layer.name}.weight")
    value = graphs.insert(node, "Mul", [value, part], {}, f"{layer.name}.scaled")
    whole = graphs.add_initializer(model.graph, f"{layer.name}.shape", np.array(layer.weight_shape))
    return graphs.insert(node, "Reshape", [value, whole], {}, f"{layer.name}.weight")


def _emit_gather(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, solved: Solved) -> None:
    """Replace an embedding by Gathers of codes, zero points and scales, and their product."""
    indices = node.inputs[1]
    codes = _codes(model, layer, weight.codes[0], solved)
    scale = _part(model, layer, codes, "scale", weight.scale[0])
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
    _take_over(node, ir.node("Mul", [value, step], name=f"{layer.name}.rows"))


def _as_float(model: ir.Model, node: ir.Node, codes: ir.Value, unpack: str, name: str) -> ir.Value:
    """Write codes as floats of the same numbers: by a Cast, or by a DequantizeLinear of scale 1."""
    if unpack == "Cast":
        return graphs.insert(node, "Cast", [codes], {"to": ir.DataType.FLOAT}, name)
    one = shared_constant(model.graph, "comq_onnx.one", np.asarray(1, np.float32))
    return graphs.insert(node, "DequantizeLinear", [codes, one], {}, name)


# In every form
# ----------------------------------------------------------------------------------------------------------------------


def _codes(model: ir.Model, layer: Layer, codes: Numbers, solved: Solved) -> ir.Value:
    """Store the codes of a layer, laid out as they are written, in the container that is planned for them."""
    container, planes = solved.plan.container(layer, solved.plan.bits[layer.name])
    return store(model, layer.weight, codes, container, planes)


def _take_over(node: ir.Node, replacement: ir.Node) -> None:
    """Put `replacement` in the place of `node`: its output gets the old one's name, type and readers."""
    out, new = node.outputs[0], replacement.outputs[0]
    new.name, new.type, new.shape = out.name, out.type, out.shape
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, replacement)
    out.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
