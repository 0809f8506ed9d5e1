"""Refuse numbers that cannot be calibrated on: not finite, or too large for float32 sums of squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from comq_onnx import arrays
from comq_onnx.errors import ModelError
from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.samples.samples import Samples
from comq_onnx.solve.grid import Array

# float32 sums of squares of larger numbers overflow, those of smaller numbers lose their digits
LARGEST, SMALLEST = 1e15, 1e-15


def largest_magnitude(array: Any) -> float:
    """Return the largest magnitude of an array or tensor; NaN where there is a NaN, 0 where it is empty."""
    if not arrays.size(array):
        return 0.0
    # torch keeps NaN, as numpy does
    return float(abs(array).max() if arrays.is_tensor(array) else np.maximum(array.max(), -array.min()))


def finite_weight(prepared: Prepared, layer: Layer) -> Array:
    """Return the weight [groups, out, in] of a layer. Raises ModelError where it is not finite or too large."""
    # a copy: numba compiles again for arrays that are read-only or have another order
    weight = np.array(prepared.weight(layer), np.float32, order="C")
    largest = largest_magnitude(weight)
    if not np.isfinite(largest):
        count = int(weight.size - np.isfinite(weight).sum())
        raise ModelError(
            f"layer {layer.name!r}: {count} of {weight.size} weights are NaN or Inf; repair the model or --exclude it"
        )
    if largest > LARGEST:
        raise ModelError(
            f"layer {layer.name!r}: weights up to {largest:.1e} are too large to quantize; repair the model or "
            "--exclude it"
        )
    return weight


def out_of_range(
    array: Any, name: str, place: int, counts: Sequence[int], samples: Samples, layers: Sequence[Layer]
) -> ModelError:
    """Return the error for an array of the value `name` whose numbers are too large or not finite.

    place: the index of the array among those of the value
    counts: how many samples each of those arrays holds
    samples: all of these; their arrays are not looked at
    layers: those among which the readers of the value are named
    """
    array = arrays.on_host(array)
    largest = largest_magnitude(array)
    what = f"numbers up to {largest:.1e}, too large to calibrate on," if np.isfinite(largest) else "NaN or Inf"
    readers = ", ".join(repr(x.name) for x in layers if x.input == name)
    return ModelError(
        f"the float model gives {what} at {name!r}{f' (read by {readers})' if readers else ''}"
        f"{_where(array, place, counts, samples)}; check the samples and their preprocessing, or --exclude its readers"
    )


def _where(array: Array, place: int, counts: Sequence[int], samples: Samples) -> str:
    """Name the first sample out of range by its number in the source; all of them where samples have no rows."""
    if place >= len(counts):  # an iteration of a loop
        return ""
    first, count = sum(counts[:place]), counts[place]
    if count == 1 or (array.ndim and len(array) == count):
        rows = [array] if count == 1 else list(array)
        bad = next((k for k, row in enumerate(rows) if not largest_magnitude(row) <= LARGEST), 0)
        return f" for sample {samples.number(first + bad)} of {samples.source}"
    last = samples.number(first + count - 1)
    return f" for one of samples {samples.number(first)} to {last} of {samples.source}"
