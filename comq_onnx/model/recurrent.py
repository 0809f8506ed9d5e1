"""Define the two kinds of layers that an LSTM, a GRU or an RNN is: the weight of its input, and that of its state.

At each step t and in each direction such a node computes

    x_t W^T + h_(t-1) R^T,    W [directions, gates * hidden, in],  R [directions, gates * hidden, hidden]

and makes the state h_t of it, so the rows of R are what the node itself made one step before. A GRU without
`linear_before_reset` multiplies the rows of its last gate by the reset gate of the same step, so each of its gates is a
group of its own. model/states.py adds what computes these rows to a graph.

Operators: https://onnx.ai/onnx/operators/onnx__LSTM.html, onnx__GRU.html and onnx__RNN.html."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.model.op_kind import AnyArray, NotQuantizable, OpKind, at_positions, attribute
from comq_onnx.solve.grid import Array

# the place of sequence_lens among the inputs
LENGTHS = 4
# the activations that the reset gate of a GRU may have for its rows to be computed: those without numbers of their own
RESET_ACTIVATIONS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu"}


@dataclass(frozen=True)
class _Recurrent(OpKind):
    """Share what both weights have in common: [directions, gates * hidden, in], inputs last."""

    weight_shape: tuple[int, ...]

    # of several operators
    op_type: ClassVar[str] = ""
    is_recurrent: ClassVar[bool] = True
    takes_scalar_scale: ClassVar[bool] = False
    bias_index: ClassVar[int | None] = 3
    # B [directions, 2 * gates * hidden] holds the biases of W, then those of R
    bias_half: ClassVar[int]

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        return np.ascontiguousarray(matrix).reshape(self.weight_shape)

    def fits_bias(self, shape: tuple[int, ...]) -> bool:
        directions, out, _ = self.weight_shape
        return shape == (directions, 2 * out)

    def own_bias(self, bias: AnyArray) -> Array:
        return np.asarray(np.split(np.asarray(bias, np.float32), 2, axis=1)[self.bias_half].reshape(-1))

    def with_own_bias(self, bias: AnyArray | None, own: Array) -> Array:
        directions, out, _ = self.weight_shape
        halves = np.zeros((2, directions, out), np.float32) if bias is None else np.stack(np.split(bias, 2, axis=1))
        halves[self.bias_half] = own.reshape(directions, out)
        return np.concatenate(list(halves), axis=1)

    @property
    def inputs(self) -> int:
        return self.weight_shape[2]

    @property
    def axis(self) -> int | None:
        return 1 if self.weight_shape[0] == 1 else None

    def scaled_shape(self, blocks: int = 1) -> tuple[int, ...]:
        directions, out, inputs = self.weight_shape
        return self.weight_shape if blocks == 1 else (directions, out, blocks, inputs // blocks)

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        blocks = scale.shape[-1]
        return scale.reshape((*self.weight_shape[:2], *((1,) if blocks == 1 else (blocks, 1))))


@dataclass(frozen=True)
class RecurrentInput(_Recurrent):
    """Describe W: the steps of one sequence after the other [n, in], times one matrix of all directions and gates."""

    bias_half: ClassVar[int] = 0

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> RecurrentInput:
        _check(node, weight_shape)
        return cls(weight_shape)

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        return weight.reshape(1, -1, self.inputs)

    @property
    def groups(self) -> int:
        return 1

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        return at_positions(x[None], pick)

    def positions(self, x: Array) -> int:
        return int(x.shape[0])

    def rows_key(self) -> tuple[object, ...]:
        return "recurrent input", self.inputs


@dataclass(frozen=True)
class RecurrentState(_Recurrent):
    """Describe R: what it multiplies at each step [n, groups, hidden], one sequence after the other.

    gated: each gate has rows of its own: the state, the state, and the state times the reset gate
    """

    gated: bool

    weight_index: ClassVar[int] = 2
    bias_half: ClassVar[int] = 1
    reads_own_output: ClassVar[bool] = True

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> RecurrentState:
        _check(node, weight_shape)
        if not has_gated_rows(node):
            return cls(weight_shape, False)
        wrong = [name for name in reset_activations(node, weight_shape[0]) if name.lower() not in RESET_ACTIVATIONS]
        if wrong:
            raise NotQuantizable(f"a reset gate with {wrong[0]} before the product (linear_before_reset=0)")
        return cls(weight_shape, True)

    @property
    def groups(self) -> int:
        return self.weight_shape[0] * (3 if self.gated else 1)

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        return weight.reshape(self.groups, -1, self.inputs)

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        return at_positions(arrays.permute(x, (1, 0, 2)), pick)

    def positions(self, x: Array) -> int:
        return int(x.shape[0])

    def rows_key(self) -> tuple[object, ...]:
        return "recurrent state", self.groups, self.inputs


def has_gated_rows(node: ir.Node) -> bool:
    """Tell whether a node multiplies the state by a gate before it multiplies it by the weight of another gate."""
    return node.op_type == "GRU" and not attribute(node, "linear_before_reset", 0)


def reset_activations(node: ir.Node, directions: int) -> list[str]:
    """Return the names of the activations of a GRU's update and reset gates, one for each direction."""
    return [str(name) for name in attribute(node, "activations", ["Sigmoid", "Tanh"] * directions)[::2]]


def given(node: ir.Node, place: int) -> ir.Value | None:
    """Return an input of a node; None where it is left out."""
    value = node.inputs[place] if place < len(node.inputs) else None
    return value if value is not None and value.name else None


def _check(node: ir.Node, weight_shape: tuple[int, ...]) -> None:
    """Raise NotQuantizable for nodes whose rows are not those that are described here."""
    if attribute(node, "layout", 0):
        raise NotQuantizable("its first axis is the batch (layout=1), which ONNX Runtime does not run")
    if len(weight_shape) != 3:
        raise NotQuantizable(f"its weight has rank {len(weight_shape)}, not 3")
