"""What a target is: the QDQ forms that a runtime executes, as data."""

from __future__ import annotations

from dataclasses import dataclass

from comq_onnx.targets.costs import Costs

# bits that a number takes in each container
WIDTHS = {"INT2": 2, "INT4": 4, "INT8": 8}


@dataclass(frozen=True)
class Storage:
    """How codes lie in the file.

    containers: the dtypes that hold up to so many bits, smallest first, with the opset that each needs. plane_opset:
    from which opset on codes may be stored as bit planes, which the runtime puts together at load; None for never.
    """

    containers: tuple[tuple[int, str, int], ...]
    plane_opset: int | None = None

    def container(self, bits: int, opset: int = 99) -> tuple[str, int]:
        """The smallest dtype that holds `bits` at `opset`, and the opset that it needs."""
        for most, container, needs in self.containers:
            if bits <= most and needs <= opset:
                return container, needs
        raise ValueError(f"no container holds {bits} bits")

    def planes(self, bits: int, opset: int) -> tuple[int, ...]:
        """The widths of the bit planes that store codes of `bits` bits, from the highest bits down: powers of two that
        add up to `bits`. Empty where a container fits without waste, or there are no planes at `opset`."""
        if self.plane_opset is None or opset < self.plane_opset or WIDTHS[self.container(bits, opset)[0]] == bits:
            return ()
        return tuple(width for width in (4, 2, 1) if bits & width)

    def opset_for(self, bits: int) -> int:
        """The opset from which on codes of `bits` bits are stored with as little waste as can be."""
        container, needs = self.container(bits)
        return needs if WIDTHS[container] == bits else max(needs, self.plane_opset or 0)


@dataclass(frozen=True)
class Target:
    """The QDQ forms that a runtime executes.

    about: a line for people who choose; why: what decides its forms; sources: where that is said.
    device: the device of ONNX Runtime that is this target; None where another runtime executes the model, and what
    ONNX Runtime says of speed and kernels is beside the point.

    Activations. activation: dtype of quantized ones, None where the target has no use for them; wide_activation: the
    one of 16 bits. Signed ones have zero point 0. integer_layers: op types whose product runs in integers.
    needs_output: those that must also have their output quantized. fused_after: ops that fuse into the one before.
    skip_layers: those that an Add behind them fuses into, if what it adds to their output is quantized.
    split_outputs: whether a product whose output is taken apart must have that output quantized. any_scale: float
    ops with an integer kernel for any scales of inputs and output. same_scale: ops that only move data, integer
    if input and output share scale and zero point.

    Weights. integer: how the codes of layers with quantized activations are stored; weight_only: those of all others.
    weight_zero_points: whether others than 0 are taken. integer_bias: whether integer layers take an int32 bias of
    scale s_x * s_w, or a float one. unpack: the op that makes floats of codes at load.

    Weight-only matrix products in blocks of inputs. block: how many inputs share a stored scale; whole_blocks: whether
    blocks must fill the inputs, twice at least; block_bits: codes of more bits are stored by whole channels;
    int2_columns: what the number of outputs must be a multiple of for codes of 2 bits.

    min_opset, max_opset, max_ir: what the target reads. costs: what operators take, where that was measured: by them
    it is decided which layers gain by integers.
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
    block: int = 128
    whole_blocks: bool = False
    block_bits: int = 8
    int2_columns: int = 1
    min_opset: int = 13
    max_opset: int = 26
    max_ir: int = 13
    costs: Costs | None = None

    @property
    def runs_outside_ort(self) -> bool:
        """Whether another runtime than ONNX Runtime executes the model: then that only computes what is written."""
        return self.device is None

    def activation_dtype(self, activations: str) -> str | None:
        """The dtype that `auto`, `none`, `8` or `16` bits of activations mean here. Raises ValueError where the target
        has none of that width."""
        dtype = {"none": None, "16": self.wide_activation}.get(activations, self.activation)
        if dtype is None and activations in ("8", "16"):
            raise ValueError(f"{self.name} runs nothing with activations of {activations} bits")
        return dtype

    def takes_blocks(self, inputs: int, block: int) -> bool:
        """Whether scales per `block` of `inputs` inputs can be written."""
        return not self.whole_blocks or (inputs % block == 0 and inputs > block)

    def block_of(self, inputs: int, bits: int) -> int | None:
        """The block in which codes with one scale per channel are written all the same; None for whole channels."""
        least, most = 16, max(16, min(self.block, 1 << max(inputs - 1, 1).bit_length()))
        if bits > self.block_bits:
            return None
        sizes = (1 << k for k in range(most.bit_length() - 1, least.bit_length() - 2, -1))
        return next((size for size in sizes if self.takes_blocks(inputs, size)), None)

    def opset_for(self, bits: int) -> int:
        """The opset from which on codes of `bits` bits are stored with as little waste as can be."""
        return max(self.integer.opset_for(bits), self.weight_only.opset_for(bits))
