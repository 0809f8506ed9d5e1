"""Test how files of pictures become the input of a model, and which are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from inputs import GREY, NCHW, NHWC, VECTOR, Input
from pictures import picture
from PIL import Image

import comq_onnx
from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.images.preprocess import PREPROCESS
from comq_onnx.samples.load import load_samples
from models import cnn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write pictures of several kinds, some in folders below, beside a file that is none."""
    (tmp_path / "pictures" / "below" / "deeper").mkdir(parents=True)
    root = tmp_path / "pictures"
    picture(seed=0).save(root / "a.png")
    picture(seed=1).save(root / "b.JPG", format="JPEG")
    picture(seed=2).convert("L").save(root / "below" / "c.png")
    picture(seed=3).convert("RGBA").save(root / "below" / "d.png")
    picture(seed=4).convert("P").save(root / "below" / "deeper" / "e.gif")
    picture(seed=5).convert("CMYK").save(root / "f.jpeg")
    picture(seed=6).convert("LA").save(root / "g.png")
    picture(seed=7).convert("1").save(root / "h.bmp")
    (root / "notes.txt").write_text("not a picture")
    return root


@pytest.mark.parametrize("preset", PREPROCESS)
@pytest.mark.parametrize("inputs", [NCHW, NHWC, GREY], ids=["nchw", "nhwc", "grey"])
def test_pictures_of_every_kind_become_an_input(folder: Path, preset: str, inputs: list[Input]) -> None:
    if inputs is GREY and len(PREPROCESS[preset].mean) == 3:
        pytest.skip("three means for one channel")
    array = load_samples(folder, inputs, SampleOptions(preset)).arrays["image"]
    assert array.shape == (8, *(inputs[0].dims or ())[1:])
    assert array.dtype == np.float32
    assert np.isfinite(array).all()
    assert array.std() > 0


def test_three_means_do_not_fit_a_grey_input(folder: Path) -> None:
    with pytest.raises((SamplesError, OptionError)):
        load_samples(folder, GREY, SampleOptions("imagenet"))


@pytest.mark.parametrize(("preset", "low", "high"), [("0-1", 0, 1), ("raw", 0, 255), ("imagenet-inception", -1, 1)])
def test_white_and_black_become_the_ends_of_the_range(tmp_path: Path, preset: str, low: float, high: float) -> None:
    Image.new("RGB", (20, 20), "black").save(tmp_path / "a.png")
    Image.new("RGB", (20, 20), "white").save(tmp_path / "b.png")
    array = load_samples(tmp_path, NCHW, SampleOptions(preset)).arrays["image"]
    # 255 times the float32 nearest 1 / 255 is 1 to the last bit or two
    np.testing.assert_allclose(array[0], low, atol=1e-6)
    np.testing.assert_allclose(array[1], high, rtol=1e-6)


def test_the_imagenet_numbers_are_those_everybody_uses(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (255, 128, 0)).save(tmp_path / "a.png")
    array = load_samples(tmp_path, NCHW, SampleOptions("imagenet")).arrays["image"][0]
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    np.testing.assert_allclose(array.mean(axis=(1, 2)), expected, rtol=1e-5)


def test_nchw_and_nhwc_hold_the_same_numbers(folder: Path) -> None:
    first = load_samples(folder, NCHW, SampleOptions("imagenet")).arrays["image"]
    last = load_samples(folder, NHWC, SampleOptions("imagenet")).arrays["image"]
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    left_white = Image.new("RGB", (40, 40), "black")
    left_white.paste("white", (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show": left becomes top
    left_white.save(tmp_path / "a.png", exif=exif)
    array = load_samples(tmp_path, NCHW, SampleOptions("0-1")).arrays["image"][0, 0]
    assert array[:4].min() > 0.9
    assert array[-4:].max() < 0.1


def test_the_centre_is_cropped(tmp_path: Path) -> None:
    wide = Image.new("RGB", (80, 20), "black")
    wide.paste("white", (30, 0, 50, 20))
    wide.save(tmp_path / "a.png")
    assert load_samples(tmp_path, NCHW, SampleOptions("0-1")).arrays["image"].min() > 0.9


def test_a_json_file_says_how_to_preprocess(folder: Path, tmp_path: Path) -> None:
    how = tmp_path / "how.json"
    how.write_text(json.dumps({"scale": 1.0, "mean": 127.5, "std": [127.5] * 3, "channels": "bgr", "resize": 16}))
    array = load_samples(folder, NCHW, SampleOptions(str(how))).arrays["image"]
    same = tmp_path / "same.json"
    same.write_text(json.dumps({"mean": [0.5], "std": 0.5, "resize": 16}))
    rgb = load_samples(folder, NCHW, SampleOptions(str(same))).arrays["image"]
    # x / 127.5 - 1 either way; float32 keeps 6 digits of numbers near 1
    np.testing.assert_allclose(array[:, ::-1], rgb, atol=2e-6)


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "3", '{"means": [1]}', '{"mean": "big"}'],
)
def test_a_json_file_that_is_no_preprocessing_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "how.json").write_text(text)
    with pytest.raises(OptionError, match=r"how\.json"):
        load_samples(folder, NCHW, SampleOptions(str(tmp_path / "how.json")))


def test_a_deviation_of_zero_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "how.json").write_text('{"std": 0}')
    with np.errstate(all="ignore"), pytest.raises((OptionError, SamplesError)):
        load_samples(folder, NCHW, SampleOptions(str(tmp_path / "how.json")))


@pytest.mark.parametrize("field", ["resample", "channels", "layout", "crop", "resize", "mean", "std"])
def test_a_json_file_with_values_that_cannot_work_is_refused(folder: Path, tmp_path: Path, field: str) -> None:
    bad = {"resample": "magic", "channels": "xyz", "layout": "hwcn", "crop": 0, "resize": -3}
    text = json.dumps({field: bad.get(field, [1, 2])})
    (tmp_path / "how.json").write_text(text)
    with pytest.raises((OptionError, SamplesError)):
        load_samples(folder, NCHW, SampleOptions(str(tmp_path / "how.json")))


def test_a_preset_that_does_not_exist_is_refused_by_the_names_of_those_that_do(folder: Path) -> None:
    with pytest.raises(OptionError, match="imagenet"):
        load_samples(folder, NCHW, SampleOptions("imagenot"))


def test_pictures_without_a_preprocessing_are_refused(folder: Path) -> None:
    with pytest.raises(SamplesError, match="--preprocess"):
        load_samples(folder, NCHW)


def test_pictures_do_not_fit_a_model_of_vectors_or_several_inputs(folder: Path) -> None:
    for inputs in (VECTOR, [*NCHW, *VECTOR]):
        with pytest.raises(SamplesError, match="one input of rank 4"):
            load_samples(folder, inputs, SampleOptions("0-1"))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", "half"])
def test_a_picture_that_cannot_be_read_is_named(folder: Path, content: bytes | str) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(SamplesError, match=r"broken\.png: not a readable image"):
        load_samples(folder, NCHW, SampleOptions("0-1"))


@pytest.mark.parametrize("share", [0.9, 0.4], ids=["warning", "error"])
def test_a_picture_too_large_to_be_one_is_refused(folder: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(folder / "a.png") as opened:
        pixels = opened.width * opened.height
    # Pillow warns from its limit on, and fails from twice the limit on
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(share * pixels))
    with pytest.raises(SamplesError, match="decompression bomb"):
        load_samples(folder / "a.png", NCHW, SampleOptions("imagenet"))


def test_no_more_pictures_than_asked_for_are_read_and_the_seed_chooses(folder: Path) -> None:
    first, again, other = (
        load_samples(folder, NCHW, SampleOptions("0-1"), 3, seed).arrays["image"] for seed in (1, 1, 2)
    )
    assert len(first) == 3
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_picture_smaller_than_the_input_is_enlarged(tmp_path: Path) -> None:
    picture(5, 9).save(tmp_path / "a.png")
    assert load_samples(tmp_path, NCHW, SampleOptions("0-1")).arrays["image"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("nhwc", [False, True])
def test_a_folder_of_pictures_is_quantized_from(tmp_path: Path, nhwc: bool) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(36):
        picture(seed=i).save(tmp_path / "photos" / f"{i}.png")
    report = comq_onnx.quantize(
        cnn(nhwc=nhwc), tmp_path / "q.onnx", tmp_path / "photos", bits=8, preprocess="imagenet", device="cpu"
    )
    assert report.samples["used"] == 32
    assert report.outputs[0].sqnr_db >= 25
