"""Turn half-precision arithmetic into float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx.model import graph as graphs
from comq_onnx.model.graph import HALF
from comq_onnx.model.layers import reaches_layer

# the attributes that name a type to compute in or to return; the last two are of DequantizeLinear and QuantizeLinear
_TYPES = ("to", "dtype", "output_dtype", "precision")


def upcast(model: ir.Model) -> bool:
    """Make float16 and bfloat16 arithmetic float32, keep the types of inputs and outputs, and tell if there was any."""
    if not any(value.dtype in HALF for value in graphs.walk_values(model)):
        return False
    graph = model.graph
    for value in list(graph.initializers.values()):
        _upcast_initializer(graph, value)
    for inner in (graph, *graph.subgraphs()):
        for node in inner:
            _upcast_attributes(node)
    for value in graph.inputs:
        if value.dtype in HALF and value.uses():
            _read_as_float(graph, value)
    for i, value in enumerate(list(graph.outputs)):
        if value.dtype in HALF and value.producer() is not None:
            graph.outputs[i] = _written_as_half(graph, value)
    kept = {id(v) for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for value in graphs.walk_values(model):
        if value.dtype in HALF and id(value) not in kept:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    passes.NameFixPass()(model)
    return True


def _read_as_float(graph: ir.Graph, value: ir.Value) -> None:
    """Put a Cast to float32 between an input or initializer of the main graph and all its readers."""
    users = list(value.uses())
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    _rename(cast.outputs[0], f"{value.name}_float32", ir.DataType.FLOAT)
    graph.insert_before(next(iter(graph)), cast)
    for user, index in users:
        user.replace_input_with(index, cast.outputs[0])


def _written_as_half(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Cast an output that is now float32 back to its type, and return the new output, which gets its name."""
    name, dtype = value.name, value.dtype
    assert dtype is not None
    _rename(value, f"{name}_float32", ir.DataType.FLOAT)
    cast = ir.node("Cast", [value], {"to": dtype})
    _rename(cast.outputs[0], str(name), dtype)
    cast.outputs[0].shape = value.shape
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
