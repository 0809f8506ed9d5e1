"""Walk through the stages of a model: solve the layers of each, and go on with the quantized result.

At the cut before a stage all tensors that are still read are kept twice for every sample: as the float model gives them
(x) and as the model quantized so far gives them (x^). They give the moments of each layer's input, and the layers are
solved. Then the stage's segment runs both ways up to the next cut: in float, and quantized as it will be written. So
the whole model runs once each way, memory is bounded by one segment and the cut tensors, and later layers make up for
the errors of earlier ones.

Samples that early layers do not need wait (leading.py): they pass the stages that do without them in one leg, in float
ahead, because the ranges of activations are those of all samples, and quantized once the layers on the leg are solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx.calibrate import cut_tensors, stages
from comq_onnx.calibrate.finite import out_of_range
from comq_onnx.calibrate.layer_moments import LayerInput, in_groups, input_moments
from comq_onnx.calibrate.layer_solver import LayerSolver, Observer
from comq_onnx.calibrate.leading import Tensors, bytes_at_cuts, divide, input_shapes, samples_needed
from comq_onnx.calibrate.observed_ranges import ActivationRanges
from comq_onnx.calibrate.passage import Passage, Way
from comq_onnx.calibrate.recurrent_rows import with_rows
from comq_onnx.calibrate.shared_weights import float_moments, later_readers
from comq_onnx.calibrate.stage_costs import Shapes, stage_shares
from comq_onnx.calibrate.stages import Stage
from comq_onnx.context import Context
from comq_onnx.errors import ModelError
from comq_onnx.model.files import private_directory
from comq_onnx.model.layers import Layer, calibrated
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.samples.dataset import Dataset
from comq_onnx.solve.moments import Moments
from comq_onnx.workdir import GENERATIONS

# progress through the stages is told in these, of all the work
THOUSANDTHS = 1000


def walk(
    plan: Plan, data: Dataset, context: Context, observer: Observer | None = None, fewer_positions: int = 1,
    name: str = "solve",
) -> Solved:  # fmt: skip
    """Calibrate and solve every layer of a plan on the calibration samples.

    observer: sees the moments that each solution is made from
    fewer_positions: the number of positions that moments are made from is divided by this
    name: tells this walk from others in a work directory, where its state is kept after each stage

    Raises OptionError where the state cannot be kept, ModelError where a tensor or a weight is not finite or too large,
    SamplesError where no sample reaches a layer.
    """
    with (
        private_directory() as work,
        cut_tensors.opened(context.device, context.memory, work) as store,
    ):
        walking = _Walk(plan, data, context, store, work, observer, fewer_positions)
        return walking.run(f"{name}-{context.options.batch_size}")


def round_all(plan: Plan, context: Context) -> Solved:
    """Round every layer of a plan whose activations stay float: that needs no samples."""
    solver = LayerSolver(plan, context.options.method)
    with context.journal.timed("solve"):
        solver.round_all()
    return Solved(plan, solver.solutions, {}, {}, solver.seconds)


class _Walk:
    """Go through the stages of a plan; its solver and its ranges keep what is solved and seen so far."""

    def __init__(
        self, plan: Plan, data: Dataset, context: Context, store: cut_tensors.Host, work: Path,
        observer: Observer | None, fewer_positions: int,
    ) -> None:  # fmt: skip
        """Divide the samples into batches, and the model into stages.

        store: keeps the cut tensors
        work: a directory for models that are too large for one protobuf message
        """
        plan = with_rows(plan)
        options = context.options
        self._plan, self._data, self._context = plan, data, context
        self._store, self._work, self._fewer = store, work, fewer_positions
        self._layers = list(calibrated(plan.walked.layers))
        self._parts = stages.cut(plan.walked.model, self._layers)
        shapes = input_shapes(plan, self._parts, data.calibration, context.device, work)
        self._needed = samples_needed(plan, self._parts, data.calibration, fewer_positions, shapes)
        groups, self._samples = divide(data, self._needed, options.batch_size)
        self._counts = [count for group in groups for count in group.counts]
        self._masks = [mask for group in groups for mask in group.masks]
        self._shares = self._predict_shares(shapes or {})
        self._passed = 0
        self._solver = LayerSolver(plan, options.method, observer)
        self._ranges = ActivationRanges(plan, self._masks, options.seed, self._out_of_range)
        way = Way(plan, store, context.device, work, options.independent, self._ranges.observe, self._count_samples)
        inputs = [str(v.name) for v in plan.walked.model.graph.inputs]
        self._passages = [Passage(way, group, group.inputs(inputs), group.inputs(inputs)) for group in groups]
        self._later = later_readers(self._parts, self._solver.weight_key)
        self._find_others = partial(float_moments, way, self._parts, groups, self._later, options.seed, self._refuse)
        self._others: dict[str, list[Moments]] = {}

    def _predict_shares(self, shapes: Shapes) -> list[float]:
        """Predict the share of the walk after each stage; shapes: those of the inputs of layers, for one batch."""
        samples = self._data.calibration
        unit = samples.fixed_batch or 1
        like = [(unit, *array.shape[1:]) for array in samples.arrays.values()]
        needed, total = [count // unit for count in self._needed], len(samples) // unit
        return stage_shares(self._parts, shapes, like, needed, total, len(self._counts), self._fewer)

    def run(self, name: str) -> Solved:
        """Solve one stage after the other; name: that of the states in a work directory."""
        done = self._restore(name)
        if done == 0:
            self._check_room()
            self._begin()
        for stage in self._parts[done:]:
            self._catch_up(stage)
            self._solve([x for x in stage.layers if x.input not in stage.makes], *self._cuts(stage))
            self._advance(stage)
            self._tell()
            self._context.progress("stages", round(THOUSANDTHS * self._shares[stage.index]), THOUSANDTHS)
            self._save(name, stage.index + 1)
        self._solver.round_unreached()
        return self._solved()

    def _begin(self) -> None:
        """Do what comes before the first stage: round tables, and bring samples that wait to where they are needed."""
        with self._context.journal.timed("calibrate"):
            self._others = self._find_others()
        seconds = self._context.journal.seconds
        seconds["solve"] = seconds.get("solve", 0.0) + self._solver.round_tables()
        for passage in self._passages:
            for name, given in passage.x.items():
                for i, array in enumerate(given):
                    self._ranges.observe(name, array, passage.group.first + i)
        self._ranges.settle(name for name in self._passages[0].x if name in self._samples.arrays)
        for passage in self._passages[1:]:
            if passage not in self._at(0):
                self._advance_float(passage, 0)

    # in a work directory

    def _check_room(self) -> None:
        """Make sure that a work directory has room for two states: of both models at the largest cut, and codes."""
        if self._context.workdir is None:
            return
        samples, device = self._data.calibration, self._context.device
        largest = bytes_at_cuts(self._plan, self._parts, samples, self._needed, device, self._work)
        if largest is not None:
            inputs = sum(array.nbytes for array in samples.arrays.values())
            codes = sum(int(np.prod(layer.weight_shape)) for layer in self._layers)
            self._context.workdir.check_room(GENERATIONS * (2 * largest + codes) + inputs)

    def _save(self, name: str, done: int) -> None:
        """Keep all that later stages need; done: how many stages are."""
        if self._context.workdir is None:
            return
        once = _Once(self._store.on_host)
        passages = [passage.state(once) for passage in self._passages]
        with self._context.journal.timed("save"):
            fixed = (done, self._solver.state(), self._others, passages)
            self._context.workdir.save(name, done, fixed, self._ranges.state())

    def _restore(self, name: str) -> int:
        """Go on from the last state in the work directory. Returns how many stages are done."""
        work = self._context.workdir
        state = None if work is None else work.load(name)
        if state is None:
            return 0
        (done, solver, self._others, passages), ranges = state
        self._solver.restore(solver)
        self._ranges.restore(ranges)
        once = _Once(self._store.restore)
        for passage, its in zip(self._passages, passages, strict=True):
            passage.restore(its, once)
        self._context.journal.notes.append(
            f"{name.partition('-')[0]} went on after stage {done} of {len(self._parts)}, as kept in "
            f"{self._context.options.workdir}"
        )
        self._context.progress("stages", round(THOUSANDTHS * self._shares[done - 1]), THOUSANDTHS)
        return int(done)

    def _at(self, stage: int) -> list[Passage]:
        """Return the passages of the samples that a stage needs; stage: its index."""
        return [passage for passage in self._passages if passage.group.start < self._needed[stage]]

    def _cuts(self, stage: Stage) -> tuple[Tensors, Tensors]:
        """Return the tensors at the cut before a stage, of all samples that it needs: x and x^."""
        passages = self._at(stage.index)
        return _joined([p.x for p in passages]), _joined([p.x_hat for p in passages])

    def _solved(self) -> Solved:
        """Return what is solved so far."""
        ranges, solver = self._ranges, self._solver
        return Solved(self._plan, solver.solutions, ranges.grids, ranges.ranges, solver.seconds, solver.observed)

    def _tell(self) -> None:
        """Show how many layers are solved."""
        self._context.progress("layers", self._solver.count, len(self._layers))

    def _count_samples(self, count: int) -> None:
        """Show how many samples have passed since the last pass over all began."""
        self._passed = (self._passed + count) % sum(self._counts)
        self._context.progress("samples", self._passed or sum(self._counts), sum(self._counts))

    # moments and solutions

    def _solve(self, layers: Sequence[Layer], x: Mapping[str, Any], x_hat: Mapping[str, Any]) -> None:
        """Solve layers; x, x_hat: their inputs in the float model and in the one quantized so far, by name."""
        for readers, moments in self._moments(layers, x, x_hat):
            spent = self._solver.solve(readers, moments, self._others.get(readers[0].name, []), self._tell)
            seconds = self._context.journal.seconds
            seconds["solve"] = seconds.get("solve", 0.0) + spent

    def _moments(
        self, layers: Sequence[Layer], x: Mapping[str, Any], x_hat: Mapping[str, Any]
    ) -> Iterator[tuple[list[Layer], Moments]]:
        """Yield each group of layers that read the same rows, with the moments of those rows."""
        sharing: dict[tuple[object, ...], list[Layer]] = {}
        for layer in layers:
            source = self._plan.probes.get(layer.name, layer.input)
            others = tuple((x.input, x.kind.rows_key()) for x in self._later.get(layer.name, ()))
            key = (source, self._plan.is_integer(layer), layer.kind.rows_key(), others)
            sharing.setdefault(key, []).append(layer)
        for group in sharing.values():
            source = self._plan.probes.get(group[0].name, group[0].input)
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
                () if nested else self._counts[: len(x)],
                () if nested else self._masks[: len(x)],
            ),
            self._store,
        )  # fmt: skip

        refuse = partial(self._refuse, layer, given.counts)
        return input_moments(given, self._store, options.seed, refuse, self._fewer)

    def _share(self, layers: Sequence[Layer], x: Mapping[str, Any], x_hat: Mapping[str, Any]) -> None:
        """Give each weight that layers in the subgraphs of one node share the moments of all their inputs.

        x, x_hat: the inputs, as in `_solve`
        """
        first: dict[object, Layer] = {}
        for layer in layers:
            root = first.setdefault(self._solver.weight_key(layer), layer)
            source, own = (self._plan.probes[one.name] for one in (layer, root))
            if source != own:
                self._later.setdefault(root.name, []).append(layer)
                moments = self._input_moments(layer, x[source], x_hat[source])
                self._others.setdefault(root.name, []).append(moments)

    def _refuse(self, layer: Layer, counts: Sequence[int], array: Any, i: int) -> ModelError:
        """Return the error for an input of a layer whose numbers are not finite or too large.

        counts: how many samples each of its arrays holds
        i: which of them it is
        """
        return out_of_range(array, layer.input, i, counts, self._samples, self._plan.walked.layers)

    def _out_of_range(self, name: str, array: Any, batch: int) -> ModelError:
        """Return the error for an array of the value `name` whose numbers are not finite or too large."""
        return out_of_range(array, name, batch, self._counts, self._samples, self._plan.walked.layers)

    # from one cut to the next

    def _catch_up(self, stage: Stage) -> None:
        """Bring the quantized model of all samples that a stage needs to the cut before it."""
        with self._context.journal.timed("calibrate"):
            for passage in self._at(stage.index):
                passage.advance_quantized(self._solved())

    def _advance(self, stage: Stage) -> None:
        """Run the stage's segment in float, and quantized where that is for the next stage.

        Layers in subgraphs, and those that read the states of their own nodes, are solved before the
        quantized segment runs up to that cut.
        """
        probes = self._plan.probes
        inner = [x for x in self._plan.walked.layers if probes.get(x.name) in stage.makes]
        fed_back = [x for x in stage.layers if x.input in stage.makes]
        stacked = list(dict.fromkeys(probes[layer.name] for layer in inner))
        rows = list(dict.fromkeys([*stacked, *(layer.input for layer in fed_back)]))
        passages = self._at(stage.index)
        made = [self._advance_float(passage, stage.index, rows) for passage in passages]
        self._ranges.settle(name for name in stage.makes if name in self._plan.activations.values)
        if rows:
            with self._context.journal.timed("calibrate"):
                solved = self._solved()
                hat = [p.rows_hat(rows, its, solved) for p, its in zip(passages, made, strict=True)]
            x, x_hat = _joined(made), _joined(hat)
            within = [{name: _iterations(t[name]) for name in stacked} for t in (x, x_hat)]
            self._share(inner, *within)
            self._solve(inner, *within)
            self._solve(fed_back, x, x_hat)

    def _advance_float(self, passage: Passage, start: int, rows: Sequence[str] = ()) -> Tensors:
        """Run the float model of some samples to the next stage that needs them; start: the index of the first stage.

        Returns the values `rows` that are made on the way."""
        following = range(start + 1, len(self._parts))
        end = next((k for k in following if passage in self._at(k)), len(self._parts))
        with self._context.journal.timed("calibrate"):
            return passage.advance_float(stages.join(self._parts[start:end]), rows)


class _Once:
    """Make something of each tensor once: tensors that are one stay one."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make, self._made = make, dict[int, tuple[Any, Any]]()

    def __call__(self, given: Any) -> Any:
        if id(given) not in self._made:
            # what is given must live on, or another one may get its id
            self._made[id(given)] = given, self._make(given)
        return self._made[id(given)][1]


def _joined(cuts: Sequence[Tensors]) -> Tensors:
    """Put the batches of several passages behind one another."""
    return {name: [array for cut in cuts for array in cut[name]] for name in cuts[0]}


def _iterations(stacked: list[Any]) -> list[Any]:
    """Divide inputs of a layer in a subgraph, stacked, into one array for each time that the subgraph runs."""
    return [one for array in stacked for one in array]
