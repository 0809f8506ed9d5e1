"""Test how pictures become an input: options over presets, and the configurations that lie beside models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inputs import NCHW, Input, an_input
from pictures import picture
from PIL import Image

import comq_onnx
from comq_onnx.model.source import read_model
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.clues import channels_last
from comq_onnx.samples.images.preprocess import PREPROCESS, Preprocess, find_preprocess
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Clues
from models import cnn

FREE = [an_input(None, None, None, None, name="image")]
HF = {
    "do_resize": True, "size": {"shortest_edge": 20}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip
TIMM = {
    "architecture": "resnet18",
    "pretrained_cfg": {
        "input_size": [3, 16, 16], "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "center",
        "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7],
    },
}  # fmt: skip


def found(folder: Path, name: str, config: dict[str, Any], **said: Any) -> Preprocess:
    """Return what the configuration of this name beside the model says, with options over it."""
    (folder / name).write_text(json.dumps(config))
    result = find_preprocess(SampleOptions(**said), folder)
    assert result is not None
    return result.preprocess


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Make a picture that is wider than high, in a folder without a model."""
    (tmp_path / "photos").mkdir()
    picture(40, 30).save(tmp_path / "photos" / "a.png")
    return tmp_path / "photos"


def shown(source: Path, inputs: list[Input], folder: Path | None = None, **said: Any) -> np.ndarray:
    """Load the array of the pictures, with the model in `folder`."""
    return load_samples(source, inputs, SampleOptions(**said), clues=Clues(folder)).arrays["image"]


def test_a_configuration_of_hugging_face_says_it_all(tmp_path: Path) -> None:
    how = Preprocess(
        mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), resize=20, crop=(16, 16), crop_pct=1.0, resample="bicubic"
    )
    assert found(tmp_path, "preprocessor_config.json", HF) == how
    assert found(tmp_path, "processor_config.json", {"image_processor": HF}) == how


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # ViT: both sides, whatever the shape
        ({"size": {"height": 18, "width": 17}, "do_center_crop": False}, {"resize": (18, 17), "crop": None}),
        ({"size": 18, "do_center_crop": False}, {"resize": (18, 18), "crop": None}),
        # CLIP as it was written before sizes had names
        ({"size": 18, "crop_size": 16}, {"resize": 18, "crop": 16}),
        # ConvNeXt
        ({"size": {"shortest_edge": 16}, "crop_pct": 0.8, "do_center_crop": False}, {"resize": 20, "crop": 16}),
        ({"do_resize": False}, {"resize": None}),
        ({"do_normalize": False}, {"mean": (0.0,), "std": (1.0,)}),
        ({"do_rescale": False}, {"scale": 1.0}),
        ({"rescale_factor": 1 / 127.5}, {"scale": 1 / 127.5}),
        ({"do_flip_channel_order": True}, {"channels": "bgr"}),
        ({"resample": 2}, {"resample": "bilinear"}),
    ],
)  # fmt: skip
def test_every_field_of_hugging_face_counts(tmp_path: Path, change: dict[str, Any], expected: dict[str, Any]) -> None:
    plain = found(tmp_path, "preprocessor_config.json", HF)
    assert found(tmp_path, "preprocessor_config.json", {**HF, **change}) == replace(plain, **expected)


def test_a_configuration_of_timm_says_it_all(tmp_path: Path) -> None:
    how = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), resize=20, crop=(16, 16), resample="bilinear")
    assert found(tmp_path, "config.json", TIMM) == how
    squashed = {**TIMM["pretrained_cfg"], "crop_mode": "squash"}  # type: ignore[dict-item]
    assert found(tmp_path, "config.json", squashed) == replace(how, resize=(20, 20))


def test_a_configuration_of_something_else_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 384}')
    assert find_preprocess(SampleOptions(), tmp_path) is None


def test_the_configuration_of_the_folder_above_counts_for_a_folder_onnx_alone(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF))
    for name in ("onnx", "other"):
        (tmp_path / name).mkdir()
    assert find_preprocess(SampleOptions(), tmp_path / "onnx") is not None
    assert find_preprocess(SampleOptions(), tmp_path / "other") is None


def test_options_win_over_a_configuration_and_over_a_preset(tmp_path: Path) -> None:
    plain = found(tmp_path, "preprocessor_config.json", HF)
    said = found(tmp_path, "preprocessor_config.json", HF, mean=(0.4,), crop=12, channels="bgr")
    assert said == replace(plain, mean=(0.4,), crop=12, channels="bgr")
    chosen = find_preprocess(SampleOptions("clip", std=(0.25,)), tmp_path)
    assert chosen is not None
    assert chosen.preprocess == replace(PREPROCESS["clip"], std=(0.25,))
    assert chosen.note is None


def test_a_configuration_named_by_an_option_is_read(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text(json.dumps(TIMM))
    named = find_preprocess(SampleOptions(str(tmp_path / "my.json")), None)
    assert named is not None
    assert named.preprocess == found(tmp_path, "config.json", TIMM)


def test_mean_and_deviation_alone_are_of_pixels_from_0_to_1(photo: Path) -> None:
    np.testing.assert_array_equal(
        shown(photo, NCHW, mean=(0.5,), std=(0.5,)), shown(photo, NCHW, preprocess="imagenet-inception")
    )


def test_the_report_tells_of_a_configuration_found(tmp_path: Path) -> None:
    onnx.save(cnn(), tmp_path / "model.onnx")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF))
    (tmp_path / "photos").mkdir()
    for i in range(12):
        picture(seed=i).save(tmp_path / "photos" / f"{i}.png")
    report = comq_onnx.plan(tmp_path / "model.onnx", tmp_path / "photos", device="cpu")
    assert (
        "preprocessing as preprocessor_config.json beside the model says: pixels 0..1, mean 0.1,0.2,0.3, "
        "std 0.5,0.6,0.7, resize 20, crop 16x16, rgb"
    ) in report.notes


# Geometry


def test_the_short_side_is_resized_and_the_centre_cropped(tmp_path: Path) -> None:
    Image.fromarray(np.arange(40, dtype=np.uint8)[None].repeat(20, 0)).save(tmp_path / "a.png")
    columns = shown(tmp_path, NCHW, preprocess="raw", resize=20, crop=16)[0, 0, 0]
    np.testing.assert_array_equal(columns, np.arange(12, 28))


def test_two_sides_squash_the_picture(tmp_path: Path) -> None:
    wide = Image.new("RGB", (80, 20), "black")
    wide.paste("white", (40, 0, 80, 20))
    wide.save(tmp_path / "a.png")
    array = shown(tmp_path, NCHW, preprocess="0-1", resize=(16, 16))[0, 0]
    assert array[:, 1].max() < 0.01
    assert array[:, -2].min() > 0.99


def test_a_model_of_any_size_gets_the_size_asked_for(photo: Path) -> None:
    free = [an_input(None, 3, None, None, name="image")]
    assert shown(photo, free, preprocess="raw").shape == (1, 3, 224, 224)
    assert shown(photo, free, preprocess="raw", crop=(20, 10)).shape == (1, 3, 20, 10)
    assert shown(photo, free, preprocess="raw", resize=(20, 10)).shape == (1, 3, 20, 10)


def test_clip_is_not_cropped_from_something_larger(tmp_path: Path) -> None:
    Image.fromarray(np.arange(16, dtype=np.uint8)[None].repeat(16, 0) * 10).convert("RGB").save(tmp_path / "a.png")
    how = {"mean": (0.0,), "std": (1.0,)}
    np.testing.assert_allclose(shown(tmp_path, NCHW, preprocess="clip", **how)[0, 0, 0] * 255, np.arange(16) * 10, 1e-5)


# Layout, channels, types


def test_the_layout_of_free_dimensions_is_read_off_the_graph(tmp_path: Path, photo: Path) -> None:
    model = cnn(nhwc=True)
    for d in model.graph.input[0].type.tensor_type.shape.dim:
        d.Clear()
    onnx.save(model, tmp_path / "nhwc.onnx")
    onnx.save(cnn(), tmp_path / "nchw.onnx")
    assert channels_last(read_model(tmp_path / "nhwc.onnx")) == {"image": True}
    assert channels_last(read_model(tmp_path / "nchw.onnx")) == {"image": False}
    seen = load_samples(photo, FREE, SampleOptions("raw", crop=16), clues=Clues(channels_last={"image": True}))
    assert seen.arrays["image"].shape == (1, 16, 16, 3)


def test_the_layout_asked_for_wins(photo: Path) -> None:
    assert shown(photo, FREE, preprocess="raw", crop=16, layout="nhwc").shape == (1, 16, 16, 3)
    assert shown(photo, FREE, preprocess="raw", crop=16, layout="nchw").shape == (1, 3, 16, 16)


def test_grey_pictures_for_a_model_of_free_channels(photo: Path) -> None:
    assert shown(photo, FREE, preprocess="raw", crop=16, channels="grey").shape == (1, 1, 16, 16)


def test_bgr_is_rgb_the_other_way_round(photo: Path) -> None:
    rgb, bgr = (shown(photo, NCHW, preprocess="raw", channels=c) for c in ("rgb", "bgr"))
    np.testing.assert_array_equal(rgb, bgr[:, ::-1])


def test_means_are_in_the_order_of_the_channels(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (200, 100, 50)).save(tmp_path / "a.png")
    made = shown(tmp_path, NCHW, preprocess="raw", channels="bgr", mean=(50.0, 100.0, 200.0))
    assert not made.any()


@pytest.mark.parametrize(("dtype", "said"), [(np.uint8, {}), (np.int8, {"mean": (128.0,), "preprocess": "raw"})])
def test_inputs_of_whole_numbers_get_the_pixels(photo: Path, dtype: Any, said: dict[str, Any]) -> None:
    made = shown(photo, [an_input(None, 3, 16, 16, name="image", dtype=dtype)], **said)
    assert made.dtype == dtype
    offset = 128 if dtype is np.int8 else 0
    np.testing.assert_array_equal(made.astype(int) + offset, shown(photo, NCHW, preprocess="raw").astype(int))


def test_values_take_the_type_asked_for_on_their_way(photo: Path) -> None:
    full, half = (shown(photo, NCHW, preprocess="imagenet", dtype=d) for d in (None, "float16"))
    np.testing.assert_array_equal(half, full.astype(np.float16).astype(np.float32))
    assert (half != full).any()


def test_a_picture_of_16_bits_is_not_all_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 0x8080, np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(shown(tmp_path, NCHW, preprocess="raw"), 128)


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".png", ".jpg", ".tiff"])
def test_the_formats_of_pictures(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (20, 20), (200, 100, 50)).save(tmp_path / f"a{suffix}")
    made = shown(tmp_path, NCHW, preprocess="raw")
    # what the lossy ones lose of a plain colour
    np.testing.assert_allclose(made[0, :, 8, 8], [200, 100, 50], atol=3)


def test_a_pattern_of_files_is_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for i, name in enumerate(["a1.png", "a2.png", "below/a3.png", "b.png"]):
        picture(seed=i).save(tmp_path / name)
    assert len(shown(tmp_path / "a*.png", NCHW, preprocess="raw")) == 2
    assert len(shown(tmp_path / "**" / "a*.png", NCHW, preprocess="raw")) == 3


def test_the_report_tells_what_of_a_folder_was_left_out(photo: Path) -> None:
    (photo / "lines.txt").write_text("text")
    (photo / ".hidden.png").write_bytes(b"no picture")
    assert load_samples(photo, NCHW, SampleOptions("raw")).notes == (
        f"{photo}: files of images taken, left out 1 of text",
    )
