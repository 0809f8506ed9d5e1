"""The contract of a kind of layer: an operator with a weight, seen as rows of inputs times a matrix.

For an input x and a weight,

    kind.rows(x) [groups, positions, in]  @  kind.to_matrix(weight) [groups, out, in]^T

holds exactly the numbers that the operator computes (without its bias), position by position. So the Gram of the rows
is all that a solver must know of the operator. Rows are made of numpy arrays and torch tensors alike (arrays.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.solve.grid import Array

AnyArray = npt.NDArray[Any]


class NotQuantizable(Exception):
    """Why an operator that has a weight is left as it is; the text ends in the report."""


class OpKind(ABC):
    """One operator with a constant weight. Subclasses are frozen dataclasses of the attributes that matter."""

    op_type: ClassVar[str]
    input_index: ClassVar[int] = 0
    weight_index: ClassVar[int] = 1
    bias_index: ClassVar[int | None] = None

    @abstractmethod
    def to_matrix(self, weight: AnyArray) -> AnyArray:
        """The weight as a stack of matrices [groups, out, in]."""

    @abstractmethod
    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        """The inverse of `to_matrix`, for weights and for their codes."""

    @abstractmethod
    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        """The input as rows [groups, positions, in]; only the positions `pick` where given."""

    @abstractmethod
    def positions(self, x: Array) -> int:
        """How many rows the input has."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """The extent on each spatial axis of the window whose patches the rows are; () where there is none."""
        return ()

    def patches(self, _x: Array) -> Array | None:
        """The padded input, where the rows are its patches and their Gram is had faster without them (see patches)."""
        return None

    @abstractmethod
    def rows_key(self) -> tuple[object, ...]:
        """What the rows depend on beside the input: kinds with equal keys have equal rows."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """How many matrices the weight is."""

    @property
    @abstractmethod
    def inputs(self) -> int:
        """The inputs of an output channel: columns of a matrix, numbers in a row."""

    @property
    @abstractmethod
    def axis(self) -> int | None:
        """The weight's axis of output channels, as DequantizeLinear wants it; None where no single axis holds them."""

    @abstractmethod
    def spread_scale(self, scale: AnyArray) -> AnyArray:
        """Per-channel numbers [groups, out] in a shape that broadcasts against the weight."""


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    value = attribute.value
    return list(value) if isinstance(value, (list, tuple)) else value


def at_positions(array: AnyArray, pick: npt.NDArray[np.intp] | None) -> AnyArray:
    return array if pick is None else arrays.at(array, (slice(None), pick))
