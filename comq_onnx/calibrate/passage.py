"""Take a shard of the samples from cut to cut through the stages, in the float model and in the one quantized so far.

All functions are tasks: they change nothing that they are given, and the same shard gives the same bytes anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from comq_onnx import arrays
from comq_onnx.calibrate.cut_tensors import Host
from comq_onnx.calibrate.finite import out_of_range
from comq_onnx.calibrate.layer_moments import LayerInput, Positions, Taken, count_positions, in_groups, sum_moments
from comq_onnx.calibrate.leading import Group, Tensors
from comq_onnx.calibrate.observed_ranges import Seen
from comq_onnx.calibrate.segment import Segments
from comq_onnx.calibrate.stages import Stage
from comq_onnx.errors import ModelError
from comq_onnx.model.layers import Layer
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.solve.layer import Solution
from comq_onnx.solve.moments import Moments, MomentSums

# where samples are: the tensors at both cuts, and the stages between
State = tuple[Tensors, Tensors, Stage | None]


@dataclass(frozen=True)
class Way:
    """Hold what all passages have in common.

    plan: the plan
    store: keeps the tensors
    segments: runs stages
    independent: whether layers are solved on the inputs of the float model, so that nothing runs quantized
    seed: the seed for drawing positions
    axes: the axis of the channels of each value whose range is gathered by what it does to layers
    tell: called with the number of samples of each batch that was run
    """

    plan: Plan
    store: Host
    segments: Segments
    independent: bool
    seed: int
    axes: Mapping[str, int]
    tell: Callable[[int], None]

    def run(
        self, group: Group, leg: Stage, given: Tensors, wanted: Sequence[str], solved: Solved | None
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the outputs of a leg batch by batch, and let go of what it was given for each."""
        outputs = self.segments.run(self.plan, leg, given, len(group.counts), wanted, solved, self.store)
        for i, (count, one) in enumerate(zip(group.counts, outputs, strict=True)):
            yield one
            for batches in given.values():
                batches[i] = None
            self.tell(count)


@dataclass(frozen=True)
class Sofar:
    """Hold what is quantized on a leg.

    solutions: of layers, by name
    grids: of activations, by the name of the value
    """

    solutions: Mapping[str, Solution]
    grids: Mapping[str, ActivationGrid]


@dataclass(frozen=True, eq=False)
class Passage:
    """Hold a shard of the samples on its way.

    group: the samples, without their feeds
    x: the tensors at the cut that the float model is at
    x_hat: those of the model quantized so far at the cut that it is at, the same or an earlier one
    leg: the stages between those two cuts; None where they are the same
    """

    group: Group
    x: Tensors
    x_hat: Tensors
    leg: Stage | None = None

    def state(self, each: Callable[[Any], Any]) -> State:
        """Return where the samples are; each: makes what is kept of a tensor."""
        return _each(self.x, each), _each(self.x_hat, each), self.leg

    def restored(self, state: State, each: Callable[[Any], Any]) -> Passage:
        """Return the samples where they were; each: makes a tensor of what was kept."""
        x, x_hat, leg = state
        return Passage(self.group, _each(x, each), _each(x_hat, each), leg)

    def __sizeof__(self) -> int:
        """Return about how many bytes the tensors take."""
        held = {id(a): a for cut in (self.x, self.x_hat) for batches in cut.values() for a in batches}
        return sum(int(getattr(array, "nbytes", 0)) for array in held.values())


@dataclass(frozen=True, eq=False)
class Advanced:
    """Hold what running a leg in float gives.

    passage: the samples at the next cut
    rows: values that were asked for
    seen: the ranges of values
    """

    passage: Passage
    rows: Tensors
    seen: Seen

    def __sizeof__(self) -> int:
        """Return about how many bytes the tensors take."""
        return self.passage.__sizeof__()


def begin(group: Group, names: Sequence[str]) -> Passage:
    """Bring samples to the cut before the first stage; names: the inputs of the graph."""
    return Passage(replace(group, batches=()), group.inputs(names), group.inputs(names))


def see_inputs(way: Way, passage: Passage) -> Seen:
    """Gather the ranges of the inputs of the graph."""
    names = [name for name in passage.x if name in way.plan.activations.values]
    seen = Seen(names, way.axes, passage.group.start)
    for name in names:
        for i, array in enumerate(passage.x[name]):
            seen.observe(name, array, passage.group.masks[i], partial(_refuse, way, passage.group, i))
    return seen


def advance_float(way: Way, passage: Passage, leg: Stage, rows: Sequence[str]) -> Advanced:
    """Run a leg in float, to the next cut; rows: the names of values that are made on it and asked for."""
    live = [name for name in leg.makes if name in leg.live_after]
    kept = list(dict.fromkeys([*live, *rows]))
    planned = [name for name in leg.makes if name in way.plan.activations.values]
    wanted = list(dict.fromkeys([*live, *planned, *rows]))
    made: Tensors = {name: [] for name in kept}
    seen = Seen(planned, way.axes, passage.group.start)
    given = {name: list(passage.x[name]) for name in leg.reads}
    for i, outputs in enumerate(way.run(passage.group, leg, given, wanted, None)) if wanted else ():
        for name in planned:
            seen.observe(name, outputs[name], passage.group.masks[i], partial(_refuse, way, passage.group, i))
        for name in kept:
            made[name].append(way.store.keep(outputs[name]))
    x = {**_read_after(passage.x, leg), **{name: made[name] for name in live}}
    return Advanced(replace(passage, x=x, leg=leg), {name: made[name] for name in rows}, seen)


def passage_of(advanced: Advanced) -> Passage:
    """Return the samples at the next cut."""
    return advanced.passage


def seen_in(advanced: Advanced) -> Seen:
    """Return the ranges of values."""
    return advanced.seen


def rows_of(way: Way, advanced: Advanced, solved: Sofar, stacked: Sequence[str]) -> Passage:
    """Return the rows that a leg makes in both models; the one quantized so far stays at its cut.

    stacked: the names of values that hold one array for each time that a subgraph runs; they are divided into these
    """
    passage, made = advanced.passage, advanced.rows
    assert passage.leg is not None
    hat = made
    if not way.independent:
        given = {name: list(passage.x_hat[name]) for name in passage.leg.reads}
        hat = _quantized(way, passage, given, list(made), made, solved)

    def divided(tensors: Tensors) -> Tensors:
        return {n: [one for a in of for one in a] if n in stacked else of for n, of in tensors.items()}

    x = divided(made)
    return Passage(passage.group, x, x if hat is made else divided(hat))


def advance_quantized(way: Way, passage: Passage, solved: Sofar) -> Passage:
    """Run the leg as it will be written, so that both models are at the same cut."""
    leg = passage.leg
    if leg is None:
        return passage
    live = [name for name in leg.makes if name in leg.live_after]
    given = {name: list(passage.x_hat[name]) for name in leg.reads}
    if way.independent or not live:
        hat = {name: passage.x[name] for name in live}
    else:
        hat = _quantized(way, passage, given, live, passage.x, solved)
    return replace(passage, x_hat={**_read_after(passage.x_hat, leg), **hat}, leg=None)


def float_rows(way: Way, passage: Passage, whole: Stage, names: Sequence[str]) -> Passage:
    """Return values `names` of the float model, from samples at the cut before the first stage; whole: all stages."""
    wanted = [name for name in names if name in whole.makes]
    x: Tensors = {name: passage.x[name] for name in names if name not in whole.makes}
    x.update((name, []) for name in wanted)
    given = {name: list(passage.x[name]) for name in whole.reads}
    for outputs in way.run(passage.group, whole, given, wanted, None) if wanted else ():
        for name in wanted:
            x[name].append(way.store.keep(outputs[name]))
    return Passage(passage.group, x, x)


# Moments
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Tell which rows of a passage a layer reads.

    source: the name of the value
    grid: the grid that it is quantized with before the layer reads it; None where it is not quantized
    nested: whether its arrays are iterations of a loop
    """

    layer: Layer
    source: str
    grid: ActivationGrid | None
    nested: bool


def count_rows(way: Way, passage: Passage, rows: Rows) -> Positions:
    """Count the positions of a layer's input."""
    return count_positions(_input(way, passage, rows), way.store)


def sum_rows(way: Way, passage: Passage, rows: Rows, taken: Taken) -> MomentSums:
    """Sum the moments of a layer's input over the samples."""
    given, group = _input(way, passage, rows), passage.group
    seed = [way.seed, group.start] if group.start else way.seed

    def refuse(array: Any, i: int) -> ModelError:
        name, layers = rows.layer.input, way.plan.walked.layers
        return out_of_range(array, name, i, given.counts, group.samples, layers)

    return sum_moments(given, way.store, taken, seed, refuse)


def moments_of(sums: MomentSums) -> Moments:
    """Return the moments of sums."""
    return sums.moments()


def _input(way: Way, passage: Passage, rows: Rows) -> LayerInput:
    """Return the input of a layer."""
    x, x_hat = passage.x[rows.source], passage.x_hat[rows.source]
    shared = all(a is b for a, b in zip(x, x_hat, strict=True))
    counts, masks = ((), ()) if rows.nested else (passage.group.counts, passage.group.masks)
    return in_groups(LayerInput(rows.layer, x, x if shared else x_hat, rows.grid, counts, masks), way.store)


# Helpers
# ----------------------------------------------------------------------------------------------------------------------


def _quantized(
    way: Way, passage: Passage, given: Tensors, wanted: Sequence[str], made: Tensors, sofar: Sofar
) -> Tensors:
    """Run the leg as it will be written.

    made: the tensors of the float model. One that quantization does not change is kept once: the result holds that
    of `made`.
    """
    assert passage.leg is not None
    solved = Solved(way.plan, sofar.solutions, sofar.grids)
    hat: Tensors = {name: [] for name in wanted}
    for i, outputs in enumerate(way.run(passage.group, passage.leg, given, wanted, solved)):
        for name in wanted:
            one = way.store.fetch(made[name][i])
            hat[name].append(made[name][i] if _same(one, outputs[name]) else way.store.keep(outputs[name]))
    return hat


def _read_after(cut: Tensors, leg: Stage) -> Tensors:
    """Return the tensors that a stage after a leg reads."""
    return {name: batches for name, batches in cut.items() if name in leg.live_after}


def _refuse(way: Way, group: Group, place: int, name: str, array: Any) -> ModelError:
    """Return the error for a batch of the value `name` whose numbers are not finite or too large."""
    return out_of_range(array, name, place, group.counts, group.samples, way.plan.walked.layers)


def _each(cut: Tensors, each: Callable[[Any], Any]) -> Tensors:
    return {name: [each(array) for array in batches] for name, batches in cut.items()}


def _same(a: Any, b: Any) -> bool:
    """Tell whether two arrays or tensors hold the same numbers."""
    if arrays.is_tensor(a):
        return arrays.is_tensor(b) and a.shape == b.shape and bool((a == b).all())
    return isinstance(a, np.ndarray) and a.shape == b.shape and np.array_equal(a, b)
