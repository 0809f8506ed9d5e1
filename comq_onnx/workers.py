"""Run tasks on Dask workers: processes of this machine, or a cluster with a scheduler.

A value stays on the worker where it was made until another one needs it. A worker that dies takes its values with it:
the scheduler has the tasks that made them and runs those again, from the samples on. So tasks are pure, and values of
the caller are tasks too, not data that one worker holds.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import importlib.util
import logging
import platform
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import numba

from comq_onnx.engine import Embedded
from comq_onnx.errors import ComqError, OptionError, RuntimeFailure
from comq_onnx.runtime import session
from comq_onnx.solve.parallel import single_threaded_blas

logger = logging.getLogger(__name__)

# the packages that may compute other bytes in another version
PACKAGES = ("comq-onnx", "numpy", "scipy", "numba", "onnx", "onnx-ir", "onnxscript")
# how long a scheduler may take to answer, and workers to come to it, before the run ends
PATIENCE_S = 30.0
# so often it is looked whether there still are workers
LOOK_S = 5.0


def is_address(workers: str) -> bool:
    """Tell whether workers are named by the address of their scheduler."""
    return "://" in workers


@contextlib.contextmanager
def opened(workers: str) -> Iterator[Crowd]:
    """Start workers, or join those of a scheduler, and stop or leave them at the end.

    workers: how many processes of this machine, or the address of a scheduler

    Raises OptionError where there is no `distributed`, no scheduler or no worker, RuntimeFailure for other versions.
    """
    if importlib.util.find_spec("distributed") is None:
        raise OptionError(
            f"--workers {workers}: needs the package distributed; install it: pip install 'comq-onnx[workers]'"
        )
    import distributed

    with contextlib.ExitStack() as stack:
        # the tasks that hold samples and weights are large on purpose
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Sending large graph")
        stack.enter_context(_quiet())
        cluster = workers if is_address(workers) else stack.enter_context(_local(int(workers)))
        try:
            client = stack.enter_context(distributed.Client(cluster, timeout=PATIENCE_S, set_as_default=False))
        except (OSError, TimeoutError, ValueError) as error:
            raise OptionError(
                f"--workers {workers}: no scheduler answers there ({session.one_line(error)}); start one with "
                "`dask scheduler`, or give a number of processes"
            ) from error
        try:
            client.wait_for_workers(1, timeout=PATIENCE_S)
        except TimeoutError as error:
            raise OptionError(
                f"--workers {workers}: the scheduler has no workers; start some with `dask worker {workers}`"
            ) from error
        yield Crowd(client, workers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Dask logs of workers that come and go from the terminal."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "distributed"]
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _local(count: int) -> Iterator[Any]:
    """Start processes of this machine, of one thread each, with a scheduler."""
    import dask
    import distributed

    alone = {f"distributed.nanny.pre-spawn-environ.{name}_NUM_THREADS": 1 for name in ("OMP", "OPENBLAS", "NUMBA")}
    shown = ":0" if importlib.util.find_spec("bokeh") is not None else None
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory,
        dask.config.set(alone),
        distributed.LocalCluster(
            count, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=shown,
            local_directory=directory, silence_logs=logging.CRITICAL,
        ) as cluster,
    ):  # fmt: skip
        yield cluster


class Crowd(Embedded):
    """Run each task on some worker; a value that is not here yet is a future of Dask."""

    is_here = False

    def __init__(self, client: Any, name: str) -> None:
        """Look at the workers of a client; name: as they were asked for. Raises RuntimeFailure for other versions."""
        self._client, self._name, self._versions = client, name, versions()
        with self._failures():
            found = client.run(_versions_there)
        for where, its in found.items():
            check_versions(self._versions, its, where)
        self._workers = sorted(found)

    @property
    def dashboard(self) -> str | None:
        """Return the address of the page that shows what the workers do; None where there is no page."""
        return str(self._client.dashboard_link) if importlib.util.find_spec("bokeh") is not None else None

    @property
    def count(self) -> int:
        """Return how many workers there were at the start."""
        return len(self._workers)

    def submit(self, function: Callable[..., Any], *given: Any) -> Any:
        """Have a worker compute function(*given), and return its future."""
        # the page of the workers shows tasks by the name before the dash
        key = f"{function.__name__}-{uuid.uuid4().hex}"
        with self._failures():
            return self._client.submit(_alone, self._versions, function, *given, pure=False, key=key)

    def place(self, value: Any, where: int) -> Any:
        """Give a value of the caller to a worker: to that of a number, if it is there."""
        chosen = [self._workers[where % len(self._workers)]]
        with self._failures():
            return self._client.submit(_value, value, pure=False, workers=chosen, allow_other_workers=True)

    def reduce(self, add: Callable[[Any, Any], Any], parts: Iterable[Any]) -> Any:
        """Have a worker add values from left to right."""
        return self.submit(_sum, add, *parts)

    def gather(self, values: Sequence[Any]) -> list[Any]:
        """Wait for values and fetch them. Raises as their tasks do, RuntimeFailure where workers or scheduler fail."""
        import distributed

        with self._failures(), self._client.as_current():
            futures, idle = [one for one in values if isinstance(one, distributed.Future)], 0.0
            while futures and any(one.status == "pending" for one in futures):
                begun = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    distributed.wait(futures, timeout=LOOK_S)
                    break
                has_workers = bool(self._client.scheduler_info(n_workers=-1)["workers"])
                idle = 0.0 if has_workers else idle + time.monotonic() - begun
                if idle > PATIENCE_S:
                    raise RuntimeFailure(
                        f"--workers {self._name}: all workers are gone; start others and run the same command again"
                    )
            return list(self._client.gather(list(values)))

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what Dask raises, and what is no ComqError on a worker, into RuntimeFailure."""
        from distributed.client import CancelledError

        try:
            yield
        except (ComqError, MemoryError):
            raise
        except (Exception, CancelledError) as error:
            raise RuntimeFailure(f"--workers {self._name}: {self._reason(error)}") from error

    def _reason(self, error: BaseException) -> str:
        """Say what Dask or a worker raised, and what to do."""
        kind = type(error).__name__
        said = f"{kind}: {session.one_line(error)}"
        if kind == "KilledWorker":
            return (
                "several workers died of one task, of too little memory perhaps; give fewer workers, a smaller "
                "--batch-size or fewer --samples"
            )
        if isinstance(error, ModuleNotFoundError):
            return f"a worker lacks a package ({said}); install there what is installed here"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f"the disk of a worker is full ({said}); free some space there"
        if self._client.status != "running" or "Cancelled" in kind or "CommClosed" in kind:
            return f"the scheduler is gone ({kind}); start it and run the same command again"
        return f"a task failed on a worker ({said}); run it without --workers to see whether it fails there too"


# On a worker
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    named = [(package, metadata.version(package)) for package in PACKAGES]
    return (("Python", platform.python_version()), ("onnxruntime", session.version()), *named)


def versions() -> dict[str, str]:
    """Return the versions of all that computes, by name."""
    return dict(_versions())


def _versions_there() -> dict[str, str]:
    return versions()


def check_versions(here: Mapping[str, str], there: Mapping[str, str], where: str) -> None:
    """Make sure that a worker has the versions of this process. Raises RuntimeFailure."""
    other = [
        f"{name} {there.get(name)}, here {version}" for name, version in here.items() if there.get(name) != version
    ]
    if other:
        raise RuntimeFailure(
            f"the worker {where} has other versions, which may compute other bytes: {'; '.join(other)}; install there "
            "what is installed here"
        )


def _alone(here: Mapping[str, str], function: Callable[..., Any], *given: Any) -> Any:
    """Compute function(*given) in one thread: a worker is given as many tasks at once as it has threads."""
    check_versions(here, versions(), platform.node())
    numba.set_num_threads(1)
    with single_threaded_blas():
        return function(*given)


def _value(value: Any) -> Any:
    """Return a value of the caller."""
    return value


def _sum(add: Callable[[Any, Any], Any], first: Any, *others: Any) -> Any:
    """Return the sum of values, which stay as they are."""
    return functools.reduce(add, others, copy.deepcopy(first))
