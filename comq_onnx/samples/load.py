"""Where calibration samples come from, one module for each kind: arrays, pictures, text, sound, Python, nothing.

    load_samples(source, inputs, options, count, seed, clues) -> Samples

`Samples` is all that the pipeline sees; `SampleOptions` is what the caller said of how to read them, `Clues` what the model
tells.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx.errors import SamplesError
from comq_onnx.options.samples import PICTURE_OPTIONS, TEXT_OPTIONS, SampleOptions
from comq_onnx.samples.arrays import read_arrays, read_test_data
from comq_onnx.samples.audio import AUDIO_SUFFIXES, read_sounds
from comq_onnx.samples.images.files import IMAGE_SUFFIXES, read_images
from comq_onnx.samples.readers import is_reader, load_reader, read_python
from comq_onnx.samples.samples import AnyArray, Clues, ModelInput, Samples, fit
from comq_onnx.samples.synthetic import synthesize
from comq_onnx.samples.text import TEXT_SUFFIXES, read_lines, texts_wanted, tokenize

# where a folder holds several kinds, the first of these is taken
SUFFIXES: dict[str, frozenset[str]] = {
    "arrays": frozenset({".npz", ".npy"}),
    "test data": frozenset({".pb"}),
    "images": IMAGE_SUFFIXES,
    "sound": AUDIO_SUFFIXES,
    "text": TEXT_SUFFIXES,
}
WHAT = (
    "samples are .npz, .npy, input_<i>.pb, image, .wav, .txt or .jsonl files, a folder or a pattern of them, or "
    "module:name of a Python reader"
)


def load_samples(
    source: Any,
    inputs: Sequence[ModelInput],
    options: SampleOptions | None = None,
    count: int = 256,
    seed: int = 0,
    clues: Clues | None = None,
) -> Samples:
    """Samples for a model with these inputs.

    source: a path, a pattern such as photos/**/*.jpg, module:name or file.py:name of Python code that gives samples;
    arrays by input name; a callable, a CalibrationDataReader, a DataLoader, a dataset, or whatever yields samples; None
    for synthetic ones. count: how many to make or, where not all are in memory anyway, to read at the most. Raises
    SamplesError, and OptionError where the options do not suit the source.
    """
    options, clues = options or SampleOptions(), clues or Clues()
    if isinstance(source, Samples):
        source = source.arrays
    arrays: Mapping[str, AnyArray]
    if source is None:
        arrays, notes, warnings = synthesize(inputs, options, count, seed, clues)
        return fit(arrays, inputs, "synthetic", notes, warnings)
    if isinstance(source, Mapping):
        options.only((), "arrays")
        return fit({k: np.asarray(v) for k, v in source.items()}, inputs, "arrays")
    if not isinstance(source, (str, os.PathLike)):
        what = type(source).__name__ if not callable(source) else getattr(source, "__name__", type(source).__name__)
        arrays, notes = read_python(source, what, inputs, options, clues, count)
        return fit(arrays, inputs, what, notes)
    path = Path(source)
    if not path.exists() and is_reader(str(source)):
        arrays, notes = read_python(load_reader(str(source)), str(source), inputs, options, clues, count)
        return fit(arrays, inputs, str(source), notes)
    kind, files, notes = _find(path)
    arrays, more = _read(kind, files, str(path), inputs, options, clues, count, seed)
    return fit(arrays, inputs, str(path), [*notes, *more])


def _find(path: Path) -> tuple[str, list[Path], list[str]]:
    """(kind, files of it, notes) of a file, a folder with all below it, or a pattern."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    elif glob.has_magic(str(path)):
        files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not files:
            raise SamplesError(f"{path}: no file matches this pattern")
    else:
        raise SamplesError(f"{path}: no such file or folder of samples; {WHAT}")
    by_kind = {kind: [p for p in files if p.suffix.lower() in suffixes] for kind, suffixes in SUFFIXES.items()}
    if not path.is_file():
        # outputs of test data, and whatever else has this suffix
        by_kind["test data"] = [p for p in by_kind["test data"] if p.name.startswith("input_")]
    by_kind = {kind: found for kind, found in by_kind.items() if found}
    if not by_kind:
        raise SamplesError(f"{path}: {'the folder holds no samples; ' if path.is_dir() else ''}{WHAT}")
    kind, *others = by_kind
    left = ", ".join(f"{len(by_kind[other])} of {other}" for other in others)
    return kind, by_kind[kind], [f"{path}: files of {kind} taken, left out {left}"] if others else []


def _read(
    kind: str, files: list[Path], source: str, inputs: Sequence[ModelInput], options: SampleOptions, clues: Clues, count: int,
    seed: int,
) -> tuple[Mapping[str, AnyArray], list[str]]:  # fmt: skip
    match kind:
        case "images":
            options.only(PICTURE_OPTIONS, f"images ({source})")
            if len(files) > count:
                chosen = np.sort(np.random.default_rng(seed).permutation(len(files))[:count])
                files = [files[i] for i in chosen]
            return read_images(files, inputs, options, clues)
        case "sound":
            options.only(("length",), f"sound ({source})")
            return read_sounds(files, inputs, options, clues, count, seed)
        case "text":
            options.only(TEXT_OPTIONS, f"text ({source})")
            lines = read_lines(files, options.text_field, texts_wanted(inputs, count), seed)
            return tokenize(lines, inputs, options, clues, count)
        case _:
            options.only((), f"tensors ({source})")
            return (read_arrays if kind == "arrays" else read_test_data)(files, inputs), []
