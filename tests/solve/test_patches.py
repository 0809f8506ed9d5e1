"""Test that the Gram of patches is that of a convolution's rows; the rows themselves are tested in test_operators.

Inputs are small whole numbers where equality is asked for: then every sum is exact in float32 in whatever order.
"""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from conftest import HAS_TORCH, Kind, as_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from comq_onnx.arrays import on_host
from comq_onnx.model.convolutions import Conv
from comq_onnx.solve import patches
from comq_onnx.solve.patches import patch_gram, patch_sum, pays

seeds = st.integers(0, 2**32 - 1)


def whole(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(np.float32)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def rows(x: np.ndarray, kernel: tuple[int, ...], pads: tuple[int, ...] = (0, 0, 0, 0)) -> np.ndarray:
    """Return the rows [patches, in] of a convolution, built one and all."""
    conv = Conv((1, x.shape[1], *kernel), 1, (1, 1), (1, 1), pads, "NOTSET")
    return np.asarray(conv.rows(x)[0])


def padded(x: np.ndarray, pads: tuple[int, ...]) -> np.ndarray:
    top, left, bottom, right = pads
    return np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)])


def assert_within_rounding(found: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Check a float32 sum of p products: in any order it is off by at most p + 1 roundings of the sum of magnitudes."""
    exact = a.T.astype(np.float64) @ b
    magnitudes = np.abs(a).T.astype(np.float64) @ np.abs(b)
    assert (np.abs(found - exact) <= (len(a) + 1) * np.finfo(np.float32).eps * magnitudes).all()


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Draw an input's shape, pads (also beyond the kernel's reach) and a kernel (also as large as the padded image)."""
    n, channels = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    pads = tuple(draw(st.lists(st.integers(0, 3), min_size=4, max_size=4)))
    kh = draw(st.integers(1, min(5, height + pads[0] + pads[2])))
    kw = draw(st.integers(1, min(5, width + pads[1] + pads[3])))
    return (n, channels, height, width), pads, (kh, kw)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(convolutions(), seeds)
def test_the_gram_of_patches_is_the_gram_of_the_rows(
    case: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], seed: int
) -> None:
    shape, pads, kernel = case
    rng = np.random.default_rng(seed)
    x, y = whole(rng, shape), whole(rng, shape)
    a, b = padded(x, pads), padded(y, pads)
    rows_x, rows_y = rows(x, kernel, pads), rows(y, kernel, pads)

    gram = patch_gram(a, a, kernel)
    assert gram.dtype == np.float64
    assert np.array_equal(gram, rows_x.T @ rows_x)
    assert np.array_equal(patch_gram(a, b, kernel), rows_x.T @ rows_y)
    assert np.array_equal(patch_sum(a, kernel), rows_x.sum(axis=0))
    if HAS_TORCH:
        a, b = as_tensor(a), as_tensor(b)
        assert np.array_equal(on_host(patch_gram(a, a, kernel)), rows_x.T @ rows_x)
        assert np.array_equal(on_host(patch_gram(a, b, kernel)), rows_x.T @ rows_y)
        assert np.array_equal(on_host(patch_sum(a, kernel)), rows_x.sum(axis=0))


@pytest.mark.parametrize(
    ("size", "kernel"),
    [
        ((9, 9), (3, 3)),
        ((9, 7), (1, 7)),
        ((7, 9), (7, 1)),
        ((5, 6), (5, 6)),
        ((1, 8), (1, 3)),
        ((8, 1), (3, 1)),
        ((6, 6), (1, 1)),
        ((9, 9), (7, 7)),
    ],
)
@pytest.mark.parametrize(("n", "channels"), [(1, 1), (1, 4), (3, 1), (2, 3)])
def test_kernels_of_any_shape_have_the_gram_of_their_rows(
    size: tuple[int, ...], kernel: tuple[int, ...], n: int, channels: int
) -> None:
    rng = np.random.default_rng(0)
    a, b = whole(rng, (n, channels, *size)), whole(rng, (n, channels, *size))
    assert np.array_equal(patch_gram(a, a, kernel), rows(a, kernel).T @ rows(a, kernel))
    assert np.array_equal(patch_gram(a, b, kernel), rows(a, kernel).T @ rows(b, kernel))
    assert np.array_equal(patch_sum(a, kernel), rows(a, kernel).sum(axis=0))


def test_zeros_at_the_border_are_seen_in_both_inputs() -> None:
    """Leave zeros in one input where the other has none, as quantization may and relu does."""
    rng = np.random.default_rng(0)
    a, b = whole(rng, (2, 3, 8, 8)), whole(rng, (2, 3, 8, 8))
    a[:, :, :2] = a[..., -1] = b[..., :3] = 0
    blank = np.zeros_like(a)
    for left, right in itertools.product([a, b, blank], repeat=2):
        expected = rows(left, (3, 3)).T @ rows(right, (3, 3))
        assert np.array_equal(patch_gram(left, right, (3, 3)), expected)


def test_the_gram_of_real_numbers_is_within_their_rounding(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    a = normal(rng, (4, 8, 16, 16))
    b = a + np.float32(0.1) * normal(rng, a.shape)
    own, other = kind(a), kind(b)
    assert_within_rounding(on_host(patch_gram(own, own, (3, 3))), rows(a, (3, 3)), rows(a, (3, 3)))
    assert_within_rounding(on_host(patch_gram(own, other, (3, 3))), rows(a, (3, 3)), rows(b, (3, 3)))


@pytest.mark.parametrize("channels", [1, 3, 17, 64])
def test_the_gram_of_an_input_with_itself_is_exactly_symmetric(kind: Kind, channels: int) -> None:
    a = kind(normal(np.random.default_rng(0), (2, channels, 9, 8)))
    gram = on_host(patch_gram(a, a, (3, 2)))
    assert np.array_equal(gram, gram.T)


@pytest.mark.parametrize("budget", [1, 1000, 4000, 7000, 20_000])
def test_how_an_input_is_parted_does_not_matter(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Part by rows of patches, bands of an image, single images and several: 3.1 kB an image, 4 images."""
    rng = np.random.default_rng(0)
    shape, kernel = (4, 6, 13, 10), (3, 5)
    a, b = whole(rng, shape), whole(rng, shape)
    expected, together = rows(a, kernel).T @ rows(b, kernel), patch_gram(a, b, kernel)
    monkeypatch.setattr(patches, "LEAST_BYTES", budget)
    monkeypatch.setattr(patches, "MOST_BYTES", budget)
    assert np.array_equal(patch_gram(a, b, kernel), expected)
    assert np.array_equal(together, expected)

    visited = [rows(a[part], kernel) for part in patches.input_parts(shape, kernel)]
    assert len(visited) > 1 or budget == 20_000
    assert np.array_equal(np.concatenate(visited), rows(a, kernel))

    a, b = normal(rng, shape), normal(rng, shape)
    assert_within_rounding(patch_gram(a, b, kernel), rows(a, kernel), rows(b, kernel))


def test_no_array_is_as_large_as_the_rows() -> None:
    a = normal(np.random.default_rng(0), (8, 8, 66, 66))
    tracemalloc.start()
    patch_gram(a, a, (3, 3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows(a, (3, 3)).nbytes / 2


def test_it_pays_where_one_window_slides_over_many_places() -> None:
    ones = (1, 1)
    for channels, size in [(8, 56), (64, 56), (128, 28), (256, 14), (512, 7)]:
        assert pays((16, channels, size + 2, size + 2), (3, 3), ones, ones, 1)
    assert pays((16, 128, 11, 11), (5, 5), ones, ones, 1)
    assert pays((16, 64, 28, 34), (1, 7), ones, ones, 1)
    assert pays((16, 64, 34, 28), (7, 1), ones, ones, 1)


def test_it_does_not_pay_without_sharing_between_places() -> None:
    ones, shape = (1, 1), (16, 64, 30, 30)
    assert pays(shape, (3, 3), ones, ones, 1)
    assert not pays(shape, (1, 1), ones, ones, 1)
    assert not pays(shape, (3, 3), (2, 2), ones, 1)
    assert not pays(shape, (3, 3), (1, 2), ones, 1)
    assert not pays(shape, (3, 3), ones, (2, 2), 1)
    assert not pays(shape, (3, 3), ones, ones, 64)
    assert not pays((16, 64, 30), (3,), (1,), (1,), 1)
    assert not pays((1, 512, 9, 9), (3, 3), ones, ones, 1)
    assert not pays((16, 3, 58, 58), (3, 3), ones, ones, 1)
    assert not pays((4, 16, 18, 18), (5, 5), ones, ones, 1)
