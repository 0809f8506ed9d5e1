"""Hold samples as all other packages see them, and what must be known of a model to read samples for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from comq_onnx.arrays import spread_indices

AnyArray = npt.NDArray[Any]
Feeds = Mapping[str, Any]


class ModelInput(Protocol):
    """Describe an input of a model by what must be known of it to read samples for it.

    name: its name
    dtype: its numpy type; object for strings
    dims: its dimensions, each None where it is free; None where not even their number is known
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def dims(self) -> tuple[int | None, ...] | None: ...


@dataclass(frozen=True)
class AnyInput:
    """Describe an input by more than the model itself says of it; see ModelInput."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Clues:
    """Hold what a model tells about the samples it wants; None where it cannot tell.

    folder: where the model lies, and perhaps configurations of its preprocessing and its tokenizer.json
    token_limits: the number of rows of the embedding, for each input that indexes one
    cache_shapes: the heads and the width of each input that is a past of keys or values, each None where unknown
    step_axes: for each input that gives lengths of sequences, the input that gives their steps, and which of its axes
        these are
    channels_last: whether pictures are NHWC, for each input where the graph shows it
    run: computes the outputs of the float model
    misfit: measures how far feeds are, by their means and deviations, from what the first BatchNormalizations of the
        model saw in training (0: the same)
    balance: measures how large the products of the first convolution are beside its biases (about 1 where feeds have
        the right scale)
    """

    folder: Path | None = None
    token_limits: Mapping[str, int] = field(default_factory=dict)
    cache_shapes: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)
    step_axes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    channels_last: Mapping[str, bool] = field(default_factory=dict)
    run: Callable[[Feeds], Feeds] | None = None
    misfit: Callable[[Feeds], float] | None = None
    balance: Callable[[Feeds], float] | None = None


@dataclass(frozen=True)
class Samples:
    """Hold samples by input name, along the first axis of each array.

    arrays: one array for each input [samples, ...]
    source: where they come from, for messages and reports
    per_item: inputs whose samples are complete tensors (the array has one axis more than the input), fed one at a time
    shared: inputs without an axis of samples that are the same for all (a number that says how to run the model): each
        sample holds them whole, and a batch gets them once
    fixed_batch: the only batch size that the model takes, or None where it takes any
    notes: what was found or decided while reading them without the caller asking for it
    warnings: why a model that is calibrated on them may be worse than it could be
    numbers: the places of these samples in the source; None where they are all of its samples in its order
    """

    arrays: dict[str, AnyArray]
    source: str
    per_item: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    fixed_batch: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    numbers: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return min(len(a) for a in self.arrays.values())

    def take(self, indices: Sequence[int] | npt.NDArray[np.intp]) -> Samples:
        """Return the samples at `indices`."""
        numbers = tuple(self.number(int(i)) for i in indices)
        return replace(self, arrays={n: a[np.asarray(indices)] for n, a in self.arrays.items()}, numbers=numbers)

    def between(self, start: int, end: int) -> Samples:
        """Return consecutive samples, without copies of their arrays."""
        numbers = tuple(self.number(i) for i in range(start, end))
        return replace(self, arrays={n: a[start:end] for n, a in self.arrays.items()}, numbers=numbers)

    def few(self, most: int) -> Samples:
        """Choose at most `most` samples, evenly from all.

        Where the model fixes the batch size they are whole batches, and at least one.
        """
        unit = self.fixed_batch or 1
        first = spread_indices(len(self) // unit, max(1, most // unit)) * unit
        return self.take((first[:, None] + np.arange(unit)).ravel())

    def first(self, most: int) -> Samples:
        """Take the first samples, at most `most`; where the model fixes the batch size whole batches, at least one."""
        unit = self.fixed_batch or 1
        return self.between(0, min(len(self), max(unit, most // unit * unit)))

    def number(self, index: int) -> int:
        """Return the place in the source, from 0, of the sample at `index`."""
        return index if self.numbers is None else self.numbers[index]

    def batch_counts(self, size: int) -> list[int]:
        """Return the sizes of the batches that `batches` yields.

        The last may be smaller; where the model fixes the size, what does not fill a batch is left out.
        """
        if self.per_item:
            return [1] * len(self)
        size = self.fixed_batch or size
        whole, rest = divmod(len(self), size)
        return [size] * whole + ([rest] if rest and self.fixed_batch is None else [])

    def batches(self, size: int) -> Iterator[dict[str, AnyArray]]:
        """Yield feeds of up to `size` samples."""
        start, whole = 0, self.per_item | self.shared
        for count in self.batch_counts(size):
            yield {
                # asarray: an item of a one-dimensional array is a scalar, not an array of rank 0
                name: np.asarray(a[start]) if name in whole else a[start : start + count]
                for name, a in self.arrays.items()
            }
            start += count

    def split(self, used: int, held_back: int, seed: int) -> tuple[Samples, Samples]:
        """Draw with `seed` `used` samples to calibrate on and `held_back` others to compare on."""
        order = np.random.default_rng(seed).permutation(len(self))
        unit = self.fixed_batch or 1
        return self.take(np.sort(order[held_back:][:used])), self.take(np.sort(order[: held_back // unit * unit]))


def names_of(names: Iterable[str]) -> str:
    """Write names in quotes, for messages."""
    return ", ".join(repr(n) for n in names) or "none"
