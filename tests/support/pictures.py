"""Make pictures, and models that look as if they had been trained on them."""

from __future__ import annotations

import numpy as np
import onnx
from PIL import Image

from comq_onnx.samples.images.guess import CENTRED, CENTRED_NAME
from comq_onnx.samples.images.preprocess import PREPROCESS
from models import build, infer, normal, weight


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Make a smooth random picture: resizing it in different ways gives nearly the same."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


PHOTOS = np.stack([np.asarray(picture(32, 32, seed=i)) for i in range(16)])


def pixels(name: str) -> np.ndarray:
    """Preprocess PHOTOS with a preset; NCHW."""
    how = {**PREPROCESS, CENTRED_NAME: CENTRED}[name]
    return np.float32((PHOTOS * how.scale - np.array(how.mean)) / np.array(how.std)).transpose(0, 3, 1, 2)


def norm_net(name: str) -> onnx.ModelProto:
    """Build Conv and BatchNormalization with the statistics of PHOTOS preprocessed with a preset."""
    w = weight(16, 3, 3, 3, fan=27)
    text = """g (float[batch, 3, 32, 32] image) => (float[batch, 16, 30, 30] y) {
        [conv] y = Conv <kernel_shape = [3, 3]> (image, w)
    }"""
    seen = infer(build(text, {"w": w}), {"image": pixels(name)})["y"]
    moments = {"mean": seen.mean(axis=(0, 2, 3)), "var": seen.var(axis=(0, 2, 3))}
    scales = {"scale": np.ones(16, np.float32), "shift": normal(16)}
    return build(
        """g (float[batch, 3, 32, 32] image) => (float[batch, 16, 30, 30] y) {
            [conv] c = Conv <kernel_shape = [3, 3]> (image, w)
            y = BatchNormalization (c, scale, shift, mean, var)
        }""",
        {"w": w, **scales, **moments},
    )


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Build the model of `norm_net` with its BatchNormalization folded into the convolution."""
    w, scale, shift, mean, var = (onnx.numpy_helper.to_array(i) for i in model.graph.initializer)
    gain = scale / np.sqrt(var)
    return build(
        """g (float[batch, 3, 32, 32] image) => (float[batch, 16, 30, 30] y) {
            [conv] y = Conv <kernel_shape = [3, 3]> (image, w, b)
        }""",
        {"w": w * gain[:, None, None, None], "b": np.float32(shift - mean * gain)},
    )
