"""Solve the layers of a stage from the moments of their inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comq_onnx.calibrate.finite import finite_weight
from comq_onnx.calibrate.solved_form import as_solved, as_stored, solved_grid, solved_weight
from comq_onnx.engine import Embedded
from comq_onnx.model.layers import Layer
from comq_onnx.plan.plan import Plan
from comq_onnx.solve.grid import Array
from comq_onnx.solve.layer import (
    Candidates,
    Method,
    Posed,
    Solution,
    error_db,
    in_parts,
    join_parts,
    judge,
    pose,
    round_plainly,
    round_rows,
    solve_part,
    solve_together,
)
from comq_onnx.solve.moments import Moments, pooled
from comq_onnx.solve.parallel import channel_slices

logger = logging.getLogger(__name__)

# called with the layers that are solved as one, their weights and moments, and whether a bias can take their shift;
# returns what is to be kept of each layer, by its name
Observer = Callable[[Sequence[Layer], Sequence[Array], Moments, bool], Mapping[str, Any]]
# what a solver has found so far
State = tuple[dict[str, Solution], dict[str, float], dict[str, Any], dict[object, str]]


@dataclass(frozen=True)
class Found:
    """Hold what one task found.

    solutions: by the name of the layer
    observed: what the observer keeps of each layer, by its name
    seconds: the seconds that it took
    """

    solutions: Mapping[str, Solution]
    observed: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def solve_alike(
    plan: Plan, method: Method, observer: Observer | None, together: Sequence[Layer], moments: Moments
) -> Found:  # fmt: skip
    """Solve layers as one."""
    start = time.perf_counter()
    weights = [solved_weight(plan.walked, layer) for layer in together]
    grid, has_bias = plan.grids[together[0].name], plan.has_bias(together[0])
    found = solve_together(weights, moments, solved_grid(together[0].kind, grid), method, has_bias)
    observed = {} if observer is None else observer(together, weights, moments, has_bias)
    return _stored(plan, together, found, observed, time.perf_counter() - start)


def pose_alike(plan: Plan, method: Method, together: Sequence[Layer], moments: Moments) -> tuple[Posed, float]:
    """Prepare layers to be solved as one, in parts. Returns the seconds that it took, too."""
    start = time.perf_counter()
    weights = [solved_weight(plan.walked, layer) for layer in together]
    posed = pose(weights, moments, plan.grids[together[0].name], method, plan.has_bias(together[0]))
    return posed, time.perf_counter() - start


def solve_channels(posed: tuple[Posed, float], method: Method, channels: slice) -> tuple[Candidates, float]:
    """Solve some channels of layers. Returns the seconds that it took, too, and what came before with the first."""
    start = time.perf_counter()
    found = solve_part(posed[0], method, channels)
    return found, time.perf_counter() - start + (0.0 if channels.start else posed[1])


def join_channels(plan: Plan, together: Sequence[Layer], *parts: tuple[Candidates, float]) -> Found:
    """Join layers that were solved as one, in parts."""
    start = time.perf_counter()
    channels = [layer.kind.outputs for layer in together]
    found = join_parts([one for one, _ in parts], channels, plan.has_bias(together[0]))
    return _stored(plan, together, found, {}, sum(s for _, s in parts) + time.perf_counter() - start)


def _stored(
    plan: Plan, together: Sequence[Layer], found: Sequence[Solution], observed: Mapping[str, Any], seconds: float
) -> Found:
    """Return what was found for layers that are solved as one."""
    grid = plan.grids[together[0].name]
    solutions = [as_stored(layer.kind, one, grid) for layer, one in zip(together, found, strict=True)]
    for layer, solution in zip(together, solutions, strict=True):
        logger.info(
            "%s: error %.2f dB (rounding %.2f dB)", layer.name, error_db(solution.error), error_db(solution.rtn_error)
        )
    names = [layer.name for layer in together]
    return Found(dict(zip(names, solutions, strict=True)), observed, seconds)


def judge_again(plan: Plan, method: Method, layer: Layer, moments: Moments, found: Found, name: str) -> Found:
    """Give a layer the codes of the layer `name`, with the shift and the errors that they have on its own moments."""
    start = time.perf_counter()
    codes = found.solutions[name].weight
    weight, given = solved_weight(plan.walked, layer), as_solved(layer.kind, codes)
    solution = judge(weight, moments, given, method, plan.has_bias(layer))
    return Found({layer.name: as_stored(layer.kind, solution, codes.grid)}, {}, time.perf_counter() - start)


def round_table(plan: Plan, layer: Layer) -> Found:
    """Round an embedding."""
    start = time.perf_counter()
    solution = round_rows(finite_weight(plan.walked, layer), plan.grids[layer.name])
    return Found({layer.name: solution}, {}, time.perf_counter() - start)


def pool(*parts: Moments) -> Moments:
    """Return the moments of all positions of several inputs."""
    return pooled(parts)


class LayerSolver:
    """Solve layers one after the other, each weight once.

    solutions: the solution of each layer, by the name of the layer
    seconds: the seconds that each layer took, by the name of the layer
    observed: what the observer keeps of each layer, by the name of the layer
    """

    def __init__(
        self, plan: Plan, method: Method, observer: Observer | None = None, engine: Embedded | None = None,
        placed: Any = None, tell: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Begin with nothing solved.

        method: the solver
        observer: sees the moments that each solution is made from, where the tasks run
        engine: runs the tasks; placed: what stands for the plan there
        tell: called after each solution
        """
        self._plan, self._method = plan, method
        self._engine, self._tell = engine or Embedded(), tell
        self._observer = None if observer is None else self._engine.place(observer, 0)
        self._placed = plan if placed is None else placed
        # what stands for the solution of each layer that is not here yet, and all such in their order
        self._coming: dict[str, Any] = {}
        self._tasks: list[tuple[list[str], Any]] = []
        self.solutions: dict[str, Solution] = {}
        self.seconds: dict[str, float] = {}
        self.observed: dict[str, Any] = {}
        self._solved: dict[object, str] = {}  # the first layer of each weight, kind and grid

    def state(self) -> State:
        """Return all that was found so far."""
        return self.solutions, self.seconds, self.observed, self._solved

    def restore(self, state: State) -> None:
        """Go on from what was found before."""
        self.solutions, self.seconds, self.observed, self._solved = state

    @property
    def count(self) -> int:
        """Count the solved layers, without embeddings."""
        return sum(not x.kind.is_lookup for x in self._plan.walked.layers if x.name in self.solutions)

    def round_tables(self) -> None:
        """Have the embeddings rounded, which need no calibration; `collect` takes what was found."""
        for layer in self._plan.walked.layers:
            if layer.kind.is_lookup:
                self._expect([layer.name], self._engine.submit(round_table, self._placed, layer))
                self._solved.setdefault(self.weight_key(layer), layer.name)

    def round_unreached(self) -> None:
        """Give layers that the samples do not reach the solution of one with the same weight, or round them."""
        for layer in self._plan.layers:
            if layer.name not in self.solutions and not self._reuse_solution(layer, None):
                self._keep(layer, round_rows(finite_weight(self._plan.written, layer), self._plan.grids[layer.name]))

    def round_all(self) -> None:
        """Round every layer, without any samples: the embeddings as ever, the others plainly."""
        self.round_tables()
        self.collect()
        for layer in self._plan.layers:
            if layer.name not in self.solutions and not self._reuse_solution(layer, None):
                start = time.perf_counter()
                weight = finite_weight(self._plan.written, layer)
                self._keep(layer, round_plainly(weight, self._plan.grids[layer.name]))
                self.seconds[layer.name] = time.perf_counter() - start

    def solve(self, readers: Sequence[Layer], moments: Any, others: Sequence[Any]) -> None:
        """Have layers solved that read the same rows; `collect` takes what was found.

        moments: what stands for those of the rows
        others: the same of other rows that layers with the same weights read
        """
        for together in self._alike(readers, moments):
            all_rows = self._engine.submit(pool, moments, *others) if others else moments
            self._expect([layer.name for layer in together], self._found(together, all_rows))
            for layer in together:
                self._solved.setdefault(self.weight_key(layer), layer.name)
            if others:
                for layer in together:
                    self._reuse_solution(layer, moments)
        for layer in readers:
            if not self._is_known(layer):
                self._reuse_solution(layer, moments)

    def _found(self, together: Sequence[Layer], moments: Any) -> Any:
        """Return what stands for what is found for layers that are solved as one.

        Elsewhere their parts are tasks, unless moments are observed; here they are shared among threads.
        """
        submit, kind, grid = self._engine.submit, together[0].kind, self._plan.grids[together[0].name]
        slices = channel_slices(sum(layer.kind.outputs for layer in together))
        divided = kind.solved_as is kind and in_parts(self._method, kind.groups, kind.inputs, grid)
        if self._observer is not None or self._engine.is_here or not divided or len(slices) == 1:
            return submit(solve_alike, self._placed, self._method, self._observer, together, moments)
        posed = submit(pose_alike, self._placed, self._method, together, moments)
        parts = [submit(solve_channels, posed, self._method, one) for one in slices]
        return submit(join_channels, self._placed, together, *parts)

    def collect(self) -> float:
        """Wait for all that was asked for and keep it. Returns the seconds that it took."""
        total, tasks = 0.0, self._tasks
        self._tasks, self._coming = [], {}
        for (names, _), found in zip(tasks, self._engine.gather([one for _, one in tasks]), strict=True):
            self.solutions.update(found.solutions)
            self.observed.update(found.observed)
            for name in names:
                self.seconds[name] = self.seconds.get(name, 0.0) + found.seconds / len(names)
            total += found.seconds
            self._tell()
        return total

    def _expect(self, names: Sequence[str], found: Any) -> None:
        """Note what stands for the solutions of layers."""
        self._tasks.append((list(names), found))
        self._coming.update(dict.fromkeys(names, found))

    def _is_known(self, layer: Layer) -> bool:
        """Tell whether a layer is solved, or being solved."""
        return layer.name in self.solutions or layer.name in self._coming

    def _alike(self, readers: Sequence[Layer], moments: Any) -> list[list[Layer]]:
        """Group layers of one input that are solved as one: their outputs are more channels of the same problem.

        Each weight is in one group only: other layers that share it take its codes afterwards.
        """
        alike: dict[object, list[Layer]] = {}
        begun = set()
        for layer in readers:
            grid = self._plan.grids[layer.name]
            if self._reuse_solution(layer, moments) or self.weight_key(layer) in begun:
                continue
            begun.add(self.weight_key(layer))
            key = (grid, self._plan.has_bias(layer), layer.name if grid.per_tensor else None)
            alike.setdefault(key, []).append(layer)
        return list(alike.values())

    def _reuse_solution(self, layer: Layer, moments: Any) -> bool:
        """Take the codes of a layer with the same weight, which is stored once; False if there is none.

        moments: what stands for those of the rows of this layer, for its own shift and errors; None where they are not
            known: then those of the other layer stand for them, which mostly does the same in another branch
        """
        first = self._solved.get(self.weight_key(layer))
        if first is None:
            return False
        if moments is None:
            solution = self.solutions[first]
            self.solutions[layer.name] = solution if self._plan.has_bias(layer) else replace(solution, shift=None)
            return True
        found = self._coming.get(first) or Found({first: self.solutions[first]})
        given = self._placed, self._method, layer, moments, found, first
        self._expect([layer.name], self._engine.submit(judge_again, *given))
        return True

    def _keep(self, layer: Layer, solution: Solution) -> None:
        """Keep the solution of a layer, also for others with the same weight."""
        self.solutions[layer.name] = solution
        self._solved.setdefault(self.weight_key(layer), layer.name)

    def weight_key(self, layer: Layer) -> tuple[object, ...]:
        """Return what layers with the same codes have in common."""
        return layer.weight, layer.kind, self._plan.grids[layer.name]
