"""Describe the calibration samples: figures of each input, and small pictures of those that are images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

PICTURES, SIDE = 6, 112  # how many are shown, and pixels of their longer side
SHOWN_VALUES = 24  # of one sample that is no picture


@dataclass(frozen=True)
class InputReport:
    """Describe one input over the calibration samples.

    shape: of one sample
    low, high, mean: over the samples; None where they are not numbers
    values: the first values of the first sample, where it is no picture
    pictures: some samples that look like images, as data URIs of PNG
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float | None
    high: float | None
    mean: float | None
    values: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


def describe(arrays: Mapping[str, npt.NDArray[Any]]) -> list[InputReport]:
    """Describe each input; arrays hold the samples along the first axis."""
    return [_describe(name, array) for name, array in arrays.items()]


def _describe(name: str, array: npt.NDArray[Any]) -> InputReport:
    numbers = array.dtype.kind in "iufb" and array.size > 0
    some = array[: min(len(array), 64)]
    pictures = tuple(picture(array[i]) for i in _choose_places(len(array))) if is_image(array) else ()
    first = np.asarray(array[0]).reshape(-1)[:SHOWN_VALUES]
    return InputReport(
        name=name,
        dtype=str(array.dtype),
        shape=tuple(array.shape[1:]),
        low=float(array.min()) if numbers else None,
        high=float(array.max()) if numbers else None,
        mean=float(some.mean(dtype=np.float64)) if numbers else None,
        values=() if pictures else tuple(f"{v:.4g}" if array.dtype.kind == "f" else str(v) for v in first),
        pictures=pictures,
    )


def _choose_places(count: int) -> list[int]:
    """Choose PICTURES places, or fewer, evenly from all samples."""
    return sorted({round(i) for i in np.linspace(0, count - 1, PICTURES)})


def is_image(array: npt.NDArray[Any]) -> bool:
    """Tell whether samples look like images: 1 or 3 channels, sides of 8 pixels or more."""
    if array.ndim != 4 or array.dtype.kind not in "fu" or min(array.shape) == 0:
        return False
    first, last = array.shape[1], array.shape[3]
    height, width = (array.shape[2], last) if first in (1, 3) else (first, array.shape[2])
    return (first in (1, 3) or last in (1, 3)) and min(height, width) >= 8


def picture(sample: npt.NDArray[Any]) -> str:
    """Draw a sample [channels, height, width] or [height, width, channels], its range from black to white, as a URI."""
    pixels = np.asarray(sample, np.float32)
    if pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    low, high = float(pixels.min()), float(pixels.max())
    grey = (pixels - low) * (255 / (high - low) if high > low else 0)
    picture = Image.fromarray(np.squeeze(grey.astype(np.uint8), 2) if grey.shape[2] == 1 else grey.astype(np.uint8))
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE))
    elif max(picture.size) * 2 <= SIDE:
        factor = SIDE // max(picture.size)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    data = io.BytesIO()
    picture.save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
