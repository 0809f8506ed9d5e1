"""Sum input rows, and products of them, over positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from comq_onnx import arrays

# rows that are summed in float32, before their sums are added in float64
STRETCH = 512


def gram(a: Any, b: Any) -> Any:
    """Sum a^T b over positions: [groups, in, in], float32. Where b is a, half the work is done.

    a, b: rows, [groups, positions, in], numpy arrays or torch tensors
    """
    if arrays.is_tensor(a):
        return arrays.single(a.swapaxes(1, 2) @ b)
    found = np.empty((len(a), a.shape[2], a.shape[2]), np.float32)
    for g in range(len(a)):
        # numpy hands a product of two matrices to BLAS, but computes most stacks of them by itself, ten times slower
        np.matmul(a[g].T, b[g], out=found[g])
    return found


def total(rows: Any) -> Any:
    """Sum rows [groups, positions, in] over positions, in float64: [groups, in]."""
    if arrays.is_tensor(rows):
        return arrays.total(rows, axis=1)
    groups, count, inputs = rows.shape
    whole = count // STRETCH * STRETCH
    stretches = rows[:, :whole].reshape(groups, -1, STRETCH, inputs).sum(axis=2)
    return stretches.sum(axis=1, dtype=np.float64) + rows[:, whole:].sum(axis=1, dtype=np.float64)
