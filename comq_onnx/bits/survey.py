"""What quantizing each layer costs: its own error at every width, and how that error is carried to the output.

One pass of the float model over some samples gives every layer's moments, and from them its relative error at each
width, solved for some of its channels. Then each layer alone is quantized at one width, and the noise at the model's
outputs on a few other samples is measured: what a unit of its relative error does there. No labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx.arrays import spread_indices
from comq_onnx.calibrate.walk import Progress, Settings, walk
from comq_onnx.metrics import lead_changes, scores_among, sqnr_of
from comq_onnx.model.files import private_directory, to_bytes_or_file
from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.model.operators import Gather
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.plan.forms import supported_grid
from comq_onnx.runtime.session import Session
from comq_onnx.samples.samples import Samples
from comq_onnx.solve.grid import Array, Grid
from comq_onnx.solve.layer import Method, Solution, errors_at, round_rows
from comq_onnx.solve.moments import Moments
from comq_onnx.targets.target import Target
from comq_onnx.write.emit import emit
from comq_onnx.write.expose import expose, exposed
from comq_onnx.write.weights import Quantization

# samples that give the moments, at most, and others on which layers are quantized one by one: at most, and a share
SURVEYED, PERTURBED, PERTURBED_SHARE = 64, 8, 8
# the moments are only to tell how errors compare
FEWER_POSITIONS = 4
CHANNELS = 64
ROWS = 512
# the leads of the best class over so many others: more numbers to tell their noise from than one lead has
RIVALS = 4
REFERENCE_BITS = 4
BITS = (2, 3, 4, 5, 6, 7, 8)
FAST = Method(effort="fast")
# outputs that have nothing to do with the float model's, or another shape
MOST_NOISE = 10.0
TINY = 1e-30
Tensors = dict[str, Any]
Solutions = Mapping[str, Solution]
# what quantization does to the outputs, [2]: the noise over their energy, the worst of them; and the variance of the
# leads of the best class (agreement.py), 0 where there are no class scores
Noise = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity:
    """What the survey found. groups: names of layers that share a weight, and so their codes, by the first of them.

    errors: for each group and number of bits the relative squared error of the layer's output; gains: the noise at the
    model's output for a unit of that; base: the noise of quantized activations alone; together: that of all layers at
    REFERENCE_BITS with them.
    """

    groups: dict[str, list[str]]
    errors: dict[str, dict[int, float]]
    gains: dict[str, Noise]
    base: Noise
    together: Noise

    def cost(self, layer: str, bits: int) -> float:
        """The relative noise that the group of a layer alone brings to the output at some bits."""
        name = next(name for name, members in self.groups.items() if layer in members)
        return float(self.gains[name][0] * self.errors[name][bits])

    def damage(self, name: str, bits: int) -> float:
        """What a group at some bits does, in parts of what all do at REFERENCE_BITS: to the output's noise, and where
        there are class scores just as much to their leads, which may suffer from other layers."""
        parts: Noise = self.gains[name] * self.errors[name][bits] / np.maximum(self._at_reference, TINY)
        return float(parts.sum())

    def noise(self, bits: Mapping[str, int]) -> Noise:
        """The noise that is predicted for these bits by group: noises add up, times what all together make of that."""
        factor = np.clip((self.together - self.base) / np.maximum(self._at_reference, TINY), 0.1, 10.0)
        return np.asarray(self.base + factor * self._sum(bits))

    @cached_property
    def _at_reference(self) -> Noise:
        return self._sum(dict.fromkeys(self.groups, REFERENCE_BITS))

    def _sum(self, bits: Mapping[str, int]) -> Noise:
        return np.asarray(sum(self.gains[name] * self.errors[name][bits[name]] for name in self.groups))


def survey(
    prepared: Prepared,
    walked: Prepared,
    plan: ActivationPlan,
    probes: Mapping[str, str],
    grid_of: Callable[[int], Grid],
    samples: Samples,
    target: Target,
    settings: Settings,
    progress: Progress,
    widths: Sequence[int] = BITS,
) -> Sensitivity:
    """Measure every layer: see the module. prepared: the model as it will be emitted; walked: as calibration sees it;
    widths: at which errors are wanted, REFERENCE_BITS among them."""
    return _Survey(prepared, walked, plan, probes, grid_of, samples, target, settings, progress, widths).run()


@dataclass
class _Survey:
    prepared: Prepared
    walked: Prepared
    plan: ActivationPlan
    probes: Mapping[str, str]
    grid_of: Callable[[int], Grid]
    samples: Samples
    target: Target
    settings: Settings
    progress: Progress
    widths: Sequence[int]

    def run(self) -> Sensitivity:
        sampled: dict[str, dict[int, float]] = {}

        def observe(layers: Sequence[Layer], weights: Sequence[Array], moments: Moments, has_bias: bool) -> None:
            for layer, weight in zip(layers, weights, strict=True):
                sampled[layer.name] = self._errors(layer, weight, moments, has_bias)

        layers = self.prepared.layers
        settings = replace(self.settings, method=FAST, independent=True, fewer_positions=FEWER_POSITIONS)
        grids = {layer.name: self._grid(layer, REFERENCE_BITS) for layer in layers}
        surveyed, perturbed = _split(self.samples)
        found = walk(
            self.walked, self.plan, grids, surveyed, self.target, settings, _silent, self.probes,
            observe,
        )  # fmt: skip
        for layer in layers:
            if isinstance(layer.kind, Gather):
                sampled[layer.name] = self._row_errors(layer)
        groups: dict[str, list[str]] = {}
        first: dict[str, str] = {}
        for layer in layers:
            groups.setdefault(first.setdefault(layer.weight, layer.name), []).append(layer.name)
        errors = {}
        for name in groups:
            scale = found.solutions[name].error / max(sampled[name][REFERENCE_BITS], TINY)
            errors[name] = {bits: error * scale for bits, error in sampled[name].items()}
        self.feeds = list(perturbed.batches(self.settings.batch_size))
        session = self._session(self.prepared.model)
        self.expected = [session.run(feeds) for feeds in self.feeds]
        self.scores = scores_among(self.expected[0])
        if not any(_floats(outputs) for outputs in self.expected):
            # nothing that noise could be measured at: every layer's own error counts alike
            total = sum(error[REFERENCE_BITS] for error in errors.values())
            return Sensitivity(
                groups, errors, dict.fromkeys(groups, np.array([1.0, 0.0])), np.zeros(2), np.array([total, 0.0])
            )
        gains = self._gains(groups, errors, found.solutions)
        everywhere = {name: replace(value, everywhere=True) for name, value in self.plan.values.items()}
        # unoptimized: ONNX Runtime would quantize the float weights between quantized activations itself
        base = self._quantized([], {}, replace(self.plan, values=everywhere), found.grids, level=0)
        together = self._quantized(layers, found.solutions, self.plan, found.grids)
        return Sensitivity(groups, errors, gains, base, together)

    def _gains(
        self, groups: Mapping[str, Sequence[str]], errors: Mapping[str, Mapping[int, float]], solutions: Solutions
    ) -> dict[str, Noise]:
        """The noise of each group alone at REFERENCE_BITS over its error: one session, with other weights each time."""
        layers = {layer.name: layer for layer in self.prepared.layers}
        model = self.prepared.model.clone()
        expose(model, self.prepared.layers, solutions)
        session = self._session(model)
        gains = {}
        for done, (name, members) in enumerate(groups.items(), 1):
            weights: dict[str, Any] = {}
            for member in members:
                weights |= exposed(self.prepared.model, layers[member], solutions[member])
            outputs = [session.run({**feeds, **weights}) for feeds in self.feeds]
            gains[name] = self._noise(outputs) / max(errors[name][REFERENCE_BITS], TINY)
            self.progress("sensitivity", done, len(groups))
        return gains

    def _grid(self, layer: Layer, bits: int) -> Grid:
        return supported_grid(layer, self.grid_of(bits), self.target)

    def _errors(self, layer: Layer, weight: Array, moments: Moments, has_bias: bool) -> dict[int, float]:
        groups = spread_indices(len(weight), CHANNELS)
        channels = spread_indices(weight.shape[1], max(1, CHANNELS // len(groups)))
        some = np.ascontiguousarray(weight[np.ix_(groups, channels)])
        grids = [self._grid(layer, bits) for bits in self.widths]
        return dict(zip(self.widths, errors_at(some, moments.groups(groups), grids, FAST, has_bias), strict=True))

    def _row_errors(self, layer: Layer) -> dict[int, float]:
        table = np.asarray(self.prepared.weight(layer), np.float32)
        some = np.ascontiguousarray(table[:, spread_indices(table.shape[1], ROWS)])
        return {bits: round_rows(some, self._grid(layer, bits)).error for bits in self.widths}

    def _quantized(
        self,
        layers: Sequence[Layer],
        solutions: Solutions,
        plan: ActivationPlan,
        grids: Mapping[str, ActivationGrid],
        level: int | None = None,
    ) -> Noise:
        """The noise with these layers and activations quantized."""
        model = self.prepared.model.clone()
        emit(model, Quantization(layers, solutions, plan, grids, self.target, self.prepared.opset))
        session = self._session(model, level)
        return self._noise([session.run(feeds) for feeds in self.feeds])

    def _noise(self, outputs: Sequence[Tensors]) -> Noise:
        """The noise of outputs, in the mean of all batches."""
        noises = []
        for before, after in zip(self.expected, outputs, strict=True):
            relative = min(10 ** (-sqnr_of(_floats(before), after) / 10), MOST_NOISE)
            name = self.scores
            lead = 0.0 if name is None else float(np.mean(lead_changes(before[name], after[name], RIVALS) ** 2))
            noises.append([relative, lead])
        return np.asarray(np.mean(noises, axis=0))

    def _session(self, model: ir.Model, level: int | None = None) -> Session:
        with private_directory() as work:
            source = to_bytes_or_file(model, work, "survey")
            return Session(
                source, self.settings.device, level=level, what="the model for the survey", float_matmul_nbits=True,
                disable_qdq_fusion=self.target.runs_outside_ort,
            )  # fmt: skip


def _floats(outputs: Tensors) -> Tensors:
    return {name: x for name, x in outputs.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """Samples for the moments and for the perturbations, each evenly spread."""
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


def _silent(_what: str, _done: int, _total: int) -> None:
    pass
