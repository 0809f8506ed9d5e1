"""Quantize several models in one call: all models of folders as language models are published, or a list of files.

A folder goes to a folder that the same readers open: configurations, tokenizers and whatever else lies beside the
models is copied. Models keep their names, as ONNX Runtime GenAI wants it; where they lie in `onnx/`, as on the Hugging
Face hub, they get the names that transformers.js looks for, and descriptions (hub.py).

All is made in a folder of its own beside the output, and moves when the last model is done: a run that is stopped
leaves nothing. A model that fails does not stop the others, and nothing of it is written.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from comq_onnx import chained, finished, hub, pipeline
from comq_onnx.context import Progress, silent
from comq_onnx.errors import (
    ComqError,
    InternalError,
    ModelError,
    NothingToQuantize,
    OptionError,
    OutOfMemory,
    SamplesError,
)
from comq_onnx.model.files import data_names, private_directory, subdirectory
from comq_onnx.model.source import data_files
from comq_onnx.options.keywords import OptionKeywords
from comq_onnx.options.options import Options
from comq_onnx.options.samples import PICTURE_OPTIONS, TEXT_OPTIONS
from comq_onnx.report.report import Report
from comq_onnx.report.several import Run
from comq_onnx.runtime import memory
from comq_onnx.samples.samples import Samples

logger = logging.getLogger(__name__)

SAMPLE_OPTIONS = frozenset({*PICTURE_OPTIONS, *TEXT_OPTIONS})
# the same model in other formats: not copied
_OTHER_WEIGHTS = frozenset(
    {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".ot", ".pt", ".pth", ".safetensors", ".tflite"}
)
# files with all samples of a model
_OF_ONE = frozenset({".npz", ".npy", ".txt", ".jsonl"})


@dataclass(frozen=True)
class Job:
    """Pair a model with what becomes of it.

    source: its file
    target: the quantized model, below the output
    data: the files of its external data
    folder: the place below the output of what is copied with it
    error: why it cannot be read; None where it can
    """

    source: Path
    target: Path
    data: frozenset[Path] = frozenset()
    folder: Path = Path()
    error: ComqError | None = None

    @property
    def written(self) -> list[Path]:
        """Return the files that may be written, below the output; external data has a file beside its model."""
        return [self.target, *map(self.target.with_name, data_names(self.target))]


@dataclass(frozen=True)
class Queue:
    """Hold what one call quantizes and copies.

    jobs: the models
    copies: the files that are copied, by their place below the output
    """

    jobs: tuple[Job, ...]
    copies: Mapping[Path, Path] = field(default_factory=dict)

    @property
    def sources(self) -> set[Path]:
        """Return the files of all models."""
        return {path for job in self.jobs for path in (job.source, *job.data)}

    @property
    def targets(self) -> list[Path]:
        """Return the files that may be written, below the output."""
        return [*(path for job in self.jobs for path in job.written), *self.copies]


@dataclass(frozen=True)
class Done:
    """Hold what became of one model.

    source, output: its file, and the one that was written; output is None where the model failed
    report: of its quantization; None where it failed, or was copied as it is
    reason: why it was copied
    error: why it failed; None where it did not
    """

    source: Path
    output: Path | None
    report: Report | None
    reason: str = ""
    error: ComqError | None = None

    @property
    def named_error(self) -> str:
        """Return the error with the name of the model, which may be in it already; "" where there is none."""
        said = "" if self.error is None else str(self.error)
        return said if not said or str(self.source) in said else f"{self.source}: {said}"


def as_runs(done: Sequence[Done]) -> list[Run]:
    """Return what became of models as runs that can be compared."""
    return [
        Run(
            str(one.output or one.source), one.report, failed=one.error is not None,
            said=one.reason if one.error is None else str(one.error).removeprefix(f"{one.source}: "),
        )
        for one in done
    ]  # fmt: skip


def quantize_all(
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    samples: pipeline.SampleSource = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[OptionKeywords],
) -> list[Done]:
    """Quantize all models of folders and files into one folder, with all files that lie beside them in the folders.

    models: files and folders. The content of a single folder goes into `out` itself, of several into folders there
    out: the folder; what it holds already stays, but for files of the same names
    samples, progress, options: as `quantize` takes them; of a folder of samples a model takes what has its name, such
        as `text_model.txt`. progress is called with models, too. With `workdir`, models that are finished are not
        quantized again when the same call is made once more

    A model that reads what another one of its folder gives is calibrated on that: see chained.py.
    A model that has no layer to quantize is copied. One that fails does not stop the others: its `Done` has the error.
    Raises ComqError for what concerns all models; then nothing is written.
    """
    tell = progress or silent
    folder, sources = Path(out), [Path(model) for model in models]
    chosen = Options(**options)
    queue = _check_places(find_queue(sources, folder, chosen), folder)
    links = chained.find_links([job.source for job in queue.jobs if job.error is None])
    queue = replace(queue, jobs=tuple(sorted(queue.jobs, key=lambda job: chained.depth(job.source, links))))
    own = samples_by_name(queue, samples, links)

    with private_directory(folder.absolute().parent) as work, finished.opened(chosen, sources, samples) as kept:
        stage, done = subdirectory(work, "out"), []
        made: dict[Path, Path] = {}

        @functools.cache
        def samples_of(model: Path) -> Samples:
            if model in own or model not in links:
                return chained.first_samples(model, own.get(model, samples), chosen)
            before = links[model].before
            return chained.make_samples(model, links[model], samples_of(before), made.get(before))

        def quantize(model: Path, target: Path, more: Mapping[str, Any]) -> Report:
            given, asked = own.get(model, samples), {**options, **more}
            if model in links and model not in own and not _needs_no_samples(links[model], given, chosen):
                given = samples_of(model)
                asked = {name: value for name, value in asked.items() if name not in SAMPLE_OPTIONS}
            return pipeline.quantize(model, target, given, progress=progress, **asked)

        for i, job in enumerate(queue.jobs):
            tell("models", i, len(queue.jobs))
            memory.forget_peak()
            done.append(_run(job, i, stage, folder, kept, quantize))
            if done[-1].report is not None:
                made[job.source] = stage / job.target
        tell("models", len(queue.jobs), len(queue.jobs))
        whole = [job.folder for job, one in zip(queue.jobs, done, strict=True) if one.error is None]
        if whole:
            _copy({t: s for t, s in queue.copies.items() if any(t.is_relative_to(f) for f in whole)}, stage)
            _describe(queue, done, stage, folder)
            _move(stage, folder)
        if kept is not None:
            kept.end(failed=len(whole) < len(done))
    return done


def _needs_no_samples(link: chained.Link, samples: pipeline.SampleSource, options: Options) -> bool:
    """Tell whether no samples need be made for a model behind another one: they are given, or none are used."""
    return chained.gives(samples, link.reads) or (samples is None and options.solver == "rtn")


# What there is to do
# ----------------------------------------------------------------------------------------------------------------------


def find_queue(models: Sequence[Path], out: Path, options: Options) -> Queue:
    """List the models of files and folders, and what is copied with them.

    Raises ModelError where there is none, OptionError for what cannot be the folder `out`.
    """
    if out.suffix == ".onnx" or (out.exists() and not out.is_dir()):
        raise OptionError(f"-o {out}: is a file; the models of a folder, or several ones, go to a folder")
    if not out.absolute().parent.is_dir():
        raise OptionError(f"-o {out}: no such directory as {out.parent}; make it first")
    jobs: list[Job] = []
    copies: dict[Path, Path] = {}
    for path in models:
        if path.is_dir():
            found = _of_folder(path, out, options)
            # several folders have files of the same names
            below = Path() if len(models) == 1 else Path(path.resolve().name)
            jobs += [replace(job, target=below / job.target, folder=below) for job in found.jobs]
            copies |= {below / target: source for target, source in found.copies.items()}
        elif path.is_file():
            jobs.append(replace(_job(path, path.parent, options), target=Path(path.name), folder=Path(path.name)))
        else:
            raise ModelError(f"{path}: no such file or folder; give ONNX models, or folders of them")
    queue = Queue(tuple(jobs), copies)
    twice = [path for path, count in Counter(queue.targets).items() if count > 1]
    if twice:
        raise OptionError(f"two of the models would become {out / twice[0]}; quantize one of them by a call of its own")
    return queue


def samples_by_name(
    queue: Queue, samples: pipeline.SampleSource, links: Mapping[Path, chained.Link]
) -> dict[Path, Path]:
    """Return what each of several models takes of a folder of samples: a folder or a file of its name.

    Models that read what others give need none.
    Nothing where no model finds such samples: then each takes all of them. Raises SamplesError where only some do.
    """
    if len(queue.jobs) == 1 or not isinstance(samples, (str, os.PathLike)) or not Path(samples).is_dir():
        return {}
    named = {p.name if p.is_dir() else p.stem: p for p in Path(samples).iterdir() if p.is_dir() or p.suffix in _OF_ONE}
    found = {job.source: named[job.source.stem] for job in queue.jobs if job.source.stem in named}
    without = sorted({job.source.stem for job in queue.jobs if job.source not in {*found, *links}})
    if found and without:
        raise SamplesError(
            f"{samples}: has samples for {', '.join(sorted({path.stem for path in found}))}, none for "
            f"{', '.join(without)}; add a file or a folder of that name, such as {without[0]}.npz"
        )
    return found


def _of_folder(folder: Path, out: Path, options: Options) -> Queue:
    """List the models of a folder, without what an earlier call made of them, and the files beside them."""
    root, made = folder.resolve(), out.resolve()
    inside = made != root and made.is_relative_to(root)
    files = [path for path in _files(folder) if not (inside and path.resolve().is_relative_to(made))]
    every = [path for path in files if path.suffix.lower() == ".onnx"]
    stems = {path.with_suffix("") for path in every}
    models = [
        p for p in every if not hub.VARIANT.search(p.stem) or p.with_name(hub.VARIANT.sub("", p.stem)) not in stems
    ]
    if not models:
        raise ModelError(f"{folder}: holds no .onnx file; give an ONNX model, or a folder with one")
    jobs = [_job(path, folder, options) for path in models]
    data = {path for job in jobs for path in job.data}
    copies = {
        path.relative_to(folder): path
        for path in files
        if path not in data
        and path.suffix.lower() not in _OTHER_WEIGHTS
        and not any(path.name.startswith(model.name) and path.parent == model.parent for model in every)
    }
    return Queue(tuple(jobs), copies)


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of those below it, without hidden ones such as .git."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _job(path: Path, folder: Path, options: Options) -> Job:
    """Look at a model of a folder: where it goes, which other files it has, and whether it can be read."""
    place = path.relative_to(folder)
    if hub.is_of_hub(place):
        place = place.with_name(f"{place.stem}_{hub.ending(options.fixed_bits, options.float16)}.onnx")
    try:
        return Job(path, place, frozenset(data_files(path)))
    except ModelError as error:
        return Job(path, place, error=error)


def _check_places(queue: Queue, out: Path) -> Queue:
    """Make sure that nothing of the sources is overwritten, and return the queue without copies of files to themselves.

    Raises OptionError.
    """
    given = {path.resolve() for path in (*queue.sources, *queue.copies.values())}
    kept = {target: source for target, source in queue.copies.items() if (out / target).resolve() != source.resolve()}
    for target in replace(queue, copies=kept).targets:
        if (out / target).resolve() in given:
            raise OptionError(f"-o {out}: {target} would overwrite a file of the source; choose another folder")
    return replace(queue, copies=kept)


# Doing it
# ----------------------------------------------------------------------------------------------------------------------


def _run(
    job: Job, place: int, stage: Path, out: Path, kept: finished.Finished | None,
    quantize: Callable[[Path, Path, Mapping[str, Any]], Report],
) -> Done:  # fmt: skip
    """Quantize one model into the folder `stage`; or copy it where it has no layer to quantize.

    place: of the model in the queue
    kept: models that are finished
    quantize: is called with the paths of the model and of the result, and with more options
    """
    try:
        if job.error is not None:
            raise job.error
        report = kept.take(place, job.source, stage) if kept is not None else None
        if report is None:
            report = _quantized(job, stage, out, quantize, None if kept is None else kept.of_model(place))
            if kept is not None:
                kept.keep(place, job.source, stage, [p for p in job.written if (stage / p).is_file()], report)
        return Done(job.source, out / job.target, report)
    except NothingToQuantize as error:
        return _copied(job, stage, out, str(error))
    except Exception as error:
        return _failed(job, stage, error)


def _quantized(
    job: Job, stage: Path, out: Path, quantize: Callable[[Path, Path, Mapping[str, Any]], Report], workdir: str | None
) -> Report:
    """Quantize a model into the folder `stage`, and return its report with the names that the files get in the end."""
    staged, final = stage / job.target, out / job.target
    staged.parent.mkdir(parents=True, exist_ok=True)
    report = quantize(job.source, staged, {} if workdir is None else {"workdir": workdir})
    command = report.command.replace(str(staged), str(final))
    if workdir is not None:
        # of the run of several models: one alone needs none
        command = command.replace(f" --workdir {shlex.quote(workdir)}", "")
    return replace(report, output=str(final), command=command)


def _copied(job: Job, stage: Path, out: Path, reason: str) -> Done:
    """Copy a model that has no layer to quantize into the folder `stage`."""
    beside = {job.target.parent / path.relative_to(job.source.parent): path for path in job.data}
    try:
        _copy({job.target: job.source, **beside}, stage)
    except OptionError as error:
        return _failed(job, stage, error)
    return Done(job.source, out / job.target, None, reason)


def _failed(job: Job, stage: Path, error: Exception) -> Done:
    """Remove what a model that failed has left in the folder `stage`."""
    for path in job.written:
        (stage / path).unlink(missing_ok=True)
    folder = (stage / job.target).parent
    with contextlib.suppress(OSError):
        while folder != stage:
            folder.rmdir()
            folder = folder.parent
    return Done(job.source, None, None, error=_foreseen(error))


def _foreseen(error: Exception) -> ComqError:
    """Return an error of one model as one that is told in one line."""
    if isinstance(error, ComqError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory("out of memory; try a smaller --batch-size, fewer --samples, or --memory")
    if isinstance(error, OSError):
        return OptionError(f"{error}; free some space, or check the permissions")
    logger.info("unforeseen", exc_info=error)
    return InternalError(f"{type(error).__name__}: {error}; a fault of comq-onnx: -v shows where, please report it")


def _copy(copies: Mapping[Path, Path], folder: Path) -> None:
    """Copy files into a folder; copies: by their place in it. Raises OptionError."""
    for target, source in copies.items():
        try:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / target)
        except OSError as error:
            raise OptionError(f"cannot copy {source} ({error.strerror or error}); nothing was written") from error


def _describe(queue: Queue, done: Sequence[Done], stage: Path, out: Path) -> None:
    """Write into each folder of the folder `stage` what its quantized models are. Raises OptionError."""
    made: dict[Path, list[hub.Made]] = {}
    for job, one in zip(queue.jobs, done, strict=True):
        if one.report is not None and job.folder != job.target:
            made.setdefault(job.folder, []).append(hub.Made(job.target.relative_to(job.folder), one.report))
    for folder, models in made.items():
        hub.describe(models, stage / folder, out / folder)


def _move(stage: Path, out: Path) -> None:
    """Give a finished folder its name, or move its files into the folder that is there. Raises OptionError."""
    try:
        if not out.exists():
            os.replace(stage, out)
            return
        # models last: what opens one finds all that belongs to it
        for path in sorted((p for p in stage.rglob("*") if p.is_file()), key=lambda p: p.suffix == ".onnx"):
            target = out / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    except OSError as error:
        raise OptionError(f"-o {out}: cannot be written ({error.strerror or error}); choose another folder") from error
