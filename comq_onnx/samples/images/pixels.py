"""Turn the pixels of one picture into the array of an input: size, layout, channels, mean, deviation and type."""

from __future__ import annotations

from typing import Any

import numpy as np

from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import Size
from comq_onnx.samples.images.preprocess import Preprocess
from comq_onnx.samples.samples import AnyArray, ModelInput


def channels_last(info: ModelInput, layout: str | None, seen: bool | None) -> bool:
    """Tell whether an input is NHWC: by the option, else its dimensions, else the graph, else it is not.

    layout: the option, nchw or nhwc
    seen: whether the graph shows NHWC; None where it does not tell
    """
    if layout is not None:
        return layout == "nhwc"
    dims = info.dims or (None,) * 4
    by_dims = dims[3] in (1, 3), dims[1] in (1, 3)
    return by_dims[0] if by_dims[0] != by_dims[1] else bool(seen)


def geometry(info: ModelInput, preprocess: Preprocess, last: bool | None) -> tuple[bool, int, Size, tuple[int, int]]:
    """Find the size of the pictures that fit an input: (channels last, channels, resize, (height, width)).

    last: whether the graph shows NHWC; None where it does not tell
    resize: as in `Preprocess`, before the crop to (height, width)
    """
    dims = info.dims or (None,) * 4
    nhwc = channels_last(info, preprocess.layout, last)
    height, width = (dims[1], dims[2]) if nhwc else (dims[2], dims[3])
    channels = (dims[3] if nhwc else dims[1]) or (1 if preprocess.channels == "grey" else 3)
    if isinstance(preprocess.resize, tuple) and preprocess.crop is None:
        size = preprocess.resize
    else:
        crop = preprocess.crop if isinstance(preprocess.crop, tuple) else (preprocess.crop, preprocess.crop)
        default = preprocess.resize if isinstance(preprocess.resize, int) and preprocess.crop_pct == 1 else 224
        size = (crop[0] or height or int(default), crop[1] or width or int(default))
    return nhwc, channels, preprocess.resize or round(min(size) / preprocess.crop_pct), size


def to_input(pixels: AnyArray, info: ModelInput, preprocess: Preprocess, last: bool | None) -> AnyArray:
    """Preprocess pixels [height, width, channels] in RGB or grey to one sample of an input, without the batch axis.

    Raises OptionError for options that do not fit the input, SamplesError for an input that takes no pictures.
    """
    nhwc, channels, _, _ = geometry(info, preprocess, last)
    wanted = np.dtype(preprocess.dtype) if preprocess.dtype else info.dtype
    if info.dtype.kind != "f" and not np.can_cast(wanted, info.dtype, "safe"):
        raise OptionError(f"--dtype {wanted}: {info.name!r} takes {info.dtype}")
    if channels == 1 and 3 in (len(preprocess.mean), len(preprocess.std)):
        raise OptionError(
            f"three means or deviations for {info.name!r}, which has one channel: give one number to --mean and --std"
        )
    if preprocess.channels == "grey" and channels != 1:
        raise OptionError(f"--channels grey: {info.name!r} has {channels} channels, not 1")
    if channels not in (1, 3):
        raise SamplesError(
            f"images have 1 or 3 channels; {info.name!r} has {channels} {'last' if nhwc else 'first'}: "
            "if that is another axis give --layout, else an .npz"
        )
    values: Any = pixels.astype(np.float32)
    if preprocess.channels == "bgr":
        values = values[:, :, ::-1]
    mean, std = np.asarray(preprocess.mean, np.float32), np.asarray(preprocess.std, np.float32)
    values = (values * np.float32(preprocess.scale) - mean) / std
    return _cast(np.ascontiguousarray(values if nhwc else values.transpose(2, 0, 1)), wanted, info)


def _cast(values: AnyArray, wanted: np.dtype[Any], info: ModelInput) -> AnyArray:
    """Cast values to a type, then to that of the input. Raises OptionError where whole numbers would lose something."""
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        whole = np.rint(values)
        if whole.min() < limits.min or whole.max() > limits.max or np.abs(whole - values).max() > 1e-3:
            raise OptionError(
                f"{info.name!r} takes {wanted}, whole numbers {limits.min} to {limits.max}; preprocessed pixels are "
                f"{values.min():.3g} to {values.max():.3g}: use --preprocess raw, with --mean 128 for int8"
            )
        values = whole
    return values.astype(wanted).astype(info.dtype)
