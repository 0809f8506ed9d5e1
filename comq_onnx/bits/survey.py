"""What quantizing each layer costs: its own error at every width, and how that error is carried to the output.

One pass of the float model over some samples gives every layer's moments, and from them its relative error at each
width, solved for some of its channels. Then each layer alone is quantized at one width, and the noise at the model's
outputs on a few other samples is measured: what a unit of its relative error does there. No labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx.arrays import spread_indices
from comq_onnx.calibrate.walk import walk
from comq_onnx.context import Context, Journal, silent
from comq_onnx.metrics import lead_changes, scores_among, sqnr_of
from comq_onnx.model.files import private_directory, to_bytes_or_file
from comq_onnx.model.layers import Layer
from comq_onnx.plan.initial_bits import REFERENCE_BITS
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.runtime.session import Session
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.samples import Samples
from comq_onnx.solve.grid import Array
from comq_onnx.solve.layer import Method, errors_at, round_rows
from comq_onnx.solve.moments import Moments
from comq_onnx.write.emit import emit
from comq_onnx.write.expose import expose, exposed

# samples that give the moments, at most, and others on which layers are quantized one by one: at most, and a share
SURVEYED, PERTURBED, PERTURBED_SHARE = 64, 8, 8
# the moments are only to tell how errors compare
FEWER_POSITIONS = 4
CHANNELS = 64
ROWS = 512
# the leads of the best class over so many others: more numbers to tell their noise from than one lead has
RIVALS = 4
BITS = (2, 3, 4, 5, 6, 7, 8)
FAST = Method(effort="fast")
# outputs that have nothing to do with the float model's, or another shape
MOST_NOISE = 10.0
TINY = 1e-30

Tensors = dict[str, Any]
# by group: the relative error at each number of bits
Errors = Mapping[str, Mapping[int, float]]

# what quantization does to the outputs, [2]: the noise over their energy, the worst of them; and the variance of the
# leads of the best class (metrics.py), 0 where there are no class scores
Noise = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity:
    """Hold what the survey found.

    groups: names of layers that share a weight, and so their codes, by the first of them
    errors: for each group and number of bits the relative squared error of the layer's output
    gains: the noise at the model's output for a unit of that error
    base: the noise of quantized activations alone
    together: the noise of all layers at REFERENCE_BITS with them
    """

    groups: dict[str, list[str]]
    errors: dict[str, dict[int, float]]
    gains: dict[str, Noise]
    base: Noise
    together: Noise

    def cost(self, layer: str, bits: int) -> float:
        """Return the relative noise that the group of a layer alone brings to the output at some bits."""
        name = next(name for name, members in self.groups.items() if layer in members)
        return float(self.gains[name][0] * self.errors[name][bits])

    def damage(self, name: str, bits: int) -> float:
        """Return what a group at some bits does, in parts of what all groups do at REFERENCE_BITS.

        It counts the noise of the output and, where there are class scores, just as much their leads, which may suffer
        from other layers.
        """
        parts: Noise = self.gains[name] * self.errors[name][bits] / np.maximum(self._at_reference, TINY)
        return float(parts.sum())

    def noise(self, bits: Mapping[str, int]) -> Noise:
        """Predict the noise for these bits by group: noises add up, times what all layers together make of the sum."""
        factor = np.clip((self.together - self.base) / np.maximum(self._at_reference, TINY), 0.1, 10.0)
        return np.asarray(self.base + factor * self._sum(bits))

    @cached_property
    def _at_reference(self) -> Noise:
        return self._sum(dict.fromkeys(self.groups, REFERENCE_BITS))

    def _sum(self, bits: Mapping[str, int]) -> Noise:
        return np.asarray(sum(self.gains[name] * self.errors[name][bits[name]] for name in self.groups))


def survey(plan: Plan, data: Dataset, context: Context, widths: Sequence[int] = BITS) -> Sensitivity:
    """Measure what quantizing each layer of a plan costs.

    widths: at which errors are wanted, REFERENCE_BITS among them
    """
    plan = plan.with_bits({layer.name: REFERENCE_BITS for layer in plan.layers}, context.options)
    surveyed, perturbed = _split(data.calibration)
    solved, sampled = _own_errors(plan, replace(data, calibration=surveyed), context, widths)
    groups = _groups(plan.layers)
    errors = {}
    for name in groups:
        scale = solved.solutions[name].error / max(sampled[name][REFERENCE_BITS], TINY)
        errors[name] = {bits: error * scale for bits, error in sampled[name].items()}
    outputs = _Outputs.of(plan, perturbed, context)
    if not outputs.has_floats:
        # nothing that noise could be measured at: every layer's own error counts alike
        total = sum(error[REFERENCE_BITS] for error in errors.values())
        return Sensitivity(
            groups, errors, dict.fromkeys(groups, np.array([1.0, 0.0])), np.zeros(2), np.array([total, 0.0])
        )
    gains = _gains(solved, groups, errors, outputs, context)
    everywhere = {name: replace(value, everywhere=True) for name, value in plan.activations.values.items()}
    alone = replace(plan, activations=replace(plan.activations, values=everywhere))
    # unoptimized: ONNX Runtime would quantize the float weights between quantized activations itself
    base = outputs.noise_of(Solved(alone, {}, solved.activation_grids), level=0)
    return Sensitivity(groups, errors, gains, base, outputs.noise_of(solved))


# The errors of layers
# ----------------------------------------------------------------------------------------------------------------------


def _own_errors(
    plan: Plan, data: Dataset, context: Context, widths: Sequence[int]
) -> tuple[Solved, dict[str, dict[int, float]]]:
    """Solve all layers quickly on the float model's moments, and some channels of each at every width."""
    sampled: dict[str, dict[int, float]] = {}

    def observe(layers: Sequence[Layer], weights: Sequence[Array], moments: Moments, has_bias: bool) -> None:
        for layer, weight in zip(layers, weights, strict=True):
            sampled[layer.name] = _channel_errors(plan, layer, weight, moments, has_bias, context, widths)

    options = replace(
        context.options, solver=FAST.solver, effort=FAST.effort, order=None, sweeps=None, shrink=None, independent=True
    )
    quick = replace(context, options=options, journal=Journal(), progress=silent)
    solved = walk(plan, data, quick, observe, FEWER_POSITIONS)
    for layer in plan.layers:
        if layer.kind.is_lookup:
            sampled[layer.name] = _row_errors(plan, layer, context, widths)
    return solved, sampled


def _channel_errors(
    plan: Plan, layer: Layer, weight: Array, moments: Moments, has_bias: bool, context: Context, widths: Sequence[int]
) -> dict[int, float]:
    """Return the relative error of some channels of a layer at each width."""
    groups = spread_indices(len(weight), CHANNELS)
    channels = spread_indices(weight.shape[1], max(1, CHANNELS // len(groups)))
    some = np.ascontiguousarray(weight[np.ix_(groups, channels)])
    grids = [plan.grid_at(layer, bits, context.options) for bits in widths]
    return dict(zip(widths, errors_at(some, moments.groups(groups), grids, FAST, has_bias), strict=True))


def _row_errors(plan: Plan, layer: Layer, context: Context, widths: Sequence[int]) -> dict[int, float]:
    """Return the relative error of some rows of an embedding at each width."""
    table = np.asarray(plan.written.weight(layer), np.float32)
    some = np.ascontiguousarray(table[:, spread_indices(table.shape[1], ROWS)])
    return {bits: round_rows(some, plan.grid_at(layer, bits, context.options)).error for bits in widths}


def _groups(layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Group layers that share a weight, by the name of the first of them."""
    groups: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for layer in layers:
        groups.setdefault(first.setdefault(layer.weight, layer.name), []).append(layer.name)
    return groups


# The noise at the outputs
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """Hold what the float model gives for a few samples, to tell noise from.

    feeds, expected: batch by batch; scores: the output of class scores, None where there is none
    """

    plan: Plan
    device: str
    feeds: Sequence[Tensors]
    expected: Sequence[Tensors]
    scores: str | None

    @classmethod
    def of(cls, plan: Plan, samples: Samples, context: Context) -> _Outputs:
        """Run the float model on samples."""
        feeds = list(samples.batches(context.options.batch_size))
        session = _session(plan.written.model, plan, context.device)
        expected = [session.run(one) for one in feeds]
        return cls(plan, context.device, feeds, expected, scores_among(expected[0]))

    @property
    def has_floats(self) -> bool:
        """Tell whether there is an output that noise can be measured at."""
        return any(_floats(outputs) for outputs in self.expected)

    def noise_of(self, solved: Solved, level: int | None = None) -> Noise:
        """Measure the noise of a model with everything quantized that is solved; level: ONNX Runtime's optimization."""
        model = self.plan.written.model.clone()
        emit(model, solved)
        session = _session(model, self.plan, self.device, level)
        return self.noise([session.run(feeds) for feeds in self.feeds])

    def noise(self, outputs: Sequence[Tensors]) -> Noise:
        """Measure the noise of outputs, in the mean of all batches."""
        noises = []
        for before, after in zip(self.expected, outputs, strict=True):
            relative = min(10 ** (-sqnr_of(_floats(before), after) / 10), MOST_NOISE)
            name = self.scores
            lead = 0.0 if name is None else float(np.mean(lead_changes(before[name], after[name], RIVALS) ** 2))
            noises.append([relative, lead])
        return np.asarray(np.mean(noises, axis=0))


def _gains(
    solved: Solved, groups: Mapping[str, Sequence[str]], errors: Errors, outputs: _Outputs, context: Context
) -> dict[str, Noise]:
    """Return the noise of each group alone at REFERENCE_BITS over its error: one session, other weights each time."""
    plan = solved.plan
    layers = {layer.name: layer for layer in plan.layers}
    model = plan.written.model.clone()
    expose(model, plan.layers, solved.solutions)
    session = _session(model, plan, context.device)
    gains = {}
    for done, (name, members) in enumerate(groups.items(), 1):
        weights: dict[str, Any] = {}
        for member in members:
            weights |= exposed(plan.written.model, layers[member], solved.solutions[member])
        found: list[Tensors] = [session.run({**feeds, **weights}) for feeds in outputs.feeds]
        gains[name] = outputs.noise(found) / max(errors[name][REFERENCE_BITS], TINY)
        context.progress("sensitivity", done, len(groups))
    return gains


def _session(model: ir.Model, plan: Plan, device: str, level: int | None = None) -> Session:
    with private_directory() as work:
        return Session(
            to_bytes_or_file(model, work, "survey"), device, level=level, what="the model for the survey",
            float_matmul_nbits=True, disable_qdq_fusion=plan.target.runs_outside_ort,
        )  # fmt: skip


def _floats(outputs: Tensors) -> Tensors:
    return {name: x for name, x in outputs.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """Split samples into those for the moments and those for the perturbations, each evenly spread."""
    unit = samples.fixed_batch or 1
    batches = len(samples) // unit
    few = max(1, min(PERTURBED // unit, batches // PERTURBED_SHARE))
    picked = spread_indices(batches, few)
    rest = np.setdiff1d(np.arange(batches), picked)
    # a single batch serves both
    rest = rest[spread_indices(len(rest), max(1, SURVEYED // unit))] if len(rest) else picked

    def take(chosen: npt.NDArray[np.intp]) -> Samples:
        return samples.take((chosen[:, None] * unit + np.arange(unit)).ravel())

    return take(rest), take(picked)
