"""Find out which layers a layer reads: those whose outputs come to it through no other layer."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from comq_onnx.model.layers import Layer, layers_of_nodes

# of the layers before it each layer names so many, the nearest: where all outputs so far are joined, as in a DenseNet,
# all of them would be many
MOST_BEFORE = 4


def layers_before(model: ir.Model, layers: Sequence[Layer]) -> dict[str, tuple[str, ...]]:
    """Return the names of the layers that each layer reads, in graph order, at most MOST_BEFORE.

    Layers in subgraphs are not followed.
    """
    by_node = layers_of_nodes(layers)
    places = {layer.name: i for i, layer in enumerate(layers)}
    # by node: the layers whose outputs come out of it
    through: dict[int, tuple[str, ...]] = {}
    found: dict[str, tuple[str, ...]] = {}
    for node in model.graph:
        producers = [value.producer() for value in node.inputs if value is not None]
        names = {name for producer in producers if producer is not None for name in through.get(id(producer), ())}
        before = tuple(sorted(names, key=lambda name: places[name])[-MOST_BEFORE:])
        own = tuple(layer.name for layer in by_node.get(str(node.name), ()))
        found.update(dict.fromkeys(own, before))
        through[id(node)] = own or before
    return found
