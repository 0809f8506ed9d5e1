"""Define transposed convolutions of any rank as kinds of layers (op_kind.py), and as the phases that make them up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.model.convolutions import Conv, Spatial, window_attributes
from comq_onnx.model.op_kind import AnyArray, OpKind, attribute
from comq_onnx.solve.grid import Array


@dataclass(frozen=True)
class ConvTranspose(Spatial):
    """Describe a transposed convolution, weight [in, out / group, *kernel].

    It is a convolution of stride 1 with the flipped kernel over the input with stride - 1 zeros between its elements.
    Of its taps an output channel sees only those that meet no such zero: it is solved as `Phases`.

    output_padding: numbers added at the end of each spatial axis of the output.
    output_shape: the spatial axes of the output; () where the attribute is not given.
    """

    output_padding: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()

    op_type: ClassVar[str] = "ConvTranspose"

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> ConvTranspose:
        rank = len(weight_shape) - 2
        return cls(
            weight_shape,
            *window_attributes(node, rank),
            tuple(attribute(node, "output_padding", [0] * rank)),
            tuple(attribute(node, "output_shape", []))[-rank:],
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
    def solved_as(self) -> OpKind:
        one = self.group == 1 and all(d == 1 for d in self.dilations) and any(s > 1 for s in self.strides)
        return Phases(self.weight_shape, self) if one else self

    @property
    def inputs(self) -> int:
        return self.weight_shape[0] // self.group * int(np.prod(self.kernel))

    def cropped(self, size: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Return what the operator's pads cut off at the begin and at the end of each axis of the full output.

        size: the spatial axes of the input."""
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

    def _padding(self, size: tuple[int, ...]) -> list[tuple[int, int]]:
        begin, end = self.cropped(size)
        return [
            (span - 1 - b, span - 1 - e + extra)
            for span, b, e, extra in zip(self._spans, begin, end, self.output_padding, strict=True)
        ]

    def _spread(self, x: Array) -> Array:
        spaced: Array = arrays.zeros((*x.shape[:2], *self._spread_size(x.shape[2:])), x)
        spaced[(slice(None), slice(None), *[slice(None, None, s) for s in self.strides])] = x
        return spaced

    def _spread_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple((n - 1) * s + 1 for n, s in zip(size, self.strides, strict=True))

    @property
    def _window_strides(self) -> tuple[int, ...]:
        return (1,) * len(self.strides)

    @property
    def axis(self) -> int | None:
        # one entry per output channel only where there is one group
        return 1 if self.group == 1 else None

    def takes_blocks(self, block: int) -> bool:
        # whole kernels: the matrix has them flipped
        return super().takes_blocks(block) and block % int(np.prod(self.kernel)) == 0

    def scaled_shape(self, blocks: int = 1) -> tuple[int, ...]:
        if blocks == 1 and (self.group == 1 or self.weight_shape[0] == self.group):
            return self.weight_shape
        channels = self.weight_shape[0] // self.group
        parts = (channels,) if blocks == 1 else (blocks, channels // blocks)
        return (self.group, *parts, *self.weight_shape[1:])

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        groups, out, blocks = scale.shape
        ones = [1] * len(self.kernel)
        if blocks == 1 and len(self.scaled_shape()) == len(self.weight_shape):
            return scale.reshape(groups, out, *ones)
        parts = (1,) if blocks == 1 else (blocks, 1)
        return scale.swapaxes(1, 2).reshape(groups, *parts, out, *ones)


@dataclass(frozen=True)
class Phases(OpKind):
    """Describe a ConvTranspose of one group by its phases: a matrix each, over a small window of the input.

    An output at u = stride q + r, with 0 <= r < stride on each axis, sees the taps r, r + stride, r + 2 stride, ... of
    the kernel, over the numbers q, q - 1, q - 2, ... of the input. So the outputs of one phase r are a convolution of
    stride 1 with their own taps, and their Gram has no rows for the taps of other phases. Where a phase has fewer taps
    than others, or no output at q, its rows hold zeros.

    whole: the ConvTranspose
    """

    weight_shape: tuple[int, ...]
    whole: ConvTranspose

    @classmethod
    def of(cls, node: ir.Node, weight_shape: tuple[int, ...]) -> Phases:
        return cls(weight_shape, ConvTranspose.of(node, weight_shape))

    @property
    def taps(self) -> tuple[int, ...]:
        """Return how many taps of the kernel a phase has on each axis, at most."""
        return tuple(-(-k // s) for k, s in zip(self.whole.kernel, self.whole.strides, strict=True))

    def to_matrix(self, weight: AnyArray) -> AnyArray:
        """Return [phases, out, in]: inputs are the channels and the window, in the order of the input's numbers."""
        rank, strides = len(self.taps), self.whole.strides
        more = [(0, t * s - k) for k, t, s in zip(self.whole.kernel, self.taps, strides, strict=True)]
        padded = np.pad(weight, [(0, 0), (0, 0), *more])
        # [in, out, taps, phases, taps, phases, ...], the last tap first
        cut = padded.reshape(*weight.shape[:2], *itertools.chain(*zip(self.taps, strides, strict=True)))
        flipped = np.flip(cut, tuple(range(2, 2 + 2 * rank, 2)))
        phases, taps = range(3, 3 + 2 * rank, 2), range(2, 2 + 2 * rank, 2)
        return flipped.transpose(*phases, 1, 0, *taps).reshape(self.groups, weight.shape[1], -1)

    def from_matrix(self, matrix: AnyArray) -> AnyArray:
        inputs, out, *kernel = self.weight_shape
        rank, strides = len(kernel), self.whole.strides
        cut = matrix.reshape(*strides, out, inputs, *self.taps)
        pairs = itertools.chain(*((rank + 2 + axis, axis) for axis in range(rank)))
        flipped = np.flip(cut.transpose(rank + 1, rank, *pairs), tuple(range(2, 2 + 2 * rank, 2)))
        padded = flipped.reshape(inputs, out, *(t * s for t, s in zip(self.taps, strides, strict=True)))
        return np.ascontiguousarray(padded[(slice(None), slice(None), *(slice(k) for k in kernel))])

    def rows_key(self) -> tuple[object, ...]:
        return self.whole.rows_key()

    @property
    def groups(self) -> int:
        return int(np.prod(self.whole.strides))

    @property
    def inputs(self) -> int:
        return self.weight_shape[0] * int(np.prod(self.taps))

    @property
    def outputs(self) -> int:
        return self.weight_shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.taps

    @property
    def axis(self) -> int | None:
        return None

    def scaled_shape(self, blocks: int = 1) -> tuple[int, ...]:
        return self.whole.scaled_shape(blocks)

    def spread_scale(self, scale: AnyArray) -> AnyArray:
        return self.whole.spread_scale(scale[:1])

    def positions(self, x: Array) -> int:
        return self._window(x.shape[2:]).positions(x)

    def rows(self, x: Array, pick: npt.NDArray[np.intp] | None = None) -> Array:
        window = self._window(x.shape[2:])
        if pick is None:
            pick = np.arange(window.positions(x))
        (rows,) = window.rows(x, pick)
        numbers = rows.reshape(len(pick), x.shape[1], -1)
        found = []
        for phase in itertools.product(*(range(s) for s in self.whole.strides)):
            seen = self._seen(phase, x.shape[2:])[pick % window.positions(x[:1])]
            found.append(rows if seen.all() else (numbers * arrays.like(seen[:, None], rows)).reshape(rows.shape))
        return cast(Array, arrays.concatenate([one[None] for one in found]))

    def _places(self, size: tuple[int, ...]) -> list[range]:
        """Return the numbers q at which some phase has an output, on each axis; size: the spatial axes of the input."""
        begin, _ = self.whole.cropped(size)
        each = zip(begin, self.whole.out(size), self.whole.strides, strict=True)
        return [range(b // s, (b + n - 1) // s + 1) if n else range(0) for b, n, s in each]

    def _window(self, size: tuple[int, ...]) -> Conv:
        """Return the convolution whose rows are the numbers q - taps + 1 to q; size: the spatial axes of the input."""
        ones = (1,) * len(size)
        before = [t - 1 - q.start for t, q in zip(self.taps, self._places(size), strict=True)]
        after = [q.stop - n for q, n in zip(self._places(size), size, strict=True)]
        return Conv((1, self.weight_shape[0], *self.taps), 1, ones, ones, (*before, *after), "NOTSET")

    def _seen(self, phase: Sequence[int], size: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        """Tell which numbers of the window the outputs of a phase see, for one sample: [positions, window].

        phase: r on each axis
        size: the spatial axes of the input
        """
        begin, out = self.whole.cropped(size)[0], self.whole.out(size)
        seen = np.ones((1, 1), np.bool_)
        for axis, (r, q) in enumerate(zip(phase, self._places(size), strict=True)):
            u = self.whole.strides[axis] * np.asarray(q) + r
            made = (u >= begin[axis]) & (u < begin[axis] + out[axis])
            # the window has the last tap first
            taps = r + self.whole.strides[axis] * np.arange(self.taps[axis])[::-1] < self.whole.kernel[axis]
            seen = np.kron(seen, made[:, None] & taps)
        return seen
