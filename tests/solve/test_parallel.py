"""Test the threads that share a solver's work, and the parts of channels that they take."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from comq_onnx.solve.parallel import channel_slices, map_in_threads, single_threaded_blas


@pytest.mark.parametrize("channels", [1, 191, 192, 193, 500])
def test_parts_are_all_channels_once(channels: int) -> None:
    taken = np.concatenate([np.arange(channels)[part] for part in channel_slices(channels)])
    assert np.array_equal(taken, np.arange(channels))
    assert all(part.stop - part.start <= 192 for part in channel_slices(channels))


@pytest.mark.parametrize("threads", [1, 3])
def test_tasks_come_back_in_order(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comq_onnx.solve.parallel.numba.get_num_threads", lambda: threads)
    names = set()

    def slower_first(k: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(0.01 * (5 - k))
        return k * k

    assert map_in_threads(slower_first, range(6)) == [0, 1, 4, 9, 16, 25]
    assert map_in_threads(slower_first, []) == []
    assert len(names) <= max(threads, 1)
    assert (threads == 1) == (names == {threading.current_thread().name})


@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_task_raises_is_raised(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comq_onnx.solve.parallel.numba.get_num_threads", lambda: threads)

    def fail(k: int) -> None:
        if k == 2:
            raise np.linalg.LinAlgError("not this one")

    with pytest.raises(np.linalg.LinAlgError, match="not this one"):
        map_in_threads(fail, range(5))


def test_a_task_has_one_thread_of_blas() -> None:
    def most(_: int) -> int:
        return max((pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"), default=1)

    before = most(0)
    assert map_in_threads(most, range(3)) == [1, 1, 1]
    with single_threaded_blas():
        assert most(0) == 1
    assert most(0) == before
