"""Make the layers inside If, Loop and Scan reachable for calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from comq_onnx.context import Context
from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.model.probe import probe
from comq_onnx.samples.samples import Samples

# operators with subgraphs, and the attributes that hold these
SUBGRAPHS = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}


@dataclass(frozen=True)
class Specialized:
    """Hold the model as calibration walks through it.

    prepared: the model, with the layers that the walk reaches
    probes: for each layer in a subgraph, the value of the main graph that stacks the layer's inputs, one for each time
        that the subgraph runs
    unreached: the layers that the walk does not reach, and why
    """

    prepared: Prepared
    probes: dict[str, str]
    unreached: dict[str, str]


def specialize(prepared: Prepared, samples: Samples, context: Context) -> Specialized:
    """Make the layers in subgraphs reachable.

    Each If is replaced by the branch that all samples take. What layers in the branches of another If, or in the body
    of a Loop or Scan, read becomes an output of that operator.
    """
    model = prepared.model
    if any(node.op_type in SUBGRAPHS for node in model.graph):
        model = model.clone()
        while _inline_one_level(model, samples, context):
            pass
    probes = _probe_bodies(model, {layer.name: layer for layer in prepared.layers})
    reached = {str(node.name) for node in model.graph} | set(probes)
    inside: dict[str, str] = {}
    for node in model.graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                inside.update({str(n.name): node.op_type for n in attribute.value.all_nodes()})
    unreached = {
        layer.name: f"{layer.op}: {_why_unreached(inside.get(layer.name))}"
        for layer in prepared.layers
        if layer.name not in reached
    }
    layers = [layer for layer in prepared.layers if layer.name in reached]
    return Specialized(replace(prepared, model=model, layers=layers), probes, unreached)


def _probe_bodies(model: ir.Model, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Give each If, Loop and Scan of the main graph one more output for every value that layers in it read.

    Returns the name of that output for each layer.
    """
    probes: dict[str, str] = {}
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        for name in SUBGRAPHS.get(node.op_type, ()):
            body = node.attributes[name].value
            stacked: dict[str, str] = {}
            for inner in list(body):
                layer = layers.get(str(inner.name))
                if layer is None or layer.kind.is_lookup:
                    continue
                value = inner.inputs[layer.kind.input_index]
                assert value is not None
                if layer.input not in stacked:
                    stacked[layer.input] = (
                        _add_branch_output(model, node, body, value)
                        if node.op_type == "If"
                        else _add_scan_output(node, body, value)
                    )
                probes[layer.name] = stacked[layer.input]
    return probes


def _add_scan_output(node: ir.Node, body: ir.Graph, value: ir.Value) -> str:
    """Give a Loop or Scan one more output: a value that its body reads, stacked over the iterations.

    Returns the name of the output.
    """
    _add_output(body, "Identity", [value], _probe_name(body, value))
    for name in ("scan_output_axes", "scan_output_directions"):
        if name in node.attributes:
            node.attributes[name] = ir.AttrInt64s(name, [*node.attributes[name].value, 0])
    return _name_output(node, f"{_probe_name(body, value)}.stacked")


def _add_branch_output(model: ir.Model, node: ir.Node, branch: ir.Graph, value: ir.Value) -> str:
    """Give an If one more output: a value that a branch reads, as a stack of one; an empty one in the other branch.

    Returns the name of the output.
    """
    first = graphs.add_initializer(model.graph, "comq_onnx.first_axis", np.array([0]))
    nothing = graphs.add_initializer(model.graph, "comq_onnx.nothing", np.zeros(0, np.float32))
    name = _probe_name(branch, value)
    for attribute in ("then_branch", "else_branch"):
        one = node.attributes[attribute].value
        if one is branch:
            _add_output(one, "Unsqueeze", [value, first], name)
        else:
            _add_output(one, "Identity", [nothing], f"{name}.none")
    return _name_output(node, f"{name}.stacked")


def _probe_name(graph: ir.Graph, value: ir.Value) -> str:
    """Return a name for a copy of a value in one graph: graphs may read the same value from outside."""
    return f"{value.name}.in.{graph.outputs[0].name}.probe"


def _add_output(graph: ir.Graph, op: str, inputs: Sequence[ir.Value], name: str) -> None:
    """Give a graph one more output, `op` of some values."""
    made = ir.node(op, inputs, name=name)
    made.outputs[0].name, made.outputs[0].type = name, inputs[0].type or ir.TensorType(ir.DataType.FLOAT)
    graph.append(made)
    graph.outputs.append(made.outputs[0])


def _name_output(node: ir.Node, name: str) -> str:
    """Give a node one more output of this name, and return the name."""
    node.resize_outputs(len(node.outputs) + 1)
    node.outputs[-1].name = name
    return name


def _why_unreached(op: str | None) -> str:
    """Say why the walk does not reach a layer; op: the type of the node of the main graph that holds it, or None."""
    return "in a branch that no sample takes" if op is None else f"too deep in the subgraphs of a {op} to be calibrated"


def _inline_one_level(model: ir.Model, samples: Samples, context: Context) -> bool:
    """Inline every If of the main graph of which all samples take the same branch; False if there was none."""
    ifs = [node for node in model.graph if node.op_type == "If" and node.domain == ""]
    if not ifs:
        return False
    conditions = list(dict.fromkeys(str(node.inputs[0].name) for node in ifs if node.inputs[0] is not None))
    seen = _condition_values(model, conditions, samples, context)
    inlined = False
    for node in ifs:
        assert node.inputs[0] is not None
        taken = seen[str(node.inputs[0].name)]
        if len(taken) == 1:
            _inline(model.graph, node, node.attributes["then_branch" if taken.pop() else "else_branch"].value)
            inlined = True
    return inlined


def _condition_values(
    model: ir.Model, conditions: Sequence[str], samples: Samples, context: Context
) -> dict[str, set[bool]]:
    """Return the values that each condition has over all samples, by its name."""
    seen: dict[str, set[bool]] = {name: set() for name in conditions}
    known = {n: v for n in conditions if (v := graphs.constant(model.graph.initializers.get(n))) is not None}
    for name, value in known.items():
        seen[name].add(bool(value.all()))
    asked = [name for name in conditions if name not in known]
    if asked:
        batches = samples.batches(context.options.batch_size)
        for values in probe(model, asked, batches, context.device, "the conditions of the model"):
            for name, value in values.items():
                seen[name].add(bool(np.all(value)))
    return seen


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    """Put the nodes of a branch in the place of its If."""
    outputs = list(branch.outputs)
    branch.outputs.clear()
    for inner in list(branch):
        branch.remove(inner)
        graph.insert_before(node, inner)
    for old, new in zip(node.outputs, outputs, strict=True):
        name, old.name = old.name, f"{old.name}.if"
        copy = ir.node("Identity", [new], name=f"{name}.taken")
        copy.outputs[0].name, copy.outputs[0].type = name, old.type
        graph.insert_before(node, copy)
        old.replace_all_uses_with(copy.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
