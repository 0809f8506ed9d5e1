"""Test transposed convolutions taken apart into phases: what each phase computes is what ONNX Runtime does there."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from conftest import HAS_TORCH, as_tensor
from operators import computed, kind_of, mostly, whole, windows

from comq_onnx.arrays import on_host
from comq_onnx.model.transposed import ConvTranspose, Phases


def check_phases(x: np.ndarray, weight: np.ndarray, attributes: dict[str, Any]) -> bool:
    """Compare every output of every phase, and that rows without an output are 0; False where it is not divided."""
    expected = computed("ConvTranspose", [x, weight], attributes)
    whole_kind = kind_of(ConvTranspose, "ConvTranspose", weight, attributes)
    kind = whole_kind.solved_as
    if kind is whole_kind:
        return False
    assert isinstance(kind, Phases)
    matrix, rows = kind.to_matrix(weight), kind.rows(x)
    assert rows.dtype == np.float32
    assert rows.shape == (kind.groups, kind.positions(x), kind.inputs)
    assert matrix.shape == (kind.groups, kind.outputs, kind.inputs)
    assert np.array_equal(kind.from_matrix(matrix), weight)

    pick = np.random.default_rng(0).permutation(rows.shape[1])[: rows.shape[1] // 2 + 1]
    assert np.array_equal(kind.rows(x, pick), rows[:, pick])
    if HAS_TORCH:
        assert np.array_equal(on_host(kind.rows(as_tensor(x))), rows)

    size = x.shape[2:]
    begin, strides = whole_kind.cropped(size)[0], whole_kind.strides
    first = [b // s for b, s in zip(begin, strides, strict=True)]
    found = np.zeros_like(expected)
    reached = np.zeros(expected.shape[2:], int)
    grid = [(b + n - 1) // s - f + 1 for b, n, s, f in zip(begin, expected.shape[2:], strides, first, strict=True)]
    for phase, its_rows, its_matrix in zip(itertools.product(*map(range, strides)), rows, matrix, strict=True):
        y = (its_rows @ its_matrix.T).reshape(len(x), *grid, -1)
        for at in itertools.product(*map(range, grid)):
            u = tuple(s * (f + i) + r - b for s, f, i, r, b in zip(strides, first, at, phase, begin, strict=True))
            if all(0 <= c < n for c, n in zip(u, expected.shape[2:], strict=True)):
                found[(slice(None), slice(None), *u)] = y[(slice(None), *at)]
                reached[u] += 1
            else:
                assert not its_rows.reshape(len(x), *grid, -1)[(slice(None), *at)].any()
    assert (reached == 1).all()
    assert np.array_equal(found, expected)
    return True


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_phases_make_up_a_transposed_convolution(rank: int) -> None:
    divided = []

    def check(case: Any) -> None:
        x_shape, weight_shape, _, attributes, seed = case
        rng = np.random.default_rng(seed)
        divided.append(check_phases(whole(rng, x_shape), whole(rng, weight_shape), attributes))

    mostly(check, windows(rank, True), examples=100)
    assert 2 <= sum(divided) < len(divided)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [1, 6, 7])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
def test_phases_with_automatic_pads(auto_pad: str, size: int, stride: int, kernel: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = whole(rng, (2, 3, size)), whole(rng, (3, 4, kernel))
    assert check_phases(x, weight, {"auto_pad": auto_pad, "strides": [stride]})


def test_a_kernel_that_the_stride_divides_has_no_place_for_zeros() -> None:
    kind = kind_of(ConvTranspose, "ConvTranspose", np.zeros((6, 4, 4, 2), np.float32), {"strides": [2, 2]}).solved_as
    assert (kind.groups, kind.outputs, kind.inputs) == (4, 4, 6 * 2)
    rows = kind.rows(np.ones((1, 6, 3, 5), np.float32))
    # at both ends a tap is outside, and a phase that has no output there has no row
    assert rows.shape == (4, 4 * 5, 12)
    assert rows.sum() == 4 * 6 * (3 + 3) * 5


def test_a_kernel_as_large_as_the_stride_reads_single_numbers() -> None:
    kind = kind_of(ConvTranspose, "ConvTranspose", np.zeros((6, 4, 2, 2), np.float32), {"strides": [2, 2]}).solved_as
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 5)).astype(np.float32)
    rows = kind.rows(x)
    assert np.array_equal(rows, np.stack([x.transpose(0, 2, 3, 1).reshape(-1, 6)] * 4))
