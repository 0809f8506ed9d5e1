"""Define the contract of a kind of layer: an operator with a weight, seen as rows of inputs times a matrix.

For an input x and a weight,

    kind.rows(x) [groups, positions, in]  @  kind.to_matrix(weight) [groups, out, in]^T

holds exactly the numbers that the operator computes (without its bias), position by position. So the Gram of the rows
is all that a solver must know about the operator. Rows are made of numpy arrays and torch tensors alike (arrays.py).

A kind also answers what other parts of the program ask about an operator (`is_lookup`, `is_matrix`, `axis`, ...), so
that they need not ask for its class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.solve.grid import Array

AnyArray = npt.NDArray[Any]
# below this a layer's weights are no part of the file worth having, and its error is all cost
MIN_WEIGHTS = 128


class NotQuantizable(Exception):
    """Say why an operator that has a weight is left as it is; the text ends in the report."""


class OpKind(ABC):
    """Describe one operator with a constant weight. Subclasses are frozen dataclasses of the attributes that matter.

    weight_shape: the shape of the weight as the graph holds it.
    alpha: the factor of the product; the rows contain it. Only a Gemm has another one than 1.
    beta: the factor of the bias. Only a Gemm has another one than 1.

    op_type: the operator's name in ONNX; "" for a kind of several operators.
    input_index, weight_index, bias_index: places among the node's inputs; bias_index is None where the operator takes
    no bias.

    is_lookup: it looks rows of a table up (Gather): no arithmetic, so it needs no calibration.
    is_recurrent: it is a weight of an LSTM, a GRU or an RNN, whose rows model/states.py adds to a graph.
    reads_own_output: its rows are what the node made one step before (the state of an LSTM), not one of its inputs.
    is_convolution: it is a Conv. A ConvTranspose is not meant: no runtime here runs one in integers.
    has_leading_axes: it reads x [..., in], so positions of sequences keep axes of their own, in front of the inputs.
    has_flat_rows: it reads x of rank 2, so positions of sequences come flattened, [samples * positions, in].
    takes_scalar_scale: one scale for the whole weight may be written as a scalar. Not for a MatMul, which may be a
    stack: INT4 matrices of a stack times one number are what TensorRT fails to compile.
    """

    weight_shape: tuple[int, ...]
    alpha: float = 1.0
    beta: float = 1.0

    op_type: ClassVar[str]
    input_index: ClassVar[int] = 0
    weight_index: ClassVar[int] = 1
    bias_index: ClassVar[int | None] = None

    is_lookup: ClassVar[bool] = False
    is_recurrent: ClassVar[bool] = False
    reads_own_output: ClassVar[bool] = False
    is_convolution: ClassVar[bool] = False
    has_leading_axes: ClassVar[bool] = False
    has_flat_rows: ClassVar[bool] = False
    takes_scalar_scale: ClassVar[bool] = True

    # made of a node, and its matrix

    @classmethod
    @abstractmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> OpKind:
        """Read the attributes of a node. Raises NotQuantizable where the weight is none that can be quantized."""

    @abstractmethod
    def to_matrix(self, weight: AnyArray) -> AnyArray:
        """Return the weight as a stack of matrices [groups, out, in]."""

    @abstractmethod
    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        """Invert `to_matrix`, for weights and for their codes."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """Count the matrices that the weight is made of."""

    @property
    @abstractmethod
    def inputs(self) -> int:
        """Count the inputs of an output channel: columns of a matrix, numbers in a row."""

    @property
    def outputs(self) -> int:
        """Count the output channels of all groups together."""
        return int(np.prod(self.weight_shape)) // self.inputs

    # its bias

    def fits_bias(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a constant of this shape has one number per output channel."""
        return bool(shape) and shape[-1] == int(np.prod(shape)) == self.outputs

    def own_bias(self, bias: AnyArray) -> Array:
        """Return what is added to each output channel [out], from the bias as the graph holds it."""
        return np.asarray(bias, np.float32).reshape(-1) * np.float32(self.beta)

    def with_own_bias(self, _bias: AnyArray | None, own: Array) -> Array:
        """Return the bias as the graph holds it with `own` [out] as this layer's part; None where there is none yet."""
        return own

    # its rows

    @abstractmethod
    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        """Return the input as rows [groups, positions, in]; only the positions `pick` where given."""

    @abstractmethod
    def positions(self, x: Array) -> int:
        """Count the rows of the input."""

    @abstractmethod
    def rows_key(self) -> tuple[object, ...]:
        """Return what the rows depend on beside the input: kinds with equal keys have equal rows."""

    @property
    def solved_as(self) -> OpKind:
        """Return the kind as which it is solved: itself, or one of several smaller matrices that make it up.

        Those share the scales of their output channels (Grid.tied), which the weight has only once.
        """
        return self

    @property
    def rows_follow_samples(self) -> bool:
        """Tell whether inputs joined along the first axis give their rows one behind the other, in the same order."""
        return True

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the size of the window whose patches the rows are, on each spatial axis; () where there is none."""
        return ()

    def patches(self, _x: Array) -> Array | None:
        """Return the padded input where the rows are its patches and patches.py finds their Gram faster without them.

        None everywhere else."""
        return None

    # how its weight can be written

    @property
    @abstractmethod
    def axis(self) -> int | None:
        """Return the weight's axis of output channels for DequantizeLinear; None where no single axis holds them."""

    def takes_blocks(self, block: int) -> bool:
        """Tell whether `block` inputs each of a channel can share a scale in `scaled_shape`: they must fill it."""
        return self.inputs % block == 0

    @abstractmethod
    def scaled_shape(self, blocks: int = 1) -> tuple[int, ...]:
        """Return a shape of the weight's numbers, in their order, that `spread_scale` broadcasts against.

        It is the shape of the weight where that will do.

        blocks: the number of scales of a channel, each for as many inputs"""

    @abstractmethod
    def spread_scale(self, scale: AnyArray) -> AnyArray:
        """Reshape numbers per block [groups, out, blocks] so that they broadcast against `scaled_shape`."""

    @property
    def is_matrix(self) -> bool:
        """Tell whether it is x [..., in] times one matrix: a MatMul with a weight of rank 2, a Gemm without transA.

        Only these can have scales per block of inputs."""
        return False

    @property
    def is_depthwise(self) -> bool:
        """Tell whether it is a convolution whose every output channel reads one input channel."""
        return False

    @property
    def has_integer_form(self) -> bool:
        """Tell whether runtimes may have an integer kernel for it: a convolution or `is_matrix`, with an `axis`."""
        return self.is_matrix


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, sequences as lists; `default` where the node does not have it."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    value = attribute.value
    return list(value) if isinstance(value, (list, tuple)) else value


def at_positions(array: AnyArray, pick: npt.NDArray[np.intp] | None) -> AnyArray:
    """Pick positions of rows [groups, positions, in]; all of them where `pick` is None."""
    return array if pick is None else arrays.at(array, (slice(None), pick))
