"""Quantize the real models that tools/zoo/export.py exported, and print one row for each.

    python tools/zoo/export.py zoo
    python tools/bench/suite.py zoo --bits 8 --bits 4

Each model is calibrated on its calib.npz by the command line in a process of its own (so that peak memory is its own)
and measured on its test.npz. A row says: bits, size before and after, SQNR and top-1 agreement of the worst output,
speed over FP32 on one thread (both models in turn in one process, medians), seconds and peak memory of the whole
command, layers quantized to integer kernels found in the graph that ONNX Runtime optimized, and whether the model loads
and runs at all four optimization levels.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import onnxruntime

from comq_onnx.errors import ComqError
from comq_onnx.evaluate.kernels import INTEGER_KERNELS, executed_kernels
from comq_onnx.evaluate.outputs import compare_outputs
from comq_onnx.evaluate.speed import latency
from comq_onnx.runtime.session import Session
from comq_onnx.samples.load import load_samples

LEVELS = {"disabled": 0, "basic": 1, "extended": 2, "all": 99}
# language models run with float activations: their weights are what is large
WEIGHT_ONLY = frozenset({"smollm2"})
PRODUCTS = INTEGER_KERNELS & {
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulNBits", "ConvInteger", "MatMulInteger",
}  # fmt: skip


def run_one(folder: Path, bits: int, extra: tuple[str, ...], keep: Path | None) -> dict[str, Any]:
    """Quantize one model and measure it: a row of the table."""
    with tempfile.TemporaryDirectory() as work:
        out = (keep or Path(work)) / f"{folder.name}_{bits}.onnx"
        report = Path(work) / "report.json"
        options = [*extra, *(["--activations", "none"] if folder.name in WEIGHT_ONLY else [])]
        command = [
            sys.executable, "-m", "comq_onnx", str(folder / "model.onnx"), "--calib", str(folder / "calib.npz"),
            "--bits", str(bits), "--uniform", "-o", str(out), "--json", str(report), "-q", *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"model": folder.name, "bits": bits, "failed": done.stderr.strip().splitlines()[-1]}
        said = json.loads(report.read_text())
        return measure(folder, out, said) | {"model": folder.name, "bits": bits}


def measure(folder: Path, out: Path, said: dict[str, Any]) -> dict[str, Any]:
    """Measure the file at `out` on the model's own test samples."""
    before, after = Session(folder / "model.onnx"), Session(out)
    samples = load_samples(folder / "test.npz", before.inputs)
    outputs = compare_outputs(before, after, samples, 16)
    worst = min(outputs, key=lambda o: o.sqnr_db)
    agreements = [o.top1_agreement for o in outputs if o.top1_agreement is not None]
    times = latency([Session(p, threads=1) for p in (folder / "model.onnx", out)], samples, seconds=6)
    kernels = executed_kernels(out)
    integer = [layer for layer in said["layers"] if layer["form"] in ("integer", "blocked")]
    return {
        "size": said["size"],
        "sqnr_db": worst.sqnr_db,
        "agreement": min(agreements) if agreements else None,
        "speed": times[0] / times[1],
        "seconds": said["seconds"]["total"],
        "peak_mb": said["peak_rss_mb"],
        "layers": len(said["layers"]),
        "integer": (sum(n for op, n in kernels.counts.items() if op in PRODUCTS), len(integer)),
        "levels": [name for name, level in LEVELS.items() if not _runs(out, level, samples)],
    }


def _runs(path: Path, level: int, samples: Any) -> bool:
    try:
        Session(path, level=level).run(next(samples.batches(2)))
    except ComqError as error:
        click.echo(f"{path.name} at level {level}: {error}", err=True)
        return False
    return True


def row(found: dict[str, Any]) -> str:
    """Format one line of a Markdown table."""
    if "failed" in found:
        return f"| {found['model']} | {found['bits']} | {found['failed']} |" + " |" * 7
    size = found["size"]
    agreement = "" if found["agreement"] is None else f"{found['agreement']:.1%}"
    levels = "all" if not found["levels"] else "not " + ", ".join(found["levels"])
    integer = "{} / {}".format(*found["integer"])
    return (
        f"| {found['model']} | {found['bits']} | {size['before'] / 1e6:.2f} -> {size['after'] / 1e6:.2f} | "
        f"{found['sqnr_db']:.1f} | {agreement} | {found['speed']:.2f}x | {found['seconds']:.0f} | "
        f"{found['peak_mb']:,.0f} | {integer} | {levels} |"
    )


@click.command()
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--bits", multiple=True, type=int, default=(8, 4), show_default=True)
@click.option("--only", multiple=True, help="Only these models.")
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep the quantized models in this folder."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    zoo: Path, bits: tuple[int, ...], only: tuple[str, ...], keep: Path | None, json_path: Path | None,
    options: tuple[str, ...],
) -> None:  # fmt: skip
    """Quantize every model of ZOO; OPTIONS after -- go to comq-onnx."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    click.echo(f"onnxruntime {onnxruntime.__version__}, {platform.machine()}, Python {platform.python_version()}")
    click.echo(
        "| model | bits | MB | SQNR dB | top-1 agreement | speed | seconds | peak MB | integer / planned | levels |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for folder in sorted(p.parent for p in zoo.glob("*/model.onnx")):
        if only and folder.name not in only:
            continue
        for b in bits:
            if folder.name in WEIGHT_ONLY and b == 8 and 4 in bits:
                continue
            rows.append(run_one(folder, b, options, keep))
            click.echo(row(rows[-1]))
            if json_path:
                json_path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
