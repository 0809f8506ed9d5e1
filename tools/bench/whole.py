"""Measure the whole command beside static quantization by ONNX Runtime: CPU seconds, peak memory, and the limit.

    python tools/zoo/export.py zoo --only efficientnet_lite0 --only minilm
    python tools/bench/whole.py zoo efficientnet_lite0 minilm
    python tools/bench/whole.py zoo efficientnet_lite0 --bits 8 --busy 2
    python tools/bench/whole.py zoo smollm2 --bits 4 --no-static --option=--uniform

Every run is a process of its own on one core, in turn with the others, and each figure is the median of the rounds.
The limit is what no calibration can do without: two passes of the float model over all samples by ONNX Runtime, and the
products of the Gram matrices and of the solver at the rate of a large float32 product measured in the same run. CPU
seconds on a busy machine grow with what else runs; ratios to static quantization hold. With --busy each number of bits
is run on all cores too, alone and beside processes that want the cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime

from comq_onnx.runtime.session import Session
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
# of each layer: x^ x^T, half of which is enough, and x^ e^T; sweeps and roundings of the solver; and the positions for
# each input with which a Gram matrix has full rank and some to spare
GRAMS, SOLVER, POSITIONS_PER_INPUT = 1.5, 8, 4
BATCH = 16
STATIC = "onnxruntime static, 8 bits"


@dataclass(frozen=True)
class Run:
    """Hold what a process took.

    seconds: CPU seconds of the process and of its children
    megabytes: its peak memory
    stages: the wall seconds of each of its stages, where it tells them
    """

    seconds: float
    megabytes: float
    stages: dict[str, float]


def measure(command: list[str], report: Path | None = None, one_core: bool = True, busy: int = 0) -> Run:
    """Run a command in a process of its own.

    one_core: with one thread on one core, instead of as a user runs it
    busy: the number of processes beside it that compute without end
    """
    environment = {name: value for name, value in os.environ.items() if name not in ONE_THREAD}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        process = subprocess.Popen(
            command, env=environment | (ONE_THREAD if one_core else {}), stdout=subprocess.DEVNULL,
            # ONNX Runtime asks for the cores, not for the environment
            preexec_fn=(lambda: os.sched_setaffinity(0, {0})) if one_core else None,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
    finally:
        for other in others:
            other.kill()
            other.wait()
    if status:
        raise click.ClickException(f"{' '.join(command)}: ended with {os.waitstatus_to_exitcode(status)}")
    stages = json.loads(report.read_text())["seconds"] if report is not None else {}
    return Run(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, stages)


def quantize_static(folder: Path, out: Path) -> None:
    """Quantize with onnxruntime.quantization: QDQ, 8 bits, a scale per channel, minmax."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quant_pre_process
    from onnxruntime.quantization import quantize_static as quantize

    class Reader(CalibrationDataReader):
        def __init__(self, samples: Samples) -> None:
            self._batches: Iterator[Any] = samples.batches(BATCH)

        def get_next(self) -> Any:
            return next(self._batches, None)

    made = onnxruntime.SessionOptions

    def on_one_thread() -> Any:
        options = made()
        options.intra_op_num_threads = 1
        return options

    # it takes no options for its sessions, and threads that wait in a loop would count as its own time
    onnxruntime.SessionOptions = on_one_thread
    session = Session(folder / "model.onnx", threads=1)
    prepared = out.with_name("prepared.onnx")
    quant_pre_process(folder / "model.onnx", prepared, skip_symbolic_shape=True)
    quantize(
        prepared, out, Reader(load_samples(folder / "calib.npz", session.inputs)), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def sgemm_rate() -> float:
    """Return the flops a second of a large float32 product."""
    a = np.ones((1536, 1536), np.float32)
    a @ a
    return 2 * len(a) ** 3 / _least_time(lambda: a @ a)


def limit(folder: Path, layers: list[dict[str, Any]]) -> float:
    """Return the CPU seconds that no calibration can do without; layers: those of a report."""
    session = Session(folder / "model.onnx", threads=1)
    samples = load_samples(folder / "calib.npz", session.inputs)
    start = time.process_time()
    for feeds in samples.batches(BATCH):
        session.run(feeds)
    passes = 2 * (time.process_time() - start)
    flops = 0.0
    for layer in layers:
        shape = layer["weight_shape"]
        inputs = shape[0] if layer["op"] == "MatMul" else int(np.prod(shape[1:]))
        flops += GRAMS * 2 * POSITIONS_PER_INPUT * inputs**3 + SOLVER * 2 * int(np.prod(shape)) * inputs
    return passes + flops / sgemm_rate()


def _least_time(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("zoo", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--bits", multiple=True, type=int, default=(8, 4), show_default=True, help="Numbers of bits.")
@click.option("--rounds", default=3, show_default=True, help="How often each is run.")
@click.option("--busy", default=0, show_default=True, help="Also run on all cores, beside so many busy processes.")
@click.option("--static/--no-static", default=True, help="Whether static quantization by ONNX Runtime runs too.")
@click.option("--option", "options", multiple=True, help="One more option of the command.")
def main(
    zoo: Path, models: tuple[str, ...], bits: tuple[int, ...], rounds: int, busy: int, static: bool,
    options: tuple[str, ...],
) -> None:  # fmt: skip
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    for name in models:
        folder = zoo / name
        with tempfile.TemporaryDirectory() as work:
            report = Path(work) / "report.json"
            tried = _runs(folder, Path(work) / "q.onnx", report, bits, busy, options)
            if static:
                tried = {STATIC: _static_run(folder, Path(work) / "q.onnx"), **tried}
            runs: dict[str, list[Run]] = {what: [] for what in tried}
            for _ in range(rounds):
                for what, run in tried.items():
                    runs[what].append(run())
            _print(name, runs, limit(folder, json.loads(report.read_text())["layers"]))


def _static_run(folder: Path, out: Path) -> Callable[[], Run]:
    """Return what measures static quantization."""
    script = "import sys, pathlib, whole; whole.quantize_static(*map(pathlib.Path, sys.argv[1:]))"
    return partial(measure, [sys.executable, "-c", script, str(folder), str(out)])


def _runs(
    folder: Path, out: Path, report: Path, bits: tuple[int, ...], busy: int, options: tuple[str, ...]
) -> dict[str, Callable[[], Run]]:
    """Return what is measured for a model, by what the table calls it; options: more of the command's."""
    runs: dict[str, Callable[[], Run]] = {}
    for count in bits:
        command = [
            sys.executable, "-m", "comq_onnx", str(folder / "model.onnx"), "--calib", str(folder / "calib.npz"),
            "--bits", str(count), "-o", str(out), "--json", str(report), "-q", *options,
        ]  # fmt: skip
        what = f"comq-onnx, {count} bits"
        runs[what] = partial(measure, command, report)
        if busy:
            runs[f"{what}, all cores"] = partial(measure, command, report, False)
            runs[f"{what}, beside {busy} busy"] = partial(measure, command, report, False, busy)
    return runs


def _print(name: str, runs: dict[str, list[Run]], least: float) -> None:
    """Print the table of a model; least: its limit."""
    medians = {what: statistics.median(run.seconds for run in given) for what, given in runs.items()}
    static = medians.get(STATIC, np.nan)
    click.echo(f"{name}: {sum(len(given) for given in runs.values())} runs, limit {least:.1f} CPU s")
    click.echo(f"{'':28} {'CPU s':>8} {'ratio':>7} {'of limit':>9} {'peak MB':>8}  wall s by stage")
    for what, given in runs.items():
        peak = statistics.median(run.megabytes for run in given)
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in given[-1].stages.items())
        seconds = medians[what]
        click.echo(f"{what:28} {seconds:8.1f} {seconds / static:7.2f} {seconds / least:9.2f} {peak:8.0f}  {stages}")


if __name__ == "__main__":
    main()
