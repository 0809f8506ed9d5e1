"""Run the command line in a folder of its own, and tell what it leaves there: shared by kills.py and its faults."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from _sandbox import Said, command_line

ROOT = Path(__file__).resolve().parents[2]
MODEL, SAMPLES = ROOT / "models" / "fashion_cnn.onnx", ROOT / "models" / "fashion_calib.npz"
# everything spills to disk, so that there is something to leave behind
OPTIONS = ("--samples", "48", "--effort", "fast", "--memory", "0", "--device", "cpu")
SECONDS = 600


@dataclass
class Place:
    """Hold one run's own folder: the model, samples, the output and a directory for temporary files."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """Return the path of the model."""
        return self.folder / "in" / "model.onnx"

    @property
    def samples(self) -> Path:
        """Return the path of the samples."""
        return self.folder / "in" / "samples.npz"

    @property
    def temporary(self) -> Path:
        """Return the directory for temporary files."""
        return self.folder / "tmp"

    @property
    def out(self) -> Path:
        """Return the path of the output."""
        return self.folder / "out" / "q.onnx"

    def command(self, *extra: object) -> list[str]:
        """Return the command line of a run."""
        arguments = [self.model, "--calib", self.samples, "-o", self.out, *OPTIONS, *extra]
        return [sys.executable, "-m", "comq_onnx", *map(str, arguments)]

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        """Begin a run in a process of its own."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary), **self.environment}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
            # a shell has jobs in the background ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def run(self, command: list[str]) -> Said:
        """Run a command to its end."""
        process = self.start(command)
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Said(-1, "", f"no end after {SECONDS} s")
        return Said(process.returncode, out, err)

    def fork(self) -> BaseProcess:
        """Begin a run in a process that has everything imported."""
        process = multiprocessing.get_context("fork").Process(target=self._inside)
        process.start()
        return process

    def _inside(self) -> None:
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.temporary)
        said = command_line(*self.command()[3:])
        self.said.write_text(said.err)
        os._exit(said.code)

    @property
    def said(self) -> Path:
        """Return the path to which a forked run writes its error messages."""
        return self.folder / "said.txt"

    def left(self) -> list[str]:
        """List the files beside the inputs and the output."""
        found = [*self.out.parent.iterdir(), *self.temporary.iterdir()] if self.out.parent.is_dir() else []
        return sorted(str(p.relative_to(self.folder)) for p in found if p != self.out)


@contextmanager
def place() -> Iterator[Place]:
    """Make a fresh place, with a copy of the model and of the samples."""
    with tempfile.TemporaryDirectory() as work:
        made = Place(Path(work))
        for name in ("in", "tmp", "out"):
            (made.folder / name).mkdir()
        shutil.copy(MODEL, made.model)
        shutil.copy(SAMPLES, made.samples)
        yield made


def digest(path: Path) -> str | None:
    """Compute the SHA-256 of a file; None where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
