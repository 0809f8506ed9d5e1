"""Train the two small Fashion-MNIST classifiers of models/, and write their calibration and test images.

    python tools/zoo/make_models.py models
    python tools/zoo/make_models.py models --only cnn --epochs 1

It writes fashion_cnn.onnx, fashion_vit.onnx, fashion_calib.npz, fashion_test.npz and a README.md of what was measured,
and prints the loss of each epoch and the top-1 accuracy.

Both models take `image` [N, 1, 28, 28] float32 in 0..1 (raw / 255; the mean and the deviation are taken off inside
the model) and return `logits` [N, 10]. The CNN keeps its BatchNormalization nodes apart from its convolutions, as a
model that comes straight out of training does.

Needs torch, onnx, onnxruntime and numpy.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from _fashion_data import DEBIAN_FOLDER, Dataset, load_dataset, write_images
from _fashion_export import check_against_torch, export, top1
from _fashion_readme import write_readme
from _fashion_training import RECIPES, count_parameters, train

SEED = 0


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
    write_readme(options.out, data, RECIPES, SEED)
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


if __name__ == "__main__":
    sys.exit(main())
