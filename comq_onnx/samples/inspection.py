"""Describe samples for a person to check: shapes, ranges and means, and pictures on a contact sheet."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from comq_onnx.samples.samples import AnyArray, Samples

PIECE = 1 << 20  # numbers that are looked at together
TILE, COLUMNS = 112, 8  # of the sheet: pixels of a tile's side, tiles in a row


@dataclass(frozen=True)
class TensorFacts:
    """Describe an input or output.

    shape: of the array of all samples
    low, high, mean, std: over all numbers that are finite; None for strings
    channels: the mean of each channel of pictures, else empty
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: float | None = None
    channels: tuple[float, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """Hold what a model is fed, and what it answers to the first batch; notes and warnings as in a report.

    source: where the samples come from
    used, held_back: how many samples are calibrated on, and compared on
    sheet: the PNG of a contact sheet, or None where there are no pictures
    """

    source: str
    used: int
    held_back: int
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    sheet: bytes | None = None

    def rich(self) -> RenderableType:
        """Lay it out for a terminal: a table of the inputs, one of the outputs, notes and warnings."""
        head = f"{self.used} samples to calibrate on and {self.held_back} to compare on, from {self.source}"
        parts: list[RenderableType] = [Text(head), _table("the model is fed", self.inputs)]
        parts.append(_table("and answers the first batch", self.outputs))
        parts += [Text(f"note: {note}") for note in self.notes]
        parts += [Text(f"warning: {warning}", style="yellow") for warning in self.warnings]
        return Group(*parts)


def describe(
    samples: Samples, held_back: int, outputs: Mapping[str, Any], notes: tuple[str, ...], warnings: tuple[str, ...]
) -> Inspection:
    """Describe the samples that a model is calibrated on, and its outputs for the first batch."""
    inputs = tuple(tensor_facts(name, array) for name, array in samples.arrays.items())
    answers = tuple(tensor_facts(n, a) for n, a in outputs.items() if isinstance(a, np.ndarray))
    pictures = [sheet for a in samples.arrays.values() if (sheet := contact_sheet(a)) is not None]
    sheet = pictures[0] if pictures else None
    return Inspection(samples.source, len(samples), held_back, inputs, answers, notes, warnings, sheet)


def tensor_facts(name: str, array: AnyArray) -> TensorFacts:
    """Compute the range, mean and deviation of an array, over its finite numbers."""
    basic = TensorFacts(name, "string" if array.dtype == object else str(array.dtype), array.shape)
    if array.dtype == object or not array.size:
        return basic
    finite = array.ravel()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        finite = array[np.isfinite(array)]
    if not finite.size:
        return basic
    axis = _channel_axis(array.shape)
    others = tuple(i for i in range(array.ndim) if i != axis)
    by_channel: Any = () if axis is None else array.mean(axis=others, dtype=np.float64).tolist()
    mean, deviation = _mean_and_deviation(finite)
    return TensorFacts(
        name, basic.dtype, array.shape, float(finite.min()), float(finite.max()), mean, deviation, tuple(by_channel)
    )


def _mean_and_deviation(numbers: AnyArray) -> tuple[float, float]:
    """Return both of an array [numbers], in float64 piece by piece."""
    pieces = [numbers[i : i + PIECE] for i in range(0, len(numbers), PIECE)]
    mean = sum(float(piece.sum(dtype=np.float64)) for piece in pieces) / len(numbers)
    squares = sum(float(np.square(piece.astype(np.float64) - mean).sum()) for piece in pieces)
    return mean, float(np.sqrt(squares / len(numbers)))


def contact_sheet(array: AnyArray, most: int = 32) -> bytes | None:
    """Draw the first `most` pictures of an array on one sheet, as the bytes of a PNG; None where it holds no pictures.

    array: [n, channels, height, width] or [n, height, width, channels], with one or three channels

    All pictures have one scale, from the least to the greatest number of each channel. So the sheet shows a wrong order
    of channels or axes, a wrong crop, and pictures of another range than the rest. It does not show a wrong mean or
    deviation: the numbers of `tensor_facts` do.
    """
    axis = _channel_axis(array.shape)
    if axis is None or array.dtype.kind not in "fiu":
        return None
    pictures = array.reshape(-1, *array.shape[-3:])[:most].astype(np.float32)
    if axis == array.ndim - 3:
        pictures = pictures.transpose(0, 2, 3, 1)
    low, high = np.nanmin(pictures, axis=(0, 1, 2)), np.nanmax(pictures, axis=(0, 1, 2))
    shown = np.nan_to_num((pictures - low) / np.maximum(high - low, 1e-12) * 255).astype(np.uint8)
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * TILE), "white")
    for i, picture in enumerate(shown):
        tile = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).convert("RGB")
        tile.thumbnail((TILE - 4, TILE - 4))
        place = (i % columns * TILE + (TILE - tile.width) // 2, i // columns * TILE + (TILE - tile.height) // 2)
        sheet.paste(tile, place)
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue()


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Find the axis of one or three channels of pictures of 8 pixels or more a side; None for other arrays."""
    if len(shape) not in (4, 5) or not all(shape):
        return None
    for axis, sides in ((-3, shape[-2:]), (-1, shape[-3:-1])):
        if shape[axis] in (1, 3) and min(sides) >= 8:
            return len(shape) + axis
    return None


def _table(title: str, facts: tuple[TensorFacts, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("name", "type"):
        table.add_column(column, overflow="fold")
    for column in ("shape", "least", "greatest", "mean", "std", "mean of each channel"):
        table.add_column(column, justify="right", overflow="fold")
    for fact in facts:
        shape = "x".join(str(n) for n in fact.shape)
        numbers = ("" if n is None else f"{n:.4g}" for n in (fact.low, fact.high, fact.mean, fact.std))
        channels = " ".join(f"{n:.3g}" for n in fact.channels)
        table.add_row(Text(fact.name), fact.dtype, shape, *numbers, channels)
    return table
