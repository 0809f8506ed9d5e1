"""Define what a target is: the QDQ forms that a runtime executes, as data."""

from __future__ import annotations

from dataclasses import dataclass

from comq_onnx.targets.costs import Costs

# bits that a code takes in each container
WIDTHS = {"INT2": 2, "INT4": 4, "INT8": 8}


@dataclass(frozen=True)
class Storage:
    """Describe how codes are stored in the file.

    containers: (bits, dtype, opset), smallest first: the dtype holds codes of up to so many bits, and needs that opset.
    plane_opset: the opset from which on codes may be stored as bit planes, which the runtime joins when it loads the
    model; None where they may not.
    """

    containers: tuple[tuple[int, str, int], ...]
    plane_opset: int | None = None

    def container(self, bits: int, opset: int = 99) -> tuple[str, int]:
        """Return the smallest dtype that holds `bits` at `opset`, and the opset that it needs. Raises ValueError."""
        for most, container, needs in self.containers:
            if bits <= most and needs <= opset:
                return container, needs
        raise ValueError(f"no container holds {bits} bits")

    def planes(self, bits: int, opset: int) -> tuple[int, ...]:
        """Return the widths of the bit planes that store codes of `bits` bits, from the highest bits down.

        They are powers of two that add up to `bits`. Empty where a container fits without waste, or where there are no
        planes at `opset`."""
        if self.plane_opset is None or opset < self.plane_opset or WIDTHS[self.container(bits, opset)[0]] == bits:
            return ()
        return tuple(width for width in (4, 2, 1) if bits & width)

    def opset_for(self, bits: int) -> int:
        """Return the opset from which on codes of `bits` bits are stored with the least waste."""
        container, needs = self.container(bits)
        return needs if WIDTHS[container] == bits else max(needs, self.plane_opset or 0)


@dataclass(frozen=True)
class Target:
    """Describe the QDQ forms that a runtime executes.

    name: as --target takes it.
    about: one line that helps to choose.
    why: the properties of the runtime that decide its forms.
    sources: where those are documented or measured.
    device: the device on which ONNX Runtime is this target, one that Python may not have; None where another runtime
    executes the model, so that speed and kernels in ONNX Runtime say nothing about it.

    Activations:

    activation: the dtype of quantized ones; None where the target gains nothing by them. Signed ones have zero point 0.
    wide_activation: the dtype of 16 bits; None where there is none.
    integer_layers: op types whose product runs in integers.
    needs_output: those of them whose output must be quantized too.
    fused_after: ops that fuse into the layer before them.
    skip_layers: layers that an Add behind them fuses into, if what it adds to their output is quantized.
    split_outputs: a product whose output is taken apart must have that output quantized.
    any_scale: float ops with an integer kernel for any scales of inputs and output.
    same_scale: ops that only move data; they run in integers if input and output share scale and zero point.

    Weights:

    integer: how the codes of layers with quantized activations are stored.
    safe_bits: the most bits of their codes whose products with uint8 activations all x86 CPUs add without overflow:
    those without VNNI add two products in 16 bits, and 255 * 64 * 2 fits there, 255 * 127 * 2 does not.
    exact_depthwise: depthwise convolutions are added in 32 bits everywhere, so they may have more.
    weight_only: how the codes of all other layers are stored.
    weight_zero_points: other zero points than 0 are allowed.
    signed_scales: a scale may be negative.
    integer_bias: integer layers take an int32 bias of scale s_x * s_w; a float one otherwise.
    unpack: the op that turns codes into floats when the model is loaded.

    Weight-only matrix products, in blocks of inputs:

    packed_products: the runtime has a good kernel for them; without one their weights are unpacked at load.
    block: the number of inputs that share a stored scale.
    whole_blocks: the blocks must fill the inputs, and be two or more.
    block_bits: codes of more bits than this are stored with a scale per channel.
    int2_columns: the number of outputs must be a multiple of this for codes of 2 bits.

    The file:

    half: float16 is no slower there than float32.
    min_opset, max_opset, max_ir: the versions that the target reads.
    costs: the time that operators take, where it was measured; it decides which layers gain by integers.
    providers: the execution providers of ONNX Runtime that other tools name when they mean this target.
    """

    name: str
    about: str
    why: str
    sources: tuple[str, ...]
    device: str | None

    activation: str | None
    wide_activation: str | None
    integer_layers: frozenset[str]
    needs_output: frozenset[str]
    fused_after: frozenset[str]
    skip_layers: frozenset[str]
    split_outputs: bool
    any_scale: frozenset[str]
    same_scale: frozenset[str]

    integer: Storage
    weight_only: Storage
    weight_zero_points: bool
    integer_bias: bool
    unpack: str

    signed_scales: bool = False
    safe_bits: int = 8
    exact_depthwise: bool = False

    packed_products: bool = True
    block: int = 128
    whole_blocks: bool = False
    block_bits: int = 8
    int2_columns: int = 1

    half: bool = True
    min_opset: int = 13
    max_opset: int = 26
    max_ir: int = 13
    costs: Costs | None = None
    providers: tuple[str, ...] = ()

    @property
    def runs_outside_ort(self) -> bool:
        """Tell whether another runtime than ONNX Runtime executes the model."""
        return self.device is None

    def activation_dtype(self, activations: str) -> str | None:
        """Return the dtype of activations for `auto`, `none`, `8` or `16` bits; None where they stay float.

        Raises ValueError where the target has none of that width."""
        dtype = {"none": None, "16": self.wide_activation}.get(activations, self.activation)
        if dtype is None and activations in ("8", "16"):
            raise ValueError(f"{self.name} runs nothing with activations of {activations} bits")
        return dtype

    def takes_blocks(self, inputs: int, block: int) -> bool:
        """Tell whether scales per block of `block` inputs can be written for a layer of `inputs` inputs."""
        return not self.whole_blocks or (inputs % block == 0 and inputs > block)

    def block_of(self, inputs: int, bits: int) -> int | None:
        """Return the block in which codes with one scale per channel are written, each scale repeated for every block.

        None where the target stores them with a scale per channel."""
        least, most = 16, max(16, min(self.block, 1 << max(inputs - 1, 1).bit_length()))
        if bits > self.block_bits:
            return None
        sizes = (1 << k for k in range(most.bit_length() - 1, least.bit_length() - 2, -1))
        return next((size for size in sizes if self.takes_blocks(inputs, size)), None)

    def opset_for(self, bits: int) -> int:
        """Return the opset from which on codes of `bits` bits are stored with the least waste."""
        return max(self.integer.opset_for(bits), self.weight_only.opset_for(bits))
