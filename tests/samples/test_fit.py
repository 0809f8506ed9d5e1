"""Test which arrays fit the inputs of a model, and what is said of those that do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from inputs import VECTOR, an_input

from comq_onnx.errors import SamplesError
from comq_onnx.samples.load import load_samples
from models import normal


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"X": normal(8, 32)}, "arrays 'X'.* 'x'"),
        ({"x": normal(8, 32), "z": normal(8, 2)}, "'z'"),
        ({}, "none"),
        ({"x": normal(8, 31)}, r"\(8, 31\); expected \[n, 32\]"),
        ({"x": normal(8)}, r"\(8,\); expected \[n, 32\]"),
        ({"x": np.float32(3)}, "no samples"),
        ({"x": normal(2, 2, 2, 32)}, "expected"),
        ({"x": normal(0, 32)}, "no samples"),
        ({"x": normal(8, 32).astype(complex)}, "complex128"),
        ({"x": np.full((8, 32), "a")}, "the model wants float32"),
        (
            {"x": np.where(np.arange(8)[:, None] == 5, np.nan, normal(8, 32))},
            "NaN or Inf in 1 of 8 samples, first in 5",
        ),
        (
            {"x": np.where(np.arange(8)[:, None] >= 6, np.inf, normal(8, 32))},
            "NaN or Inf in 2 of 8 samples, first in 6",
        ),
        ({"x": np.full((8, 32), 1e300)}, "NaN or Inf"),
    ],
)
def test_arrays_that_cannot_fit_are_refused_with_what_was_expected(arrays: dict[str, Any], words: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(SamplesError, match=words):
        load_samples(arrays, VECTOR)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.uint8, np.float32),
        (np.int8, np.float32),
        (np.int16, np.float32),
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float16),
        (np.int64, np.int32),
        (np.int32, np.int64),
        (np.uint8, np.int64),
        (np.int64, np.bool_),
    ],
)
def test_dtypes_that_lose_nothing_are_converted(given: Any, wanted: Any) -> None:
    array = np.array([[0, 1], [1, 0], [1, 1]], given)
    got = load_samples({"x": array}, [an_input(None, 2, dtype=wanted)]).arrays["x"]
    assert got.dtype == wanted
    np.testing.assert_array_equal(got.astype(float), array.astype(float))


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.array([[300], [1]]), np.uint8),
        (np.array([[-1], [1]]), np.uint32),
        (np.array([[2], [1]]), np.bool_),
        (np.array([[1.5], [1.0]]), np.int64),
        (np.array([[1.0], [1.0]]), np.bool_),
    ],
)
def test_dtypes_that_lose_numbers_are_refused(array: np.ndarray, wanted: Any) -> None:
    with pytest.raises(SamplesError, match="the model wants"):
        load_samples({"x": array}, [an_input(None, 1, dtype=wanted)])


def test_arrays_of_different_counts_are_refused() -> None:
    inputs = [an_input(None, 4, name="a"), an_input(None, 4, name="b")]
    with pytest.raises(SamplesError, match=r"different numbers of samples: \{'a': 8, 'b': 7\}"):
        load_samples({"a": normal(8, 4), "b": normal(7, 4)}, inputs)


def test_arrays_with_one_axis_more_are_complete_tensors() -> None:
    samples = load_samples({"x": normal(10, 5, 32)}, [an_input(None, 32)])
    assert samples.per_item == {"x"}
    assert samples.batch_counts(16) == [1] * 10
    assert {b["x"].shape for b in samples.batches(16)} == {(5, 32)}


def test_inputs_that_fix_different_batches_are_refused() -> None:
    with pytest.raises(SamplesError, match=r"different batch sizes \[2, 4\]"):
        load_samples({"a": normal(8, 3), "b": normal(8, 3)}, [an_input(2, 3, name="a"), an_input(4, 3, name="b")])


TOKENS = [
    an_input(None, None, name="input_ids", dtype=np.int64),
    an_input(None, None, name="attention_mask", dtype=np.int64),
]
PAST = [
    an_input(None, None, name="position_ids", dtype=np.int64),
    an_input(None, 2, None, 4, name="past.key", dtype=np.float32),
]


def test_a_decoder_needs_no_more_than_its_tokens() -> None:
    ids = np.arange(12).reshape(3, 4)
    found = load_samples({"input_ids": ids}, [*TOKENS, *PAST])
    assert "'attention_mask', 'position_ids', 'past.key'" in found.notes[0]
    (feeds,) = found.batches(3)
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((3, 4)))
    np.testing.assert_array_equal(feeds["position_ids"], [range(4)] * 3)
    assert feeds["past.key"].shape == (3, 2, 0, 4)
    # positions follow from a mask that is given
    mask = np.int64([[0, 1, 1, 1]] * 3)
    (feeds,) = load_samples({"input_ids": ids, "attention_mask": mask}, [*TOKENS, *PAST]).batches(3)
    np.testing.assert_array_equal(feeds["position_ids"], [[0, 0, 1, 2]] * 3)


def test_a_mask_that_may_tell_padding_must_be_given() -> None:
    ids = np.ones((3, 4), np.int64)
    with pytest.raises(SamplesError, match="arrays 'input_ids'; the model has inputs 'input_ids', 'attention_mask'"):
        load_samples({"input_ids": ids}, TOKENS)
    kinds = an_input(None, None, name="token_type_ids", dtype=np.int64)
    (feeds,) = load_samples({"input_ids": ids, "attention_mask": ids}, [*TOKENS, kinds]).batches(3)
    np.testing.assert_array_equal(feeds["token_type_ids"], np.zeros((3, 4)))
