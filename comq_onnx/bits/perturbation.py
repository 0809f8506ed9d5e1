"""Quantize one group of layers at a time, and run what lies behind it.

The float model is cut in a few places, and its tensors there are kept. What a layer changes is found behind the last
cut before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.calibrate import stages
from comq_onnx.calibrate.segment import extract_segment
from comq_onnx.calibrate.stages import Stage
from comq_onnx.model.judged_session import Load, judged_part, load_part
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.runtime.session import Session
from comq_onnx.write.expose import expose, exposed

# the model is cut into so many parts with about the same number of layers
PARTS = 6

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Tail:
    """Describe the model from a cut on.

    start: the index of the first stage behind the cut
    groups: the names of the groups whose first layer is in the part behind the cut
    """

    start: int
    groups: tuple[str, ...]


def tails_of(plan: Plan, groups: Mapping[str, Sequence[str]]) -> list[Tail]:
    """Choose the cuts, and assign each group to the last cut before its first layer; layers of subgraphs to the first.

    groups: the names of the layers of each group, by the name of the first of them
    """
    _, _, parts = _divided(plan)
    places = {layer.name: stage.index for stage in parts for layer in stage.layers}
    first = {name: min(places.get(member, 0) for member in members) for name, members in groups.items()}
    ordered = sorted(groups, key=lambda name: first[name])
    starts = sorted({0, *(first[ordered[len(ordered) * k // PARTS]] for k in range(1, PARTS))})
    ends = [*starts[1:], len(parts)]
    tails = [
        Tail(start, tuple(name for name in groups if start <= first[name] < end))
        for start, end in zip(starts, ends, strict=True)
    ]
    return [tail for tail in tails if tail.groups]


def cut_tensors(plan: Plan, tails: Sequence[Tail], feeds: Sequence[Tensors], load: Load) -> list[Tensors]:
    """Return the tensors at all cuts and the inputs, by name, batch by batch; without those that are no arrays.

    feeds: the samples, batch by batch
    """
    model, _, parts = _divided(plan)
    whole = stages.join(parts)
    reads = dict.fromkeys(name for tail in tails for name in stages.join(parts[tail.start :]).reads)
    wanted = [name for name in reads if name in whole.makes]
    cuts = [dict(batch) for batch in feeds]
    if wanted:
        session = load_part(extract_segment(model, whole, feeds[0], wanted), load)
        for batch in cuts:
            made = session.run({name: batch[name] for name in whole.reads}, wanted)
            batch.update((k, v) for k, v in made.items() if isinstance(v, np.ndarray) and v.dtype != object)
    return cuts


def perturbed(
    solved: Solved,
    groups: Mapping[str, Sequence[str]],
    tail: Tail,
    feeds: Sequence[Tensors],
    cuts: Sequence[Tensors],
    expected: Sequence[Tensors],
    load: Load,
) -> Iterator[tuple[str, Iterator[Tensors]]]:
    """Yield the name of each group of a tail with the values by which the model is judged where it alone is quantized.

    The values are by name, batch by batch, and made as they are asked for. Caches are left out.

    groups: the names of the layers of each group, by the name of the first of them
    feeds: the samples, batch by batch
    cuts: the tensors at all cuts
    expected: the values that the model is judged by in the float model, batch by batch
    """
    model, names, parts = _divided(solved.plan)
    behind = stages.join(parts[tail.start :])
    whole = not all(name in cuts[0] for name in behind.reads)
    wanted = [there for there in names.values() if whole or there in behind.makes]
    tail_model = model.clone() if whole else extract_segment(model, behind, cuts[0], wanted)
    session = _exposed_session(tail_model, solved, [x for name in tail.groups for x in groups[name]], load)
    given = feeds if whole else [{name: cut[name] for name in behind.reads} for cut in cuts]
    for name in tail.groups:
        run = partial(_run, session, _quantized(solved, groups[name]), names, wanted)
        yield name, map(run, given, expected)


def _divided(plan: Plan) -> tuple[ir.Model, Mapping[str, str], list[Stage]]:
    """Return what makes the values by which a model is judged, their names there, and its stages."""
    model, names = judged_part(plan.written.model, plan.written.judged.without_caches)
    return model, names, stages.cut(model, plan.layers)


def _run(
    session: Session, weights: Tensors, names: Mapping[str, str], wanted: Sequence[str], feeds: Tensors, before: Tensors
) -> Tensors:
    """Run the model from a cut on for the judged values; what it does not make is as in the float model.

    weights: what to feed so that a group is quantized
    names: the name of each judged value in the session's model
    wanted: those of them that it makes
    before: the judged values of the float model
    """
    outputs = session.run({**feeds, **weights}, wanted)
    return {own: outputs.get(there, before[own]) for own, there in names.items()}


def _exposed_session(model: ir.Model, solved: Solved, members: Sequence[str], load: Load) -> Session:
    """Load a model in which the weights of some layers are inputs."""
    expose(model, [layer for layer in solved.plan.layers if layer.name in members], solved.solutions)
    return load_part(model, load)


def _quantized(solved: Solved, members: Sequence[str]) -> Tensors:
    """Return what to feed so that some layers are quantized."""
    weights: Tensors = {}
    for layer in solved.plan.layers:
        if layer.name in members:
            weights |= exposed(solved.plan.written.model, layer, solved.solutions[layer.name])
    return weights
