"""Define what every stage of a run may use, and the one thing that changes: the journal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from comq_onnx.engine import Embedded
from comq_onnx.options.options import Options
from comq_onnx.runtime import device as devices
from comq_onnx.runtime import memory
from comq_onnx.targets.catalog import TARGETS
from comq_onnx.targets.target import Target
from comq_onnx.workdir import Workdir

# called with the name of a step, how much of it is done, and how much there is
Progress = Callable[[str, int, int], None]


def silent(_what: str, _done: int, _total: int) -> None:
    """Show no progress."""


@dataclass
class Journal:
    """Record what a run decided, what a user should know, and where the time went.

    notes: lines of the report about what was decided
    warnings: lines of the report about what may be wrong
    seconds: the seconds that each stage took, by its name
    started: when the run began, in seconds of time.perf_counter
    """

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds that a `with` block takes to those of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Context:
    """Hold what was asked of a run, and where it runs.

    options: what was asked
    target: the runtime that the model is written for
    device: where the model is calibrated, `cpu` or `cuda:N`; it was tried and works
    memory: the bytes for tensors that are kept between stages
    journal: notes, warnings and times of the run
    progress: called with the name of a step, how much of it is done, and how much there is
    workdir: keeps the state of the run; None where nothing is kept
    engine: runs the tasks of the walk
    """

    options: Options
    target: Target
    device: str
    memory: int
    journal: Journal
    progress: Progress
    workdir: Workdir | None = None
    engine: Embedded = field(default_factory=Embedded)

    @classmethod
    def of(cls, options: Options, progress: Progress = silent) -> Context:
        """Make the context of a run: the device and the memory that its options ask for.

        Raises RuntimeFailure for a device that fails.
        """
        journal = Journal()
        # workers calibrate on CPUs
        chosen = devices.choose(options.device if options.workers is None else "cpu")
        if chosen.why is not None:
            journal.warnings.append(f"calibrated on the CPU, not on the GPU: {chosen.why}")
        kept = memory.free() // 2 if options.memory_gb is None else int(options.memory_gb * 1e9)
        return cls(options, TARGETS[options.target], chosen.device, kept, journal, progress)
