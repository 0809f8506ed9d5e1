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
    each = rows.out * columns.out
    pick = np.arange(len(x) * each) if pick is None else pick
    image, place = np.divmod(pick, max(each, 1))
    top, left = np.divmod(place, max(columns.out, 1))
    # positions of one image after the other: a channel of it stays in the cache
    ends = np.append(np.flatnonzero(np.diff(image)) + 1, len(pick))
    found = np.empty((x.shape[1], rows.kernel * columns.kernel, len(pick)), np.float32)
    copy_windows(
        np.ascontiguousarray(x), image, ends, top * rows.stride - rows.before, left * columns.stride - columns.before,
        rows.kernel, columns.kernel, rows.dilation, columns.dilation, found,
    )  # fmt: skip
    return found


@compiled
def copy_windows(x, image, ends, top, left, height, width, down, along, found):  # type: ignore[no-untyped-def]
    """Copy windows.

    x: [n, channels, height, width]
    image: the image of each window, [positions]
    ends: the ends of the stretches of windows of one image
    top, left: the place of the first number of each window, outside of x too, [positions]
    height, width: how many numbers a window takes
    down, along: how far they are apart
    found: written, [channels, height * width, positions]
    """
    first = 0
    for end in ends:
        for c in range(x.shape[1]):
            for i in range(height):
                for j in range(width):
                    for p in range(first, end):
                        y, z = top[p] + i * down, left[p] + j * along
                        inside = 0 <= y < x.shape[2] and 0 <= z < x.shape[3]
                        found[c, i * width + j, p] = x[image[p], c, y, z] if inside else np.float32(0)
        first = end
