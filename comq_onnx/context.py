"""What every stage of a run may ask for, and the one thing that changes: the journal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from comq_onnx.options.options import Options
from comq_onnx.runtime import device as devices
from comq_onnx.runtime import memory
from comq_onnx.targets.catalog import TARGETS
from comq_onnx.targets.target import Target

# called with what is done, how much of it, and of how much
Progress = Callable[[str, int, int], None]


def silent(_what: str, _done: int, _total: int) -> None:
    """Show no progress."""


@dataclass
class Journal:
    """Take down what a run decided, what a user should know, and where the time went.

    notes, warnings: lines for the report
    seconds: by stage
    """

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Context:
    """Hold what a run was asked for and where it runs.

    device: where the model is calibrated, `cpu` or `cuda:N`, shown to work
    memory: bytes for tensors that are kept between stages
    progress: called with a stage, what is done of it and all of it
    """

    options: Options
    target: Target
    device: str
    memory: int
    journal: Journal
    progress: Progress

    @classmethod
    def of(cls, options: Options, progress: Progress = silent) -> Context:
        """Choose the device and the memory that the options ask for. Raises RuntimeFailure for a device that fails."""
        journal = Journal()
        chosen = devices.choose(options.device)
        if chosen.why is not None:
            journal.warnings.append(f"calibrated on the CPU, not on the GPU: {chosen.why}")
        kept = memory.free() // 2 if options.memory_gb is None else int(options.memory_gb * 1e9)
        return cls(options, TARGETS[options.target], chosen.device, kept, journal, progress)
