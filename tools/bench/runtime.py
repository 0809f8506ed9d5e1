"""Quantize real models with comq-onnx and with onnxruntime.quantization, and measure all against FP32 in one run.

    python tools/zoo/export.py zoo
    python tools/bench/runtime.py zoo efficientnet_lite0 minilm --bits 8 --bits 4

All calibrate on the same samples (all of a model's calib.npz) and are measured on its test.npz, by what ONNX Runtime
computes in integers (on a GPU: --device cuda --target ort-cuda). Speed: one sample, one thread, all models in turn in
one process, the median over rounds of the ratios of medians. onnxruntime.quantization: QDQ, per channel, uint8
activations, int8 weights, MinMax, after its own pre-processing, reduce_range off. Kernels: integer products found in
the graph that ONNX Runtime made, and how many layers of ours were written for them.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import comq_onnx
from comq_onnx.evaluate.kernels import INTEGER_PRODUCTS, executed_kernels
from comq_onnx.evaluate.outputs import compare_outputs
from comq_onnx.evaluate.speed import latency
from comq_onnx.runtime import device as devices
from comq_onnx.runtime.session import Session
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples


class Reader(CalibrationDataReader):
    """Give samples one at a time, as onnxruntime.quantization asks for them."""

    def __init__(self, samples: Samples) -> None:
        self._feeds: Iterator[dict[str, Any]] = samples.batches(1)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next sample; None after the last."""
        return next(self._feeds, None)


def quantize_with_onnxruntime(model: Path, out: Path, samples: Samples, work: Path) -> None:
    """Quantize as the guide of onnxruntime.quantization tells its users."""
    ready = work / "preprocessed.onnx"
    try:
        quant_pre_process(str(model), str(ready))
    except Exception:  # its symbolic shape inference fails on some models; the guide says to skip it then
        quant_pre_process(str(model), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready), str(out), Reader(samples), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def rows(folder: Path, bits: tuple[int, ...], rounds: int, device: str, options: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one model's part of the table."""
    source = Session(folder / "model.onnx", device)
    samples, test = (load_samples(folder / name, source.inputs) for name in ("calib.npz", "test.npz"))
    with tempfile.TemporaryDirectory() as work:
        paths = {"FP32": folder / "model.onnx"}
        planned: dict[str, int] = {}
        try:
            quantize_with_onnxruntime(paths["FP32"], Path(work) / "ort.onnx", samples, Path(work))
            paths["onnxruntime"] = Path(work) / "ort.onnx"
        except Exception as error:  # whatever it raises, the others are measured
            yield f"| {folder.name} | onnxruntime | fails: {str(error).splitlines()[0][:80]} |" + " |" * 6
        for b in bits:
            name = f"comq-onnx, {b} bits"
            paths[name] = Path(work) / f"ours{b}.onnx"
            report = comq_onnx.quantize(
                paths["FP32"], paths[name], folder / "calib.npz", bits=b, max_samples=len(samples), **options
            )
            planned[name] = sum(layer.form in ("integer", "blocked") for layer in report.layers)
        sessions = [Session(path, device, threads=1) for path in paths.values()]
        spent = [latency(sessions, test, seconds=8, most=400) for _ in range(rounds)]
        for i, (name, path) in enumerate(paths.items()):
            worst = min(compare_outputs(source, Session(path, device), test, 16), key=lambda o: o.sqnr_db)
            agreement = "" if worst.top1_agreement is None else f"{worst.top1_agreement:.1%}"
            speed = float(np.median([times[0] / times[i] for times in spent]))
            best = min(times[i] for times in spent)
            found = sum(n for op, n in executed_kernels(path, device).integer.items() if op in INTEGER_PRODUCTS)
            kernels = f"{found} / {planned[name]}" if name in planned else str(found)
            kept = f"{worst.sqnr_db:.1f} | {worst.cosine:.4f} | {agreement}"
            megabytes = path.stat().st_size / 1e6
            yield f"| {folder.name} | {name} | {megabytes:.2f} | {kept} | {best:.2f} | {speed:.2f}x | {kernels} |"


@click.command(help=__doc__)
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--bits", multiple=True, type=int, default=(8, 4), show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Rounds of latency, each of some seconds.")
@click.option("--activations", default="auto", show_default=True)
@click.option("--target", default="ort-cpu", show_default=True, help="As for comq-onnx.")
@click.option("--device", default="cpu", show_default=True, help="Where all of them run: cpu, cuda or tensorrt.")
@click.option("--uniform", is_flag=True, help="The same bits for all layers.")
def main(
    zoo: Path,
    models: tuple[str, ...],
    bits: tuple[int, ...],
    rounds: int,
    activations: str,
    target: str,
    device: str,
    uniform: bool,
) -> None:
    """Print the table."""
    click.echo(f"onnxruntime {onnxruntime.__version__}, {platform.machine()}")
    click.echo("| model | | MB | SQNR dB | cosine | top-1 agreement | ms | speed | kernels |")
    click.echo("|---|---|---|---|---|---|---|---|---|")
    chosen = devices.choose(device, ("tensorrt",)).device
    options = {"activations": activations, "target": target, "uniform": uniform}
    for name in models:
        for row in rows(zoo / name, bits, rounds, chosen, options):
            click.echo(row)


if __name__ == "__main__":
    main()
