"""Declare the options that say how samples are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from comq_onnx.errors import OptionError
from comq_onnx.options.option import SAMPLES, declare, verify

# pixels of the short side, or (height, width)
Size = int | tuple[int, int]
CHANNELS, LAYOUTS, DTYPES = ("rgb", "bgr", "grey"), ("nchw", "nhwc"), ("float32", "float16", "uint8", "int8")
# the names of what images/preprocess.py knows
PRESETS = ("imagenet", "imagenet-inception", "clip", "0-1", "raw")


def comma(numbers: Sequence[float]) -> str:
    """Write numbers with commas between, four digits each."""
    return ",".join(f"{n:.4g}" for n in numbers)


def is_size(size: Any) -> bool:
    """Tell whether a size is a whole number of pixels of 1 or more, or a pair (height, width) of them."""
    sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides)


def _check_numbers(name: str) -> Callable[[Sequence[float]], None]:
    """Make the check of an option that has one number, or three."""

    def check(numbers: Sequence[float]) -> None:
        if len(numbers) not in (1, 3) or not np.isfinite(numbers).all():
            raise OptionError(f"--{name} {comma(numbers)}: one number, or three in the order of --channels")
        if name == "std" and 0 in numbers:
            raise OptionError(f"--std {comma(numbers)}: pixels are divided by it, so none may be 0")

    return check


def _check_size(name: str) -> Callable[[Size], None]:
    """Make the check of an option that has a size in pixels."""

    def check(size: Size) -> None:
        if not is_size(size):
            raise OptionError(f"--{name} {size}: whole pixels of 1 or more, one number or HEIGHTxWIDTH")

    return check


@dataclass(frozen=True)
class SampleOptions:
    """Hold the options that say how samples are read; None where an option is not given.

    preprocess: for pictures, a preset or a JSON file
    mean, std, resize, crop, layout, channels, dtype: for pictures, each in place of what preprocess says
    tokenizer: for text, a tokenizer.json or its folder
    text_field: for JSON lines of text, the field with the text
    length: for text and waveforms, the length in tokens or points

    Raises OptionError for values that are not possible.
    """

    preprocess: str | None = declare(
        None, SAMPLES, f"For images: {', '.join(PRESETS)}, or a JSON file.  [default: a file beside the model]",
        metavar="NAME|FILE",
    )  # fmt: skip
    mean: tuple[float, ...] | None = declare(
        None, SAMPLES, "For images: one number, or three in the order of --channels.", separator=",",
        check=_check_numbers("mean"),
    )  # fmt: skip
    std: tuple[float, ...] | None = declare(
        None, SAMPLES, "For images, likewise.", separator=",", check=_check_numbers("std")
    )
    resize: Size | None = declare(
        None, SAMPLES, "For images: the short side, or HxW exactly.  [default: crop / 0.875]", metavar="N|HxW",
        separator="x", check=_check_size("resize"),
    )  # fmt: skip
    crop: Size | None = declare(
        None, SAMPLES, "For images: of the centre.  [default: the model's input]", metavar="N|HxW", separator="x",
        check=_check_size("crop"),
    )  # fmt: skip
    layout: str | None = declare(None, SAMPLES, "For images.  [default: as the model shows]", choices=LAYOUTS)
    channels: str | None = declare(
        None, SAMPLES, "For images.  [default: rgb, or grey for one channel]", choices=CHANNELS
    )
    dtype: str | None = declare(None, SAMPLES, "For images: of the pixels.  [default: the input's]", choices=DTYPES)
    tokenizer: str | None = declare(
        None, SAMPLES, "For text: a tokenizer.json.  [default: the one beside the model]", metavar="FILE"
    )
    text_field: str | None = declare(
        None, SAMPLES, "For .jsonl text: where each line has it.  [default: text, or messages]", metavar="NAME"
    )
    length: int | None = declare(
        None, SAMPLES, "Tokens of a text at most, points of a sound.  [default: the model's, or 128 and 16000]",
        metavar="N", bounds=(1, np.inf),
    )  # fmt: skip

    def __post_init__(self) -> None:
        verify(self)

    def only(self, used: Iterable[str], what: str) -> None:
        """Raise OptionError where an option is given that these samples do not use.

        used: the fields that they use
        what: the kind of the samples, for the error
        """
        used = set(used)
        for item in fields(SampleOptions):
            if getattr(self, item.name) is not None and item.name not in used:
                option = "--" + item.name.replace("_", "-")
                kind = next(kind for kind, names in KINDS.items() if item.name in names)
                raise OptionError(f"{option} is for {kind}, not for {what}: leave it out, or give other samples")


PICTURE_OPTIONS = ("preprocess", "mean", "std", "resize", "crop", "layout", "channels", "dtype")
TEXT_OPTIONS = ("tokenizer", "text_field", "length")
KINDS = {"images": PICTURE_OPTIONS, "text": ("tokenizer", "text_field"), "text and sound": ("length",)}
