"""Write activation grids into a graph as pairs of QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer
from comq_onnx.plan.given_pairs import dequantized
from comq_onnx.plan.solved import Solved

# operators that ONNX Runtime quantizes itself between two quantized values (it makes a Gemm of a MatMul and its Add)
_TAKEN = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# operators that it may fuse into those, or leave between one and the QuantizeLinear of its output
_PASSED = frozenset({"Relu", "Clip", "Add", "Mul", "Sub", "Div", "BatchNormalization", "Identity", "Sum", "Dropout"})
# operators that it may remove where they change nothing
VANISHING = frozenset({"Identity", "Dropout", "Cast", "Slice", "Expand"})
# operators that only move numbers: it may put the DequantizeLinear before them behind them, and the QuantizeLinear
# behind them before them
MOVING = VANISHING | {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Split", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
# under this key a QuantizeLinear keeps the name of the activation that it quantizes
QUANTIZES = "comq_onnx.quantizes"
# this key marks the pairs that the source has
_OF_SOURCE = "comq_onnx.of_source"


def mark_source(model: ir.Model) -> None:
    """Mark each QuantizeLinear and DequantizeLinear that a model has before anything is written into it."""
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.meta[_OF_SOURCE] = True


def is_of_source(node: ir.Node) -> bool:
    """Tell whether `mark_source` has marked a node."""
    return _OF_SOURCE in node.meta


def integer_readers(solved: Solved, nodes: dict[str, ir.Node]) -> dict[str, list[tuple[ir.Node, int]]]:
    """Return the integer layers that read each value: their nodes, and which of their inputs the value is.

    nodes: the nodes of the model, by name
    """
    readers: dict[str, list[tuple[ir.Node, int]]] = {}
    for layer in solved.plan.layers:
        # a Gemm that is written in blocks is a MatMul
        node = nodes.get(f"{layer.name}.matmul") or nodes.get(layer.node)
        integer = layer.name in solved.plan.activations.integer_layers
        if integer and node is not None and layer.name in solved.solutions:
            readers.setdefault(layer.input, []).append((node, layer.kind.input_index))
    return readers


def emit_activation(model: ir.Model, value: ir.Value, solved: Solved, readers: list[tuple[ir.Node, int]]) -> None:
    """Insert the QuantizeLinear and DequantizeLinear of a value: for all its readers, or only for integer layers.

    Where the source has that pair, its readers take what comes out of it.

    readers: the integer layers that read it, as `integer_readers` gives them
    """
    everywhere = solved.plan.activations.values[str(value.name)].everywhere
    known = dequantized(value, solved.activation_grids[str(value.name)])
    if known is not None and not (everywhere and known is not value and value.is_graph_output()):
        _read_known(value, known, solved, readers)
        return
    if everywhere:
        _replace_everywhere(model, value, solved)
        return
    # a pair in each graph that has readers
    for home in {id(node.graph): node.graph for node, _ in readers}.values():
        new = _pair(model, value, solved, home)
        for node, index in readers:
            if node.graph is home:
                node.replace_input_with(index, new)


def _read_known(value: ir.Value, known: ir.Value, solved: Solved, readers: list[tuple[ir.Node, int]]) -> None:
    """Let readers of a value take `known`, what a pair of the source makes of it: all readers, or integer layers."""
    if known is value:
        return
    dequantize = known.producer()
    assert dequantize is not None
    assert dequantize.inputs[0] is not None
    quantize = dequantize.inputs[0].producer()
    assert quantize is not None
    quantize.meta[QUANTIZES] = str(value.name)
    home, producer = quantize.graph, value.producer()
    assert isinstance(home, ir.Graph)
    # before all readers
    home.remove([quantize, dequantize])
    _place(home, producer, [quantize, dequantize])
    everywhere = solved.plan.activations.values[str(value.name)].everywhere
    for node, index in [*value.uses()] if everywhere else readers:
        if node is not quantize:
            node.replace_input_with(index, known)


def _replace_everywhere(model: ir.Model, value: ir.Value, solved: Solved) -> None:
    """Give all readers of a value, and the outputs of graphs, the dequantized one."""
    uses = list(value.uses())
    outputs = [i for i, v in enumerate(model.graph.outputs) if v is value]
    producer = value.producer()
    home = producer.graph if producer is not None else model.graph
    # looked for only where there is something to find: a search goes through all nodes
    homes = model.graph.subgraphs() if value.is_graph_output() else ()
    inner = [(g, i) for g in homes for i, v in enumerate(g.outputs) if v is value]
    new = _pair(model, value, solved, home)
    for node, index in uses:
        node.replace_input_with(index, new)
    for g, i in inner:
        g.outputs[i] = new
    for i in outputs:
        # the graph's output keeps its name: the raw value takes another
        name, value.name = value.name, f"{value.name}.raw"
        new.name, new.type, new.shape = name, value.type, value.shape
        model.graph.outputs[i] = new


def _pair(model: ir.Model, value: ir.Value, solved: Solved, home: ir.Graph | ir.Function | None) -> ir.Value:
    """Insert QuantizeLinear and DequantizeLinear behind `value` in the graph `home`, and return the dequantized value.

    Scale and zero point are of rank 0.
    """
    assert isinstance(home, ir.Graph)
    grid = solved.activation_grids[str(value.name)]
    scale = graphs.add_initializer(model.graph, f"{value.name}.scale", np.asarray(grid.scale, np.float32))
    zero = graphs.add_initializer(model.graph, f"{value.name}.zero_point", np.asarray(grid.zero_point, grid.dtype))
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}.quantize")
    quantize.outputs[0].name = f"{value.name}.quantized"
    quantize.meta[QUANTIZES] = str(value.name)
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{value.name}.dequantize")
    dequantize.outputs[0].name = f"{value.name}.dequantized"
    _place(home, value.producer(), [quantize, dequantize])
    return dequantize.outputs[0]


def _place(home: ir.Graph, producer: ir.Node | None, nodes: list[ir.Node]) -> None:
    """Insert nodes right behind `producer`, or at the begin of `home` where that is not in it."""
    if producer is not None and producer.graph is home:
        home.insert_after(producer, nodes)
    else:
        home.insert_before(next(iter(home)), nodes)


# Layers that stay float
# ----------------------------------------------------------------------------------------------------------------------


def keep_float(model: ir.Model, solved: Solved) -> None:
    """Give float layers between quantized values an input that ONNX Runtime does not quantize them for.

    It would round the float weight of such a layer to 8 bits, with one scale for all channels: of a layer that was
    excluded, or that has finer scales. It does so only where the input has a scale of rank 0. So the layer reads a
    DequantizeLinear of its own with the same scale for each channel; or a Sum, a copy, of what operators have moved
    and of an input of the model.
    """
    layers = {layer.name: layer for layer in solved.plan.layers}
    for node in list(model.graph.all_nodes()):
        if node.op_type not in _TAKEN or node.domain not in ("", "ai.onnx"):
            continue
        place = _channels(node, layers.get(str(node.name)))
        dequantize = node.inputs[0].producer() if node.inputs[0] is not None else None
        if place is None or dequantize is None or not _leads_to_quantize(node):
            continue
        if not _is_activation(dequantize):
            if is_dequantized(node.inputs[0]):
                node.replace_input_with(0, graphs.insert(node, "Sum", [node.inputs[0]], {}, f"{node.name}.input"))
            continue
        axis, count = place
        own = [dequantize.inputs[0]]
        for part in dequantize.inputs[1:]:
            number = graphs.constant(part)
            assert number is not None
            name = f"{node.name}.input_{'scale' if part is dequantize.inputs[1] else 'zero_point'}"
            own.append(graphs.add_initializer(model.graph, name, np.full(count, number)))
        value = graphs.insert(node, "DequantizeLinear", own, {"axis": axis}, f"{node.name}.input")
        node.replace_input_with(0, value)


def _channels(node: ir.Node, layer: Layer | None) -> tuple[int, int] | None:
    """Return the axis of input channels of a layer's input and their number; None for integer layers and one channel.

    layer: the layer of the node where it is quantized
    """
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    producer = weight.producer() if weight is not None else None
    if weight is None or (producer is not None and producer.op_type == "DequantizeLinear"):
        return None
    if layer is not None:
        shape: tuple[int, ...] = layer.weight_shape
    elif graphs.is_constant(weight) and weight.const_value is not None:
        shape = tuple(weight.const_value.shape.numpy())
    else:
        return None

    def attribute(name: str, default: int) -> int:
        return int(node.attributes[name].value) if name in node.attributes else default

    if len(shape) < 2:
        return None
    axis, count = {
        "Conv": (1, shape[1] * attribute("group", 1)),
        "ConvTranspose": (1, shape[0]),
        "Gemm": (1 - attribute("transA", 0), shape[attribute("transB", 0)]),
        "MatMul": (-1, shape[-2]),
    }[node.op_type]
    return (axis, count) if count > 1 else None


def _is_activation(node: ir.Node) -> bool:
    """Tell whether a node is the DequantizeLinear of a quantized activation."""
    codes = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
    return codes is not None and codes.op_type == "QuantizeLinear"


def is_dequantized(value: ir.Value | None, most_bytes: int = 2) -> bool:
    """Tell whether a value is a quantized activation or such an input of the model, as it is or moved.

    most_bytes: that a code of it has
    """
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in MOVING:
        value = maker.inputs[0]
        maker = None if value is None else value.producer()
    if maker is None or maker.op_type != "DequantizeLinear" or maker.inputs[0] is None:
        return False
    zero = graphs.constant(maker.inputs[2]) if len(maker.inputs) > 2 else None
    small = zero is None or zero.dtype.itemsize <= most_bytes
    return small and (_is_activation(maker) or maker.inputs[0].is_graph_input())


def _leads_to_quantize(node: ir.Node) -> bool:
    """Tell whether the output of a node goes into a QuantizeLinear and nowhere else."""
    while True:
        readers = list(node.outputs[0].uses())
        if len(readers) != 1 or node.outputs[0].is_graph_output():
            return False
        node = readers[0][0]
        if node.op_type == "QuantizeLinear":
            return True
        if node.op_type not in _PASSED | MOVING:
            return False
