"""Divide a graph into stages, so that the input of each layer is at a cut between two stages.

The depth of a node is the number of layers on the longest path to it, itself included. Stage k holds the nodes of depth
k: its layers, which do not depend on one another (q, k and v share a stage, and so do parallel branches), and the float
operators behind them. So the inputs of all layers of stage k are at the cut before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from comq_onnx.model.layers import Layer, layers_of_nodes
from comq_onnx.model.quantized import nodes_of_quantized_weights
from comq_onnx.model.states import copies_weight


@dataclass(frozen=True)
class Stage:
    """Describe one segment of the graph.

    index: its place among the stages
    layers: its layers, those that read the state of their own node too
    nodes: the names of its nodes
    reads: the names of the values that it reads from earlier stages or the inputs of the graph
    makes: the names of the values that its nodes make
    live_after: the names of all values so far that later stages read
    """

    index: int
    layers: tuple[Layer, ...]
    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    live_after: frozenset[str]


def cut(model: ir.Model, layers: Sequence[Layer]) -> list[Stage]:
    """Divide the main graph of `model` into stages; a node with layers in its subgraphs counts as a float operator.

    Nodes that make weights from constants belong to no stage: every segment that needs one has it anyway, and kept at a
    cut it would be kept for every batch.
    """
    by_node = layers_of_nodes(layers)
    weights = {id(node) for node in nodes_of_quantized_weights(model)}
    depths: dict[int, int] = {}
    members: dict[int, list[ir.Node]] = {0: []}
    for node in model.graph:
        if id(node) in weights or copies_weight(node):
            continue
        before = [depths.get(id(v.producer()), 0) for v in reads(node) if v.producer() is not None]
        depth = max(before, default=0) + (node.name in by_node)
        depths[id(node)] = depth
        members.setdefault(depth, []).append(node)

    last_read: dict[str, int] = {}
    made_in: dict[str, int] = {str(v.name): -1 for v in model.graph.inputs}
    for depth, nodes in sorted(members.items()):
        for node in nodes:
            made_in.update((str(v.name), depth) for v in node.outputs)
            # rows of a layer may be another value than the node reads
            inputs = [layer.input for layer in by_node.get(str(node.name), ())]
            for name in (*inputs, *(str(value.name) for value in reads(node))):
                last_read[name] = max(last_read.get(name, 0), depth)

    stages = []
    for depth, nodes in sorted(members.items()):
        makes = [str(v.name) for node in nodes for v in node.outputs if v.name]
        wanted = dict.fromkeys(str(v.name) for node in nodes for v in reads(node))
        earlier = tuple(name for name in wanted if name in made_in and made_in[name] < depth)
        live = frozenset(n for n, made in made_in.items() if made <= depth and last_read.get(n, -1) > depth)
        here = tuple(layer for node in nodes for layer in by_node.get(str(node.name), ()))
        stages.append(Stage(depth, here, tuple(str(n.name) for n in nodes), earlier, tuple(makes), live))
    return stages


def join(parts: Sequence[Stage]) -> Stage:
    """Return consecutive stages as one."""
    makes = tuple(name for stage in parts for name in stage.makes)
    inside = set(makes)
    wanted = dict.fromkeys(name for stage in parts for name in stage.reads)
    return Stage(
        parts[0].index,
        tuple(layer for stage in parts for layer in stage.layers),
        tuple(name for stage in parts for name in stage.nodes),
        tuple(name for name in wanted if name not in inside),
        makes,
        parts[-1].live_after,
    )


def reads(node: ir.Node) -> list[ir.Value]:
    """Return the values that a node reads, with those that its subgraphs capture from outside."""
    values = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            values += _captured(attribute.value)
        elif attribute.type == ir.AttributeType.GRAPHS:
            for inner in attribute.value:
                values += _captured(inner)
    return values


def _captured(graph: ir.Graph) -> list[ir.Value]:
    """Return the values that a subgraph reads from outside."""
    own = {id(v) for v in graph.inputs} | {id(v) for node in graph for v in node.outputs}
    wanted = [v for node in graph for v in reads(node)] + list(graph.outputs)
    return [v for v in wanted if id(v) not in own]
