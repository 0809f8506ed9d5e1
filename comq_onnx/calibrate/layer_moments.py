"""Sum the moments of a layer's input, from the tensors at the cut before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx import arrays
from comq_onnx.calibrate.cut_tensors import Host
from comq_onnx.calibrate.finite import LARGEST, SMALLEST, largest_magnitude
from comq_onnx.errors import ModelError, SamplesError
from comq_onnx.model.layers import Layer
from comq_onnx.model.op_kind import OpKind
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.samples.padding import Mask, has_positions
from comq_onnx.solve import moments
from comq_onnx.solve.moments import MomentSums, chunks, halves

# More input positions than these do not change a solution: so many for each input of an output channel, between two
# bounds, and at least the second number for each input. Beyond them positions are drawn at random, the same share of
# each batch.
LEAST_POSITIONS, MOST_POSITIONS = 2_048, 16_384
ENOUGH_PER_INPUT, POSITIONS_PER_INPUT = 64, 12
# in the same time a Gram of patches takes at least so many times as many positions (see patches.py)
PATCHES_GAIN = 2
# moments are summed over so many samples at a time (fewer where those take more than CHUNK_BYTES), whatever the batch
# size: so it does not change the order of sums
GROUP = 16

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class LayerInput:
    """Hold the input of a layer, batch by batch, in the float model and in the one quantized so far.

    x: the arrays of the float model, one for each batch or iteration of a loop
    x_hat: those of the model quantized so far; the same sequence where quantization does not change the input
    grid: the grid that the input is quantized with before the layer reads it; None where it is not quantized
    counts: how many samples each array holds; empty where an array is an iteration of a loop
    masks: the positions of each array that are no padding, None where all count; empty where an array is an iteration
    """

    layer: Layer
    x: Sequence[Any]
    x_hat: Sequence[Any]
    grid: ActivationGrid | None
    counts: Sequence[int]
    masks: Sequence[Mask | None]

    @property
    def kind(self) -> OpKind:
        """Return the kind whose rows give the moments."""
        return self.layer.kind.solved_as


@dataclass(frozen=True)
class Taken:
    """Tell which positions of a layer's input are taken from some samples, of those of all samples.

    share: which share of the positions of each array; 1 for all
    first: how many positions are taken from the samples before
    total: how many are taken from all samples
    """

    share: float
    first: int
    total: int

    def of(self, positions: int) -> int:
        """Return how many of so many positions of an array are taken."""
        return max(1, round(self.share * positions)) if positions and self.share < 1 else positions


def sum_moments(
    given: LayerInput, store: Host, taken: Taken, seed: int | list[int], refuse: Callable[[Any, int], ModelError]
) -> MomentSums:
    """Sum the moments of a layer's input over some samples.

    store: keeps the tensors
    taken: which positions are taken
    seed: the seed for drawing positions
    refuse: makes the error for an array whose numbers are not finite or too large, from the array and its place
    """
    kept, positions = _positions(given, store)
    rng = np.random.default_rng(seed)
    shared = given.x is given.x_hat
    sums, seen = MomentSums(), taken.first

    def fetched(i: int) -> tuple[Any, Any]:
        batch = store.fetch(given.x[i])
        return batch, batch if shared else store.fetch(given.x_hat[i])

    for i, (batch, batch_hat) in enumerate(store.ahead(len(given.x), fetched)):
        count = taken.of(positions[i])
        if count == 0:
            continue
        pick = kept[i] if taken.share == 1 else _drawn(kept[i], positions[i], count, rng)
        largest = largest_magnitude(batch)
        if not largest <= LARGEST:
            raise refuse(batch, i)
        if largest < SMALLEST:
            batch, batch_hat = batch * 0, batch_hat * 0
        hat = None if batch_hat is batch and given.grid is None else batch_hat
        _add_rows(sums, given, store, batch, hat, pick, halves(seen, count, taken.total))
        seen += count
    return sums


def _add_rows(
    sums: MomentSums, given: LayerInput, store: Host, x: Any, x_hat: Any, pick: Indices | None, half_of: Indices
) -> None:
    """Add the rows of one batch to the sums.

    x_hat: before it is quantized; None where it is x and is not quantized
    pick: the positions that are taken; None for all
    half_of: for each of them, the half of the samples that it counts for
    """
    kind = given.kind

    def quantized(array: Any) -> Any:
        return array if array is None or given.grid is None else store.fake_quantize(given.grid, array)

    padded = kind.patches(x) if pick is None else None
    if padded is not None:
        padded_hat = None if x_hat is None else kind.patches(quantized(x_hat))
        half_of_image = half_of[:: len(half_of) // len(padded)]
        for half in np.unique(half_of_image):
            mine = slice(None) if (half_of_image == half).all() else half_of_image == half
            mine_hat = None if padded_hat is None else arrays.at(padded_hat, mine)
            sums.add_patches(arrays.at(padded, mine), mine_hat, kind.kernel, half)
        return
    # quantized where there are fewer numbers; padding is 0, which every grid has
    rows_are_fewer = len(half_of) * kind.inputs * kind.groups < arrays.size(x)
    if not rows_are_fewer:
        x_hat = quantized(x_hat)
    for part, half in chunks(half_of, kind.inputs, kind.groups):
        # a part that holds all positions needs no index
        chosen = None if pick is None and len(part) == len(half_of) else part if pick is None else pick[part]
        hat = None if x_hat is None else kind.rows(x_hat, chosen)
        sums.add(kind.rows(x, chosen), quantized(hat) if rows_are_fewer else hat, half)


# Which positions
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positions:
    """Count the positions of a layer's input in some samples.

    counts: those of each array, without padding
    in_patches: moments are summed over all of them in about the time that some take
    """

    counts: tuple[int, ...]
    in_patches: bool


def count_positions(given: LayerInput, store: Host) -> Positions:
    """Count the positions of a layer's input."""
    shapes = _shapes(given)
    in_patches = bool(shapes) and given.kind.patches(store.empty(shapes[0])) is not None
    return Positions(tuple(_positions(given, store)[1]), in_patches)


def share_out(layer: Layer, counted: Sequence[Positions], fewer: int) -> list[Taken]:
    """Choose how many positions are taken from the samples of each shard.

    counted: the positions in each shard, in their order
    fewer: the number of positions that are taken is divided by this

    Raises SamplesError where there are none.
    """
    total = sum(sum(some.counts) for some in counted)
    if not total:
        raise SamplesError(f"no sample reaches layer {layer.name!r}: its input is empty for all of them")
    share = min(1.0, enough_positions(layer.kind.solved_as, fewer) / total)
    if share > 1 / PATCHES_GAIN and any(some.in_patches for some in counted):
        share = 1.0
    one = Taken(share, 0, 0)
    of_each = [sum(map(one.of, some.counts)) for some in counted]
    ends = np.cumsum([0, *of_each])
    return [Taken(share, int(first), int(ends[-1])) for first in ends[:-1]]


def _shapes(given: LayerInput) -> list[tuple[int, ...]]:
    """Return the shapes of the arrays."""
    return given.x.shapes if isinstance(given.x, _Groups) else [array.shape for array in given.x]


def _positions(given: LayerInput, store: Host) -> tuple[list[Indices | None], list[int]]:
    """Return the indices of the positions of each array that are no padding, None for all, and how many they are."""
    layer = given.layer
    like = [store.empty(shape) for shape in _shapes(given)]
    masks = [*given.masks, *[None] * (len(like) - len(given.masks))]
    kept = [_kept_positions(layer, x, mask) for x, mask in zip(like, masks, strict=True)]
    return kept, [given.kind.positions(x) if k is None else len(k) for x, k in zip(like, kept, strict=True)]


def _drawn(kept: Indices | None, positions: int, count: int, rng: np.random.Generator) -> Indices:
    """Draw `count` of so many positions, in ascending order; kept: their indices, None for all."""
    pick = np.sort(rng.choice(positions, count, replace=False))
    return pick if kept is None else kept[pick]


def enough_positions(kind: OpKind, fewer: int) -> int:
    """Return how many positions are enough for a layer; fewer: the number is divided by this."""
    enough = min(ENOUGH_PER_INPUT * kind.inputs, MOST_POSITIONS)
    return max(enough, LEAST_POSITIONS, POSITIONS_PER_INPUT * kind.inputs) // fewer


def _kept_positions(layer: Layer, batch: Any, kept: Mask | None) -> Indices | None:
    """Return the positions of a batch of a layer's input that are not padding; None where all count.

    kept: the mask of the batch, [samples, positions]
    """
    if kept is None or layer.kind.groups != 1 or kept.all():
        return None
    total = layer.kind.positions(batch)
    along = layer.kind.has_leading_axes and has_positions(batch, kept, least_rank=3)
    if along or (layer.kind.has_flat_rows and total == kept.size):
        return np.flatnonzero(np.repeat(kept.ravel(), total // kept.size))
    return None


# Groups of samples
# ----------------------------------------------------------------------------------------------------------------------


def in_groups(given: LayerInput, store: Host) -> LayerInput:
    """Put the arrays into groups of GROUP samples, where every sample has the same number of rows."""
    if not given.kind.rows_follow_samples or not _can_regroup(given.x, given.counts):
        return given
    x, counts = given.x, given.counts
    size = max(1, min(GROUP, moments.CHUNK_BYTES * counts[0] // max(x[0].nbytes, 1)))
    grouped = _Groups(x, counts, size, store.fetch)
    grouped_hat = grouped if given.x_hat is x else _Groups(given.x_hat, counts, size, store.fetch)
    masks = _Groups(given.masks, counts, size) if given.masks[0] is not None else ()
    return replace(given, x=grouped, x_hat=grouped_hat, counts=grouped.counts, masks=masks)


class _Groups(Sequence[Any]):
    """View arrays, with the same number of rows for every sample, as arrays with the rows of `size` samples each."""

    def __init__(
        self, given: Sequence[Any], counts: Sequence[int], size: int, fetch: Callable[[Any], Any] = lambda array: array
    ) -> None:
        """Keep the arrays.

        counts: how many samples each holds
        fetch: brings a part of an array to where it is worked on
        """
        self._arrays, self._starts, self._size, self._fetch = given, np.cumsum([0, *counts]), size, fetch
        self._rows = len(given[0]) // counts[0]
        total = sum(counts)
        self.counts = [min(size, total - first) for first in range(0, total, size)]
        self.shapes = [(self._rows * count, *given[0].shape[1:]) for count in self.counts]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: Any) -> Any:
        first = i * self._size
        last = first + self.counts[i]
        found = [
            self._fetch(array[(max(first, start) - start) * self._rows : (min(last, end) - start) * self._rows])
            for array, start, end in zip(self._arrays, self._starts[:-1], self._starts[1:], strict=True)
            if start < last and first < end
        ]
        return found[0] if len(found) == 1 else arrays.concatenate(found)


def _can_regroup(given: Sequence[Any], counts: Sequence[int]) -> bool:
    """Tell whether arrays, one for each batch of `counts` samples, have the same number of rows for every sample."""
    if not given or len(given) != len(counts) or not all(arrays.is_array(a) and a.ndim > 1 and len(a) for a in given):
        return False
    rows = len(given[0]) // counts[0]
    return rows >= 1 and all(
        len(a) == rows * n and a.shape[1:] == given[0].shape[1:] for a, n in zip(given, counts, strict=True)
    )
