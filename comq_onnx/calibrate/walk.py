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

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx.calibrate import cut_tensors, passage, stages
from comq_onnx.calibrate.crew import Crew, Shard
from comq_onnx.calibrate.layer_solver import LayerSolver, Observer
from comq_onnx.calibrate.leading import bytes_at_cuts, divide, input_shapes, samples_needed
from comq_onnx.calibrate.observed_ranges import ActivationRanges
from comq_onnx.calibrate.passage import Rows, Way
from comq_onnx.calibrate.recurrent_rows import with_rows
from comq_onnx.calibrate.segment import Segments
from comq_onnx.calibrate.shared_weights import later_readers
from comq_onnx.calibrate.stage_costs import Shapes, stage_shares
from comq_onnx.calibrate.stages import Stage
from comq_onnx.context import Context
from comq_onnx.model.files import private_directory
from comq_onnx.model.layers import Layer, calibrated
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.samples.dataset import Dataset
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
        """Divide the samples into shards, and the model into stages.

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
        groups = divide(data, self._needed, options.batch_size)
        self._counts = [count for group in groups for count in group.counts]
        self._shares = self._predict_shares(shapes or {})
        self._passed = 0
        self._ranges = ActivationRanges(plan, options.seed)
        self._engine = context.engine
        self._segments = Segments(context.device, work)
        self._inputs = [str(v.name) for v in plan.walked.model.graph.inputs]
        self._crew = Crew(self._engine, self._way(), groups, self._inputs)
        self._solver = LayerSolver(
            plan, options.method, observer, self._engine, self._engine.place(plan, 0), self._tell
        )
        self._later = later_readers(self._parts, self._solver.weight_key)
        self._others: dict[str, list[Any]] = {}

    def _way(self) -> Way:
        """Return what all passages have in common."""
        options, axes = self._context.options, self._ranges.axes
        if self._engine.is_here:
            tell, store, segments = self._count_samples, self._store, self._segments
            return Way(self._plan, store, segments, options.independent, options.seed, axes, tell)
        # workers keep tensors in memory, and move them to the disk themselves; each task is one thread
        store, segments = cut_tensors.Host(sys.maxsize, Path()), Segments("cpu", None, 1)
        return Way(self._plan, store, segments, options.independent, options.seed, axes, _silent)

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
            here = [shard.at for shard in self._at(stage.index)]
            self._solve([x for x in stage.layers if x.input not in stage.makes], here)
            self._advance(stage)
            self._tell()
            self._context.progress("stages", round(THOUSANDTHS * self._shares[stage.index]), THOUSANDTHS)
            self._save(name, stage.index + 1)
        self._collect()
        self._solver.round_unreached()
        return self._solved()

    def _begin(self) -> None:
        """Do what comes before the first stage: round tables, and bring samples that wait to where they are needed."""
        with self._context.journal.timed("calibrate"):
            self._find_others()
        self._solver.round_tables()
        if self._engine.is_here:
            self._collect()
        self._ranges.take(self._crew.see_inputs())
        self._ranges.settle(self._inputs)
        here = self._at(0)
        self._advance_float([shard for shard in self._crew.shards if shard not in here], 0)

    def _find_others(self) -> None:
        """Find the moments of further inputs of shared weights, in the float model.

        Codes are chosen when the first of the layers is reached. What the later ones will read in the quantized model
        is not known by then: their inputs in the float model stand in for it.
        """
        layers = [layer for some in self._later.values() for layer in some]
        if not layers:
            return
        names = list(dict.fromkeys(layer.input for layer in layers))
        passages = self._crew.float_rows(stages.join(self._parts), names)
        rows = [Rows(layer, layer.input, None, False) for layer in layers]
        found = self._crew.moments(rows, passages, 1)
        self._others = {name: [next(found) for _ in some] for name, some in self._later.items()}
        self._segments.close()

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
        passages = [shard.at.state(once) for shard in self._crew.shards]
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
        for shard, its in zip(self._crew.shards, passages, strict=True):
            shard.at = shard.at.restored(its, once)
            shard.leg = shard.at.leg
        self._context.journal.notes.append(
            f"{name.partition('-')[0]} went on after stage {done} of {len(self._parts)}, as kept in "
            f"{self._context.options.workdir}"
        )
        self._context.progress("stages", round(THOUSANDTHS * self._shares[done - 1]), THOUSANDTHS)
        return int(done)

    def _at(self, stage: int) -> list[Shard]:
        """Return the shards of the samples that a stage needs; stage: its index."""
        return [shard for shard in self._crew.shards if shard.start < self._needed[stage]]

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

    def _solve(self, layers: Sequence[Layer], passages: Sequence[Any]) -> None:
        """Solve layers; passages: what stands for those that have their inputs."""
        groups = self._sharing(layers)
        found = self._crew.moments([self._rows(group[0]) for group in groups], passages, self._fewer)
        for group in groups:
            with self._context.journal.timed("calibrate"):
                moments = next(found)
            self._solver.solve(group, moments, self._others.get(group[0].name, []))
            if self._engine.is_here:
                self._collect()

    def _collect(self) -> None:
        """Take what was solved: elsewhere the float model goes on meanwhile."""
        spent = self._solver.collect()
        seconds = self._context.journal.seconds
        seconds["solve"] = seconds.get("solve", 0.0) + spent

    def _sharing(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Group layers that read the same rows."""
        sharing: dict[tuple[object, ...], list[Layer]] = {}
        for layer in layers:
            source = self._plan.probes.get(layer.name, layer.input)
            others = tuple((x.input, x.kind.rows_key()) for x in self._later.get(layer.name, ()))
            key = (source, self._plan.is_integer(layer), layer.kind.rows_key(), others)
            sharing.setdefault(key, []).append(layer)
        return list(sharing.values())

    def _rows(self, layer: Layer) -> Rows:
        """Return which rows a layer reads."""
        quantized = self._plan.is_integer(layer) and not self._context.options.independent
        grid = self._ranges.grids[layer.input] if quantized else None
        nested = layer.name in self._plan.probes
        return Rows(layer, self._plan.probes.get(layer.name, layer.input), grid, nested)

    def _share(self, layers: Sequence[Layer], passages: Sequence[Any]) -> None:
        """Give each weight that layers in the subgraphs of one node share the moments of all their inputs.

        passages: as in `_solve`
        """
        first: dict[object, Layer] = {}
        for layer in layers:
            root = first.setdefault(self._solver.weight_key(layer), layer)
            source, own = (self._plan.probes[one.name] for one in (layer, root))
            if source != own:
                self._later.setdefault(root.name, []).append(layer)
                found = self._crew.moments([self._rows(layer)], passages, self._fewer)
                self._others.setdefault(root.name, []).extend(found)

    # from one cut to the next

    def _catch_up(self, stage: Stage) -> None:
        """Bring the quantized model of all samples that a stage needs to the cut before it."""
        behind: dict[tuple[int, int], list[Shard]] = {}
        for shard in self._at(stage.index):
            if shard.leg is not None:
                behind.setdefault((shard.leg.index, len(shard.leg.nodes)), []).append(shard)
        with self._context.journal.timed("calibrate"):
            for shards in behind.values():
                assert shards[0].leg is not None
                self._crew.advance_quantized(shards, self._sofar(shards[0].leg))
                self._segments.close()

    def _sofar(self, leg: Stage) -> Any:
        """Return what stands for what is quantized on a leg."""
        solutions, plan, nodes = self._solver.solutions, self._plan, set(leg.nodes)
        here = {x.name for x in plan.layers if x.name in solutions and (x.nested or x.node in nodes)}
        # a product may have the codes of a table elsewhere
        tables = {plan.tied[name] for name in here if name in plan.tied} & set(solutions)
        chosen = {name: one for name, one in solutions.items() if name in here or name in tables}
        return self._engine.place(passage.Sofar(chosen, dict(self._ranges.grids)), leg.index)

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
        made = self._advance_float(self._at(stage.index), stage.index, rows)
        self._ranges.settle(name for name in stage.makes if name in self._plan.activations.values)
        if not self._context.options.independent:
            self._collect()
        if rows:
            with self._context.journal.timed("calibrate"):
                passages = self._crew.rows(made, self._sofar(stage), stacked)
                self._segments.close()
            self._share(inner, passages)
            self._solve(inner, passages)
            self._solve(fed_back, passages)
            if not self._context.options.independent:
                self._collect()

    def _advance_float(self, shards: Sequence[Shard], start: int, rows: Sequence[str] = ()) -> list[Any]:
        """Run the float model of some samples to the next stage that needs them; start: the index of the first stage.

        Returns what stands for the values `rows` that are made on the way, for each shard."""
        ends: dict[int, list[Shard]] = {}
        for shard in shards:
            following = range(start + 1, len(self._parts))
            end = next((k for k in following if shard.start < self._needed[k]), len(self._parts))
            ends.setdefault(end, []).append(shard)
        made: list[Any] = []
        for end, some in ends.items():
            with self._context.journal.timed("calibrate"):
                seen, its = self._crew.advance_float(some, stages.join(self._parts[start:end]), rows)
                self._segments.close()
            self._ranges.take(seen)
            made += its
        return made


class _Once:
    """Make something of each tensor once: tensors that are one stay one."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make, self._made = make, dict[int, tuple[Any, Any]]()

    def __call__(self, given: Any) -> Any:
        if id(given) not in self._made:
            # what is given must live on, or another one may get its id
            self._made[id(given)] = given, self._make(given)
        return self._made[id(given)][1]


def _silent(_count: int) -> None:
    """Tell nothing."""
