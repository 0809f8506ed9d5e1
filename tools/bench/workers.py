"""Compare the seconds of the walk in this process, and on 1, 2, ... workers: the same bytes are expected.

    python tools/bench/workers.py MODEL SAMPLES [--workers 1,2] [--samples 64] [--bits 4] [--embedded]

All bits are the same, and the walk is timed alone: opening, planning and comparing do not use workers. Workers are
started before the walk. The exit code is 1 where bytes differ. `tasks` are those that workers ran.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import click

import comq_onnx
from comq_onnx import workers
from comq_onnx.bits import choose


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("samples", type=click.Path(exists=True, path_type=Path))
@click.option("--workers", "counts", default="1,2", show_default=True, help="How many workers, with commas between.")
@click.option("--samples", "most", default=64, show_default=True, help="Samples to calibrate on, at most.")
@click.option("--bits", default=4, show_default=True, help="Bits of a weight.")
@click.option("--embedded", is_flag=True, help="Also without workers, in as many threads as there are.")
def main(model: Path, samples: Path, counts: str, most: int, bits: int, embedded: bool) -> None:
    """Compare the seconds of the walk on different numbers of workers."""
    walk, submit, seconds, tasks = choose.walk, workers.Crowd.submit, list[float](), Counter[str]()

    def timed(*given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        found = walk(*given, **named)
        seconds.append(time.perf_counter() - begun)
        return found

    def counted(crowd: workers.Crowd, function: Any, *given: Any) -> Any:
        tasks[function.__name__] += 1
        return submit(crowd, function, *given)

    choose.walk, workers.Crowd.submit = timed, counted  # type: ignore[method-assign]
    digests, first = set[str](), None
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "q.onnx"
        for count in [*([None] if embedded else []), *map(int, counts.split(","))]:
            seconds.clear()
            tasks.clear()
            comq_onnx.quantize(
                model, out, samples, bits=bits, uniform=True, max_samples=most, device="cpu", workers=count
            )
            digests.add(sha256(out.read_bytes()).hexdigest())
            first = first if first is not None or count is None else sum(seconds)
            ratio = "" if count is None or first is None else f", {first / sum(seconds):.2f} times as fast as the first"
            name = "this process" if count is None else f"{count} workers"
            click.echo(f"{name}: {sum(seconds):.1f} s{ratio}; load {os.getloadavg()[0]:.1f}; {dict(tasks)}")
    click.echo("the same bytes" if len(digests) == 1 else "OTHER BYTES")
    sys.exit(len(digests) > 1)


if __name__ == "__main__":
    main()
