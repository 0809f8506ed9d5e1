"""Gather the range of an activation from samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from comq_onnx.plan.activation_grid import ActivationGrid, fit_range

# this many values of each batch, drawn at random, tell how the values of an activation are distributed
SPREAD_VALUES = 8192
# the sign, the exponent and two bits of the mantissa of a float32: bins a quarter of a power of two wide
_BIN_SHIFT, _BINS = 21, 2048


class ObservedRange:
    """Gather the range of an activation over all samples, batch by batch, and how its values are distributed in it.

    low, high: the ends of the range; inf and -inf where nothing was seen yet
    """

    def __init__(self, first: int = 0) -> None:
        """Begin with nothing seen; first: how many samples come before those that will be seen, to draw by."""
        self.low, self.high = np.inf, -np.inf
        self._counts = np.zeros(_BINS, np.int64)
        self._rng = np.random.default_rng(first)

    def observe(self, x: npt.NDArray[np.float32]) -> None:
        """Widen the range by one batch; an x without values changes nothing."""
        if x.size:
            # numpy's minimum keeps a NaN, Python's loses it
            self.low, self.high = float(np.minimum(self.low, x.min())), float(np.maximum(self.high, x.max()))
            flat = np.ascontiguousarray(x, np.float32).reshape(-1)
            if flat.size > SPREAD_VALUES:
                flat = flat[self._rng.integers(0, flat.size, SPREAD_VALUES)]
            self._counts += np.bincount(flat.view(np.uint32) >> _BIN_SHIFT, minlength=_BINS)

    def add(self, other: ObservedRange) -> ObservedRange:
        """Widen the range by what another one saw of other samples."""
        self.low = float(np.minimum(self.low, other.low))
        self.high = float(np.maximum(self.high, other.high))
        self._counts += other._counts
        return self

    def between(self, share: float) -> tuple[float, float]:
        """Return bounds that leave out at most (1 - share) / 2 of the values on either side.

        They are up to a quarter too wide, as the bins are, and never wider than the range. (0, 0) where nothing was
        seen.
        """
        if not np.isfinite(self.low):
            return 0.0, 0.0
        # the edges of the bins in the order of the numbers: the negative ones from the largest magnitude down
        half = _BINS // 2
        edges = (np.arange(half + 1, dtype=np.uint32) << _BIN_SHIFT).view(np.float32)
        counts = np.concatenate([self._counts[half:][::-1], self._counts[:half]])
        lower = np.concatenate([-edges[1:][::-1], edges[:-1]])
        upper = np.concatenate([-edges[:-1][::-1], edges[1:]])
        total, left_out = np.cumsum(counts), (1 - share) / 2 * counts.sum()
        first, last = np.searchsorted(total, left_out, "right"), np.searchsorted(total, counts.sum() - left_out)
        return max(self.low, float(lower[first])), min(self.high, float(upper[last]))

    def grid(self, dtype: str, bounds: tuple[float, float] | None) -> ActivationGrid:
        """Return the grid that spans the whole range, or [0, 0] where nothing was seen.

        dtype, bounds: as `fit_range` takes them
        """
        low, high = (self.low, self.high) if np.isfinite(self.low) else (0.0, 0.0)
        return fit_range(low, high, dtype, bounds)
