"""The one thing the pipeline sees of samples, what must be known of the model to make it, and the check that both
fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from comq_onnx.arrays import spread_indices
from comq_onnx.errors import SamplesError

AnyArray = npt.NDArray[Any]
Feeds = Mapping[str, Any]


class ModelInput(Protocol):
    """What must be known of a model's input: name, numpy dtype, dimensions (None where free; all None: rank
    unknown)."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def dims(self) -> tuple[int | None, ...] | None: ...


@dataclass(frozen=True)
class Clues:
    """What a model tells about the samples it wants.

    folder: the model's, where configurations of its preprocessing and its tokenizer.json may lie. token_limits: for
    inputs that index an embedding, its number of rows. channels_last: for pictures, where the graph shows it. run: the
    float model's outputs for some feeds. misfit: how far feeds are, by their means and deviations, from what the
    model's first BatchNormalizations saw in training (0: the same). balance: how large the first convolution's products
    are beside its biases (about 1 where feeds have the right scale). Both None where the model cannot tell.
    """

    folder: Path | None = None
    token_limits: Mapping[str, int] = field(default_factory=dict)
    channels_last: Mapping[str, bool] = field(default_factory=dict)
    run: Callable[[Feeds], Feeds] | None = None
    misfit: Callable[[Feeds], float] | None = None
    balance: Callable[[Feeds], float] | None = None


@dataclass(frozen=True)
class Samples:
    """Samples by input name, along the first axis of each array.

    per_item: the inputs whose samples are complete tensors (the array has one axis more than the input), fed one at a
    time. fixed_batch: the batch size the model insists on. numbers: which of the source's samples these are, where they
    are not all of them in its order. notes: what was found or decided while reading them that
    the caller did not say; warnings: why a model calibrated on them may be worse than it could be.
    """

    arrays: dict[str, AnyArray]
    source: str
    per_item: frozenset[str] = frozenset()
    fixed_batch: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    numbers: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return min(len(a) for a in self.arrays.values())

    def take(self, indices: Sequence[int] | npt.NDArray[np.intp]) -> Samples:
        """The samples at `indices`."""
        numbers = tuple(self.number(int(i)) for i in indices)
        return replace(self, arrays={n: a[np.asarray(indices)] for n, a in self.arrays.items()}, numbers=numbers)

    def few(self, most: int) -> Samples:
        """At most so many samples (one batch where the model fixes the size of more), evenly from all."""
        unit = self.fixed_batch or 1
        first = spread_indices(len(self) // unit, max(1, most // unit)) * unit
        return self.take((first[:, None] + np.arange(unit)).ravel())

    def number(self, index: int) -> int:
        """Which of the source's samples the one at `index` is, from 0."""
        return index if self.numbers is None else self.numbers[index]

    def batch_counts(self, size: int) -> list[int]:
        """The sizes of the batches that `batches` gives: the last may be smaller, unless the model fixes the size."""
        if self.per_item:
            return [1] * len(self)
        size = self.fixed_batch or size
        whole, rest = divmod(len(self), size)
        return [size] * whole + ([rest] if rest and self.fixed_batch is None else [])

    def batches(self, size: int) -> Iterator[dict[str, AnyArray]]:
        """Feeds of up to `size` samples."""
        start = 0
        for count in self.batch_counts(size):
            yield {
                # asarray: an item of a one-dimensional array is a scalar, not an array of rank 0
                name: np.asarray(a[start]) if name in self.per_item else a[start : start + count]
                for name, a in self.arrays.items()
            }
            start += count

    def split(self, used: int, held_back: int, seed: int) -> tuple[Samples, Samples]:
        """`used` samples to calibrate on and `held_back` others to compare on, drawn with `seed`."""
        order = np.random.default_rng(seed).permutation(len(self))
        unit = self.fixed_batch or 1
        return self.take(np.sort(order[held_back:][:used])), self.take(np.sort(order[: held_back // unit * unit]))


def fit(
    arrays: Mapping[str, AnyArray],
    inputs: Sequence[ModelInput],
    source: str,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> Samples:
    """Check arrays against the model's inputs and convert what loses nothing. Raises SamplesError for what cannot
    fit."""
    wanted = {i.name: i for i in inputs}
    if set(arrays) - set(wanted) or set(wanted) - set(arrays):
        raise SamplesError(
            f"{source}: arrays {names_of(arrays)}; the model has inputs {names_of(wanted)}: name each array like its "
            "input"
        )
    per_item, fixed, fitted = set(), set(), {}
    for name, info in wanted.items():
        array = _convert(arrays[name], info, source)
        if array.ndim == 0 or len(array) == 0:
            raise SamplesError(f"{source}: {name!r} holds no samples")
        if info.dims is not None:
            if array.ndim == len(info.dims) + 1:
                per_item.add(name)
            elif array.ndim != len(info.dims) or array.ndim == 0:
                raise SamplesError(
                    f"{source}: {name!r} has shape {array.shape}; expected {_shape(info)}, samples first"
                )
            got = array.shape[1:]
            need = info.dims if name in per_item else info.dims[1:]
            if any(n is not None and g != n for g, n in zip(got, need, strict=True)):
                raise SamplesError(
                    f"{source}: {name!r} has shape {array.shape}; expected {_shape(info)}, samples first"
                )
            if name not in per_item and info.dims[0] is not None:
                fixed.add(info.dims[0])
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            axes = tuple(range(1, array.ndim))
            bad = np.flatnonzero(~np.isfinite(array).all(axis=axes))
            raise SamplesError(
                f"{source}: {name!r} has NaN or Inf in {len(bad)} of {len(array)} samples, first in {bad[0]}"
            )
        fitted[name] = array
    counts = {name: len(a) for name, a in fitted.items()}
    if len(set(counts.values())) > 1:
        raise SamplesError(f"{source}: the arrays hold different numbers of samples: {counts}")
    if len(fixed) > 1:
        raise SamplesError(
            f"{source}: the inputs fix different batch sizes {sorted(fixed)}; give complete tensors instead"
        )
    return Samples(fitted, source, frozenset(per_item), fixed.pop() if fixed else None, tuple(notes), tuple(warnings))


def names_of(names: Iterable[str]) -> str:
    """Names in quotes, for messages."""
    return ", ".join(repr(n) for n in names) or "none"


def _shape(info: ModelInput) -> str:
    dims = ["?" if d is None else str(d) for d in info.dims or ()]
    return f"[{', '.join(['n', *dims[1:]])}] or [n, {', '.join(dims)}]"


def _convert(array: AnyArray, info: ModelInput, source: str) -> AnyArray:
    if array.dtype == info.dtype:
        return array
    if info.dtype == object and array.dtype.kind in "US":
        return array.astype(object)
    float_to_float = array.dtype.kind == "f" and info.dtype.kind == "f"
    if float_to_float or np.can_cast(array.dtype, info.dtype, "safe"):
        return array.astype(info.dtype)
    if array.dtype.kind in "iub" and info.dtype.kind in "iub":
        cast = array.astype(info.dtype)
        if np.array_equal(cast, array):
            return cast
    raise SamplesError(f"{source}: {info.name!r} is {array.dtype}; the model wants {info.dtype}")
