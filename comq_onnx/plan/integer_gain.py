"""Predict which layers gain by integers or by packed weights, and leave those that these would make slower in floats.

A convolution in integers saves time in its products. But its input must be quantized and brought into another layout,
and its output dequantized where a float operator reads it. With few products, or one input channel for each output
channel, that costs more than it saves. Such a layer is left weight-only: its file is as small, it is as fast as the
float layer, and its activations lose nothing. A matrix product with packed weights is the fastest where there is one
row, in integers where there are many, and in floats where it is tiny. Where a runtime has no good kernel for packed
weights, they are unpacked when the model is loaded.

Times come from `Costs`, measured once for a target and kept as numbers, not from a clock on the user's machine: the
same model and samples give the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.plan.activations import ActivationPlan, fused_output
from comq_onnx.plan.given_pairs import is_between_pairs
from comq_onnx.targets.costs import Costs
from comq_onnx.targets.target import Target

# the shape of each value for one sample, by its name
Shapes = Mapping[str, tuple[int, ...]]
# plans the activations for those layers that may run in integers
Planner = Callable[[Sequence[Layer]], ActivationPlan]
# operators that take the blocked layout of float convolutions (ONNX Runtime's NCHWc transformer)
BLOCKED = frozenset(
    {
        "Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Relu", "LeakyRelu", "Clip", "Sigmoid",
        "Tanh", "HardSigmoid", "Add", "Sum", "Mul", "Concat", "BatchNormalization",
    }
)  # fmt: skip
# a layer that stays float must save this share of the whole time: predictions are off by about a tenth of a layer
WORTH = 0.002
# integers must save this share of the time of small layers: predictions of these are off by about as much
MARGIN = 0.1
# packed weights take less memory: a product of so many weights is unpacked only where they take so many times as long
LARGE, UNPACK = 2**18, 1.1
# tables of fewer numbers are unpacked: looking codes and scales up takes more nodes
SMALL_TABLE = 2**16
# how often all regions and layers are tried at most
SWEEPS = 3
# microseconds for what must not happen: ONNX Runtime rounds the weights of a float layer between quantized values
FORBIDDEN_US = 1e6


def choose(
    prepared: Prepared, layers: Sequence[Layer], plan: Planner, shapes: Shapes, target: Target
) -> ActivationPlan:
    """Choose the activations with the least predicted time.

    First whole regions of layers are tried out of integers, then layer by layer.

    layers: those that may run in integers
    plan: gives the activations for some of `layers`
    shapes: the shape of every value, for one sample
    target: the runtime, whose costs are known
    """
    cost_model = CostModel(prepared, shapes, target)
    lost = cost_model.lost_products(layers)
    layers = [layer for layer in layers if layer.name not in lost]
    best = plan(layers)
    chosen, least = set(best.integer_layers), cost_model.time(best)
    convolutions = {layer.name for layer in layers if layer.name in chosen and is_measured(layer)}
    regions = [region & convolutions for region in join_layers(prepared, best)]
    regions += [{layer.name} for layer in layers if layer.name in convolutions]
    for sweep in range(SWEEPS):
        before = least
        for region in regions if sweep == 0 else regions[::-1]:
            tried = chosen - region if region <= chosen else chosen | region
            found = plan([layer for layer in layers if layer.name in tried])
            time = cost_model.time(found)
            # back to integers for any gain, out of them only for a gain that is worth it
            if time < least * (1 if len(tried) > len(chosen) else 1 - WORTH):
                best, chosen, least = found, tried, time
        if least == before:
            break
    floats = plan([layer for layer in layers if not (is_measured(layer) or layer.kind.is_matrix)])
    return best if least < cost_model.time(floats) * (1 - MARGIN) else floats


@dataclass(frozen=True)
class CostModel:
    """Predict the time that a plan takes, apart from what takes the same time under every plan.

    prepared: the model
    shapes: the shape of every value, for one sample
    target: the runtime, whose costs are known
    """

    prepared: Prepared
    shapes: Shapes
    target: Target

    @property
    def costs(self) -> Costs:
        """Return the costs of the target."""
        assert self.target.costs is not None
        return self.target.costs

    def time(self, plan: ActivationPlan) -> float:
        """Predict the microseconds for one sample on one thread.

        Counts the layers, the operators with an integer kernel, and the conversions between integers and floats.
        """
        layers = {layer.name: layer for layer in self.prepared.layers}
        integers = self._integers(plan)
        total = 0.0
        for node in self.prepared.model.graph:
            layer = layers.get(str(node.name))
            if layer is not None:
                total += self._layer(layer, layer.name in plan.integer_layers)
                if layer.name not in plan.integer_layers and self._is_between_quantized(layer, node, plan):
                    total += FORBIDDEN_US
            elif node.op_type in self.costs.operators:
                total += self.costs.operators[node.op_type][str(node.name) in integers].of(self._largest(node))
        for value in self._values():
            total += self._conversions(value, plan, integers)
        return total

    def _integers(self, plan: ActivationPlan) -> set[str]:
        """Return the names of the nodes that run in integers."""
        found = set(plan.integer_layers)
        for node in self.prepared.model.graph:
            made = plan.values.get(str(node.outputs[0].name)) if node.outputs else None
            if made is None or not made.everywhere:
                continue
            found.add(str(node.name))
            source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            # it goes into the zero point of what is before it
            if source is not None and node.op_type in self.target.fused_after:
                found.add(str(source.name))
        return found

    def _is_between_quantized(self, layer: Layer, node: ir.Node, plan: ActivationPlan) -> bool:
        """Tell whether a float layer reads a dequantized value and writes one that is quantized."""
        read, (made, _) = plan.values.get(layer.input), fused_output(node, self.target)
        planned = read is not None and read.everywhere and str(made.name) in plan.values
        return planned or is_between_pairs(node, made)

    def lost_products(self, layers: Sequence[Layer]) -> frozenset[str]:
        """Return the names of the matrix products that take longer in integers, with their inputs quantized.

        Those that read the same value are judged together: it is quantized once.
        """
        readers: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.kind.is_matrix and layer.input in self.shapes and layer.output in self.shapes:
                readers.setdefault(layer.input, []).append(layer)
        lost: set[str] = set()
        for name, group in readers.items():
            times = [self.times(layer) for layer in group]
            quantize = self.costs.quantize.of(int(np.prod(self.shapes[name], dtype=np.int64)))
            least = sum(_least_in_float(t) for t in times)
            if quantize + sum(t["integer"] for t in times) > least * (1 - MARGIN):
                lost |= {layer.name for layer in group}
        return frozenset(lost)

    def is_unpacked(self, layer: Layer) -> bool:
        """Tell whether packed weights make a layer slower that is weight-only."""
        if layer.kind.is_lookup:
            return int(np.prod(layer.weight_shape)) < SMALL_TABLE
        if not layer.kind.is_matrix or layer.input not in self.shapes or layer.output not in self.shapes:
            return False
        times = self.times(layer)
        return times.get("weight-only", np.inf) > times["float"] * _patience(layer)

    def times(self, layer: Layer) -> dict[str, float]:
        """Predict the microseconds of a layer alone in each form that `Costs` has for its kind."""
        read, out = (int(np.prod(self.shapes.get(v, ()), dtype=np.int64)) for v in (layer.input, layer.output))
        weights = int(np.prod(layer.weight_shape))
        products = out * weights // max(_outputs(layer), 1)
        return {form: line.of(products, weights, out + read) for form, line in self.costs.layers[_kind(layer)].items()}

    def _layer(self, layer: Layer, integer: bool) -> float:
        """Predict the microseconds of a layer alone, where it is not in integers in the form that takes least."""
        times = self.times(layer)
        return times["integer"] if integer else _least_in_float(times)

    def _conversions(self, value: ir.Value, plan: ActivationPlan, integers: set[str]) -> float:
        """Predict the microseconds to quantize, dequantize and lay out a value between its producer and its readers."""
        producer = value.producer()
        readers = [node for node, _ in value.uses()]
        size, planned = self._size(value), plan.values.get(str(value.name))
        made = producer is not None and str(producer.name) in integers
        wanted = [str(node.name) in integers for node in readers]
        total = 0.0
        if planned is not None and not made and any(wanted):
            total += self.costs.quantize.of(size)
        floats = not all(wanted) or value.is_graph_output()
        if planned is not None and made and floats and (producer is None or producer.op_type not in ("MatMul", "Gemm")):
            total += self.costs.dequantize.of(size)
        if len(self.shapes.get(str(value.name), ())) == 4:
            layouts = {self._layout(producer, made)} | {
                self._layout(node, integer) for node, integer in zip(readers, wanted, strict=True)
            }
            layouts = (layouts | {"first"} if value.is_graph_output() else layouts) - {"any"}
            total += self.costs.layout.of(size) * max(len(layouts) - 1, 0)
        return total

    def _layout(self, node: ir.Node | None, integer: bool) -> str:
        """Return where a node has the channels of images: first, last, in blocks, or as they come (any)."""
        if integer:
            return "last" if node is not None and node.op_type == "Conv" else "any"
        if node is None or node.op_type not in BLOCKED or not self.costs.blocked:
            return "first"
        constants = [v for v in node.inputs if v is not None and v.const_value is not None]
        if node.op_type in ("Add", "Sum", "Mul") and constants:
            return "first"
        return "blocked" if node.op_type == "Conv" else "any"

    def _values(self) -> Iterable[ir.Value]:
        yield from self.prepared.model.graph.inputs
        for node in self.prepared.model.graph:
            yield from node.outputs

    def _largest(self, node: ir.Node) -> int:
        return max(self._size(v) for v in (*node.inputs, *node.outputs) if v is not None)

    def _size(self, value: Any) -> int:
        return int(np.prod(self.shapes.get(str(value.name), ()), dtype=np.int64)) if value is not None else 0


def _patience(layer: Layer) -> float:
    """Return how many times as long as in floats a product with packed weights may take."""
    return UNPACK if np.prod(layer.weight_shape) >= LARGE else 1.0


def _least_in_float(times: Mapping[str, float]) -> float:
    """Return the least time that a layer takes in any form but integers."""
    return min(time for form, time in times.items() if form != "integer")


def unpacked(prepared: Prepared, shapes: Shapes, target: Target) -> frozenset[str]:
    """Return the names of the layers that packed weights make slower, where they are weight-only: products and tables.

    shapes: the shapes of the values that products read and make, for one sample
    target: the runtime, whose costs are known
    """
    cost_model = CostModel(prepared, shapes, target)
    return frozenset(layer.name for layer in prepared.layers if cost_model.is_unpacked(layer))


def is_measured(layer: Layer) -> bool:
    """Tell whether integers may make a layer slower, as far as that was measured: a convolution of images.

    Other convolutions have no blocked layout in floats, and are slow there.
    """
    return layer.kind.is_convolution and len(layer.weight_shape) == 4


def _kind(layer: Layer) -> str:
    """Return the kind of a layer as `Costs` names it."""
    if not layer.kind.is_convolution:
        return "matrix"
    if layer.kind.is_depthwise:
        return "depthwise"
    return "pointwise" if np.prod(layer.kind.kernel) == 1 else "window"


def _outputs(layer: Layer) -> int:
    return int(layer.weight_shape[layer.kind.axis]) if layer.kind.axis is not None else 1


def join_layers(prepared: Prepared, plan: ActivationPlan) -> list[set[str]]:
    """Return the regions of layers that are joined by values that stay quantized from one layer to the next."""
    values = {str(v.name): v for node in prepared.model.graph for v in node.outputs}
    home: dict[str, set[str]] = {name: {name} for name in plan.integer_layers}

    def reach(value: ir.Value) -> set[str]:
        """Return the integer layers that read a value, directly or through operators that run in integers."""
        found: set[str] = set()
        for node, _ in value.uses():
            if str(node.name) in home:
                found.add(str(node.name))
            elif node.outputs and str(node.outputs[0].name) in plan.values:
                found |= reach(node.outputs[0])
        return found

    for layer in prepared.layers:
        if layer.name not in home or layer.output not in values:
            continue
        for other in reach(values[layer.output]):
            both = home[layer.name] | home[other]
            for name in both:
                home[name] = both
    return list({id(region): region for region in home.values() if len(region) > 1}.values())
