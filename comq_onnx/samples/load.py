"""Load samples from whatever the caller names; one module reads each kind of them.

    load_samples(source, inputs, options, count, seed, clues) -> Samples

The caller says in `SampleOptions` how to read them, the model tells in `Clues` what it wants, and `Samples` is all that
the other packages see.
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
from comq_onnx.samples.cache_shapes import with_cache_shapes
from comq_onnx.samples.fit import fit_to_inputs
from comq_onnx.samples.images.read import IMAGE_SUFFIXES, read_images
from comq_onnx.samples.readers import is_reader, load_reader, read_python
from comq_onnx.samples.samples import AnyArray, Clues, ModelInput, Samples
from comq_onnx.samples.synthetic import synthesize
from comq_onnx.samples.text import TEXT_SUFFIXES, read_lines, texts_wanted, tokenize

# where a folder holds several kinds, the first of these is read
SUFFIXES: dict[str, frozenset[str]] = {
    "arrays": frozenset({".npz", ".npy"}),
    "test data": frozenset({".pb"}),
    "images": IMAGE_SUFFIXES,
    "sound": AUDIO_SUFFIXES,
    "text": TEXT_SUFFIXES,
}
KINDS_TEXT = (
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
    """Load samples for a model with these inputs.

    source: a path, a pattern such as photos/**/*.jpg, module:name or file.py:name of Python code that gives samples;
        arrays by input name; a callable, a CalibrationDataReader, a DataLoader, a dataset, or whatever yields samples;
        None for synthetic ones
    options: how to read them
    count: how many to make or, where not all are in memory anyway, to read at most
    seed: draws those that are read, and the synthetic ones
    clues: what the model tells about the samples it wants

    Raises SamplesError, and OptionError where the options do not suit the source.
    """
    options, clues = options or SampleOptions(), clues or Clues()
    inputs = with_cache_shapes(inputs, clues.cache_shapes)
    if isinstance(source, Samples):
        options.only((), "arrays")
        return fit_to_inputs(source.arrays, inputs, "arrays", source.notes, source.warnings)
    arrays: Mapping[str, AnyArray]
    if source is None:
        arrays, notes, warnings = synthesize(inputs, options, count, seed, clues)
        return fit_to_inputs(arrays, inputs, "synthetic", notes, warnings)
    if isinstance(source, Mapping):
        options.only((), "arrays")
        return fit_to_inputs({k: np.asarray(v) for k, v in source.items()}, inputs, "arrays")
    if isinstance(source, (str, os.PathLike)):
        return _load_named(os.fspath(source), inputs, options, clues, count, seed)
    name = type(source).__name__ if not callable(source) else getattr(source, "__name__", type(source).__name__)
    arrays, notes = read_python(source, name, inputs, options, clues, count)
    return fit_to_inputs(arrays, inputs, name, notes)


def _load_named(
    source: str, inputs: Sequence[ModelInput], options: SampleOptions, clues: Clues, count: int, seed: int
) -> Samples:
    """Load samples from a file, a folder, a pattern or a Python reader by its name."""
    path = Path(source)
    if not path.exists() and is_reader(source):
        arrays: Mapping[str, AnyArray]
        arrays, notes = read_python(load_reader(source), source, inputs, options, clues, count)
        return fit_to_inputs(arrays, inputs, source, notes)
    kind, files, notes = _choose_kind(path, _find_files(path))
    arrays, more = _read_files(kind, files, str(path), inputs, options, clues, count, seed)
    return fit_to_inputs(arrays, inputs, str(path), [*notes, *more])


def _find_files(path: Path) -> list[Path]:
    """Return the files of a file, of a folder with all below it, or of a pattern. Raises SamplesError."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not glob.has_magic(str(path)):
        raise SamplesError(f"{path}: no such file or folder of samples; {KINDS_TEXT}")
    files = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not files:
        raise SamplesError(f"{path}: no file matches this pattern")
    return files


def _choose_kind(path: Path, files: list[Path]) -> tuple[str, list[Path], list[str]]:
    """Choose the kind of samples to read: (kind, files of it, notes of what was left out). Raises SamplesError."""
    by_kind = {kind: [p for p in files if p.suffix.lower() in suffixes] for kind, suffixes in SUFFIXES.items()}
    if not path.is_file():
        # outputs of test data, and whatever else has this suffix
        by_kind["test data"] = [p for p in by_kind["test data"] if p.name.startswith("input_")]
    by_kind = {kind: found for kind, found in by_kind.items() if found}
    if not by_kind:
        raise SamplesError(f"{path}: {'the folder holds no samples; ' if path.is_dir() else ''}{KINDS_TEXT}")
    kind, *others = by_kind
    left = ", ".join(f"{len(by_kind[other])} of {other}" for other in others)
    return kind, by_kind[kind], [f"{path}: files of {kind} taken, left out {left}"] if others else []


def _read_files(
    kind: str, files: list[Path], source: str, inputs: Sequence[ModelInput], options: SampleOptions, clues: Clues,
    count: int, seed: int,
) -> tuple[Mapping[str, AnyArray], list[str]]:  # fmt: skip
    """Read files of one kind: (arrays by input name, notes)."""
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
            lines = read_lines(files, options.text_field, texts_wanted(inputs, count, clues), seed)
            return tokenize(lines, inputs, options, clues, count)
        case _:
            options.only((), f"tensors ({source})")
            return (read_arrays if kind == "arrays" else read_test_data)(files, inputs), []
