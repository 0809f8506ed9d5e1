"""Build small detectors: one output that joins boxes and scores, and one that selects by NonMaxSuppression."""

from __future__ import annotations

import numpy as np
import onnx

from models import Arrays, build, normal, weight


def joined(moved: bool = False) -> onnx.ModelProto:
    """Build image [batch, 3, 16, 16] -> y [batch, 10, 64]: boxes in pixels and scores below one, joined by a Concat.

    moved: y is transposed behind it.
    """
    last = "j = Concat <axis = 1> (boxes, scores)  y = Transpose <perm = [0, 2, 1]> (j)" if moved else (
        "y = Concat <axis = 1> (boxes, scores)"
    )  # fmt: skip
    dims = "64, 10" if moved else "10, 64"
    return build(
        f"""joined (float[batch, 3, 16, 16] image) => (float[batch, {dims}] y)
        <int64[3] four = {{0, 4, 64}}, int64[3] six = {{0, 6, 64}}> {{
            [stem] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (image, w1)
            r = Relu (a)
            [box] b0 = Conv (r, wb)
            [cls] c0 = Conv (r, wc, bc)
            b1 = Reshape (b0, four)
            b2 = Sigmoid (b1)
            boxes = Mul (b2, pixels)
            c1 = Reshape (c0, six)
            scores = Sigmoid (c1)
            {last}
        }}""",
        {
            "w1": weight(24, 3, 3, 3, fan=27),
            "wb": weight(4, 24, 1, 1, fan=12),
            "wc": weight(6, 24, 1, 1, fan=8),
            "bc": np.full(6, -3, np.float32),
            "pixels": np.float32(640),
        },
    )


def selecting() -> onnx.ModelProto:
    """Build image [1, 3, 16, 16] -> what NonMaxSuppression selects [n, 3], and the boxes there [n, 4]."""
    return build(
        """selecting (float[1, 3, 16, 16] image) => (float[n, 4] found, int64[n, 3] which)
        <int64[3] four = {1, 4, 64}, int64[3] six = {1, 6, 64}, int64 most = {10}, int64[1] two = {2},
         int64[1] three = {3}, int64[1] one = {1}, int64[1] first = {0}> {
            [stem] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (image, w1)
            r = Relu (a)
            [box] b0 = Conv (r, wb)
            [cls] c0 = Conv (r, wc)
            b1 = Reshape (b0, four)
            b2 = Sigmoid (b1)
            b3 = Mul (b2, pixels)
            boxes = Transpose <perm = [0, 2, 1]> (b3)
            c1 = Reshape (c0, six)
            scores = Sigmoid (c1)
            which = NonMaxSuppression <center_point_box = 1> (boxes, scores, most, overlap, least)
            i = Slice (which, two, three, one)
            j = Squeeze (i, one)
            all = Squeeze (boxes, first)
            found = Gather <axis = 0> (all, j)
        }""",
        {
            "w1": weight(24, 3, 3, 3, fan=27),
            "wb": weight(4, 24, 1, 1, fan=12),
            "wc": weight(6, 24, 1, 1, fan=8),
            "pixels": np.float32(64),
            "overlap": np.float32(0.45),
            "least": np.float32(0.5),
        },
    )


def images(count: int = 64) -> Arrays:
    """Draw blocky images that differ in brightness."""
    return {"image": np.kron(normal(count, 3, 4, 4), np.ones((4, 4), np.float32)) + normal(count, 3, 16, 16, scale=0.2)}
