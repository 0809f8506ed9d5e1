"""Read samples that are tensors already: .npz and .npy files, and the test data of ONNX models (input_0.pb)."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from comq_onnx.errors import SamplesError
from comq_onnx.runtime import memory
from comq_onnx.samples.fit import spread_shared
from comq_onnx.samples.samples import AnyArray, ModelInput, names_of


def read_arrays(paths: Sequence[Path], inputs: Sequence[ModelInput]) -> dict[str, AnyArray]:
    """Read .npz and .npy files, and join the samples of all of them: arrays by input name.

    Nothing is ever unpickled. Raises SamplesError.
    """
    return _join([(path, spread_shared(_read_file(path, inputs), inputs)) for path in paths])


def _read_file(path: Path, inputs: Sequence[ModelInput]) -> dict[str, AnyArray]:
    try:
        wanted = {i.name for i in inputs}
        _check_sizes(path, wanted)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if len(inputs) != 1:
                names = ", ".join(i.name for i in inputs)
                raise SamplesError(
                    f"{path}: one array for {len(inputs)} inputs ({names}); use an .npz with these names"
                )
            return {inputs[0].name: loaded}
        with loaded:
            # where none is wanted, all of them, so that the error can say what there is
            found = [name for name in loaded.files if name in wanted] or loaded.files
            return {name: loaded[name] for name in found}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, zlib.error, NotImplementedError,
            RuntimeError) as error:  # fmt: skip
        raise SamplesError(f"{path}: cannot be read as numpy arrays without pickles ({error})") from error


def _check_sizes(path: Path, wanted: set[str]) -> None:
    """Check that the arrays of a file are as large as they claim, and fit in memory, before memory is taken for them.

    wanted: the arrays that will be read; where the file has none of these, all are counted

    Raises ValueError for a header that does not agree with the file, SamplesError for arrays that do not fit.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            _check_header(file, path.stat().st_size, path.name)
            return
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.filename.removesuffix(".npy") in wanted] or archive.infolist()
        unpacked, free = sum(m.file_size for m in members), memory.free()
        if unpacked > free:
            raise SamplesError(
                f"{path}: {unpacked / 1e9:.1f} GB of arrays when unpacked, and {free / 1e9:.1f} GB of memory are free; "
                "give fewer samples"
            )
        for member in members:
            if member.filename.endswith(".npy"):
                with archive.open(member) as inside:
                    _check_header(inside, member.file_size, member.filename)


def _check_header(file: IO[bytes], size: int, name: str) -> None:
    """Check the header of an .npy file of `size` bytes. Raises ValueError."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"{name} has version {version} of the format")
    try:
        shape, _, dtype = read[version](file)
    except Exception as error:  # the parser of Python's literals raises many kinds
        raise ValueError(f"{name} has a damaged header: {error}") from error
    if dtype.hasobject:
        return  # numpy itself refuses, and says why
    # multiplied as Python's integers: numpy's overflow
    declared = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or declared > size - file.tell():
        raise ValueError(f"{name} should hold {shape} of {dtype}, {declared} bytes, and holds {size - file.tell()}")


def _join(parts: list[tuple[Path, dict[str, AnyArray]]]) -> dict[str, AnyArray]:
    """Join the samples of files with arrays of the same names and shapes. Raises SamplesError."""
    first = parts[0][1]
    for path, part in parts:
        if set(part) != set(first):
            raise SamplesError(f"{path}: has arrays {sorted(part)}, {parts[0][0].name} has {sorted(first)}")
        for name in first:
            if part[name].ndim == 0:
                raise SamplesError(f"{path}: {name!r} is a single number; give an array with an axis of samples")
            if part[name].shape[1:] != first[name].shape[1:]:
                raise SamplesError(
                    f"{path}: {name!r} has samples of {part[name].shape[1:]}, {parts[0][0].name} of "
                    f"{first[name].shape[1:]}; pad them to one shape"
                )
    return {name: np.concatenate([part[name] for _, part in parts]) for name in first}


# ONNX test data
# ---------------------------------------------------------------------------------------------------------


def read_test_data(paths: Sequence[Path], inputs: Sequence[ModelInput]) -> dict[str, AnyArray]:
    """Read the input_<i>.pb files of test data sets, each folder of them as one complete feed: arrays by input name.

    A tensor goes to the input of its name, else to input number i. The layout of the files is that of ONNX's own tests,
    https://github.com/onnx/onnx/tree/main/onnx/backend/test/data/node. Raises SamplesError.
    """
    folders: dict[Path, dict[int, Path]] = {}
    for path in paths:
        if match := re.fullmatch(r"input_(\d+)\.pb", path.name):
            folders.setdefault(path.parent, {})[int(match[1])] = path
    feeds: list[dict[str, AnyArray]] = []
    for folder, files in sorted(folders.items()):
        feed = {}
        for index, path in sorted(files.items()):
            name, tensor = _read_tensor(path)
            if name not in {i.name for i in inputs}:
                if index >= len(inputs):
                    raise SamplesError(f"{path}: input number {index}; the model has {len(inputs)}")
                name = inputs[index].name
            feed[name] = tensor
        if missing := [i.name for i in inputs if i.name not in feed]:
            raise SamplesError(f"{folder}: no input_<i>.pb for {names_of(missing)}")
        feeds.append(feed)
    return stack_feeds(feeds, [f.name for f in sorted(folders)])


def stack_feeds(feeds: Sequence[dict[str, AnyArray]], places: Sequence[str]) -> dict[str, AnyArray]:
    """Stack complete feeds along a new first axis.

    places: where each feed comes from

    Raises SamplesError, with the place of the first feed that differs in shape.
    """
    for place, feed in zip(places, feeds, strict=True):
        for name, array in feed.items():
            if array.shape != feeds[0][name].shape:
                raise SamplesError(
                    f"{place}: {name!r} has shape {array.shape}, in {places[0]} {feeds[0][name].shape}; pad them to "
                    "one shape"
                )
    return {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}


def _read_tensor(path: Path) -> tuple[str, AnyArray]:
    """Read a tensor: (name, array). Raises SamplesError."""
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        # the file that it names might be any of this machine
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its data lies in another file")
        return tensor.name, numpy_helper.to_array(tensor)
    except (OSError, ValueError, TypeError, DecodeError, KeyError) as error:
        raise SamplesError(f"{path}: cannot be read as an ONNX tensor ({error or type(error).__name__})") from error
