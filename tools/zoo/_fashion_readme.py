"""Write models/README.md: where the files come from, and what is measured of them."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from _fashion_data import CALIBRATION_IMAGES, STORED_TEST_IMAGES, Dataset
from _fashion_export import top1

README = """# Small models to try the tool on

Two image classifiers trained on Fashion-MNIST, with the images to calibrate and to test them. All of it is written by

    python tools/zoo/make_models.py models

which needs torch, onnx, onnxruntime and numpy, and the Debian package `dataset-fashion-mnist` (or the data set's four
idx files, named with `--data DIR`). `--only cnn`, `--only vit` and `--epochs N` make less of it.

Both models take `image` [N, 1, 28, 28] float32 in 0..1 (the raw byte divided by 255; the normalisation is inside the
model) and return `logits` [N, 10], for the classes t-shirt or top, trouser, pullover, dress, coat, sandal, shirt,
sneaker, bag, ankle boot.

- `fashion_cnn.onnx`: a convolution, a depthwise-separable block, inverted residual blocks, ReLU and ReLU6, global
  average pooling and a linear layer. Its BatchNormalization nodes are not folded.
- `fashion_vit.onnx`: a vision transformer of 4 blocks, width 64, 4 heads, patches of 4 x 4, LayerNorm and the exact
  (erf) GELU.
- `fashion_calib.npz`: `image`, the first {calibration} images of the training set. The models were trained on them.
- `fashion_test.npz`: `image` and `label` (int64), the first {stored:,} images of the test set. No model was trained on
  them or chosen by them.

## Accuracy

Top-1 in float32, on all 10,000 test images and on the {stored:,} stored here:

| model | stored values | epochs | 10,000 images | {stored:,} images |
| --- | ---: | ---: | ---: | ---: |
{models}

Measured by the command above with
{versions}.

## Files

| file | bytes | sha256 |
| --- | ---: | --- |
{files}

The seed is fixed ({seed}). The `.npz` files come out the same bytes again; the models come out close but not
the same on another processor or another version of torch, since float32 sums are then taken in another order.

## Where the data comes from

Fashion-MNIST (Han Xiao, Kashif Rasul, Roland Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms, 2017, arXiv:1708.07747), GitHub repository zalandoresearch/fashion-mnist, copyright 2017 Zalando
SE, MIT licence:

> Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
> documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
> rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
> permit persons to whom the Software is furnished to do so, subject to the following conditions:
>
> The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
> Software.
>
> THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
> WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
> COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
> OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def write_readme(folder: Path, data: Dataset, names: Iterable[str], seed: int) -> None:
    """Measure every model in the folder and write where the files come from, their accuracy, sizes and sha256."""
    models = [path for path in (folder / f"fashion_{name}.onnx" for name in names) if path.is_file()]
    arrays = [folder / "fashion_calib.npz", folder / "fashion_test.npz"]
    text = README.format(
        models="\n".join(model_row(path, data) for path in models),
        files="\n".join(file_row(path) for path in models + arrays),
        calibration=CALIBRATION_IMAGES,
        stored=STORED_TEST_IMAGES,
        seed=seed,
        versions=versions(),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def model_row(path: Path, data: Dataset) -> str:
    """Return one line of the accuracy table."""
    model = onnx.load(path)
    epochs = {entry.key: entry.value for entry in model.metadata_props}.get("epochs", "?")
    values = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    full = top1(path, data.test_image, data.test_label)
    stored = top1(path, data.test_image[:STORED_TEST_IMAGES], data.test_label[:STORED_TEST_IMAGES])
    return f"| `{path.name}` | {values:,} | {epochs} | {full:.2%} | {stored:.1%} |"


def file_row(path: Path) -> str:
    """Return one line of the table of files."""
    content = path.read_bytes()
    return f"| `{path.name}` | {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |"


def versions() -> str:
    """Return what the figures were measured with."""
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, onnx {onnx.__version__}, "
        f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, {platform.machine()}, {os.cpu_count()} cores"
    )
