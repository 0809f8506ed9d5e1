"""Tell how many samples each stage needs: early layers see enough positions of a few.

A convolution over large pictures has thousands of positions in each sample, and its tensors are the largest of the
model. The first samples are enough for it. The others pass several such stages at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from comq_onnx.calibrate.layer_moments import enough_positions
from comq_onnx.calibrate.segment import extract_segment
from comq_onnx.calibrate.stages import Stage, join
from comq_onnx.errors import RuntimeFailure
from comq_onnx.model.files import to_bytes_or_file
from comq_onnx.plan.plan import Plan
from comq_onnx.runtime.session import Session
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.padding import Mask
from comq_onnx.samples.samples import Samples

# a stage gets the first so many samples, or all
TIERS = (32, 64, 128)
# so many samples go through the stages as one shard
SHARD = 32
# samples that wait run in batches that are so many times smaller
WAITING_SHARE = 4
# the positions of those samples must be so many times as many as are enough, since those of one sample are alike
SPARE = 1.5


# one array for each batch, by the name of the value
Tensors = dict[str, list[Any]]


@dataclass(frozen=True)
class Group:
    """Hold a shard of the samples, which takes its way through the stages as one.

    start: how many samples are in the shards before
    samples: those of the shard, without their arrays: where they come from
    batches: the feeds
    counts: how many samples each batch holds
    masks: the positions of each batch that are no padding; None where all count
    """

    start: int
    samples: Samples
    batches: Sequence[Mapping[str, Any]]
    counts: Sequence[int]
    masks: Sequence[Mask | None]

    def inputs(self, names: Sequence[str]) -> Tensors:
        """Return the tensors at the cut before the first stage; names: the inputs of the graph."""
        return {name: [batch[name] for batch in self.batches] for name in names}


def spread(samples: Samples) -> npt.NDArray[np.intp]:
    """Return the samples' indices in an order in which the first ones, however many, come from everywhere."""
    unit = samples.fixed_batch or 1
    batches = len(samples) // unit
    digits = max(batches - 1, 1).bit_length()
    # the binary digits of their places read backwards: van der Corput's sequence
    keys = [int(f"{k:0{digits}b}"[::-1], 2) for k in range(batches)]
    return np.asarray((np.argsort(keys)[:, None] * unit + np.arange(unit)).ravel())


def divide(data: Dataset, needed: Sequence[int], batch_size: int) -> list[Group]:
    """Divide the samples into shards, so that each stage needs the first of them.

    The shards are the same whatever the batch size and whatever runs them, and so is the order of sums.

    needed: how many samples each stage needs
    """
    samples, shards = data.calibration, list[Group]()
    unit, total = samples.fixed_batch or 1, len(samples)
    tiers = {*needed, total}
    ends = sorted({*tiers, *range(0, total, max(SHARD // unit, 1) * unit)} - {0})
    order = spread(samples) if len(tiers) > 1 else np.arange(total)
    for start, end in zip([0, *ends], ends, strict=False):
        some = samples.take(order[start:end]) if len(tiers) > 1 else samples.between(start, end)
        # those that wait run many stages at once, which make many tensors
        size = max(1, batch_size // WAITING_SHARE) if start >= min(tiers) else batch_size
        batches = list(some.batches(size))
        masks = [data.kept(batch) for batch in batches]
        shards.append(Group(start, replace(some, arrays={}), batches, some.batch_counts(size), masks))
    return shards


def samples_needed(
    plan: Plan, parts: Sequence[Stage], samples: Samples, fewer: int, shapes: Mapping[str, tuple[int, ...]] | None
) -> list[int]:
    """Return how many samples each stage needs: whole batches, a number of TIERS or all.

    parts: all stages
    samples: those that the model is calibrated on
    fewer: the number of positions that are enough is divided by this
    shapes: those of the inputs of all layers for one batch, as `input_shapes` gives them
    """
    unit, total = samples.fixed_batch or 1, len(samples)
    tiers = [tier // unit * unit for tier in TIERS if unit <= tier < total]
    if shapes is None or not tiers:
        return [total] * len(parts)
    needed = [tiers[0]] * len(parts)
    for stage in parts:
        for layer in stage.layers:
            like = np.broadcast_to(np.float32(0), shapes.get(layer.input, (0,)))
            kind = layer.kind.solved_as
            positions = kind.positions(like) / unit if like.ndim > 1 else 0
            enough = SPARE * enough_positions(kind, fewer)
            one = next((tier for tier in tiers if positions * tier >= enough), total)
            needed[stage.index] = max(needed[stage.index], one)
        nested = any(plan.probes.get(x.name) in stage.makes for x in plan.walked.layers)
        if nested or any(x.input in stage.makes for x in stage.layers):
            # their rows are made in this stage alone: no sample goes on from it without a stop
            needed[stage.index : stage.index + 2] = [total] * len(needed[stage.index : stage.index + 2])
    return needed


def input_shapes(
    plan: Plan, parts: Sequence[Stage], samples: Samples, device: str, work: Path
) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the inputs of all layers for one batch, by name.

    None where no layer is a convolution, where samples differ, and where the model cannot run on one batch.

    parts, samples: as for `samples_needed`
    device: where the model runs
    work: a directory for a model that is too large for one protobuf message
    """
    if samples.per_item or not any(layer.kind.kernel for layer in plan.walked.layers):
        return None
    feeds = next(samples.batches(samples.fixed_batch or 1))
    made = _values(plan, parts, feeds, [layer.input for stage in parts for layer in stage.layers], device, work)
    return None if made is None else {name: np.shape(array) for name, array in {**feeds, **made}.items()}


def bytes_at_cuts(
    plan: Plan, parts: Sequence[Stage], samples: Samples, needed: Sequence[int], device: str, work: Path
) -> int | None:
    """Return the bytes of the tensors at the largest cut, in one model; None where the model cannot run on one batch.

    needed: how many samples each stage needs
    parts, samples, device, work: as for `input_shapes`
    """
    unit = samples.fixed_batch or 1
    feeds = next(samples.batches(unit))
    made = _values(plan, parts, feeds, [name for stage in parts for name in sorted(stage.live_after)], device, work)
    if made is None:
        return None
    sizes = {name: np.asarray(array).nbytes / unit for name, array in {**feeds, **made}.items()}
    return max(
        int(count * sum(sizes.get(name, 0.0) for name in stage.live_after))
        for stage, count in zip(parts, needed, strict=True)
    )


def _values(
    plan: Plan, parts: Sequence[Stage], feeds: Mapping[str, Any], names: Sequence[str], device: str, work: Path
) -> dict[str, Any] | None:
    """Return those of the values `names` that the model makes of one batch; None where it cannot run on it."""
    whole = join(parts)
    wanted = [name for name in dict.fromkeys(names) if name in whole.makes]
    if not wanted:
        return {}
    model = extract_segment(plan.walked.model, whole, feeds, wanted)
    session = Session(to_bytes_or_file(model, work, "shapes"), device, level=0, what="the model for its shapes")
    try:
        return session.run({name: feeds[name] for name in whole.reads}, wanted)
    except RuntimeFailure:
        return None
