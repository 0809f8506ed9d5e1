"""Start Dask schedulers and workers for tests: threads of this process, or processes on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import distributed

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def threads(count: int) -> Iterator[distributed.LocalCluster]:
    """Yield a scheduler with workers that are threads of this process."""
    with distributed.LocalCluster(
        count, threads_per_worker=1, processes=False, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster


@dataclass
class Cluster:
    """Hold a scheduler and its workers, as processes."""

    address: str
    scheduler: subprocess.Popen[str]
    workers: list[subprocess.Popen[str]]


@contextlib.contextmanager
def cluster(workers: int, directory: Path) -> Iterator[Cluster]:
    """Yield a scheduler and workers, each started by its own command in a directory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, cwd=directory,
        )  # fmt: skip
        started.append(process)
        return process

    try:
        scheduler = start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        assert scheduler.stderr is not None
        address = next(found[0] for line in scheduler.stderr if (found := re.search(r"tcp://[\d.]+:\d+", line)))
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--death-timeout", "9")
        yield Cluster(address, scheduler, [start("dask_worker", address, *options) for _ in range(workers)])
    finally:
        for process in reversed(started):
            process.kill()
            process.communicate()
