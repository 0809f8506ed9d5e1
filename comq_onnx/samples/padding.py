"""Padded positions: what an attention mask tells the model to ignore should not be calibrated on either.

Sentences of one batch are padded to one length, and often most of a batch is padding. Its activations reach every
layer, but no output that counts. A mask is believed only after a test: with other tokens in the masked positions, the
outputs (at the positions that are not masked, where they have positions) must stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx import arrays

Mask = npt.NDArray[np.bool_]
Arrays = Mapping[str, Any]


def find_mask(arrays: Arrays) -> str | None:
    """The name of the input that masks positions: rank 2, `...mask` in its name, zeros and ones and both of them."""
    for name, array in arrays.items():
        if "mask" in name.lower() and isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype != object:
            ones = array == 1
            if ones.any() and not ones.all() and (ones | (array == 0)).all():
                return name
    return None


def is_ignored(run: Callable[[Arrays], Arrays], feeds: Arrays, mask: str, seed: int = 0) -> bool:
    """Whether the outputs that `run` gives for `feeds` stay as they are when what is masked changes.

    Every other input with an axis for the samples and one for the positions gets, where it is masked, values that it
    has elsewhere. False where that changes nothing: then nothing is known.
    """
    kept = np.asarray(feeds[mask]) == 1
    rng = np.random.default_rng(seed)
    changed = dict(feeds)
    for name, array in feeds.items():
        if name != mask and has_positions(array, kept):
            changed[name] = array.copy()
            changed[name][~kept] = rng.permutation(np.resize(array[kept], array[~kept].shape))
    if all(np.array_equal(changed[name], array) for name, array in feeds.items()):
        return False
    before, after = run(feeds), run(changed)
    return all(_same(take_kept(before[name], kept), take_kept(after[name], kept)) for name in before)


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, np.ndarray) or a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return np.array_equal(a, b)
    # masks add large negative numbers, so what is masked still weighs some rounding errors
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(a).max(initial=0))))


def has_positions(array: Any, kept: Mask, least_rank: int = 2) -> bool:
    """Whether an array has the mask's two axes first; least_rank 3: and one of features behind them, since the features
    of a pooled [batch, features] may be as many as the positions."""
    return arrays.is_array(array) and array.ndim >= least_rank and tuple(array.shape[:2]) == kept.shape


def take_kept(array: Any, kept: Mask | None, least_rank: int = 2) -> Any:
    """The positions of an array that are not masked, where it has positions, also along one axis [batch * positions,
    ...]; otherwise the array."""
    if kept is None:
        return array
    if has_positions(array, kept, least_rank):
        return array[kept]
    return array[kept.ravel()] if isinstance(array, np.ndarray) and array.shape[:1] == (kept.size,) else array
