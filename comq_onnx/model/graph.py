"""Change onnx-ir graphs: the few operations that all other changes are made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
MAX_IR_VERSION = 13


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the numbers of an initializer; None for anything else."""
    if value is None or value.const_value is None or value.is_graph_input() or value.producer() is not None:
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """Tell whether `constant` would return numbers, without reading them."""
    return (
        value is not None and value.const_value is not None and not value.is_graph_input() and value.producer() is None
    )


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """Add a constant to the main graph under a fresh name and return its value."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}_{count}", count + 1
    # ascontiguousarray would make a scalar rank 1, and a rank-1 scale fails to load or runs in float
    tensor = ir.Tensor(array if array.ndim == 0 else np.ascontiguousarray(array), name=unique)
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def insert(
    before: ir.Node, op: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], name: str
) -> ir.Value:
    """Insert a new node right before another, and return its output, which is named like the node."""
    made = ir.node(op, inputs, attributes, name=name)
    made.outputs[0].name = name
    assert before.graph is not None
    before.graph.insert_before(before, made)
    return made.outputs[0]


def append(value: ir.Value, op: str, others: Sequence[ir.Value], name: str, renamed: str) -> ir.Node:
    """Insert `op` of a value and `others` right behind the node that makes the value, and return the new node.

    Its output takes the name, the type and all readers of the value, which is called `renamed` from then on.
    """
    producer, made = value.producer(), ir.node(op, [], name=name)
    result = made.outputs[0]
    result.name, result.type, result.shape = value.name, value.type, value.shape
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    value.name = renamed
    made.resize_inputs(1 + len(others))
    for index, read in enumerate((value, *others)):
        made.replace_input_with(index, read)
    assert producer is not None
    assert isinstance(producer.graph, ir.Graph)
    producer.graph.insert_after(producer, made)
    return made


def walk_values(model: ir.Model) -> Iterator[ir.Value]:
    """Return every value of the model, subgraphs included."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def branches(graph: ir.Graph) -> Iterator[ir.Graph]:
    """Return the branches of each If of a graph, and those of each If in them."""
    for node in graph:
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            for name in ("then_branch", "else_branch"):
                yield node.attributes[name].value
                yield from branches(node.attributes[name].value)


def find_readers(value: ir.Value, through: set[str] | frozenset[str]) -> Iterator[tuple[ir.Node, int]]:
    """Yield (node, index of its input) for the nodes that read a value, also behind nodes of the types in `through`."""
    pending, seen = deque([value]), set()
    while pending:
        for node, index in pending.popleft().uses():
            yield node, index
            if node.op_type in through and node not in seen:
                seen.add(node)
                pending.append(node.outputs[0])


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """Copy the part of a model that makes these values, as a model with them as outputs."""
    part = model.clone()
    values = {str(v.name): v for v in walk_values(part)}
    part.graph.outputs[:] = [values[name] for name in names]
    passes.RemoveUnusedNodesPass()(part)
    return part


def opset(model: ir.Model) -> int:
    """Return the version of the standard operators that the model imports."""
    return model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 1))
