"""Turn half-precision arithmetic into float32."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx.model import graph as graphs
from comq_onnx.model.graph import HALF
from comq_onnx.model.layers import reaches_layer
from comq_onnx.model.unfuse.maker import MICROSOFT

# attention that ONNX Runtime computes on float16 caches, on CPUs too
_CACHED = frozenset({"GroupQueryAttention"})
# the places of its inputs that are whole numbers: lengths and positions
_COUNTS = (5, 6, 9)
# operators that read numbers of any type, and make none of them
_TYPELESS = frozenset({"Shape", "Size"})
# the attributes that name a type to compute in or to return; the last two are of DequantizeLinear and QuantizeLinear
_TYPES = ("to", "dtype", "output_dtype", "precision")
# what the names of values behind a Cast end in, or those of values before the Cast of an output
_HALF, _SINGLE = "_float16", "_float32"


def upcast(model: ir.Model) -> bool:
    """Make float16 and bfloat16 arithmetic float32, keep the types of inputs and outputs, and tell if there was any.

    A float16 cache stays as it is, between Casts of one call's queries, keys and values: else each token would cast it
    to and fro. Only products of a Concat's cache read it behind a Cast: CPUs compute them in float32, and ONNX Runtime
    would put Casts there itself, where they part the products from the Transpose before them.
    """
    if not any(value.dtype in HALF for value in graphs.walk_values(model)):
        return False
    graph = model.graph
    left = _keep_caches(graph)
    for value in list(graph.initializers.values()):
        if value.dtype in HALF and any(node in left for node, _ in value.uses()):
            _read_as_float(graph, value, left)
        else:
            _upcast_initializer(graph, value)
    for inner in (graph, *graph.subgraphs()):
        for node in inner:
            if node not in left:
                _upcast_attributes(node)
    for value in graph.inputs:
        if value.dtype in HALF and value.uses():
            _read_as_float(graph, value, left)
    for i, value in enumerate(list(graph.outputs)):
        if value.dtype in HALF and value.producer() is not None and value.producer() not in left:
            graph.outputs[i] = _written_as_half(graph, value)
    made = [value for node in left for value in node.outputs]
    kept = {id(v) for v in (*graph.inputs, *graph.outputs, *graph.initializers.values(), *made)}
    for value in graphs.walk_values(model):
        if value.dtype in HALF and id(value) not in kept:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    passes.NameFixPass()(model)
    return True


def is_boundary(node: ir.Node) -> bool:
    """Tell whether a node is a Cast that `upcast` put between float16 and float32."""
    if node.op_type != "Cast" or node.inputs[0] is None:
        return False
    before, after = node.inputs[0].name, node.outputs[0].name
    return after in (f"{before}{_HALF}", f"{before}{_SINGLE}") or before == f"{after}{_SINGLE}"


def _keep_caches(graph: ir.Graph) -> set[ir.Node]:
    """Put Casts around what reads or lengthens a float16 cache, and return the nodes whose numbers stay float16."""
    left: set[ir.Node] = set()
    for node in [n for n in graph if _is_attention(n) or _lengthens(n)]:
        if not any(v is not None and v.is_graph_input() and v.dtype == ir.DataType.FLOAT16 for v in node.inputs):
            continue
        left.add(node)
        for index, value in enumerate(node.inputs):
            if value is not None and value.producer() is not None and not (_is_attention(node) and index in _COUNTS):
                cast = _cast(value, f"{value.name}{_HALF}", ir.DataType.FLOAT16)
                graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
                left.add(cast)
        for value in node.outputs:
            users = [(user, index) for user, index in value.uses() if user.op_type not in _TYPELESS]
            if users:
                cast = _cast(value, f"{value.name}{_SINGLE}", ir.DataType.FLOAT)
                graph.insert_after(node, cast)
                for user, index in users:
                    user.replace_input_with(index, cast.outputs[0])
    return left | {node for node in graph if left and node.op_type in _TYPELESS}


def _is_attention(node: ir.Node) -> bool:
    """Tell whether a node is attention that ONNX Runtime computes on float16 caches."""
    return node.op_type in _CACHED and node.domain == MICROSOFT


def _lengthens(node: ir.Node) -> bool:
    """Tell whether a node puts keys or values behind a cache that the model returns."""
    return node.op_type == "Concat" and node.outputs[0].is_graph_output()


def _cast(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Node:
    """Make a Cast of a value, whose output has this name."""
    cast = ir.node("Cast", [value], {"to": dtype})
    _rename(cast.outputs[0], name, dtype)
    cast.outputs[0].shape = value.shape
    return cast


def _read_as_float(graph: ir.Graph, value: ir.Value, left: Set[ir.Node] = frozenset()) -> None:
    """Put a Cast to float32 between an input or initializer of the main graph and all its readers but those `left`."""
    users = [(user, index) for user, index in value.uses() if user not in left]
    if not users:
        return
    cast = _cast(value, f"{value.name}{_SINGLE}", ir.DataType.FLOAT)
    graph.insert_before(next(iter(graph)), cast)
    for user, index in users:
        user.replace_input_with(index, cast.outputs[0])


def _written_as_half(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Cast an output that is now float32 back to its type, and return the new output, which gets its name."""
    name, dtype = value.name, value.dtype
    assert dtype is not None
    _rename(value, f"{name}{_SINGLE}", ir.DataType.FLOAT)
    cast = _cast(value, str(name), dtype)
    graph.append(cast)
    return cast.outputs[0]


def _rename(value: ir.Value, name: str, dtype: ir.DataType) -> None:
    """Give a value another name and type."""
    value.name = name
    value.type = ir.TensorType(dtype)


def _upcast_initializer(graph: ir.Graph, value: ir.Value) -> None:
    """Make a half-precision initializer float32: the numbers themselves of layers and small tensors, else by a Cast."""
    tensor = value.const_value
    if tensor is None or tensor.dtype not in HALF or value.name is None:
        return
    wide = ir.tensor(tensor.numpy().astype(np.float32), name=value.name)
    if tensor.size <= 1024 or reaches_layer(value):
        value.const_value, value.type = wide, ir.TensorType(ir.DataType.FLOAT)
        return
    # a large tensor that is no weight of a layer keeps its small size in the file
    _read_as_float(graph, value)


def _upcast_attributes(node: ir.Node) -> None:
    """Make the types and tensors that a node's attributes name float32 where they are half precision."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.INT and name in _TYPES and attribute.value in (10, 16):
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in HALF:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float32)))
