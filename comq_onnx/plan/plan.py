"""Define the plan of a quantization: one frozen value that goes from stage to stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.options.options import Options
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.plan.forms import (
    WeightForm,
    code_bytes,
    container_of,
    form_of,
    may_add_bias,
    may_overflow,
    supported_grid,
)
from comq_onnx.solve.grid import Grid
from comq_onnx.targets.target import Target

# a number of bits by the name of a layer
Bits = dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Describe what is quantized, and how.

    written: the model that is written, with its layers in topological order
    walked: the same model as calibration walks through it: branches of If inlined, loops with more outputs (see
        subgraphs.py); its layers are those that the samples reach
    probes: for each layer in a subgraph of `walked`, the value that stacks the layer's inputs
    activations: the values that are quantized, and the layers that run in integers
    target: the runtime that the model is written for
    bits: the bits that each layer's weight is stored with, by the name of the layer
    grids: the grid of each layer's weight, by the name of the layer; of fewer bits for layers of `narrow` weights
    slower: the names of layers that are weight-only because integers would make them slower
    unpacked: the names of weight-only products and tables that are unpacked to floats at load because packed weights
        would make them slower
    tied: the name of the embedding whose codes a product has too, transposed, by the name of the product
    nbits_op: weight-only products are written as MatMulNBits where that is possible
    too_large: the names of values that stay float32 where others become float16; None where nothing does
    """

    written: Prepared
    walked: Prepared
    probes: Mapping[str, str]
    activations: ActivationPlan
    target: Target
    bits: Bits = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    slower: frozenset[str] = frozenset()
    unpacked: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    nbits_op: bool = False
    too_large: frozenset[str] | None = None

    @property
    def layers(self) -> Sequence[Layer]:
        """Return the layers that are quantized, in topological order."""
        return self.written.layers

    @property
    def opset(self) -> int:
        """Return the opset of the model that is written."""
        return self.written.opset

    @cached_property
    def unreached(self) -> frozenset[str]:
        """Return the names of the layers that calibration does not reach."""
        return frozenset(x.name for x in self.layers) - {x.name for x in self.walked.layers}

    @cached_property
    def unreached_weights(self) -> frozenset[str]:
        """Return the weights of the layers that calibration does not reach."""
        return frozenset(x.weight for x in self.layers if x.name in self.unreached)

    def is_unseen(self, layer: Layer) -> bool:
        """Tell whether calibration reaches neither a layer nor another one with its weight."""
        return layer.name in self.unreached and layer.weight not in self._walked_weights

    @cached_property
    def _walked_weights(self) -> frozenset[str]:
        return frozenset(x.weight for x in self.walked.layers)

    def form(self, layer: Layer) -> WeightForm:
        """Return how the weight of a layer is written."""
        return form_of(layer, self.activations, self.unpacked)

    def is_integer(self, layer: Layer) -> bool:
        """Tell whether a layer runs in integers."""
        return layer.name in self.activations.integer_layers

    def has_bias(self, layer: Layer) -> bool:
        """Tell whether a layer has a bias that can take a shift of its output, or can be given one."""
        return layer.has_bias or may_add_bias(layer, self.form(layer))

    def container(self, layer: Layer, bits: int) -> tuple[str, tuple[int, ...]]:
        """Return the container of a layer's codes, and the widths of bit planes in its place (see `container_of`)."""
        product = self._product_of.get(layer.name, layer)
        return container_of(product, self.form(product), bits, self.target, self.opset)

    def code_bytes(self, layer: Layer, bits: int) -> int:
        """Return the bytes that the codes of a layer take in the file at `bits` bits; 0 where a table is both."""
        if layer.name in self.tied:
            return 0
        product = self._product_of.get(layer.name, layer)
        return code_bytes(product, self.form(product), bits, self.target, self.opset)

    def with_bits(self, bits: Bits, options: Options) -> Plan:
        """Return the plan with other bits by the name of the layer, and the grids that the options give for them."""
        grids = {layer.name: self.grid_at(layer, bits[layer.name], options) for layer in self.layers}
        return replace(self, bits=bits, grids=grids)

    def grid_at(self, layer: Layer, bits: int, options: Options) -> Grid:
        """Return the grid of a layer's weight that is stored with `bits` bits.

        Unless all CPUs that matter have VNNI, its codes have at most as many bits as are safe without.
        """
        if layer.name in self.tied or layer.name in self._product_of:
            return Grid(bits, symmetric=True)
        if options.cpu == "any" and layer.weight in self.narrow:
            bits = min(bits, self.target.safe_bits)
        return supported_grid(layer, self.form(layer), options.grid(bits), self.target)

    @property
    def tied_layers(self) -> frozenset[str]:
        """Return the names of the embeddings and the products that share their codes."""
        return frozenset({*self.tied, *self.tied.values()})

    @cached_property
    def _product_of(self) -> Mapping[str, Layer]:
        """Return the product whose codes an embedding has, by the name of the embedding."""
        return {self.tied[x.name]: x for x in self.layers if x.name in self.tied}

    @cached_property
    def narrow(self) -> frozenset[str]:
        """Return the weights of layers that may overflow on some CPUs, also where other layers share them."""
        return frozenset(x.weight for x in self.layers if may_overflow(x, self.activations, self.target))
