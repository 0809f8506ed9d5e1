"""The stage walk: run the model segment by segment on all samples, solve each stage's layers, go on with what they
became.

At the cut before a stage the live tensors are kept twice for every sample: as the float model gives them (x) and as the
model quantized so far gives them (x^). From those come the moments of each layer's input; the layers are solved; then
the stage's segment runs once more each way, float and as it will be shipped, up to the next cut. So the whole model
runs once, memory is bounded by one segment and the cut tensors, and later layers make up for what earlier ones lost.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

from comq_onnx import graph as graphs
from comq_onnx import stages
from comq_onnx.activations import ActivationGrid, ActivationPlan, Range
from comq_onnx.errors import ModelError, OptionError, SamplesError
from comq_onnx.grid import Array, Grid
from comq_onnx.ops import Gather, Gemm, MatMul, MatMulLeft
from comq_onnx.padding import Mask, has_positions, take_kept
from comq_onnx.patches import patch_gram, patch_sum
from comq_onnx.prepare import Layer, Prepared, calibrated
from comq_onnx.qdq import Quantization, emit, may_add_bias
from comq_onnx.runtime import Session
from comq_onnx.samples import Samples
from comq_onnx.solve import COMQ, Method, Solution, Statistics, error_db, round_rows, solve_together
from comq_onnx.targets import Target

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
# called with the layers that are solved as one, their weights and moments, and whether a bias can take their mean
Observer = Callable[[Sequence["Layer"], Sequence[Array], Statistics, bool], None]
Tensors = dict[str, list[Any]]  # one array per batch

# More input positions than these do not change a solution (measured on EfficientNet-Lite0 at 4 bits: 27k positions give
# -26.4 dB, 6.6k -26.0): beyond them positions are drawn at random, the same share of each batch. Depthwise layers,
# whose rows are many numbers for few moments, get the fewest.
LEAST_POSITIONS, MOST_POSITIONS = 16_384, 65_536
POSITIONS_PER_INPUT = 24
MOST_NUMBERS = 1 << 27
CHUNK_BYTES = 1 << 28
# how many times as many positions a Gram of patches takes in the same time, at least (see patches.py)
PATCHES_GAIN = 2
# float32 sums of squares of larger numbers overflow, those of smaller ones lose their digits
LARGEST, SMALLEST = 1e15, 1e-15
# moments are summed over so many samples at a time (fewer where those take more than CHUNK_BYTES), however many run at
# once: the batch size changes the order of no sum
GROUP = 16
# the positions are dealt to two halves for cross-validation in so many stretches
STRETCHES = 16


@dataclass(frozen=True)
class Settings:
    """How to calibrate and solve."""

    method: Method = COMQ
    independent: bool = False
    batch_size: int = 16
    device: str = "cpu"
    seed: int = 0
    memory: int = 8 << 30
    mask: str | None = None  # the input whose zeros mark positions that the model ignores
    fewer_positions: int = 1  # by what to divide the number of positions that moments are made from


@dataclass
class Calibration:
    """What the walk found: a solution per layer, a grid and the range seen per quantized activation, and where the
    time went."""

    solutions: dict[str, Solution] = field(default_factory=dict)
    grids: dict[str, ActivationGrid] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    layer_seconds: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"calibrate": 0.0, "solve": 0.0})


def walk(
    prepared: Prepared,
    plan: ActivationPlan,
    grids: Mapping[str, Grid],
    samples: Samples,
    target: Target,
    settings: Settings,
    progress: Progress,
    probes: Mapping[str, str] | None = None,
    observer: Observer | None = None,
) -> Calibration:
    """Calibrate and solve every layer of `prepared` on `samples`; `grids` holds each layer's weight grid by name.

    probes: the values that stack the inputs of layers in the body of a Loop or Scan, by layer (see `specialize`).
    observer: sees the moments that each solution is made from.

    Raises SamplesError or ModelError where a tensor turns out not finite.
    """
    result = Calibration()
    for layer in prepared.layers:
        if isinstance(layer.kind, Gather):
            with timed(result.seconds, "solve"), timed(result.layer_seconds, layer.name):
                result.solutions[layer.name] = round_rows(_finite_weight(prepared, layer), grids[layer.name])
    with graphs.private_directory() as work:
        _Walk(prepared, plan, grids, samples, target, settings, progress, result, work, probes or {}, observer).run()
    return result


@contextlib.contextmanager
def timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    """Add the seconds that the block takes to `seconds[key]`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start


@dataclass
class _Walk:
    prepared: Prepared
    plan: ActivationPlan
    grids: Mapping[str, Grid]
    samples: Samples
    target: Target
    settings: Settings
    progress: Progress
    result: Calibration
    work: Path
    probes: Mapping[str, str]
    observer: Observer | None

    def run(self) -> None:
        graph = self.prepared.model.graph
        cuts = stages.cut(self.prepared.model, list(calibrated(self.prepared.layers)))
        self.keeper = _Keeper(self.settings.memory, self.work)
        self.solved: list[Layer] = [x for x in self.prepared.layers if x.name in self.result.solutions]
        self.ranges = self.result.ranges
        self.ranges.update({name: Range() for name in self.plan.values})
        inputs = {str(v.name) for v in graph.inputs}
        batches = list(self.samples.batches(self.settings.batch_size))
        self.counts = self.samples.batch_counts(self.settings.batch_size)
        mask = self.settings.mask
        self.kept: list[Mask | None] = [None if mask is None else batch[mask] == 1 for batch in batches]
        float_cut: Tensors = {name: [b[name] for b in batches] for name in inputs}
        quantized_cut: Tensors = {name: list(arrays) for name, arrays in float_cut.items()}
        self._observe(float_cut)
        for stage in cuts:
            self._solve_all(stage.layers, float_cut, quantized_cut)
            self._advance(stage, float_cut, quantized_cut)
            self._tell()
            self.progress("stages", stage.index + 1, len(cuts))

    def _tell(self) -> None:
        done = sum(not isinstance(layer.kind, Gather) for layer in self.solved)
        self.progress("layers", done, len(list(calibrated(self.prepared.layers))))

    # moments and solutions

    def _solve_all(self, layers: Sequence[Layer], x: Tensors, x_hat: Tensors) -> None:
        for readers, statistics in self._moments(layers, x, x_hat):
            for together in self._alike(readers):
                start = time.perf_counter()
                self._solve(together, statistics)
                spent = time.perf_counter() - start
                self.result.seconds["solve"] += spent
                self.result.layer_seconds |= {layer.name: spent / len(together) for layer in together}
                self._tell()
            for layer in readers:
                if layer.name not in self.result.solutions:
                    self._take_shared(layer)

    def _alike(self, readers: Sequence[Layer]) -> list[list[Layer]]:
        """Layers of one input that are solved as one: their outputs are more channels of the same problem. Each weight
        once: who shares it takes its codes afterwards."""
        alike: dict[object, list[Layer]] = {}
        begun = set()
        for layer in readers:
            grid = self.grids[layer.name]
            if self._take_shared(layer) or (layer.weight, layer.kind, grid) in begun:
                continue
            begun.add((layer.weight, layer.kind, grid))
            alike.setdefault((grid, self._has_bias(layer), layer.name if grid.per_tensor else None), []).append(layer)
        return list(alike.values())

    def _moments(self, layers: Sequence[Layer], x: Tensors, x_hat: Tensors) -> Iterator[tuple[list[Layer], Statistics]]:
        """The layers that read the same rows, with the moments of those."""
        sharing: dict[tuple[str, bool, object], list[Layer]] = {}
        for layer in layers:
            quantized = layer.name in self.plan.integer_layers
            source = self.probes.get(layer.name, layer.input)
            sharing.setdefault((source, quantized, layer.kind.rows_key()), []).append(layer)
        for (source, *_), group in sharing.items():
            with timed(self.result.seconds, "calibrate"):
                statistics = self._statistics(group[0], x[source], x_hat[source])
            yield group, statistics

    def _statistics(self, layer: Layer, x: Sequence[Any], x_hat: Sequence[Any]) -> Statistics:
        moments = Moments()
        settings = self.settings
        quantize = layer.name in self.plan.integer_layers and not settings.independent
        grid = self.result.grids[self.plan.root(layer.input)] if quantize else None
        shared = all(a is b for a, b in zip(x, x_hat, strict=True))
        counts: Sequence[int] = [] if layer.name in self.probes else self.counts
        masks: Sequence[Mask | None] = [] if layer.name in self.probes else self.kept
        if _has_samples_first(layer) and (regroup := _regrouping(x, counts)) is not None:
            x, x_hat, counts = regroup(x), regroup(x_hat), regroup(x).counts
            masks = regroup(masks) if masks[0] is not None else []
        kept = [self._kept_positions(layer, x[i], masks[i] if i < len(masks) else None) for i in range(len(x))]
        positions = [layer.kind.positions(x[i]) if k is None else len(k) for i, k in enumerate(kept)]
        if not any(positions):
            raise SamplesError(f"no sample reaches layer {layer.name!r}: its input is empty for all of them")
        inputs = layer.kind.inputs
        affordable = MOST_NUMBERS // (inputs * layer.kind.groups)
        limit = max(min(affordable, MOST_POSITIONS), LEAST_POSITIONS, POSITIONS_PER_INPUT * inputs)
        limit //= settings.fewer_positions
        share = min(1.0, limit / max(sum(positions), 1))
        if share > 1 / PATCHES_GAIN and layer.kind.patches(x[0]) is not None:
            share = 1.0
        rng = np.random.default_rng(settings.seed)
        taken = [max(1, round(share * n)) if n and share < 1 else n for n in positions]
        seen, total = 0, sum(taken)
        for i in range(len(x)):
            if taken[i] == 0:
                continue
            batch = x[i]
            batch_hat = batch if shared else x_hat[i]
            pick = None
            if share < 1:
                pick = np.sort(rng.choice(positions[i], taken[i], replace=False))
            mask = kept[i]
            if mask is not None:
                pick = mask if pick is None else mask[pick]
            largest = _largest(batch)
            if not largest <= LARGEST:
                raise ModelError(self._out_of_range(layer.input, batch, i, counts))
            if largest < SMALLEST:
                batch, batch_hat = batch * 0, batch_hat * 0
            same = settings.independent or (batch_hat is batch and grid is None)
            hat = batch if same else (grid.fake_quantize(batch_hat) if grid is not None else batch_hat)
            padded = layer.kind.patches(batch) if pick is None else None
            if padded is not None:
                padded_hat = None if same else layer.kind.patches(hat)
                halves = _halves(seen, taken[i], total)[:: taken[i] // len(padded)]
                for half in np.unique(halves):
                    mine = slice(None) if (halves == half).all() else halves == half
                    moments.add_patches(
                        padded[mine], None if padded_hat is None else padded_hat[mine], layer.kind.kernel, half
                    )
            else:
                for part, half in _parts(_halves(seen, taken[i], total), inputs, layer.kind.groups):
                    chosen = part if pick is None else pick[part]
                    whole = pick is None and len(part) == positions[i]
                    rows = layer.kind.rows(batch, None if whole else chosen)
                    moments.add(rows, None if same else layer.kind.rows(hat, None if whole else chosen), half)
            seen += taken[i]
        return moments.statistics()

    def _kept_positions(self, layer: Layer, batch: Any, kept: Mask | None) -> npt.NDArray[np.intp] | None:
        """The positions of a batch of a layer's input that are not padding; None where all count."""
        if kept is None or layer.kind.groups != 1 or kept.all():
            return None
        total = layer.kind.positions(batch)
        along = isinstance(layer.kind, MatMul) and has_positions(batch, kept, least_rank=3)
        if along or (isinstance(layer.kind, Gemm) and total == kept.size):
            return np.flatnonzero(np.repeat(kept.ravel(), total // kept.size))
        return None

    def _out_of_range(self, name: str, array: Array, i: int, counts: Sequence[int]) -> str:
        largest = _largest(array)
        what = f"numbers up to {largest:.1e}, too large to calibrate on," if np.isfinite(largest) else "NaN or Inf"
        readers = ", ".join(repr(x.name) for x in self.prepared.layers if x.input == name)
        return (
            f"the float model gives {what} at {name!r}{f' (read by {readers})' if readers else ''}"
            f"{self._where(array, i, counts)}; check the samples and their preprocessing, or --exclude its readers"
        )

    def _where(self, array: Array, i: int, counts: Sequence[int]) -> str:
        """The first sample out of range of the i-th array, which holds `counts[i]`, by its number in the source; all of
        them where the tensor does not have a row for each."""
        if i >= len(counts):  # an iteration of a loop
            return ""
        first, count = sum(counts[:i]), counts[i]
        number = self.samples.number
        if count == 1 or (array.ndim and len(array) == count):
            rows = [array] if count == 1 else list(array)
            bad = next((k for k, row in enumerate(rows) if not _largest(row) <= LARGEST), 0)
            return f" for sample {number(first + bad)} of {self.samples.source}"
        return f" for one of samples {number(first)} to {number(first + count - 1)} of {self.samples.source}"

    def _has_bias(self, layer: Layer) -> bool:
        """Whether a bias can carry what a layer's output loses of its mean, its own or one that emission adds."""
        return layer.has_bias or may_add_bias(layer, self.plan)

    def _take_shared(self, layer: Layer) -> bool:
        """Whether the layer's weight is one that is solved already: it is stored once, so it has the same codes."""
        mine = (layer.weight, layer.kind, self.grids[layer.name])
        first = next((x for x in self.solved if (x.weight, x.kind, self.grids[x.name]) == mine), None)
        if first is None:
            return False
        theirs = self.result.solutions[first.name]
        self.result.solutions[layer.name] = replace(theirs, shift=None)
        self.solved.append(layer)
        return True

    def _solve(self, together: Sequence[Layer], statistics: Statistics) -> None:
        weights = [_finite_weight(self.prepared, layer) for layer in together]
        grid, has_bias = self.grids[together[0].name], self._has_bias(together[0])
        found = solve_together(weights, statistics, grid, self.settings.method, has_bias)
        if self.observer is not None:
            self.observer(together, weights, statistics, has_bias)
        for layer, solution in zip(together, found, strict=True):
            self.result.solutions[layer.name] = solution
            self.solved.append(layer)
            logger.info(
                "%s: error %.2f dB (rounding %.2f dB)",
                layer.name, error_db(solution.error), error_db(solution.rtn_error),
            )  # fmt: skip

    # the walk itself

    def _advance(self, stage: stages.Stage, float_cut: Tensors, quantized_cut: Tensors) -> None:
        """Run the stage's segment both ways, leave the tensors of the next cut in the two dictionaries."""
        planned = [name for name in stage.makes if name in self.plan.values]
        live = [name for name in stage.makes if name in stage.live_after]
        inner = [x for x in self.prepared.layers if self.probes.get(x.name) in stage.makes]
        stacked = list(dict.fromkeys(self.probes[layer.name] for layer in inner))
        wanted = list(dict.fromkeys([*live, *planned, *stacked]))
        if wanted:
            with timed(self.result.seconds, "calibrate"):
                segment = self._segment(stage, float_cut, wanted)
                made = self._run(segment, stage, float_cut, wanted, [*live, *stacked], observe=True)
                self._settle(planned)
            if inner:
                hat = made if self.settings.independent else self._shipped(stage, quantized_cut, stacked, made)
                self._solve_all(inner, *({name: _iterations(t[name]) for name in stacked} for t in (made, hat)))
            hat = made if self.settings.independent or not live else self._shipped(stage, quantized_cut, live, made)
            for name in live:
                float_cut[name], quantized_cut[name] = made[name], hat[name]
        for name in [n for n in float_cut if n not in stage.live_after]:
            del float_cut[name], quantized_cut[name]

    def _shipped(self, stage: stages.Stage, given: Tensors, wanted: list[str], made: Tensors) -> Tensors:
        """The tensors that the segment makes as it will be shipped, from those of the model quantized so far."""
        with timed(self.result.seconds, "calibrate"):
            segment = self._segment(stage, given, wanted)
            emit(segment, self.quantization())
            hat = self._run(segment, stage, given, wanted, wanted, observe=False)
        # a tensor that no quantization reaches is kept once
        return {name: [a if _same(a, b) else b for a, b in zip(made[name], hat[name], strict=True)] for name in wanted}

    def quantization(self) -> Quantization:
        """Everything solved so far, as emission takes it."""
        return Quantization(
            self.solved, self.result.solutions, self.plan, self.result.grids, self.target, self.prepared.opset
        )

    def _segment(self, stage: stages.Stage, given: Tensors, wanted: Iterable[str]) -> ir.Model:
        """The stage's nodes as a model of their own, from the cut tensors it reads to the tensors wanted."""
        extracted = ir.convenience.extract(self.prepared.model.graph, list(stage.reads), list(wanted))
        for value in extracted.inputs:
            example = given[str(value.name)][0]
            if isinstance(example, np.ndarray):
                # only the type: ranks and sizes may differ from batch to batch
                value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(example.dtype)), None
        for value in extracted.outputs:
            value.shape = None
        model = ir.Model(extracted, ir_version=self.prepared.model.ir_version)
        model.graph.opset_imports.update(self.prepared.model.graph.opset_imports)
        return model

    def _run(
        self, segment: ir.Model, stage: stages.Stage, given: Tensors, wanted: list[str], live: list[str], observe: bool
    ) -> Tensors:
        source = graphs.to_bytes_or_file(segment, self.work, f"stage{stage.index}")
        session = Session(
            source, self.settings.device, what=f"stage {stage.index} of the model", exact=True,
            literal=self.target.elsewhere,
        )  # fmt: skip
        made: Tensors = {name: [] for name in live}
        for i in range(len(self.counts)):
            outputs = session.run({name: given[name][i] for name in stage.reads}, wanted)
            if observe:
                self._observe({name: [outputs[name]] for name in wanted}, i)
            for name in live:
                made[name].append(self.keeper.keep(outputs[name]))
            self.progress("samples", sum(self.counts[: i + 1]), sum(self.counts))
        return made

    def _observe(self, tensors: Tensors, first: int = 0) -> None:
        """Widen the ranges of tensors, one array per batch from batch `first` on."""
        for name, arrays in tensors.items():
            if name in self.ranges:
                for i, array in enumerate(arrays, first):
                    self.ranges[name].observe(take_kept(array, self.kept[i], least_rank=3))
                    low, high = self.ranges[name].low, self.ranges[name].high
                    if low != np.inf and not max(-low, high) <= LARGEST:
                        raise ModelError(self._out_of_range(name, array, i, self.counts))
        self._settle([name for name in tensors if name in self.ranges and name in self.samples.arrays])

    def _settle(self, names: Iterable[str]) -> None:
        """Turn ranges that are complete into grids."""
        for name in names:
            if self.plan.values[name].like is None:
                self.result.grids[name] = self.ranges[name].grid(self.plan.dtype, self.plan.values[name].bounds)
            else:
                self.result.grids[name] = self.result.grids[self.plan.root(name)]


def _largest(array: Array) -> float:
    """The largest magnitude; NaN where there is a NaN."""
    return float(np.maximum(array.max(), -array.min())) if array.size else 0.0


def _finite_weight(prepared: Prepared, layer: Layer) -> Array:
    # a copy: numba compiles again for arrays that are read-only or lie otherwise
    weight = np.array(prepared.weight(layer), np.float32, order="C")
    largest = _largest(weight)
    if not np.isfinite(largest):
        count = int(weight.size - np.isfinite(weight).sum())
        raise ModelError(
            f"layer {layer.name!r}: {count} of {weight.size} weights are NaN or Inf; repair the model or --exclude it"
        )
    if largest > LARGEST:
        raise ModelError(
            f"layer {layer.name!r}: weights up to {largest:.1e} are too large to quantize; repair the model or "
            "--exclude it"
        )
    return weight


def _iterations(stacked: list[Any]) -> list[Any]:
    """Inputs of a layer in a loop's body, stacked over the iterations: one array per iteration."""
    return [one for array in stacked for one in array]


class _Groups(Sequence[Any]):
    """Arrays with equally many rows for each of some samples, seen as arrays with the rows of `size` samples each."""

    def __init__(self, arrays: Sequence[Any], counts: Sequence[int], size: int) -> None:
        self._arrays, self._starts, self._size = arrays, np.cumsum([0, *counts]), size
        self._rows = len(arrays[0]) // counts[0]
        total = sum(counts)
        self.counts = [min(size, total - first) for first in range(0, total, size)]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: Any) -> Any:
        first = i * self._size
        last = first + self.counts[i]
        parts = [
            array[(max(first, start) - start) * self._rows : (min(last, end) - start) * self._rows]
            for array, start, end in zip(self._arrays, self._starts[:-1], self._starts[1:], strict=True)
            if start < last and first < end
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _has_samples_first(layer: Layer) -> bool:
    """Whether inputs of the layer one behind the other along the first axis give its rows one behind the other."""
    if isinstance(layer.kind, Gemm):
        return not layer.kind.trans_a
    return not isinstance(layer.kind, (MatMul, MatMulLeft)) or (
        isinstance(layer.kind, MatMul) and layer.kind.groups == 1
    )


def _regrouping(arrays: Sequence[Any], counts: Sequence[int]) -> Callable[[Sequence[Any]], _Groups] | None:
    """What puts arrays, one per batch of `counts` samples, into groups of samples; None where they do not have equal
    rows for each sample."""
    if (
        not arrays
        or len(arrays) != len(counts)
        or not all(isinstance(a, np.ndarray) and a.ndim > 1 and len(a) for a in arrays)
    ):
        return None
    rows = len(arrays[0]) // counts[0]
    if rows < 1 or any(
        len(a) != rows * n or a.shape[1:] != arrays[0].shape[1:] for a, n in zip(arrays, counts, strict=True)
    ):
        return None
    size = max(1, min(GROUP, CHUNK_BYTES * counts[0] // max(arrays[0].nbytes, 1)))
    return lambda given: _Groups(given, counts, size)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, np.ndarray) and a.shape == b.shape and np.array_equal(a, b)


def _halves(first: int, count: int, total: int) -> npt.NDArray[np.intp]:
    """Which half each of `count` positions from `first` on belongs to, of `total`: stretches of them in turn, so that
    neighbours are together and either half sees samples from everywhere."""
    return np.arange(first, first + count) * STRETCHES // total % 2


def _parts(halves: npt.NDArray[np.intp], inputs: int, groups: int) -> Iterator[tuple[npt.NDArray[np.intp], int]]:
    """Consecutive positions of one half, in parts whose rows take at most CHUNK_BYTES, with the half."""
    step = max(1, CHUNK_BYTES // (4 * inputs * groups))
    edges = [0, *(np.flatnonzero(np.diff(halves)) + 1), len(halves)]
    for begin, end in itertools.pairwise(edges):
        for start in range(begin, end, step):
            yield np.arange(start, min(start + step, end)), int(halves[begin])


class Moments:
    """Running sums of a layer's input rows: products in float32, sums in float64; two halves of the samples apart."""

    def __init__(self) -> None:
        self._halves = (_Sums(), _Sums())

    @property
    def count(self) -> int:
        """How many positions there were."""
        return self._halves[0].count + self._halves[1].count

    def add(self, rows: Array, rows_hat: Array | None, half: int = 0) -> None:
        """Add rows [groups, positions, in] of the float model and of the quantized one (None: the same)."""
        hat = rows if rows_hat is None else rows_hat
        error = None if rows_hat is None else rows - rows_hat
        self._halves[half].add(hat, error, _gram, _sum, rows.shape[1])

    def add_patches(self, x: Array, x_hat: Array | None, kernel: tuple[int, ...], half: int = 0) -> None:
        """Add the rows that are the patches of padded inputs [n, channels, height, width], without building them."""
        hat = x if x_hat is None else x_hat
        error = None if x_hat is None else x - x_hat
        count = len(x) * (x.shape[2] - kernel[0] + 1) * (x.shape[3] - kernel[1] + 1)
        self._halves[half].add(
            hat, error, lambda a, b: patch_gram(a, b, kernel)[None], lambda a: patch_sum(a, kernel)[None], count
        )

    def statistics(self) -> Statistics:
        """The moments of all rows, with those of the first half beside them where both halves have rows."""
        first, second = self._halves
        if first.count == 0 or second.count == 0:
            return (first if second.count == 0 else second).means()
        return replace((first + second).means(), half=replace(first.means(), residue=None))


class _Sums:
    """Sums over rows: x^ x^T, x^, x^ e^T, e e^T, e; the last three only where x^ is not x."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[npt.NDArray[np.float64] | None] = [None] * 5

    def add(
        self,
        hat: Array,
        error: Array | None,
        gram: Callable[[Array, Array], npt.NDArray[Any]],
        total: Callable[[Array], npt.NDArray[Any]],
        count: int,
    ) -> None:
        """Add `count` rows, given in a form of which `gram` makes products and `total` sums."""
        self._put(0, gram(hat, hat))
        self._put(1, total(hat))
        if error is not None:
            self._put(2, gram(hat, error))
            self._put(3, gram(error, error))
            self._put(4, total(error))
        self.count += count

    def _put(self, k: int, part: npt.NDArray[Any]) -> None:
        total = self._sums[k]
        if total is None:
            self._sums[k] = np.asarray(part, np.float64)
        else:
            total += part

    def __add__(self, other: _Sums) -> _Sums:
        both = _Sums()
        both.count = self.count + other.count
        both._sums = [
            a if b is None else b if a is None else a + b for a, b in zip(self._sums, other._sums, strict=True)
        ]
        return both

    def means(self) -> Statistics:
        gram, mean, cross, residue, mean_error = (None if s is None else s / self.count for s in self._sums)
        assert gram is not None
        assert mean is not None
        return Statistics(gram, mean, self.count, cross, residue, mean_error)


def _gram(a: Array, b: Array) -> npt.NDArray[np.float32]:
    return np.asarray(np.matmul(a.swapaxes(1, 2), b), np.float32)


def _sum(rows: Array) -> npt.NDArray[np.float64]:
    return np.asarray(rows.sum(axis=1, dtype=np.float64))


class _Keeper:
    """Holds cut tensors in memory up to a budget, beyond it in files that vanish with them."""

    def __init__(self, budget: int, directory: Path) -> None:
        self._budget, self._directory, self._held, self._files = budget, directory, 0, 0

    def keep(self, array: Any) -> Any:
        """The same array, in memory or mapped from a file."""
        if not isinstance(array, np.ndarray) or array.dtype == object:
            return array
        if self._held + array.nbytes > self._budget and array.nbytes > 1 << 16:
            self._files += 1
            path = self._directory / f"cut{self._files}.npy"
            # written before it is mapped: on a full disk writing fails with an error, touching a mapping kills
            try:
                np.save(path, array)
                mapped = np.load(path, mmap_mode="r+")
            except OSError as error:
                raise OptionError(
                    f"{self._directory.parent}: tensors kept between stages cannot be written there ({error}); free "
                    "some space, set TMPDIR to a larger disk, or give more --memory"
                ) from error
            weakref.finalize(mapped, path.unlink, missing_ok=True)
            return mapped
        self._held += array.nbytes
        weakref.finalize(array, self._release, array.nbytes)
        return array

    def _release(self, size: int) -> None:
        self._held -= size


# If
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specialized:
    """The model as the walk sees it, with the layers it reaches.

    probes: for each layer in the body of a Loop or Scan the value of the main graph that stacks its inputs over the
    iterations. skipped: the layers that the walk does not reach, and why.
    """

    prepared: Prepared
    probes: dict[str, str]
    skipped: dict[str, str]


def specialize(prepared: Prepared, samples: Samples, settings: Settings) -> Specialized:
    """Make the layers in subgraphs reachable: each If is replaced by the branch that all samples take, and what layers
    in the body of a Loop or Scan read becomes an output of it."""
    model = prepared.model
    if any(node.op_type in ("If", "Loop", "Scan") for node in model.graph):
        model = model.clone()
        while _inline_one_level(model, samples, settings):
            pass
    probes = _probe_bodies(model, {layer.name: layer for layer in prepared.layers})
    reached = {str(node.name) for node in model.graph} | set(probes)
    inside: dict[str, str] = {}
    for node in model.graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                inside.update({str(n.name): node.op_type for n in attribute.value.all_nodes()})
    skipped = {
        layer.name: f"{layer.op}: {_inside(inside.get(layer.name))}"
        for layer in prepared.layers
        if layer.name not in reached
    }
    layers = [layer for layer in prepared.layers if layer.name in reached]
    return Specialized(Prepared(model, layers, prepared.skipped, prepared.notes), probes, skipped)


def _probe_bodies(model: ir.Model, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Give each Loop and Scan of the main graph one more output per value that layers of its body read."""
    probes: dict[str, str] = {}
    for node in model.graph:
        if node.op_type not in ("Loop", "Scan") or node.domain not in ("", "ai.onnx"):
            continue
        body = node.attributes["body"].value
        made = {str(v.name): v for inner in body for v in inner.outputs} | {str(v.name): v for v in body.inputs}
        stacked: dict[str, str] = {}
        for inner in list(body):
            layer = layers.get(str(inner.name))
            if layer is None or layer.input not in made or isinstance(layer.kind, Gather):
                continue
            if layer.input not in stacked:
                stacked[layer.input] = _add_scan_output(node, body, made[layer.input])
            probes[layer.name] = stacked[layer.input]
    return probes


def _add_scan_output(node: ir.Node, body: ir.Graph, value: ir.Value) -> str:
    copy = ir.node("Identity", [value], name=f"{value.name}.probe")
    copy.outputs[0].name, copy.outputs[0].type = f"{value.name}.probe", value.type or ir.TensorType(ir.DataType.FLOAT)
    body.append(copy)
    body.outputs.append(copy.outputs[0])
    for name in ("scan_output_axes", "scan_output_directions"):
        if name in node.attributes:
            node.attributes[name] = ir.AttrInt64s(name, [*node.attributes[name].value, 0])
    node.resize_outputs(len(node.outputs) + 1)
    node.outputs[-1].name = f"{value.name}.stacked"
    return f"{value.name}.stacked"


def _inside(op: str | None) -> str:
    if op is None:
        return "in a branch that no sample takes"
    if op == "If":
        return "in an If of which the samples take both branches"
    return f"too deep in the body of a {op} to be calibrated"


def _inline_one_level(model: ir.Model, samples: Samples, settings: Settings) -> bool:
    """Inline the branches of main-graph Ifs whose condition is the same for all samples; whether there was one."""
    ifs = [node for node in model.graph if node.op_type == "If" and node.domain == ""]
    if not ifs:
        return False
    conditions = list(dict.fromkeys(str(node.inputs[0].name) for node in ifs if node.inputs[0] is not None))
    seen: dict[str, set[bool]] = {name: set() for name in conditions}
    known = {n: v for n in conditions if (v := graphs.constant(model.graph.initializers.get(n))) is not None}
    for name, value in known.items():
        seen[name].add(bool(value.all()))
    asked = [name for name in conditions if name not in known]
    if asked:
        probe = model.clone()
        by_name = {str(v.name): v for v in graphs.walk_values(probe)}
        probe.graph.outputs[:] = [by_name[name] for name in asked]
        passes.RemoveUnusedNodesPass()(probe)
        session = Session(ir.to_proto(probe).SerializeToString(), settings.device, what="the conditions of the model")
        names = {i.name for i in session.inputs}
        for feeds in samples.batches(settings.batch_size):
            for name, value in session.run({k: v for k, v in feeds.items() if k in names}, asked).items():
                seen[name].add(bool(np.all(value)))
    inlined = False
    for node in ifs:
        assert node.inputs[0] is not None
        taken = seen[str(node.inputs[0].name)]
        if len(taken) == 1:
            _inline(model.graph, node, node.attributes["then_branch" if taken.pop() else "else_branch"].value)
            inlined = True
    return inlined


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    outputs = list(branch.outputs)
    branch.outputs.clear()
    for inner in list(branch):
        branch.remove(inner)
        graph.insert_before(node, inner)
    for old, new in zip(node.outputs, outputs, strict=True):
        name, old.name = old.name, f"{old.name}.if"
        copy = ir.node("Identity", [new], name=f"{name}.taken")
        copy.outputs[0].name, copy.outputs[0].type = name, old.type
        graph.insert_before(node, copy)
        old.replace_all_uses_with(copy.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
