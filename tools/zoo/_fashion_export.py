"""Export a classifier of Fashion-MNIST, and measure what ONNX Runtime makes of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

OPSET = 17


def export(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write the model in inference mode, its batch normalizations still nodes of their own."""
    options = {
        "dynamo": False,
        "opset_version": OPSET,
        "input_names": ["image"],
        "output_names": ["logits"],
        "dynamic_axes": {"image": {0: "N"}, "logits": {0: "N"}},
        "training": torch.onnx.TrainingMode.PRESERVE,  # EVAL would fold each BatchNormalization into its convolution
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about constants folded for training; these models are in inference mode
        torch.onnx.export(model.eval(), (torch.zeros(2, 1, 28, 28),), path, **options)
    exported = onnx.load(path)
    onnx.helper.set_model_props(exported, metadata)
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, path)


def check_against_torch(model: nn.Module, path: Path, image: np.ndarray) -> None:
    """Raise RuntimeError where the exported model computes other logits than torch in inference mode."""
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(image)).numpy()
    gap = float(np.abs(run(path, image) - expected).max())
    if gap > 1e-3:  # float32 sums of a few hundred terms, logits of up to about 20
        raise RuntimeError(f"{path}: the logits differ from torch's by {gap:.3g}, at most 0.001 is rounding")


def run(path: Path, image: np.ndarray) -> np.ndarray:
    """Return the logits [n, 10] that ONNX Runtime computes on the CPU."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batches = [image[start : start + 250] for start in range(0, len(image), 250)]
    return np.concatenate([session.run(["logits"], {"image": batch})[0] for batch in batches])


def top1(path: Path, image: np.ndarray, label: np.ndarray) -> float:
    """Return the share of images whose largest logit is the label's."""
    return float((run(path, image).argmax(axis=1) == label).mean())
