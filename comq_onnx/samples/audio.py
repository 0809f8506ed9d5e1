"""Read sound as samples: .wav files cut into windows of the waveform that the model takes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.model_folder import find_beside, parse_json
from comq_onnx.samples.samples import AnyArray, Clues, ModelInput, names_of

AUDIO_SUFFIXES = frozenset({".wav"})
DEFAULT_LENGTH = 16_000  # points, where the model leaves the length free


def read_sounds(
    paths: Sequence[Path], inputs: Sequence[ModelInput], options: SampleOptions, clues: Clues, count: int, seed: int
) -> tuple[dict[str, AnyArray], list[str]]:
    """Read up to `count` windows of .wav files, drawn with `seed`: (arrays by input name, notes of what was decided).

    Channels are averaged and points lie in -1..1; a configuration beside the model says at which rate, and whether each
    window is normalized. The window goes to the one input that takes a waveform. An input named like a sampling rate
    gets it, other ones of floats (a recurrent state) get zeros. Raises SamplesError, and OptionError for a --length
    that the model does not take.
    """
    info = wave_input(inputs)
    fixed = info.dims[-1] if info.dims else None
    rate, normalize, notes = _read_config(clues)
    if fixed is not None and options.length is not None and options.length != fixed:
        raise OptionError(f"--length {options.length}: {info.name!r} has {fixed} points, always")
    rng = np.random.default_rng(seed)
    drawn = [paths[i] for i in sorted(rng.permutation(len(paths))[:count].tolist())]
    # a folder may hold more than memory does
    waves, found = _read_waves(drawn, rate, most=2 * count * (fixed or options.length or DEFAULT_LENGTH))
    if rate is None:
        notes.append(f"sound taken at {found} Hz, the rate of {drawn[0].name}: no configuration lies beside the model")
    length = fixed or options.length or min(DEFAULT_LENGTH, *map(len, waves), DEFAULT_LENGTH)
    windows = [w[start : start + length] for w in waves for start in range(0, len(w) - length + 1, length)]
    if not windows:
        longest = max(map(len, waves))
        raise SamplesError(f"{paths[0]}: a sample has {length} points; the longest of {len(waves)} files has {longest}")
    chosen = np.sort(rng.permutation(len(windows))[:count])
    array = np.stack([windows[i] for i in chosen])
    if normalize:
        array = (array - array.mean(-1, keepdims=True)) / np.sqrt(array.var(-1, keepdims=True) + 1e-7)
    return _feed_inputs(array, info, inputs, found), notes


def _read_waves(paths: Sequence[Path], rate: int | None, most: int) -> tuple[list[AnyArray], int]:
    """Read files until they hold `most` points: (waveforms, their rate: the first file's where `rate` is None)."""
    waves: list[AnyArray] = []
    for path in paths:
        if sum(map(len, waves)) >= most:
            break
        rate, wave = read_wave(path, rate)
        waves.append(wave[:most])
    assert rate is not None
    return waves, rate


def _feed_inputs(windows: AnyArray, info: ModelInput, inputs: Sequence[ModelInput], rate: int) -> dict[str, AnyArray]:
    """Return arrays by input name: windows [samples, points] for the input `info`, and values for all others."""
    count, length = windows.shape
    others = [i for i in inputs if i is not info]
    # states have their batch anywhere, so beside them each sample is a complete feed
    batch = [1] if others else []
    channels = [1] * (len(info.dims or (None, None)) - 2)
    arrays = {info.name: windows.reshape(count, *batch, *channels, length).astype(info.dtype)}
    return arrays | {other.name: _other_input(other, count, rate) for other in others}


def wave_input(inputs: Sequence[ModelInput]) -> ModelInput:
    """Return the input that takes a waveform: floats of rank 2 [batch, points], or 3 [batch, 1, points].

    Raises SamplesError where none does, or more than one.
    """
    found = [
        i for i in inputs
        if i.dtype.kind == "f" and i.dims is not None
        and (len(i.dims) == 2 or (len(i.dims) == 3 and i.dims[1] == 1)) and (i.dims[-1] is None or i.dims[-1] >= 256)
    ]  # fmt: skip
    if len(found) != 1:
        raise SamplesError(
            f"sound fits a model with one input of floats [batch, points]; this one has "
            f"{names_of(i.name for i in inputs)}: give an .npz or a Python reader"
        )
    return found[0]


def read_wave(path: Path, rate: int | None) -> tuple[int, AnyArray]:
    """Read a .wav file of integers or floats: (rate in Hz, points [points]).

    Channels are averaged, integers brought to -1..1, and points resampled to `rate` where that is given. Raises
    SamplesError.
    """
    from scipy.io import wavfile  # not at the top, nor is scipy.signal: only runs with sound wait for them

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that hold no sound
            found, data = wavfile.read(path)
    except Exception as error:  # a damaged header fails in many ways
        raise SamplesError(f"{path}: not a readable .wav file ({error or type(error).__name__})") from error
    points: Any = data.astype(np.float64)
    if data.dtype.kind == "u":
        points = (points - 128) / 128
    elif data.dtype.kind == "i":
        points = points / -float(np.iinfo(data.dtype).min)
    if points.ndim == 2:
        points = points.mean(axis=1)
    if not len(points) or not np.isfinite(points).all():
        raise SamplesError(f"{path}: holds {'NaN or Inf' if len(points) else 'no sound'}")
    if rate is not None and found != rate:
        from scipy.signal import resample_poly

        common = gcd(int(found), rate)
        points = resample_poly(points, rate // common, int(found) // common)
    return int(rate or found), points


def _read_config(clues: Clues) -> tuple[int | None, bool, list[str]]:
    """Read a preprocessor_config.json beside the model: (rate or None, whether to normalize, notes)."""
    names = ("preprocessor_config.json", "processor_config.json")
    for path in find_beside(clues.folder, names) if clues.folder is not None else []:
        try:
            config = parse_json(path.read_text(encoding="utf-8"))
            config = config.get("feature_extractor", config)
            if "sampling_rate" not in config:
                continue
            rate, normalize = int(config["sampling_rate"]), bool(config.get("do_normalize", False))
        except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise SamplesError(
                f"{path}: lies beside the model and cannot be read ({error}); correct or remove it"
            ) from error
        if rate < 1:
            raise SamplesError(f"{path}: a sampling_rate of {rate}; correct or remove it")
        how = "each window normalized" if normalize else "as it is"
        return rate, normalize, [f"sound at {rate} Hz, {how}, as {path.name} beside the model says"]
    return None, False, []


def _other_input(info: ModelInput, count: int, rate: int) -> AnyArray:
    """Return values for an input beside the waveform: the sampling rate, or zeros for a state. Raises SamplesError."""
    shape = (count, *(d or 1 for d in info.dims or ()))
    name = info.name.lower()
    if info.dtype.kind in "iu" and name in ("sr", "rate", "sample_rate", "sampling_rate"):
        return np.full(shape, rate, info.dtype)
    if info.dtype.kind == "f":
        return np.zeros(shape, info.dtype)
    raise SamplesError(
        f"sound gives no values for input {info.name!r}; give all inputs in an .npz or by a Python reader"
    )
