"""Define the grid of an activation: its scale and its zero point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from comq_onnx.solve.grid import Array


@dataclass(frozen=True)
class ActivationGrid:
    """Describe the grid of one activation, the same for the whole tensor.

    The code of x is clip(round(x / scale) + zero_point, qmin, qmax).

    scale: the step between two neighbouring codes
    zero_point: the code of 0
    dtype: the integer type of the codes, such as uint8
    """

    scale: np.float32
    zero_point: int
    dtype: str

    @property
    def qmin(self) -> int:
        """Return the lowest code of the type."""
        return int(np.iinfo(self.dtype).min)

    @property
    def qmax(self) -> int:
        """Return the highest code of the type."""
        return int(np.iinfo(self.dtype).max)

    def is_within(self, bounds: tuple[float, float] | None) -> bool:
        """Tell whether the values of all codes stay inside bounds, as a runtime wants it to drop a Relu or a Clip."""
        low, high = (self.scale * np.float32(code - self.zero_point) for code in (self.qmin, self.qmax))
        return bounds is None or self.qmin < 0 or bool(bounds[0] <= low and high <= bounds[1])

    def fake_quantize(self, x: Array) -> Array:
        """Compute DequantizeLinear(QuantizeLinear(x)) as the runtime does: in float32, half rounded to even."""
        q = np.clip(np.rint(x / self.scale) + np.float32(self.zero_point), self.qmin, self.qmax)
        return np.asarray((q - np.float32(self.zero_point)) * self.scale, np.float32)


def fit_range(low: float, high: float, dtype: str, bounds: tuple[float, float] | None = None) -> ActivationGrid:
    """Return the grid that spans [low, high] and 0.

    dtype: the type of the codes. With a signed type the zero point is 0 and the span is symmetric, whatever the bounds:
        runtimes that want signed codes take no other zero point, and drop a Relu by themselves
    bounds: what the Clip or Relu that makes the activation lets through; the values of all codes stay inside them, so
        that a runtime can drop that node (it compares the range of all codes with the bounds); None where there is none
    """
    qmax = int(np.iinfo(dtype).max)
    low, high = min(low, 0.0), max(high, 0.0)
    if np.iinfo(dtype).min < 0:
        scale = np.float32(max(-low, high) / qmax)
        return ActivationGrid(scale if max(-low, high) > 1e-30 else np.float32(1), 0, dtype)
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    span = high - low
    if not span > 1e-30:
        within = 1.0 if bounds is None else min(1.0, bounds[1] / qmax * (1 - 1e-6))
        return ActivationGrid(np.float32(within), 0, dtype)
    scale = np.float32(span / qmax)
    zero_point = int(np.clip(np.rint(-low / scale), 0, qmax))
    if bounds is not None:
        if zero_point and np.isfinite(bounds[0]):
            scale = min(scale, np.float32(-bounds[0] / zero_point))
        while scale * np.float32(qmax - zero_point) > np.float32(bounds[1]) or scale * np.float32(
            -zero_point
        ) < np.float32(bounds[0]):
            scale = np.nextafter(scale, np.float32(0))
    return ActivationGrid(np.float32(scale), zero_point, dtype)
