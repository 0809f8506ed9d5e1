"""Write weight-only products as MatMulNBits in place of DequantizeLinear and MatMul, once the model is made.

ONNX Runtime makes the same operator of the QDQ form, only later: when it loads the model. Both compute with

    w = (code - zero_point) * scale,  codes and zero points shifted by 2^(bits - 1) to be above 0

and MatMulNBits holds the codes of an output in blocks of inputs, [outputs, blocks, bytes of a block], the lower half of
a byte first. https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

An embedding that shares its codes with a product reads the same bytes by GatherBlockQuantized.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, nodes_by_name
from comq_onnx.model.unfuse.maker import MICROSOFT
from comq_onnx.plan.nbits import nbits_block
from comq_onnx.plan.solved import Solved
from comq_onnx.solve.grid import QuantizedWeight
from comq_onnx.targets.target import WIDTHS
from comq_onnx.write.codes import shared_constant

Bytes = npt.NDArray[np.uint8]
# the products run on inputs of 8 bits, as those do that ONNX Runtime makes of the QDQ form by default
ACCURACY_LEVEL = 4
PRODUCT, LOOKUP = "MatMulNBits", "GatherBlockQuantized"


def write_nbits(model: ir.Model, solved: Solved) -> None:
    """Replace the QDQ form of all products that MatMulNBits can compute, in place."""
    nodes = nodes_by_name(model)
    blocks = {x.name: block for x in solved.plan.layers if (block := nbits_block(solved.plan, x)) is not None}
    layers = [x for x in solved.plan.layers if x.name in blocks]
    if not layers:
        return
    products = {x.name: nodes.get(x.node) or nodes[f"{x.name}.matmul"] for x in layers}
    tables = {table.name: blocks[x.name] for x in layers if (table := solved.table_of(x)) is not None}
    lookups = {x: nodes[f"{x.name}.rows"] for x in solved.plan.layers if x.name in tables}
    for node in products.values():
        node.replace_input_with(1, None)
    for node in lookups.values():
        _drop_table(node)
    # what is gone leaves its names to the constants that take its place
    passes.RemoveUnusedNodesPass()(model)
    for layer in layers:
        _write_product(model, products[layer.name], layer, blocks[layer.name], solved)
    for table, node in lookups.items():
        _write_lookup(model, node, table, tables[table.name], solved)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)


def stored_codes(node: ir.Node, stored: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """Return the codes [outputs, inputs] that a MatMulNBits or a GatherBlockQuantized reads, from the stored bytes."""
    bits = int(node.attributes["bits"].value)
    flat = stored.reshape(len(stored), -1)
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(len(stored), -1)
    codes = (flat.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
    return codes[:, : int(node.attributes["K"].value)] if node.op_type == PRODUCT else codes


def pack_blocks(weight: QuantizedWeight, width: int, block: int) -> Bytes:
    """Return the codes [1, outputs, inputs] of a weight as MatMulNBits holds them: [outputs, blocks, bytes].

    What fills the last block are zero points, which stand for 0.
    """
    codes = weight.codes[0]
    outputs, inputs = codes.shape
    blocks = -(-inputs // block)
    padded = np.repeat(weight.zero_point[0][:, -1:], blocks * block, axis=1)
    padded[:, :inputs] = codes
    return _nibbles(_above_zero(padded, width), width).reshape(outputs, blocks, -1)


def _above_zero(codes: npt.NDArray[np.int8], width: int) -> Bytes:
    return (codes.astype(np.int16) + (1 << (width - 1))).astype(np.uint8)


def _nibbles(numbers: Bytes, width: int) -> Bytes:
    """Pack numbers [rows, n] of 4 bits two in a byte, the first in its lower half; those of 8 bits stay."""
    if width == 8:
        return numbers
    if numbers.shape[1] % 2:
        numbers = np.pad(numbers, ((0, 0), (0, 1)))
    return np.asarray(numbers[:, 0::2] | (numbers[:, 1::2] << 4), np.uint8)


def _write_product(model: ir.Model, node: ir.Node, layer: Layer, block: int, solved: Solved) -> None:
    """Make a MatMulNBits of the MatMul of a layer; its name, its input and its output stay."""
    weight, table = solved.solutions[layer.name].weight, solved.table_of(layer)
    outputs, inputs = weight.codes.shape[1:]
    width = _width(layer, solved)
    codes = _packed_codes(model, table or layer, weight, width, block)
    if table is None:
        # the block of the solution that each stored block lies in
        starts = np.minimum(np.arange(-(-inputs // block)) * block, inputs - 1)
        source = starts // (weight.grid.block_size or inputs)
        scale = shared_constant(model.graph, f"{layer.name}.scale", np.asarray(weight.scale[0][:, source], np.float32))
        zero = weight.zero_point[0][:, source]
    else:
        scale, zero = _row_scales(model, node, layer, table, weight, block), weight.zero_point[0]
    parts = [node.inputs[0], codes, scale]
    if zero.any():
        stored = _nibbles(_above_zero(zero, width), width)
        parts.append(shared_constant(model.graph, f"{layer.name}.zero_point", stored))
    attributes = {"K": inputs, "N": outputs, "bits": width, "block_size": block, "accuracy_level": ACCURACY_LEVEL}
    _become(node, PRODUCT, parts, attributes)


def _drop_table(node: ir.Node) -> None:
    """Leave of the product that makes the rows of an embedding its indices alone."""
    # the second factor is the scales, looked up by the same indices
    scales = node.inputs[1]
    gather = None if scales is None else scales.producer()
    assert gather is not None
    node.replace_input_with(0, None)
    node.replace_input_with(1, gather.inputs[1])


def _write_lookup(model: ir.Model, node: ir.Node, table: Layer, block: int, solved: Solved) -> None:
    """Make a GatherBlockQuantized of an embedding, which reads the codes and the scales of a product."""
    weight, width = solved.solutions[table.name].weight, _width(table, solved)
    codes = _packed_codes(model, table, weight, width, block)
    rows = shared_constant(model.graph, f"{table.name}.row_shape", np.array([len(weight.codes[0]), -1]))
    data = graphs.insert(node, "Reshape", [codes, rows], {}, f"{table.name}.row_codes")
    scale = _row_scales(model, node, table, table, weight, block)
    attributes = {"bits": width, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    _become(node, LOOKUP, [data, node.inputs[1], scale], attributes)


def _width(layer: Layer, solved: Solved) -> int:
    return WIDTHS[solved.plan.container(layer, solved.plan.bits[layer.name])[0]]


def _packed_codes(model: ir.Model, layer: Layer, weight: QuantizedWeight, width: int, block: int) -> ir.Value:
    return shared_constant(model.graph, f"{layer.weight}.codes", pack_blocks(weight, width, block))


def _row_scales(
    model: ir.Model, node: ir.Node, layer: Layer, table: Layer, weight: QuantizedWeight, block: int
) -> ir.Value:
    """Store the scales of the rows of a table once, and repeat them for every block when the model is loaded."""
    outputs, inputs = weight.codes.shape[1:]
    rows = shared_constant(model.graph, f"{table.name}.scale", np.asarray(weight.scale[0], np.float32))
    shape = shared_constant(model.graph, f"{table.name}.scale_shape", np.array([outputs, inputs // block]))
    return graphs.insert(node, "Expand", [rows, shape], {}, f"{layer.name}.block_scale")


def _become(node: ir.Node, op: str, inputs: list[ir.Value | None], attributes: dict[str, int]) -> None:
    """Give a node another operator with other inputs and attributes; its name and its output stay."""
    node.op_type, node.domain = op, MICROSOFT
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, int(number))
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
