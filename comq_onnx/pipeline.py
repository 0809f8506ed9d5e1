"""Quantize a model from the start to the end: open, load samples, plan, choose bits, solve, write, evaluate, report."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
from typing_extensions import Unpack

from comq_onnx import workdir, workers
from comq_onnx.bits.choose import Chosen, choose_and_solve, choose_bits, has_choice, make_tradeoff
from comq_onnx.calibrate.integer_loss import without_lossy_integers
from comq_onnx.context import Context, Progress, silent
from comq_onnx.errors import OptionError, OutOfMemory
from comq_onnx.evaluate.evaluation import evaluate
from comq_onnx.model import pickled
from comq_onnx.model.files import check_output, private_directory, subdirectory, written
from comq_onnx.model.float_model import FloatModel, open_model
from comq_onnx.model.source import as_path
from comq_onnx.options.keywords import OptionKeywords
from comq_onnx.options.option import options_of
from comq_onnx.options.options import Options
from comq_onnx.options.spelling import command_line, differing
from comq_onnx.plan.faithful import prepare_faithfully
from comq_onnx.plan.forms import BLOCKS_OPSET
from comq_onnx.plan.make import make_plan
from comq_onnx.plan.nbits import note_on_forms
from comq_onnx.plan.plan import Plan
from comq_onnx.report.build import build_plan_report, build_report
from comq_onnx.report.report import Report
from comq_onnx.runtime import session
from comq_onnx.runtime.device import is_gpu
from comq_onnx.samples.dataset import Dataset, load_dataset
from comq_onnx.samples.inspection import Inspection, describe
from comq_onnx.samples.samples import Samples
from comq_onnx.write.check import warn_of_source
from comq_onnx.write.size import check_smaller

logger = logging.getLogger(__name__)

# batches get so many times smaller where memory does not suffice; each try starts from the beginning
SMALLER = 4
# a run that was cut off goes on only with these as they were: they may compute other bytes
VERSIONS = ("comq-onnx", "numpy", "scipy", "numba", "onnx", "onnx-ir", "onnxscript")
# the made-up samples of plain rounding: the model draws their tokens itself, which takes a run for each
FEW_SAMPLES = 8

Model = str | os.PathLike[str] | onnx.ModelProto | Any
SampleSource = str | os.PathLike[str] | Mapping[str, Any] | Samples | Any


def quantize(
    model: Model,
    out: str | os.PathLike[str] | None = None,
    samples: SampleSource = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[OptionKeywords],
) -> Report:
    """Quantize a model with COMQ and write the QDQ model.

    model: a path (of a file, or of a directory with one .onnx file), an onnx.ModelProto or an onnx-graphsurgeon Graph;
        it is never modified
    out: where the result is written; None keeps it in memory, for `Report.onnx_model`
    samples: a path, `Samples`, or arrays by input name, with the samples along the first axis; or a callable, a
        CalibrationDataReader, a DataLoader, a dataset or anything else that yields samples; None for synthetic ones
    progress: called with (what, done, total), where what is prepare, survey, sensitivity, stages, samples (within a
        stage), layers or compare; survey and stages count thousandths of the work
    options: the fields of `Options`

    Where memory does not suffice, smaller batches are tried.

    Raises ComqError: see comq_onnx.errors.
    """
    chosen = Options(**options)
    with private_directory() as work:
        path = as_path(model, work)
        # a folder of its own: the model may lie in this one under any name
        target = Path(out) if out is not None else subdirectory(work, "out") / "model.onnx"
        check_output(target, path)
        report = _quantize(path, target, samples, chosen, progress or silent)
        report = _named(replace(report, command=_command(model, out or "OUTPUT", samples, chosen)), model)
        if out is not None:
            return report
        if len(list(target.parent.iterdir())) > 1:
            raise OptionError("the result is too large to be kept in memory: give a path for it as `out`")
        return replace(report, output=None, in_memory=target.read_bytes())


def plan(model: Model, samples: SampleSource = None, **options: Unpack[OptionKeywords]) -> Report:
    """Return the layers, grids and stages that `quantize` would use, without calibrating.

    The report has no errors and no outputs.

    model, samples, options: as `quantize` takes them

    Raises ComqError: see comq_onnx.errors.
    """
    chosen = Options(**options)
    with private_directory() as work:
        report = _plan(as_path(model, work), samples, Context.of(chosen))
    return _named(replace(report, command=_command(model, None, samples, chosen)), model)


def inspect_samples(model: Model, samples: SampleSource = None, **options: Unpack[OptionKeywords]) -> Inspection:
    """Return what `quantize` would feed to the model, and what the float model gives for it, without calibrating.

    model, samples, options: as `quantize` takes them

    Raises ComqError: see comq_onnx.errors.
    """
    with private_directory() as work:
        context = Context.of(Options(**options))
        source = open_model(as_path(model, work), context)
        data = load_dataset(source, samples, context)
    notes, warnings = tuple(context.journal.notes), tuple(context.journal.warnings)
    return describe(data.calibration, len(data.held_back), data.first_outputs, notes, warnings)


def _planned(path: Path, samples: SampleSource, context: Context) -> tuple[FloatModel, Dataset, Plan, Context]:
    """Open the model at `path` and its samples, and plan how it is written; the context has what suits the model."""
    context = replace(context, options=_without_calibration(samples, context))
    source = open_model(path, context)
    data = load_dataset(source, samples, context)
    context = replace(context, options=replace(context.options, batch_size=data.batch_size))
    asked = context.options
    if data.is_of_decoder:
        context = replace(context, options=_for_decoder(context))
    prepared = prepare_faithfully(source, data, context)
    if prepared.opset < BLOCKS_OPSET and asked.granularity is None:
        context = replace(context, options=replace(context.options, granularity=None))
    planned = make_plan(source, prepared, data, context)
    planned = without_lossy_integers(planned, data, context)
    warn_of_source(planned.written.model, context)
    return source, data, planned, context


def _without_calibration(samples: SampleSource, context: Context) -> Options:
    """Return the options of plain rounding without samples: float activations, equal bits, a few samples to compare on.

    Those of other runs stay as they are. Raises OptionError for activations that are to be quantized.
    """
    options = context.options
    if options.solver != "rtn" or samples is not None:
        return options
    if options.activations not in ("auto", "none"):
        raise OptionError(
            f"--activations {options.activations}: the ranges of activations need samples, and --solver rtn was given "
            "none; give --calib, or --activations none"
        )
    context.journal.notes.append("without samples --solver rtn rounds the weights, and activations stay float")
    return replace(
        options, activations="none", uniform=options.fixed_bits is not None,
        max_samples=min(options.max_samples, FEW_SAMPLES),
    )  # fmt: skip


def _for_decoder(context: Context) -> Options:
    """Return the options of a run with what suits a decoder, and note what that is."""
    chosen = context.options.for_decoder()
    if chosen != context.options:
        context.journal.notes.append(
            "the model predicts the next token: chosen for speed one token at a time, --activations "
            f"{chosen.activations} --granularity {chosen.granularity or 'channel'}"
        )
    return chosen


def _run(path: Path, out: Path, samples: SampleSource, context: Context) -> Report:
    """Quantize the model at `path` to `out`, one stage after the other."""
    context.progress("prepare", 0, 1)
    with context.journal.timed("load"):
        source, data, planned, context = _planned(path, samples, context)
    context.progress("prepare", 1, 1)
    with _kept(source, data, context) as context, _crowd(context) as context:
        quantized = choose_and_solve(planned, source, data, context)
        context.journal.notes += note_on_forms(quantized.chosen.plan)
        # a file that does not load or run never gets the name of the output
        with (
            written(quantized.emitted.model, out, source.file.stamps) as (file, size),
            context.journal.timed("compare"),
        ):
            check_smaller(quantized.emitted, size, source, context)
            evaluation = evaluate(source, planned.written, file, data, context)
    return build_report(quantized, evaluation, source, data, context, out, size)


@contextlib.contextmanager
def _crowd(context: Context) -> Iterator[Context]:
    """Yield the context with the workers that the options name."""
    if context.options.workers is None:
        yield context
        return
    pickled.enable()
    with workers.opened(str(context.options.workers)) as crowd:
        if crowd.dashboard is not None:
            logger.info("what the %d workers do: %s", crowd.count, crowd.dashboard)
            context.journal.notes.append(f"what the workers did was shown at {crowd.dashboard}")
        yield replace(context, engine=crowd)


@contextlib.contextmanager
def _kept(source: FloatModel, data: Dataset, context: Context) -> Iterator[Context]:
    """Yield the context with the work directory that the options name; it is emptied when the run ends well."""
    if context.options.workdir is None:
        yield context
        return
    run = {
        "model": source.file.sha256,
        "samples": data.sha256,
        **what_lasts(context.options),
        "kind of device": "cuda" if is_gpu(context.device) else "cpu",
    }
    with workdir.opened(Path(context.options.workdir), run) as work:
        yield replace(context, workdir=work)
        context.journal.warnings += [f"{context.options.workdir}: {what}" for what in work.damaged]


def what_lasts(options: Options) -> dict[str, str]:
    """Return what the bytes of a result depend on beside model, samples and device, by what messages call it."""
    lasting = {f"--{o.name}": getattr(options, field) for field, o in options_of(options).items() if o.lasting}
    return {
        **{name: repr(value) for name, value in sorted(lasting.items())},
        "onnxruntime version": session.require().__version__,
        **{f"{package} version": metadata.version(package) for package in VERSIONS},
    }


def _plan(path: Path, samples: SampleSource, context: Context) -> Report:
    """Plan the quantization of the model at `path`."""
    with context.journal.timed("load"):
        source, data, planned, context = _planned(path, samples, context)
    options = context.options
    if samples is None and options.fixed_bits is not None and not options.sensitivity:
        if has_choice(planned, context):
            context.journal.notes.append(
                "without samples it cannot be told which layers gain most from more bits: shown with equal bits"
            )
        context.journal.notes += note_on_forms(planned)
        return build_plan_report(Chosen(planned), source, data, context)
    with _kept(source, data, context) as context:
        tradeoff = make_tradeoff(planned, source, data, context)
        chosen = choose_bits(planned, tradeoff, source, context)
        context.journal.notes += note_on_forms(chosen.plan)
        return build_plan_report(chosen, source, data, context)


# With less memory
# ----------------------------------------------------------------------------------------------------------------------


def _quantize(path: Path, out: Path, samples: SampleSource, asked: Options, progress: Progress) -> Report:
    """Quantize the model at `path` to `out`; where memory does not suffice, start again with options that take less."""
    options = asked
    while True:
        context = Context.of(options, progress)
        if options is not asked:
            disk = " and tensors between stages go by disk" if options.memory_gb != asked.memory_gb else ""
            context.journal.warnings.append(
                f"not enough memory for larger batches: {options.batch_size} samples run at once{disk}"
            )
        try:
            return _run(path, out, samples, context)
        except (OutOfMemory, MemoryError) as error:
            options = _with_less_memory(options, error, is_gpu(context.device))


def _with_less_memory(options: Options, error: Exception, on_gpu: bool) -> Options:
    """Return options that take less memory: smaller batches, then on a GPU nothing kept there between stages.

    Raises OutOfMemory where nothing is left to try.
    """
    if options.batch_size == 1 and on_gpu and options.memory_gb != 0:
        logger.info("not enough memory on the GPU: %s", error)
        return replace(options, memory_gb=0.0)
    if options.batch_size == 1:
        raise OutOfMemory(
            f"not enough memory, even for one sample at once ({str(error) or 'MemoryError'}): free some, or give fewer "
            "--samples or --memory 0"
        ) from error
    logger.info("not enough memory for batches of %d: %s", options.batch_size, error)
    return replace(options, batch_size=max(1, options.batch_size // SMALLER))


# The call in the report
# ----------------------------------------------------------------------------------------------------------------------


def _named(report: Report, model: Model) -> Report:
    """Give the report a name for a model that was passed in memory: the file that it was written to is gone."""
    return report if isinstance(model, (str, os.PathLike)) else replace(report, model="a model in memory")


def _command(model: Model, out: Any, samples: SampleSource, options: Options) -> str:
    """Return the command line that does the same, with MODEL and SAMPLES for what was passed in memory."""
    paths = (str, os.PathLike)
    calib = None if samples is None else str(samples) if isinstance(samples, paths) else "SAMPLES"
    return command_line(
        str(model) if isinstance(model, paths) else "MODEL", None if out is None else str(out), calib,
        differing(options),
    )  # fmt: skip
