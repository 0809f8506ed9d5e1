"""Train the two small Fashion-MNIST classifiers under ``models/``, and write their calibration and test images.

Both models take ``image`` [N, 1, 28, 28] float32 in 0..1 (raw / 255; the mean and the deviation are taken off inside
the model) and return ``logits`` [N, 10]. The CNN keeps its BatchNormalization nodes apart from its convolutions, as a
model that comes straight out of training does.

Needs torch, onnx, onnxruntime and numpy. Run from the repository's root::

    python tools/zoo/make_models.py models
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 0
OPSET = 17
CALIBRATION_IMAGES = 512
STORED_TEST_IMAGES = 1000
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = {
    "train_image": "train-images-idx3-ubyte",
    "train_label": "train-labels-idx1-ubyte",
    "test_image": "t10k-images-idx3-ubyte",
    "test_label": "t10k-labels-idx1-ubyte",
}
MEAN, DEVIATION = 0.2860, 0.3530  # of the 60,000 training images in 0..1
HOW_TO_GET_THE_DATA = (
    "install the Debian package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or name a folder that "
    "holds the four files with --data DIR (.gz or unpacked)"
)


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained; ``shift`` is the largest random translation in pixels."""

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float
    shift: int
    batch: int = 128


@dataclass(frozen=True)
class Dataset:
    """Images [n, 1, 28, 28] float32 in 0..1 and labels [n] int64, of the training and the test set."""

    train_image: np.ndarray
    train_label: np.ndarray
    test_image: np.ndarray
    test_label: np.ndarray


def main(arguments: list[str] | None = None) -> int:
    """Train what was asked for, then write the README for every model that lies in the folder."""
    options = parse(arguments)
    try:
        data = load_dataset(options.data)
    except (FileNotFoundError, ValueError) as error:
        print(f"make_models: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    write_images(options.out, data)
    for name in [options.only] if options.only else list(RECIPES):
        make_model(name, options.out / f"fashion_{name}.onnx", data, options.epochs)
    write_readme(options.out, data)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train and export the small Fashion-MNIST models of this repository.")
    parser.add_argument("out", type=Path, help="folder to write to, for example models")
    data_help = "folder with the four idx files of Fashion-MNIST, .gz or unpacked (default: %(default)s)"
    parser.add_argument("--data", type=Path, default=DEBIAN_FOLDER, metavar="DIR", help=data_help)
    parser.add_argument("--only", choices=list(RECIPES), help="make this model alone (default: both)")
    parser.add_argument("--epochs", type=positive, metavar="N", help="passes over the training set (default: each's)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="torch threads (default: 1)")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """Return a count of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} given, at least 1 needed")
    return number


def make_model(name: str, path: Path, data: Dataset, epochs: int | None) -> None:
    """Train one model, export it, and check that ONNX Runtime computes what torch does."""
    recipe = RECIPES[name]
    epochs = epochs or recipe.epochs
    random.seed(SEED)
    torch.manual_seed(SEED)
    model = recipe.build()
    print(f"{name}: {count_parameters(model)} parameters, {epochs} epochs", flush=True)
    train(model, recipe, epochs, data)
    export(model, path, {"dataset": "Fashion-MNIST", "epochs": str(epochs), "seed": str(SEED)})
    check_against_torch(model, path, data.test_image[:256])
    print(f"{name}: {top1(path, data.test_image, data.test_label):.2%} top-1 -> {path}", flush=True)


# Data


def load_dataset(folder: Path) -> Dataset:
    """Read the four idx files; every one that is missing is named in one FileNotFoundError."""
    missing = [name for name in IDX_FILES.values() if find_idx(folder, name) is None]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; {HOW_TO_GET_THE_DATA}")
    arrays = {key: read_idx(find_idx(folder, name)) for key, name in IDX_FILES.items()}
    for key in ("train_image", "test_image"):
        arrays[key] = arrays[key][:, None].astype(np.float32) / np.float32(255)
    for key in ("train_label", "test_label"):
        arrays[key] = arrays[key].astype(np.int64)
    return Dataset(**arrays)


def find_idx(folder: Path, name: str) -> Path | None:
    """Return the idx file, packed or not, or None."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """Return an idx file of unsigned bytes: two zero bytes, type 8, the rank, big-endian int32 sizes, the values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes; {HOW_TO_GET_THE_DATA}")
    rank = raw[3]
    shape = np.frombuffer(raw, dtype=">i4", count=rank, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)


def write_images(folder: Path, data: Dataset) -> None:
    """Write the first training images for calibration and the first test images; the same bytes on every run."""
    np.savez_compressed(folder / "fashion_calib.npz", image=data.train_image[:CALIBRATION_IMAGES])
    np.savez_compressed(
        folder / "fashion_test.npz",
        image=data.test_image[:STORED_TEST_IMAGES],
        label=data.test_label[:STORED_TEST_IMAGES],
    )


# Training


def train(model: nn.Module, recipe: Recipe, epochs: int, data: Dataset) -> None:
    """Train in place with AdamW and one warm-up and cosine cycle of the learning rate."""
    image, label = torch.from_numpy(data.train_image), torch.from_numpy(data.train_label)
    steps = epochs * (len(image) // recipe.batch)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.15)
    model.to(memory_format=torch.channels_last).train()
    for epoch in range(epochs):
        start, losses = time.perf_counter(), []
        for chosen in torch.randperm(len(image)).split(recipe.batch):
            if len(chosen) == recipe.batch:
                loss = F.cross_entropy(model(augment(image[chosen], recipe.shift)), label[chosen])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
        spent = time.perf_counter() - start
        print(f"  epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, {spent:.0f} s", flush=True)
    model.to(memory_format=torch.contiguous_format).eval()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay the weight matrices and kernels alone, not biases, norms or the position table."""
    decayed = [p for p in model.parameters() if p.dim() in (2, 4)]
    kept = [p for p in model.parameters() if p.dim() not in (2, 4)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def augment(image: Tensor, shift: int) -> Tensor:
    """Mirror half of the images and move each by up to ``shift`` pixels, zeros coming in; [n, 1, 28, 28]."""
    n, _, height, width = image.shape
    padded = F.pad(image, (shift,) * 4)
    row = torch.arange(height) + torch.randint(0, 2 * shift + 1, (n, 1))
    column = torch.arange(width) + torch.randint(0, 2 * shift + 1, (n, 1))
    column = torch.where(torch.rand(n, 1) < 0.5, column.flip(1), column)
    return padded[torch.arange(n)[:, None, None], 0, row[:, :, None], column[:, None, :]][:, None]


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained values."""
    return sum(p.numel() for p in model.parameters())


# Export and measurement


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


# The README of the folder


def write_readme(folder: Path, data: Dataset) -> None:
    """Measure every model in the folder and write where the files come from, their accuracy, sizes and sha256."""
    models = [path for path in (folder / f"fashion_{name}.onnx" for name in RECIPES) if path.is_file()]
    arrays = [folder / "fashion_calib.npz", folder / "fashion_test.npz"]
    text = README.format(
        models="\n".join(model_row(path, data) for path in models),
        files="\n".join(file_row(path) for path in models + arrays),
        calibration=CALIBRATION_IMAGES,
        stored=STORED_TEST_IMAGES,
        seed=SEED,
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


# The models


class Normalize(nn.Module):
    """Take off the mean and divide by the deviation of the training images."""

    def forward(self, image: Tensor) -> Tensor:
        """Return the normalised image, same shape."""
        return (image - MEAN) / DEVIATION


def convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    """Return a convolution without bias, its batch normalization and maybe an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, activation) if activation else nn.Sequential(*layers)


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a depthwise 3x3 and a pointwise convolution, as in MobileNet."""
    return nn.Sequential(
        convolution(inputs, inputs, 3, stride, inputs, nn.ReLU6()),
        convolution(inputs, outputs, activation=nn.ReLU6()),
    )


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow, as in MobileNetV2; the input is added where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int = 1) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = convolution(inputs, hidden, activation=nn.ReLU6())
        self.depthwise = convolution(hidden, hidden, 3, stride, hidden, nn.ReLU6())
        self.project = convolution(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, outputs, height / stride, width / stride]."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


def build_cnn() -> nn.Module:
    """Return the CNN: 28x28 at the stem, 14x14, then 7x7."""
    layers = {
        "normalize": Normalize(),
        "stem": convolution(1, 16, 3, activation=nn.ReLU()),
        "separable": separable(16, 48, stride=2),
        "block1": InvertedResidual(48, 48, expansion=2),
        "block2": InvertedResidual(48, 96, expansion=3, stride=2),
        "block3": InvertedResidual(96, 96, expansion=3),
        "block4": InvertedResidual(96, 96, expansion=3),
        "last": convolution(96, 192, activation=nn.ReLU()),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(192, 10),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


class Attention(nn.Module):
    """Multi-head self-attention over [n, tokens, dim]."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.shape = (tokens, 3, heads, dim // heads)
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, tokens, dim]; the shapes are constants, so that the exported graph computes none."""
        tokens, _, heads, width = self.shape
        qkv = self.qkv(x).reshape(-1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weight = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weight @ v).transpose(1, 2).reshape(-1, tokens, heads * width))


class Block(nn.Module):
    """A transformer block with the norms in front."""

    def __init__(self, dim: int, heads: int, tokens: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, tokens)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, tokens, dim]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches of 4x4, learned positions, the mean over the tokens, a linear head."""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.dim, self.tokens = dim, (28 // patch) ** 2
        self.normalize = Normalize()
        self.patch = nn.Conv2d(1, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.tokens, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, self.tokens) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits [n, 10]."""
        token = self.patch(self.normalize(image)).reshape(-1, self.dim, self.tokens).transpose(1, 2)
        return self.head(self.norm(self.blocks(token + self.position)).mean(dim=1))


RECIPES = {
    "cnn": Recipe(build_cnn, epochs=10, learning_rate=5e-3, weight_decay=0.05, shift=2),
    "vit": Recipe(VisionTransformer, epochs=12, learning_rate=2e-3, weight_decay=0.05, shift=1),
}


if __name__ == "__main__":
    sys.exit(main())
