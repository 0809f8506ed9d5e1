"""List the kinds of layers by operator, and define matrix products and embeddings.

Convolutions are in convolutions.py, the weights of LSTM, GRU and RNN in recurrent.py.

Operators: https://onnx.ai/onnx/operators/. Each keeps the contract of op_kind.py, which is tested against ONNX Runtime
over random attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.model.convolutions import Conv
from comq_onnx.model.op_kind import AnyArray, NotQuantizable, OpKind, at_positions, attribute
from comq_onnx.model.recurrent import RecurrentInput, RecurrentState
from comq_onnx.model.transposed import ConvTranspose
from comq_onnx.solve.grid import Array


def _inputs_first(blocks: int, inputs: int, out: int) -> tuple[int, ...]:
    """Return the shape of a weight [in, out] whose inputs lie in blocks; its own where there is one block."""
    return (inputs, out) if blocks == 1 else (blocks, inputs // blocks, out)


def _outputs_first(blocks: int, out: int, inputs: int) -> tuple[int, ...]:
    """Return the shape of a weight [out, in] whose inputs lie in blocks; its own where there is one block."""
    return (out, inputs) if blocks == 1 else (out, blocks, inputs // blocks)


@dataclass(frozen=True)
class MatMul(OpKind):
    """Describe x [..., in] @ weight [in, out].

    A weight [b, in, out] is b groups, broadcast against x [..., b, m, in]."""

    weight_shape: tuple[int, ...]

    op_type: ClassVar[str] = "MatMul"
    has_leading_axes: ClassVar[bool] = True
    takes_scalar_scale: ClassVar[bool] = False

    @classmethod
    def of(cls, _node: ir.Node, weight_shape: tuple[int, ...]) -> MatMul:
        if len(weight_shape) < 2:
            raise NotQuantizable("its weight is a vector")
        return cls(weight_shape)

    @property
    def _lead(self) -> tuple[int, ...]:
        return self.weight_shape[:-2]

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        return weight.reshape(-1, *weight.shape[-2:]).swapaxes(1, 2)

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        return np.ascontiguousarray(matrix.swapaxes(1, 2)).reshape(self.weight_shape)

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        inputs = self.weight_shape[-2]
        if int(np.prod(self._lead)) == 1:
            return at_positions(x.reshape(1, -1, inputs), pick)
        x = self._broadcast(x)
        extra = x.ndim - 2 - len(self._lead)
        stacked = [extra + i for i, d in enumerate(self._lead) if d != 1]
        rest = [i for i in range(x.ndim - 2) if i not in stacked]
        order = (*stacked, *rest, x.ndim - 2, x.ndim - 1)
        return at_positions(arrays.permute(x, order).reshape(self.groups, -1, inputs), pick)

    def _broadcast(self, x: Array) -> Array:
        """Broadcast x to the leading axes that the product has."""
        x = x[None] if x.ndim == 1 else x
        full = np.broadcast_shapes(x.shape[:-2], self._lead)
        return cast(Array, arrays.broadcast_to(x, (*full, *x.shape[-2:])))

    def positions(self, x: Array) -> int:
        if self.groups == 1:
            return arrays.size(x) // self.weight_shape[-2]
        return arrays.size(self._broadcast(x)) // self.weight_shape[-2] // self.groups

    def rows_key(self) -> tuple[object, ...]:
        return self.op_type, self._lead, self.inputs

    @property
    def groups(self) -> int:
        return int(np.prod(self._lead))

    @property
    def inputs(self) -> int:
        return self.weight_shape[-2]

    @property
    def axis(self) -> int | None:
        return len(self.weight_shape) - 1 if int(np.prod(self._lead)) == 1 else None

    def scaled_shape(self, blocks: int = 1) -> tuple[int, ...]:
        return (*self._lead, *_inputs_first(blocks, *self.weight_shape[-2:]))

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        blocks = _inputs_first(scale.shape[-1], scale.shape[-1], scale.shape[-2])
        return scale.swapaxes(1, 2).reshape(*self._lead, *blocks)

    @property
    def is_matrix(self) -> bool:
        return len(self.weight_shape) == 2

    @property
    def rows_follow_samples(self) -> bool:
        return self.groups == 1


@dataclass(frozen=True)
class _OutputsFirst(OpKind):
    """Share what MatMulLeft and Gather have in common: a weight [out, in] that is its own matrix."""

    weight_shape: tuple[int, ...]

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        return weight[None]

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        return np.ascontiguousarray(matrix[0])

    @property
    def groups(self) -> int:
        return 1

    @property
    def inputs(self) -> int:
        return self.weight_shape[1]

    @property
    def axis(self) -> int | None:
        return 0

    def scaled_shape(self, blocks: int = 1) -> tuple[int, ...]:
        return _outputs_first(blocks, *self.weight_shape)

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        return scale.reshape(_outputs_first(scale.shape[-1], *scale.shape[1:]))


@dataclass(frozen=True)
class MatMulLeft(_OutputsFirst):
    """Describe weight [out, in] @ x [..., in, columns]: the columns of x are the rows."""

    op_type: ClassVar[str] = "MatMul"
    input_index: ClassVar[int] = 1
    weight_index: ClassVar[int] = 0

    @classmethod
    def of(cls, _node: ir.Node, weight_shape: tuple[int, ...]) -> MatMulLeft:
        if len(weight_shape) != 2:
            raise NotQuantizable(f"its weight stands on the left and has rank {len(weight_shape)}, not 2")
        return cls(weight_shape)

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        columns = x[:, None] if x.ndim == 1 else x
        return at_positions(columns.swapaxes(-1, -2).reshape(1, -1, self.weight_shape[1]), pick)

    def positions(self, x: Array) -> int:
        return arrays.size(x) // self.weight_shape[1]

    def rows_key(self) -> tuple[object, ...]:
        return "MatMulLeft", self.inputs

    @property
    def rows_follow_samples(self) -> bool:
        return False


@dataclass(frozen=True)
class Gemm(OpKind):
    """Describe alpha A' B' + beta C with the weight in B; alpha goes into the rows.

    trans_a, trans_b: whether A or B is transposed before the product (transA, transB)."""

    weight_shape: tuple[int, ...]
    trans_a: bool
    trans_b: bool
    alpha: float
    beta: float

    op_type: ClassVar[str] = "Gemm"
    bias_index: ClassVar[int | None] = 2
    has_flat_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> Gemm:
        return cls(
            weight_shape,
            bool(attribute(node, "transA", 0)),
            bool(attribute(node, "transB", 0)),
            float(attribute(node, "alpha", 1.0)),
            float(attribute(node, "beta", 1.0)),
        )

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        return (weight if self.trans_b else weight.T)[None]

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        return np.ascontiguousarray(matrix[0] if self.trans_b else matrix[0].T)

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        rows = at_positions((x.T if self.trans_a else x)[None], pick)
        return rows if self.alpha == 1 else rows * np.float32(self.alpha)

    def positions(self, x: Array) -> int:
        return int(x.shape[1] if self.trans_a else x.shape[0])

    def rows_key(self) -> tuple[object, ...]:
        return self.op_type, self.trans_a, self.alpha

    @property
    def groups(self) -> int:
        return 1

    @property
    def inputs(self) -> int:
        return self.weight_shape[1 if self.trans_b else 0]

    @property
    def axis(self) -> int | None:
        return 0 if self.trans_b else 1

    def scaled_shape(self, blocks: int = 1) -> tuple[int, ...]:
        return (_outputs_first if self.trans_b else _inputs_first)(blocks, *self.weight_shape)

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        matrix: AnyArray = scale[0] if self.trans_b else scale[0].T
        return matrix.reshape((_outputs_first if self.trans_b else _inputs_first)(scale.shape[-1], *matrix.shape))

    @property
    def is_matrix(self) -> bool:
        return not self.trans_a

    @property
    def rows_follow_samples(self) -> bool:
        return not self.trans_a


@dataclass(frozen=True)
class Gather(_OutputsFirst):
    """Describe rows of an embedding table [rows, columns] looked up along axis 0: no arithmetic to calibrate.

    The rows of the table are its output channels: each has a scale."""

    op_type: ClassVar[str] = "Gather"
    is_lookup: ClassVar[bool] = True
    input_index: ClassVar[int] = 1
    weight_index: ClassVar[int] = 0

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> Gather:
        if len(weight_shape) != 2 or int(attribute(node, "axis", 0)) != 0:
            raise NotQuantizable("only a table [rows, columns] looked up along axis 0 is an embedding")
        return cls(weight_shape)

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        """Return indices as one-hot rows."""
        return at_positions(
            np.eye(self.weight_shape[0], dtype=np.float32)[np.asarray(x, np.int64).reshape(-1)][None], pick
        )

    def positions(self, x: Array) -> int:
        return int(x.size)

    def rows_key(self) -> tuple[object, ...]:
        return self.op_type, self.weight_shape[0]


# by operator: the kind of each of its weights, by what the layer's name has behind the node's
OP_KINDS: dict[str, dict[str, type[OpKind]]] = {
    "MatMul": {"": MatMul},
    "Gemm": {"": Gemm},
    "Conv": {"": Conv},
    "ConvTranspose": {"": ConvTranspose},
    "Gather": {"": Gather},
    "LSTM": {".W": RecurrentInput, ".R": RecurrentState},
    "GRU": {".W": RecurrentInput, ".R": RecurrentState},
    "RNN": {".W": RecurrentInput, ".R": RecurrentState},
}


def kinds_of(node: ir.Node) -> dict[str, type[OpKind]]:
    """Return the kinds of the weights of a node, as OP_KINDS holds them; {} for an operator that has none."""
    return OP_KINDS.get(node.op_type, {}) if node.domain in ("", "ai.onnx") else {}
