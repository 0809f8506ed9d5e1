"""Choose which activations get a QuantizeLinear/DequantizeLinear pair, and which of them share a scale.

A target runs an operator in integers only if its inputs, and often its output, are quantized. So:

- the input of an integer layer is quantized for it (other float readers keep the float value), and
- where the producer itself runs in integers (a Conv, or a residual Add between Convs), every reader takes the same
  dequantized value, or the runtime would keep the producer in float.

Operators between integer layers run in integers only if all their inputs are quantized anyway and an integer layer
behind them wants their output: no attention mask or layer norm ever gets a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, nodes_by_name
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.given_pairs import given_grid, grid_of
from comq_onnx.targets.target import Target


@dataclass(frozen=True)
class QuantizedValue:
    """Describe a value that gets a QuantizeLinear/DequantizeLinear pair.

    name: the name of the value
    everywhere: all readers take the dequantized value; otherwise only integer layers do
    like: the value whose scale it shares, where that is known in time; None where it has its own
    bounds: what the Clip or Relu that is fused before it lets through; None where there is none
    given: the grid that the source has for it; None where a grid is to be found
    """

    name: str
    everywhere: bool
    like: str | None = None
    bounds: tuple[float, float] | None = None
    given: ActivationGrid | None = None


@dataclass(frozen=True)
class ActivationPlan:
    """Describe which values are quantized, and which layers run in integers.

    dtype: the type of quantized activations; float32 where there are none
    values: the values to quantize, by name, in topological order
    integer_layers: the names of the layers that run in integers
    """

    dtype: str
    values: dict[str, QuantizedValue] = field(default_factory=dict)
    integer_layers: frozenset[str] = frozenset()

    def root(self, name: str) -> str:
        """Return the value whose range gives `name` its scale."""
        like = self.values[name].like
        return self.root(like) if like is not None else name

    def everywhere(self) -> ActivationPlan:
        """Return the plan in which all readers of each value take what is quantized, as float layers do then too."""
        return replace(self, values={name: replace(value, everywhere=True) for name, value in self.values.items()})


def plan_activations(model: ir.Model, layers: Sequence[Layer], target: Target, dtype: str | None) -> ActivationPlan:
    """Choose the values that are quantized for those of `layers` that the target runs in integers.

    dtype: the type of quantized activations; None where there are none (weight-only)
    """
    if dtype is None:
        return ActivationPlan("float32")
    nodes = nodes_by_name(model)
    integer = {
        layer.name: layer
        for layer in layers
        if runs_in_integers(layer, target) and _fits_given_grid(nodes[layer.node], target, dtype)
    }
    in_order = list(_in_order(model))
    made = _integer_outputs(in_order, integer, target, dtype)
    values = {layer.input: QuantizedValue(layer.input, False) for layer in integer.values()}
    values.update(made)
    everywhere = [v for node in in_order for v in _skips(node, integer, target)]
    if target.split_outputs:
        whole = [nodes[layer.bias_node or layer.node].outputs[0] for layer in integer.values()]
        everywhere += [v for v in whole if _is_split(v)]
    values.update((str(v.name), QuantizedValue(str(v.name), True)) for v in everywhere)
    _take_given_grids(model, values, dtype)
    for node in in_order:
        if node.op_type == "Concat" and node.outputs and str(node.outputs[0].name) in made:
            _share_scale(node, values)
    order = _topological(nodes)
    ordered = dict(sorted(values.items(), key=lambda item: order.get(item[0], -1)))
    return ActivationPlan(dtype, ordered, frozenset(integer))


def plan_between_pairs(model: ir.Model, layers: Sequence[Layer], target: Target) -> ActivationPlan:
    """Plan no new pairs: only layers that stand between pairs of the source run in integers.

    ONNX Runtime rounds the float weights of such a layer to 8 bits itself, whatever they were rounded to before.
    """
    nodes, dtype = nodes_by_name(model), target.activation

    def is_between(layer: Layer) -> bool:
        node = nodes[layer.node]
        source = node.inputs[layer.kind.input_index]
        if dtype is None or source is None or layer.op not in target.needs_output:
            return False
        ends = (source, fused_output(node, target)[0])
        return all(given_grid(value, dtype) is not None for value in ends)

    between = [layer for layer in layers if is_between(layer)]
    return plan_activations(model, between, target, dtype) if between else ActivationPlan("float32")


def runs_in_integers(layer: Layer, target: Target) -> bool:
    """Tell whether the target has an integer kernel for the layer."""
    return layer.op in target.integer_layers and layer.kind.has_integer_form


def _fits_given_grid(node: ir.Node, target: Target, dtype: str) -> bool:
    """Tell whether the source's own grid for the output of a layer lets the target fuse the Relu or Clip before it.

    Where it does not, the layer would run in floats and unpack its weight at every call; a second pair before the
    source's would be merged with that by ONNX Runtime, to a scale that the biases behind do not have.
    """
    if node.op_type not in target.needs_output:
        return True
    made, bounds = fused_output(node, target)
    grid = given_grid(made, dtype)
    return grid is None or grid.is_within(bounds)


def fused_output(node: ir.Node, target: Target) -> tuple[ir.Value, tuple[float, float] | None]:
    """Return the output of a node, or that of the activation function that the runtime fuses into it.

    The second value is what that Clip or Relu lets through; None where none is fused.
    """
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
    """Return what a Relu or a Clip lets through; None where the bounds of a Clip are not constant or exclude 0."""
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


# Values that come out of integers
# ----------------------------------------------------------------------------------------------------------------------


def _integer_outputs(
    nodes: Iterable[ir.Node], integer: Mapping[str, Layer], target: Target, dtype: str
) -> dict[str, QuantizedValue]:
    """Return the outputs of integer layers and of operators between them that are quantized, by name.

    nodes: those of the model, in order
    integer: the layers that run in integers, by name
    dtype: the type of quantized activations
    """
    made: dict[str, QuantizedValue] = {}
    operators: list[tuple[ir.Node, QuantizedValue]] = []
    for node in nodes:
        if node.name in integer and node.op_type in target.needs_output:
            value, bounds = fused_output(node, target)
            made[str(value.name)] = QuantizedValue(str(value.name), True, None, bounds)
        elif node.name not in integer and node.domain in ("", "ai.onnx"):
            output = _integer_operator(node, made, target, dtype)
            if output is not None:
                made[output.name] = output
                operators.append((node, output))

    # operators from the last on: an output that nothing wants in integers stays float
    wanted = {layer.input for layer in integer.values()}
    for node, output in reversed(operators):
        if output.name in wanted:
            wanted |= {str(v.name) for v in _data_inputs(node)}
        else:
            del made[output.name]
    return made


def _integer_operator(
    node: ir.Node, made: Mapping[str, QuantizedValue], target: Target, dtype: str
) -> QuantizedValue | None:
    """Return the quantized output of an operator between integer layers; None where it cannot run in integers.

    made: the values that come out of integers so far
    dtype: the type of quantized activations
    """
    if node.op_type == "DequantizeLinear":
        return QuantizedValue(str(node.outputs[0].name), True) if grid_of(node, dtype) is not None else None
    inputs = _data_inputs(node)
    if not inputs or any(str(v.name) not in made for v in inputs):
        return None
    if node.op_type in target.any_scale:
        value, bounds = fused_output(node, target)
        return QuantizedValue(str(value.name), True, None, bounds)
    if node.op_type in target.same_scale and len(node.outputs) == 1:
        return QuantizedValue(str(node.outputs[0].name), True, like=str(inputs[0].name))
    return None


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    """Return the inputs that an operator computes with: all of Add, Mul and Concat, the first of any other."""
    several = node.op_type in ("Add", "Mul", "Concat")
    return [v for v in (node.inputs if several else node.inputs[:1]) if v is not None]


# Other values that are quantized
# ----------------------------------------------------------------------------------------------------------------------


def _skips(node: ir.Node, integer: Mapping[str, Layer], target: Target) -> list[ir.Value]:
    """Return the values that an Add adds to the output of the integer layer that it fuses into.

    Where it adds the outputs of two such layers, it fuses into the first.
    """
    if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return []
    makers = [v.producer() if v is not None else None for v in node.inputs]
    fused = [i for i, p in enumerate(makers) if p is not None and p.name in integer and p.op_type in target.skip_layers]
    others = [v for i, v in enumerate(node.inputs) if i not in fused[:1] and v is not None]
    return [v for v in others if fused and not graphs.is_constant(v) and not v.is_graph_output()]


def _is_split(value: ir.Value) -> bool:
    """Tell whether a value is taken apart, like the queries, keys and values that one product makes."""
    parts, pending = 0, [value]
    while pending:
        for reader, _ in pending.pop().uses():
            parts += {"Split": 2, "Gather": 1, "Slice": 1}.get(reader.op_type, 0)
            if reader.op_type in ("Reshape", "Transpose", "Squeeze", "Unsqueeze"):
                pending.append(reader.outputs[0])
    return parts > 1 and not value.is_graph_output()


def _take_given_grids(model: ir.Model, values: dict[str, QuantizedValue], dtype: str) -> None:
    """Give values that the source itself rounds the grids that it has for them."""
    for value in graphs.walk_values(model):
        planned = values.get(str(value.name))
        grid = None if planned is None else given_grid(value, dtype)
        if planned is not None and grid is not None:
            values[planned.name] = replace(planned, like=None, given=grid)


def _share_scale(concat: ir.Node, values: dict[str, QuantizedValue]) -> None:
    """Give values that only a Concat reads the scale of its output: then it copies codes, and does not round again."""
    out = str(concat.outputs[0].name)
    inputs = [v for v in concat.inputs if v is not None]
    alone = [v for v in inputs if len(list(v.uses())) == 1 and not v.is_graph_output()]
    planned = [values[str(v.name)] for v in alone if str(v.name) in values]
    mine = [value for value in planned if value.like is None and value.given is None]
    if len(mine) != len(inputs) or len({value.bounds for value in mine}) != 1:
        return
    values[out] = replace(values[out], bounds=mine[0].bounds)
    values.update((value.name, replace(value, like=out)) for value in mine)


# The order of a graph
# ----------------------------------------------------------------------------------------------------------------------


def _in_order(model: ir.Model) -> Iterable[ir.Node]:
    """Yield the nodes of the model, those of the main graph first."""
    for inner in (model.graph, *model.graph.subgraphs()):
        yield from inner


def _topological(nodes: Mapping[str, ir.Node]) -> dict[str, int]:
    """Return the place of each value's producer among the nodes; graph inputs, which come before all, have none."""
    return {str(out.name): i for i, node in enumerate(nodes.values()) for out in node.outputs}
