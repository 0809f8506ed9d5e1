"""Solve the layers of a stage from the moments of their inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from comq_onnx.calibrate.finite import finite_weight
from comq_onnx.calibrate.solved_form import as_solved, as_stored, solved_grid, solved_weight
from comq_onnx.model.layers import Layer
from comq_onnx.plan.plan import Plan
from comq_onnx.solve.grid import Array
from comq_onnx.solve.layer import Method, Solution, error_db, judge, round_plainly, round_rows, solve_together
from comq_onnx.solve.moments import Moments, pooled

logger = logging.getLogger(__name__)

# called with the layers that are solved as one, their weights and moments, and whether a bias can take their shift;
# returns what is to be kept of each layer, by its name
Observer = Callable[[Sequence[Layer], Sequence[Array], Moments, bool], Mapping[str, Any]]
# what a solver has found so far
State = tuple[dict[str, Solution], dict[str, float], dict[str, Any], dict[object, str]]


class LayerSolver:
    """Solve layers one after the other, each weight once.

    solutions: the solution of each layer, by the name of the layer
    seconds: the seconds that each layer took, by the name of the layer
    observed: what the observer keeps of each layer, by the name of the layer
    """

    def __init__(self, plan: Plan, method: Method, observer: Observer | None = None) -> None:
        """Begin with nothing solved.

        method: the solver
        observer: sees the moments that each solution is made from
        """
        self._plan, self._method, self._observer = plan, method, observer
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

    def round_tables(self) -> float:
        """Round the embeddings, which need no calibration. Returns the seconds that it took."""
        start = time.perf_counter()
        for layer in self._plan.walked.layers:
            if layer.kind.is_lookup:
                begun = time.perf_counter()
                solution = round_rows(finite_weight(self._plan.walked, layer), self._plan.grids[layer.name])
                self._keep(layer, solution)
                self.seconds[layer.name] = time.perf_counter() - begun
        return time.perf_counter() - start

    def round_unreached(self) -> None:
        """Give layers that the samples do not reach the solution of one with the same weight, or round them."""
        for layer in self._plan.layers:
            if layer.name not in self.solutions and not self._reuse_solution(layer, None):
                self._keep(layer, round_rows(finite_weight(self._plan.written, layer), self._plan.grids[layer.name]))

    def round_all(self) -> None:
        """Round every layer, without any samples: the embeddings as ever, the others plainly."""
        self.round_tables()
        for layer in self._plan.layers:
            if layer.name not in self.solutions and not self._reuse_solution(layer, None):
                start = time.perf_counter()
                weight = finite_weight(self._plan.written, layer)
                self._keep(layer, round_plainly(weight, self._plan.grids[layer.name]))
                self.seconds[layer.name] = time.perf_counter() - start

    def solve(
        self, readers: Sequence[Layer], moments: Moments, others: Sequence[Moments], tell: Callable[[], None]
    ) -> float:
        """Solve layers that read the same rows. Returns the seconds that it took.

        moments: those of the rows
        others: those of other rows that layers with the same weights read
        tell: called after each solution
        """
        total = 0.0
        for together in self._alike(readers, moments):
            start = time.perf_counter()
            self._solve_together(together, pooled([moments, *others]) if others else moments)
            if others:
                for layer in together:
                    self._reuse_solution(layer, moments)
            spent = time.perf_counter() - start
            total += spent
            self.seconds |= {layer.name: spent / len(together) for layer in together}
            tell()
        for layer in readers:
            if layer.name not in self.solutions:
                self._reuse_solution(layer, moments)
        return total

    def _alike(self, readers: Sequence[Layer], moments: Moments) -> list[list[Layer]]:
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

    def _reuse_solution(self, layer: Layer, moments: Moments | None) -> bool:
        """Take the codes of a layer with the same weight, which is stored once; False if there is none.

        moments: of the rows of this layer, for its own shift and errors; None where they are not known: then those of
            the other layer stand for them, which mostly does the same in another branch
        """
        first = self._solved.get(self.weight_key(layer))
        if first is None:
            return False
        solution = self.solutions[first]
        if moments is None and not self._plan.has_bias(layer):
            solution = replace(solution, shift=None)
        if moments is not None:
            weight, codes = solved_weight(self._plan.walked, layer), as_solved(layer.kind, solution.weight)
            judged = judge(weight, moments, codes, self._method, self._plan.has_bias(layer))
            solution = as_stored(layer.kind, judged, solution.weight.grid)
        self.solutions[layer.name] = solution
        return True

    def _solve_together(self, together: Sequence[Layer], moments: Moments) -> None:
        """Solve layers as one, and keep the solution of each."""
        weights = [solved_weight(self._plan.walked, layer) for layer in together]
        grid, has_bias = self._plan.grids[together[0].name], self._plan.has_bias(together[0])
        found = solve_together(weights, moments, solved_grid(together[0].kind, grid), self._method, has_bias)
        if self._observer is not None:
            self.observed.update(self._observer(together, weights, moments, has_bias))
        for layer, solution in zip(together, found, strict=True):
            self._keep(layer, as_stored(layer.kind, solution, grid))
            logger.info(
                "%s: error %.2f dB (rounding %.2f dB)",
                layer.name, error_db(solution.error), error_db(solution.rtn_error),
            )  # fmt: skip

    def _keep(self, layer: Layer, solution: Solution) -> None:
        """Keep the solution of a layer, also for others with the same weight."""
        self.solutions[layer.name] = solution
        self._solved.setdefault(self.weight_key(layer), layer.name)

    def weight_key(self, layer: Layer) -> tuple[object, ...]:
        """Return what layers with the same codes have in common."""
        return layer.weight, layer.kind, self._plan.grids[layer.name]
