"""Keep quantized products apart from the operators behind them, where ONNX Runtime would make one float operator.

ONNX Runtime joins a MatMul with the Add, the Relu or the Clip behind it, and with a Transpose before it, before it
looks for the DequantizeLinear of the weight. What comes out (Gemm, FusedGemm, or a MatMul that keeps its Relu) is a
float product whose weight is dequantized at every call. It leaves a Sum alone, also one of a single input, which only
copies. So a Sum stands between.

One stands before a weight-only product too that reads a quantized activation, for which ONNX Runtime makes no
MatMulNBits; and before a subgraph that reads what a Transpose or the like makes of a quantized activation: moving the
DequantizeLinear behind it, ONNX Runtime 1.32 ends the process.

Measured with ONNX Runtime 1.32 at the levels extended and all (docs/runtimes.md); tests/write/test_walls.py tries
many operators behind every form.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, nodes_by_name
from comq_onnx.plan.activations import clip_bounds
from comq_onnx.plan.forms import WeightForm
from comq_onnx.plan.solved import Solved
from comq_onnx.write.activations import MOVING, VANISHING, is_dequantized

# operators that ONNX Runtime takes for a part of the product before them; it makes a Clip of Max and Min
_JOINED = frozenset({"Relu", "Clip", "Max", "Min"})


def build_walls(model: ir.Model, solved: Solved) -> None:
    """Put a Sum behind each product of `model` that ONNX Runtime would join with what follows, in place.

    The model has its quantized weights and activations already. For targets that other runtimes execute, only what
    would end ONNX Runtime is done.
    """
    for graph in model.graph.subgraphs():
        _part_from_outside(graph)
    if solved.plan.target.runs_outside_ort:
        return
    nodes = nodes_by_name(model)
    for layer in solved.plan.layers:
        if layer.name in solved.solutions and layer.kind.is_matrix:
            product = nodes.get(f"{layer.name}.matmul") or nodes.get(layer.name)
            if product is not None:
                _part(product, layer, solved)
                if solved.plan.form(layer) is WeightForm.BLOCKED and is_dequantized(product.inputs[0], 1):
                    copy = graphs.insert(product, "Sum", [product.inputs[0]], {}, f"{layer.name}.input")
                    product.replace_input_with(0, copy)


def _part_from_outside(graph: ir.Graph) -> None:
    """Let a subgraph read a Sum, a copy, of each value from outside that operators moved behind a DequantizeLinear."""
    copies: dict[ir.Value, ir.Value] = {}
    for node in graph:
        for index, value in enumerate(node.inputs):
            maker = None if value is None else value.producer()
            if value is None or maker is None or maker.graph is graph or maker.op_type not in MOVING:
                continue
            if not is_dequantized(value):
                continue
            if value not in copies:
                copy = ir.node("Sum", [value], name=f"{value.name}.copied")
                made = copies[value] = copy.outputs[0]
                made.name, made.type, made.shape = f"{value.name}.copied", value.type, value.shape
                assert isinstance(maker.graph, ir.Graph)
                maker.graph.insert_after(maker, copy)
            node.replace_input_with(index, copies[value])


def _part(product: ir.Node, layer: Layer, solved: Solved) -> None:
    """Put a Sum behind the product of a layer, or make one of the Add behind it, where that is needed."""
    form = solved.plan.form(layer)
    if form not in (WeightForm.INTEGER, WeightForm.BLOCKED):
        return
    adder = _adder(product, layer)
    other = _sole_reader(product.outputs[0])
    if adder is None and other is not None and other.op_type in ("Add", "Sum"):
        _part_from_sum(product, other, layer)
        return
    end = (product if adder is None else adder).outputs[0]
    turned = form is WeightForm.BLOCKED and adder is not None and _reads_transposed(product)
    turned |= product.op_type == "Gemm" and _is_transposed(end)
    if not turned and not _is_joined(end, form) and not _is_also_quantized(end):
        return
    if adder is not None and form is WeightForm.BLOCKED:
        adder.op_type = "Sum"
    else:
        _insert_copy(end, layer)


def _part_from_sum(product: ir.Node, total: ir.Node, layer: Layer) -> None:
    """Keep a product apart from what is added to it: no integer kernel adds anything else than a bias per channel.

    ONNX Runtime makes one Gemm of a MatMul and an Add, and of a Gemm without a bias and a Sum of two.
    """
    if product.op_type == "MatMul":
        total.op_type = "Sum"
    elif len(product.inputs) < 3 or product.inputs[2] is None:
        _insert_copy(product.outputs[0], layer)


def _adder(product: ir.Node, layer: Layer) -> ir.Node | None:
    """Return the node that adds the bias of a layer behind its MatMul; None where there is none."""
    reader = _sole_reader(product.outputs[0]) if product.op_type == "MatMul" else None
    names = (layer.bias_node, f"{layer.name}.add", f"{layer.name}.add_bias")
    return reader if reader is not None and reader.name in names else None


def _sole_reader(value: ir.Value) -> ir.Node | None:
    """Return the only node that reads a value; None where there are more, or where it is an output of the graph."""
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _reads_transposed(product: ir.Node) -> bool:
    """Tell whether a product reads what a Transpose makes, which ONNX Runtime takes into the Gemm of it and its Add."""
    value = product.inputs[0]
    maker = None if value is None else value.producer()
    while maker is not None and maker.op_type in VANISHING:
        value = maker.inputs[0]
        maker = None if value is None else value.producer()
    return maker is not None and maker.op_type == "Transpose"


def _is_transposed(value: ir.Value) -> bool:
    """Tell whether a Transpose alone reads a value, of which ONNX Runtime makes a Gemm of swapped inputs."""
    node = _sole_reader(value)
    while node is not None and node.op_type in VANISHING:
        node = _sole_reader(node.outputs[0])
    return node is not None and node.op_type == "Transpose"


def _is_joined(value: ir.Value, form: WeightForm) -> bool:
    """Tell whether ONNX Runtime joins what reads `value` with the product that makes it, and so makes that float.

    A weight-only product is joined with a QuantizeLinear too. One in integers may take up a Relu or a Clip before a
    QuantizeLinear whose whole range that lets through.
    """
    joined, low, high = False, -np.inf, np.inf
    node = _sole_reader(value)
    # it puts a QuantizeLinear before operators that only move numbers
    while node is not None and node.op_type in _JOINED | MOVING and node.domain in ("", "ai.onnx"):
        if node.op_type in _JOINED:
            joined = True
            least, most = _bounds(node)
            low, high = max(low, least), min(high, most)
        node = _sole_reader(node.outputs[0])
    is_quantized = node is not None and node.op_type == "QuantizeLinear"
    if form is WeightForm.BLOCKED or not (is_quantized and joined):
        return joined or (is_quantized and form is WeightForm.BLOCKED)
    assert node is not None
    ends = _range(node)
    return ends is None or not all(low <= end <= high for end in ends)


def _range(node: ir.Node) -> tuple[float, float] | None:
    """Return the numbers that the least and the largest code of a QuantizeLinear stand for.

    None where it has no one scale, or not integers of 8 or 16 bits.
    """
    scale = graphs.constant(node.inputs[1])
    zero = graphs.constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.dtype.kind not in "iu":
        return None
    codes = np.iinfo(zero.dtype)
    step, offset = np.float32(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
    return float(step * np.float32(codes.min - offset)), float(step * np.float32(codes.max - offset))


def _bounds(node: ir.Node) -> tuple[float, float]:
    """Return what a Relu, Clip, Max or Min lets through; (inf, -inf), nothing, where that is not known."""
    if node.op_type in ("Relu", "Clip"):
        return clip_bounds(node) or (np.inf, -np.inf)
    known = [number for v in node.inputs if (number := graphs.constant(v)) is not None]
    if len(known) != 1 or known[0].size != 1:
        return np.inf, -np.inf
    bound = float(known[0].reshape(-1)[0])
    return (bound, np.inf) if node.op_type == "Max" else (-np.inf, bound)


def _is_also_quantized(value: ir.Value) -> bool:
    """Tell whether a QuantizeLinear reads a value and something else does too: no integer kernel has two outputs."""
    readers = [node.op_type for node, _ in value.uses()]
    return "QuantizeLinear" in readers and (len(readers) > 1 or value.is_graph_output())


def _insert_copy(value: ir.Value, layer: Layer) -> None:
    """Insert a Sum of `value` alone, which copies it, before all its readers; the copy takes its name."""
    graphs.append(value, "Sum", [], f"{layer.name}.copied", f"{layer.name}.alone")
