"""Bits by layer against the same bits for all, at the same size; what the survey predicts against what comes out.

    python tools/bench/frontier.py zoo squeezenet minilm
    python tools/bench/frontier.py zoo squeezenet --drops 1 --drops 3 --drops 20dB

ZOO is what tools/zoo/export.py made; calib.npz calibrates and surveys, the other samples of test.npz measure. The first
table has, for each number of bits, the model with the same bits for all layers and the one whose bits the survey chose
for a file no larger; the second the frontier with its predictions, and their rank correlation. With --drops: whether
what --max-drop promises is kept on the samples that measure.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import spearmanr

from comq_onnx.errors import ComqError
from comq_onnx.evaluate import compare_outputs
from comq_onnx.metrics import OutputComparison
from comq_onnx.model.files import written
from comq_onnx.options.budgets import parse_drop
from comq_onnx.pipeline import Options, Planned, Run, quantize
from comq_onnx.runtime.session import Session
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples


@dataclass
class Subject:
    """A model of the zoo, opened and planned, with the samples that measure."""

    name: str
    run: Run
    planned: Planned
    test: Samples

    def measure(self, planned: Planned) -> tuple[int, OutputComparison]:
        """The bytes of the file, and its worst output on the samples that measure."""
        solved = self.run.solve(planned)
        with (
            tempfile.TemporaryDirectory() as work,
            written(solved.model, Path(work) / "model.onnx") as (path, size),
        ):
            return size, self.worst(path)

    def worst(self, path: Path) -> OutputComparison:
        before, after = Session(self.run.path), Session(path)
        return min(compare_outputs(before, after, self.test, 16), key=lambda output: output.sqnr_db)


def open_subject(zoo: Path, name: str, **options: Any) -> Subject:
    """A folder of the zoo; what calibrates does not measure."""
    folder = zoo / name
    run = Run(
        folder / "model.onnx", None, str(folder / "calib.npz"), Options(**options), lambda _what, _done, _total: None
    )
    run.open()
    planned = run.planned()
    everything = load_samples(folder / "test.npz", Session(folder / "model.onnx").inputs)
    return Subject(name, run, planned, unseen(everything, folder / "calib.npz"))


def unseen(samples: Samples, calibration: Path) -> Samples:
    """The samples that are not among those of the other file."""
    with np.load(calibration) as known:
        name = next(iter(samples.arrays))
        seen = {np.ascontiguousarray(row).tobytes() for row in known[name]}
    rows = [np.ascontiguousarray(row).tobytes() for row in samples.arrays[name]]
    return samples.take([i for i, row in enumerate(rows) if row not in seen])


def row(*cells: object) -> None:
    """A line of a table."""
    click.echo("| " + " | ".join(str(cell) for cell in cells) + " |")


def result(output: OutputComparison) -> tuple[str, str]:
    """SQNR and agreement as cells."""
    agreement = "" if output.top1_agreement is None else f"{output.top1_agreement:.1%}"
    return f"{output.sqnr_db:.1f}", agreement


def frontier(subject: Subject, bits: tuple[int, ...], points: int) -> None:
    """Both tables of one model."""
    run, planned = subject.run, subject.planned
    start = time.perf_counter()
    space = run.space(planned)
    surveyed = time.perf_counter() - start
    solving = []
    for count in bits:
        start = time.perf_counter()
        same = run.with_bits(planned, {name: 8 if name in embeddings(planned) else count for name in planned.bits})
        size, output = subject.measure(same)
        solving.append(time.perf_counter() - start)
        row(subject.name, f"{count} for all", f"{size / 1e6:.3f}", "", *result(output))
        chosen = space.within_size(size)
        size, output = subject.measure(run.with_bits(planned, space.bits(chosen)))
        mean = space.mean_bits(space.bits(chosen))
        row(
            subject.name,
            f"auto, {mean:.2f}",
            f"{size / 1e6:.3f}",
            f"{-decibels(space.noise(chosen)[0]):.1f}",
            *result(output),
        )
    low, high = space.limits()
    predicted, measured = [], []
    for budget in np.geomspace(low * 1.02, high, points) if points else []:
        chosen = space.within_codes(int(budget))
        size, output = subject.measure(run.with_bits(planned, space.bits(chosen)))
        predicted.append(-decibels(space.noise(chosen)[0]))
        measured.append(output.sqnr_db)
        mean = space.mean_bits(space.bits(chosen))
        row(subject.name, f"frontier, {mean:.2f}", f"{size / 1e6:.3f}", f"{predicted[-1]:.1f}", *result(output))
    if points:
        row(subject.name, "rank correlation", "", "", f"{spearmanr(predicted, measured).statistic:.3f}", "")
    row(subject.name, f"survey {surveyed:.0f} s", "", "", f"calibrating and solving {np.median(solving):.0f} s", "")


def embeddings(planned: Planned) -> set[str]:
    """The layers that are looked up."""
    return {layer.name for layer in planned.prepared.layers if layer.op == "Gather"}


def decibels(ratio: float) -> float:
    """10 log10."""
    return 10 * float(np.log10(max(ratio, 1e-20)))


def drops(subject: Subject, asked: tuple[str, ...], options: dict[str, Any]) -> Iterator[bool]:
    """Whether each drop is kept on the samples that measure, or refused."""
    for text in asked:
        drop = parse_drop(text)
        with tempfile.TemporaryDirectory() as work:
            out = Path(work) / "model.onnx"
            try:
                report = quantize(
                    subject.run.path, out, subject.run.source_samples, **(options | {"bits": "auto", "max_drop": text})
                )
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
        subject = open_subject(zoo, name, **options, bits=3.5)
        if asked:
            kept += drops(subject, asked, options)
        else:
            frontier(subject, bits, points)
    if asked:
        click.echo(f"{sum(kept)} of {len(kept)} kept or refused")


if __name__ == "__main__":
    main()
