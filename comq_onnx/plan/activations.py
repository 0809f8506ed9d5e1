"""Which activations get a QuantizeLinear/DequantizeLinear pair, and with what scale and zero point.

A target runs an operator in integers only if what it reads, and often what it writes, is quantized. So:

- what an integer layer reads is quantized for it (other float readers keep the float value), and
- where the producer itself runs in integers (a Conv, or a residual Add between Convs), every reader takes the one
  dequantized value, or the runtime would keep the producer in float.

Operators between integer layers run in integers only if all they read is quantized anyway and something integer wants
what they write: no attention mask or layer norm ever gets a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, nodes_by_name
from comq_onnx.targets.target import Target


@dataclass(frozen=True)
class QuantizedValue:
    """A value with a Q/DQ pair. everywhere: all its readers take the dequantized one; like: the value it shares its
    scale with, where that is known in time; bounds: what the fused Clip or Relu before it lets through."""

    name: str
    everywhere: bool
    like: str | None = None
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class ActivationPlan:
    """The values to quantize by name, in topological order, and the names of the layers that run in integers. dtype:
    of quantized activations; float32 where there are none."""

    dtype: str
    values: dict[str, QuantizedValue] = field(default_factory=dict)
    integer_layers: frozenset[str] = frozenset()

    def root(self, name: str) -> str:
        """The value whose range gives `name` its scale."""
        like = self.values[name].like
        return self.root(like) if like is not None else name


def plan_activations(model: ir.Model, layers: Sequence[Layer], target: Target, dtype: str | None) -> ActivationPlan:
    """Decide which values are quantized. dtype None: none (weight-only)."""
    if dtype is None:
        return ActivationPlan("float32")
    nodes = nodes_by_name(model)
    integer = [layer for layer in layers if runs_in_integers(layer, target)]
    by_name = {layer.name: layer for layer in integer}
    ends: dict[str, QuantizedValue] = {}  # values that come out of integers, by name
    operators: list[tuple[ir.Node, QuantizedValue]] = []
    for node in _in_order(model):
        if node.name in by_name and node.op_type in target.needs_output:
            value, bounds = _behind_activation(node, target)
            ends[str(value.name)] = QuantizedValue(str(value.name), True, None, bounds)
        elif node.name not in by_name and node.domain in ("", "ai.onnx"):
            made = _integer_operator(node, ends, target)
            if made is not None:
                ends[made.name] = made
                operators.append((node, made))

    wanted = {layer.input for layer in integer}
    kept: list[QuantizedValue] = []
    for node, made in reversed(operators):
        if made.name in wanted:
            kept.append(made)
            wanted |= {str(v.name) for v in _data_inputs(node)}
        else:
            del ends[made.name]

    values = {name: QuantizedValue(name, False) for name in dict.fromkeys(layer.input for layer in integer)}
    values.update(ends)
    for node in _in_order(model):
        values.update((str(v.name), QuantizedValue(str(v.name), True)) for v in _skips(node, by_name, target))
    for layer in integer if target.split_outputs else ():
        whole = nodes[layer.bias_node or layer.name].outputs[0]
        if _is_split(whole):
            values[str(whole.name)] = QuantizedValue(str(whole.name), True)
    for node in _in_order(model):
        if node.op_type == "Concat" and node.outputs and str(node.outputs[0].name) in ends:
            _share_scale(node, values)
    order = _topological(nodes)
    ordered = dict(sorted(values.items(), key=lambda item: order.get(item[0], -1)))
    return ActivationPlan(dtype, ordered, frozenset(by_name))


def _share_scale(concat: ir.Node, values: dict[str, QuantizedValue]) -> None:
    """Give what only a Concat reads the scale of what it writes: then it copies, where it would round once more."""
    out = str(concat.outputs[0].name)
    inputs = [v for v in concat.inputs if v is not None]
    alone = [v for v in inputs if len(list(v.uses())) == 1 and not v.is_graph_output()]
    mine = [values[str(v.name)] for v in alone if str(v.name) in values and values[str(v.name)].like is None]
    if len(mine) != len(inputs) or len({value.bounds for value in mine}) != 1:
        return
    values[out] = replace(values[out], bounds=mine[0].bounds)
    values.update((value.name, replace(value, like=out)) for value in mine)


def runs_in_integers(layer: Layer, target: Target) -> bool:
    """Whether the target has an integer kernel for the layer."""
    return layer.op in target.integer_layers and layer.kind.has_integer_form


def _in_order(model: ir.Model) -> Iterable[ir.Node]:
    for inner in (model.graph, *model.graph.subgraphs()):
        yield from inner


def _topological(nodes: dict[str, ir.Node]) -> dict[str, int]:
    """The place of each value's producer; graph inputs come before all (they are absent)."""
    return {str(out.name): i for i, node in enumerate(nodes.values()) for out in node.outputs}


def _behind_activation(node: ir.Node, target: Target) -> tuple[ir.Value, tuple[float, float] | None]:
    """What comes out of a node, or out of the one activation that the runtime fuses into it, and the latter's
    bounds."""
    value = node.outputs[0]
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return value, None
    user = users[0][0]
    if user.op_type not in target.fused_after or user.graph is not node.graph:
        return value, None
    bounds = clip_bounds(user)
    return (user.outputs[0], bounds) if bounds is not None else (value, None)


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """What a Relu or a Clip lets through; None where a Clip's bounds are not constant or exclude 0."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = [-np.inf, np.inf]
    for i, name in enumerate(("min", "max")):
        if name in node.attributes:
            bounds[i] = float(node.attributes[name].value)
        elif len(node.inputs) > i + 1 and node.inputs[i + 1] is not None:
            number = graphs.constant(node.inputs[i + 1])
            if number is None or number.size != 1:
                return None
            bounds[i] = float(number.reshape(-1)[0])
    return (bounds[0], bounds[1]) if bounds[0] <= 0 < bounds[1] else None


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs an operator computes with: all of Add, Mul and Concat, the first of the rest."""
    several = node.op_type in ("Add", "Mul", "Concat")
    return [v for v in (node.inputs if several else node.inputs[:1]) if v is not None]


def _skips(node: ir.Node, integer: Mapping[str, Layer], target: Target) -> list[ir.Value]:
    """What an Add adds to the output of an integer layer that it fuses into; of two such layers the first is that."""
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return []
    makers = [v.producer() if v is not None else None for v in node.inputs]
    fused = [i for i, p in enumerate(makers) if p is not None and p.name in integer and p.op_type in target.skip_layers]
    others = [v for i, v in enumerate(node.inputs) if i not in fused[:1] and v is not None]
    return [v for v in others if fused and not graphs.is_constant(v) and not v.is_graph_output()]


def _is_split(value: ir.Value) -> bool:
    """Whether a value is taken apart, as the queries, keys and values that one product makes are."""
    parts, pending = 0, [value]
    while pending:
        for reader, _ in pending.pop().uses():
            parts += {"Split": 2, "Gather": 1, "Slice": 1}.get(reader.op_type, 0)
            if reader.op_type in ("Reshape", "Transpose", "Squeeze", "Unsqueeze"):
                pending.append(reader.outputs[0])
    return parts > 1 and not value.is_graph_output()


def _integer_operator(node: ir.Node, ends: dict[str, QuantizedValue], target: Target) -> QuantizedValue | None:
    """The quantized value a float operator would write if it ran in integers; None where it cannot."""
    inputs = _data_inputs(node)
    if not inputs or any(str(v.name) not in ends for v in inputs):
        return None
    if node.op_type in target.any_scale:
        value, bounds = _behind_activation(node, target)
        return QuantizedValue(str(value.name), True, None, bounds)
    if node.op_type in target.same_scale and len(node.outputs) == 1:
        return QuantizedValue(str(node.outputs[0].name), True, like=str(inputs[0].name))
    return None
