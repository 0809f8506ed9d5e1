"""Quantize random small models of the kinds that quantizers get wrong; nothing may be wrong in silence.

    python tools/check/sweep.py [--models 500] [--seed 0] [--only KIND] [--workers 1] [--speed] [--json FILE]

A model has one to four blocks, perhaps with skip connections, and a head; its options are drawn too. Its seed and kind
alone say what it is, so `--seed S --only KIND --models 1` makes one model again: that is what each finding ends with.
Without --only, the kinds take turns.

Each of these holds, or the report says that it does not, or the model is refused in one line:

- the file loads and runs at ONNX Runtime's levels 0, 1, 2 and 99, with an SQNR that differs by 1 dB at most;
- the SQNR on other samples is within 3 dB of the report's, and not 1 dB below that of plain rounding;
- it is smaller than its source; with --speed and for ort-cpu, no more than 5% slower;
- inputs and outputs have the names, types and dimensions of the source, and onnx.checker finds nothing;
- a second run gives the same bytes (one in ten models);
- planned integer and blocked layers run in such kernels (ort-cpu), no float product is behind a DequantizeLinear;
- no numpy warning and no exception but ComqError.

Exits with 1 where anything else happened. Refusals are counted by their message, for a person to judge.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import onnx
import onnxruntime
from _sandbox import each, table
from _sweep_checks import Verdict, check
from _sweep_models import KINDS

Job = tuple[int, str, bool]
SECONDS = 120.0


def judged(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Verdict]]:
    """Yield every job with its verdict, as they are done, from so many processes; a crash and a hang are verdicts."""
    if workers == 1:
        yield from _part(jobs)
        return
    context = multiprocessing.get_context("fork")
    found: Any = context.Queue()
    processes = [context.Process(target=_put, args=(jobs[i::workers], found)) for i in range(workers)]
    for process in processes:
        process.start()
    for _ in jobs:
        yield found.get()
    for process in processes:
        process.join()


def _put(jobs: list[Job], found: Any) -> None:
    for pair in _part(jobs):
        found.put(pair)


def _part(jobs: list[Job]) -> Iterator[tuple[Job, Verdict]]:
    for job, outcome in each(jobs, check, SECONDS):
        value = outcome.value
        yield job, value if outcome.kind == "done" else Verdict("wrong", [f"{outcome.kind}: {str(value)[-2000:]}"])


def again(job: Job) -> str:
    """Return the options that make a model again."""
    return f"--seed {job[0]} --only {job[1]} --models 1{' --speed' if job[2] else ''}"


def _general(message: str) -> str:
    """Leave names and numbers out of a message, so that messages of one kind are equal."""
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"'[^']*'|\([^)]*\)", "...", message))[:150]


@click.command()
@click.option("--models", default=500, show_default=True, help="How many models.")
@click.option("--seed", default=0, show_default=True, help="Of the first model; each next one has the next seed.")
@click.option("--only", type=click.Choice(KINDS), help="Only models of this kind.")
@click.option("--workers", default=1, show_default=True, help="How many processes.")
@click.option("--speed", is_flag=True, help="Time each model too: give it a machine without other work.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write every outcome as JSON.")
def main(models: int, seed: int, only: str | None, workers: int, speed: bool, json_path: Path | None) -> None:
    """Quantize random small models of the kinds that quantizers get wrong; nothing may be wrong in silence."""
    versions = f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"
    click.echo(f"{versions}, {platform.machine()}, seeds {seed} to {seed + models - 1}")
    jobs: list[Job] = [(n, only or KINDS[n % len(KINDS)], speed) for n in range(seed, seed + models)]
    start = time.perf_counter()
    found: list[tuple[Job, Verdict]] = []
    for job, verdict in judged(jobs, workers):
        found.append((job, verdict))
        if verdict.outcome == "wrong":
            click.echo(f"\nwrong: {'; '.join(verdict.traits)}\n  {verdict.options}", err=True)
            click.echo("".join(f"  - {d}\n" for d in verdict.details) + f"  again: {again(job)}", err=True)
    _summarize(found)
    click.echo(
        f"\n{len(found)} models in {time.perf_counter() - start:.0f} s; again: --seed SEED --only KIND --models 1"
    )
    if json_path:
        rows = [{"seed": j[0], "kind": j[1], **asdict(v), "again": again(j)} for j, v in sorted(found, key=_number)]
        json_path.write_text(json.dumps(rows, indent=1, default=str) + "\n")
    sys.exit(any(v.outcome == "wrong" for _, v in found))


def _number(pair: tuple[Job, Verdict]) -> Job:
    return pair[0]


def _summarize(found: list[tuple[Job, Verdict]]) -> None:
    """Print the outcomes by kind, and the refusals by message with one model for each."""
    outcomes = ("right", "refused", "wrong")
    counts = {kind: Counter(v.outcome for j, v in found if j[1] == kind) for kind in KINDS}
    rows = [(kind, c.total(), *(c[o] for o in outcomes)) for kind, c in counts.items() if c]
    click.echo("\n" + table(("kind", "all", *outcomes), rows))
    refusals: dict[str, list[Job]] = {}
    for job, verdict in sorted(found, key=_number):
        if verdict.outcome == "refused":
            refusals.setdefault(_general(verdict.details[0]), []).append(job)
    for message, jobs in refusals.items():
        click.echo(f"\n{len(jobs)} refused ({again(jobs[0])}): {message}")


if __name__ == "__main__":
    main()
