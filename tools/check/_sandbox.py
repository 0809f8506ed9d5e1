"""Run the command line many times, in worker processes with limits: shared by backend_tests.py, fuzz.py and kills.py.

A worker is forked when everything is imported, so one run takes milliseconds. Whatever a run does to it (a crash of
native code, a hang, too much memory) is one outcome, and the next run gets a new worker.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from comq_onnx.cli import command as cli
from comq_onnx.evaluate import speed

Job = TypeVar("Job")
# one line that somebody can read: longer ones are a library's dump
MOST_CHARACTERS = 700
RECYCLED_AFTER = 400


@dataclass(frozen=True)
class Outcome:
    """Hold the outcome of one run.

    kind: `done`, `crash` or `hang`
    value: what the run returned; of a crash the traceback or the signal
    """

    kind: str
    value: Any
    seconds: float
    peak_mb: float = 0.0


@dataclass(frozen=True)
class Said:
    """Hold what one command line printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def refused(self) -> bool:
        """Tell whether this is one error line with an exit code of comq_onnx.errors."""
        lines = self.err.splitlines()
        return (
            self.code in (2, 3, 4, 5)
            and not self.out
            and len(lines) == 1
            and lines[0].startswith("comq-onnx: ")
            and len(lines[0]) <= MOST_CHARACTERS
            and lines[0].isprintable()
        )


def each(
    jobs: Iterable[Job], run: Callable[[Job], Any], seconds: float, memory: int | None = None
) -> Iterator[tuple[Job, Outcome]]:
    """Run every job in a worker and yield it with its outcome.

    run: returns something that can be pickled
    seconds: the time a job may take
    memory: the bytes of address space that a worker may have
    """
    worker: _Worker | None = None
    try:
        for job in jobs:
            if worker is None or worker.runs >= RECYCLED_AFTER:
                if worker is not None:
                    worker.stop()
                worker = _Worker(run, memory)
            outcome = worker.run(job, seconds)
            yield job, outcome
            if outcome.kind == "hang" or not worker.alive:
                worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()


class _Worker:
    """Run jobs as they come, in one forked process."""

    def __init__(self, run: Callable[[Any], Any], memory: int | None) -> None:
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, run, memory), daemon=True)
        self._process.start()
        theirs.close()
        self.runs = 0
        self.alive = True

    def run(self, job: Any, seconds: float) -> Outcome:
        """Run one job."""
        self.runs += 1
        start = time.perf_counter()
        self._ours.send(job)
        try:
            if not self._ours.poll(seconds):
                return Outcome("hang", f"no answer in {seconds:.0f} s", seconds)
            kind, value, peak = self._ours.recv()
            return Outcome(kind, value, time.perf_counter() - start, peak)
        except (EOFError, ConnectionResetError):
            self._process.join()
            self.alive = False
            code = self._process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Outcome("crash", f"the process died: {name}", time.perf_counter() - start)

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._ours.close()


def _serve(pipe: Connection, run: Callable[[Any], Any], memory: int | None) -> None:
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("done", run(job))
        except BaseException:
            answer = ("crash", traceback.format_exc())
        pipe.send((*answer, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3))


def quickly() -> None:
    """Leave out the two seconds in which both models are timed."""
    assert speed.TIMED_SECONDS > 0
    speed.TIMED_SECONDS = 0.0


def command_line(*arguments: object) -> Said:
    """Run comq-onnx with these arguments in this process; what native code prints is caught too."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        arguments_before, sys.argv = sys.argv, ["comq-onnx", *map(str, arguments)]
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            # what Python would print, and the code that it would end with
            traceback.print_exc()
            code = 1
        finally:
            sys.argv = arguments_before
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in enumerate(kept, 1):
                os.dup2(saved, number)
                os.close(saved)
        return Said(code, *(_text(stream) for stream in (out, err)))


def _text(stream: Any) -> str:
    stream.seek(0)
    return str(stream.read().decode(errors="replace"))


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Read the files under a folder: their bytes, or the target of a link."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])
