"""The kinds of layers: each operator with a weight, seen as rows of inputs times a matrix.

The contract of every kind, tested against ONNX Runtime over random attributes: for an input x and a weight,

    kind.rows(x) [groups, positions, in]  @  kind.to_matrix(weight) [groups, out, in]^T

holds exactly the numbers that the operator computes (without its bias), position by position. So the Gram of the rows
is all that a solver must know of the operator. Rows are made of numpy arrays and torch tensors alike (arrays.py).
Operators: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx import arrays, patches
from comq_onnx.grid import Array

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


def _get(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    value = attribute.value
    return list(value) if isinstance(value, (list, tuple)) else value


def _at(array: AnyArray, pick: npt.NDArray[np.intp] | None) -> AnyArray:
    return array if pick is None else arrays.at(array, (slice(None), pick))


@dataclass(frozen=True)
class MatMul(OpKind):
    """x [..., in] @ weight [in, out]; a weight [b, in, out] is b groups, broadcast against x [..., b, m, in]."""

    weight_shape: tuple[int, ...]

    op_type: ClassVar[str] = "MatMul"

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
            return _at(x.reshape(1, -1, inputs), pick)
        x = self._broadcast(x)
        extra = x.ndim - 2 - len(self._lead)
        stacked = [extra + i for i, d in enumerate(self._lead) if d != 1]
        rest = [i for i in range(x.ndim - 2) if i not in stacked]
        order = (*stacked, *rest, x.ndim - 2, x.ndim - 1)
        return _at(arrays.permute(x, order).reshape(self.groups, -1, inputs), pick)

    def _broadcast(self, x: Array) -> Array:
        """x with the leading axes that the product has."""
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

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        return scale.reshape(*self._lead, 1, self.weight_shape[-1])


@dataclass(frozen=True)
class _OutputsFirst(OpKind):
    """What MatMulLeft and Gather share: a weight [out, in] that is its own matrix."""

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

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        return scale.reshape(-1, 1)


@dataclass(frozen=True)
class MatMulLeft(_OutputsFirst):
    """weight [out, in] @ x [..., in, columns]: the columns of x are the rows."""

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
        return _at(columns.swapaxes(-1, -2).reshape(1, -1, self.weight_shape[1]), pick)

    def positions(self, x: Array) -> int:
        return arrays.size(x) // self.weight_shape[1]

    def rows_key(self) -> tuple[object, ...]:
        return "MatMulLeft", self.inputs


@dataclass(frozen=True)
class Gemm(OpKind):
    """alpha A' B' + beta C with the weight in B; alpha goes into the rows."""

    weight_shape: tuple[int, ...]
    trans_a: bool
    trans_b: bool
    alpha: float
    beta: float

    op_type: ClassVar[str] = "Gemm"
    bias_index: ClassVar[int | None] = 2

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> Gemm:
        return cls(
            weight_shape,
            bool(_get(node, "transA", 0)),
            bool(_get(node, "transB", 0)),
            float(_get(node, "alpha", 1.0)),
            float(_get(node, "beta", 1.0)),
        )

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        return (weight if self.trans_b else weight.T)[None]

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        return np.ascontiguousarray(matrix[0] if self.trans_b else matrix[0].T)

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        rows = _at((x.T if self.trans_a else x)[None], pick)
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

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        return scale.reshape(-1, 1) if self.trans_b else scale.reshape(1, -1)


@dataclass(frozen=True)
class _Spatial(OpKind):
    """What Conv and ConvTranspose share: a window sliding over the spatial axes of x [n, channels, *spatial]."""

    weight_shape: tuple[int, ...]
    group: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str

    bias_index: ClassVar[int | None] = 2

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight_shape[2:]

    def rows_key(self) -> tuple[object, ...]:
        window = (self.kernel, self.group, self.strides, self.dilations, self.pads, self.auto_pad)
        return (self.op_type, *window)

    @property
    def groups(self) -> int:
        return self.group

    @property
    def _spans(self) -> list[int]:
        """The extent of a dilated kernel on each spatial axis."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    @abstractmethod
    def _prepared(self, x: Array) -> tuple[Array, tuple[int, ...]]:
        """The padded input, and the stride of the window over it."""

    def _windows(self, x: Array) -> Array:
        """A view [n, channels, *out, *kernel]."""
        padded, strides = self._prepared(x)
        dims = tuple(range(2, x.ndim))
        view = arrays.windows(padded, self._spans, dims)
        steps = tuple(slice(None, None, s) for s in strides)
        taps = tuple(slice(None, None, d) for d in self.dilations)
        return cast(Array, view[(slice(None), slice(None), *steps, *taps)])

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        windows = self._windows(x)
        spatial = x.ndim - 2
        out = windows.shape[2 : 2 + spatial]
        if pick is None:
            channels_last = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, windows.ndim))
            taken = arrays.permute(windows, channels_last).reshape(-1, x.shape[1], *self.kernel)
        else:
            n, *place = np.unravel_index(pick, (x.shape[0], *out))
            # the numbers picked come first, then channels and kernel
            taken = arrays.at(windows, (n, slice(None), *place))
        split = taken.reshape(taken.shape[0], self.group, -1)
        return cast(Array, arrays.contiguous(split.swapaxes(0, 1)))

    def patches(self, x: Array) -> Array | None:
        padded, strides = self._prepared(x)
        return padded if patches.pays(padded.shape, self.kernel, strides, self.dilations, self.group) else None

    def positions(self, x: Array) -> int:
        windows = self._windows(x)
        return int(windows.shape[0]) * int(np.prod(windows.shape[2 : x.ndim]))


@dataclass(frozen=True)
class Conv(_Spatial):
    """A convolution of any rank, weight [out, in / group, *kernel]."""

    op_type: ClassVar[str] = "Conv"

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> Conv:
        return cls(weight_shape, *_window_attributes(node, len(weight_shape) - 2))

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        return weight.reshape(self.group, weight.shape[0] // self.group, -1)

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        return np.ascontiguousarray(matrix).reshape(self.weight_shape)

    @property
    def inputs(self) -> int:
        return int(np.prod(self.weight_shape[1:]))

    def _prepared(self, x: Array) -> tuple[Array, tuple[int, ...]]:
        size = x.shape[2:]
        rank = len(size)
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            total = [
                max((-(-n // s) - 1) * s + span - n, 0)
                for n, s, span in zip(size, self.strides, self._spans, strict=True)
            ]
            small, large = [t // 2 for t in total], [t - t // 2 for t in total]
            begin, end = (small, large) if self.auto_pad == "SAME_UPPER" else (large, small)
        elif self.auto_pad == "VALID":
            begin = end = [0] * rank
        else:
            begin, end = list(self.pads[:rank]), list(self.pads[rank:])
        return arrays.pad(x, [(0, 0), (0, 0), *zip(begin, end, strict=True)]), self.strides

    @property
    def axis(self) -> int | None:
        return 0

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        return scale.reshape(-1, *[1] * (len(self.weight_shape) - 1))


@dataclass(frozen=True)
class ConvTranspose(_Spatial):
    """A transposed convolution, weight [in, out / group, *kernel].

    It is a convolution of stride 1 with the flipped kernel over the input with stride - 1 zeros between its elements.
    """

    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    op_type: ClassVar[str] = "ConvTranspose"

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> ConvTranspose:
        rank = len(weight_shape) - 2
        return cls(
            weight_shape,
            *_window_attributes(node, rank),
            tuple(_get(node, "output_padding", [0] * rank)),
            tuple(_get(node, "output_shape", []))[-rank:],
        )

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        spatial = tuple(range(3, weight.ndim + 1))
        grouped = weight.reshape(self.group, weight.shape[0] // self.group, *weight.shape[1:])
        return np.flip(grouped, spatial).swapaxes(1, 2).reshape(self.group, weight.shape[1], -1)

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        inputs, out, *kernel = self.weight_shape
        grouped = matrix.reshape(self.group, out, inputs // self.group, *kernel).swapaxes(1, 2)
        flipped = np.flip(grouped, tuple(range(3, grouped.ndim)))
        return np.ascontiguousarray(flipped).reshape(self.weight_shape)

    def rows_key(self) -> tuple[object, ...]:
        return (*super().rows_key(), self.output_padding, self.output_shape)

    @property
    def inputs(self) -> int:
        return self.weight_shape[0] // self.group * int(np.prod(self.kernel))

    def _cropped(self, size: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """What the operator's pads cut off at the beginning and the end of each axis of the full output."""
        rank = len(size)
        full = [
            (n - 1) * s + span + extra
            for n, s, span, extra in zip(size, self.strides, self._spans, self.output_padding, strict=True)
        ]
        if self.output_shape:
            wanted = list(self.output_shape)
        elif self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            wanted = [n * s for n, s in zip(size, self.strides, strict=True)]
        else:
            begin = [0] * rank if self.auto_pad == "VALID" else list(self.pads[:rank])
            return begin, [0] * rank if self.auto_pad == "VALID" else list(self.pads[rank:])
        total = [max(f - w, 0) for f, w in zip(full, wanted, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return (small, large) if self.auto_pad == "SAME_UPPER" else (large, small)

    def _prepared(self, x: Array) -> tuple[Array, tuple[int, ...]]:
        size = x.shape[2:]
        spaced = arrays.zeros((*x.shape[:2], *[(n - 1) * s + 1 for n, s in zip(size, self.strides, strict=True)]), x)
        spaced[(slice(None), slice(None), *[slice(None, None, s) for s in self.strides])] = x
        begin, end = self._cropped(size)
        lower = [span - 1 - b for span, b in zip(self._spans, begin, strict=True)]
        upper = [span - 1 - e + o for span, e, o in zip(self._spans, end, self.output_padding, strict=True)]
        widths = [(0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in zip(lower, upper, strict=True))]
        padded = arrays.pad(spaced, widths)
        cut = [
            slice(max(-a, 0), padded.shape[2 + i] - max(-b, 0))
            for i, (a, b) in enumerate(zip(lower, upper, strict=True))
        ]
        return padded[(slice(None), slice(None), *cut)], (1,) * len(size)

    @property
    def axis(self) -> int | None:
        # one entry per output channel only where there is one group
        return 1 if self.group == 1 else None

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        ones = [1] * (len(self.weight_shape) - 2)
        if self.group == 1:
            return scale.reshape(1, -1, *ones)
        return np.repeat(scale, self.weight_shape[0] // self.group, axis=0).reshape(
            self.weight_shape[0], self.weight_shape[1], *ones
        )


def _window_attributes(node: ir.Node, rank: int) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
    """group, strides, dilations, pads and auto_pad with their defaults."""
    auto_pad = _get(node, "auto_pad", "NOTSET")
    return (
        int(_get(node, "group", 1)),
        tuple(_get(node, "strides", [1] * rank)),
        tuple(_get(node, "dilations", [1] * rank)),
        tuple(_get(node, "pads", [0] * (2 * rank))),
        auto_pad.decode() if isinstance(auto_pad, bytes) else str(auto_pad),
    )


@dataclass(frozen=True)
class Gather(_OutputsFirst):
    """Rows of an embedding table [rows, columns] looked up along axis 0: no arithmetic, so no rows to calibrate."""

    op_type: ClassVar[str] = "Gather"
    input_index: ClassVar[int] = 1
    weight_index: ClassVar[int] = 0

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> Gather:
        if len(weight_shape) != 2 or int(_get(node, "axis", 0)) != 0:
            raise NotQuantizable("only a table [rows, columns] looked up along axis 0 is an embedding")
        return cls(weight_shape)

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        """Indices as one-hot rows."""
        return _at(np.eye(self.weight_shape[0], dtype=np.float32)[np.asarray(x, np.int64).reshape(-1)][None], pick)

    def positions(self, x: Array) -> int:
        return int(x.size)

    def rows_key(self) -> tuple[object, ...]:
        return self.op_type, self.weight_shape[0]


OP_KINDS: dict[str, type[MatMul] | type[Gemm] | type[Conv] | type[ConvTranspose] | type[Gather]] = {
    "MatMul": MatMul,
    "Gemm": Gemm,
    "Conv": Conv,
    "ConvTranspose": ConvTranspose,
    "Gather": Gather,
}
