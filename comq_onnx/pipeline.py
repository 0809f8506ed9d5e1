"""quantize(): the whole way, load -> prepare -> plan -> walk the stages -> save -> compare -> report."""

from __future__ import annotations

import itertools
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from comq_onnx.bits.knapsack import Allocation
from comq_onnx.bits.survey import BITS, REFERENCE_BITS, survey
from comq_onnx.bits.tradeoff import UPGRADE_SHARE, Bits, DropCheck, Tradeoff, check_drop, max_noise, node_bytes
from comq_onnx.calibrate import stages
from comq_onnx.calibrate.walk import Calibration, Progress, Settings, timed, walk
from comq_onnx.errors import ModelError, OptionError, OutOfMemory, RuntimeFailure, SamplesError, did_you_mean
from comq_onnx.evaluate import compare_outputs, executed_kernels, latency
from comq_onnx.metrics import Floats, lead_changes, leads, scores_among, sqnr_of, suspicious_scores
from comq_onnx.model import files
from comq_onnx.model import graph as graphs
from comq_onnx.model.files import check_output, private_directory, subdirectory, to_bytes_or_file, written
from comq_onnx.model.layers import Layer, Prepared, calibrated, compile_pattern, no_match, select
from comq_onnx.model.operators import Gather
from comq_onnx.model.prepare import HARDSWISH_OPSET, Unprepared, check_source, prepare
from comq_onnx.model.source import as_path, load_source, read_model
from comq_onnx.options import spelling
from comq_onnx.options.budgets import Drop, parse_drop, parse_size
from comq_onnx.options.samples import SampleOptions, Size
from comq_onnx.options.spelling import command_line
from comq_onnx.plan import integer_gain as gains
from comq_onnx.plan import smoothing as smooth
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.activations import ActivationPlan, plan_activations
from comq_onnx.plan.forms import code_bytes, container_of, form, supported_grid
from comq_onnx.plan.subgraphs import specialize
from comq_onnx.report.inputs import describe as describe_inputs
from comq_onnx.report.report import ActivationReport, LayerReport, Report
from comq_onnx.runtime import device as devices
from comq_onnx.runtime import memory
from comq_onnx.runtime import session as runtime
from comq_onnx.samples import padding
from comq_onnx.samples.clues import read_clues, suspicious_statistics
from comq_onnx.samples.inspection import Inspection, describe
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Samples
from comq_onnx.solve.comq import EFFORTS
from comq_onnx.solve.grid import MAX_BITS, MIN_BITS, Grid
from comq_onnx.solve.layer import METHODS, Method, Solution, blank, check_codes, error_db
from comq_onnx.solve.paper import ORDERS, SWEEPS
from comq_onnx.targets.catalog import TARGETS
from comq_onnx.targets.target import Target
from comq_onnx.write.check import check_emitted
from comq_onnx.write.emit import emit
from comq_onnx.write.weights import Quantization, stored_bytes

logger = logging.getLogger(__name__)

EMBEDDING_BITS = 8
DEFAULT_SAMPLES = 256
HELD_BACK_SHARE, MOST_HELD_BACK = 8, 64
# samples that tell how the channels of activations compare, and how many of them run at once
EVENED_SAMPLES, EVENED_BATCH = 64, 4
# models that are made to keep an accuracy, the noise of the next over what should do, and the size that is worth it
MOST_ATTEMPTS, NEXT_ATTEMPT, WORTHWHILE = 5, 0.9, 0.97
# what folding may change: float32 reorderings stay above 90 dB in deep models, half precision above 40
SAME_DB, SAME_HALF_DB = 60.0, 30.0
# below this an output is more noise than a user would put up with; it may be what few bits cost, but never silently
LEAST_DB = 5.0
# how much smaller batches get when memory does not suffice: each try begins anew
LESS = 4


@dataclass(frozen=True)
class Options:
    """What a caller may choose; the command line's options by their long names."""

    bits: int | float | str = 4  # a number of bits, a mean such as 3.5, or "auto"
    size: str | None = None
    max_drop: str | float | None = None
    uniform: bool = False
    sensitivity: bool = False
    preprocess: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: Size | None = None
    crop: Size | None = None
    layout: str | None = None
    channels: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    text_field: str | None = None
    length: int | None = None
    max_samples: int = DEFAULT_SAMPLES
    batch_size: int = 16
    target: str = "ort-cpu"
    activations: str = "auto"
    granularity: str = "channel"
    symmetric: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    bits_for: tuple[tuple[str, int], ...] = ()
    solver: str = "comq"
    effort: str = "default"
    order: str | None = None
    sweeps: int | None = None
    shrink: float | None = None
    independent: bool = False
    device: str = "auto"
    seed: int = 0
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        for bits in (*([] if self.bits == "auto" else [self.bits]), *(n for _, n in self.bits_for)):
            if not isinstance(bits, (int, float)) or not MIN_BITS <= bits <= MAX_BITS:
                raise OptionError(f"{bits} bits: {MIN_BITS} to {MAX_BITS} are possible, or auto")
        budgets = [("--size", self.size), ("--max-drop", self.max_drop)]
        asked = [option for option, value in budgets if value is not None]
        if self.bits == "auto" and len(asked) != 1:
            raise OptionError(
                "--bits auto: needs one budget: --size 25%, --size 3MB, --max-drop 0.5 or --max-drop 20dB"
            )
        if self.bits != "auto" and asked:
            raise OptionError(f"{asked[0]}: only with --bits auto, not with --bits {self.bits}")
        if self.uniform and self.fixed_bits is None:
            raise OptionError(
                f"--uniform: all layers cannot have the same with --bits {self.bits}; give a whole number"
            )
        if self.size is not None:
            parse_size(self.size, 1)
        if self.max_drop is not None:
            parse_drop(self.max_drop)
        _one_of("--target", self.target, TARGETS)
        _one_of("--solver", self.solver, METHODS)
        _one_of("--effort", self.effort, EFFORTS)
        if self.order is not None:
            _one_of("--order", self.order, ORDERS)
        for option, value in (("--order", self.order), ("--sweeps", self.sweeps), ("--shrink", self.shrink)):
            if value is not None and self.solver != "paper":
                raise OptionError(f"{option} {value}: the paper's solver alone has it; add --solver paper")
        if self.solver != "comq" and self.effort != "default":
            raise OptionError(f"--effort {self.effort}: comq alone has it, not --solver {self.solver}")
        if self.sweeps is not None and self.sweeps < 1:
            raise OptionError(f"--sweeps {self.sweeps}: must be 1 or more")
        if self.shrink is not None and not 0 < self.shrink <= 2:
            raise OptionError(f"--shrink {self.shrink}: a factor on the scale, above 0 and at most 2")
        _one_of("--activations", self.activations, ("auto", "none", "8", "16"))
        try:
            TARGETS[self.target].activation_dtype(self.activations)
        except ValueError as error:
            raise OptionError(f"--activations {self.activations}: {error}; use auto or none") from None
        if not (self.symmetric or TARGETS[self.target].weight_zero_points):
            raise OptionError(f"--asymmetric: {self.target} takes only weights of zero point 0; leave it out")
        devices.check_name(self.device)
        for option, number in (("--samples", self.max_samples), ("--batch-size", self.batch_size)):
            if number < 1:
                raise OptionError(f"{option} {number}: must be 1 or more")
        if self.memory_gb is not None and not self.memory_gb >= 0:
            raise OptionError(f"--memory {self.memory_gb}: must be 0 or more gigabytes")
        self.grid(MAX_BITS)
        _ = self.recipe

    @property
    def fixed_bits(self) -> int | None:
        """The bits that all layers get, some perhaps more; None where a budget decides."""
        return int(self.bits) if isinstance(self.bits, (int, float)) and self.bits == int(self.bits) else None

    @property
    def recipe(self) -> SampleOptions:
        """How samples are read, as the options say."""
        return SampleOptions(**{f.name: getattr(self, f.name) for f in fields(SampleOptions)})

    @property
    def method(self) -> Method:
        """The solver that the options ask for."""
        return Method(self.solver, self.effort, self.order or ORDERS[0], self.sweeps or SWEEPS, self.shrink)

    def grid(self, bits: int) -> Grid:
        """The weight grid that the options ask for, at `bits` bits."""
        if self.granularity in ("channel", "tensor"):
            return Grid(bits, self.symmetric, per_tensor=self.granularity == "tensor")
        if (
            not self.granularity.isdigit()
            or int(self.granularity) < 16
            or int(self.granularity) & (int(self.granularity) - 1)
        ):
            raise OptionError(
                f"--granularity {self.granularity}: channel, tensor, or a block of inputs: a power of two from 16 on"
            )
        return Grid(bits, self.symmetric, block_size=int(self.granularity))


def _one_of(option: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        raise OptionError(f"{option} {value}: choose one of {', '.join(allowed)}{did_you_mean(value, allowed)}")


def quantize(
    model: str | os.PathLike[str] | onnx.ModelProto | Any,
    out: str | os.PathLike[str] | None = None,
    samples: str | os.PathLike[str] | Mapping[str, Any] | Samples | Any = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Quantize `model` with COMQ and write the QDQ model to `out`; None keeps it in memory, for `Report.onnx_model`.

    model: a path (a directory with one .onnx file too), an onnx.ModelProto or an onnx-graphsurgeon Graph; it is never
    modified. samples: a path, `Samples`, or arrays by input name, samples along the first axis; a callable, a
    CalibrationDataReader, a DataLoader, a dataset or what else yields samples; None for synthetic ones. options: the
    fields of `Options`. progress: called with (what, done, total), where what is prepare, sensitivity, stages, samples
    (within a stage), layers or compare. Where memory does not suffice, smaller batches
    are tried. Raises ComqError: see comq_onnx.errors.
    """
    chosen = Options(**options)
    with private_directory() as work:
        path = as_path(model, work)
        # a folder of its own: the model may lie in this one under any name
        target = Path(out) if out is not None else subdirectory(work, "out") / "model.onnx"
        report = _quantized(path, target, samples, chosen, progress or _silent)
        report = _named(replace(report, command=_command(model, out or "OUTPUT", samples, chosen)), model)
        if out is not None:
            return report
        if len(list(target.parent.iterdir())) > 1:
            raise OptionError("the result is too large to be kept in memory: give a path for it as `out`")
        return replace(report, output=None, in_memory=target.read_bytes())


def _quantized(path: Path, out: Path, samples: Any, asked: Options, progress: Progress) -> Report:
    chosen = asked
    while True:
        run = Run(path, out, samples, chosen, progress)
        if chosen is not asked:
            disk = " and tensors between stages go by disk" if chosen.memory_gb != asked.memory_gb else ""
            run.warnings.append(f"not enough memory for larger batches: {chosen.batch_size} samples run at once{disk}")
        try:
            return run.quantize()
        except (OutOfMemory, MemoryError) as error:
            chosen = _less(chosen, error, devices.is_gpu(run.device))


def _less(options: Options, error: Exception, on_gpu: bool) -> Options:
    """What takes less memory: smaller batches, then on a GPU nothing kept there between stages."""
    if options.batch_size == 1 and on_gpu and options.memory_gb != 0:
        logger.info("not enough memory on the GPU: %s", error)
        return replace(options, memory_gb=0.0)
    if options.batch_size == 1:
        raise OutOfMemory(
            f"not enough memory, even for one sample at once ({str(error) or 'MemoryError'}): free some, or give fewer "
            "--samples or --memory 0"
        ) from error
    logger.info("not enough memory for batches of %d: %s", options.batch_size, error)
    return replace(options, batch_size=max(1, options.batch_size // LESS))


def plan(
    model: str | os.PathLike[str] | onnx.ModelProto | Any,
    samples: str | os.PathLike[str] | Mapping[str, Any] | Samples | Any = None,
    **options: Any,
) -> Report:
    """The layers, grids and stages that `quantize` would use, without calibrating: a Report without errors and
    outputs."""
    chosen = Options(**options)
    with private_directory() as work:
        report = Run(as_path(model, work), None, samples, chosen, _silent).plan()
    return _named(replace(report, command=_command(model, None, samples, chosen)), model)


def inspect_samples(
    model: str | os.PathLike[str] | onnx.ModelProto | Any,
    samples: str | os.PathLike[str] | Mapping[str, Any] | Any = None,
    **options: Any,
) -> Inspection:
    """What `quantize` would feed to the model and what the float model answers, without calibrating."""
    chosen = Options(**options)
    with private_directory() as work:
        return Run(as_path(model, work), None, samples, chosen, _silent).inspect()


def _silent(_what: str, _done: int, _total: int) -> None:
    pass


def _named(report: Report, model: Any) -> Report:
    """The report with a name for a model that was handed over in memory, whose file is gone."""
    return report if isinstance(model, (str, os.PathLike)) else replace(report, model="a model in memory")


def _command(model: Any, out: Any, samples: Any, options: Options) -> str:
    """The command line that does the same; MODEL, SAMPLES for what was handed over in memory."""
    paths = (str, os.PathLike)
    calib = None if samples is None else str(samples) if isinstance(samples, paths) else "SAMPLES"
    return command_line(
        str(model) if isinstance(model, paths) else "MODEL",
        None if out is None else str(out),
        calib,
        spelling.chosen(vars(options), vars(Options())),
    )


@dataclass
class Planned:
    prepared: Prepared
    walked: Prepared
    probes: dict[str, str]
    activations: ActivationPlan
    bits: Bits
    grids: dict[str, Grid]
    skipped: dict[str, str]
    slower: frozenset[str] = frozenset()  # layers that integers would make slower


@dataclass(frozen=True)
class Solved:
    """A plan with what the walk found for it, and the model that came of it."""

    planned: Planned
    found: Calibration
    model: ir.Model


class Run:
    """One run of the pipeline; each method is one step of it."""

    def __init__(self, path: Path, out: Path | None, samples: Any, options: Options, progress: Progress) -> None:
        self.path, self.out, self.options, self.progress = path, out, options, progress
        self.source_samples = samples.arrays if isinstance(samples, Samples) else samples
        self.target: Target = TARGETS[options.target]
        self.device = "cpu"  # until one is chosen
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()
        self.reference: Path | bytes = path  # what the quantized model is compared with
        self.chosen: Allocation | None = None
        self.kernels: dict[str, str] = {}  # the operator that ONNX Runtime runs each layer with
        self.stored: dict[str, int] = {}  # bytes of each layer's weight in the result

    def quantize(self) -> Report:
        assert self.out is not None
        check_output(self.out, self.path)
        self.progress("prepare", 0, 1)
        with timed(self.seconds, "load"):
            self.open()
            planned = self.planned()
        self.progress("prepare", 1, 1)
        with timed(self.seconds, "survey"):
            space = self.space(planned) if self._wants_survey(planned) else None
        if space is not None and self.options.max_drop is not None:
            solved = self._within_drop(planned, space)
        else:
            solved = self.solve(planned if space is None else self._allocate(planned, space))
        # what does not load or run never gets the output's name
        with written(solved.model, self.out) as (path, size), timed(self.seconds, "compare"):
            compared = self._compare(path)
        return self._report(solved.planned, space, solved.found, size, compared)

    def plan(self) -> Report:
        with timed(self.seconds, "load"):
            self.open()
            planned = self.planned()
        space = None
        if self._wants_survey(planned):
            if self.source_samples is None and self.options.fixed_bits is not None and not self.options.sensitivity:
                self.notes.append(
                    "without samples it cannot be told which layers gain most from more bits: shown with equal bits"
                )
            else:
                with timed(self.seconds, "survey"):
                    space = self.space(planned)
        if space is not None:
            planned = self._allocate(planned, space)
        return self._report(planned, space, None, None, {})

    def solve(self, planned: Planned) -> Solved:
        found = walk(
            planned.walked, planned.activations, planned.grids, self.calibration, self.target, self.settings(),
            self.progress, planned.probes,
        )  # fmt: skip
        self.seconds |= {key: self.seconds.get(key, 0.0) + spent for key, spent in found.seconds.items()}
        for solution in found.solutions.values():
            check_codes(solution.weight)
        with timed(self.seconds, "emit"):
            model = self._emitted(planned, found.solutions, found.grids)
            check_emitted(model, self._quantization(planned, found.solutions, found.grids))
            return Solved(planned, found, model)

    def settings(self) -> Settings:
        return Settings(
            self.options.method, self.options.independent, self.options.batch_size, self.device, self.options.seed,
            self._memory(), self.mask,
        )  # fmt: skip

    def inspect(self) -> Inspection:
        self.open()
        notes, warnings = tuple(self.notes), tuple(self.warnings)
        return describe(self.calibration, len(self.held_back), self.first_outputs, notes, warnings)

    # load and prepare

    def open(self) -> None:
        """Read the model and the samples, run one batch: everything that can be wrong with either shows here."""
        model, self.source = load_source(self.path)
        check_source(model, str(self.path))
        if graphs.opset(model) > self.target.max_opset:
            raise ModelError(
                f"{self.path}: has opset {graphs.opset(model)}; {self.target.name} reads {self.target.max_opset} at "
                "most: export the model with a lower one"
            )
        chosen = devices.choose(self.options.device)
        self.device = chosen.device
        if chosen.why is not None:
            self.warnings.append(f"calibrated on the CPU, not on the GPU: {chosen.why}")
        self.float_session: runtime.Session | None = None
        inputs: Sequence[Any]
        try:
            self.float_session = runtime.Session(self.path, self.device, what=str(self.path), check=self.source.check)
            inputs = self.float_session.inputs
        except ModelError as refused:
            if not any(v.dtype == ir.DataType.BFLOAT16 for v in graphs.walk_values(model)):
                raise
            # the CPU has no bfloat16 arithmetic: the float32 form stands in for the source
            self.notes.append(
                "ONNX Runtime cannot run this bfloat16 model here: compared with its float32 form instead"
            )
            try:
                prepared = prepare(model, graphs.opset(model), graphs.opset(model), fold=False)
            except Exception:  # of a graph that is broken anyway
                raise refused from None
            self.reference = ir.to_proto(prepared.model).SerializeToString()
            self.float_session = runtime.Session(self.reference, self.device, what=str(self.path))
            inputs = self.float_session.inputs
            self.half = True
        else:
            self.half = any(v.dtype == ir.DataType.FLOAT16 for v in graphs.walk_values(model))
        if not inputs:
            raise ModelError(f"{self.path}: the model has no inputs, so there is nothing to calibrate on")
        wanted = self.options.max_samples
        held = min(MOST_HELD_BACK, max(1, wanted // HELD_BACK_SHARE))
        clues = read_clues(model, self.path, self.float_session, self.device)
        everything = load_samples(
            self.source_samples, inputs, self.options.recipe, wanted + held, self.options.seed, clues
        )
        self.notes += everything.notes
        self.warnings += everything.warnings
        for name, array in everything.arrays.items():
            if array.dtype.kind == "f" and array.size and (array == array.flat[0]).all():
                self.warnings.append(
                    f"{name} is {array.flat[0]:g} in all samples: a model calibrated so is fit for that"
                )
        self.calibration, self.held_back = self._split(everything, wanted)
        feeds = next(self.calibration.batches(self.options.batch_size))
        try:
            self.first_outputs = self.float_session.run(feeds)
        except OutOfMemory:
            raise
        except RuntimeFailure as error:
            raise SamplesError(f"{everything.source}: the model cannot run on these samples: {error}") from error
        self.first_feeds = feeds
        if everything.source != "synthetic":  # which show nothing that has a class
            doubts = [suspicious_scores(name, output) for name, output in self.first_outputs.items()]
            self.warnings += filter(None, [*doubts, suspicious_statistics(clues, feeds)])
        self.mask = self._find_mask()

    def _find_mask(self) -> str | None:
        """The input that masks positions which the model ignores."""
        assert self.float_session is not None
        name = None if self.calibration.per_item else padding.find_mask(self.calibration.arrays)
        if name is None:
            return None
        # the first batch may be without padding, and so without a test
        batches = self.calibration.batches(self.options.batch_size)
        feeds = next(batch for batch in batches if (batch[name] != 1).any())
        if not padding.is_ignored(self.float_session.run, feeds, name):
            self.notes.append(f"{name} does not keep what it masks from the outputs: calibrated on all positions")
            return None
        share = float((self.calibration.arrays[name] != 1).mean())
        self.notes.append(f"{share:.0%} of the positions are padding ({name}): not calibrated on")
        return name

    def _split(self, everything: Samples, wanted: int) -> tuple[Samples, Samples]:
        total, unit = len(everything), everything.fixed_batch or 1
        if total < 2 * unit:
            raise SamplesError(
                f"{everything.source}: {total} sample(s); at least {2 * unit} are needed, one batch to calibrate on "
                "and one to compare on, and 128 or more are better"
            )
        # a share of what calibration takes, and all that it leaves
        spare = max(min(total, wanted) // HELD_BACK_SHARE, total - wanted)
        held = max(unit, min(MOST_HELD_BACK, spare) // unit * unit)
        used = min(wanted, total - held) // unit * unit or unit
        if used < 32 and everything.source != "synthetic":
            self.warnings.append(f"only {used} calibration samples: 128 or more give a better model")
        return everything.split(used, held, self.options.seed)

    def planned(self) -> Planned:
        """Prepare the graph, in the most thorough way that leaves its outputs as they were, and choose grids."""
        prepared = self._prepare()
        prepared = select(prepared, self.options.include, self.options.exclude)
        settings = Settings(batch_size=self.options.batch_size, device=self.device)
        specialized = specialize(prepared, self.calibration, settings)
        walked, unreached = specialized.prepared, specialized.skipped
        prepared = Prepared(
            prepared.model,
            [layer for layer in prepared.layers if layer.name not in unreached],
            {**prepared.skipped, **unreached},
            prepared.notes,
        )
        if not prepared.layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(unreached.items())[:3])
            raise ModelError(f"{self.path}: the samples reach no layer that can be quantized ({reasons})")
        dtype = self.target.activation_dtype(self.options.activations)
        if self.options.granularity.isdigit() and prepared.opset < 21:
            raise OptionError(
                f"--granularity {self.options.granularity} needs opset 21; this model could not be raised above "
                f"{prepared.opset}: use --granularity channel"
            )
        if dtype == "uint16" and prepared.opset < 21:
            raise OptionError(f"--activations 16 needs opset 21; this model could not be raised above {prepared.opset}")
        planned = Planned(prepared, walked, specialized.probes, ActivationPlan("float32"), {}, {}, prepared.skipped)
        planned = self._with_activations(planned, dtype)
        bits = self._bits(prepared.layers)
        if self.options.fixed_bits is not None and not self.options.uniform:
            bits = self._filled(planned, bits)
        return self._even(self.with_bits(planned, bits), dtype)

    def _with_activations(self, planned: Planned, dtype: str | None) -> Planned:
        """With what is quantized between the layers: where nobody says so, what makes the model faster."""
        walked = planned.walked
        # with scales per block every MatMul is weight-only: one behind it that is not would cost it its kernel
        blocks = self.options.granularity.isdigit()
        whole = [
            layer
            for layer in walked.layers
            if layer.name not in planned.probes and not (blocks and layer.op in ("MatMul", "Gemm"))
        ]
        found = plan_activations(walked.model, whole, self.target, dtype)
        costs = self.target.costs
        open_to_doubt = any(x.name in found.integer_layers and gains.is_measured(x) for x in whole)
        if self.options.activations != "auto" or costs is None or not open_to_doubt:
            return replace(planned, activations=found)
        faster = gains.choose(
            walked, whole, lambda layers: plan_activations(walked.model, layers, self.target, dtype),
            self._shapes(walked.model), costs,
        )  # fmt: skip
        slower = found.integer_layers - faster.integer_layers
        if slower:
            self.notes.append(
                f"{len(slower)} of {len(found.integer_layers)} layers are weight-only because integers would make them "
                "slower (--activations 8 has them in integers too)"
            )
        return replace(planned, activations=faster, slower=slower)

    def _shapes(self, model: ir.Model) -> gains.Shapes:
        """The shape of every tensor of the main graph, for one sample."""
        names = [str(v.name) for node in model.graph for v in node.outputs if v.name]
        feeds = next(self.calibration.batches(1))
        outputs = self._values(model, names, [feeds])
        made = {**feeds, **next(iter(outputs))}
        return {name: value.shape for name, value in made.items() if isinstance(value, np.ndarray)}

    def _values(
        self, model: ir.Model, names: Sequence[str], batches: Iterable[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """What some values of a model are, batch by batch."""
        with private_directory() as work:
            source = to_bytes_or_file(graphs.with_outputs(model, names), work, "values")
            session = runtime.Session(source, self.device, what="the model with its activations as outputs")
            taken = {i.name for i in session.inputs}
            for batch in batches:
                yield session.run({name: array for name, array in batch.items() if name in taken})

    def _even(self, planned: Planned, dtype: str | None) -> Planned:
        """With channels of activations evened out where that gains, in the graph that is walked and in the one that is
        written."""
        factors = self._factors(planned)
        if not factors:
            return planned
        prepared, walked = planned.prepared, planned.walked
        even = smooth.apply(prepared.model, prepared.layers, factors)
        inputs = {layer.name: layer.input for layer in even}
        if walked.model is not prepared.model:
            smooth.apply(walked.model, walked.layers, factors)
        walked = replace(walked, layers=[replace(x, input=inputs[x.name]) for x in walked.layers])
        integer = [x for x in walked.layers if x.name in planned.activations.integer_layers]
        activations = plan_activations(walked.model, integer, self.target, dtype)
        self.notes.append(f"{len(factors)} activations evened out across channels before they are quantized")
        return replace(planned, prepared=replace(prepared, layers=even), walked=walked, activations=activations)

    def _factors(self, planned: Planned) -> smooth.Factors:
        """By what to multiply the channels of some activations, from a few samples."""
        names = list(smooth.candidates(planned.walked, planned.activations))
        if not names:
            return {}
        few = self.calibration.few(EVENED_SAMPLES)
        masks = [None if self.mask is None else batch[self.mask] == 1 for batch in few.batches(EVENED_BATCH)]
        values = self._values(planned.walked.model, names, few.batches(EVENED_BATCH))
        return smooth.find_factors(planned.walked, planned.activations, planned.grids, values, masks)

    def with_bits(self, planned: Planned, bits: Bits) -> Planned:
        layers = planned.prepared.layers
        grids = {
            layer.name: supported_grid(layer, self.options.grid(bits[layer.name]), self.target) for layer in layers
        }
        return replace(planned, bits=bits, grids=grids)

    def _prepare(self) -> Prepared:
        least = self.target.min_opset
        # where a budget decides, 4 bits have a container, and all other widths are bit planes
        widths = [self.options.fixed_bits or 4, *(n for _, n in self.options.bits_for)]
        # uint16 activations, and the blocks of a weight-only MatMul, came with opset 21
        dtype = self.target.activation_dtype(self.options.activations)
        modern = self.options.granularity.isdigit() or dtype in (None, "uint16")
        # HardSwish as one operator came with 14
        wanted = max(least, HARDSWISH_OPSET, *(self.target.opset_for(bits) for bits in widths), 21 if modern else 0)
        failed = []
        for fold, opset in ((True, wanted), (False, wanted), (False, least)):
            try:
                prepared = prepare(read_model(self.path), opset, least, fold)
                found = self._fidelity(prepared)
            except OutOfMemory:
                raise
            except (Unprepared, ModelError, RuntimeFailure) as error:
                failed.append(str(error))
                continue
            if found >= (SAME_HALF_DB if self.half else SAME_DB):
                if not fold:
                    self.notes.append("constants and BatchNorms were not folded: " + failed[0])
                self.notes += prepared.notes
                return prepared
            failed.append(f"outputs changed (SQNR {found:.1f} dB)")
        raise ModelError(f"{self.path}: cannot be prepared for quantization: {failed[-1]}")

    def _fidelity(self, prepared: Prepared) -> float:
        """SQNR in dB of the prepared model's outputs on the first batch; 200 for a model that is random by itself."""
        assert self.float_session is not None
        with private_directory() as work:
            source = to_bytes_or_file(prepared.model, work, "prepared")
            outputs = runtime.Session(source, self.device, what="the prepared model").run(self.first_feeds)
        found = sqnr_of(self.first_outputs, outputs)
        if found < SAME_DB and sqnr_of(self.first_outputs, self.float_session.run(self.first_feeds)) < SAME_DB:
            self.warnings.append("the model gives other outputs each time it runs: nothing can be checked against it")
            return 200.0
        return found

    def _bits(self, layers: Sequence[Layer]) -> Bits:
        """The bits of each layer before any survey."""
        usual = self.options.fixed_bits or REFERENCE_BITS
        bits = {x.name: EMBEDDING_BITS if isinstance(x.kind, Gather) else usual for x in layers}
        for pattern, number in self.options.bits_for:
            expression = compile_pattern(pattern, "--bits-for")
            matching = [name for name in bits if expression.search(name)]
            if not matching:
                raise OptionError(no_match("--bits-for", f"{pattern}={number}", pattern, list(bits)))
            bits.update(dict.fromkeys(matching, number))
        return bits

    def _filled(self, planned: Planned, bits: Bits) -> Bits:
        """The most bits that take as many bytes as those asked for: what containers hold anyway."""
        sharing: dict[str, list[Layer]] = {}
        for layer in planned.prepared.layers:
            sharing.setdefault(layer.weight, []).append(layer)
        filled = dict(bits)
        for layers in sharing.values():
            if not any(self._told(layer.name) or isinstance(layer.kind, Gather) for layer in layers):
                most = min(self._as_large(layer, bits[layer.name], planned) for layer in layers)
                filled.update({layer.name: max(most, bits[layer.name]) for layer in layers})
        more = [name for name in bits if filled[name] > bits[name]]
        if more:
            self.notes.append(
                f"{len(more)} of {len(bits)} layers have more bits than asked for, which their containers on "
                f"{self.target.name} hold in the same bytes (--uniform: not)"
            )
        return filled

    def _as_large(self, layer: Layer, bits: int, planned: Planned) -> int:
        """The most bits whose codes are stored as those of `bits` are."""
        stored = [
            container_of(layer, n, planned.activations, self.target, planned.prepared.opset)
            for n in range(bits, MAX_BITS + 1)
        ]
        return max(bits + i for i, how in enumerate(stored) if how == stored[0])

    # which layer gets how many bits

    def _wants_survey(self, planned: Planned) -> bool:
        if self.options.fixed_bits is None or self.options.sensitivity:
            return True
        free = [x.name for x in planned.prepared.layers if not (self._told(x.name) or isinstance(x.kind, Gather))]
        return not self.options.uniform and any(planned.bits[name] < MAX_BITS for name in free)

    def _told(self, name: str) -> bool:
        """Whether --bits-for says what a layer gets."""
        return any(compile_pattern(pattern, "--bits-for").search(name) for pattern, _ in self.options.bits_for)

    def space(self, planned: Planned) -> Tradeoff:
        """What every width of every layer costs, in accuracy and bytes."""
        prepared, target = planned.prepared, self.target
        least = self.options.fixed_bits or BITS[0]
        wanted = sorted({REFERENCE_BITS, *planned.bits.values(), *(bits for bits in BITS if bits >= least)})
        found = survey(
            prepared, planned.walked, planned.activations, planned.probes, self.options.grid, self.calibration, target,
            self.settings(), self.progress, wanted,
        )  # fmt: skip
        layers = {layer.name: layer for layer in prepared.layers}
        widths: dict[str, Sequence[int]] = {}
        sizes: dict[str, dict[int, int]] = {}
        counts: dict[str, int] = {}
        for name, members in found.groups.items():
            layer, now = layers[name], planned.bits[name]
            counts[name] = int(np.prod(layer.weight_shape))
            sizes[name] = {
                bits: code_bytes(layer, bits, planned.activations, target, prepared.opset) for bits in wanted
            }
            told = any(self._told(member) for member in members)
            if told or (self.options.fixed_bits is not None and isinstance(layer.kind, Gather)):
                widths[name] = (now,)
            else:
                widths[name] = [bits for bits in BITS if self.options.fixed_bits is None or bits >= now]

        def file_size(bits: Bits) -> int:
            return self._file_size(planned, bits)

        return Tradeoff(
            found, widths, sizes, node_bytes(found.groups, sizes, file_size), counts, file_size, self._leads()
        )  # fmt: skip

    def _leads(self) -> Floats | None:
        """The leads of the float model's best class on all samples; None where it gives no class scores."""
        assert self.float_session is not None
        name = scores_among(self.first_outputs)
        if name is None:
            return None
        batches = itertools.chain.from_iterable(
            samples.batches(self.options.batch_size) for samples in (self.calibration, self.held_back)
        )
        return np.concatenate([leads(self.float_session.run(feeds, [name])[name]) for feeds in batches])

    def _file_size(self, planned: Planned, bits: Bits) -> int:
        """The bytes of the file with these bits: it is written, with codes of nothing."""
        planned = self.with_bits(planned, bits)
        solutions = {x.name: blank(planned.prepared.weight(x), planned.grids[x.name]) for x in planned.prepared.layers}
        one = ActivationGrid(np.float32(1), 0, planned.activations.dtype)
        model = self._emitted(planned, solutions, dict.fromkeys(planned.activations.values, one))
        return files.file_size(model)

    def _allocate(self, planned: Planned, space: Tradeoff) -> Planned:
        """The bits that the budget gives; with a fixed number of bits, more for the layers that gain most."""
        if self.options.size is not None:
            self.chosen = space.within_size(parse_size(self.options.size, self.source.size))
        elif self.options.max_drop is not None:
            drop = parse_drop(self.options.max_drop)
            self.chosen = space.within_noise(max_noise(drop, space.leads), drop.kind)
        elif self.options.fixed_bits is None:
            assert isinstance(self.options.bits, float)
            self.chosen = space.within_mean(self.options.bits)
        elif self.options.uniform or self.options.fixed_bits == MAX_BITS:
            return planned
        else:
            self.chosen = space.within_size(int(self._file_size(planned, planned.bits) * (1 + UPGRADE_SHARE)))
        return self.with_bits(planned, space.bits(self.chosen))

    def _within_drop(self, planned: Planned, space: Tradeoff) -> Solved:
        """The smallest model that keeps the accuracy asked for on the samples held back. What each model measures tells
        which to try next: as far off as the prediction was, and between one that keeps it and one that does not once
        there are both. Raises OptionError where even the most bits lose more."""
        assert self.options.max_drop is not None
        drop = parse_drop(self.options.max_drop)
        noise = max_noise(drop, space.leads)
        passed: float | None = None
        failed: float | None = None
        most = space.within_codes(space.limits()[1])
        best: tuple[Allocation, Solved] | None = None
        for attempt in range(MOST_ATTEMPTS):
            last = attempt == MOST_ATTEMPTS - 1
            chosen = most if last and best is None else space.within_noise(noise, drop.kind)
            if best is not None and chosen.size > WORTHWHILE * best[0].size:
                break
            solved = self.solve(self.with_bits(planned, space.bits(chosen)))
            kept = self._kept(solved.model, space.leads, drop)
            mean = space.mean_bits(solved.planned.bits)
            self.notes.append(f"tried {mean:.2f} bits in the mean: {kept.said}")
            predicted = float(space.noise(chosen)[drop.kind])
            if kept.enough:
                best, passed = (chosen, solved), predicted
            elif chosen.size >= most.size:
                raise OptionError(
                    f"--max-drop {self.options.max_drop}: not reached. At {mean:.1f} bits in the mean {kept.said} on "
                    f"{len(self.held_back)} samples held back; allow more, or try --activations 16 or none, or more "
                    "calibration samples"
                )
            else:
                failed = predicted
            if passed is None or failed is None:
                noise = predicted * kept.ratio * NEXT_ATTEMPT
            else:
                noise = float(np.sqrt(passed * failed))
        assert best is not None
        self.chosen = best[0]
        return best[1]

    def _kept(self, model: ir.Model, known: Floats | None, drop: Drop) -> DropCheck:
        assert self.float_session is not None
        with private_directory() as work:
            source = to_bytes_or_file(model, work, "quantized")
            session = self._quantized_session(source)
            outputs = compare_outputs(self.float_session, session, self.held_back, self.options.batch_size)
            changes = None
            if drop.points is not None:
                name = scores_among(self.first_outputs)
                assert name is not None
                changes = np.concatenate(
                    [
                        lead_changes(self.float_session.run(feeds, [name])[name], session.run(feeds, [name])[name])
                        for feeds in self.held_back.batches(self.options.batch_size)
                    ]
                )
        return check_drop(drop, known, outputs, changes)

    def _quantized_session(self, source: Path | bytes | str) -> runtime.Session:
        # ONNX Runtime's CPU alone rounds the activations of weight-only products
        exact = self.device != self.target.device
        return runtime.Session(
            source,
            self.device,
            what="the quantized model",
            float_matmul_nbits=exact,
            disable_qdq_fusion=self.target.runs_outside_ort,
        )

    def _memory(self) -> int:
        if self.options.memory_gb is not None:
            return int(self.options.memory_gb * 1e9)
        return memory.free() // 2

    # write and compare

    def _emitted(
        self, planned: Planned, solutions: Mapping[str, Solution], grids: Mapping[str, ActivationGrid]
    ) -> ir.Model:
        """The quantized model."""
        model = planned.prepared.model.clone()
        emit(model, self._quantization(planned, solutions, grids))
        self.stored = {layer.name: stored_bytes(model, layer) for layer in planned.prepared.layers}
        used = {t.dtype for v in model.graph.initializers.values() if (t := v.const_value) is not None}
        lowest_ir = 13 if ir.DataType.INT2 in used else 10 if ir.DataType.INT4 in used else 8
        model.ir_version = min(max(model.ir_version, lowest_ir), self.target.max_ir)
        model.metadata_props.update(
            {
                "comq_onnx.version": version(),
                "comq_onnx.options": _lasting(self.options),
                "comq_onnx.source_sha256": self.source.sha256,
                "comq_onnx.samples": f"{len(self.calibration)} of {Path(self.calibration.source).name}",
            }
        )
        return model

    def _quantization(
        self, planned: Planned, solutions: Mapping[str, Solution], grids: Mapping[str, ActivationGrid]
    ) -> Quantization:
        return Quantization(
            planned.prepared.layers, solutions, planned.activations, grids, self.target, planned.prepared.opset
        )

    def _compare(self, path: Path) -> dict[str, Any]:
        assert self.float_session is not None
        quantized = self._quantized_session(path)
        outputs = compare_outputs(
            self.float_session, quantized, self.held_back, self.options.batch_size,
            lambda done, total: self.progress("compare", done, total),
        )  # fmt: skip
        self.float_session = None
        self.source.check()
        lost = [f"{o.name} {o.sqnr_db:.1f} dB" for o in outputs if not o.sqnr_db >= LEAST_DB]
        if lost:
            self.warnings.append(
                f"the quantized model's outputs are far from its source's (SQNR {', '.join(lost)}): give more --bits, "
                "more samples, or --exclude the layers of most error"
            )
        device = self.target.device
        if device is None or not runtime.has_device(device):
            self.notes.append(
                f"compared by ONNX Runtime, not on {self.target.name}: docs/deploy.md tells how to see kernels and "
                "speed there"
            )
            return {"outputs": outputs}
        pair = [runtime.Session(x, device, threads=1) for x in (self.reference, path)]
        times = latency(pair, self.held_back)
        kernels = executed_kernels(path, device)
        if times[1] > 1.05 * times[0]:
            self.warnings.append(
                f"the quantized model is slower than its source ({times[1]:.2f} against {times[0]:.2f} ms): "
                "try --activations none, or --exclude the layers of least weight"
            )
        self.kernels = kernels.of_layer
        return {
            "outputs": outputs,
            "latency_ms": {"before": times[0], "after": times[1]},
            "kernels": kernels.integer,
            "float_kernels": kernels.floating,
        }

    def _report(
        self,
        planned: Planned,
        space: Tradeoff | None,
        found: Calibration | None,
        size: int | None,
        compared: dict[str, Any],
    ) -> Report:
        stage_of = {
            layer.name: stage.index
            for stage in stages.cut(planned.walked.model, list(calibrated(planned.walked.layers)))
            for layer in stage.layers
        }
        layers = [
            self._layer(layer, planned, space, stage_of.get(layer.name, 0), found) for layer in planned.prepared.layers
        ]
        self.seconds["total"] = time.perf_counter() - self.started
        return Report(
            model=str(self.path),
            output=str(self.out) if self.out else None,
            version=version(),
            target=self.target.name,
            bits=self.options.bits,
            layers=layers,
            skipped=planned.skipped,
            notes=self.notes,
            warnings=self.warnings,
            options=dict(vars(self.options)),
            runtime={"onnxruntime": runtime.version(), "device": self.device, "opset": str(planned.prepared.opset)},
            samples={
                "source": self.calibration.source,
                "used": len(self.calibration),
                "held_back": len(self.held_back),
            },
            seconds={k: round(v, 3) for k, v in self.seconds.items()},
            peak_rss_mb=round(_peak_rss_mb(), 1),
            size={"before": self.source.size, "after": size} if size is not None else {},
            frontier=space.frontier(self.chosen) if space is not None and self.chosen is not None else [],
            activations=_activations(planned.activations, found) if found is not None else [],
            inputs=describe_inputs(self.calibration.arrays),
            **compared,
        )

    def _layer(
        self, layer: Layer, planned: Planned, space: Tradeoff | None, stage: int, found: Calibration | None
    ) -> LayerReport:
        grid = planned.grids[layer.name]
        how = form(layer, planned.activations)
        cost = None if space is None else space.sensitivity.cost(layer.name, grid.bits)
        basic = LayerReport(
            layer.name, layer.op, layer.weight_shape, grid.bits, _granularity(layer, grid), how, stage,
            input=layer.input, bytes_before=math.prod(layer.weight_shape) * (2 if self.half else 4),
            output_noise_db=None if cost is None else error_db(cost), slower=layer.name in planned.slower,
        )  # fmt: skip
        if found is None:
            return basic
        solution = found.solutions[layer.name]
        return replace(
            basic,
            error_db=error_db(solution.error),
            rtn_error_db=error_db(solution.rtn_error),
            seconds=round(found.layer_seconds.get(layer.name, 0.0), 4),
            bytes_after=self.stored.get(layer.name),
            kernel=self.kernels.get(layer.name),
        )


def _activations(plan: ActivationPlan, found: Calibration) -> list[ActivationReport]:
    """What was seen of each quantized activation, in graph order."""
    reports = []
    for name in plan.values:
        seen, grid = found.ranges.get(name), found.grids.get(name)
        if seen is not None and grid is not None and np.isfinite(seen.low):
            typical = seen.between(0.999)
            reports.append(
                ActivationReport(
                    name, seen.low, seen.high, *typical, float(grid.scale), int(grid.zero_point), grid.dtype
                )
            )
    return reports


def _lasting(options: Options) -> str:
    """The options that the written model depends on, by name: not how it was calibrated in which memory."""
    kept = {k: v for k, v in sorted(vars(options).items()) if k not in ("batch_size", "memory_gb")}
    return f"Options({', '.join(f'{k}={v!r}' for k, v in kept.items())})"


def _granularity(layer: Layer, grid: Grid) -> str:
    return "row" if isinstance(layer.kind, Gather) else grid.granularity


def _peak_rss_mb() -> float:
    """The most memory this process held, in MB; NaN where the system does not tell."""
    try:
        # getrusage's figure survives exec: a small run started by a large process would show the latter's
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def version() -> str:
    """The installed version of comq-onnx."""
    return metadata.version("comq-onnx")
