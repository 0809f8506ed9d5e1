"""Measure what rounding to a grid loses, of a weight at several scales and of an activation."""

from __future__ import annotations

import numpy as np

from comq_onnx.solve.compiled import compiled, compiled_reordered


@compiled
def span_errors(weight, shrinks, qmin, qmax, symmetric, start, stop, least, most, errors):  # type: ignore[no-untyped-def]
    """Compute the squared error of plain rounding at each shrink of the span; the arithmetic is grid.fit_minmax's.

    weight: [rows, inputs], of which inputs `start` to `stop` count
    shrinks: multiples of the span
    qmin, qmax: the lowest and the highest code
    symmetric: whether the zero point is 0
    least, most: every span is widened to hold these; 0 for each row's own
    errors: written, [rows, shrinks]
    """
    for r in range(weight.shape[0]):
        low, high = least, most
        for i in range(start, stop):
            low, high = min(low, weight[r, i]), max(high, weight[r, i])
        for s in range(shrinks.size):
            # float64, as the span of float32's largest numbers is none of them
            lower, upper = np.float64(low) * shrinks[s], np.float64(high) * shrinks[s]
            span = max(-lower, upper) / qmax if symmetric else (upper - lower) / (qmax - qmin)
            scale = np.float32(span)
            if not scale > np.float32(3e-36):
                scale = np.float32(1)
            zero = np.float32(0)
            if not symmetric:
                zero = np.float32(min(max(np.rint(qmin - lower / scale), qmin), qmax))
            floor, ceiling = np.float32(qmin) - zero, np.float32(qmax) - zero
            # in steps of the grid: no square overflows
            steps = _rounding_error(weight[r, start:stop], np.float32(1) / scale, floor, ceiling)
            errors[r, s] = np.float64(steps) * np.float64(scale) * np.float64(scale)


@compiled_reordered
def _rounding_error(weight, inverse, floor, ceiling):  # type: ignore[no-untyped-def]
    """Sum (t - clip(round(t)))^2, t = weight * inverse, in the compiler's order."""
    total = np.float32(0)
    for i in range(weight.size):
        t = weight[i] * inverse
        q = np.rint(t)
        q = floor if q < floor else q
        q = ceiling if q > ceiling else q
        total += (t - q) * (t - q)
    return total


@compiled
def rounding_error(x, scale, zero, low, high):  # type: ignore[no-untyped-def]
    """Return (q - zero) * scale - x, q = clip(rint(x / scale) + zero, low, high): what x [n, channels] loses."""
    error = np.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            code = min(max(np.rint(x[n, c] / scale) + zero, low), high)
            error[n, c] = (code - zero) * scale - x[n, c]
    return error
