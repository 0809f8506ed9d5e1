"""Give a weight that several layers share the moments of all their inputs.

Its codes are chosen when the first of its layers is reached. What the later ones will read in the quantized model is
not known by then: their inputs in the float model stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

from comq_onnx.calibrate.layer_moments import LayerInput, in_groups, input_moments
from comq_onnx.calibrate.leading import Group, Tensors
from comq_onnx.calibrate.passage import Way
from comq_onnx.calibrate.segment import run_segment
from comq_onnx.calibrate.stages import Stage, join
from comq_onnx.errors import ModelError
from comq_onnx.model.layers import Layer
from comq_onnx.solve.moments import Moments

# makes the error for an array of a layer's input whose numbers are not finite or too large, from how many samples each
# array holds, the array and its place
Refuse = Callable[[Layer, Sequence[int], Any, int], ModelError]


def later_readers(parts: Sequence[Stage], key: Callable[[Layer], Hashable]) -> dict[str, list[Layer]]:
    """Return the layers that read other rows with the weight of an earlier layer, by the name of the first of each.

    key: what layers with the same codes have in common
    """
    first: dict[Hashable, Layer] = {}
    later: dict[str, dict[Hashable, Layer]] = {}
    for stage in parts:
        for layer in stage.layers:
            if layer.input in stage.makes:
                continue
            root = first.setdefault(key(layer), layer)
            rows = (layer.input, layer.kind.rows_key())
            if rows != (root.input, root.kind.rows_key()):
                later.setdefault(root.name, {}).setdefault(rows, layer)
    return {name: list(layers.values()) for name, layers in later.items()}


def float_moments(
    way: Way, parts: Sequence[Stage], groups: Sequence[Group], readers: Mapping[str, Sequence[Layer]], seed: int,
    refuse: Refuse,
) -> dict[str, list[Moments]]:  # fmt: skip
    """Return the moments of the inputs of layers in the float model, in the order and under the names of `readers`.

    groups: the samples
    seed: the seed for drawing positions
    """
    layers = [layer for some in readers.values() for layer in some]
    if not layers:
        return {}
    whole = join(parts)
    wanted = [name for name in dict.fromkeys(layer.input for layer in layers) if name in whole.makes]
    x: Tensors = {name: [] for name in wanted}
    inputs = {name: [batch[name] for group in groups for batch in group.batches] for name in whole.reads}
    counts = [count for group in groups for count in group.counts]
    for outputs in run_segment(way.plan, whole, inputs, len(counts), wanted, None, way.store, way.device, way.work):
        for name in wanted:
            x[name].append(way.store.keep(outputs[name]))
    masks = [mask for group in groups for mask in group.masks]
    found: dict[str, Moments] = {}
    for layer in layers:
        arrays = {**inputs, **x}[layer.input]
        given = in_groups(LayerInput(layer, arrays, arrays, None, counts, masks), way.store)
        found[layer.name] = input_moments(given, way.store, seed, partial(refuse, layer, given.counts))
    return {name: [found[layer.name] for layer in some] for name, some in readers.items()}
