"""Measure what it costs to quantize each layer: its own error at each number of bits, and the effect on the outputs.

One pass of the float model over some samples gives the moments of every layer, and from them its relative error at each
number of bits, solved for some of its channels. Then each layer alone is quantized at one number of bits, and the noise
in the model's outputs is measured on a few other samples: the effect of one unit of the layer's relative error. It
needs no labels and no gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx.arrays import spread_indices
from comq_onnx.bits.perturbation import Tail, cut_tensors, perturbed, tails_of
from comq_onnx.calibrate.solved_form import solved_grid
from comq_onnx.calibrate.walk import walk
from comq_onnx.context import Context, Journal
from comq_onnx.errors import SamplesError
from comq_onnx.evaluate.language import Language
from comq_onnx.metrics import divergence, lead_changes, scores_among, sqnr_of
from comq_onnx.model.judged_session import JudgedSession, Load
from comq_onnx.model.layers import Layer
from comq_onnx.options.options import Options
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

# the most samples that give the moments, and the most others on which layers are quantized one by one: of all samples
# no more than one in PERTURBED_SHARE, and no more than LEAST_PERTURBED where all layers on them would take longer than
# two passes of all samples
SURVEYED, PERTURBED, PERTURBED_SHARE, LEAST_PERTURBED = 64, 8, 8, 2
# one in so many positions gives moments: they only serve to compare errors
FEWER_POSITIONS = 4
# the number of channels of a layer, and of rows of an embedding, whose errors are measured
CHANNELS = 64
ROWS = 512
# the leads of the best class over so many other classes: more numbers to measure noise with than one lead
RIVALS = 4
BITS = (2, 3, 4, 5, 6, 7, 8)
FAST = Method(effort="fast")
# the noise of outputs that are nothing like the float model's, or have another shape
MOST_NOISE = 10.0
# of logits over a vocabulary, so many positions of a sample are looked at
POSITIONS = 64
# in place of 0, to divide by
TINY = 1e-30

Tensors = dict[str, Any]
# the relative error at each number of bits, by group
Errors = Mapping[str, Mapping[int, float]]

# the effect of quantization on the outputs, [2]: the noise of the worst output over its energy; and what it does to
# choices: of what predicts the next token, the divergence of the distributions; else the variance of the changes of the
# best class's leads, 0 where there are no class scores (both in metrics.py)
Noise = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity:
    """Hold the result of the survey.

    groups: the names of the layers that share a weight, and so their codes, by the name of the first of them
    errors: the relative squared error of the layer's output, by group and number of bits
    gains: the noise in the model's outputs for one unit of that error, by group
    base: the noise of quantized activations alone
    together: the noise of quantized activations and all layers at REFERENCE_BITS
    """

    groups: dict[str, list[str]]
    errors: dict[str, dict[int, float]]
    gains: dict[str, Noise]
    base: Noise
    together: Noise

    def cost(self, layer: str, bits: int) -> float:
        """Return the relative noise that the group of a layer alone brings to the outputs at `bits` bits."""
        name = next(name for name, members in self.groups.items() if layer in members)
        return float(self.gains[name][0] * self.errors[name][bits])

    def damage(self, name: str, bits: int) -> float:
        """Return the noise of a group at `bits` bits, as a share of the noise of all groups at REFERENCE_BITS.

        Two such shares are added: of the relative noise and, where there are class scores, of that of choices, which
        may come from other layers.
        """
        parts: Noise = self.gains[name] * self.errors[name][bits] / np.maximum(self._at_reference, TINY)
        return float(parts.sum())

    def noise(self, bits: Mapping[str, int]) -> Noise:
        """Predict the noise for these bits by group.

        The noises of layers add up, times a factor: that of all layers together, as measured, over the sum of theirs.
        """
        factor = np.clip((self.together - self.base) / np.maximum(self._at_reference, TINY), 0.1, 10.0)
        return np.asarray(self.base + factor * self._sum(bits))

    @cached_property
    def _at_reference(self) -> Noise:
        """Return the sum of the noises of all groups at REFERENCE_BITS."""
        return self._sum(dict.fromkeys(self.groups, REFERENCE_BITS))

    def _sum(self, bits: Mapping[str, int]) -> Noise:
        """Add the noises of all groups at these bits."""
        return np.asarray(sum(self.gains[name] * self.errors[name][bits[name]] for name in self.groups))


def survey(
    plan: Plan, data: Dataset, context: Context, widths: Sequence[int] = BITS, language: Language | None = None
) -> Sensitivity:
    """Measure what it costs to quantize each layer of a plan.

    widths: the numbers of bits at which errors are measured, REFERENCE_BITS among them
    language: the output with logits over a vocabulary; None where there is none
    """
    plan = plan.with_bits({layer.name: REFERENCE_BITS for layer in plan.layers}, context.options)
    surveyed, perturbed = _split(data.calibration, len(_groups(plan)))
    try:
        solved, sampled = _own_errors(plan, replace(data, calibration=surveyed), context, widths)
    except SamplesError:  # these samples may not take every branch that some sample takes
        solved, sampled = _own_errors(plan, data, context, widths)
    groups = _groups(plan)
    errors = {}
    for name in groups:
        scale = solved.solutions[name].error / max(sampled[name][REFERENCE_BITS], TINY)
        errors[name] = {bits: error * scale for bits, error in sampled[name].items()}
    outputs = _Outputs.of(plan, perturbed, context, language)
    if not outputs.has_floats:
        # no output to measure noise in: the own errors of all layers count alike
        total = sum(error[REFERENCE_BITS] for error in errors.values())
        return Sensitivity(
            groups, errors, dict.fromkeys(groups, np.array([1.0, 0.0])), np.zeros(2), np.array([total, 0.0])
        )
    noises, base, together = _noises(solved, groups, outputs, context)
    gains = {name: noises[name] / max(errors[name][REFERENCE_BITS], TINY) for name in groups}
    return Sensitivity(groups, errors, gains, base, together)


# The errors of layers
# ----------------------------------------------------------------------------------------------------------------------


def _own_errors(
    plan: Plan, data: Dataset, context: Context, widths: Sequence[int]
) -> tuple[Solved, dict[str, dict[int, float]]]:
    """Solve all layers quickly on the float model's moments, and some channels of each at every number of bits.

    Returns the solutions at the bits of the plan, and the relative errors of the channels by layer and number of bits.
    """

    def tell(what: str, done: int, total: int) -> None:
        if what == "stages":
            context.progress("survey", done, total)

    options = replace(
        context.options, solver=FAST.solver, effort=FAST.effort, order=None, sweeps=None, shrink=None, independent=True
    )
    quick = replace(context, options=options, journal=Journal(), progress=tell)
    solved = walk(plan, data, quick, _ChannelErrors(plan, context.options, tuple(widths)), FEWER_POSITIONS, "survey")
    context.journal.notes += quick.journal.notes
    sampled = dict(solved.observed)
    for layer in plan.layers:
        if layer.kind.is_lookup or plan.is_unseen(layer):
            sampled[layer.name] = _row_errors(plan, layer, context, widths)
    return solved, sampled


@dataclass(frozen=True)
class _ChannelErrors:
    """Measure the relative errors of some channels of layers that are solved, wherever that is.

    plan: the plan, of which `widths` are the other numbers of bits
    """

    plan: Plan
    options: Options
    widths: tuple[int, ...]

    def __call__(
        self, layers: Sequence[Layer], weights: Sequence[Array], moments: Moments, has_bias: bool
    ) -> dict[str, dict[int, float]]:
        """Return the error of each layer at each number of bits."""
        return {x.name: self._of(x, w, moments, has_bias) for x, w in zip(layers, weights, strict=True)}

    def _of(self, layer: Layer, weight: Array, moments: Moments, has_bias: bool) -> dict[int, float]:
        """Return the error of some channels of a layer."""
        groups = spread_indices(len(weight), CHANNELS)
        channels = spread_indices(weight.shape[1], max(1, CHANNELS // len(groups)))
        some = np.ascontiguousarray(weight[np.ix_(groups, channels)])
        grids = [solved_grid(layer.kind, self.plan.grid_at(layer, bits, self.options)) for bits in self.widths]
        return dict(zip(self.widths, errors_at(some, moments.groups(groups), grids, FAST, has_bias), strict=True))


def _row_errors(plan: Plan, layer: Layer, context: Context, widths: Sequence[int]) -> dict[int, float]:
    """Return the relative error of some rows of a weight that is only rounded at each number of bits."""
    table = np.asarray(plan.written.weight(layer), np.float32)
    some = np.ascontiguousarray(table[:, spread_indices(table.shape[1], ROWS)])
    return {bits: round_rows(some, plan.grid_at(layer, bits, context.options)).error for bits in widths}


def _groups(plan: Plan) -> dict[str, list[str]]:
    """Group layers that share a weight, by the name of the first of them that the samples reach."""
    groups: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for layer in sorted(plan.layers, key=lambda x: x.name in plan.unreached):
        groups.setdefault(first.setdefault(layer.weight, layer.name), []).append(layer.name)
    return groups


# The noise in the outputs
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """Hold the outputs of the float model for a few samples, to measure noise against.

    plan: the plan of the layers that are quantized
    device: where models run
    threads: of the CPU for one operator; 0 for as many as ONNX Runtime chooses
    feeds: the samples, batch by batch
    expected: the outputs of the float model, batch by batch
    scores: the name of the output with class scores; None where there is none
    language: the output with logits over a vocabulary; None where there is none
    """

    plan: Plan
    device: str
    threads: int
    feeds: Sequence[Tensors]
    expected: Sequence[Tensors]
    scores: str | None
    language: Language | None

    @classmethod
    def of(cls, plan: Plan, samples: Samples, context: Context, language: Language | None) -> _Outputs:
        """Run the float model on samples."""
        feeds = list(samples.batches(context.options.batch_size))
        session = _session(plan.written.model, plan, _loader(plan, context.device))
        expected = [_taken(one, session.run(one), language) for one in feeds]
        own = {name: x for name, x in expected[0].items() if name in plan.written.judged.whole}
        scores = language.output if language is not None and language.output in own else scores_among(own)
        threads = 0 if context.engine.is_here else 1
        return cls(plan, context.device, threads, feeds, expected, scores, language)

    def load(self, level: int | None = None) -> Load:
        """Return what loads a model; level: that of ONNX Runtime's optimization."""
        return _loader(self.plan, self.device, level, self.threads)

    @property
    def has_floats(self) -> bool:
        """Tell whether there is a floating-point output to measure noise in."""
        return any(_floats(outputs) for outputs in self.expected)

    def noise_of(self, solved: Solved, level: int | None = None) -> Noise:
        """Measure the noise of a model with all solved layers quantized; level: that of ONNX Runtime's optimization."""
        model = self.plan.written.model.clone()
        emit(model, solved)
        session = _session(model, self.plan, self.load(level))
        return self.noise(session.run(feeds) for feeds in self.feeds)

    def noise(self, outputs: Iterable[Tensors]) -> Noise:
        """Measure the mean noise of the outputs of all batches."""
        noises = []
        for feeds, before, after in zip(self.feeds, self.expected, outputs, strict=True):
            noises.append(self._noise(before, _taken(feeds, after, self.language)))
            del after  # logits over a vocabulary are large
        return np.asarray(np.mean(noises, axis=0))

    def _noise(self, before: Tensors, after: Tensors) -> list[float]:
        """Measure the noise of one batch; before, after: the outputs of the float model for it, and of another."""
        relative = min(10 ** (-sqnr_of(_floats(before), after) / 10), MOST_NOISE)
        name = self.scores
        if name is None:
            return [relative, 0.0]
        if self.language is not None and self.language.predicts_next:
            return [relative, min(divergence(before[name], after[name]), MOST_NOISE)]
        return [relative, float(np.mean(lead_changes(before[name], after[name], RIVALS) ** 2))]


def _taken(feeds: Tensors, outputs: Tensors, language: Language | None) -> Tensors:
    """Return the outputs for a batch, those of logits over a vocabulary at some positions that are no padding.

    These are [positions, vocabulary] then, and stay so.
    """
    if language is None or language.output not in outputs or outputs[language.output].ndim == 2:
        return outputs
    logits, kept = outputs[language.output], np.argwhere(language.kept(feeds))
    some = kept[spread_indices(len(kept), POSITIONS * len(logits))]
    return {**outputs, language.output: logits[some[:, 0], some[:, 1]]}


def _noises(
    solved: Solved, groups: Mapping[str, Sequence[str]], outputs: _Outputs, context: Context
) -> tuple[dict[str, Noise], Noise, Noise]:
    """Return the noise of each group alone at REFERENCE_BITS, of quantized activations alone, and of all together."""
    engine, tails = context.engine, tails_of(solved.plan, groups)
    # as one value: both hold the same plan
    both = engine.place((solved, outputs), 0)
    cuts = engine.submit(_cuts, both, tails)
    found, done = list[Any](), 0
    for tail in tails:
        found.append(engine.submit(_tail_noises, both, groups, tail, cuts))
        done += len(tail.groups)
        if engine.is_here:
            context.progress("sensitivity", done, len(groups))
    del cuts
    found += [engine.submit(_activation_noise, both), engine.submit(_noise_together, both)]
    *of_tails, base, together = engine.gather(found)
    context.progress("sensitivity", len(groups), len(groups))
    alone = {name: noise for one in of_tails for name, noise in one.items()}
    return {name: alone[name] for name in groups}, base, together


def _cuts(both: tuple[Solved, _Outputs], tails: Sequence[Tail]) -> list[Tensors]:
    """Run the float model for the tensors at all cuts."""
    solved, outputs = both
    return cut_tensors(solved.plan, tails, outputs.feeds, outputs.load())


def _tail_noises(
    both: tuple[Solved, _Outputs], groups: Mapping[str, Sequence[str]], tail: Tail, cuts: Sequence[Tensors]
) -> dict[str, Noise]:
    """Measure the noise of each group of a tail alone."""
    solved, outputs = both
    found = perturbed(solved, groups, tail, outputs.feeds, cuts, outputs.expected, outputs.load())
    return {name: outputs.noise(values) for name, values in found}


def _activation_noise(both: tuple[Solved, _Outputs]) -> Noise:
    """Measure the noise of quantized activations alone."""
    solved, outputs = both
    alone = replace(solved.plan, activations=solved.plan.activations.everywhere())
    # unoptimized: ONNX Runtime would quantize the float weights between quantized activations itself
    return outputs.noise_of(Solved(alone, {}, solved.activation_grids), level=0)


def _noise_together(both: tuple[Solved, _Outputs]) -> Noise:
    """Measure the noise of all layers and activations together."""
    solved, outputs = both
    return outputs.noise_of(solved)


def _session(model: ir.Model, plan: Plan, load: Load) -> JudgedSession:
    """Load a model for the values by which it is judged."""
    return JudgedSession.of(model, plan.written.judged.without_caches, load)


def _loader(plan: Plan, device: str, level: int | None = None, threads: int = 0) -> Load:
    """Return what loads a model for the survey; level: that of ONNX Runtime's optimization."""
    return lambda source: Session(
        source, device, level=level, threads=threads, what="the model for the survey", float_matmul_nbits=True,
        disable_qdq_fusion=plan.target.runs_outside_ort, small=isinstance(source, str),
    )  # fmt: skip


def _floats(outputs: Tensors) -> Tensors:
    """Return the floating-point outputs."""
    return {name: x for name, x in outputs.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"}


def _split(samples: Samples, groups: int) -> tuple[Samples, Samples]:
    """Split samples into those for the moments and those for the perturbations, each evenly spread.

    groups: how many perturbations there are
    """
    unit = samples.fixed_batch or 1
    batches = len(samples) // unit
    most = min(PERTURBED, max(LEAST_PERTURBED, 2 * len(samples) // max(groups, 1)))
    few = max(1, min(most // unit, batches // PERTURBED_SHARE))
    picked = spread_indices(batches, few)
    rest = np.setdiff1d(np.arange(batches), picked)
    # a single batch is used for both
    rest = rest[spread_indices(len(rest), max(1, SURVEYED // unit))] if len(rest) else picked

    def take(chosen: npt.NDArray[np.intp]) -> Samples:
        return samples.take((chosen[:, None] * unit + np.arange(unit)).ravel())

    return take(rest), take(picked)
