"""Compute the Gram matrix of a convolution's input patches, without the patches.

A kernel [kh, kw] moves one step at a time over padded inputs a, b [n, channels, height, width] of one group. The patch
at p = (y, x) is the row a[:, p + k] over channels and taps k = (ky, kx), and

    G[c, k; c', k'] = sum_p a[c, p + k] b[c', p + k'] = sum_{q in box(k)} a[c, q] b[c', q + d],    d = k' - k,

with box(k) the places that tap k visits, as many as there are patches. Tap pairs of one lag d differ in their boxes'
borders alone. So for each lag the boxes are cut into pieces that a tap either visits whole or not at all, each piece
is one product [channels, places] @ [places, channels], and a pair's block is the sum of its pieces: nothing is
subtracted. That is (2 kh - 1)(2 kw - 1) products of the size of the input (half of them where a is b) in place of the
(kh kw)^2 that the patches take, and no array kh kw times the input's size. Places where padding makes a or b zero are
in no piece, which leaves few pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from comq_onnx import arrays

# numpy arrays or torch tensors (see arrays): float32, and float64
Array = Any
Sums = Any
# Inputs are taken in parts: 2 MB stay in the cache (twice as fast as 16 MB where channels are few), but each part adds
# its own [in, in] to the sums, so a part is as large as that where that is larger. Scratch is at most four parts: each
# input with places first, and a range of columns of it.
LEAST_BYTES, MOST_BYTES = 1 << 21, 1 << 26
# Measured over batches of 1 to 16, images of 7 to 56, 1 to 512 channels and kernels 1x2 to 5x5, on one thread: with
# fewer patches the [in, in] sums outweigh the products, with fewer numbers to a tap the calls do.
LEAST_CHANNELS, LEAST_PATCHES, LEAST_NUMBERS_PER_TAP = 8, 512, 4000


def pays(
    shape: tuple[int, ...], kernel: tuple[int, ...], strides: Sequence[int], dilations: Sequence[int], group: int
) -> bool:
    """Tell whether `patch_gram` serves this convolution and is faster than the product of all patches.

    shape: of the padded input, [n, channels, height, width]
    """
    if len(kernel) != 2 or group != 1 or any(step != 1 for step in (*strides, *dilations)):
        return False
    n, channels, height, width = shape
    taps, patches = kernel[0] * kernel[1], n * (height - kernel[0] + 1) * (width - kernel[1] + 1)
    enough = patches >= LEAST_PATCHES and patches * channels >= LEAST_NUMBERS_PER_TAP * taps
    return taps > 1 and channels >= LEAST_CHANNELS and enough


def patch_gram(a: Array, b: Array, kernel: tuple[int, ...]) -> Sums:
    """Sum patch(a) patch(b)^T over all patches: [in, in], `in` in the order channel, ky, kx.

    Where b is a, half the work is done and the result is exactly symmetric. Products are float32, the sums over parts
    of the input float64.

    a, b: padded inputs, [n, channels, height, width]
    kernel: height and width of a patch
    """
    channels, taps, same = a.shape[1], kernel[0] * kernel[1], b is a
    gram = arrays.zeros((channels, taps, channels, taps), a, double=True)
    for part in input_parts(a.shape, kernel):
        gram += arrays.permute(_blocks(a[part], b[part], kernel, same), (1, 0, 3, 2))
    return gram.reshape(channels * taps, channels * taps)


def patch_sum(a: Array, kernel: tuple[int, ...]) -> Sums:
    """Sum all patches of a padded input [n, channels, height, width]: [in], in the order channel, ky, kx."""
    total = arrays.total(a, axis=0)
    for axis, k in enumerate(kernel, start=1):
        # the windows that the taps see: as long as the output, as many as there are taps
        total = arrays.windows(total, [total.shape[axis] - k + 1], [axis]).sum(-1)
    return total.reshape(-1)


def input_parts(shape: tuple[int, ...], kernel: tuple[int, ...]) -> Iterator[tuple[slice, slice, slice]]:
    """Yield index tuples: some whole images, or a band of one image's rows, so that each patch is in one part."""
    n, channels, height, width = shape
    inputs, out = channels * kernel[0] * kernel[1], height - kernel[0] + 1
    budget = min(max(LEAST_BYTES, 4 * inputs * inputs), MOST_BYTES)
    row = 4 * channels * width
    images = max(1, budget // (row * height))
    rows = out if row * height <= budget else max(1, budget // row - kernel[0] + 1)
    for first, top in itertools.product(range(0, n, images), range(0, out, rows)):
        yield slice(first, first + images), slice(None), slice(top, top + rows + kernel[0] - 1)


def _blocks(a: Array, b: Array, kernel: tuple[int, ...], same: bool) -> Array:
    """Compute the Gram of one part as blocks [taps, channels, taps, channels]."""
    channels, (kh, kw) = a.shape[1], kernel
    # places first and images inside: a range of rows is one matrix [places, channels] as it stands
    left = arrays.contiguous(arrays.permute(a, (2, 3, 0, 1)))
    right = left if same else arrays.contiguous(arrays.permute(b, (2, 3, 0, 1)))
    height, width = (_filled_range([left, right], axis, k - 1) for axis, k in enumerate(kernel))
    out_h, out_w = left.shape[0] - kh + 1, left.shape[1] - kw + 1
    blocks = arrays.zeros((kh, kw, channels, kh, kw, channels), left)
    for dx in range(1 - kw, kw):
        for x0, x1, columns in _pieces(dx, kw, out_w, width):
            near = arrays.contiguous(left[:, x0:x1])
            far = near if same and dx == 0 else arrays.contiguous(right[:, x0 + dx : x1 + dx])
            # where a is b, lags before (0, 0) give the transposes of those after it
            for dy in range((0 if dx >= 0 else 1) if same else 1 - kh, kh):
                for y0, y1, lines in _pieces(dy, kh, out_h, height):
                    product = near[y0:y1].reshape(-1, channels).T @ far[y0 + dy : y1 + dy].reshape(-1, channels)
                    for ky, kx in itertools.product(lines, columns):
                        blocks[ky, kx, :, ky + dy, kx + dx] += product
    by_tap = blocks.reshape(kh * kw, channels, kh * kw, channels)
    if same:
        for k, later in itertools.combinations(range(kh * kw), 2):
            by_tap[later, :, k] = by_tap[k, :, later].T
    return by_tap


def _filled_range(given: Sequence[Array], axis: int, most: int) -> tuple[int, int]:
    """Return the range of an axis outside of which all arrays are zero; it leaves out at most `most` places a side."""
    end = given[0].shape[axis]

    def blank(places: Sequence[int]) -> int:
        """Count the places that are blank before the first that is not."""
        for count, place in enumerate(places):
            if any(bool((array[place] if axis == 0 else array[:, place]).any()) for array in given):
                return count
        return len(places)

    low = blank(range(min(most, end)))
    return low, end - blank(range(end - 1, max(end - most, low) - 1, -1))


def _pieces(lag: int, taps: int, out: int, filled: tuple[int, int]) -> Iterator[tuple[int, int, list[int]]]:
    """Yield the pieces [start, stop) of an axis over which a[q] b[q + lag] is summed, with the taps that visit each.

    out: how many places a tap visits
    filled: the range outside of which a and b are zero
    """
    low, high = max(filled[0], filled[0] - lag), min(filled[1], filled[1] - lag)
    visits = {k: (max(k, low), min(k + out, high)) for k in range(max(0, -lag), taps - max(0, lag))}
    ends = sorted({end for visit in visits.values() for end in visit})
    for start, stop in itertools.pairwise(ends):
        visiting = [k for k, (first, last) in visits.items() if first <= start and stop <= last]
        if visiting:
            yield start, stop, visiting
