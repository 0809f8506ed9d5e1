"""Find the positions that an attention mask tells the model to ignore: they should not be calibrated on either.

Sentences of one batch are padded to one length, and often most of a batch is padding. The activations of padding reach
every layer, but no output that counts. A mask is believed only after a test: with other tokens in the masked positions,
the outputs must not change. Of outputs that have positions only those that are not masked are compared.
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
    """Return the name of the input that masks positions: `mask` in its name, rank 2, only zeros and ones, and both."""
    for name, array in arrays.items():
        if "mask" in name.lower() and isinstance(array, np.ndarray) and array.ndim == 2 and array.dtype != object:
            if not any(has_positions(other, array) for other in arrays.values() if other is not array):
                continue  # of a past too, whose positions no other input has
            ones = array == 1
            if ones.any() and not ones.all() and (ones | (array == 0)).all():
                return name
    return None


def is_ignored(run: Callable[[Arrays], Arrays], feeds: Arrays, mask: str, seed: int = 0) -> bool:
    """Tell whether the outputs that `run` gives for `feeds` do not change when the masked positions do.

    mask: the name of the mask [samples, positions] in `feeds`

    Every other input [samples, positions, ...] gets, where it is masked, values that it has elsewhere. False where that
    changes no input, for then the test says nothing.
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
    return all(_same_where_kept(before[name], after[name], kept) for name in before)


def _same_where_kept(before: Any, after: Any, kept: Mask) -> bool:
    """Tell whether two outputs are the same at the positions that are not masked.

    Keys and values of a cache [samples, heads, positions, width] have them on their third axis.
    """
    pairs = [(before, after)]
    if all(isinstance(a, np.ndarray) and a.ndim == 4 and a.shape[::2][:2] == kept.shape for a in (before, after)):
        pairs.append((before.swapaxes(1, 2), after.swapaxes(1, 2)))
    return any(_same(take_kept(a, kept), take_kept(b, kept)) for a, b in pairs)


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, np.ndarray) or a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return np.array_equal(a, b)
    # masks add large negative numbers, so masked positions still cause rounding errors
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(a).max(initial=0))))


def has_positions(array: Any, kept: Mask, least_rank: int = 2) -> bool:
    """Tell whether the first two axes of an array are those of the mask `kept` [samples, positions].

    least_rank: 3 asks for an axis of features behind them too: a pooled array [samples, features] may have as many
        features as there are positions
    """
    return arrays.is_array(array) and array.ndim >= least_rank and tuple(array.shape[:2]) == kept.shape


def take_kept(array: Any, kept: Mask | None, least_rank: int = 2) -> Any:
    """Return the positions of an array that are not masked; the whole array where it has no positions.

    array: [samples, positions, ...] or [samples * positions, ...] to have positions
    kept: the mask [samples, positions], None for no mask
    least_rank: as in `has_positions`
    """
    if kept is None:
        return array
    if has_positions(array, kept, least_rank):
        return array[kept]
    return array[kept.ravel()] if isinstance(array, np.ndarray) and array.shape[:1] == (kept.size,) else array
