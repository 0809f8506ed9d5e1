"""Test that .wav files of every kind are read as windows of one rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inputs import Input, an_input
from scipy.io import wavfile
from sounds import RATE, tone, wave_net

import comq_onnx
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Clues, Samples

WAVE = [an_input(None, 400, name="wave")]


def load(folder: Path, inputs: list[Input] = WAVE, count: int = 256, **said: Any) -> Samples:
    """Load the .wav files of a folder, with the model there too."""
    return load_samples(folder, inputs, SampleOptions(**said), count, clues=Clues(folder))


@pytest.mark.parametrize(
    ("name", "scale", "offset"),
    [("uint8", 128, 128), ("int16", 2**15, 0), ("int32", 2**31, 0), ("float32", 1, 0), ("float64", 1, 0)],
)
def test_every_kind_of_points_becomes_numbers_up_to_1(tmp_path: Path, name: str, scale: float, offset: float) -> None:
    wavfile.write(tmp_path / "a.wav", RATE, (tone() * scale + offset).astype(name))
    made = load(tmp_path).arrays["wave"]
    assert made.shape == (2, 400)
    # a step of 8 bits
    np.testing.assert_allclose(made.ravel(), tone()[:800], atol=1 / 128)


def test_channels_are_averaged(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "a.wav", RATE, np.stack([tone(), 3 * tone()], 1).astype(np.float32))
    np.testing.assert_allclose(load(tmp_path).arrays["wave"].ravel(), 2 * tone()[:800], atol=1e-6)


def test_a_rate_beside_the_model_is_kept(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 4000, "do_normalize": False}))
    wavfile.write(tmp_path / "a.wav", RATE, tone(4000).astype(np.float32))
    made = load(tmp_path)
    # away from the ends, where a filter of resampling sees silence
    np.testing.assert_allclose(made.arrays["wave"].ravel()[100:1900], tone(2000, rate=4000)[100:1900], atol=0.01)
    assert made.notes == ("sound at 4000 Hz, as it is, as preprocessor_config.json beside the model says",)


def test_windows_are_normalized_where_the_configuration_asks(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": RATE, "do_normalize": True}))
    wavfile.write(tmp_path / "a.wav", RATE, (0.1 + 0.01 * tone(4000)).astype(np.float32))
    made = load(tmp_path).arrays["wave"]
    np.testing.assert_allclose(made.mean(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(made.std(axis=1), 1, atol=1e-2)


def test_files_of_other_rates_follow_the_first(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "a.wav", RATE, tone(800).astype(np.float32))
    wavfile.write(tmp_path / "b.wav", 2 * RATE, tone(1600, rate=2 * RATE).astype(np.float32))
    made = load(tmp_path)
    assert made.arrays["wave"].shape == (4, 400)
    np.testing.assert_allclose(made.arrays["wave"][2, 100:], tone(800)[100:400], atol=0.01)
    assert made.notes == ("sound taken at 8000 Hz, the rate of a.wav: no configuration lies beside the model",)


def test_a_free_length_is_that_of_the_shortest_file_or_the_one_asked_for(tmp_path: Path) -> None:
    for name, points in (("a", 900), ("b", 2000)):
        wavfile.write(tmp_path / f"{name}.wav", RATE, tone(points).astype(np.float32))
    free = [an_input(None, None, name="wave")]
    assert load(tmp_path, free).arrays["wave"].shape == (3, 900)
    assert load(tmp_path, free, length=500).arrays["wave"].shape == (5, 500)
    assert load(tmp_path, free, count=2).arrays["wave"].shape == (2, 900)


def test_a_recurrent_state_starts_at_zero_and_the_rate_is_told(tmp_path: Path) -> None:
    wavfile.write(tmp_path / "a.wav", RATE, tone(1000).astype(np.float32))
    inputs = [
        an_input(None, 400, name="input"),
        an_input(2, None, 8, name="state"),
        Input("sr", np.dtype(np.int64), ()),
    ]
    made = load(tmp_path, inputs)
    feeds = next(made.batches(4))
    assert feeds["input"].shape == (1, 400)
    assert feeds["state"].shape == (2, 1, 8)
    assert not feeds["state"].any()
    assert feeds["sr"] == RATE


def test_a_model_of_waveforms_is_quantized_from_sound(tmp_path: Path) -> None:
    onnx.save(wave_net(), tmp_path / "model.onnx")
    for i in range(20):
        wavfile.write(tmp_path / f"{i}.wav", RATE, tone(1200, 200 + 50 * i).astype(np.float32))
    report = comq_onnx.quantize(
        tmp_path / "model.onnx", tmp_path / "q.onnx", tmp_path, bits=8, device="cpu", length=400
    )
    assert report.samples["used"] == 53
    assert report.outputs[0].sqnr_db >= 25
