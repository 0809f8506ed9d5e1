"""Tell which stages need all samples: early layers see enough positions of a few.

A convolution over large pictures has thousands of positions in each sample, and its tensors are the largest of the
model. Some samples, the leading ones, are enough for it. The others pass several such stages at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx.arrays import spread_indices
from comq_onnx.calibrate.layer_moments import enough_positions
from comq_onnx.calibrate.segment import extract_segment
from comq_onnx.calibrate.stages import Stage, join
from comq_onnx.errors import RuntimeFailure
from comq_onnx.model.files import to_bytes_or_file
from comq_onnx.plan.plan import Plan
from comq_onnx.runtime.session import Session
from comq_onnx.samples.samples import Samples

# the number of leading samples, and how many times that many there must be to tell them from others
LEADING, WORTHWHILE = 32, 1.5
# the leading samples must have so many times the positions that are enough, since those of one sample are alike
SPARE = 2


def leading_first(samples: Samples) -> tuple[Samples, int]:
    """Return the samples with some, spread over all, at the front; and how many those are: all where there are few."""
    unit = samples.fixed_batch or 1
    batches, few = len(samples) // unit, max(1, LEADING // unit)
    if samples.per_item or batches < few * WORTHWHILE:
        return samples, len(samples)
    first = spread_indices(batches, few)
    order = np.concatenate([first, np.setdiff1d(np.arange(batches), first)])
    return samples.take((order[:, None] * unit + np.arange(unit)).ravel()), len(first) * unit


def needing_all(
    plan: Plan, parts: Sequence[Stage], samples: Samples, leading: int, fewer: int, device: str, work: Path
) -> set[int]:
    """Return the indices of the stages whose layers need more than `leading` samples.

    parts: all stages
    samples: those that the model is calibrated on
    fewer: the number of positions that are enough is divided by this
    device: where the model runs
    work: a directory for a model that is too large for one protobuf message
    """
    everything = {stage.index for stage in parts}
    if leading == len(samples) or not any(layer.kind.kernel for layer in plan.walked.layers):
        return everything
    unit = samples.fixed_batch or 1
    shapes = _shapes(plan, parts, next(samples.batches(unit)), device, work)
    if shapes is None:
        return everything
    found = set()
    for stage in parts:
        nested = [x for x in plan.walked.layers if plan.probes.get(x.name) in stage.makes]
        fed_back = [x for x in stage.layers if x.input in stage.makes]
        if nested or fed_back:
            # their rows are made in this stage alone
            found |= {stage.index, stage.index + 1}
        for layer in stage.layers:
            like = np.broadcast_to(np.float32(0), shapes.get(layer.input, (0,)))
            if like.ndim < 2 or layer.kind.positions(like) * leading // unit < SPARE * enough_positions(
                layer.kind, fewer
            ):
                found.add(stage.index)
    return found & everything


def _shapes(
    plan: Plan, parts: Sequence[Stage], feeds: Mapping[str, Any], device: str, work: Path
) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the inputs of all layers for one batch, by name; None where the model cannot run on it."""
    whole = join(parts)
    wanted = list(dict.fromkeys(layer.input for layer in whole.layers if layer.input in whole.makes))
    model = extract_segment(plan, whole, feeds, wanted)
    session = Session(to_bytes_or_file(model, work, "shapes"), device, level=0, what="the model for its shapes")
    try:
        made = session.run({name: feeds[name] for name in whole.reads}, wanted)
    except RuntimeFailure:
        return None
    return {name: np.shape(array) for name, array in {**feeds, **made}.items()}
