"""Measure how long models take, in turn with one another."""

from __future__ import annotations

from collections.abc import Sequence

from comq_onnx.runtime.session import Session, time_in_turn
from comq_onnx.samples.samples import Samples

# models are timed for about so long, in turn
TIMED_SECONDS = 1.0


def latency(
    sessions: Sequence[Session], samples: Samples, seconds: float | None = None, most: int = 200
) -> list[float]:
    """Return the median milliseconds of each model for one sample (or one batch of fixed size).

    seconds: for about how long; None for TIMED_SECONDS
    most: how often each model runs at most
    """
    return time_in_turn(sessions, next(samples.batches(1)), TIMED_SECONDS if seconds is None else seconds, most)
