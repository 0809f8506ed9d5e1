"""Predict which layers gain by integers, and leave those that integers would make slower in floats.

A convolution in integers saves time in its products. But its input must be quantized and brought into another layout,
and its output dequantized where a float operator reads it. With few products, or one input channel for each output
channel, that costs more than it saves. Such a layer is left weight-only: its file is as small, it is as fast as the
float layer, and its activations lose nothing. Matrix products stay in integers: their weight-only kernel rounds
activations too, and the two are a few microseconds apart where there is little to multiply.

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
    return best


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
                total += self._layer(layer, node, layer.name in plan.integer_layers)
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

    def _layer(self, layer: Layer, node: ir.Node, integer: bool) -> float:
        """Predict the microseconds of a layer alone."""
        out, read = self._size(node.outputs[0]), self._size(node.inputs[layer.kind.input_index])
        fixed, product, number = self.costs.layers[_kind(layer)][integer]
        products = out * int(np.prod(layer.weight_shape)) / max(_outputs(layer), 1)
        return fixed + (products * product + (out + read) * number) * 1e-3

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
        if node is None or node.op_type not in BLOCKED:
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
