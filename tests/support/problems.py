"""Make problems for the tests of the steps of a search: as the kernels see them, and with slow steps in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import oracle
from hypothesis import settings
from layers import walk

from comq_onnx.solve.grid import Array, Grid, fit_mse
from comq_onnx.solve.problem import Part, arrange, pose, take_part
from comq_onnx.solve.rounding import Rounding, babai

# how near to a tie float32 may round the other way: sums of some tens of products of a few steps each
TIE = 1e-3
EASY = ["white", "correlated", "dead", "duplicate", "offset", "tiny", "huge"]
POSED = settings(max_examples=40, deadline=None, derandomize=True)
LOW, HIGH = np.float32(-4), np.float32(3)


@dataclass(frozen=True)
class Few:
    """Describe a small problem as the kernels see it.

    h: [in, in]
    w, pull: W and B, [channels, in]
    scale, zero: [channels, blocks]
    block: the block of each input, [in]
    """

    h: np.ndarray
    w: np.ndarray
    pull: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    block: np.ndarray

    @property
    def step(self) -> np.ndarray:
        """Return the scale of each code: [channels, in]."""
        return self.scale[:, self.block].astype(np.float64)

    @property
    def low(self) -> np.ndarray:
        """Return the lowest code less the zero point: [channels, in]."""
        return LOW - self.zero[:, self.block].astype(np.float64)

    @property
    def high(self) -> np.ndarray:
        """Return the highest code less the zero point: [channels, in]."""
        return HIGH - self.zero[:, self.block].astype(np.float64)

    @property
    def optimum(self) -> np.ndarray:
        """Return W* = W + B H^-1: [channels, in]."""
        return self.w + np.linalg.solve(self.h.astype(np.float64), self.pull.T).T

    def gradient(self, codes: np.ndarray) -> np.ndarray:
        """Compute V in float64: [channels, in]."""
        return (self.w - codes * self.step) @ self.h.astype(np.float64) + self.pull

    def loss(self, codes: np.ndarray, channel: int) -> np.ndarray:
        """Compute (w* - wq) H (w* - wq)^T of one channel's codes [..., in]."""
        d = self.optimum[channel] - codes * self.step[channel]
        return np.einsum("...i,ij,...j->...", d, self.h.astype(np.float64), d)

    def start(self) -> tuple[np.ndarray, np.ndarray]:
        """Return plainly rounded codes [channels, in], and their gradient as float32."""
        codes = np.clip(np.rint(self.w / self.step), self.low, self.high).astype(np.float32)
        return codes, self.gradient(codes).astype(np.float32)


def few(seed: int, n: int, channels: int, blocks: int = 1, ridge: float = 0.1) -> Few:
    """Make a problem of correlated inputs with zero points, blocks and a mismatch."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * n + 3, n)) @ rng.standard_normal((n, n))
    h = x.T @ x / len(x)
    h = (h + ridge * np.trace(h) / n * np.eye(n)).astype(np.float32)
    w = rng.standard_normal((channels, n)).astype(np.float32)
    scale = rng.uniform(0.3, 0.9, (channels, blocks)).astype(np.float32)
    zero = rng.integers(-2, 2, (channels, blocks)).astype(np.float32)
    pull = (0.1 * rng.standard_normal((channels, n)) @ h).astype(np.float32)
    return Few(h, w, pull, scale, zero, np.sort(rng.integers(0, blocks, n)))


class Slow:
    """Compute a part's problem in float64, inputs in its order."""

    def __init__(self, part: Part) -> None:
        self.part, self.h = part, part.problem.h.astype(np.float64)
        pull = np.zeros_like(part.w) if part.pull is None else part.pull
        self.optimum = part.w + np.linalg.solve(self.h, pull.T.astype(np.float64)).T

    def loss(self, codes: Array, scale: Array) -> np.ndarray:
        """Compute || M (w* - wq) ||^2 of each channel: the objective less its least value."""
        d = self.optimum - codes.astype(np.float64) * scale.astype(np.float64)[:, self.part.problem.block]
        return np.einsum("ci,ij,cj->c", d, self.h, d)

    def noise(self, codes: Array, scale: Array) -> np.ndarray:
        """Bound what float32 may do to the loss.

        These are some eps of the terms, and of the weights whose differences they are made of.
        """
        wq = codes * scale[:, self.part.problem.block]
        d, off = np.abs(self.optimum - wq), 2e-7 * (np.abs(self.optimum) + np.abs(wq))
        return np.einsum("ci,ij,cj->c", 2e-6 * d + 2 * off, np.abs(self.h), d + off) + 1e-30

    def babai(self, scale: Array) -> tuple[np.ndarray, np.ndarray]:
        """Round by oracle.babai at scales [channels, blocks]."""
        return oracle.babai(self.h, self.optimum, scale[:, self.part.problem.block], *self.bounds)

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and the highest codes less the zero point: [channels, in] each."""
        zero = self.part.zero[:, self.part.problem.block].astype(np.float64)
        return self.part.problem.grid.qmin - zero, self.part.problem.grid.qmax - zero


def in_range(part: Part, one: Rounding) -> None:
    """Check that codes are whole numbers on the grid and scales are positive numbers."""
    low, high = Slow(replace(part, zero=one.zero)).bounds
    assert (low <= one.codes).all()
    assert (one.codes <= high).all()
    assert np.array_equal(one.codes, np.rint(one.codes))
    assert (one.scale > 0).all()
    assert np.isfinite(one.scale).all()


def rounded(part: Part, scale: Array) -> Rounding:
    """Round by Babai at the best multiple of each scale."""
    (one,), _ = babai([part], [part.whole()], [scale], [part.zero])
    return one


def example(grid: Grid, inputs: int = 48, channels: int = 9) -> tuple[Part, Array]:
    """Make one group's channels and their MSE-best scales [channels, blocks]."""
    rng = np.random.default_rng(0)
    x = walk(rng, 200, inputs)
    weight = rng.standard_normal((channels, inputs)).astype(np.float32)
    (scale,), (zero,) = fit_mse(weight[None], grid)
    moments = oracle.moments_of(x, (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32))
    return take_part(pose(arrange(moments), grid), weight, zero.astype(np.float32)), scale
