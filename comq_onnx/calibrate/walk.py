"""Walk through the stages of a model: solve the layers of each, and go on with the quantized result.

At the cut before a stage all tensors that are still read are kept twice for every sample: as the float model gives them
(x) and as the model quantized so far gives them (x^). They give the moments of each layer's input, and the layers are
solved. Then the stage's segment runs both ways up to the next cut: in float, and quantized as it will be written. So
the whole model runs once each way, memory is bounded by one segment and the cut tensors, and later layers make up for
the errors of earlier ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx import arrays
from comq_onnx.calibrate import cut_tensors, stages
from comq_onnx.calibrate.finite import out_of_range
from comq_onnx.calibrate.layer_moments import LayerInput, in_groups, input_moments
from comq_onnx.calibrate.layer_solver import LayerSolver, Observer
from comq_onnx.calibrate.observed_ranges import ActivationRanges
from comq_onnx.calibrate.segment import run_segment
from comq_onnx.calibrate.stages import Stage
from comq_onnx.context import Context
from comq_onnx.errors import ModelError
from comq_onnx.model.files import private_directory
from comq_onnx.model.layers import Layer, calibrated
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.samples.dataset import Dataset
from comq_onnx.solve.moments import Moments

# one array for each batch, by the name of the value
Tensors = dict[str, list[Any]]


def walk(
    plan: Plan, data: Dataset, context: Context, observer: Observer | None = None, fewer_positions: int = 1
) -> Solved:
    """Calibrate and solve every layer of a plan on the calibration samples.

    observer: sees the moments that each solution is made from
    fewer_positions: the number of positions that moments are made from is divided by this

    Raises ModelError where a tensor or a weight is not finite or too large, SamplesError where no sample reaches a
    layer.
    """
    with (
        private_directory() as work,
        cut_tensors.opened(context.device, context.memory, work) as store,
    ):
        return _Walk(plan, data, context, store, work, observer, fewer_positions).run()


class _Walk:
    """Go through the stages of a plan; its solver and its ranges keep what is solved and seen so far."""

    def __init__(
        self, plan: Plan, data: Dataset, context: Context, store: cut_tensors.Host, work: Path,
        observer: Observer | None, fewer_positions: int,
    ) -> None:  # fmt: skip
        """Divide the samples into batches.

        store: keeps the cut tensors
        work: a directory for models that are too large for one protobuf message
        """
        self._plan, self._samples, self._context = plan, data.calibration, context
        self._store, self._work, self._fewer = store, work, fewer_positions
        size = context.options.batch_size
        self._batches = list(self._samples.batches(size))
        self._counts = self._samples.batch_counts(size)
        self._masks = [data.kept(batch) for batch in self._batches]
        self._solver = LayerSolver(plan, context.options.method, observer)
        self._ranges = ActivationRanges(plan, self._masks, context.options.seed, self._out_of_range)
        self._layers = list(calibrated(plan.walked.layers))

    def run(self) -> Solved:
        """Solve one stage after the other."""
        seconds = self._context.journal.seconds
        seconds["solve"] = seconds.get("solve", 0.0) + self._solver.round_tables()
        inputs = {str(v.name) for v in self._plan.walked.model.graph.inputs}
        float_cut: Tensors = {name: [batch[name] for batch in self._batches] for name in inputs}
        quantized_cut: Tensors = {name: list(given) for name, given in float_cut.items()}
        for name, given in float_cut.items():
            for i, array in enumerate(given):
                self._ranges.observe(name, array, i)
        self._ranges.settle(name for name in float_cut if name in self._samples.arrays)
        parts = stages.cut(self._plan.walked.model, self._layers)
        for stage in parts:
            self._solve(stage.layers, float_cut, quantized_cut)
            self._advance(stage, float_cut, quantized_cut)
            self._tell()
            self._context.progress("stages", stage.index + 1, len(parts))
        self._solver.round_unreached()
        return self._solved()

    def _solved(self) -> Solved:
        """Return what is solved so far."""
        ranges, solver = self._ranges, self._solver
        return Solved(self._plan, solver.solutions, ranges.grids, ranges.ranges, solver.seconds)

    def _tell(self) -> None:
        """Show how many layers are solved."""
        self._context.progress("layers", self._solver.count, len(self._layers))

    # moments and solutions

    def _solve(self, layers: Sequence[Layer], x: Mapping[str, Any], x_hat: Mapping[str, Any]) -> None:
        """Solve layers; x, x_hat: their inputs in the float model and in the one quantized so far, by name."""
        for readers, moments in self._moments(layers, x, x_hat):
            spent = self._solver.solve(readers, moments, self._tell)
            seconds = self._context.journal.seconds
            seconds["solve"] = seconds.get("solve", 0.0) + spent

    def _moments(
        self, layers: Sequence[Layer], x: Mapping[str, Any], x_hat: Mapping[str, Any]
    ) -> Iterator[tuple[list[Layer], Moments]]:
        """Yield each group of layers that read the same rows, with the moments of those rows."""
        sharing: dict[tuple[str, bool, object], list[Layer]] = {}
        for layer in layers:
            source = self._plan.probes.get(layer.name, layer.input)
            sharing.setdefault((source, self._plan.is_integer(layer), layer.kind.rows_key()), []).append(layer)
        for (source, *_), group in sharing.items():
            with self._context.journal.timed("calibrate"):
                moments = self._input_moments(group[0], x[source], x_hat[source])
            yield group, moments

    def _input_moments(self, layer: Layer, x: Sequence[Any], x_hat: Sequence[Any]) -> Moments:
        """Return the moments of a layer's input; x, x_hat: its arrays, one for each batch or iteration of a loop."""
        options = self._context.options
        quantized = self._plan.is_integer(layer) and not options.independent
        nested = layer.name in self._plan.probes
        shared = all(a is b for a, b in zip(x, x_hat, strict=True))
        given = in_groups(
            LayerInput(
                layer, x, x if shared else x_hat,
                self._ranges.grids[layer.input] if quantized else None,
                () if nested else self._counts,
                () if nested else self._masks,
            ),
            self._store,
        )  # fmt: skip

        def refuse(array: Any, i: int) -> ModelError:
            return out_of_range(array, layer.input, i, given.counts, self._samples, self._plan.walked.layers)

        return input_moments(given, self._store, options.seed, refuse, self._fewer)

    def _out_of_range(self, name: str, array: Any, batch: int) -> ModelError:
        """Return the error for an array of the value `name` whose numbers are not finite or too large."""
        return out_of_range(array, name, batch, self._counts, self._samples, self._plan.walked.layers)

    # from one cut to the next

    def _advance(self, stage: Stage, float_cut: Tensors, quantized_cut: Tensors) -> None:
        """Run the stage's segment both ways, and put the tensors of the next cut into the two dictionaries.

        Layers in subgraphs are solved before the quantized segment runs up to that cut.
        """
        probes, independent = self._plan.probes, self._context.options.independent
        planned = [name for name in stage.makes if name in self._plan.activations.values]
        live = [name for name in stage.makes if name in stage.live_after]
        inner = [x for x in self._plan.walked.layers if probes.get(x.name) in stage.makes]
        stacked = list(dict.fromkeys(probes[layer.name] for layer in inner))
        if live or planned or stacked:
            wanted = list(dict.fromkeys([*live, *planned, *stacked]))
            made = self._run_float(stage, float_cut, wanted, [*live, *stacked])
            self._ranges.settle(planned)
            if inner:
                hat = made if independent else self._run_quantized(stage, quantized_cut, stacked, made)
                self._solve(inner, *({name: _iterations(t[name]) for name in stacked} for t in (made, hat)))
            hat = made if independent or not live else self._run_quantized(stage, quantized_cut, live, made)
            for name in live:
                float_cut[name], quantized_cut[name] = made[name], hat[name]
        for name in [n for n in float_cut if n not in stage.live_after]:
            del float_cut[name], quantized_cut[name]

    def _run_float(self, stage: Stage, given: Tensors, wanted: Sequence[str], kept: Sequence[str]) -> Tensors:
        """Run the float segment: return the tensors `kept`, and observe the ranges of all that are `wanted`."""
        with self._context.journal.timed("calibrate"):
            made: Tensors = {name: [] for name in kept}
            for i, outputs in enumerate(self._run(stage, given, wanted, None)):
                for name in wanted:
                    self._ranges.observe(name, outputs[name], i)
                for name in kept:
                    made[name].append(self._store.keep(outputs[name]))
            return made

    def _run_quantized(self, stage: Stage, given: Tensors, wanted: Sequence[str], made: Tensors) -> Tensors:
        """Run the segment as it will be written, on the tensors of the model quantized so far.

        made: the tensors of the float segment. One that quantization does not change is kept once: the result holds
        that of `made`.
        """
        with self._context.journal.timed("calibrate"):
            hat: Tensors = {name: [] for name in wanted}
            for outputs in self._run(stage, given, wanted, self._solved()):
                for name in wanted:
                    hat[name].append(self._store.keep(outputs[name]))
            fetch = self._store.fetch
            return {
                name: [a if _same(fetch(a), fetch(b)) else b for a, b in zip(made[name], hat[name], strict=True)]
                for name in wanted
            }

    def _run(
        self, stage: Stage, given: Tensors, wanted: Sequence[str], solved: Solved | None
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the outputs of the stage's segment batch by batch."""
        done = 0
        outputs = run_segment(
            self._plan, stage, given, len(self._counts), wanted, solved, self._store, self._context.device, self._work
        )  # fmt: skip
        for count, one in zip(self._counts, outputs, strict=True):
            yield one
            done += count
            self._context.progress("samples", done, sum(self._counts))


def _iterations(stacked: list[Any]) -> list[Any]:
    """Divide inputs of a layer in a subgraph, stacked, into one array for each time that the subgraph runs."""
    return [one for array in stacked for one in array]


def _same(a: Any, b: Any) -> bool:
    """Tell whether two arrays or tensors hold the same numbers."""
    if arrays.is_tensor(a):
        return arrays.is_tensor(b) and a.shape == b.shape and bool((a == b).all())
    return isinstance(a, np.ndarray) and a.shape == b.shape and np.array_equal(a, b)
