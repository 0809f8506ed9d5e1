"""Test ONNX test data as samples: input_<i>.pb in test_data_set_<n>."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from inputs import an_input
from onnx import numpy_helper

import comq_onnx
from comq_onnx.samples.load import load_samples
from models import mlp, normal

TWO = [an_input(None, 4, name="a"), an_input(None, 3, name="b")]


def save(folder: Path, number: int, file: str, array: np.ndarray, name: str = "") -> None:
    """Save one tensor of a test data set."""
    path = folder / f"test_data_set_{number}" / file
    path.parent.mkdir(exist_ok=True)
    onnx.save_tensor(numpy_helper.from_array(array, name), path)


@pytest.mark.parametrize("named", [False, True])
def test_a_set_is_one_feed_by_name_or_by_number(tmp_path: Path, named: bool) -> None:
    for i in range(12):
        # by name the numbers do not count
        save(tmp_path, i, f"input_{int(named)}.pb", normal(1, 4, seed=i), "a" if named else "")
        save(tmp_path, i, f"input_{1 - named}.pb", normal(1, 3, seed=i), "b" if named else "")
        save(tmp_path, i, "output_0.pb", normal(1, 9, seed=i), "y")
    made = load_samples(tmp_path, TWO)
    order = sorted(range(12), key=str)
    np.testing.assert_array_equal(made.arrays["a"], np.stack([normal(1, 4, seed=i) for i in order]))
    np.testing.assert_array_equal(made.arrays["b"], np.stack([normal(1, 3, seed=i) for i in order]))
    assert made.per_item == {"a", "b"}


def test_test_data_are_quantized_from(tmp_path: Path) -> None:
    for i in range(40):
        save(tmp_path, i, "input_0.pb", normal(1, 32, seed=i))
    report = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", tmp_path, bits=8, device="cpu")
    assert report.samples["used"] == 35
    assert report.outputs[0].sqnr_db >= 25
