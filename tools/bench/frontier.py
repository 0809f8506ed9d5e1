"""Compare bits by layer with the same bits for all at the same size, and the survey's predictions with measurements.

    python tools/bench/frontier.py zoo squeezenet minilm
    python tools/bench/frontier.py zoo squeezenet --drops 1 --drops 3 --drops 20dB

ZOO is what tools/zoo/export.py made; calib.npz calibrates and surveys, the other samples of test.npz measure. It
prints for each number of bits the model with the same bits for all layers and the one whose bits the survey chose for a
file no larger; then points of the frontier with their predictions, and the rank correlation of predicted and measured.
With --drops it prints whether the promise of --max-drop is kept on the samples that measure.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from comq_onnx import Options, quantize
from comq_onnx.bits.choose import make_tradeoff
from comq_onnx.bits.tradeoff import Tradeoff
from comq_onnx.calibrate.walk import walk
from comq_onnx.context import Context
from comq_onnx.errors import ComqError
from comq_onnx.evaluate.outputs import compare_outputs
from comq_onnx.metrics import OutputComparison
from comq_onnx.model.files import written
from comq_onnx.model.float_model import FloatModel, open_model
from comq_onnx.options.budgets import parse_drop
from comq_onnx.plan.faithful import prepare_faithfully
from comq_onnx.plan.make import make_plan
from comq_onnx.plan.plan import Plan
from comq_onnx.report.report import Report
from comq_onnx.runtime.session import Session
from comq_onnx.samples.dataset import Dataset, load_dataset
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples
from comq_onnx.write.emit import emit_model
from comq_onnx.write.finish import finish


@dataclass
class Subject:
    """Hold a model of the zoo, opened and planned, with the samples that measure.

    All that this tool asks of the pipeline's own parts stands in this class.
    """

    name: str
    source: FloatModel
    data: Dataset
    plan: Plan
    context: Context
    calibration: Path
    test: Samples

    @classmethod
    def open(cls, zoo: Path, name: str, **options: Any) -> Subject:
        """Open a folder of the zoo; the samples that calibrate do not measure."""
        folder = zoo / name
        calibration = folder / "calib.npz"
        context = Context.of(Options(**options))
        source = open_model(folder / "model.onnx", context)
        data = load_dataset(source, calibration, context)
        plan = make_plan(source, prepare_faithfully(source, data, context), data, context)
        test = unseen(load_samples(folder / "test.npz", source.session.inputs), calibration)
        return cls(name, source, data, plan, context, calibration, test)

    def survey(self) -> Tradeoff:
        """Measure what each layer's bits do to the outputs."""
        tradeoff = make_tradeoff(self.plan, self.source, self.data, self.context)
        assert tradeoff is not None
        return tradeoff

    def uniform_bits(self, count: int) -> dict[str, int]:
        """Return the same bits for all layers but embeddings, which have 8."""
        embeddings = {layer.name for layer in self.plan.layers if layer.op == "Gather"}
        return {name: 8 if name in embeddings else count for name in self.plan.bits}

    def measure(self, bits: Mapping[str, int]) -> tuple[int, OutputComparison]:
        """Quantize with the bits of each layer; return the bytes of the file, and its worst output."""
        solved = walk(self.plan.with_bits(dict(bits), self.context.options), self.data, self.context)
        model = finish(emit_model(solved), {}, frozenset()).model
        with tempfile.TemporaryDirectory() as work, written(model, Path(work) / "model.onnx") as (path, size):
            return size, self.worst(path)

    def worst(self, path: Path) -> OutputComparison:
        """Compare a model with its source on the samples that measure; return the worst output."""
        before, after = Session(self.source.path), Session(path)
        return min(compare_outputs(before, after, self.test, 16), key=lambda output: output.sqnr_db)

    def quantize(self, out: Path, **options: Any) -> Report:
        """Quantize the model with its calibration samples and write it to `out`."""
        return quantize(self.source.path, out, self.calibration, **options)


def unseen(samples: Samples, calibration: Path) -> Samples:
    """Select the samples that are not among those of another file."""
    with np.load(calibration) as known:
        name = next(iter(samples.arrays))
        seen = {np.ascontiguousarray(row).tobytes() for row in known[name]}
    rows = [np.ascontiguousarray(row).tobytes() for row in samples.arrays[name]]
    return samples.take([i for i, row in enumerate(rows) if row not in seen])


def row(*cells: object) -> None:
    """Print a line of a table."""
    click.echo("| " + " | ".join(str(cell) for cell in cells) + " |")


def result(output: OutputComparison) -> tuple[str, str]:
    """Format SQNR and agreement as cells."""
    agreement = "" if output.top1_agreement is None else f"{output.top1_agreement:.1%}"
    return f"{output.sqnr_db:.1f}", agreement


def frontier(subject: Subject, bits: tuple[int, ...], points: int) -> None:
    """Print both tables of one model."""
    start = time.perf_counter()
    tradeoff = subject.survey()
    surveyed = time.perf_counter() - start
    solving = [compare_at(subject, tradeoff, count) for count in bits]
    if points:
        measure_points(subject, tradeoff, points)
    row(subject.name, f"survey {surveyed:.0f} s", "", "", f"calibrating and solving {np.median(solving):.0f} s", "")


def compare_at(subject: Subject, tradeoff: Tradeoff, count: int) -> float:
    """Print the rows of `count` bits for all layers and of chosen bits at that size; return seconds of the former."""
    start = time.perf_counter()
    size, output = subject.measure(subject.uniform_bits(count))
    spent = time.perf_counter() - start
    row(subject.name, f"{count} for all", f"{size / 1e6:.3f}", "", *result(output))
    chosen = tradeoff.within_size(size)
    bits = tradeoff.bits(chosen)
    size, output = subject.measure(bits)
    predicted = f"{-decibels(tradeoff.noise(chosen)[0]):.1f}"
    row(subject.name, f"auto, {tradeoff.mean_bits(bits):.2f}", f"{size / 1e6:.3f}", predicted, *result(output))
    return spent


def measure_points(subject: Subject, tradeoff: Tradeoff, points: int) -> None:
    """Print points of the frontier, and how the predicted SQNR ranks beside the measured one."""
    low, high = tradeoff.limits()
    predicted, measured = [], []
    for budget in np.geomspace(low * 1.02, high, points):
        chosen = tradeoff.within_codes(int(budget))
        bits = tradeoff.bits(chosen)
        size, output = subject.measure(bits)
        predicted.append(-decibels(tradeoff.noise(chosen)[0]))
        measured.append(output.sqnr_db)
        mean = tradeoff.mean_bits(bits)
        row(subject.name, f"frontier, {mean:.2f}", f"{size / 1e6:.3f}", f"{predicted[-1]:.1f}", *result(output))
    row(subject.name, "rank correlation", "", "", f"{spearmanr(predicted, measured).statistic:.3f}", "")


def decibels(ratio: float) -> float:
    """Compute 10 log10 of a ratio."""
    return 10 * float(np.log10(max(ratio, 1e-20)))


def drops(subject: Subject, asked: tuple[str, ...], options: dict[str, Any]) -> Iterator[bool]:
    """Print and yield whether each drop is kept on the samples that measure, or refused."""
    for text in asked:
        drop = parse_drop(text)
        with tempfile.TemporaryDirectory() as work:
            out = Path(work) / "model.onnx"
            try:
                report = subject.quantize(out, **(options | {"bits": "auto", "max_drop": text}))
            except ComqError as error:
                row(subject.name, f"--max-drop {text}", "", "", f"refused: {error}", "")
                yield True
                continue
            output = subject.worst(out)
        if drop.points is not None:
            assert output.top1_agreement is not None
            kept = 100 * (1 - output.top1_agreement) <= drop.points
        else:
            assert drop.sqnr_db is not None
            kept = output.sqnr_db >= drop.sqnr_db
        size = f"{report.size['after'] / 1e6:.3f}"
        row(subject.name, f"--max-drop {text}", size, "kept" if kept else "NOT KEPT", *result(output))
        yield kept


@click.command(help=__doc__)
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--bits", type=int, multiple=True, default=(3, 4), show_default=True, help="Of the uniform models.")
@click.option("--points", default=6, show_default=True, help="Of the frontier that is measured.")
@click.option(
    "--drops", "asked", multiple=True, metavar="0.5|20dB", help="Measure --max-drop instead; may be repeated."
)
@click.option("--effort", default="default", show_default=True, help="The solver's.")
@click.option("--activations", default="auto", show_default=True, help="As of comq-onnx.")
def main(
    zoo: Path, models: tuple[str, ...], bits: tuple[int, ...], points: int, asked: tuple[str, ...], effort: str,
    activations: str,
) -> None:  # fmt: skip
    row("model", "bits", "MB", "predicted dB", "SQNR dB", "top-1 agreement")
    row(*["---"] * 6)
    kept: list[bool] = []
    for name in models:
        options = {"effort": effort, "activations": activations}
        subject = Subject.open(zoo, name, **options, bits=3.5)
        if asked:
            kept += drops(subject, asked, options)
        else:
            frontier(subject, bits, points)
    if asked:
        click.echo(f"{sum(kept)} of {len(kept)} kept or refused")


if __name__ == "__main__":
    main()
