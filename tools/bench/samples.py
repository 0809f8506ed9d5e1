"""Measure the peak memory of the command for more and more samples.

    python tools/zoo/export.py zoo --only minilm
    python tools/bench/samples.py zoo/minilm
    python tools/bench/samples.py zoo/efficientnet_lite0 --memory 0.5 --counts 64 --counts 256

Samples of the model's calib.npz are repeated where it has fewer. What the samples themselves take stands in a column of
its own: they are in memory as they are read; tensors between the stages go by disk beyond --memory. One core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from whole import measure

# of so many samples one is held back
HELD_BACK_SHARE = 8


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--counts", multiple=True, type=int, default=(64, 256, 1024), show_default=True, help="Numbers of samples."
)
@click.option("--bits", default=4, show_default=True, help="Number of bits.")
@click.option("--memory", default=0.1, show_default=True, help="GB of tensors between stages that stay in memory.")
def main(folder: Path, counts: tuple[int, ...], bits: int, memory: float) -> None:
    given = np.load(folder / "calib.npz")
    first = 0.0
    click.echo(f"{'samples':>8} {'their MB':>9} {'peak MB':>8} {'of first':>9} {'CPU s':>7}")
    for count in counts:
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "samples.npz"
            # repeated in another order each time: batches differ
            total = count + max(1, count // HELD_BACK_SHARE)
            rows = np.random.default_rng(0).integers(0, len(next(iter(given.values()))), total)
            arrays = {name: array[rows] for name, array in given.items()}
            np.savez(path, **arrays)
            command = [sys.executable, "-m", "comq_onnx", str(folder / "model.onnx"), "--calib", str(path)]
            command += ["--bits", str(bits), "--samples", str(count), "--memory", str(memory), "-q"]
            run = measure([*command, "-o", str(Path(work) / "q.onnx")])
        first = first or run.megabytes
        size = sum(array.nbytes for array in arrays.values()) / 1e6
        click.echo(f"{count:8} {size:9.1f} {run.megabytes:8.0f} {run.megabytes / first:9.2f} {run.seconds:7.1f}")


if __name__ == "__main__":
    main()
