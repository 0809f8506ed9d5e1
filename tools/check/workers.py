"""Kill workers at random moments, and see that the run ends with the bytes that it has without workers.

    python tools/check/workers.py [MODEL SAMPLES] [--kills 10] [--seed 0] [--workers 2]

Each run has a scheduler and workers on loopback, started by nannies, which start a killed worker again. A worker, not
its nanny, is killed (SIGKILL) at a random moment of the walk. The exit code is 1 where a run fails or writes other
bytes. Without a model one of the repository's is taken.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import distributed
import numpy as np

import comq_onnx
from comq_onnx.bits import choose

MODELS = Path(__file__).resolve().parents[2] / "models"


@click.command()
@click.argument("model", default=MODELS / "fashion_vit.onnx", type=click.Path(exists=True, path_type=Path))
@click.argument("samples", default=MODELS / "fashion_calib.npz", type=click.Path(exists=True, path_type=Path))
@click.option("--kills", default=10, show_default=True, help="How many runs lose a worker.")
@click.option("--seed", default=0, show_default=True, help="Another seed gives other moments.")
@click.option("--workers", "count", default=2, show_default=True, help="How many workers there are.")
def main(model: Path, samples: Path, kills: int, seed: int, count: int) -> None:
    """Kill workers at random moments, and compare bytes."""
    rng, walk, walks = np.random.default_rng(seed), choose.walk, list[float]()
    moment: list[float] = []
    killed: list[int] = []

    def walking(*given: Any, **named: Any) -> Any:
        begun, timer = time.perf_counter(), None
        if moment:
            timer = threading.Timer(moment[0], lambda: killed.append(_kill(client, rng)))
            timer.start()
        try:
            return walk(*given, **named)
        finally:
            walks.append(time.perf_counter() - begun)
            if timer is not None:
                timer.cancel()

    choose.walk = walking
    failed, whole = False, 0.0
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "q.onnx"

        def run(workers: str | None) -> str:
            comq_onnx.quantize(model, out, samples, bits=4, uniform=True, device="cpu", workers=workers)
            return sha256(out.read_bytes()).hexdigest()

        wanted = run(None)
        for k in range(kills + 1):
            # a nanny may give up on a worker: each kill has a cluster of its own
            with (
                distributed.LocalCluster(
                    count, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0", silence_logs=60
                ) as cluster,
                distributed.Client(cluster, set_as_default=False) as client,
            ):
                client.wait_for_workers(count)
                moment[:] = [float(rng.uniform(0, 0.9 * whole))] if k else []
                same = run(cluster.scheduler_address) == wanted
            failed |= not same
            whole = whole or walks[-1]
            said = "undisturbed"
            if moment:
                named = f"process {killed.pop()}" if killed else "none: it had ended"
                said = f"{k}: killed {named} after {moment[0]:.1f} s"
            click.echo(f"{said}, a walk of {walks[-1]:.1f} s: {'the same bytes' if same else 'OTHER BYTES'}")
    sys.exit(failed)


def _kill(client: distributed.Client, rng: np.random.Generator) -> int:
    """Kill a worker of a scheduler, and return its process."""
    processes = sorted(client.run(os.getpid).values())
    chosen = int(processes[rng.integers(len(processes))])
    os.kill(chosen, signal.SIGKILL)
    return chosen


if __name__ == "__main__":
    main()
