"""Test that the solver on torch tensors is the one on numpy arrays: the same codes up to ties, the same errors.

The tensors lie on COMQ_TEST_DEVICE, the CPU by default: the code is that of a GPU, but for the Triton kernel, which is
interpreted here.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import as_tensor, torch_device
from layers import on_grid, rows

from comq_onnx.arrays import on_host
from comq_onnx.solve.grid import Grid
from comq_onnx.solve.layer import COMQ, Method, Solution, errors_at, solve, solve_together
from comq_onnx.solve.moments import Moments

torch_device()
torch = pytest.importorskip("torch")
clip, problem, ridge, solver, step = (
    importlib.import_module(f"comq_onnx.solve.gpu.{name}") for name in ("clip", "problem", "ridge", "solver", "step")
)

FAST = Method(effort="fast")
MOMENTS = ("gram", "mean", "cross", "residue", "mean_error")


def tensors(moments: Moments) -> Moments:
    """Return the moments as tensors."""
    half = None if moments.half is None else tensors(moments.half)
    found = {name: getattr(moments, name) for name in MOMENTS}
    return replace(moments, half=half, **{k: None if v is None else as_tensor(v) for k, v in found.items()})


def layer(
    condition: str, groups: int, out: int, inputs: int, mismatch: float = 0.1
) -> tuple[np.ndarray, Moments]:  # fmt: skip
    """Make a weight and its moments of two halves."""
    rng = np.random.default_rng(groups * out * inputs)
    x = rows(rng, condition, groups, 400, inputs)
    hat = (x + mismatch * x.std() * rng.standard_normal(x.shape)).astype(np.float32) if mismatch else None
    weight = rng.standard_normal((groups, out, inputs)).astype(np.float32)
    return weight, oracle.moments_of(x, hat, True)


def same(ours: Solution, theirs: Solution) -> None:
    """Check what the two forms of the solver must have in common."""
    on_grid(ours.weight)
    assert (ours.weight.codes == theirs.weight.codes).mean() >= 0.999
    # float32 sums in another order, and what a tie did
    np.testing.assert_allclose(ours.error, theirs.error, rtol=1e-4)
    np.testing.assert_allclose(ours.rtn_error, theirs.rtn_error, rtol=1e-5)
    agree = (ours.weight.codes == theirs.weight.codes).all(axis=-1)
    np.testing.assert_allclose(ours.weight.scale[agree], theirs.weight.scale[agree], rtol=1e-5)
    if theirs.shift is not None:
        assert ours.shift is not None
        least = 1e-4 * np.abs(theirs.shift).max()
        np.testing.assert_allclose(ours.shift[agree], theirs.shift[agree], rtol=1e-3, atol=least)


CASES = {
    "4 bits": (COMQ, Grid(4, False), "correlated", 1, 48, 150),
    "symmetric": (COMQ, Grid(4, True), "correlated", 1, 48, 96),
    "2 bits": (COMQ, Grid(2, False), "white", 1, 40, 96),
    "8 bits": (COMQ, Grid(8, True), "offset", 1, 40, 64),
    "blocks": (COMQ, Grid(4, False, block_size=32), "correlated", 1, 40, 96),
    "a short block": (COMQ, Grid(3, False, block_size=48), "correlated", 1, 24, 70),
    "per tensor": (COMQ, Grid(4, False, per_tensor=True), "correlated", 1, 30, 60),
    "groups": (COMQ, Grid(4, False), "correlated", 3, 20, 60),
    "groups per tensor": (COMQ, Grid(4, True, per_tensor=True), "white", 2, 10, 20),
    "dead inputs": (COMQ, Grid(4, False), "dead", 1, 40, 70),
    "equal inputs": (COMQ, Grid(4, False), "duplicate", 1, 40, 70),
    "few positions": (COMQ, Grid(4, False), "few", 1, 40, 70),
    "huge": (COMQ, Grid(4, False), "huge", 1, 40, 70),
    "tiny": (COMQ, Grid(4, False), "tiny", 1, 40, 70),
    "negative scales": (COMQ, Grid(3, True, signed=True), "correlated", 1, 48, 96),
    "negative scales of blocks": (COMQ, Grid(3, True, block_size=32, signed=True), "correlated", 1, 48, 96),
    "fast": (FAST, Grid(4, False), "correlated", 1, 48, 140),
    "gptq": (Method("gptq"), Grid(4, False), "correlated", 1, 48, 140),
    "rounding": (Method("rtn"), Grid(4, False, block_size=32), "correlated", 2, 48, 70),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_solved_as_arrays_are(name: str) -> None:
    method, grid, condition, groups, out, inputs = CASES[name]
    weight, moments = layer(condition, groups, out, inputs)
    assert method.on_device(inputs, grid)
    for has_bias in (True, False) if name == "4 bits" else (True,):
        same(
            solve(weight, tensors(moments), grid, method, has_bias),
            solve(weight, moments, grid, method, has_bias),
        )


def test_without_a_mismatch_and_without_halves_tensors_are_solved_as_arrays_are() -> None:
    weight, moments = layer("correlated", 1, 40, 80, mismatch=0)
    for given in (moments, replace(moments, half=None)):
        same(solve(weight, tensors(given), Grid(4, False)), solve(weight, given, Grid(4, False)))


def test_layers_of_one_input_are_solved_together() -> None:
    weight, moments = layer("correlated", 1, 40, 80)
    several = [weight[:, :13], weight[:, 13:]]
    for ours, theirs in zip(
        solve_together(several, tensors(moments), Grid(4)), solve_together(several, moments, Grid(4)), strict=True
    ):
        same(ours, theirs)


@pytest.mark.parametrize(
    ("method", "grid", "groups", "inputs"),
    [
        (Method("paper"), Grid(4), 1, 20),
        (Method(effort="max"), Grid(4), 1, 40),
        (COMQ, Grid(4, False), 6, 9),
    ],
    ids=["paper", "max", "few inputs"],
)
def test_what_is_solved_on_the_cpu_is_the_same_to_the_byte(
    method: Method, grid: Grid, groups: int, inputs: int
) -> None:
    weight, moments = layer("correlated", groups, 12, inputs)
    assert not method.on_device(inputs, grid)
    ours, theirs = solve(weight, tensors(moments), grid, method), solve(weight, moments, grid, method)
    assert np.array_equal(ours.weight.codes, theirs.weight.codes)
    assert (ours.error, ours.rtn_error) == (theirs.error, theirs.rtn_error)


def test_more_channels_than_are_searched_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = layer("correlated", 2, 30, 50)
    whole = solve(weight, tensors(moments), Grid(4, False))
    monkeypatch.setattr(solver, "MOST_NUMBERS", 7 * 5 * 2 * 50)
    parts = solve(weight, tensors(moments), Grid(4, False))
    assert (whole.weight.codes == parts.weight.codes).mean() >= 0.999


def test_solving_twice_gives_the_same_bytes() -> None:
    weight, moments = layer("correlated", 1, 40, 140)
    first, second = (solve(weight, tensors(moments), Grid(4, False)) for _ in range(2))
    assert first.weight.codes.tobytes() == second.weight.codes.tobytes()
    assert first.weight.scale.tobytes() == second.weight.scale.tobytes()


def test_the_ridge_and_the_errors_at_other_widths_are_the_same() -> None:
    for condition in ("white", "few"):
        weight, moments = layer(condition, 1, 30, 70)
        own = ridge.choose_ridge(as_tensor(weight), tensors(moments), Grid(4))
        assert own == gpu_free_ridge(weight, moments)
        widths = [Grid(2), Grid(4)]
        np.testing.assert_allclose(
            errors_at(weight, tensors(moments), widths, FAST), errors_at(weight, moments, widths, FAST), rtol=1e-4
        )


def gpu_free_ridge(weight: np.ndarray, moments: Moments) -> float:
    from comq_onnx.solve.ridge import choose_ridge

    return choose_ridge(weight, moments, Grid(4))


@pytest.mark.parametrize("grid", [Grid(4, False), Grid(3), Grid(4, False, block_size=20), Grid(4, per_tensor=True)])
def test_the_clip_is_the_one_of_least_rounding_error(grid: Grid) -> None:
    from comq_onnx.solve.grid import fit_mse, rtn

    weight = np.random.default_rng(0).standard_normal((2, 30, 50)).astype(np.float32) ** 3
    for ours, theirs in zip(clip.fit_mse(as_tensor(weight), grid), fit_mse(weight, grid), strict=True):
        assert np.array_equal(on_host(ours), theirs)
    assert np.array_equal(clip.round_to_nearest(as_tensor(weight), grid).codes, rtn(weight, grid).codes)


def test_moments_that_are_off_by_more_than_the_ridge_get_a_larger_one() -> None:
    _, moments = layer("white", 2, 5, 40)
    broken = moments.gram.copy()
    broken[1, 0, 1] = broken[1, 1, 0] = 3  # no Gram has more off its diagonal than on it
    posed = problem.pose(problem.arrange(tensors(replace(moments, gram=broken))), Grid(4), 0.1)
    m = posed.unit * posed.root[:, :, None]
    np.testing.assert_allclose(on_host(m.mT @ m), on_host(posed.h), atol=1e-3)
    assert float(posed.h[1, 0, 0]) > 2 > float(posed.h[0, 0, 0])
    with pytest.raises(np.linalg.LinAlgError):
        problem.pose(problem.arrange(tensors(replace(moments, gram=broken * np.nan))), Grid(4), 0.1)


def test_moments_are_the_same_about_the_mean_by_group_and_of_some_inputs() -> None:
    _, moments = layer("offset", 3, 5, 8)
    some = np.array([5, 0, 3])

    def forms(given: Moments) -> Iterator[Moments]:
        halves = given.folds()
        assert halves is not None
        yield from (given.centred(), given.group(1), given.groups(np.array([2, 0])), given.take(some), *halves)

    for ours, theirs in zip(forms(tensors(moments)), forms(moments), strict=True):
        for name in MOMENTS:
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            if b is not None:
                np.testing.assert_allclose(on_host(a), b, rtol=1e-9, atol=1e-12)


# The step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "inputs", "columns", "scales"), [(1, 50, 70, 1), (2, 17, 40, 3), (1, 1, 5, 1), (3, 5, 33, 2)]
)
def test_the_triton_kernel_takes_the_steps_that_torch_takes(
    groups: int, inputs: int, columns: int, scales: int
) -> None:
    device = torch_device()
    if device.type != "cuda" and not step.is_interpreted():
        pytest.skip("Triton runs on a GPU, or interpreted: test_the_triton_kernel_is_right_as_triton_interprets_it")
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=random).to(device)

    v, a, own = 3 * normal(groups, inputs, columns), 0.1 * normal(groups, inputs, inputs), normal(groups, inputs).abs()
    scale, low = normal(groups, scales, columns).abs() + 0.1, -8 - normal(groups, scales, columns).round().abs()
    block = torch.randint(0, scales, (groups, inputs), generator=random).to(device)
    given = torch.randint(-8, 8, (groups, inputs + 9, columns), generator=random).float().to(device)
    found = []
    for run in (step.step_in_torch, step.step_in_triton):
        targets, codes = v.clone(), given.clone()
        # codes are a part of a larger array, as the solver has them
        change = run(targets, a, own + 0.5, scale, low, low + 15, block, codes[:, 4 : 4 + inputs])
        found.append((codes, change, targets))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert (found[0][0] != given)[:, 4 : 4 + inputs].float().mean() > 0.2
    assert torch.equal(found[0][0][:, :4], given[:, :4])


def test_the_triton_kernel_is_right_as_triton_interprets_it() -> None:
    pytest.importorskip("triton", reason="pip install triton for the kernel of the GPU")
    if torch_device().type == "cuda":
        pytest.skip("it runs as it is")
    # Triton decides when it is imported whether it interprets
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k",
         "takes_the_steps or (as_arrays_are and groups and per)"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout
