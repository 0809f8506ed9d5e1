"""The stage walk: run the model segment by segment on all samples, solve each stage's layers, go on with what they
became.

At the cut before a stage the live tensors are kept twice for every sample: as the float model gives them (x) and as the
model quantized so far gives them (x^). From those come the moments of each layer's input; the layers are solved; then
the stage's segment runs once more each way, float and as it will be shipped, up to the next cut. So the whole model
runs once, memory is bounded by one segment and the cut tensors, and later layers make up for what earlier ones lost.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from comq_onnx import arrays
from comq_onnx.calibrate import cut_tensors as cuts
from comq_onnx.calibrate import stages
from comq_onnx.calibrate.observed_ranges import Range
from comq_onnx.errors import ModelError, SamplesError
from comq_onnx.model.files import private_directory, to_bytes_or_file
from comq_onnx.model.layers import Layer, Prepared, calibrated
from comq_onnx.model.operators import Gather, Gemm, MatMul, MatMulLeft
from comq_onnx.plan import ranges
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.activations import ActivationPlan
from comq_onnx.plan.forms import may_add_bias
from comq_onnx.runtime import device as devices
from comq_onnx.runtime.session import Session
from comq_onnx.samples.padding import Mask, has_positions, take_kept
from comq_onnx.samples.samples import Samples
from comq_onnx.solve import moments
from comq_onnx.solve.grid import Array, Grid
from comq_onnx.solve.layer import COMQ, Method, Solution, error_db, round_rows, solve_together
from comq_onnx.solve.moments import Moments, MomentSums, chunks, halves
from comq_onnx.targets.target import Target
from comq_onnx.write.emit import emit
from comq_onnx.write.weights import Quantization

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
# called with the layers that are solved as one, their weights and moments, and whether a bias can take their mean
Observer = Callable[[Sequence["Layer"], Sequence[Array], Moments, bool], None]
Tensors = dict[str, list[Any]]  # one array per batch
# More input positions than these do not change a solution (measured on EfficientNet-Lite0 at 4 bits: 27k positions give
# -26.4 dB, 6.6k -26.0): beyond them positions are drawn at random, the same share of each batch. Depthwise layers,
# whose rows are many numbers for few moments, get the fewest.
LEAST_POSITIONS, MOST_POSITIONS = 16_384, 65_536
POSITIONS_PER_INPUT = 24
MOST_NUMBERS = 1 << 27
# how many times as many positions a Gram of patches takes in the same time, at least (see patches.py)
PATCHES_GAIN = 2
# float32 sums of squares of larger numbers overflow, those of smaller ones lose their digits
LARGEST, SMALLEST = 1e15, 1e-15
# moments are summed over so many samples at a time (fewer where those take more than moments.CHUNK_BYTES), however many
# run at once: the batch size changes the order of no sum
GROUP = 16


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
    tensors: bool | None = None  # torch tensors in place of numpy arrays; None: on a GPU


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
    tensors = devices.is_gpu(settings.device) if settings.tensors is None else settings.tensors
    with private_directory() as work, cuts.opened(settings.device, tensors, settings.memory, work) as kept:
        _Walk(
            prepared, plan, grids, samples, target, settings, progress, result, work, probes or {}, observer, kept
        ).run()  # fmt: skip
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
    cuts: cuts.Host

    def run(self) -> None:
        graph = self.prepared.model.graph
        parts = stages.cut(self.prepared.model, list(calibrated(self.prepared.layers)))
        self.solved: list[Layer] = [x for x in self.prepared.layers if x.name in self.result.solutions]
        self.ranges = self.result.ranges
        self.ranges.update({name: Range() for name in self.plan.values})
        inputs = {str(v.name) for v in graph.inputs}
        batches = list(self.samples.batches(self.settings.batch_size))
        self.readers = ranges.readers(self.prepared, self.plan)
        self.positions = {name: ranges.Positions(readers.axis) for name, readers in self.readers.items()}
        self.counts = self.samples.batch_counts(self.settings.batch_size)
        mask = self.settings.mask
        self.kept: list[Mask | None] = [None if mask is None else batch[mask] == 1 for batch in batches]
        float_cut: Tensors = {name: [b[name] for b in batches] for name in inputs}
        quantized_cut: Tensors = {name: list(arrays) for name, arrays in float_cut.items()}
        self._observe(float_cut)
        for stage in parts:
            self._solve_all(stage.layers, float_cut, quantized_cut)
            self._advance(stage, float_cut, quantized_cut)
            self._tell()
            self.progress("stages", stage.index + 1, len(parts))

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

    def _moments(self, layers: Sequence[Layer], x: Tensors, x_hat: Tensors) -> Iterator[tuple[list[Layer], Moments]]:
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

    def _statistics(self, layer: Layer, x: Sequence[Any], x_hat: Sequence[Any]) -> Moments:
        sums = MomentSums()
        settings = self.settings
        quantize = layer.name in self.plan.integer_layers and not settings.independent
        grid = self.result.grids[layer.input] if quantize else None
        shared = all(a is b for a, b in zip(x, x_hat, strict=True))
        counts: Sequence[int] = [] if layer.name in self.probes else self.counts
        masks: Sequence[Mask | None] = [] if layer.name in self.probes else self.kept
        if _has_samples_first(layer) and (regroup := _regrouping(x, counts)) is not None:
            x, x_hat, counts = regroup(x, self.cuts.fetch), regroup(x_hat, self.cuts.fetch), regroup(x).counts
            masks = regroup(masks) if masks[0] is not None else []
        shapes = x.shapes if isinstance(x, _Groups) else [array.shape for array in x]
        like = [self.cuts.empty(shape) for shape in shapes]
        kept = [self._kept_positions(layer, like[i], masks[i] if i < len(masks) else None) for i in range(len(x))]
        positions = [layer.kind.positions(like[i]) if k is None else len(k) for i, k in enumerate(kept)]
        if not any(positions):
            raise SamplesError(f"no sample reaches layer {layer.name!r}: its input is empty for all of them")
        inputs = layer.kind.inputs
        affordable = MOST_NUMBERS // (inputs * layer.kind.groups)
        limit = max(min(affordable, MOST_POSITIONS), LEAST_POSITIONS, POSITIONS_PER_INPUT * inputs)
        limit //= settings.fewer_positions
        share = min(1.0, limit / max(sum(positions), 1))
        if share > 1 / PATCHES_GAIN and layer.kind.patches(like[0]) is not None:
            share = 1.0
        rng = np.random.default_rng(settings.seed)
        taken = [max(1, round(share * n)) if n and share < 1 else n for n in positions]
        seen, total = 0, sum(taken)

        def fetched(i: int) -> tuple[Any, Any]:
            batch = self.cuts.fetch(x[i])
            return batch, batch if shared else self.cuts.fetch(x_hat[i])

        for i, (batch, batch_hat) in enumerate(self.cuts.ahead(len(x), fetched)):
            if taken[i] == 0:
                continue
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
            hat = batch if same else (self.cuts.fake_quantize(grid, batch_hat) if grid is not None else batch_hat)
            padded = layer.kind.patches(batch) if pick is None else None
            if padded is not None:
                padded_hat = None if same else layer.kind.patches(hat)
                which = halves(seen, taken[i], total)[:: taken[i] // len(padded)]
                for half in np.unique(which):
                    mine = slice(None) if (which == half).all() else which == half
                    mine_hat = None if padded_hat is None else arrays.at(padded_hat, mine)
                    sums.add_patches(arrays.at(padded, mine), mine_hat, layer.kind.kernel, half)
            else:
                for part, half in chunks(halves(seen, taken[i], total), inputs, layer.kind.groups):
                    chosen = part if pick is None else pick[part]
                    whole = pick is None and len(part) == positions[i]
                    rows = layer.kind.rows(batch, None if whole else chosen)
                    sums.add(rows, None if same else layer.kind.rows(hat, None if whole else chosen), half)
            seen += taken[i]
        return sums.moments()

    def _kept_positions(self, layer: Layer, batch: Any, kept: Mask | None) -> npt.NDArray[np.intp] | None:
        """The positions of a batch of a layer's input that are not padding; None where all count."""
        if kept is None or layer.kind.groups != 1 or kept.all():
            return None
        total = layer.kind.positions(batch)
        along = isinstance(layer.kind, MatMul) and has_positions(batch, kept, least_rank=3)
        if along or (isinstance(layer.kind, Gemm) and total == kept.size):
            return np.flatnonzero(np.repeat(kept.ravel(), total // kept.size))
        return None

    def _out_of_range(self, name: str, array: Any, i: int, counts: Sequence[int]) -> str:
        array = arrays.on_host(array)
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

    def _solve(self, together: Sequence[Layer], statistics: Moments) -> None:
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
        fetch = self.cuts.fetch
        return {
            name: [a if _same(fetch(a), fetch(b)) else b for a, b in zip(made[name], hat[name], strict=True)]
            for name in wanted
        }

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
            if arrays.is_array(example):
                # only the type: ranks and sizes may differ from batch to batch
                value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(arrays.dtype(example))), None
        for value in extracted.outputs:
            value.shape = None
        model = ir.Model(extracted, ir_version=self.prepared.model.ir_version)
        model.graph.opset_imports.update(self.prepared.model.graph.opset_imports)
        return model

    def _run(
        self, segment: ir.Model, stage: stages.Stage, given: Tensors, wanted: list[str], live: list[str], observe: bool
    ) -> Tensors:
        source = to_bytes_or_file(segment, self.work, f"stage{stage.index}")
        session = Session(
            source, self.settings.device, what=f"stage {stage.index} of the model", float_matmul_nbits=True,
            disable_qdq_fusion=self.target.runs_outside_ort,
        )  # fmt: skip
        made: Tensors = {name: [] for name in live}
        feeds = self.cuts.ahead(
            len(self.counts), lambda i: {name: self.cuts.fetch(given[name][i]) for name in stage.reads}
        )
        for i, batch in enumerate(feeds):
            outputs = self.cuts.run(session, batch, wanted)
            if observe:
                self._observe({name: [outputs[name]] for name in wanted}, i)
            for name in live:
                made[name].append(self.cuts.keep(outputs[name]))
            self.progress("samples", sum(self.counts[: i + 1]), sum(self.counts))
        return made

    def _observe(self, tensors: Tensors, first: int = 0) -> None:
        """Widen the ranges of tensors, one array per batch from batch `first` on."""
        for name, batches in tensors.items():
            if name in self.ranges:
                for i, array in enumerate(map(arrays.on_host, batches), first):
                    seen = take_kept(array, self.kept[i], least_rank=3)
                    self.ranges[name].observe(seen)
                    if name in self.positions:
                        self.positions[name].observe(seen)
                    low, high = self.ranges[name].low, self.ranges[name].high
                    if low != np.inf and not max(-low, high) <= LARGEST:
                        raise ModelError(self._out_of_range(name, array, i, self.counts))
        self._settle([name for name in tensors if name in self.ranges and name in self.samples.arrays])

    def _settle(self, names: Iterable[str]) -> None:
        """Turn ranges that are complete into grids. One that is shared may belong to a value behind: where that is not
        yet reached, each has its own."""
        grids = self.result.grids
        for name in sorted(names, key=lambda name: self.plan.values[name].like is not None):
            root = self.plan.root(name)
            grids[name] = grids[root] if root != name and root in grids else self._grid(name)

    def _grid(self, name: str) -> ActivationGrid:
        seen, bounds = self.ranges[name], self.plan.values[name].bounds
        positions = self.positions.pop(name, None)
        if positions is None or not positions.enough or not np.isfinite(seen.low):
            return seen.grid(self.plan.dtype, bounds)
        rng, reading = np.random.default_rng(self.settings.seed), self.readers[name]
        readers = [
            ranges.Reader(ranges.mix(x.kind, self.prepared.weight(x), rng), self._has_bias(x)) for x in reading.layers
        ]
        objective = ranges.Objective.of(*positions.rows(), readers, reading.passed_on)
        return ranges.choose(objective, seen.low, seen.high, self.plan.dtype, bounds)


def _largest(array: Any) -> float:
    """The largest magnitude; NaN where there is a NaN."""
    if not arrays.size(array):
        return 0.0
    # torch hands NaN on, as numpy does
    return float(abs(array).max() if arrays.is_tensor(array) else np.maximum(array.max(), -array.min()))


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

    def __init__(
        self, given: Sequence[Any], counts: Sequence[int], size: int, fetch: Callable[[Any], Any] = lambda array: array
    ) -> None:
        """fetch: what brings a part of an array to where it is worked on."""
        self._arrays, self._starts, self._size, self._fetch = given, np.cumsum([0, *counts]), size, fetch
        self._rows = len(given[0]) // counts[0]
        total = sum(counts)
        self.counts = [min(size, total - first) for first in range(0, total, size)]
        self.shapes = [(self._rows * count, *given[0].shape[1:]) for count in self.counts]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, i: Any) -> Any:
        first = i * self._size
        last = first + self.counts[i]
        parts = [
            self._fetch(array[(max(first, start) - start) * self._rows : (min(last, end) - start) * self._rows])
            for array, start, end in zip(self._arrays, self._starts[:-1], self._starts[1:], strict=True)
            if start < last and first < end
        ]
        return parts[0] if len(parts) == 1 else arrays.concatenate(parts)


def _has_samples_first(layer: Layer) -> bool:
    """Whether inputs of the layer one behind the other along the first axis give its rows one behind the other."""
    if isinstance(layer.kind, Gemm):
        return not layer.kind.trans_a
    return not isinstance(layer.kind, (MatMul, MatMulLeft)) or (
        isinstance(layer.kind, MatMul) and layer.kind.groups == 1
    )


def _regrouping(given: Sequence[Any], counts: Sequence[int]) -> Callable[..., _Groups] | None:
    """What puts arrays, one per batch of `counts` samples, into groups of samples; None where they do not have equal
    rows for each sample."""
    if not given or len(given) != len(counts) or not all(arrays.is_array(a) and a.ndim > 1 and len(a) for a in given):
        return None
    rows = len(given[0]) // counts[0]
    if rows < 1 or any(
        len(a) != rows * n or a.shape[1:] != given[0].shape[1:] for a, n in zip(given, counts, strict=True)
    ):
        return None
    size = max(1, min(GROUP, moments.CHUNK_BYTES * counts[0] // max(given[0].nbytes, 1)))
    return lambda arrays, *fetch: _Groups(arrays, counts, size, *fetch)


def _same(a: Any, b: Any) -> bool:
    if arrays.is_tensor(a):
        return arrays.is_tensor(b) and a.shape == b.shape and bool((a == b).all())
    return isinstance(a, np.ndarray) and a.shape == b.shape and np.array_equal(a, b)
