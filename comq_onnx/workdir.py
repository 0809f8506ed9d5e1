"""Keep the state of a run in a directory, so that a run that was cut off goes on where it was.

    DIR/run.json            what the run is of: a run of something else is refused
    DIR/NAME.0007.state     the state of one part of the run after its step 7; that of step 6 stays beside it
    DIR/12.npy              an array that some state has

A state is written beside its name and renamed once it is on the disk, arrays before the states that have them: what has
its name is whole. Arrays that a later state still has are not written again, and are mapped when they
are read. States are pickles: a directory that
others can write to must not be used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import pickle
import re
import shutil
import weakref
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx.errors import OptionError

logger = logging.getLogger(__name__)

RUN = "run.json"
_OURS = re.compile(r"run\.json|[\w.-]+\.state|\d+\.npy|[\w.-]+\.part")
# smaller arrays are in the state itself
LEAST_BYTES = 1 << 14
# so many states of a part are kept: where the last one is damaged, the run goes on from the one before
GENERATIONS = 2


@dataclass
class Workdir:
    """Keep states in a directory.

    path: the directory
    damaged: what could not be read, for the report
    stays: what is kept stays when the run ends well, too
    """

    path: Path
    damaged: list[str] = field(default_factory=list)
    stays: bool = False
    _arrays: dict[int, tuple[weakref.ref[Any], str]] = field(default_factory=dict, init=False)
    _sums: dict[str, int] = field(default_factory=dict, init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Give new arrays other names than those that are here."""
        self._count = max((int(path.stem) for path in self.path.glob("*.npy")), default=0)

    def save(self, name: str, step: int, fixed: object, changing: object) -> None:
        """Keep the state of a part after a step.

        name: of letters, digits and dashes
        fixed: values whose arrays nothing changes: what is here of them is not written again, and arrays that are one
            are one again when they are read
        changing: values that change from step to step

        Raises OptionError where it cannot be written.
        """
        try:
            held: set[str] = set()
            buffer = io.BytesIO()
            _Pickler(buffer, lambda array: self._keep(array, held)).dump(fixed)
            pickle.dump(changing, buffer, protocol=5)
            content = buffer.getvalue()
            head = {"arrays": {one: self._sums[one] for one in sorted(held)}, "crc": zlib.crc32(content)}
            self._write(f"{name}.{step:04d}.state", json.dumps(head).encode(), b"\n", content)
            for old in self._states(name)[:-GENERATIONS]:
                old.unlink()
            self._remove_idle()
        except OSError as error:
            raise OptionError(
                f"--workdir {self.path}: the state of the run cannot be written ({error.strerror or error}); the last "
                "one is whole: make room there and run the same command again"
            ) from error

    def load(self, name: str) -> tuple[Any, Any] | None:
        """Return the last state of a part that is whole, what is fixed and what changes; None where there is none."""
        for path in reversed(self._states(name)):
            try:
                head, content = path.read_bytes().split(b"\n", 1)
                told = json.loads(head)
                if zlib.crc32(content) != told["crc"]:
                    raise ValueError("its numbers are not those that were written")
                self._sums.update(told["arrays"])
                buffer = io.BytesIO(content)
                return _Unpickler(buffer, self._read).load(), pickle.load(buffer)
            except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
                logger.info("%s: %s", path, error)
                self.damaged.append(f"{path.name} is damaged ({error})")
                path.unlink(missing_ok=True)
        return None

    def check_room(self, needed: int) -> None:
        """Make sure that the disk has `needed` bytes free. Raises OptionError."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OptionError(
                f"--workdir {self.path}: {needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free; make "
                "room, give another directory, or fewer --samples"
            )

    def empty(self) -> None:
        """Remove all that runs have left here."""
        for path in self.path.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _states(self, name: str) -> list[Path]:
        """Return the states of a part, in the order of their steps."""
        return sorted(self.path.glob(f"{name}.[0-9][0-9][0-9][0-9].state"))

    def _keep(self, array: np.ndarray[Any, Any], held: set[str]) -> str:
        """Write an array unless it is here, and return its name; held: the names of all arrays of the state."""
        known = self._arrays.get(id(array))
        if known is None or known[0]() is not array:
            self._count += 1
            name = f"{self._count}.npy"
            content = io.BytesIO()
            np.save(content, np.asarray(array), allow_pickle=False)
            self._write(name, content.getbuffer())
            self._sums[name] = zlib.crc32(content.getbuffer())
            known = self._arrays[id(array)] = weakref.ref(array), name
        held.add(known[1])
        return known[1]

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        """Return the array of a name, the same object each time as long as it lives."""
        for found, its in self._arrays.values():
            if its == name and (living := found()) is not None:
                return living  # type: ignore[no-any-return]
        if _checksum(self.path / name) != self._sums[name]:
            raise ValueError(f"the numbers of {name} are not those that were written")
        array: np.ndarray[Any, Any] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        self._arrays[id(array)] = weakref.ref(array), name
        return array

    def _write(self, name: str, *parts: bytes | memoryview) -> None:
        """Write a file that has its name only when all of it is on the disk."""
        part = self.path / f"{name}.part"
        with part.open("wb") as file:
            for one in parts:
                file.write(one)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path / name)
        if hasattr(os, "O_DIRECTORY"):
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def _remove_idle(self) -> None:
        """Remove arrays that no state has, and what is not whole."""
        held: set[str] = set()
        for path in self.path.glob("*.state"):
            with path.open("rb") as file:
                held.update(json.loads(file.readline())["arrays"])
        for path in self.path.iterdir():
            if path.suffix == ".part" or (path.suffix == ".npy" and path.name not in held):
                path.unlink(missing_ok=True)
        self._arrays = {key: kept for key, kept in self._arrays.items() if kept[1] in held}


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 24):
            found = zlib.crc32(part, found)
    return found


class _Pickler(pickle.Pickler):
    """Pickle all but large arrays, for which names are written."""

    def __init__(self, file: io.BytesIO, keep: Any) -> None:
        super().__init__(file, protocol=5)
        self._keep = keep

    def persistent_id(self, obj: Any) -> str | None:
        """Return the name of a large array; None for anything else."""
        large = isinstance(obj, np.ndarray) and obj.nbytes >= LEAST_BYTES and obj.dtype != object
        return self._keep(obj) if large else None


class _Unpickler(pickle.Unpickler):
    """Read what `_Pickler` wrote."""

    def __init__(self, file: io.BytesIO, read: Any) -> None:
        super().__init__(file)
        self._read = read

    def persistent_load(self, pid: Any) -> Any:
        """Return the array of a name."""
        return self._read(pid)


@contextlib.contextmanager
def opened(path: Path, run: Mapping[str, str]) -> Iterator[Workdir]:
    """Open a directory for the states of a run, and empty it when the block ends well, unless it stays.

    run: what tells this run from others, by what it is called in messages

    Raises OptionError where the directory cannot be used, holds other files, or is of another run or one under way.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        others = [p.name for p in path.iterdir() if not _OURS.fullmatch(p.name)]
        if others:
            raise OptionError(
                f"--workdir {path}: holds {others[0]!r}, which is not of a run; give an empty or a new directory"
            )
        lock = hold(path)
    except OSError as error:
        raise OptionError(
            f"--workdir {path}: cannot be used ({error.strerror or error}); give another directory"
        ) from error
    if lock is None and has_locks():
        raise OptionError(f"--workdir {path}: another run uses it now; wait for its end or give another directory")
    try:
        work = Workdir(path)
        _check_run(work, run)
        yield work
        if not work.stays:
            work.empty()
    finally:
        if lock is not None:
            os.close(lock)


def _check_run(work: Workdir, run: Mapping[str, str]) -> None:
    """Make sure that what a directory holds is of this run. Raises OptionError."""
    file = work.path / RUN
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        before = None
    except (OSError, ValueError) as error:
        work.damaged.append(f"{RUN} is damaged ({error})")
        before = None
    if before is None:
        work.empty()
        work._write(RUN, json.dumps(dict(run), indent=1).encode())
    elif before != run:
        what = [name for name in {**before, **run} if before.get(name) != run.get(name)]
        raise OptionError(
            f"--workdir {work.path}: holds a run with other {' and '.join(what)}; run that command again to end it, or "
            "give another directory"
        )


def has_locks() -> bool:
    """Tell whether directories can be locked on this system."""
    return importlib.util.find_spec("fcntl") is not None


def hold(directory: Path) -> int | None:
    """Lock a directory for as long as this process lives, and return the descriptor that holds the lock.

    None where it is locked already, or cannot be locked.
    """
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
