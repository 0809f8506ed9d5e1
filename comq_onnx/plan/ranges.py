"""Choose the range of an activation by what its rounding does to the layers that read it.

An activation's scale and zero point are coordinates of the same objective as the codes of a weight,

    || Q(X) W - X W ||^2,

and are minimized like those, one after the other: both ends of the range together, then each end alone, over fractions
of the range that was seen. W is the weight of every layer that reads the activation, so an error counts by its effect
on the outputs of those layers, not by its size. The mean of the error does not count where a bias takes it. A residual
sum passes errors on as they are.

The objective is computed on some positions of all samples: some drawn at random, and those with the largest numbers,
because clipping changes only a few positions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.model.op_kind import OpKind
from comq_onnx.plan.activation_grid import ActivationGrid, fit_range
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.solve.grid import Array
from comq_onnx.solve.rounding_error import rounding_error

# the share of all positions that each kept position stands for, [n]
Shares = npt.NDArray[np.float32]
# the number of positions drawn at random, and of those with the largest numbers
DRAWN, EXTREME = 1024, 256
# more than the positions of a sample: places of other samples begin at other multiples of it
SAMPLE_PLACES = 1 << 36
# with fewer positions the best range is chance
LEAST = 64
# more numbers tell no more: fewer positions of activations with many channels are kept
MOST_NUMBERS = 1 << 20
# the outputs of a layer are replaced by so many random sums of them: on average these keep the size of an error
MIXED = 64
# fractions of the range seen that are tried as its ends, then fractions around the best ones
COARSE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.22, 0.16, 0.11, 0.08, 0.04)
FINER = (1.05, 0.95, 0.85, 0.7)
SWEEPS = 3
# a narrower range must bring the cost down to this share, or the one that was seen stays
WORTH = 0.98


class Positions:
    """Gather some positions of an activation batch by batch, in bounded memory, and how many positions each stands for.

    The same positions are chosen however they are divided into batches.
    """

    def __init__(self, axis: int, first: int = 0) -> None:
        """Begin with no positions.

        axis: the axis of the channels
        first: how many samples come before those whose positions these are: tells them from others
        """
        self._axis = axis
        self._seen = 0
        self._first = first * SAMPLE_PLACES
        self._drawn: _Kept | None = None
        self._extreme: _Kept | None = None

    def observe(self, x: Array) -> None:
        """Choose among the positions of one batch."""
        if x.ndim < 2 or not x.size:
            return
        # [n, channels, places], a view where the layout allows it
        x = np.moveaxis(x, self._axis, 1)
        x = x.reshape(*x.shape[:2], -1)
        at = self._first + np.arange(self._seen, self._seen + x.shape[0] * x.shape[2])
        largest = np.maximum(x.max(axis=1), -x.min(axis=1)).reshape(-1)
        room = max(MOST_NUMBERS // x.shape[1], 16)
        extreme = min(EXTREME, room // 5)
        self._drawn = _Kept.best(self._drawn, x, at, _shuffled(at), min(DRAWN, room - extreme))
        self._extreme = _Kept.best(self._extreme, x, at, -largest, extreme)
        self._seen += len(at)

    def add(self, other: Positions) -> Positions:
        """Choose among these positions and those that were chosen of other samples."""
        self._drawn = _Kept.of_both(self._drawn, other._drawn)
        self._extreme = _Kept.of_both(self._extreme, other._extreme)
        self._seen += other._seen
        return self

    def rows(self) -> tuple[Array, Shares]:
        """Return the positions [n, channels] and the shares that they stand for, [n], which add up to 1."""
        assert self._drawn is not None
        assert self._extreme is not None
        rest = np.flatnonzero(~np.isin(self._drawn.at, self._extreme.at))
        rest = rest[np.argsort(self._drawn.at[rest])]
        for_each = (self._seen - len(self._extreme.at)) / max(len(rest), 1)
        weights = np.concatenate([np.ones(len(self._extreme.at)), np.full(len(rest), for_each)])
        rows = np.concatenate([self._extreme.rows, self._drawn.rows[rest]])
        return rows, (weights / weights.sum()).astype(np.float32)

    @property
    def enough(self) -> bool:
        """Tell whether there were enough positions to choose a range."""
        return self._seen >= LEAST


@dataclass(frozen=True)
class _Kept:
    """Hold the positions with the smallest keys; of positions with equal keys the first ones.

    rows: the positions, [n, channels]
    at: their places among all positions, [n]
    keys: their keys in ascending order, [n]
    most: how many are kept
    """

    rows: Array
    at: npt.NDArray[np.int64]
    keys: npt.NDArray[Any]
    most: int

    @classmethod
    def of_both(cls, one: _Kept | None, other: _Kept | None) -> _Kept | None:
        """Return the best of the positions kept of some samples and of others."""
        if one is None or other is None:
            return other if one is None else one
        keys = np.concatenate([one.keys, other.keys])
        least = np.argsort(keys, kind="stable")[: one.most]
        rows, at = np.concatenate([one.rows, other.rows]), np.concatenate([one.at, other.at])
        return cls(rows[least], at[least], keys[least], one.most)

    @classmethod
    def best(
        cls, before: _Kept | None, x: Array, at: npt.NDArray[np.int64], keys: npt.NDArray[Any], most: int
    ) -> _Kept:
        """Return the best of the positions kept before and of those of a batch.

        x: the batch, [n, channels, places]
        at, keys: the place and the key of each of its positions, [n * places]
        most: how many positions are kept
        """
        new = np.arange(len(keys))
        if before is not None and len(before.at) == most:
            new = np.flatnonzero(keys < before.keys[-1])
        new = new[np.argsort(keys[new], kind="stable")[:most]]
        n, place = np.divmod(new, x.shape[2])
        rows, where, order = np.asarray(x[n, :, place], np.float32), at[new], keys[new]
        if before is not None:
            rows, where = np.concatenate([before.rows, rows]), np.concatenate([before.at, where])
            order = np.concatenate([before.keys, order])
        least = np.argsort(order, kind="stable")[:most]
        return cls(rows[least], where[least], order[least], most)


def _shuffled(at: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return a pseudorandom number for each position, from its place: the finalizer of SplitMix64.

    Steele et al., Fast splittable pseudorandom number generators, 2014.
    """
    z = at.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


@dataclass(frozen=True)
class Readers:
    """Describe the readers of a quantized value.

    layers: the layers that read it, all with their channels on the same axis
    passed_on: whether something else reads it
    """

    layers: tuple[Layer, ...]
    passed_on: bool

    @property
    def axis(self) -> int:
        """Return the axis of the channels of the value."""
        return 1 if self.layers[0].kind.is_convolution else -1


def readers(prepared: Prepared, plan: ActivationPlan) -> dict[str, Readers]:
    """Return the readers of each value with a scale of its own, by name.

    Those behind a MaxPool count as readers of its input. Values that no layer reads are left out.
    """
    values = {str(v.name): v for v in graphs.walk_values(prepared.model)}
    integer = {x.name: x for x in prepared.layers if x.name in plan.integer_layers and not x.nested}
    found = {}
    for name, value in plan.values.items():
        if value.like is not None or value.given is not None:
            continue
        layers: list[Layer] = []
        passed_on, open_values = False, [values[name]]
        while open_values:
            for node, _ in open_values.pop().uses():
                layer = integer.get(str(node.name))
                if layer is not None and (not layers or layer.kind.is_convolution == layers[0].kind.is_convolution):
                    layers.append(layer)
                elif node.op_type == "MaxPool" and str(node.outputs[0].name) in plan.values:
                    open_values.append(node.outputs[0])
                else:
                    passed_on = True
        if layers:
            found[name] = Readers(tuple(layers), passed_on and value.everywhere)
    return found


def mix(kind: OpKind, matrix: Array, rng: np.random.Generator) -> Array:
    """Mix the outputs of a layer: return the weights of MIXED random sums of them, [channels, MIXED].

    Outputs that are no more than MIXED are not mixed: their own weights are returned, [channels, outputs]. The places
    in the window of a convolution count as outputs of their own, as if the errors at them were independent.

    matrix: the weight, [groups, out, in]
    """
    groups, outputs, inputs = matrix.shape
    places = int(np.prod(kind.kernel))
    # [groups, channels, outputs * places]
    by_place = matrix.reshape(groups, outputs, inputs // places, places).transpose(0, 2, 1, 3)
    columns = by_place.reshape(groups, inputs // places, outputs * places)
    if groups == 1 and outputs * places <= MIXED:
        return np.ascontiguousarray(columns[0])
    sums = rng.standard_normal((groups, outputs * places, MIXED), np.float32) / np.float32(MIXED**0.5)
    return np.ascontiguousarray((columns @ sums).reshape(-1, MIXED))


@dataclass(frozen=True)
class Reader:
    """Describe what a layer computes from its input.

    mixed: what `mix` returns for its weight, [channels, MIXED]
    has_bias: whether a bias takes the mean of its error
    """

    mixed: Array
    has_bias: bool


@dataclass(frozen=True)
class Objective:
    """Measure what rounding costs: the error in the outputs of each reader, relative to those outputs.

    rows: some positions of the activation, [n, channels]
    shares: the shares that they stand for, [n]
    mixed: the mixed weights of all readers, [channels, readers * MIXED], each over the size of its outputs; None where
        no reader has outputs other than 0
    unbiased: 1 where a bias takes the mean of the error, 0 elsewhere, [readers * MIXED]
    passed_on: the weight of the error of the rows themselves: one over their variance; 0 where nothing passes them on
    """

    rows: Array
    shares: Shares
    mixed: Array | None
    unbiased: Array
    passed_on: float

    @classmethod
    def of(cls, rows: Array, shares: Shares, readers: Sequence[Reader], passed_on: bool) -> Objective:
        """Make the objective of an activation.

        rows, shares: some positions of it, as `Positions.rows` gives them
        passed_on: whether something reads the values as they are
        """
        centred = rows - shares @ rows
        parts, unbiased = [], []
        for reader in readers:
            with np.errstate(over="ignore", invalid="ignore"):  # their solver refuses weights that are too large
                outputs = (centred if reader.has_bias else rows) @ reader.mixed
                size = float(shares @ np.square(outputs, dtype=np.float64).sum(axis=1))
            if 0 < size < np.inf:
                parts.append(reader.mixed / np.float32(size**0.5))
                unbiased.append(np.full(reader.mixed.shape[1], reader.has_bias, np.float32))
        variance = float(shares @ np.square(centred, dtype=np.float64).sum(axis=1))
        alone = 1 / variance if variance > 0 and (passed_on or not parts) else 0.0
        if not parts:
            return cls(rows, shares, None, np.zeros(0, np.float32), alone)
        return cls(rows, shares, np.concatenate(parts, axis=1), np.concatenate(unbiased), alone)

    def cost(self, grid: ActivationGrid) -> float:
        """Return the relative error with a grid."""
        error = rounding_error(
            self.rows, grid.scale, np.float32(grid.zero_point), np.float32(grid.qmin), np.float32(grid.qmax)
        )
        total = 0.0
        if self.mixed is not None:
            out = error @ self.mixed
            out -= self.unbiased * (self.shares @ out)
            total += float(self.shares @ np.square(out).sum(axis=1))
        if self.passed_on:
            total += self.passed_on * float(self.shares @ np.square(error).sum(axis=1))
        return total


def choose(
    objective: Objective, low: float, high: float, dtype: str, bounds: tuple[float, float] | None
) -> ActivationGrid:
    """Choose the grid of least cost among those whose range is a part of [low, high] and holds 0.

    low, high: the range that was seen
    dtype, bounds: as `fit_range` takes them
    """
    low, high = ends = min(low, 0.0), max(high, 0.0)
    best = fit_range(low, high, dtype, bounds)
    # ranges that differ may have the same grid, and a sweep that finds no better one is not to be repeated
    cost_of = functools.cache(objective.cost)
    widest, least = best, cost_of(best)
    seen = least
    for sweep in range(SWEEPS):
        for pair in _narrower(*ends, FINER if sweep else COARSE):
            grid = fit_range(*pair, dtype, bounds)
            cost = cost_of(grid)
            if cost < least:
                best, least, ends = grid, cost, pair
    return best if least < seen * WORTH else widest


def _narrower(low: float, high: float, fractions: Sequence[float]) -> list[tuple[float, float]]:
    """Return the ranges with both ends, or one of them, at each of some fractions."""
    tried = [(low * f, high * f) for f in fractions]
    if low < 0 < high:
        tried += [(low, high * f) for f in fractions] + [(low * f, high) for f in fractions]
    return tried
