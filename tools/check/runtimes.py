"""Quantize models for each target, and look for the planned layers in its own runtime, without a GPU.

    pip install -e '.[cpu,runtimes]'
    python tools/zoo/export.py zoo
    python tools/check/runtimes.py zoo --only minilm --target openvino --target tensorrt --bits 8 --bits 4

Each model is calibrated on its calib.npz by the command line, all layers with the same bits, and compared with its
source on its test.npz, as ONNX Runtime computes both. Then its planned layers are looked for:

- openvino compiles it: found is what runs in u8 or i8 (weight-only: what reads i8 or i4 weights). The speed is that
  over the float model in float32, and in the precision that OpenVINO chooses by itself (bfloat16 where there is AMX),
  all on one thread, in turn, medians.
- tensorrt (TensorRT for RTX) builds an engine for compute capability 8.9 and one sample: found is what reads int8 and
  int8 (weight-only of 4 bits: the INT4 weights that the engine holds).
- For ort-cpu the graph that ONNX Runtime optimized is read, for ort-cuda too, whose fusion is the same: found is what
  has an integer kernel.

The exit code is 1 where a layer is not found, or the file breaks a rule of its target.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import _runtimes
import click
import numpy as np

from comq_onnx.evaluate.kernels import INTEGER_PRODUCTS, executed_kernels
from comq_onnx.evaluate.outputs import compare_outputs
from comq_onnx.model.source import read_model
from comq_onnx.runtime.session import Session
from comq_onnx.samples.load import load_samples
from comq_onnx.targets.catalog import TARGETS
from comq_onnx.write.check import lint

COLUMNS = ("target", "model", "bits", "MB", "SQNR dB", "top-1 agreement", "planned", "found", "speed", "rules broken")


def run_one(
    folder: Path, target: str, bits: int, extra: tuple[str, ...], keep: Path | None, count: int
) -> dict[str, Any]:
    """Quantize one model for one target and measure it: a row of the table."""
    row: dict[str, Any] = {"target": target, "model": folder.name, "bits": bits}
    with tempfile.TemporaryDirectory() as work:
        out = (keep or Path(work)) / f"{folder.name}_{target}_{bits}.onnx"
        report = Path(work) / "report.json"
        command = [
            sys.executable, "-m", "comq_onnx", str(folder / "model.onnx"), "--calib", str(folder / "calib.npz"),
            "--target", target, "--bits", str(bits), "--uniform", "-o", str(out), "--json", str(report), "-q", *extra,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return row | {"failed": done.stderr.strip().splitlines()[-1]}
        said = json.loads(report.read_text())
        return row | measure(folder, out, said, target, count) | {"seconds": said["seconds"]["total"]}


def measure(folder: Path, out: Path, said: dict[str, Any], target: str, count: int) -> dict[str, Any]:
    """Measure the file at `out` on the model's own test samples, and look at it in the target's runtime."""
    elsewhere = TARGETS[target].runs_outside_ort
    before, after = (
        Session(folder / "model.onnx"),
        Session(out, float_matmul_nbits=elsewhere, disable_qdq_fusion=elsewhere),
    )
    samples = load_samples(folder / "test.npz", before.inputs, count=count)
    samples = samples.take(np.arange(min(count, len(samples))))
    outputs = compare_outputs(before, after, samples, 16)
    agreements = [o.top1_agreement for o in outputs if o.top1_agreement is not None]
    integer = [layer for layer in said["layers"] if layer["form"] == "integer"]
    layers = integer or [layer for layer in said["layers"] if layer["form"] == "blocked"]
    feeds = next(samples.batches(1))
    return {
        "size": said["size"],
        "sqnr_db": min(o.sqnr_db for o in outputs),
        "agreement": min(agreements) if agreements else None,
        "planned": len(layers),
        "broken": lint(read_model(out), TARGETS[target]),
        **LOOK[target](folder / "model.onnx", out, layers, feeds),
    }


def _openvino(source: Path, out: Path, layers: list[dict[str, Any]], feeds: dict[str, Any]) -> dict[str, Any]:
    names = [layer["name"] for layer in layers]
    program = _runtimes.openvino_program(out)
    if layers and layers[0]["form"] == "blocked":
        # by number: what is fused with attention has not the layer's name
        packed = sum(product.integer for product in program.products if product.kind == "FullyConnected")
        missing = names[packed:]
    else:
        missing = [name for name, good in _runtimes.in_integers(names, program.products, out).items() if not good]
    models = [_runtimes.openvino_compiled(*how) for how in ((source, "f32"), (source,), (out,))]
    exact, before, after = _runtimes.openvino_latency(models, feeds, seconds=10)
    return {
        "missing": missing,
        "speed": f"{exact / after:.2f}x, {before / after:.2f}x",
        "unpacked at every call": len(program.unpacking),
    }


def _tensorrt(_source: Path, out: Path, layers: list[dict[str, Any]], feeds: dict[str, Any]) -> dict[str, Any]:
    program = _runtimes.tensorrt_program(out, feeds)
    names = [layer["name"] for layer in layers]
    if layers and layers[0]["form"] == "blocked":
        # nothing tells which weight is which
        packed = [layer["name"] for layer in layers if layer["bits"] <= 4]
        return {"missing": packed[program.int4_weights :], "engine": program.bytes}
    found = _runtimes.in_integers(names, program.products, out)
    return {"missing": [name for name, good in found.items() if not good], "engine": program.bytes}


def _onnxruntime(_source: Path, out: Path, layers: list[dict[str, Any]], _feeds: dict[str, Any]) -> dict[str, Any]:
    kernels = executed_kernels(out).of_layer
    return {"missing": [x["name"] for x in layers if kernels.get(x["name"]) not in INTEGER_PRODUCTS]}


LOOK = {"ort-cpu": _onnxruntime, "ort-cuda": _onnxruntime, "tensorrt": _tensorrt, "openvino": _openvino}


def line(row: dict[str, Any]) -> str:
    """Format one line of a Markdown table."""
    if "failed" in row:
        return f"| {row['target']} | {row['model']} | {row['bits']} | {row['failed']} |" + " |" * (len(COLUMNS) - 4)
    agreement = "" if row["agreement"] is None else f"{row['agreement']:.1%}"
    size = "{before:.2f} -> {after:.2f}".format(**{when: n / 1e6 for when, n in row["size"].items()})
    cells = (
        row["target"], row["model"], row["bits"], size, f"{row['sqnr_db']:.1f}", agreement, row["planned"],
        row["planned"] - len(row["missing"]), row.get("speed", ""), len(row["broken"]),
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def versions() -> str:
    """Name the versions that the figures were measured with."""
    names = ("onnxruntime", "openvino", "tensorrt-rtx-cu13-libs")
    known = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
    return ", ".join([*(f"{name} {known.get(name, 'not here')}" for name in names), platform.machine()])


@click.command()
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", multiple=True, help="Only these models.")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(LOOK)), default=("openvino", "tensorrt"),
              show_default=True)  # fmt: skip
@click.option("--bits", multiple=True, type=int, default=(8, 4), show_default=True)
@click.option("--count", default=200, show_default=True, help="Samples of test.npz to compare on, at most.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep the models in this folder.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    zoo: Path, only: tuple[str, ...], targets: tuple[str, ...], bits: tuple[int, ...], count: int, keep: Path | None,
    json_path: Path | None, options: tuple[str, ...],
) -> None:  # fmt: skip
    """Quantize the models of ZOO for each target, and see what its runtime makes of them; OPTIONS go to comq-onnx."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    click.echo(f"{versions()}{', ' + ' '.join(options) if options else ''}\n")
    click.echo("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows = []
    for folder in sorted(p.parent for p in zoo.glob("*/model.onnx")):
        if only and folder.name not in only:
            continue
        for target in targets:
            for b in bits:
                rows.append(run_one(folder, target, b, options, keep, count))
                click.echo(line(rows[-1]))
                if json_path:
                    json_path.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any("failed" in row or row["missing"] or row["broken"] for row in rows))


if __name__ == "__main__":
    main()
