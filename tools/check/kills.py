"""Kill comq-onnx at random moments, make everything around it fail, and look at what is left.

    python tools/check/kills.py [--kills 50] [--seed 0] [--faults WORDS | --no-faults]

Kills: a run is killed (SIGKILL) at a random moment of the processor time that a whole run takes; that time is the same
however busy the machine is. The run is a forked process that has everything imported, since only after that is anything
written to disk. Afterwards the source must have its bytes, and the output must be absent or complete (the bytes of an
undisturbed run). Nothing else may be left but private work directories, and a new run in the same place must remove
those and give the same bytes.

Faults: full disks, directories that cannot be written, files that vanish or are damaged between two steps, too little
memory, signals. Each must end in one clear line with nothing left, or in the right bytes. Full and read-only disks are
small mounts, and permissions bind root only without its capabilities: where mount or setpriv are missing, those faults
are skipped, and the table says so.

It prints one table of the kills and one of the faults. The exit code is 1 where anything else happened.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import click
import numpy as np
from _faults import FAULTS, check
from _place import digest, place
from _sandbox import quickly, table


def kill_at(moment: float, wanted: str) -> str:
    """Kill a run after `moment` seconds of processor time; tell what is wrong afterwards, or how far it was."""
    with place() as here:
        before = digest(here.model), digest(here.samples)
        process = here.fork()
        while process.is_alive() and _processor_seconds(process) < moment:
            time.sleep(0.002)
        process.kill()
        process.join()
        if (digest(here.model), digest(here.samples)) != before:
            return "wrong: the source has other bytes"
        if digest(here.out) not in (None, wanted):
            return "wrong: a partial output"
        left = [here.folder / name for name in here.left()]
        if bad := [p.name for p in left if not p.name.startswith(".comq-") or p.stat().st_mode & 0o77]:
            return f"wrong: {bad} left, or readable by others"
        for directory in left:  # as if they had lain for a while
            os.utime(directory, (0, 0))
        done = "finished" if digest(here.out) else "work left" if left else "nothing left"
        process = here.fork()
        process.join()
        if process.exitcode or digest(here.out) != wanted:
            return f"wrong: a new run ends with {process.exitcode} {here.said.read_text()}"
        if here.left():
            return f"wrong: {here.left()} left after a new run"
        return done


def _processor_seconds(process: BaseProcess) -> float:
    """Return the processor time that a process has taken so far."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it is over
        return float("inf")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@click.command()
@click.option("--kills", default=50, show_default=True, help="How many runs are killed.")
@click.option("--seed", default=0, show_default=True, help="Another seed gives other moments.")
@click.option("--faults", metavar="WORDS", default="", help="Only the faults whose name holds this.")
@click.option("--no-faults", is_flag=True, help="Only kill.")
def main(kills: int, seed: int, faults: str, no_faults: bool) -> None:
    """Kill comq-onnx and make everything around it fail."""
    failed = False
    if kills:
        failed = not _kill(kills, seed)
    rows = []
    for fault in FAULTS:
        if faults in fault.name and not no_faults:
            found = check(fault)
            click.echo(f"{fault.name}: {found}", err=True)
            failed |= found.startswith("wrong")
            rows.append((fault.name, found.replace("|", "/").replace("\n", " ")))
    if rows:
        click.echo(table(("fault", "what came of it"), rows))
    sys.exit(failed)


def _kill(kills: int, seed: int) -> bool:
    quickly()
    with place() as here:
        said = here.run(here.command())
        wanted = digest(here.out)
        if said.code or wanted is None:
            click.echo(f"an undisturbed run fails: {said.err}", err=True)
            return False
    with place() as here:
        before = _children_seconds()
        here.fork().join()
        whole = _children_seconds() - before
    found = []
    for number, moment in enumerate(np.random.default_rng(seed).uniform(0, 1.05 * whole, kills), 1):
        found.append(kill_at(moment, wanted))
        click.echo(f"kill {number} at {moment:.2f} s: {found[-1]}", err=True)
    kinds = ("nothing left", "work left", "finished")
    counts = [(f"killed, {kind}" if kind != "finished" else "was done before", found.count(kind)) for kind in kinds]
    wrong = sum(f not in kinds for f in found)
    click.echo(f"{kills} kills within {1.05 * whole:.1f} s of processor time\n")
    click.echo(table(("what", "runs"), [*counts, ("anything else", wrong)]) + "\n")
    return not wrong


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
