"""Have the shards of the samples taken through the stages by whatever runs tasks, and sum up what they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from comq_onnx.calibrate import passage
from comq_onnx.calibrate.layer_moments import share_out
from comq_onnx.calibrate.leading import Group
from comq_onnx.calibrate.observed_ranges import Seen
from comq_onnx.calibrate.passage import Rows, Way
from comq_onnx.calibrate.stages import Stage
from comq_onnx.engine import Embedded, fold
from comq_onnx.solve.moments import MomentSums


@dataclass(eq=False)
class Shard:
    """Follow a shard of the samples.

    start: how many samples are in the shards before
    at: what stands for its passage
    leg: the stages that it has passed in float alone
    """

    start: int
    at: Any
    leg: Stage | None = None


class Crew:
    """Submit the tasks of the shards; what these give is summed in an order that depends on the shards alone.

    shards: where the samples are
    """

    def __init__(self, engine: Embedded, way: Way, groups: Sequence[Group], inputs: Sequence[str]) -> None:
        """Bring all samples to the cut before the first stage; inputs: of the graph."""
        self._engine, self._way = engine, engine.place(way, 0)
        self.shards = [
            Shard(group.start, engine.submit(passage.begin, engine.place(group, k), inputs))
            for k, group in enumerate(groups)
        ]

    def see_inputs(self) -> Seen:
        """Return the ranges of the inputs of the graph."""
        submit = self._engine.submit
        return self._seen((submit(passage.see_inputs, self._way, one.at) for one in self.shards), len(self.shards))

    def advance_float(self, shards: Sequence[Shard], leg: Stage, rows: Sequence[str]) -> tuple[Seen, list[Any]]:
        """Run a leg in float, to the next cut.

        Returns the ranges of the values that are made on it, and what stands for the values `rows` of each shard.
        """
        made: list[Any] = []

        def seen() -> Iterator[Any]:
            for shard in shards:
                advanced = self._engine.submit(passage.advance_float, self._way, shard.at, leg, rows)
                shard.at, shard.leg = self._engine.submit(passage.passage_of, advanced), leg
                if rows:
                    made.append(advanced)
                yield self._engine.submit(passage.seen_in, advanced)

        return self._seen(seen(), len(shards)), made

    def advance_quantized(self, shards: Sequence[Shard], solved: Any) -> None:
        """Run the leg of shards as it will be written; solved: what stands for what is quantized on it."""
        for shard in shards:
            shard.at, shard.leg = self._engine.submit(passage.advance_quantized, self._way, shard.at, solved), None

    def rows(self, made: Sequence[Any], solved: Any, stacked: Sequence[str]) -> list[Any]:
        """Return what stands for the rows that a leg makes in both models: passages, of which only these are known.

        made: the rows in float, as `advance_float` gives them
        solved: what stands for what is quantized on the leg
        stacked: the names of values that hold one array for each iteration
        """
        return [self._engine.submit(passage.rows_of, self._way, one, solved, stacked) for one in made]

    def float_rows(self, whole: Stage, names: Sequence[str]) -> list[Any]:
        """Return what stands for values of the float model, as passages; whole: all stages."""
        submit = self._engine.submit
        return [submit(passage.float_rows, self._way, shard.at, whole, names) for shard in self.shards]

    def moments(self, rows: Sequence[Rows], passages: Sequence[Any], fewer: int) -> Iterator[Any]:
        """Yield what stands for the moments of each of some inputs.

        passages: what stands for the passages of the samples
        fewer: the number of positions that are taken is divided by this

        Raises SamplesError where no sample reaches a layer.
        """
        submit, way = self._engine.submit, self._way
        counts = self._engine.gather([submit(passage.count_rows, way, at, one) for one in rows for at in passages])
        for k, one in enumerate(rows):
            taken = share_out(one.layer, counts[k * len(passages) :][: len(passages)], fewer)
            pairs = zip(passages, taken, strict=True)
            sums = (submit(passage.sum_rows, way, at, one, share) for at, share in pairs)
            yield submit(passage.moments_of, fold(self._engine, MomentSums.plus, sums, len(passages)))

    def _seen(self, parts: Iterator[Any], count: int) -> Seen:
        """Return what all shards show together."""
        (seen,) = self._engine.gather([fold(self._engine, Seen.add, parts, count)])
        assert isinstance(seen, Seen)
        return seen
