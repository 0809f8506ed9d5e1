"""Take samples from cut to cut through the stages, in the float model and in the model quantized so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx import arrays
from comq_onnx.calibrate.cut_tensors import Host
from comq_onnx.calibrate.leading import Group, Tensors
from comq_onnx.calibrate.segment import run_segment
from comq_onnx.calibrate.stages import Stage
from comq_onnx.plan.plan import Plan
from comq_onnx.plan.solved import Solved

# where samples are: the tensors at both cuts, and the stages between
State = tuple[Tensors, Tensors, Stage | None]


@dataclass(frozen=True)
class Way:
    """Hold what all passages have in common.

    plan: the plan
    store: keeps the tensors
    device: where segments run
    work: a directory for models that are too large for one protobuf message
    independent: whether layers are solved on the inputs of the float model, so that nothing runs quantized
    observe: called with the name of a value that is made in float, an array of it and the index of its batch
    tell: called with the number of samples of each batch that was run
    """

    plan: Plan
    store: Host
    device: str
    work: Path
    independent: bool
    observe: Callable[[str, Any, int], None]
    tell: Callable[[int], None]


@dataclass(eq=False)
class Passage:
    """Take some of the samples through the stages.

    way: what it has in common with others
    group: the samples
    x: the tensors at the cut that the float model is at
    x_hat: those of the model quantized so far at the cut that it is at, the same or an earlier one
    leg: the stages between those two cuts; None where they are the same
    """

    way: Way
    group: Group
    x: Tensors
    x_hat: Tensors
    leg: Stage | None = field(default=None, init=False)

    def state(self, each: Callable[[Any], Any]) -> State:
        """Return where the samples are; each: makes what is kept of a tensor."""
        return _each(self.x, each), _each(self.x_hat, each), self.leg

    def restore(self, state: State, each: Callable[[Any], Any]) -> None:
        """Go on from where the samples were; each: makes a tensor of what was kept."""
        x, x_hat, self.leg = state
        self.x, self.x_hat = _each(x, each), _each(x_hat, each)

    def advance_float(self, leg: Stage, rows: Sequence[str]) -> Tensors:
        """Run a leg in float, to the next cut. Returns the values `rows` that are made on it."""
        live = [name for name in leg.makes if name in leg.live_after]
        kept = list(dict.fromkeys([*live, *rows]))
        planned = [name for name in leg.makes if name in self.way.plan.activations.values]
        wanted = list(dict.fromkeys([*live, *planned, *rows]))
        made: Tensors = {name: [] for name in kept}
        # what no later stage reads is let go batch by batch; the quantized model still has its own
        given = {name: list(self.x[name]) for name in leg.reads}
        self._let_go(self.x, leg)
        for i, outputs in enumerate(self._run(leg, given, wanted, None)) if wanted else ():
            for name in wanted:
                self.way.observe(name, outputs[name], self.group.first + i)
            for name in kept:
                made[name].append(self.way.store.keep(outputs[name]))
        self.x.update((name, made[name]) for name in live)
        self.leg = leg
        return {name: made[name] for name in rows}

    def rows_hat(self, rows: Sequence[str], made: Tensors, solved: Solved) -> Tensors:
        """Return values that are made on the leg, in the model quantized so far, which stays at its cut.

        made: the same values of the float model
        """
        assert self.leg is not None
        if self.way.independent or not rows:
            return made
        return self._quantized(self.leg, {name: list(self.x_hat[name]) for name in self.leg.reads}, rows, made, solved)

    def advance_quantized(self, solved: Solved) -> None:
        """Run the leg as it will be written, so that both models are at the same cut."""
        leg, self.leg = self.leg, None
        if leg is None:
            return
        live = [name for name in leg.makes if name in leg.live_after]
        given = {name: list(self.x_hat[name]) for name in leg.reads}
        self._let_go(self.x_hat, leg)
        if self.way.independent or not live:
            hat = {name: self.x[name] for name in live}
        else:
            hat = self._quantized(leg, given, live, self.x, solved)
        self.x_hat.update(hat)

    @staticmethod
    def _let_go(cut: Tensors, leg: Stage) -> None:
        """Forget the tensors that no stage after a leg reads."""
        for name in [n for n in cut if n not in leg.live_after]:
            del cut[name]

    def _quantized(self, leg: Stage, given: Tensors, wanted: Sequence[str], made: Tensors, solved: Solved) -> Tensors:
        """Run a leg as it will be written.

        made: the tensors of the float model. One that quantization does not change is kept once: the result holds that
        of `made`.
        """
        store = self.way.store
        hat: Tensors = {name: [] for name in wanted}
        for i, outputs in enumerate(self._run(leg, given, wanted, solved)):
            for name in wanted:
                one = store.fetch(made[name][i])
                hat[name].append(made[name][i] if _same(one, outputs[name]) else store.keep(outputs[name]))
        return hat

    def _run(
        self, leg: Stage, given: Tensors, wanted: Sequence[str], solved: Solved | None
    ) -> Iterator[Mapping[str, Any]]:
        """Yield the outputs of a leg batch by batch, and let go of what it was given for each."""
        way = self.way
        outputs = run_segment(
            way.plan, leg, given, len(self.group.counts), wanted, solved, way.store, way.device, way.work
        )  # fmt: skip
        for i, (count, one) in enumerate(zip(self.group.counts, outputs, strict=True)):
            yield one
            for batches in given.values():
                batches[i] = None
            way.tell(count)


def _each(cut: Tensors, each: Callable[[Any], Any]) -> Tensors:
    return {name: [each(array) for array in batches] for name, batches in cut.items()}


def _same(a: Any, b: Any) -> bool:
    """Tell whether two arrays or tensors hold the same numbers."""
    if arrays.is_tensor(a):
        return arrays.is_tensor(b) and a.shape == b.shape and bool((a == b).all())
    return isinstance(a, np.ndarray) and a.shape == b.shape and np.array_equal(a, b)
