"""Take the windows of a convolution at some positions out of its input, without padding it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from comq_onnx.solve.compiled import compiled
from comq_onnx.solve.grid import Array


@dataclass(frozen=True)
class Window:
    """Describe how a window moves over an axis.

    kernel: how many numbers it takes
    stride: how far it moves from one position to the next
    dilation: how far its numbers are apart
    before: how many zeros stand before the axis
    out: how many positions it has
    """

    kernel: int
    stride: int
    dilation: int
    before: int
    out: int


def take_windows(x: Array, rows: Window, columns: Window, pick: npt.NDArray[np.intp] | None) -> npt.NDArray[np.float32]:
    """Return the windows at positions: [channels, kernel of rows * kernel of columns, positions].

    x: float32, [n, channels, height, width]; what a window sees outside is 0
    rows, columns: how it moves down and along
    pick: the positions, counted by image, row and column; None for all. Those of one image are best beside each other
    """
    found = np.empty((x.shape[1], rows.kernel * columns.kernel, _count(len(x), rows, columns, pick)), np.float32)
    x = np.ascontiguousarray(x)
    if pick is None:
        copy_all(
            x, rows.kernel, rows.stride, rows.dilation, rows.before, rows.out,
            columns.kernel, columns.stride, columns.dilation, columns.before, columns.out, found,
        )  # fmt: skip
        return found
    image, place = np.divmod(pick, max(rows.out * columns.out, 1))
    top, left = np.divmod(place, max(columns.out, 1))
    top, left = top * rows.stride - rows.before, left * columns.stride - columns.before
    down, along = (rows.kernel - 1) * rows.dilation, (columns.kernel - 1) * columns.dilation
    inside = (top >= 0) & (left >= 0) & (top + down < x.shape[2]) & (left + along < x.shape[3])
    # windows of one image after the other: a channel of it stays in the cache
    ends = np.append(np.flatnonzero(np.diff(image)) + 1, len(pick))
    copy_some(
        x.reshape(*x.shape[:2], -1), x.shape[3], image, ends, top, left, inside,
        rows.kernel, columns.kernel, rows.dilation, columns.dilation, found,
    )  # fmt: skip
    return found


def _count(images: int, rows: Window, columns: Window, pick: npt.NDArray[np.intp] | None) -> int:
    """Return how many windows there are."""
    return images * rows.out * columns.out if pick is None else len(pick)


@compiled
def copy_all(  # type: ignore[no-untyped-def]
    x, height, stride_y, down, above, out_y, width, stride_x, along, before, out_x, found
):
    """Copy all windows, a row of them at a time.

    x: [n, channels, *, *]
    height, stride_y, down, above, out_y: kernel, stride, dilation, zeros before and positions, from row to row
    width, stride_x, along, before, out_x: the same from column to column
    found: written, [channels, height * width, n * out_y * out_x]
    """
    images, channels, rows, columns = x.shape
    for n in range(images):
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    # the windows whose number lies inside x
                    low = max(0, -((j * along - before) // stride_x))
                    high = max(low, min(out_x, (columns - 1 - j * along + before) // stride_x + 1))
                    shift = j * along - before
                    for v in range(out_y):
                        y, at = v * stride_y + i * down - above, (n * out_y + v) * out_x
                        for u in range(out_x):
                            found[c, i * width + j, at + u] = 0
                        if 0 <= y < rows:
                            for u in range(low, high):
                                found[c, i * width + j, at + u] = x[n, c, y, u * stride_x + shift]


@compiled
def copy_some(x, columns, image, ends, top, left, inside, height, width, down, along, found):  # type: ignore[no-untyped-def]
    """Copy some windows.

    x: [n, channels, rows * columns]
    image: the image of each window, [positions]
    ends: the ends of the stretches of windows of one image
    top, left: the place of the first number of each window, outside of x too, [positions]
    inside: whether all of a window lies inside x, [positions]
    height, width: how many numbers a window takes
    down, along: how far they are apart
    found: written, [channels, height * width, positions]
    """
    first, rows = 0, x.shape[2] // max(columns, 1)
    for end in ends:
        for c in range(x.shape[1]):
            for i in range(height):
                for j in range(width):
                    to = found[c, i * width + j]
                    plane = x[image[first], c]
                    for p in range(first, end):
                        y, z = top[p] + i * down, left[p] + j * along
                        if inside[p] or (0 <= y < rows and 0 <= z < columns):
                            to[p] = plane[np.uintp(y * columns + z)]
                        else:
                            to[p] = 0
        first = end
