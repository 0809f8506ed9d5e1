"""Make the nodes that stand in for one fused operator."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.graph import HALF
from comq_onnx.model.op_kind import MIN_WEIGHTS, AnyArray

MICROSOFT = "com.microsoft"
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, *HALF})
# constants made from others, by what they were made from and how: two readers of one weight share what it becomes
Derived = dict[Hashable, ir.Value]


class Stays(Exception):
    """Say why a fused operator is left as it is; the text ends in the report."""


@dataclass
class Maker:
    """Make the nodes that stand in for one fused operator; nothing enters the graph before all are made.

    model: the model of the operator
    node: the fused operator
    standard: every operator of the domain com.microsoft is to go, not only those that hold a weight
    derived: the constants that were made for this model so far
    """

    model: ir.Model
    node: ir.Node
    standard: bool
    derived: Derived
    nodes: list[ir.Node] = field(default_factory=list)

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        domain: str = "",
        like: ir.Value | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Make a node of one output, and return the output.

        name: the node's name; by default the fused operator's with the operator behind it
        like: a value of the same type and shape as the output
        """
        made = self.several(op, *inputs, outputs=1, name=name, domain=domain, **attributes)[0]
        if like is not None and like.type is not None:
            made.type, made.shape = like.type, None if like.shape is None else ir.Shape(list(like.shape))
        return made

    def several(
        self,
        op: str,
        *inputs: ir.Value | None,
        outputs: int,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Make a node of several outputs, and return them."""
        name = self.name(f"{op.lower()}{len(self.nodes)}") if name is None else name
        node = ir.node(op, _trimmed(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else f"{name}_{i}"
        self.nodes.append(node)
        return list(node.outputs)

    def name(self, part: str) -> str:
        """Return a name for a part of the fused operator."""
        return f"{self.node.name}/{part}"

    def number(self, number: float | list[float], dtype: type = np.float32) -> ir.Value:
        """Return a constant of these numbers."""
        array: AnyArray = np.asarray(number, dtype)
        return self.derive((str(array.dtype), array.shape, array.tobytes()), "constant", lambda: array)

    def derive(self, key: Hashable, name: str, make: Callable[[], AnyArray]) -> ir.Value:
        """Return the constant that `make` computes; the one that is there already under `key`, if any.

        name: its name, where it is new
        """
        if key not in self.derived:
            self.derived[key] = graphs.add_initializer(self.model.graph, name, make())
        return self.derived[key]

    def input(self, index: int) -> ir.Value | None:
        """Return an input of the fused operator; None where it is not given."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def given(self, index: int) -> ir.Value:
        """Return an input that the fused operator cannot do without. Raises Stays where it is missing."""
        value = self.input(index)
        if value is None:
            raise Stays(f"its input {index} is missing")
        return value

    def output(self, index: int) -> ir.Value | None:
        """Return an output that something reads; None for any other."""
        value = self.node.outputs[index] if index < len(self.node.outputs) else None
        return value if value is not None and (value.uses() or value.is_graph_output()) else None

    def attribute(self, name: str, default: Any) -> Any:
        """Return the value of an attribute of the fused operator."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value


def is_weight(value: ir.Value | None) -> bool:
    """Tell whether a value is a constant worth quantizing."""
    if value is None or not graphs.is_constant(value):
        return False
    tensor = value.const_value
    return tensor is not None and tensor.dtype in _FLOATS and tensor.size >= MIN_WEIGHTS and len(tensor.shape) >= 2


def is_product(value: ir.Value | None) -> bool:
    """Tell whether a value is the product of a MatMul with a weight, which one operator reads."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain not in ("", "ai.onnx") or node.op_type != "MatMul":
        return False
    return any(map(is_weight, node.inputs)) and len(list(value.uses())) == 1 and not value.is_graph_output()


def _trimmed(inputs: tuple[ir.Value | None, ...]) -> list[ir.Value | None]:
    """Leave out the inputs at the end that are not given."""
    count = max((i + 1 for i, value in enumerate(inputs) if value is not None), default=0)
    return list(inputs[:count])
