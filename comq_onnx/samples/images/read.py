"""Read pictures as samples, from files or in memory: turned, resized, cropped and normalized."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from comq_onnx.errors import SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.images.guess import TRIED, guess_preprocess
from comq_onnx.samples.images.pixels import geometry, to_input
from comq_onnx.samples.images.preprocess import PREPROCESS, Preprocess, find_preprocess
from comq_onnx.samples.samples import AnyArray, Clues, ModelInput, names_of

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def read_images(
    pictures: Sequence[Path | Image.Image], inputs: Sequence[ModelInput], options: SampleOptions, clues: Clues
) -> tuple[dict[str, AnyArray], list[str]]:
    """Read pictures for the one input that takes them: (its array by its name, notes of what was decided).

    pictures: files, or pictures in memory

    Raises SamplesError for pictures that cannot be read or do not fit the model, OptionError for options that do not.
    """
    info = picture_input(inputs)
    found = find_preprocess(options, clues.folder, info.dtype.kind in "iu")
    last = clues.channels_last.get(info.name)
    names = [str(p) if isinstance(p, Path) else f"picture {i}" for i, p in enumerate(pictures)]
    if found is None:
        few = zip(pictures[:TRIED], names[:TRIED], strict=True)
        _ask_for_preprocess(np.stack([_open_pixels(p, n, Preprocess(), info, last) for p, n in few]), info, last, clues)
    array = np.empty(0)
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        values = to_input(_open_pixels(picture, name, found.preprocess, info, last), info, found.preprocess, last)
        if i == 0:
            array = np.empty((len(pictures), *values.shape), values.dtype)
        array[i] = values
    return {info.name: array}, [found.note] if found.note else []


def _ask_for_preprocess(pictures: AnyArray, info: ModelInput, last: bool | None, clues: Clues) -> NoReturn:
    """Raise SamplesError with all ways to say the preprocessing, and the one that the model seems to want."""
    guess = guess_preprocess(pictures, info, last, clues)
    hint = f"; by its first layers this model wants --preprocess {guess.origin}" if guess.origin else ""
    raise SamplesError(
        f"images need --preprocess: one of {', '.join(PREPROCESS)}, or a JSON file with "
        f"{', '.join(f.name for f in fields(Preprocess))}; or --mean and --std; or a preprocessor_config.json "
        f"beside the model{hint}"
    )


def picture_input(inputs: Sequence[ModelInput]) -> ModelInput:
    """Return the one input that takes pictures. Raises SamplesError where there is none, or others beside it."""
    if len(inputs) != 1 or not (inputs[0].dims is None or len(inputs[0].dims) == 4):
        raise SamplesError(
            f"images fit a model with one input of rank 4; this one has {names_of(i.name for i in inputs)}: "
            "give an .npz or a Python reader"
        )
    return inputs[0]


def _open_pixels(
    source: Path | Image.Image, name: str, preprocess: Preprocess, info: ModelInput, last: bool | None
) -> AnyArray:
    """Open a picture as pixels [height, width, channels] of the size that the model takes, uint8 in RGB or grey.

    Raises SamplesError where it cannot be read.
    """
    _, channels, resize, size = geometry(info, preprocess, last)
    picture = _decode(source, name, "L" if channels == 1 or preprocess.channels == "grey" else "RGB")
    if isinstance(resize, tuple):
        scaled = (resize[1], resize[0])
    else:
        short = min(picture.size)
        scaled = (round(picture.width * resize / short), round(picture.height * resize / short))
    scaled = (max(size[1], scaled[0]), max(size[0], scaled[1]))
    picture = picture.resize(scaled, Image.Resampling[preprocess.resample.upper()])
    left, top = (picture.width - size[1]) // 2, (picture.height - size[0]) // 2
    pixels = np.asarray(picture.crop((left, top, left + size[1], top + size[0])))
    return pixels.reshape(size[0], size[1], -1)


def _decode(source: Path | Image.Image, name: str, mode: str) -> Image.Image:
    """Decode a picture, turned as its EXIF data say, in Pillow's mode L or RGB. Raises SamplesError."""
    try:
        with warnings.catch_warnings():
            # from a hundred megapixels on Pillow only warns
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) if isinstance(source, Path) else source.copy() as opened:
                return _to_8_bits(ImageOps.exif_transpose(opened)).convert(mode)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:  # fmt: skip
        raise SamplesError(f"{name}: not a readable image ({error})") from error


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Bring a picture of 16 bits to 8: the conversion of Pillow makes everything above 255 white."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    return picture
