"""How pictures become the model's input: presets, and the configurations that lie beside models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import CHANNELS, DTYPES, LAYOUTS, PICTURE_OPTIONS, SampleOptions, Size, comma, is_size
from comq_onnx.samples.beside import beside, parse_json


@dataclass(frozen=True)
class Preprocess:
    """From a picture to the model's input: resize, centre crop, then (x * scale - mean) / std.

    resize: of the short side, or (height, width) whatever the shape; crop: of the centre. Where they are None the crop
    is the model's input and the short side that divided by crop_pct. channels: rgb, bgr or grey; layout: nchw, nhwc, or
    None to read it off the model. mean and std: one number, or three in the order of the channels. dtype: of the
    values, or None for the model's.
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
    """A preprocessing and where it is from."""

    how: Preprocess
    origin: str
    note: str | None = None


def find_preprocess(options: SampleOptions, folder: Path | None, whole_numbers: bool = False) -> Found | None:
    """How pictures become the model's input: what the options say, over a preset, a file, or a configuration beside
    the model (in `folder`); None where nothing tells. whole_numbers: the model takes pixels as they are. Raises
    OptionError, and SamplesError for a configuration that cannot be used."""
    found = _base(options, folder, whole_numbers)
    said = {n: getattr(options, n) for n in PICTURE_OPTIONS[1:] if getattr(options, n) is not None}
    if found is None:
        if not {"mean", "std"} & set(said):
            return None
        found = Found(Preprocess(), "--mean and --std")
    how = replace(found.how, **said)
    if "mean" in said and how.scale < 1 and max(map(abs, how.mean)) > 1:
        raise OptionError(
            f"--mean {comma(how.mean)}: pixels are 0..1 here; give a mean of that range, or add --preprocess raw "
            "for pixels 0..255"
        )
    return replace(found, how=how)


def _base(options: SampleOptions, folder: Path | None, whole_numbers: bool) -> Found | None:
    name = options.preprocess
    if name is None:
        if whole_numbers:
            return Found(PREPROCESS["raw"], "raw")
        return _beside(folder) if folder is not None else None
    if name in PREPROCESS:
        return Found(PREPROCESS[name], f"--preprocess {name}")
    path = Path(name)
    if not path.is_file():
        raise OptionError(f"--preprocess {name!r}: neither a preset ({', '.join(PREPROCESS)}) nor a JSON file")
    try:
        config = _read_json(path)
        return Found(_interpret(config) or _own(config), f"--preprocess {name}")
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        allowed = ", ".join(f.name for f in fields(Preprocess))
        raise OptionError(f"--preprocess {name}: {error}; expected a JSON object with some of {allowed}") from error


def _beside(folder: Path) -> Found | None:
    for path in beside(folder, ("preprocessor_config.json", "processor_config.json", "config.json")):
        try:
            how = _interpret(_read_json(path))
        except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise SamplesError(
                f"{path}: lies beside the model and cannot be used ({error}); say how to preprocess with --preprocess"
            ) from error
        if how is not None:
            return Found(how, str(path), f"preprocessing as {path.name} beside the model says: {how}")
    return None


def _read_json(path: Path) -> Mapping[str, Any]:
    value = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _own(given: Mapping[str, Any]) -> Preprocess:
    """The fields of Preprocess."""
    numbers = {k: _numbers(v) for k, v in given.items() if k in ("mean", "std")}
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in ("resize", "crop")}
    return Preprocess(**{**given, **numbers, **sizes})


def _interpret(config: Mapping[str, Any]) -> Preprocess | None:
    """What a configuration of Hugging Face or timm says of pictures; None for one that says nothing of them."""
    config = config.get("image_processor", config)
    if {"image_mean", "do_resize", "do_rescale", "do_center_crop"} & set(config):
        return _hugging_face(config)
    inner = config.get("pretrained_cfg", config)
    return _timm(inner) if "input_size" in inner and "mean" in inner else None


def _hugging_face(config: Mapping[str, Any]) -> Preprocess:
    """A preprocessor_config.json: https://huggingface.co/docs/transformers/main_classes/image_processor"""
    crops = bool(config.get("do_center_crop", "crop_size" in config))
    crop = _hf_size(config.get("crop_size", config.get("size"))) if crops else None
    resize = _hf_size(config.get("size")) if config.get("do_resize", True) else None
    share = config.get("crop_pct")
    if share is not None and isinstance(resize, int):
        # ConvNeXt: the short side so long that the crop is this share of it
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
    """timm's pretrained_cfg: crop_pct of the resized short side, or of both sides where crop_mode is squash."""
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
