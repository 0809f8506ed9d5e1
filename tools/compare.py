"""Compare two models on the same samples, or the reports of several runs.

    python tools/compare.py model.onnx model_q.onnx --samples test.npz
    python tools/compare.py model.onnx model_q.onnx --samples photos/ --preprocess imagenet --json compared.json
    python tools/compare.py four.json eight.json --html compared.html

Of two models it tells how near the outputs are, size, speed, and the kernels of the second one. Any two models with
the same inputs and outputs will do, quantized by whatever tool. Without --samples both run on synthetic ones: that
tells their speed, and little else. tools/evaluate.py measures against labels.

Reports are what --json of comq-onnx wrote, of one model or of several: the table has a line for each, and --html is
the page that comq-onnx writes for several models.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import onnxruntime
from rich.console import Console
from rich.table import Table

import comq_onnx
from comq_onnx.report import several, several_page
from comq_onnx.report.read import read_runs
from comq_onnx.report.terminal import describe_language


def tables(found: comq_onnx.Comparison) -> list[Table]:
    """Format a comparison as tables for a terminal."""
    outputs = Table(box=None, pad_edge=False, title=f"{found.samples} samples", title_justify="left")
    for name in ("output", "SQNR dB", "cosine", "top-1 agreement"):
        outputs.add_column(name, justify="left" if name == "output" else "right")
    for o in found.outputs:
        agreement = "" if o.top1_agreement is None else f"{o.top1_agreement:.1%}"
        outputs.add_row(o.name, f"{o.sqnr_db:.1f}", f"{o.cosine:.4f}", agreement)
    both = Table(box=None, pad_edge=False, show_header=False)
    before, after = found.size["before"], found.size["after"]
    both.add_row("size", f"{before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.0%})")
    slow, fast = found.latency_ms["before"], found.latency_ms["after"]
    both.add_row("latency", f"{slow:.2f} ms -> {fast:.2f} ms ({slow / fast:.2f}x, one sample, one thread)")
    both.add_row("integer", ", ".join(f"{n} {op}" for op, n in found.kernels.items()) or "none")
    both.add_row("others", ", ".join(f"{n} {op}" for op, n in found.float_kernels.items()) or "none")
    both.add_row("by", f"onnxruntime {onnxruntime.__version__}")
    if found.language is not None:
        both.add_row("language", describe_language(found.language))
    for match in found.matches:
        outputs.add_row(f"{match.name}: {match.share:.1%} of its rows or numbers in both")
    return [outputs, both]


def compare_reports(paths: Sequence[Path], html: Path | None) -> None:
    """Print the runs of reports as one table, and write the page that compares them."""
    runs = [run for path in paths for run in read_runs(path)]
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(several.table(runs))
    if html is not None:
        several_page.save_html(runs, html)


@click.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--samples", type=click.Path(path_type=Path), help="Samples, as comq-onnx --calib takes them.")
@click.option("--preprocess", help="For images, as comq-onnx takes it.")
@click.option("--count", default=256, show_default=True, help="Samples to run, at most.")
@click.option("--batch-size", default=16, show_default=True, help="Samples run at once.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N] or tensorrt[:N].")
@click.option("--seconds", default=2.0, show_default=True, help="How long to time both models.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures of two models as JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the page that compares reports.")
def main(
    files: Sequence[Path], samples: Path | None, preprocess: str | None, count: int, batch_size: int, device: str,
    seconds: float, json_path: Path | None, html: Path | None,
) -> None:  # fmt: skip
    """Compare two models on the same samples, the first with the second; or the reports of runs (.json)."""
    of_reports = all(path.suffix == ".json" for path in files)
    if not of_reports and (len(files) != 2 or html is not None):
        raise click.UsageError("give two models, or reports of --json; --html is for reports")
    try:
        if of_reports:
            return compare_reports(files, html)
        found = comq_onnx.compare(
            *files, samples, preprocess=preprocess, count=count, batch_size=batch_size, device=device, seconds=seconds
        )
    except comq_onnx.ComqError as error:
        click.echo(f"compare: {error}", err=True)
        sys.exit(error.exit_code)
    console = Console()
    for table in tables(found):
        (console if console.is_terminal else Console(width=140)).print(table)
    if json_path:
        json_path.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
