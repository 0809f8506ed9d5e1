"""Hold how pictures become the input of a model: presets, and the configurations that lie beside models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import CHANNELS, DTYPES, LAYOUTS, PICTURE_OPTIONS, SampleOptions, Size, comma, is_size
from comq_onnx.samples.model_folder import find_beside, parse_json


@dataclass(frozen=True)
class Preprocess:
    """Describe the way from a picture to the input: resize, crop the centre, then (x * scale - mean) / std.

    scale: the factor on pixels 0..255
    mean, std: one number, or three in the order of the channels
    resize: the short side in pixels, or (height, width) whatever the shape; None for crop / crop_pct
    crop: the centre that is kept, in pixels; None for the size of the input
    crop_pct: the share of the short side that the crop is, where resize is None
    channels: rgb, bgr or grey
    layout: nchw, nhwc, or None for what the model shows
    resample: the filter, by Pillow's name
    dtype: the type of the values, or None for that of the input

    Raises ValueError for values that cannot be.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: Size | None = None
    crop: Size | None = None
    crop_pct: float = 0.875
    channels: str = "rgb"
    layout: str | None = None
    resample: str = "bicubic"
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("channels", self.channels, CHANNELS),
            ("layout", self.layout, (None, *LAYOUTS)),
            ("dtype", self.dtype, (None, *DTYPES)),
            ("resample", str(self.resample).lower(), tuple(r.name.lower() for r in Image.Resampling)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, not one of {', '.join(str(a) for a in allowed)}")
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            if size is not None and not is_size(size):
                raise ValueError(f"{name} is {size!r}, not a positive whole number or two of them")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, 3):
                raise ValueError(f"{name} has {len(numbers)} numbers, not 1 or 3")
        if any(number == 0 for number in self.std):
            raise ValueError("std is 0")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}, not above 0 and at most 1")

    def __str__(self) -> str:
        parts = [f"pixels 0..{255 * self.scale:.4g}", f"mean {comma(self.mean)}", f"std {comma(self.std)}"]
        if self.resize is not None:
            parts.append(f"resize {_pair(self.resize)}")
        if self.crop is not None:
            parts.append(f"crop {_pair(self.crop)}")
        return ", ".join([*parts, self.channels])


PREPROCESS: dict[str, Preprocess] = {
    "imagenet": Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "imagenet-inception": Preprocess(mean=(0.5,), std=(0.5,)),
    "clip": Preprocess(
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), crop_pct=1.0
    ),
    "0-1": Preprocess(),
    "raw": Preprocess(scale=1.0),
}


@dataclass(frozen=True)
class Found:
    """Hold a preprocessing and where it is from.

    origin: its source; from a guess, the options that say it, or empty
    note: what to tell the caller, where the caller did not choose it
    """

    preprocess: Preprocess
    origin: str
    note: str | None = None


def find_preprocess(options: SampleOptions, folder: Path | None, whole_numbers: bool = False) -> Found | None:
    """Find how pictures become the input: the options, over a preset, a file or a configuration beside the model.

    folder: where the model lies; None for a model in memory
    whole_numbers: whether the input takes whole numbers, and so pixels as they are unless the options say otherwise

    Returns None where nothing tells. Raises OptionError, and SamplesError for a configuration that cannot be used.
    """
    found = _base(options, folder, whole_numbers)
    given = {n: getattr(options, n) for n in PICTURE_OPTIONS[1:] if getattr(options, n) is not None}
    if found is None:
        if not {"mean", "std"} & set(given):
            return None
        found = Found(Preprocess(), "--mean and --std")
    preprocess = replace(found.preprocess, **given)
    if "mean" in given and preprocess.scale < 1 and max(map(abs, preprocess.mean)) > 1:
        raise OptionError(
            f"--mean {comma(preprocess.mean)}: pixels are 0..1 here; give a mean of that range, or add --preprocess "
            "raw for pixels 0..255"
        )
    return replace(found, preprocess=preprocess)


def _base(options: SampleOptions, folder: Path | None, whole_numbers: bool) -> Found | None:
    """Find the preprocessing that single options change. Raises OptionError and SamplesError."""
    name = options.preprocess
    if name is None:
        if whole_numbers:
            return Found(PREPROCESS["raw"], "raw")
        return _read_beside(folder) if folder is not None else None
    if name in PREPROCESS:
        return Found(PREPROCESS[name], f"--preprocess {name}")
    path = Path(name)
    if not path.is_file():
        raise OptionError(f"--preprocess {name!r}: neither a preset ({', '.join(PREPROCESS)}) nor a JSON file")
    try:
        config = _read_json(path)
        return Found(_interpret(config) or _read_fields(config), f"--preprocess {name}")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        allowed = ", ".join(f.name for f in fields(Preprocess))
        raise OptionError(f"--preprocess {name}: {error}; expected a JSON object with some of {allowed}") from error


def _read_beside(folder: Path) -> Found | None:
    """Read the first configuration beside a model that speaks of pictures. Raises SamplesError."""
    for path in find_beside(folder, ("preprocessor_config.json", "processor_config.json", "config.json")):
        try:
            preprocess = _interpret(_read_json(path))
        except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise SamplesError(
                f"{path}: lies beside the model and cannot be used ({error}); say how to preprocess with --preprocess"
            ) from error
        if preprocess is not None:
            return Found(preprocess, str(path), f"preprocessing as {path.name} beside the model says: {preprocess}")
    return None


def _read_json(path: Path) -> Mapping[str, Any]:
    value = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _read_fields(given: Mapping[str, Any]) -> Preprocess:
    """Read a configuration with the fields of Preprocess. Raises ValueError and TypeError."""
    numbers = {k: _numbers(v) for k, v in given.items() if k in ("mean", "std")}
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in ("resize", "crop")}
    return Preprocess(**{**given, **numbers, **sizes})


def _interpret(config: Mapping[str, Any]) -> Preprocess | None:
    """Read what a configuration of Hugging Face or timm says of pictures; None where it says nothing of them."""
    config = config.get("image_processor", config)
    if {"image_mean", "do_resize", "do_rescale", "do_center_crop"} & set(config):
        return _hugging_face(config)
    inner = config.get("pretrained_cfg", config)
    return _timm(inner) if "input_size" in inner and "mean" in inner else None


def _hugging_face(config: Mapping[str, Any]) -> Preprocess:
    """Read a preprocessor_config.json: https://huggingface.co/docs/transformers/main_classes/image_processor"""
    crops = bool(config.get("do_center_crop", "crop_size" in config))
    crop = _hf_size(config.get("crop_size", config.get("size"))) if crops else None
    resize = _hf_size(config.get("size")) if config.get("do_resize", True) else None
    share = config.get("crop_pct")
    if share is not None and isinstance(resize, int):
        # ConvNeXt: the crop is this share of the short side
        resize, crop = int(resize / share), crop or resize
    if isinstance(resize, int) and not crops and share is None and not isinstance(config.get("size"), Mapping):
        resize = (resize, resize)
    normalizes = config.get("do_normalize", True)
    return Preprocess(
        scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
        mean=_numbers(config["image_mean"]) if normalizes and "image_mean" in config else (0.0,),
        std=_numbers(config["image_std"]) if normalizes and "image_std" in config else (1.0,),
        resize=resize,
        crop=crop,
        crop_pct=1.0,
        channels="bgr" if config.get("do_flip_channel_order") else "rgb",
        resample=Image.Resampling(int(config.get("resample", Image.Resampling.BILINEAR))).name.lower(),
    )


def _hf_size(size: Any) -> Size | None:
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            height, width = int(size["height"]), int(size["width"])
            return (height, width)
        if "shortest_edge" in size:
            return int(size["shortest_edge"])
        raise ValueError(f"a size of {', '.join(size) or 'nothing'}, not of shortest_edge or height and width")
    if isinstance(size, list):
        return int(size[0]), int(size[-1])
    return None if size is None else int(size)


def _timm(config: Mapping[str, Any]) -> Preprocess:
    """Read the pretrained_cfg of timm: crop_pct is of the resized short side, or of both where crop_mode is squash."""
    height, width = (int(n) for n in config["input_size"][-2:])
    share = float(config.get("crop_pct", 0.875))
    mode = config.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise ValueError(f"crop_mode {mode!r}, not center or squash")
    squash = (int(height / share), int(width / share))
    return Preprocess(
        mean=_numbers(config["mean"]),
        std=_numbers(config["std"]),
        resize=squash if mode == "squash" else int(min(height, width) / share),
        crop=(height, width),
        resample=config.get("interpolation", "bicubic"),
    )


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(np.atleast_1d(np.asarray(value, float)).tolist())


def _pair(size: Size) -> str:
    return f"{size[0]}x{size[1]}" if isinstance(size, tuple) else str(size)
