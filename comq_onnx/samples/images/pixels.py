"""From the pixels of one picture to the array that an input takes: size, layout, channels, mean and deviation, type."""

from __future__ import annotations

from typing import Any

import numpy as np

from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import Size
from comq_onnx.samples.images.preprocess import Preprocess
from comq_onnx.samples.samples import AnyArray, ModelInput


def channels_last(info: ModelInput, layout: str | None, seen: bool | None) -> bool:
    """Whether an input is NHWC: by the option, its dimensions, the graph, else not."""
    if layout is not None:
        return layout == "nhwc"
    dims = info.dims or (None,) * 4
    by_dims = dims[3] in (1, 3), dims[1] in (1, 3)
    return by_dims[0] if by_dims[0] != by_dims[1] else bool(seen)


def geometry(info: ModelInput, how: Preprocess, last: bool | None) -> tuple[bool, int, Size, tuple[int, int]]:
    """(channels last, channels, resize, (height, width)) of the pictures that fit an input."""
    dims = info.dims or (None,) * 4
    nhwc = channels_last(info, how.layout, last)
    height, width = (dims[1], dims[2]) if nhwc else (dims[2], dims[3])
    channels = (dims[3] if nhwc else dims[1]) or (1 if how.channels == "grey" else 3)
    if isinstance(how.resize, tuple) and how.crop is None:
        size = how.resize
    else:
        crop = how.crop if isinstance(how.crop, tuple) else (how.crop, how.crop)
        default = how.resize if isinstance(how.resize, int) and how.crop_pct == 1 else 224
        size = (crop[0] or height or int(default), crop[1] or width or int(default))
    return nhwc, channels, how.resize or round(min(size) / how.crop_pct), size


def to_input(pixels: AnyArray, info: ModelInput, how: Preprocess, last: bool | None) -> AnyArray:
    """Pixels [height, width, channels] in RGB or grey as the model wants them, without the batch axis."""
    nhwc, channels, _, _ = geometry(info, how, last)
    wanted = np.dtype(how.dtype) if how.dtype else info.dtype
    if info.dtype.kind != "f" and not np.can_cast(wanted, info.dtype, "safe"):
        raise OptionError(f"--dtype {wanted}: {info.name!r} takes {info.dtype}")
    if channels == 1 and 3 in (len(how.mean), len(how.std)):
        raise OptionError(
            f"three means or deviations for {info.name!r}, which has one channel: give one number to --mean and --std"
        )
    if how.channels == "grey" and channels != 1:
        raise OptionError(f"--channels grey: {info.name!r} has {channels} channels, not 1")
    if channels not in (1, 3):
        raise SamplesError(
            f"images have 1 or 3 channels; {info.name!r} has {channels} {'last' if nhwc else 'first'}: "
            "if that is another axis give --layout, else an .npz"
        )
    values: Any = pixels.astype(np.float32)
    if how.channels == "bgr":
        values = values[:, :, ::-1]
    values = (values * np.float32(how.scale) - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    return _cast(np.ascontiguousarray(values if nhwc else values.transpose(2, 0, 1)), wanted, info)


def _cast(values: AnyArray, wanted: np.dtype[Any], info: ModelInput) -> AnyArray:
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
