"""Share the solver's work among threads: parts of a layer's channels side by side, one thread of BLAS each.

Channels do not depend on one another and the parts are the same however many threads there are, so the result is too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
from threadpoolctl import ThreadpoolController

# channels that are solved together: wide enough for matrix products at full speed, narrow enough for several threads
PART = 192
# in how many shares a thread does its tasks: those that end early take over some of the others
SHARES = 8

T = TypeVar("T")
R = TypeVar("R")


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def map_in_threads(function: Callable[[T], R], tasks: Iterable[T]) -> list[R]:
    """Return function(task) of every task, in order, from as many threads as numba is set to (NUMBA_NUM_THREADS)."""
    todo = list(tasks)
    threads = min(numba.get_num_threads(), len(todo))
    with single_threaded_blas():
        if threads < 2:
            return [function(task) for task in todo]
        # several at once: the groups of a depthwise convolution are many, and quick
        size = -(-len(todo) // (SHARES * threads))
        shares = [todo[start : start + size] for start in range(0, len(todo), size)]
        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(lambda share: [function(task) for task in share], shares)
            return [found for share in done for found in share]


def single_threaded_blas() -> Any:
    """Return a context in which a matrix product runs in the thread that asks for it."""
    return _controller().limit(limits=1, user_api="blas")


def channel_slices(channels: int) -> list[slice]:
    """Return slices of consecutive channels, PART at a time."""
    return [slice(start, min(start + PART, channels)) for start in range(0, channels, PART)]


def group_slices(groups: int, channels: int) -> list[slice]:
    """Return slices of consecutive groups of so many channels each, at least one and together up to PART channels."""
    step = max(1, PART // max(channels, 1))
    return [slice(start, min(start + step, groups)) for start in range(0, groups, step)]
