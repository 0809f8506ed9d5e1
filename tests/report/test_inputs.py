"""Test how the report describes samples."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from comq_onnx.report.inputs import describe
from models import normal


@pytest.mark.parametrize(
    ("shape", "pictures"),
    [((20, 3, 40, 40), 6), ((20, 40, 30, 3), 6), ((20, 1, 28, 28), 6), ((3, 1, 300, 200), 3), ((20, 3, 4, 4), 0),
     ((20, 7, 40, 40), 0), ((20, 40), 0)],
)  # fmt: skip
def test_what_looks_like_images_is_pictured(shape: tuple[int, ...], pictures: int) -> None:
    (given,) = describe({"x": normal(*shape)})
    assert len(given.pictures) == pictures
    assert bool(given.values) is not bool(pictures)
    assert given.shape == shape[1:]


def test_a_picture_is_the_sample() -> None:
    import base64

    array = np.zeros((1, 3, 40, 30), np.float32)
    array[0, 0, :, :15] = 2.0  # red on the left, black on the right
    (given,) = describe({"x": array})
    picture = Image.open(io.BytesIO(base64.b64decode(given.pictures[0].split(",")[1]))).convert("RGB")
    assert picture.size == (90, 120) or picture.size == (60, 80)
    assert picture.getpixel((3, 40)) == (255, 0, 0)
    assert picture.getpixel((picture.width - 3, 40)) == (0, 0, 0)


def test_tokens_and_texts_are_shown_as_they_are() -> None:
    found = describe({"ids": np.arange(12).reshape(2, 6), "text": np.array([["a"], ["b"]], object)})
    assert found[0].values == ("0", "1", "2", "3", "4", "5")
    assert (found[0].low, found[0].high) == (0.0, 11.0)
    assert (found[1].values, found[1].low) == (("a",), None)
