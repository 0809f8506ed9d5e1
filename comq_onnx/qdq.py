"""Solutions and activation grids written into a graph as QuantizeLinear and DequantizeLinear, as the target wants them.

The same functions rewrite a segment during calibration and the whole model at the end, so what is measured is what
ships.

Weights, from fastest to most general:

- *integer*: codes -> (Cast to INT8) -> DequantizeLinear per channel, the layer's input quantized, an int32 bias of
  scale s_x * s_w (float where the target wants that, or it would be dequantized at every call). ONNX Runtime folds the
  Cast at load and runs its int8 kernels; the file holds 4 (2) bits a weight.
- *blocked* (weight-only MatMul): codes in blocks along the inputs -> DequantizeLinear: MatMulNBits.
- *folded* (any other weight-only layer): codes -> Cast to FLOAT -> Mul by the scale. Runtimes fold both at load: the
  file is small, the speed that of the float layer. A DequantizeLinear there would run at every call in ONNX Runtime;
  TensorRT takes codes nowhere else, so there one of scale 1 takes the place of the Cast.
- *looked up* (embeddings): Gather of codes -> Cast -> Mul by the Gather of scales; only the rows looked up become
  float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx import graph as graphs
from comq_onnx.activations import ActivationGrid, ActivationPlan
from comq_onnx.codes import pack, shared_constant, store
from comq_onnx.grid import Array, Grid, QuantizedWeight
from comq_onnx.ops import ConvTranspose, Gather, Gemm, MatMul
from comq_onnx.prepare import Layer, nodes_by_name
from comq_onnx.solve import Solution
from comq_onnx.targets import WIDTHS, Target

Numbers = npt.NDArray[Any]

# what the nodes that join the bit planes of a layer take in a file, about
PLANE_NODE_BYTES = 1500


@dataclass(frozen=True)
class Quantization:
    """All that emission needs: the solved layers, the activation plan with a grid for each of its values, the
    target."""

    layers: Sequence[Layer]
    solutions: Mapping[str, Solution]
    plan: ActivationPlan
    grids: Mapping[str, ActivationGrid]
    target: Target
    opset: int


def emit(model: ir.Model, quantization: Quantization) -> None:
    """Rewrite `model` in place: every solved layer it holds, every planned value that has a grid."""
    nodes = nodes_by_name(model)
    for layer in quantization.layers:
        if layer.name in nodes and layer.name in quantization.solutions:
            _emit_layer(model, nodes, layer, quantization)
    readers = _integer_readers(quantization, nodes)
    values = {str(v.name): v for v in graphs.walk_values(model)}
    for name in quantization.plan.values:
        if name in values and name in quantization.grids:
            _emit_activation(model, values[name], quantization, readers.get(name, []))
    passes.RemoveUnusedNodesPass()(model)
    # the names made up here may be taken
    passes.NameFixPass()(model)


def expose(model: ir.Model, layers: Sequence[Layer], solutions: Mapping[str, Solution]) -> None:
    """Make the weights of layers, and the biases that their solutions shift, inputs of `model` that are the float ones
    unless something else is fed: see `exposed`."""
    nodes = nodes_by_name(model)
    for layer in layers:
        solution = solutions[layer.name]
        if solution.shift is not None:
            bias = _float_bias(model, layer, replace(solution, shift=None))
            plain = np.zeros(solution.shift.size, np.float32) if bias is None else bias
            if layer.bias_node is not None:
                _set_bias(model, nodes, layer, plain, None, None)
            else:
                _add_bias(model, nodes[layer.name], layer, plain)
            model.graph.inputs.append(model.graph.initializers[f"{layer.name}.bias"])
        weight = model.graph.initializers[layer.weight]
        if weight not in model.graph.inputs:
            model.graph.inputs.append(weight)


def exposed(model: ir.Model, layer: Layer, solution: Solution) -> dict[str, Numbers]:
    """What to feed to a model that `expose` made of `model` to have a layer quantized."""
    feeds: dict[str, Numbers] = {
        layer.weight: np.ascontiguousarray(layer.kind.from_matrix(solution.weight.dequantize()))
    }
    bias = None if solution.shift is None else _float_bias(model, layer, solution)
    return feeds if bias is None else feeds | {f"{layer.name}.bias": bias}


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


# Weights
# ---------------------------------------------------------------------------------------------------------------


def _emit_layer(model: ir.Model, nodes: dict[str, ir.Node], layer: Layer, quantization: Quantization) -> None:
    node = nodes[layer.name]
    solution = quantization.solutions[layer.name]
    how = form(layer, quantization.plan)
    if how == "looked up":
        _emit_gather(model, node, layer, solution.weight, quantization)
        return
    bias = _float_bias(model, layer, solution)
    if how == "integer":
        grid = quantization.grids[layer.input]
        exact = quantization.target.integer_bias and not _is_open_product(node)
        weight = _fit_bias(solution.weight, bias, grid.scale) if exact else solution.weight
        dequantized = _dequantize(model, node, layer, weight, quantization)
        _set_weight(node, layer, dequantized)
        _set_bias(model, nodes, layer, bias, dequantized if exact else None, grid.scale)
        if isinstance(layer.kind, Gemm):
            # alpha has gone into the scales
            node.attributes.pop("alpha", None)
        return
    if how == "blocked":
        if isinstance(layer.kind, Gemm):
            node = _gemm_as_matmul(model, node, layer, bias, quantization.plan)
        else:
            _set_bias(model, nodes, layer, bias, None, None)
            adder = nodes[layer.bias_node] if layer.bias_node is not None else None
            if adder is None and bias is not None:
                adder = _add_bias(model, node, layer, bias)
            if adder is not None:
                adder.op_type = _adding(adder, quantization.plan)
        _set_weight(node, layer, _dequantize_blocks(model, node, layer, solution.weight, quantization), matmul=True)
        return
    _set_bias(model, nodes, layer, bias, None, None)
    _set_weight(node, layer, _unpack_at_load(model, node, layer, solution.weight, quantization))


def _is_open_product(node: ir.Node) -> bool:
    """Whether a node is a MatMul of more than two axes, not all of known size. ONNX Runtime takes any other one and
    its Add for a Gemm, which runs in integers only with an int32 bias; here it would dequantize that at every call."""
    value = node.inputs[0]
    shape = value.shape if value is not None else None
    return (
        node.op_type == "MatMul" and shape is not None and len(shape) > 2 and not all(isinstance(d, int) for d in shape)
    )


def stored_bytes(model: ir.Model, layer: Layer) -> int:
    """What the weight of a layer takes in an emitted `model`: codes, scales and zero points."""
    names = (f"{layer.weight}.codes", f"{layer.name}.scale", f"{layer.name}.zero_point")
    values = (model.graph.initializers.get(name) for name in names)
    return sum(v.const_value.nbytes for v in values if v is not None and v.const_value is not None)


def may_add_bias(layer: Layer, plan: ActivationPlan) -> bool:
    """Whether a layer without a bias can be given one: a weight-only MatMul, whose kernel takes it in."""
    return isinstance(layer.kind, MatMul) and form(layer, plan) == "blocked"


def _add_bias(model: ir.Model, node: ir.Node, layer: Layer, bias: Array) -> ir.Node:
    """Add a bias behind a MatMul that has none; the sum takes the product's name."""
    product = node.outputs[0]
    adder = ir.node("Add", [], name=f"{layer.name}.add_bias")
    total = adder.outputs[0]
    total.name, total.type, total.shape = product.name, product.type, product.shape
    product.replace_all_uses_with(total, replace_graph_outputs=True)
    product.name = f"{layer.name}.product"
    adder.resize_inputs(2)
    adder.replace_input_with(0, product)
    adder.replace_input_with(1, graphs.add_initializer(model.graph, f"{layer.name}.bias", bias))
    assert node.graph is not None
    node.graph.insert_after(node, adder)
    return adder


def _set_weight(node: ir.Node, layer: Layer, value: ir.Value, matmul: bool = False) -> None:
    node.replace_input_with(1 if matmul else layer.kind.weight_index, value)


def _float_bias(model: ir.Model, layer: Layer, solution: Solution) -> Array | None:
    """The bias [out] with the solution's shift; None where there is neither."""
    beta = layer.kind.beta if isinstance(layer.kind, Gemm) else 1.0
    bias = None
    if layer.bias is not None:
        tensor = model.graph.initializers[layer.bias].const_value
        assert tensor is not None
        bias = np.asarray(tensor.numpy(), np.float32).reshape(-1) * np.float32(beta)
    if solution.shift is None:
        return bias
    # a Gemm's alpha is in the rows, and so in the shift
    shift = solution.shift.reshape(-1)
    return shift if bias is None else bias + shift


def _set_bias(
    model: ir.Model,
    nodes: dict[str, ir.Node],
    layer: Layer,
    bias: Array | None,
    weight: ir.Value | None,
    input_scale: np.float32 | None,
) -> None:
    """Write the bias as float32; as int32 of scale s_x * s_w where the dequantized weight and s_x are given."""
    if bias is None or layer.bias_node is None:
        return
    adder = nodes[layer.bias_node]
    if weight is None or input_scale is None:
        value = graphs.add_initializer(model.graph, f"{layer.name}.bias", bias)
    else:
        value = _integer_bias(model, adder, layer, bias, weight, input_scale)
    if adder.name != layer.name:
        index = next(i for i, v in enumerate(adder.inputs) if v is not None and v.name == layer.bias)
        adder.replace_input_with(index, value)
        return
    if len(adder.inputs) < 3:
        adder.resize_inputs(3)
    adder.replace_input_with(2, value)
    # it has gone into the bias
    adder.attributes.pop("beta", None)


def _integer_bias(
    model: ir.Model, adder: ir.Node, layer: Layer, bias: Array, weight: ir.Value, input_scale: np.float32
) -> ir.Value:
    """int32 codes -> DequantizeLinear. The scales of channels are not stored again but multiplied when the model is
    loaded."""
    dequantize = weight.producer()
    assert dequantize is not None
    weight_scale = dequantize.inputs[1]
    assert weight_scale is not None
    assert weight_scale.const_value is not None
    product = input_scale * np.asarray(weight_scale.const_value.numpy(), np.float32)
    codes = np.rint(bias.astype(np.float64) / product).astype(np.int32)
    parts = [graphs.add_initializer(model.graph, f"{layer.name}.bias_codes", codes)]
    if product.ndim:
        factor = graphs.add_initializer(model.graph, f"{layer.name}.input_scale", np.asarray(input_scale))
        parts.append(graphs.insert(adder, "Mul", [weight_scale, factor], {}, f"{layer.name}.bias_scale"))
    else:
        scale = np.full(bias.shape, product, np.float32)
        parts.append(graphs.add_initializer(model.graph, f"{layer.name}.bias_scale", scale))
    return graphs.insert(adder, "DequantizeLinear", parts, {"axis": 0}, f"{layer.name}.bias")


def _fit_bias(weight: QuantizedWeight, bias: Array | None, input_scale: np.float32) -> QuantizedWeight:
    """The weight with a larger scale in channels whose bias would not fit int32 at s_x * s_w.

    Such weights are all but zero beside their bias (a folded BatchNorm leaves some); a float bias would not help, since
    ONNX Runtime makes it int32 itself, clipped.
    """
    if bias is None or weight.scale.shape[-1] != 1:
        return weight
    needed = np.abs(bias).reshape(weight.scale.shape[:2])[..., None] / np.float64(input_scale) / 2**30
    if weight.grid.per_tensor:
        needed = np.full_like(needed, needed.max())
    grown = needed > weight.scale
    if not grown.any():
        return weight
    scale = np.where(grown, needed, weight.scale).astype(np.float32)
    zero = weight.zero_point.astype(np.float64)
    steps = np.rint((weight.codes - zero) * (weight.scale.astype(np.float64) / scale))
    return QuantizedWeight((steps + zero).astype(np.int8), scale, weight.zero_point, weight.grid)


def channel_scale(layer: Layer, weight: QuantizedWeight) -> Array:
    """Scales as DequantizeLinear wants them: [channels] along the layer's axis, or rank 0 for one per tensor; with the
    alpha of a Gemm, whose emitted form has none."""
    alpha = np.float32(layer.kind.alpha if isinstance(layer.kind, Gemm) else 1)
    if weight.grid.per_tensor:
        return np.asarray(weight.scale.flat[0] * alpha, np.float32)
    return np.asarray(weight.scale.reshape(-1) * alpha, np.float32)


def stored_as(layer: Layer, bits: int, plan: ActivationPlan, target: Target, opset: int) -> tuple[str, tuple[int, ...]]:
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
    container, planes = stored_as(layer, bits, plan, target, opset)
    count = int(np.prod(layer.weight_shape))
    return sum(-(-count * width // 8) for width in planes or (WIDTHS[container],))


def _codes(model: ir.Model, layer: Layer, codes: Numbers, weight: QuantizedWeight, q: Quantization) -> ir.Value:
    container, planes = stored_as(layer, weight.grid.bits, q.plan, q.target, q.opset)
    return store(model, layer.weight, codes, container, planes)


def _dequantize(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, q: Quantization) -> ir.Value:
    """codes -> Cast to INT8 where packed -> DequantizeLinear along the channels; the zero point of a matrix always
    written: without it ONNX Runtime does not fuse a Gemm."""
    codes = _codes(model, layer, layer.kind.from_matrix(weight.codes), weight, q)
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
    model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, q: Quantization
) -> ir.Value:
    """A weight-only MatMul's weight [in, out] in blocks along the inputs; per channel where the opset or the target has
    no blocks.

    A channel's one scale is repeated for every block: the same weight, and the form that becomes MatMulNBits.
    """
    inputs = weight.codes.shape[-1]
    grid = weight.grid
    block = grid.block_size or q.target.block_of(inputs, grid.bits)
    if q.opset < 21 or block is None:
        return _dequantize_columns(model, node, layer, weight, q)
    of = np.minimum(np.arange(-(-inputs // block)) * block, inputs - 1) // (grid.block_size or inputs)
    scale = np.asarray(weight.scale[0][:, of].T * _alpha(layer), np.float32)
    zero = weight.zero_point[0][:, of].T
    codes = _codes(model, layer, weight.codes[0].T, weight, q)
    parts = [codes, graphs.add_initializer(model.graph, f"{layer.name}.scale", scale)]
    if zero.any():
        assert codes.dtype is not None
        packed = pack(zero, codes.dtype.name)
        parts.append(graphs.add_initializer(model.graph, f"{layer.name}.zero_point", packed))
    return graphs.insert(node, "DequantizeLinear", parts, {"axis": 0, "block_size": block}, f"{layer.name}.weight")


def _dequantize_columns(
    model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, q: Quantization
) -> ir.Value:
    codes = _codes(model, layer, weight.codes[0].T, weight, q)
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
    return np.float32(layer.kind.alpha if isinstance(layer.kind, Gemm) else 1)


def _unpack_at_load(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, q: Quantization) -> ir.Value:
    """codes -> floats (-> Sub zero point) -> Mul scale, all constant: folded when the runtime loads the model."""

    # a stack of INT4 matrices times one number is what TensorRT fails to compile
    single = weight.grid.per_tensor and not isinstance(layer.kind, MatMul)

    def spread(numbers: Numbers) -> Numbers:
        return np.asarray(numbers.flat[0]) if single else layer.kind.spread_scale(numbers[..., 0])

    if layer.nested:
        # in the main graph, where every runtime folds constants, and once for all iterations
        node = next(iter(model.graph))
    codes = _codes(model, layer, layer.kind.from_matrix(weight.codes), weight, q)
    value = _as_float(model, node, codes, q.target.unpack, f"{layer.name}.float")
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


def _emit_gather(model: ir.Model, node: ir.Node, layer: Layer, weight: QuantizedWeight, q: Quantization) -> None:
    indices = node.inputs[1]
    codes = _codes(model, layer, weight.codes[0], weight, q)
    scale = graphs.add_initializer(model.graph, f"{layer.name}.scale", weight.scale[0])
    attributes = {"axis": 0}
    if q.target.unpack != "Cast":
        table = _as_float(model, node, codes, q.target.unpack, f"{layer.name}.float")
        value = graphs.insert(node, "Gather", [table, indices], attributes, f"{layer.name}.row")
    else:
        if codes.dtype != ir.DataType.INT8:
            # folded at load: ONNX Runtime looks nothing up in packed tables
            codes = graphs.insert(node, "Cast", [codes], {"to": ir.DataType.INT8}, f"{layer.name}.int8")
        found = graphs.insert(node, "Gather", [codes, indices], attributes, f"{layer.name}.row_codes")
        value = _as_float(model, node, found, q.target.unpack, f"{layer.name}.row")
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
    assert isinstance(layer.kind, Gemm)
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


# Activations
# -----------------------------------------------------------------------------------------------------------


def _integer_readers(q: Quantization, nodes: dict[str, ir.Node]) -> dict[str, list[tuple[ir.Node, int]]]:
    """For each value that only integer layers read dequantized: those layers' nodes and the input it is."""
    readers: dict[str, list[tuple[ir.Node, int]]] = {}
    for layer in q.layers:
        if layer.name in q.plan.integer_layers and layer.name in nodes and layer.name in q.solutions:
            readers.setdefault(layer.input, []).append((nodes[layer.name], layer.kind.input_index))
    return readers


def _emit_activation(model: ir.Model, value: ir.Value, q: Quantization, readers: list[tuple[ir.Node, int]]) -> None:
    planned = q.plan.values[str(value.name)]
    if planned.everywhere:
        uses = list(value.uses())
        outputs = [i for i, v in enumerate(model.graph.outputs) if v is value]
        producer = value.producer()
        home = producer.graph if producer is not None else model.graph
        inner = [(g, i) for g in model.graph.subgraphs() for i, v in enumerate(g.outputs) if v is value]
        new = _pair(model, value, q, home)
        for node, index in uses:
            node.replace_input_with(index, new)
        for g, i in inner:
            g.outputs[i] = new
        for i in outputs:
            # the graph's output keeps its name: the raw value takes another
            name, value.name = value.name, f"{value.name}.raw"
            new.name, new.type, new.shape = name, value.type, value.shape
            model.graph.outputs[i] = new
        return
    for home in {id(node.graph): node.graph for node, _ in readers}.values():
        new = _pair(model, value, q, home)
        for node, index in readers:
            if node.graph is home:
                node.replace_input_with(index, new)


def _pair(model: ir.Model, value: ir.Value, q: Quantization, home: ir.Graph | ir.Function | None) -> ir.Value:
    """QuantizeLinear and DequantizeLinear behind `value` in graph `home`; scale and zero point of rank 0."""
    assert isinstance(home, ir.Graph)
    grid = q.grids[str(value.name)]
    scale = graphs.add_initializer(model.graph, f"{value.name}.scale", np.asarray(grid.scale, np.float32))
    zero = graphs.add_initializer(model.graph, f"{value.name}.zero_point", np.asarray(grid.zero_point, grid.dtype))
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}.quantize")
    quantize.outputs[0].name = f"{value.name}.quantized"
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{value.name}.dequantize")
    dequantize.outputs[0].name = f"{value.name}.dequantized"
    producer = value.producer()
    if producer is not None and producer.graph is home:
        home.insert_after(producer, [quantize, dequantize])
    else:
        home.insert_before(next(iter(home)), [quantize, dequantize])
    return dequantize.outputs[0]


def grid_for(layer: Layer, grid: Grid, target: Target) -> Grid:
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
