"""Take layers out of integers whose quantized activations would make noise of the outputs.

A scale for a whole tensor leaves few codes to its quiet parts, and a normalization behind it makes these as loud as the
rest. Speed alone does not see that. So the activations of a plan are quantized alone, with the weights as they are, on
a few samples: where the outputs are mostly noise, the regions of layers that bring most of it become weight-only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from comq_onnx.context import Context
from comq_onnx.metrics import sqnr_of
from comq_onnx.model.judged_session import JudgedSession
from comq_onnx.model.probe import probe
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.activations import ActivationPlan, plan_activations
from comq_onnx.plan.integer_gain import join_layers
from comq_onnx.plan.observed_range import ObservedRange
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.runtime.session import Session
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.padding import Mask, take_kept
from comq_onnx.write.emit import emit

# samples that tell what quantized activations cost, and how many of them run at once
SAMPLES, BATCH = 16, 4
# below this the outputs are mostly noise, and integers not worth their speed
LEAST_DB = 10.0
# names of layers that a note lists
MOST_NAMED = 4


def without_lossy_integers(plan: Plan, data: Dataset, context: Context) -> Plan:
    """Return the plan with layers weight-only whose quantized activations make the outputs mostly noise.

    Only where the options leave it open (`--activations auto`), and only where that helps.
    """
    if context.options.activations != "auto" or not plan.activations.values:
        return plan
    trial = _Trial.of(plan, data, context)
    before = trial.sqnr_db(plan.activations)
    if before >= LEAST_DB:
        return plan
    regions = _regions(plan)
    alone = {region: trial.sqnr_db(_activations(plan, region)) for region in regions}
    left = list(regions)
    activations, reached = plan.activations, before
    for region in sorted(regions, key=lambda region: (alone[region], sorted(region))):
        if reached >= LEAST_DB or alone[region] >= LEAST_DB + 10:
            break
        left.remove(region)
        activations = _activations(plan, {name for other in left for name in other})
        reached = trial.sqnr_db(activations)
    dropped = sorted(plan.activations.integer_layers - activations.integer_layers)
    if not dropped or reached <= before:
        return plan
    more = len(dropped) - MOST_NAMED
    named = ", ".join(dropped[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    context.journal.notes.append(
        f"{len(dropped)} layers are weight-only because their quantized activations alone would leave an SQNR of "
        f"{before:.1f} dB ({named}; --activations 8 has them in integers too)"
    )
    kept = replace(plan, activations=activations, slower=plan.slower - set(dropped))
    return kept.with_bits(plan.bits, context.options)


def _regions(plan: Plan) -> list[frozenset[str]]:
    """Return the layers that run in integers, those together that quantized values join."""
    joined = [frozenset(region) for region in join_layers(plan.walked, plan.activations)]
    alone = plan.activations.integer_layers - {name for region in joined for name in region}
    return [*joined, *(frozenset({name}) for name in sorted(alone))]


def _activations(plan: Plan, names: Collection[str]) -> ActivationPlan:
    """Plan the activations of some layers."""
    layers = [layer for layer in plan.walked.layers if layer.name in names]
    return plan_activations(plan.walked.model, layers, plan.target, plan.activations.dtype)


@dataclass(frozen=True)
class _Trial:
    """Hold what it takes to see what quantized activations do to the outputs.

    grids: of each value, from the range that the samples show
    feeds: the samples, batch by batch
    kept: the positions of each batch that are not masked; None for all
    expected: the values that the float model is judged by, in each batch
    """

    plan: Plan
    device: str
    grids: Mapping[str, ActivationGrid]
    feeds: Sequence[Mapping[str, Any]]
    kept: Sequence[Mask | None]
    expected: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, plan: Plan, data: Dataset, context: Context) -> _Trial:
        """Run the float model on a few samples."""
        feeds = list(data.calibration.few(SAMPLES).batches(BATCH))
        kept = [data.kept(batch) for batch in feeds]
        expected = _kept_values(_session(plan, Solved(plan, {}, {}), context.device), feeds, kept)
        return cls(plan, context.device, _observed_grids(plan, feeds, kept, context), feeds, kept, expected)

    def sqnr_db(self, activations: ActivationPlan) -> float:
        """Return the SQNR of the worst value, with these activations quantized and all weights as they are."""
        plan = replace(self.plan, activations=activations.everywhere())
        session = _session(plan, Solved(plan, {}, self.grids), self.device)
        found = _kept_values(session, self.feeds, self.kept)
        noise = [10 ** (-sqnr_of(one, other) / 10) for one, other in zip(self.expected, found, strict=True)]
        return -10 * float(np.log10(max(float(np.mean(noise)), 1e-20)))


def _observed_grids(
    plan: Plan, feeds: Sequence[Mapping[str, Any]], kept: Sequence[Mask | None], context: Context
) -> dict[str, ActivationGrid]:
    """Return the min-max grid of each value that may be quantized, on these samples."""
    inputs = {str(v.name) for v in plan.written.model.graph.inputs}
    made = [name for name in plan.activations.values if name not in inputs]
    seen = {name: ObservedRange() for name in plan.activations.values}
    values = probe(plan.walked.model, made, feeds, context.device, "the model with its activations as outputs")
    for batch, mask, found in zip(feeds, kept, values if made else [{}] * len(feeds), strict=True):
        for name, span in seen.items():
            span.observe(take_kept(found[name] if name in found else batch[name], mask, least_rank=3))
    planned = plan.activations.values
    return {
        name: planned[name].given or span.grid(plan.activations.dtype, planned[name].bounds)
        for name, span in seen.items()
    }


def _kept_values(
    session: JudgedSession, feeds: Sequence[Mapping[str, Any]], kept: Sequence[Mask | None]
) -> list[dict[str, Any]]:
    """Return the judged values of each batch, without the positions that are masked."""
    return [
        {name: take_kept(value, mask, least_rank=3) for name, value in session.run(batch).items()}
        for batch, mask in zip(feeds, kept, strict=True)
    ]


def _session(plan: Plan, solved: Solved, device: str) -> JudgedSession:
    """Load the model with what is solved, unoptimized: ONNX Runtime then rounds no float weight between pairs."""
    model = plan.written.model.clone()
    emit(model, solved)

    def load(source: bytes | str) -> Session:
        return Session(source, device, level=0, what="the model with quantized activations")

    return JudgedSession.of(model, plan.written.judged.without_caches, load)
