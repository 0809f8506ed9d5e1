"""Quantize one model on real samples, on synthetic ones and on noise, and measure all on the same unseen real samples.

    python tools/bench/synthetic.py model.onnx --calib calib.npz --test test.npz --bits 8

Noise is white, mean 0 and deviation 1, for inputs of floats, and uniform over the vocabulary for token ids. With
--tokenizer synthetic text of the bundled page is measured too. --samples says how many there are of each. It prints a
line for each kind: SQNR, cosine and top-1 agreement of the worst output.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime

import comq_onnx
from comq_onnx.evaluate.outputs import compare_outputs
from comq_onnx.model.source import read_model
from comq_onnx.runtime.session import Session
from comq_onnx.samples.clues import token_limits


def noise(model: Path, source: Session, like: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Draw white noise of the shape of each array of `like`, and random tokens; other inputs stay as they are."""
    rng = np.random.default_rng(0)
    limits = token_limits(read_model(model))
    made = {name: array[:count] for name, array in like.items()}
    for info in source.inputs:
        shape = (count, *like[info.name].shape[1:])
        if info.name in limits:
            made[info.name] = rng.integers(0, limits[info.name], shape)
        elif info.dtype.kind == "f":
            made[info.name] = rng.standard_normal(shape, np.float32)
    return made


def rows(
    model: Path, source: Session, calib: Path, tokenizer: Path | None, count: int, length: int | None
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield name, samples and options of each way to calibrate."""
    real = cut(calib, length)
    yield "real samples", real, {}
    yield "synthetic, nothing given", None, {} if length is None else {"length": length}
    if tokenizer is not None:
        yield "synthetic, with its tokenizer", None, {"tokenizer": str(tokenizer)}
    yield "noise", noise(model, source, real, count), {}


def cut(path: Path, length: int | None) -> dict[str, np.ndarray]:
    """Read the arrays of a file; those of rank 2 (tokens) are cut to `length`."""
    with np.load(path, allow_pickle=False) as loaded:
        arrays = {name: loaded[name] for name in loaded.files}
    return {name: a[:, :length] if a.ndim == 2 else a for name, a in arrays.items()}


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--calib", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--test", "test_path", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--bits", default=8, show_default=True)
@click.option("--effort", default="default", show_default=True)
@click.option("--samples", "count", default=128, show_default=True, help="Samples to calibrate on, of every kind.")
@click.option("--length", type=int, help="Cut real tokens, and make synthetic ones, to this length.")
@click.option("--activations", default="auto", show_default=True)
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path))
def main(
    model: Path, calib: Path, test_path: Path, bits: int, effort: str, count: int, length: int | None,
    activations: str, tokenizer: Path | None,
) -> None:  # fmt: skip
    """Measure what synthetic samples cost MODEL."""
    source = Session(model)
    test = comq_onnx.load_samples(cut(test_path, length), source.inputs)
    click.echo(f"onnxruntime {onnxruntime.__version__}; {bits} bits, effort {effort}, measured on {len(test)} samples")
    click.echo("| calibrated on | samples | SQNR dB | cosine | top-1 agreement |")
    click.echo("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, samples, options) in enumerate(rows(model, source, calib, tokenizer, count + count // 8, length)):
            out = Path(folder) / f"{i}.onnx"
            report = comq_onnx.quantize(
                model, out, samples, bits=bits, effort=effort, activations=activations, max_samples=count,
                device="cpu", **options,
            )  # fmt: skip
            worst = min(compare_outputs(source, Session(out), test, 16), key=lambda o: o.sqnr_db)
            agreement = "" if worst.top1_agreement is None else f"{worst.top1_agreement:.1%}"
            click.echo(
                f"| {name} | {report.samples['used']} | {worst.sqnr_db:.1f} | {worst.cosine:.4f} | {agreement} |"
            )


if __name__ == "__main__":
    main()
