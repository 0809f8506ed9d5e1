"""Describe the grid of a quantized weight, and round to it.

A weight is a stack of matrices [groups, out, in] (one group for a MatMul, `group` of them for a Conv). Its codes are
integers of `bits` bits; the value of a code is DequantizeLinear's

    w_q = (code - zero_point) * scale

with one scale and zero point per output channel, per block of `block_size` inputs of a channel, or per tensor.
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from comq_onnx.solve.rounding_error import span_errors

Array: TypeAlias = npt.NDArray[np.float32]
Codes: TypeAlias = npt.NDArray[np.int8]
MIN_BITS, MAX_BITS = 2, 8
# below the smallest normal number a scale loses bits, and 1 / scale overflows
LEAST_SCALE = float(np.finfo(np.float32).tiny) * 256
# the factors on a weight's span among which `fit_mse` chooses
SHRINKS = np.linspace(1.05, 0.3, 26, dtype=np.float32)


@dataclass(frozen=True)
class Grid:
    """Describe the codes that a weight may take, and what shares a scale.

    bits: MIN_BITS to MAX_BITS
    symmetric: the zero point is 0
    per_tensor: all channels of all groups share one scale
    block_size: so many inputs of a channel share a scale; None for all of them
    tied: the groups are parts of one matrix: a channel has the same scales and zero points in all of them
    signed: scales may be negative, so that the lowest code, which has no opposite, serves the side that needs it;
        of symmetric grids alone

    Raises ValueError for bits or a block size that cannot be.
    """

    bits: int
    symmetric: bool = True
    per_tensor: bool = False
    block_size: int | None = None
    tied: bool = False
    signed: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits is {self.bits}; {MIN_BITS} to {MAX_BITS} are possible")
        if self.block_size is not None and (self.block_size < 1 or self.per_tensor):
            raise ValueError("a block size is a positive number, and not for a per-tensor grid")
        if self.signed and not self.symmetric:
            raise ValueError("a grid with zero points has no use for negative scales")

    @property
    def qmin(self) -> int:
        """Return the lowest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Return the highest code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def granularity(self) -> str:
        """Return `tensor`, `channel` or the block size, as the command line writes it."""
        if self.per_tensor:
            return "tensor"
        return str(self.block_size) if self.block_size else "channel"

    def blocks(self, inputs: int) -> int:
        """Return how many scales a channel of `inputs` inputs has."""
        return -(-inputs // self.block_size) if self.block_size else 1

    def block_of(self, inputs: int) -> npt.NDArray[np.intp]:
        """Return the block of each input: [inputs]."""
        return np.arange(inputs) // (self.block_size or max(inputs, 1))


@dataclass(frozen=True)
class QuantizedWeight:
    """Hold codes [groups, out, in] with scale and zero_point [groups, out, blocks]."""

    codes: Codes
    scale: Array
    zero_point: Codes
    grid: Grid

    def part(self, groups: slice, channels: slice | npt.NDArray[np.intp]) -> QuantizedWeight:
        """Return some channels of some groups."""
        return QuantizedWeight(
            self.codes[groups, channels], self.scale[groups, channels], self.zero_point[groups, channels], self.grid
        )

    def dequantize(self) -> Array:
        """Compute (codes - zero_point) * scale in float32, as DequantizeLinear does: [groups, out, in]."""
        block = self.grid.block_of(self.codes.shape[-1])
        steps = self.codes.astype(np.float32) - self.zero_point[..., block].astype(np.float32)
        return steps * self.scale[..., block]


def fit_minmax(weight: Array, grid: Grid, shrink: float = 1.0) -> tuple[Array, Codes]:
    """Return scale and zero point [groups, out, blocks] that span the weight [groups, out, in], times `shrink`.

    Symmetric: scale = max|w| / qmax. Asymmetric: scale = (max - min) / (2^bits - 1), 0 always representable.
    A block of zeros gets scale 1.
    """
    if grid.tied:
        return _of_all_groups(weight, *fit_minmax(*_joined(weight, grid), shrink))
    return fit_span(*_span(weight, grid), grid, shrink)


def _joined(weight: Array, grid: Grid) -> tuple[Array, Grid]:
    """Put the inputs of tied groups that share a scale beside one another: [1, out, groups * in], with their grid."""
    groups, out, inputs = weight.shape
    blocks = grid.blocks(inputs)
    joined = weight.reshape(groups, out, blocks, -1).transpose(1, 2, 0, 3).reshape(1, out, groups * inputs)
    return joined, replace(grid, tied=False, block_size=grid.block_size and grid.block_size * groups)


def _of_all_groups(weight: Array, scale: Array, zero_point: Codes) -> tuple[Array, Codes]:
    """Give each group of a weight the scales and zero points [1, out, blocks] that all share."""
    return np.repeat(scale, len(weight), axis=0), np.repeat(zero_point, len(weight), axis=0)


def _span(weight: Array, grid: Grid) -> tuple[Array, Array]:
    """Return the least and the largest number of each block: [groups, out, blocks] each."""
    starts = np.arange(0, weight.shape[-1], grid.block_size or max(weight.shape[-1], 1))
    return np.minimum.reduceat(weight, starts, axis=-1), np.maximum.reduceat(weight, starts, axis=-1)


def fit_span(least: Array, most: Array, grid: Grid, shrink: float = 1.0) -> tuple[Array, Codes]:
    """Return what `fit_minmax` does, from the least and the largest number of each block [groups, out, blocks]."""
    # in float64: the span of the largest float32 numbers does not fit in float32
    low = np.minimum(least, 0).astype(np.float64)
    high = np.maximum(most, 0).astype(np.float64)
    if grid.per_tensor:
        low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
    low, high = low * shrink, high * shrink
    if grid.symmetric:
        scale = np.asarray(np.maximum(-low, high) / grid.qmax, np.float32)
    else:
        scale = np.asarray((high - low) / (grid.qmax - grid.qmin), np.float32)
    scale = np.where(scale > LEAST_SCALE, scale, np.float32(1))
    if grid.symmetric:
        return np.asarray(scale, np.float32), np.zeros(np.shape(scale), np.int8)
    zero_point = np.clip(np.rint(grid.qmin - low / scale), grid.qmin, grid.qmax)
    # the furthest code must not overflow
    furthest = np.maximum(grid.qmax - zero_point, zero_point - grid.qmin)
    scale = np.minimum(scale, np.float32(np.finfo(np.float32).max) / furthest.astype(np.float32))
    return np.asarray(scale, np.float32), np.asarray(zero_point, np.int8)


def fit_mse(weight: Array, grid: Grid, shrinks: npt.NDArray[np.float32] | None = None) -> tuple[Array, Codes]:
    """Return scale and zero point [groups, out, blocks] whose plain rounding has the least squared error.

    Every block chooses for itself among multiples of its span (a per-tensor grid once for all), and among both signs of
    the scale where the grid has them.

    weight: [groups, out, in]
    shrinks: the multiples; None for SHRINKS
    """
    if shrinks is None:
        shrinks = SHRINKS
    if grid.tied:
        return _of_all_groups(weight, *fit_mse(*_joined(weight, grid), shrinks))
    rows = np.ascontiguousarray(weight.reshape(-1, weight.shape[-1]))
    size = grid.block_size or max(weight.shape[-1], 1)
    starts = range(0, weight.shape[-1], size)
    best = np.zeros((rows.shape[0], len(starts)), np.intp)
    # codes of a negative scale are those of the negative weight
    sides = [(sign * rows, factor) for sign, factor in signs(grid)]
    for b, start in enumerate(starts):
        stop = min(start + size, rows.shape[1])
        errors = np.concatenate([_span_errors(side, grid, shrinks, start, stop) * by for side, by in sides], axis=1)
        best[:, b] = (errors.sum(axis=0)[None] if grid.per_tensor else errors).argmin(axis=1)
    chosen_signs = np.repeat(np.array([sign for sign, _ in signs(grid)], np.float32), shrinks.size)
    spans = {}
    for k in np.unique(best):
        one, zero = fit_minmax(weight, grid, float(shrinks[k % shrinks.size]))
        spans[k] = chosen_signs[k] * one, zero
    chosen = best.reshape(*weight.shape[:-1], -1)
    scale = np.empty(chosen.shape, np.float32)
    zero_point = np.empty(chosen.shape, np.int8)
    for k, (one, zero) in spans.items():
        scale[chosen == k], zero_point[chosen == k] = one[chosen == k], zero[chosen == k]
    return scale, zero_point


def signs(grid: Grid) -> list[tuple[np.float32, float]]:
    """Return the signs that a scale may have, and a factor on the error of each: the positive one wins a tie."""
    return [(np.float32(1), 1.0), (np.float32(-1), 1 + 1e-5)] if grid.signed else [(np.float32(1), 1.0)]


def _span_errors(
    rows: Array, grid: Grid, shrinks: npt.NDArray[np.float32], start: int, stop: int
) -> npt.NDArray[np.float64]:
    """Return the squared error [rows, shrinks] of plain rounding of the inputs `start` to `stop` of rows."""
    errors = np.empty((rows.shape[0], shrinks.size))
    low, high = (np.minimum(rows.min(initial=0), 0), np.maximum(rows.max(initial=0), 0)) if grid.per_tensor else (0, 0)
    span_errors(
        rows, shrinks, grid.qmin, grid.qmax, grid.symmetric, start, stop, np.float32(low), np.float32(high), errors
    )
    return errors


def round_to_grid(weight: Array, scale: Array, zero_point: Codes, grid: Grid) -> QuantizedWeight:
    """Round a weight [groups, out, in] to the codes clip(round(w / scale) + zero_point)."""
    block = grid.block_of(weight.shape[-1])
    codes = np.rint(weight / scale[..., block]) + zero_point[..., block]
    return QuantizedWeight(np.clip(codes, grid.qmin, grid.qmax).astype(np.int8), scale, zero_point, grid)


def rtn(weight: Array, grid: Grid) -> QuantizedWeight:
    """Round a weight [groups, out, in] to the nearest codes of its min-max grid."""
    return round_to_grid(weight, *fit_minmax(weight, grid), grid)


def check_codes(weight: QuantizedWeight) -> Codes:
    """Return the codes after checking that they lie on the grid and that the scales are numbers of the right sign.

    Raises ValueError where they do not.
    """
    if weight.codes.min() < weight.grid.qmin or weight.codes.max() > weight.grid.qmax:
        raise ValueError(f"codes outside [{weight.grid.qmin}, {weight.grid.qmax}]")
    sizes = np.abs(weight.scale) if weight.grid.signed else weight.scale
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError("a scale is not a positive number")
    return weight.codes
