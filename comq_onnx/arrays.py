"""numpy arrays and torch tensors alike: the few calls that the two spell differently.

What makes rows and moments of a layer's input takes either kind and gives the same kind back, on the device that it
came from. torch is only imported where there is a tensor already.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view


def is_tensor(x: Any) -> bool:
    """Whether x is a torch tensor."""
    return type(x).__module__.partition(".")[0] == "torch"


def is_array(x: Any) -> bool:
    """Whether x is a numpy array or a torch tensor."""
    return isinstance(x, np.ndarray) or is_tensor(x)


def dtype(x: Any) -> np.dtype[Any]:
    """The type of the numbers, as numpy names it."""
    return np.dtype(str(x.dtype).removeprefix("torch.")) if is_tensor(x) else x.dtype


def size(x: Any) -> int:
    """How many numbers x holds."""
    return math.prod(x.shape)


def permute(x: Any, order: Sequence[int]) -> Any:
    """x with its axes in another order, as a view."""
    return x.permute(*order) if is_tensor(x) else x.transpose(*order)


def contiguous(x: Any) -> Any:
    """x in row-major order."""
    return x.contiguous() if is_tensor(x) else np.ascontiguousarray(x)


def at(x: Any, index: Any) -> Any:
    """x[index], with numpy arrays in the index for either kind."""
    if not is_tensor(x):
        return x[index]
    import torch

    def own(i: Any) -> Any:
        return torch.as_tensor(i, device=x.device) if isinstance(i, np.ndarray) else i

    return x[tuple(own(i) for i in index)] if isinstance(index, tuple) else x[own(index)]


def pad(x: Any, widths: Sequence[tuple[int, int]]) -> Any:
    """x with so many zeros before and behind along each axis."""
    if not is_tensor(x):
        return np.pad(x, widths)
    import torch

    return torch.nn.functional.pad(x, [n for before, behind in reversed(widths) for n in (before, behind)])


def windows(x: Any, spans: Sequence[int], axes: Sequence[int]) -> Any:
    """All windows of `spans` along `axes` as a view, the places inside the windows on new axes at the end."""
    if not is_tensor(x):
        return sliding_window_view(x, tuple(spans), axis=tuple(axes))
    for span, axis in zip(spans, axes, strict=True):
        x = x.unfold(axis, span, 1)
    return x


def broadcast_to(x: Any, shape: Sequence[int]) -> Any:
    """x spread to `shape`, as a view."""
    return x.expand(*shape) if is_tensor(x) else np.broadcast_to(x, tuple(shape))


def concatenate(parts: Sequence[Any]) -> Any:
    """Arrays of one kind one behind the other along the first axis."""
    if not is_tensor(parts[0]):
        return np.concatenate(parts)
    import torch

    return torch.cat(list(parts))


def zeros(shape: Sequence[int], like: Any, double: bool = False) -> Any:
    """Zeros of the kind, the type and on the device of `like`; double: float64."""
    if not is_tensor(like):
        return np.zeros(tuple(shape), np.float64 if double else like.dtype)
    import torch

    return torch.zeros(tuple(shape), dtype=torch.float64 if double else like.dtype, device=like.device)


def double(x: Any) -> Any:
    """x in float64."""
    return x.double() if is_tensor(x) else np.asarray(x, np.float64)


def single(x: Any) -> Any:
    """x in float32."""
    return x.float() if is_tensor(x) else np.asarray(x, np.float32)


def total(x: Any, axis: int) -> Any:
    """The sum along an axis, in float64."""
    if not is_tensor(x):
        return np.asarray(x.sum(axis=axis, dtype=np.float64))
    import torch

    return x.sum(dim=axis, dtype=torch.float64)


def on_host(x: Any) -> Any:
    """The same numbers as a numpy array; what is no tensor stays as it is."""
    return x.detach().cpu().numpy() if is_tensor(x) else x


def spread_indices(total: int, most: int) -> npt.NDArray[np.intp]:
    """Return at most `most` of the indices below `total`, evenly spread over all of them."""
    return np.unique(np.linspace(0, total - 1, min(total, most)).astype(np.intp))
