"""Quantize real models for onnxruntime-web, and run them in WebAssembly beside their sources: one row for each.

    python tools/zoo/export.py zoo
    python tools/bench/web.py zoo --only squeezenet --bits 4 --bits 8

Models are ZOO/NAME/model.onnx with calib.npz and test.npz beside it, as tools/zoo/export.py makes them; with models for
ZOO those of the repository. They run under Node with one thread, all forms of a model in turn; npm installs
onnxruntime-web into build/web once. A row says: size before and after; milliseconds of the float model in WebAssembly
and how many times as fast the quantized one is there (low quintiles of the runs); how many layers were planned in
integers, and integer products found in what ONNX Runtime makes of the file without the layouts of x86 CPUs; SQNR and
top-1 agreement of the answers in WebAssembly with the float model's, and their SQNR with what ONNX Runtime's CPU
computes of the same file.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
from _web import FOLDER, PACKAGE, VERSION, Ran, Wasm, install

from comq_onnx.evaluate.kernels import INTEGER_PRODUCTS, executed_kernels
from comq_onnx.metrics import ComparisonSums
from comq_onnx.runtime.session import Session
from comq_onnx.samples.load import load_samples

COLUMNS = (
    "model", "target", "bits", "MB", "float ms", "speed", "planned", "found", "SQNR dB", "top-1 agreement",
    "SQNR dB to the CPU",
)  # fmt: skip
# level of optimization without layouts of x86 CPUs
EXTENDED = 2


@dataclass(frozen=True)
class Source:
    """Name the files of a float model."""

    name: str
    model: Path
    calib: Path
    test: Path


@dataclass(frozen=True)
class Made:
    """Hold a quantized model: for which target, at how many bits, and what the command reported."""

    target: str
    bits: int
    path: Path
    said: Mapping[str, Any]


def sources(zoo: Path, only: tuple[str, ...]) -> Iterator[Source]:
    """Yield the models of a folder."""
    beside = ("calib.npz", "test.npz")
    found = [Source(p.parent.name, p, *(p.with_name(name) for name in beside)) for p in zoo.glob("*/model.onnx")]
    samples = (zoo / "fashion_calib.npz", zoo / "fashion_test.npz")
    found += [Source(path.stem, path, *samples) for path in zoo.glob("fashion_*.onnx")]
    yield from sorted((x for x in found if not only or x.name in only), key=lambda x: x.name)


def quantize(source: Source, target: str, bits: int, extra: tuple[str, ...], work: Path) -> Made:
    """Quantize a model with the command line. Raises ClickException with its last words."""
    out = work / f"{source.name}_{target}_{bits}.onnx"
    report = out.with_suffix(".json")
    command = [
        sys.executable, "-m", "comq_onnx", str(source.model), "--calib", str(source.calib), "--target", target,
        "--bits", str(bits), "--uniform", "-o", str(out), "--json", str(report), "-q", *extra,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    return Made(target, bits, out, json.loads(report.read_text()))


def measure(source: Source, made: list[Made], wasm: Wasm, count: int, seconds: float) -> Iterator[tuple[object, ...]]:
    """Run a model and its quantized forms in WebAssembly, and yield the cells of a row for each form."""
    before = Session(source.model)
    samples = load_samples(source.test, before.inputs, count=count).few(count)
    paths = [source.model, *(one.path for one in made)]
    [timed] = wasm.run([(paths, next(samples.batches(1)))], seconds)
    answers = wasm.run([(paths[1:], feeds) for feeds in samples.batches(count)])
    expected = [before.run(feeds) for feeds in samples.batches(count)]
    for i, one in enumerate(made):
        ran = [timed[i + 1], *(batch[i] for batch in answers)]
        size = "{before:.2f} -> {after:.2f}".format(**{when: n / 1e6 for when, n in one.said["size"].items()})
        cells = (source.name, one.target, one.bits, size)
        if failed := next((x.error for x in (timed[0], *ran) if x.error), ""):
            yield (*cells, failed, *[""] * (len(COLUMNS) - len(cells) - 1))
            continue
        counts = executed_kernels(one.path, level=EXTENDED).counts
        here = Session(one.path)
        native = [here.run(feeds) for feeds in samples.batches(count)]
        to_float, agreement = worst(expected, ran[1:])
        yield (
            *cells, f"{spent(timed[0]):.2f}", f"{spent(timed[0]) / spent(timed[i + 1]):.2f}x",
            sum(layer["form"] == "integer" for layer in one.said["layers"]),
            sum(n for op, n in counts.items() if op in INTEGER_PRODUCTS), f"{to_float:.1f}",
            "" if agreement is None else f"{agreement:.1%}", f"{worst(native, ran[1:])[0]:.0f}",
        )  # fmt: skip


def worst(expected: list[dict[str, Any]], ran: list[Ran]) -> tuple[float, float | None]:
    """Compare answers batch by batch: the least SQNR and the least agreement of any output of floats."""
    found = []
    for name in expected[0]:
        if np.asarray(expected[0][name]).dtype.kind != "f":
            continue
        sums = ComparisonSums()
        for batch, one in zip(expected, ran, strict=True):
            assert one.outputs is not None
            sums.add(batch[name], one.outputs[name])
        found.append(sums.result(name))
    agreements = [x.top1_agreement for x in found if x.top1_agreement is not None]
    return min(x.sqnr_db for x in found), min(agreements, default=None)


def spent(ran: Ran) -> float:
    """Return the milliseconds of a model when little else ran: the low quintile."""
    return float(np.quantile(ran.times_ms, 0.2))


@click.command(help=__doc__)
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", multiple=True, help="Only these models.")
@click.option("--bits", multiple=True, type=int, default=(4, 8), show_default=True)
@click.option("--target", "targets", multiple=True, default=("ort-web",), show_default=True, help="As of comq-onnx.")
@click.option("--count", default=32, show_default=True, help="Samples of test.npz to compare on, at most.")
@click.option("--seconds", default=5.0, show_default=True, help="How long each model is timed.")
@click.option("--web", default=FOLDER, show_default=True, type=click.Path(file_okay=False, path_type=Path),
              help="Where npm installs onnxruntime-web.")  # fmt: skip
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep the models in this folder.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    zoo: Path, only: tuple[str, ...], bits: tuple[int, ...], targets: tuple[str, ...], count: int,
    seconds: float, web: Path, keep: Path | None, options: tuple[str, ...],
) -> None:  # fmt: skip
    """Print the table; OPTIONS go to comq-onnx."""
    package = install(web)
    versions = f"{PACKAGE} {VERSION}, onnxruntime {onnxruntime.__version__}, {platform.machine()}"
    click.echo(f"{versions}{', ' + ' '.join(options) if options else ''}\n")
    click.echo("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory() as temporary, Wasm(package) as wasm:
        work = keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for source in sources(zoo, only):
            made = [quantize(source, target, b, options, work) for target in targets for b in bits]
            for cells in measure(source, made, wasm, count, seconds):
                click.echo("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
