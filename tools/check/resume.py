"""Kill comq-onnx at random moments, and let the same command go on from its work directory.

    python tools/check/resume.py [FOLDER ...] [--kills 6] [--seed 0] [--bits 4]

A folder has a model.onnx and its calib.npz; without any, the models of the repository are taken. Each model is
quantized once undisturbed, with a work directory and without. Then, for each kill, a run is killed (SIGKILL) at a
random moment of the seconds that a whole run takes, and the same command runs again. It must end with the bytes of the
undisturbed run, go on from the last state that was on the disk, and leave the work directory empty. The exit code is 1
where anything else happened.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from _place import digest
from _sandbox import table

MODELS = Path(__file__).resolve().parents[2] / "models"
# what the next run says of the state that it goes on from
WENT_ON = re.compile(r"went on after stage (\d+) of")


@dataclass(frozen=True)
class Subject:
    """Hold a model, and how it is quantized."""

    name: str
    model: Path
    samples: Path
    bits: int

    def start(self, out: Path, work: Path | None = None) -> subprocess.Popen[str]:
        """Start the command."""
        command = [sys.executable, "-m", "comq_onnx", str(self.model), "--calib", str(self.samples)]
        command += ["--bits", str(self.bits), "--device", "cpu", "-o", str(out)]
        if work is not None:
            command += ["--workdir", str(work)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(subject: Subject, out: Path, work: Path | None = None) -> tuple[int, str, float]:
    """Run the command to its end: the exit code, what it said, and the seconds that it took."""
    begun = time.perf_counter()
    process = subject.start(out, work)
    said = process.communicate()[0]
    return process.returncode, said, time.perf_counter() - begun


def kill_at(subject: Subject, moment: float, wanted: str, folder: Path) -> str:
    """Kill a run after `moment` seconds and run it again; tell what is wrong then, or how far it was."""
    out, work = folder / "q.onnx", folder / "work"
    out.unlink(missing_ok=True)
    process = subject.start(out, work)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    if digest(out) not in (None, wanted):
        return "wrong: a partial output"
    steps = {p.name.split(".")[0]: int(p.name.split(".")[1]) for p in sorted(work.glob("*.state"))}
    code, said, _ = run(subject, out, work)
    if code or digest(out) != wanted:
        return f"wrong: the next run ends with {code}, other bytes: {said[-500:]}"
    if list(work.iterdir()):
        return f"wrong: {[p.name for p in work.iterdir()]} left in the work directory"
    found = [int(done) for done in WENT_ON.findall(said)]
    if sorted(found) != sorted(steps.values()):
        return f"wrong: it went on from {found}, there was {steps}"
    parts = [f"{name.split('-')[0]} {step}" for name, step in steps.items()]
    return f"went on from {', '.join(parts)}" if parts else "began again"


@click.command()
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--kills", default=6, show_default=True, help="How many runs of each model are killed.")
@click.option("--seed", default=0, show_default=True, help="Another seed gives other moments.")
@click.option("--bits", default=4, show_default=True, help="Bits of a weight.")
def main(folders: tuple[Path, ...], kills: int, seed: int, bits: int) -> None:
    """Kill comq-onnx at random moments, and let the same command go on."""
    subjects = [Subject(f.name, f / "model.onnx", f / "calib.npz", bits) for f in folders] or [
        Subject(p.stem, p, p.with_name("fashion_calib.npz"), bits) for p in sorted(MODELS.glob("*.onnx"))
    ]
    rng, rows, failed = np.random.default_rng(seed), [], False
    for subject in subjects:
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            plain, kept = folder / "plain.onnx", folder / "kept.onnx"
            codes = [run(subject, plain)[0], (last := run(subject, kept, folder / "work"))[0]]
            wanted = digest(plain)
            if any(codes) or wanted is None or digest(kept) != wanted:
                raise click.ClickException(f"{subject.name}: undisturbed runs end with {codes}: {last[1]}")
            for moment in rng.uniform(0, last[2], kills):
                found = kill_at(subject, float(moment), wanted, folder)
                failed |= found.startswith("wrong")
                rows.append((subject.name, f"{moment:.1f} of {last[2]:.1f} s", found))
                click.echo(f"{subject.name}, killed after {moment:.1f} s: {found}", err=True)
    click.echo(table(("model", "killed after", "the next run"), rows))
    sys.exit(failed)


if __name__ == "__main__":
    main()
