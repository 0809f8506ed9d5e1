"""Measure two models on labelled samples: top-1 of both, paired flips, agreement, SQNR, cosine and KL divergence.

    python tools/evaluate.py model.onnx model_q.onnx --samples test.npz [--labels labels.npy]

Labels: an array `label` (or `labels`) in the .npz, or a file of its own; without any, what needs none is printed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from comq_onnx.evaluate.outputs import compare_outputs
from comq_onnx.metrics import looks_like_scores, softmax
from comq_onnx.runtime.session import Session
from comq_onnx.samples.load import load_samples


def read(path: Path, labels: Path | None) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Read the sample arrays by input name, and the labels where there are any."""
    with np.load(path, allow_pickle=False) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    inside = next((arrays.pop(name) for name in ("label", "labels") if name in arrays), None)
    return arrays, np.load(labels, allow_pickle=False) if labels else inside


def classify(before: np.ndarray, after: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Compute agreement and KL of two arrays of class scores; with labels top-1 of both and the paired flips."""
    first, second = before.argmax(-1), after.argmax(-1)
    p, q = softmax(before.astype(np.float64)), softmax(after.astype(np.float64))
    kl = (p * (np.log(p + 1e-12) - np.log(q + 1e-12))).sum(-1).mean()
    found: dict[str, Any] = {"agreement": float((first == second).mean()), "kl": float(kl)}
    if labels is not None and labels.shape == first.shape:
        right, still = first == labels, second == labels
        found |= {
            "top1_before": float(right.mean()),
            "top1_after": float(still.mean()),
            "right_to_wrong": int((right & ~still).sum()),
            "wrong_to_right": int((~right & still).sum()),
        }
    return found


def evaluate(before: Path, after: Path, samples: Path, labels: Path | None, batch_size: int) -> dict[str, Any]:
    """Compute all figures by output name."""
    arrays, truth = read(samples, labels)
    first, second = Session(before), Session(after)
    data = load_samples(arrays, first.inputs)
    result: dict[str, Any] = {
        o.name: {"sqnr_db": o.sqnr_db, "cosine": o.cosine} for o in compare_outputs(first, second, data, batch_size)
    }
    outputs: dict[str, list[list[np.ndarray]]] = {name: [[], []] for name in result}
    for feeds in data.batches(batch_size):
        for k, session in enumerate((first, second)):
            for name, value in session.run(feeds, list(result)).items():
                outputs[name][k].append(value)
    for name, (a, b) in outputs.items():
        if looks_like_scores(a[0]):
            result[name] |= classify(np.concatenate(a), np.concatenate(b), truth)
    return result


@click.command()
@click.argument("before", type=click.Path(exists=True, path_type=Path))
@click.argument("after", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--samples", required=True, type=click.Path(exists=True, path_type=Path), help="An .npz, arrays by input name."
)
@click.option("--labels", type=click.Path(exists=True, path_type=Path), help="An .npy of labels.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(
    before: Path, after: Path, samples: Path, labels: Path | None, batch_size: int, json_path: Path | None
) -> None:
    """Compare model BEFORE with model AFTER on labelled samples."""
    result = evaluate(before, after, samples, labels, batch_size)
    table = Table(title=f"{before.name} -> {after.name}, onnxruntime {onnxruntime.__version__}", title_justify="left")
    keys = list(dict.fromkeys(key for figures in result.values() for key in figures))
    table.add_column("output")
    for key in keys:
        table.add_column(key, justify="right")
    for name, figures in result.items():
        cells = (figures.get(key, "") for key in keys)
        table.add_row(name, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    if json_path:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
