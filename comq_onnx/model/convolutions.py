"""Define convolutions of any rank as kinds of layers (op_kind.py), and what their transposes share with them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.model.op_kind import AnyArray, OpKind, attribute
from comq_onnx.solve import patches
from comq_onnx.solve.grid import Array
from comq_onnx.solve.windows import Window, take_windows


@dataclass(frozen=True)
class Spatial(OpKind):
    """Share what Conv and ConvTranspose have in common: a window over the spatial axes of x [n, channels, *spatial].

    group, strides, dilations, pads, auto_pad: the attributes of the operator, with its defaults filled in; pads hold
    the begin of each spatial axis, then the end of each."""

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
        """Return the extent of the dilated kernel on each spatial axis."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    @abstractmethod
    def _padding(self, size: tuple[int, ...]) -> list[tuple[int, int]]:
        """Return how many zeros stand before and behind each spatial axis of `_spread(x)`; less than 0: cut off.

        size: the spatial axes of the input"""

    def _spread(self, x: Array) -> Array:
        """Return the numbers that the window moves over, without padding."""
        return x

    def _spread_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial axes of `_spread(x)`; size: those of the input."""
        return size

    def _padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial axes of the padded input; size: those of the input."""
        padding = self._padding(size)
        return tuple(n + a + b for n, (a, b) in zip(self._spread_size(size), padding, strict=True))

    def _padded(self, x: Array) -> Array:
        """Return the padded input."""
        padding = self._padding(x.shape[2:])
        padded = arrays.pad(self._spread(x), [(0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in padding)])
        cut = [slice(max(-a, 0), padded.shape[2 + i] - max(-b, 0)) for i, (a, b) in enumerate(padding)]
        return cast(Array, padded[(slice(None), slice(None), *cut)])

    def out(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many positions the window has on each spatial axis; size: the spatial axes of the input."""
        each = zip(self._padded_size(size), self._spans, self._window_strides, strict=True)
        return tuple(max(0, (n - span) // s + 1) for n, span, s in each)

    @property
    def _window_strides(self) -> tuple[int, ...]:
        """Return the stride of the window on each spatial axis of `_spread(x)`."""
        return self.strides

    def _windows(self, x: Array) -> Array:
        """Return the windows as a view [n, channels, *out, *kernel]."""
        view = arrays.windows(self._padded(x), self._spans, tuple(range(2, x.ndim)))
        steps = tuple(slice(None, None, s) for s in self._window_strides)
        taps = tuple(slice(None, None, d) for d in self.dilations)
        return cast(Array, view[(slice(None), slice(None), *steps, *taps)])

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        if not arrays.is_tensor(x) and x.dtype == np.float32 and x.ndim <= 4:
            return self._copied_rows(x, pick)
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

    def _copied_rows(self, x: Array, pick: npt.NDArray[np.intp] | None) -> Array:
        """Return the rows of a float32 array with one or two spatial axes."""
        spread, size = self._spread(x), x.shape[2:]
        before = [a for a, _ in self._padding(size)]
        each = zip(self.kernel, self._window_strides, self.dilations, before, self.out(size), strict=True)
        moves = [Window(*numbers) for numbers in each]
        if len(moves) == 1:
            spread, moves = spread[:, :, None], [Window(1, 1, 1, 0, 1), *moves]
        down, along = moves
        found = take_windows(spread, down, along, pick)
        return cast(Array, found.reshape(self.group, self.inputs, -1).swapaxes(1, 2))

    def patches(self, x: Array) -> Array | None:
        padded = (*x.shape[:2], *self._padded_size(x.shape[2:]))
        pays = patches.pays(padded, self.kernel, self._window_strides, self.dilations, self.group)
        return self._padded(x) if pays else None

    def positions(self, x: Array) -> int:
        return int(x.shape[0]) * int(np.prod(self.out(x.shape[2:])))

    @property
    def is_depthwise(self) -> bool:
        return self.group > 1 and self.inputs == int(np.prod(self.kernel))

    @property
    def has_integer_form(self) -> bool:
        return self.axis is not None


@dataclass(frozen=True)
class Conv(Spatial):
    """Describe a convolution of any rank, weight [out, in / group, *kernel]."""

    op_type: ClassVar[str] = "Conv"
    is_convolution: ClassVar[bool] = True

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> Conv:
        return cls(weight_shape, *window_attributes(node, len(weight_shape) - 2))

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        return weight.reshape(self.group, weight.shape[0] // self.group, -1)

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        return np.ascontiguousarray(matrix).reshape(self.weight_shape)

    @property
    def inputs(self) -> int:
        return int(np.prod(self.weight_shape[1:]))

    def _padding(self, size: tuple[int, ...]) -> list[tuple[int, int]]:
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
        return list(zip(begin, end, strict=True))

    @property
    def axis(self) -> int | None:
        return 0

    def scaled_shape(self, blocks: int = 1) -> tuple[int, ...]:
        return self.weight_shape if blocks == 1 else (self.outputs, blocks, self.inputs // blocks)

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        if scale.shape[-1] > 1:
            return scale.reshape(-1, scale.shape[-1], 1)
        return scale.reshape(-1, *[1] * (len(self.weight_shape) - 1))


def window_attributes(node: ir.Node, rank: int) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
    """Read group, strides, dilations, pads and auto_pad, with their defaults where they are not given."""
    auto_pad = attribute(node, "auto_pad", "NOTSET")
    return (
        int(attribute(node, "group", 1)),
        tuple(attribute(node, "strides", [1] * rank)),
        tuple(attribute(node, "dilations", [1] * rank)),
        tuple(attribute(node, "pads", [0] * (2 * rank))),
        auto_pad.decode() if isinstance(auto_pad, bytes) else str(auto_pad),
    )
