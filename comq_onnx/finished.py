"""Keep the finished models of a queue in its work directory, so that none is quantized twice.

DIR/queue/          what the queue is of, and the report of each finished model (workdir.py)
DIR/files-0002/     the files of model 2, once it is finished
DIR/model-0003/     the state of the run of model 3, as `--workdir` keeps it for one model
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx import pipeline, workdir
from comq_onnx.errors import OptionError
from comq_onnx.model.source import load_source
from comq_onnx.options.options import Options
from comq_onnx.report.report import Report

_OURS = re.compile(r"queue|(files|model)-\d{4}")


@dataclass(frozen=True)
class Finished:
    """Keep the finished models of one queue.

    path: the directory
    work: keeps their reports
    """

    path: Path
    work: workdir.Workdir

    def of_model(self, place: int) -> str:
        """Return the work directory of a model that is under way; place: of the model in the queue."""
        return str(self.path / f"model-{place:04d}")

    def end(self, failed: bool) -> None:
        """Remove all that is kept, or where a model has failed nothing: the same call tries that one again."""
        self.work.stays = failed
        for path in () if failed else list(self.path.iterdir()):
            if path.name != "queue":
                shutil.rmtree(path, ignore_errors=True)

    def keep(self, place: int, source: Path, stage: Path, files: Sequence[Path], report: Report) -> None:
        """Keep a finished model; files: below `stage`. Raises OptionError where there is no room."""
        sums = {}
        try:
            for file in files:
                sums[str(file)] = _checksum(stage / file)
                _link(stage / file, self.path / f"files-{place:04d}" / file)
        except OSError as error:
            raise OptionError(
                f"--workdir {self.path}: a finished model cannot be kept ({error.strerror or error}); make room there"
            ) from error
        self.work.save(f"done-{place:04d}", 1, None, (load_source(source)[1].sha256, sums, report))

    def take(self, place: int, source: Path, stage: Path) -> Report | None:
        """Put a model that is finished into the folder `stage`, and return its report; None where it is not finished.

        Raises OptionError where the model was another one then.
        """
        found = self.work.load(f"done-{place:04d}")
        if found is None:
            return None
        sha256, sums, report = found[1]
        if load_source(source)[1].sha256 != sha256:
            raise OptionError(
                f"--workdir {self.path}: {source} has changed since it was quantized there; give another directory"
            )
        kept = self.path / f"files-{place:04d}"
        if not all((kept / file).is_file() and _checksum(kept / file) == known for file, known in sums.items()):
            return None
        for file in sums:
            _link(kept / file, stage / file)
        return report  # type: ignore[no-any-return]


@contextlib.contextmanager
def opened(options: Options, models: Sequence[Path], samples: Any) -> Iterator[Finished | None]:
    """Open the work directory that the options name, None where they name none.

    models, samples: what the queue is of

    Raises OptionError where the directory cannot be used, or is of something else.
    """
    if options.workdir is None:
        yield None
        return
    path = Path(options.workdir)
    run = {"models": repr([str(model) for model in models]), "samples": _told(samples), **pipeline.what_lasts(options)}
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        others = [p.name for p in path.iterdir() if not _OURS.fullmatch(p.name)]
    except OSError as error:
        raise OptionError(
            f"--workdir {path}: cannot be used ({error.strerror or error}); give another directory"
        ) from error
    if others:
        raise OptionError(
            f"--workdir {path}: holds {others[0]!r}, which is not of a run of several models; give an empty or a new "
            "directory"
        )
    with workdir.opened(path / "queue", run) as work:
        yield Finished(path, work)


def _told(samples: Any) -> str:
    """Return what tells samples from others: names, sizes and times of files, or the numbers of arrays.

    Other objects cannot be told apart before they are read: each model under way checks what it reads.
    """
    told = hashlib.sha256(str(type(samples)).encode())
    if isinstance(samples, (str, os.PathLike)):
        path = Path(samples)
        told.update(str(path).encode())
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                told.update(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    elif isinstance(samples, Mapping):
        for name, array in sorted(samples.items()):
            told.update(str(name).encode() + np.ascontiguousarray(array).tobytes())
    return told.hexdigest()


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 24):
            digest.update(part)
    return digest.hexdigest()


def _link(file: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk is another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
