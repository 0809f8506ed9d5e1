"""Treat numpy arrays and torch tensors alike: the few calls that the two spell differently.

The code that makes rows and moments of a layer's input takes either kind and gives the same kind back, on the device
that it came from. torch is only imported where there is a tensor already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view


def is_tensor(x: Any) -> bool:
    """Tell whether x is a torch tensor."""
    return type(x).__module__.partition(".")[0] == "torch"


def is_array(x: Any) -> bool:
    """Tell whether x is a numpy array or a torch tensor."""
    return isinstance(x, np.ndarray) or is_tensor(x)


def dtype(x: Any) -> np.dtype[Any]:
    """Return the type of the numbers, as numpy names it."""
    return np.dtype(str(x.dtype).removeprefix("torch.")) if is_tensor(x) else x.dtype


def size(x: Any) -> int:
    """Return how many numbers x holds."""
    return math.prod(x.shape)


def permute(x: Any, order: Sequence[int]) -> Any:
    """Put the axes of x in another order, as a view."""
    return x.permute(*order) if is_tensor(x) else x.transpose(*order)


def contiguous(x: Any) -> Any:
    """Return x in row-major order."""
    return x.contiguous() if is_tensor(x) else np.ascontiguousarray(x)


def copied(x: Any) -> Any:
    """Return a copy of x without gaps, its axes in memory in the same order."""
    return x.clone() if is_tensor(x) else x.copy(order="K")


def at(x: Any, index: Any) -> Any:
    """Return x[index], with numpy arrays in the index for either kind."""
    if not is_tensor(x):
        return x[index]
    import torch

    def own(i: Any) -> Any:
        return torch.as_tensor(i, device=x.device) if isinstance(i, np.ndarray) else i

    return x[tuple(own(i) for i in index)] if isinstance(index, tuple) else x[own(index)]


def pad(x: Any, widths: Sequence[tuple[int, int]]) -> Any:
    """Add so many zeros before and behind x along each axis."""
    if not is_tensor(x):
        return np.pad(x, widths)
    import torch

    return torch.nn.functional.pad(x, [n for before, behind in reversed(widths) for n in (before, behind)])


def windows(x: Any, spans: Sequence[int], axes: Sequence[int]) -> Any:
    """Return all windows of `spans` along `axes` as a view, the places inside the windows on new axes at the end."""
    if not is_tensor(x):
        return sliding_window_view(x, tuple(spans), axis=tuple(axes))
    for span, axis in zip(spans, axes, strict=True):
        x = x.unfold(axis, span, 1)
    return x


def broadcast_to(x: Any, shape: Sequence[int]) -> Any:
    """Repeat x to `shape`, as a view."""
    return x.expand(*shape) if is_tensor(x) else np.broadcast_to(x, tuple(shape))


def concatenate(parts: Sequence[Any]) -> Any:
    """Join arrays of one kind along the first axis."""
    if not is_tensor(parts[0]):
        return np.concatenate(parts)
    import torch

    return torch.cat(list(parts))


def zeros(shape: Sequence[int], like: Any, double: bool = False) -> Any:
    """Make zeros of the kind, the type and on the device of `like`; double: in float64."""
    if not is_tensor(like):
        return np.zeros(tuple(shape), np.float64 if double else like.dtype)
    import torch

    return torch.zeros(tuple(shape), dtype=torch.float64 if double else like.dtype, device=like.device)


def like(array: npt.NDArray[Any], other: Any) -> Any:
    """Return a numpy array as the kind, of the type and on the device of `other`."""
    if not is_tensor(other):
        return array.astype(other.dtype)
    import torch

    return torch.as_tensor(array, dtype=other.dtype, device=other.device)


def double(x: Any) -> Any:
    """Return x in float64."""
    return x.double() if is_tensor(x) else np.asarray(x, np.float64)


def single(x: Any) -> Any:
    """Return x in float32."""
    return x.float() if is_tensor(x) else np.asarray(x, np.float32)


def total(x: Any, axis: int) -> Any:
    """Sum along an axis, in float64."""
    if not is_tensor(x):
        return np.asarray(x.sum(axis=axis, dtype=np.float64))
    import torch

    return x.sum(dim=axis, dtype=torch.float64)


def power(x: Any) -> float:
    """Return the sum of squares of all numbers."""
    if is_tensor(x):
        return float((x * x).sum())
    flat = x.ravel(order="K")
    return float(np.dot(flat, flat))


def on_host(x: Any) -> Any:
    """Return the numbers of a tensor as a numpy array; anything else stays as it is."""
    return x.detach().cpu().numpy() if is_tensor(x) else x


def spread_indices(total: int, most: int) -> npt.NDArray[np.intp]:
    """Return at most `most` of the indices below `total`, evenly spread over all of them."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).astype(np.intp))
