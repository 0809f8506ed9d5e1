"""Declare the options that say how samples are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from comq_onnx.errors import OptionError

Size = int | tuple[int, int]
CHANNELS, LAYOUTS, DTYPES = ("rgb", "bgr", "grey"), ("nchw", "nhwc"), ("float32", "float16", "uint8", "int8")


@dataclass(frozen=True)
class SampleOptions:
    """Hold the options that say how samples are read; None where nothing is said.

    Pictures have preprocess (a preset or a JSON file), and mean, std, resize, crop, layout, channels and dtype over
    it. Text has tokenizer (a tokenizer.json or its folder) and text_field (of JSON lines). Text and waveforms have
    length, in tokens or points. Raises OptionError for values that cannot be.
    """

    preprocess: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: Size | None = None
    crop: Size | None = None
    layout: str | None = None
    channels: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    text_field: str | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("layout", LAYOUTS), ("channels", CHANNELS), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise OptionError(f"--{name} {value}: choose one of {', '.join(allowed)}")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers is not None and (len(numbers) not in (1, 3) or not np.isfinite(numbers).all()):
                raise OptionError(f"--{name} {comma(numbers)}: one number, or three in the order of --channels")
        if self.std is not None and 0 in self.std:
            raise OptionError(f"--std {comma(self.std)}: pixels are divided by it, so none may be 0")
        for name in ("resize", "crop"):
            size = getattr(self, name)
            if size is not None and not is_size(size):
                raise OptionError(f"--{name} {size}: whole pixels of 1 or more, one number or HEIGHTxWIDTH")
        if self.length is not None and self.length < 1:
            raise OptionError(f"--length {self.length}: must be 1 or more")

    def only(self, used: Iterable[str], what: str) -> None:
        """Raise OptionError where an option is given that samples of this kind (`what`) have no use for."""
        used = set(used)
        for item in fields(SampleOptions):
            if getattr(self, item.name) is not None and item.name not in used:
                option = "--" + item.name.replace("_", "-")
                kind = next(kind for kind, names in KINDS.items() if item.name in names)
                raise OptionError(f"{option} is for {kind}, not for {what}: leave it out, or give other samples")


PICTURE_OPTIONS = ("preprocess", "mean", "std", "resize", "crop", "layout", "channels", "dtype")
TEXT_OPTIONS = ("tokenizer", "text_field", "length")
KINDS = {"images": PICTURE_OPTIONS, "text": ("tokenizer", "text_field"), "text and sound": ("length",)}


def is_size(size: Any) -> bool:
    """Tell whether a size is a whole number of pixels of 1 or more, or a pair (height, width) of them."""
    sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sides)


def comma(numbers: Sequence[float]) -> str:
    """Write numbers with commas between, four digits each."""
    return ",".join(f"{n:.4g}" for n in numbers)
