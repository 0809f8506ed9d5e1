"""Make layers to solve, well and badly conditioned, and check what must hold for every answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from comq_onnx.solve.grid import Array, Grid, QuantizedWeight, check_codes
from comq_onnx.solve.layer import Method
from comq_onnx.solve.moments import Moments
from comq_onnx.solve.problem import Part, arrange, pose, take_part

CONDITIONS = [
    "white", "correlated", "dead", "duplicate", "singular", "few", "offset", "tiny", "huge", "spread", "all dead",
]  # fmt: skip
QUICK = settings(max_examples=25, deadline=None, derandomize=True)
FEWER = settings(max_examples=15, deadline=None, derandomize=True)
METHODS = {
    "comq": Method(), "comq fast": Method(effort="fast"), "comq max": Method(effort="max"), "paper": Method("paper"),
    "paper cyclic": Method("paper", order="cyclic"), "gptq": Method("gptq"), "rtn": Method("rtn"),
}  # fmt: skip
COMQ = [method for method in METHODS.values() if method.solver == "comq"]
ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SOLVERS = pytest.mark.parametrize("method", [m for m in METHODS.values() if m.solver != "rtn"],
                                  ids=[name for name in METHODS if name != "rtn"])  # fmt: skip
EFFORTS = pytest.mark.parametrize("method", COMQ, ids=[method.effort for method in COMQ])


@dataclass(frozen=True)
class Case:
    """Describe a layer to solve.

    weight: [groups, out, in]
    x: rows of the float model, [groups, positions, in]
    x_hat: rows of the quantized model; None where they are equal
    halves: the moments have halves
    """

    weight: np.ndarray
    x: np.ndarray
    x_hat: np.ndarray | None
    grid: Grid
    halves: bool = False

    @property
    def moments(self) -> Moments:
        """Compute the moments of the rows."""
        return oracle.moments_of(self.x, self.x_hat, self.halves)


def rows(rng: np.random.Generator, condition: str, groups: int, positions: int, inputs: int) -> np.ndarray:
    """Make inputs [groups, positions, in] of a layer, well or badly conditioned."""
    x = rng.standard_normal((groups, 3 if condition == "few" else positions, inputs))
    if condition == "correlated":
        x = x @ rng.standard_normal((groups, inputs, inputs)) * np.geomspace(1, 30, inputs)
    elif condition == "dead":
        x[:, :, rng.random(inputs) < 0.4] = 0
    elif condition == "all dead":
        x[:] = 0
    elif condition == "duplicate":
        x[:, :, inputs // 2 :] = x[:, :, : inputs - inputs // 2]
    elif condition == "singular":
        x = np.broadcast_to(x[..., :1], x.shape) * rng.standard_normal(inputs) + 1e-4 * x
    elif condition == "offset":
        x += 5
    elif condition == "spread":
        x *= np.geomspace(1e-4, 1e4, inputs)
    elif condition in ("tiny", "huge"):
        x *= 1e-6 if condition == "tiny" else 1e6
    return x.astype(np.float32)


def walk(rng: np.random.Generator, positions: int, inputs: int) -> np.ndarray:
    """Make rows [1, positions, in] whose neighbouring inputs are alike."""
    x = rng.standard_normal((1, positions, inputs))
    for i in range(1, inputs):
        x[..., i] = 0.9 * x[..., i - 1] + 0.44 * x[..., i]
    return x.astype(np.float32)


def halved(inputs: int, positions: int, seed: int = 0) -> tuple[np.ndarray, Moments]:
    """Make a weight and its moments with halves, of inputs whose powers fall."""
    rng = np.random.default_rng(seed)
    turned = np.linalg.qr(rng.standard_normal((inputs, inputs)))[0]
    x = rng.standard_normal((1, positions, inputs)) * np.arange(1, inputs + 1) ** -1.0 @ turned
    return rng.standard_normal((1, 16, inputs)).astype(np.float32), oracle.moments_of(x.astype(np.float32), halves=True)


def coupled(inputs: int = 40, outputs: int = 24, groups: int = 2) -> tuple[np.ndarray, Moments]:
    """Make a weight and correlated inputs that the model quantized so far has changed."""
    rng = np.random.default_rng(3)
    x = rows(rng, "correlated", groups, 200, inputs)
    moments = oracle.moments_of(x, (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32))
    return rng.standard_normal((groups, outputs, inputs)).astype(np.float32), moments


@st.composite
def cases(
    draw: st.DrawFn, shapes: tuple[int, int, int] = (3, 9, 40), conditions: list[str] = CONDITIONS, least: int = 1
) -> Case:
    """Draw layers of at most `shapes` (groups, out, in) and of at least `least` inputs."""
    groups, out = (draw(st.integers(1, most)) for most in shapes[:2])
    inputs = draw(st.integers(least, shapes[2]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rows(rng, draw(st.sampled_from(conditions)), groups, 60, inputs)
    weight = rng.standard_normal((groups, out, inputs)).astype(np.float32)
    if draw(st.booleans()):
        weight[:, :, : inputs // 2] *= 0.01
    if draw(st.sampled_from([False, False, True])):
        weight[:, 0] = 0
    x_hat = None
    if draw(st.booleans()):
        x_hat = (x + draw(st.sampled_from([0.01, 0.3])) * x.std() * rng.standard_normal(x.shape)).astype(np.float32)
    sharing = draw(st.sampled_from([{}, {}, {"per_tensor": True}, {"block_size": 16}]))
    return Case(weight, x, x_hat, Grid(draw(st.integers(2, 8)), draw(st.booleans()), **sharing), draw(st.booleans()))


@st.composite
def posed(
    draw: st.DrawFn, inputs: int = 40, conditions: list[str] = CONDITIONS, blocked: bool | None = None
) -> tuple[Part, Array]:
    """Draw one group's channels as the solver has them, and scales [channels, blocks] for them; never per tensor.

    blocked: of several blocks or of one; None for either
    """
    case = draw(cases((1, 9, inputs), conditions, 17 if blocked else 1))
    size = case.grid.block_size if blocked is None else 16 if blocked else None
    grid = Grid(case.grid.bits, case.grid.symmetric, block_size=size)
    problem = pose(arrange(case.moments), grid, draw(st.sampled_from([0.01, 0.1, 1.0])))
    weight = case.weight[0]
    rng = np.random.default_rng(case.weight.size)
    shape = (len(weight), grid.blocks(weight.shape[1]))
    zero = np.zeros(shape) if grid.symmetric else rng.integers(grid.qmin, grid.qmax + 1, shape)
    scale = rng.uniform(0.2, 2, shape).astype(np.float32) / np.float32(grid.qmax)
    return take_part(problem, weight, zero.astype(np.float32)), scale


def noise(case: Case, *quantized: np.ndarray) -> float:
    """Bound what float32 products may do to the relative errors of weights: some eps of the terms that are added up."""
    moments, weight = case.moments, np.abs(case.weight.astype(np.float64))
    zero = np.zeros_like(moments.gram)
    gram, cross, residue = (np.abs(zero if m is None else m) for m in (moments.gram, moments.cross, moments.residue))
    x = case.x.astype(np.float64)
    energy = max(float(((x @ case.weight.swapaxes(1, 2)) ** 2).mean(axis=1).sum()), np.finfo(np.float64).tiny)
    whole = 0.0
    for one in quantized:
        d = np.abs(one.astype(np.float64) - case.weight)
        whole += float(((d @ gram + 2 * weight @ cross.swapaxes(1, 2)) * d + (weight @ residue) * weight).sum())
    # the energy itself is such a sum, of terms that cancel where the inputs are nearly singular
    own = ((weight @ gram + 2 * weight @ cross.swapaxes(1, 2) + weight @ residue) * weight).sum() / energy
    whole *= 1 + float(own)
    return 4 * float(np.finfo(np.float32).eps) * whole / energy


def on_grid(weight: QuantizedWeight) -> None:
    """Check that codes and zero points lie on the grid and scales are normal numbers, shared as the grid says."""
    assert check_codes(weight) is weight.codes
    assert weight.codes.dtype == weight.zero_point.dtype == np.int8
    assert weight.scale.dtype == np.float32
    sizes = np.abs(weight.scale) if weight.grid.signed else weight.scale
    assert (sizes >= np.finfo(np.float32).tiny).all()
    assert weight.scale.shape == weight.zero_point.shape
    assert weight.scale.shape == (*weight.codes.shape[:2], weight.grid.blocks(weight.codes.shape[-1]))
    assert weight.grid.qmin <= weight.zero_point.min()
    assert weight.zero_point.max() <= weight.grid.qmax
    if weight.grid.symmetric:
        assert not weight.zero_point.any()
    if weight.grid.per_tensor:
        assert np.unique(weight.scale).size == np.unique(weight.zero_point).size == 1
