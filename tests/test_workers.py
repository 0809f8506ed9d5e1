"""Test that workers write the bytes that this process writes, and all that can be wrong with them."""

from __future__ import annotations

import errno
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from clusters import Cluster, cluster, threads
from walks import MODELS, quantize

from comq_onnx import engine, workers
from comq_onnx.calibrate import crew, layer_moments, leading, passage, walk
from comq_onnx.errors import ModelError, OptionError, RuntimeFailure
from comq_onnx.solve import few_inputs, parallel
from models import cnn, encoder, mlp, samples_for, sentences


@pytest.fixture(scope="module")
def two() -> Iterator[str]:
    """Yield the address of two threads."""
    with threads(2) as cluster:
        yield cluster.scheduler_address


@pytest.fixture
def _shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide 40 samples into several shards, and sum these in a tree of three levels; some samples wait.

    Layers are solved in several parts.
    """
    monkeypatch.setattr(leading, "SHARD", 8)
    monkeypatch.setattr(engine, "ARITY", 2)
    monkeypatch.setattr(leading, "TIERS", (8, 16))
    # layers of few inputs are solved as one
    monkeypatch.setattr(few_inputs, "FEW_INPUTS", 4)
    monkeypatch.setattr(parallel, "PART", 8)
    monkeypatch.setattr(layer_moments, "LEAST_POSITIONS", 300)
    monkeypatch.setattr(layer_moments, "MOST_POSITIONS", 300)
    monkeypatch.setattr(layer_moments, "POSITIONS_PER_INPUT", 1)


def written(tmp_path: Path, model: onnx.ModelProto, samples: Any, **options: Any) -> bytes:
    """Quantize a model and return the bytes of the file."""
    quantize(model, tmp_path / "q.onnx", samples, **options)
    return (tmp_path / "q.onnx").read_bytes()


# The same bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_shards")
@pytest.mark.parametrize("make", [*MODELS.values(), encoder], ids=[*MODELS, "encoder"])
def test_threads_write_the_same_bytes_however_many(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    samples = sentences() if make is encoder else samples_for(make())
    found = {written(tmp_path, make(), samples)}
    for count in (1, 2, 4):
        with threads(count) as local:
            found.add(written(tmp_path, make(), samples, workers=local.scheduler_address))
    assert len(found) == 1


@pytest.mark.parametrize("options", [{"independent": True}, {"uniform": False}, {"solver": "gptq"}], ids=str)
def test_threads_write_the_same_bytes_with_other_options(tmp_path: Path, two: str, options: dict[str, Any]) -> None:
    samples = samples_for(cnn())
    assert written(tmp_path, cnn(), samples, workers=two, **options) == written(tmp_path, cnn(), samples, **options)


def test_processes_of_this_machine_write_the_same_bytes(tmp_path: Path) -> None:
    samples = samples_for(cnn())
    assert written(tmp_path, cnn(), samples, workers=2) == written(tmp_path, cnn(), samples)


def test_a_cluster_writes_the_same_bytes_although_a_worker_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, seen = walk._Walk._advance, list[Any]()
    wanted = written(tmp_path, cnn(), samples_for(cnn()))
    with cluster(2, tmp_path) as those:

        def killing(walking: Any, stage: Any) -> None:
            if stage.index == 2:
                those.workers[0].kill()
                seen.append(stage)
            advance(walking, stage)

        monkeypatch.setattr(walk._Walk, "_advance", killing)
        assert written(tmp_path, cnn(), samples_for(cnn()), workers=those.address) == wanted
        assert len(seen) == 1
        monkeypatch.setattr(walk._Walk, "_advance", advance)
        _scheduler_dies(tmp_path, those, monkeypatch)


def _scheduler_dies(tmp_path: Path, those: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill the scheduler of a run: it ends with one line, and leaves no output."""
    # the client looks for the scheduler for as long
    monkeypatch.setattr(workers, "PATIENCE_S", 8.0)
    begin = walk._Walk._begin

    def killing(walking: Any) -> None:
        those.scheduler.kill()
        begin(walking)

    monkeypatch.setattr(walk._Walk, "_begin", killing)
    (tmp_path / "q.onnx").unlink()
    with pytest.raises(RuntimeFailure, match=r"--workers tcp://.*: the scheduler is gone \(.*\); start it and run"):
        written(tmp_path, cnn(), samples_for(cnn()), workers=those.address)
    assert not (tmp_path / "q.onnx").exists()


def test_parts_of_a_layer_and_parts_of_the_survey_are_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, names = workers.Crowd.submit, Counter[str]()

    def counted(crowd: Any, function: Callable[..., Any], *given: Any) -> Any:
        names[function.__name__] += 1
        return submit(crowd, function, *given)

    monkeypatch.setattr(workers.Crowd, "submit", counted)
    # layers of few inputs are solved as one
    monkeypatch.setattr(few_inputs, "FEW_INPUTS", 4)
    monkeypatch.setattr(parallel, "PART", 8)
    with threads(2) as local:
        quantize(encoder(), tmp_path / "q.onnx", sentences(), workers=local.scheduler_address, uniform=False)
    assert names["solve_channels"] >= 2 * names["pose_alike"] > 0
    assert names["_tail_noises"] > 1
    # those of the survey are watched
    assert names["solve_alike"] > 0


# Sums in a tree -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8, 9, 64, 65, 130])
def test_a_sum_takes_each_value_once_in_order_and_few_exist_at_once(count: int) -> None:
    alive, most = 0, 0

    def parts() -> Iterator[list[int]]:
        nonlocal alive, most
        for i in range(count):
            alive += 1
            most = max(most, alive)
            yield [i]

    def add(a: list[int], b: list[int]) -> list[int]:
        nonlocal alive
        alive -= 1
        return a + b

    assert engine.fold(engine.Embedded(), add, parts(), count) == list(range(count))
    assert most <= 4


def test_sums_of_workers_leave_the_values_as_they_are() -> None:
    parts = [np.ones(3), np.ones(3), np.ones(3)]
    total = workers._sum(np.ndarray.__iadd__, *parts)
    assert (total == 3).all()
    assert all((part == 1).all() for part in parts)


# What can be wrong ----------------------------------------------------------------------------------------------------


def full(*_: Any) -> Any:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


def failing(*_: Any) -> Any:
    """Fail as a fault of the code does."""
    raise ZeroDivisionError("not today")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (full, r": the disk of a worker is full \(OSError: .*\); free some space there"),
        (failing, r": a task failed on a worker \(ZeroDivisionError: not today\); run it without --workers to see"),
    ],
)
def test_what_fails_on_a_worker_is_one_line(
    tmp_path: Path, two: str, monkeypatch: pytest.MonkeyPatch, task: Callable[..., Any], said: str
) -> None:
    monkeypatch.setattr(passage, "advance_float", task)
    with pytest.raises(RuntimeFailure, match=f"--workers inproc://.*{said}"):
        quantize(cnn(), tmp_path / "q.onnx", workers=two)


def test_an_error_of_the_model_is_that_of_this_process(tmp_path: Path, two: str) -> None:
    samples = samples_for(mlp())
    samples["x"][7] *= np.float32(1e30)
    found = []
    for options in ({}, {"workers": two}):
        with pytest.raises(ModelError, match="for sample 7 of") as caught:
            quantize(mlp(), tmp_path / "q.onnx", samples, max_samples=39, **options)
        found.append(str(caught.value))
    assert found[0] == found[1]


def of_another_version() -> dict[str, str]:
    """Tell what a worker has that is not up to date."""
    return {**workers.versions(), "numpy": "1.0"}


def test_a_worker_of_another_version_is_refused(two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_versions_there", of_another_version)
    with pytest.raises(RuntimeFailure, match=r"^the worker .* other versions, .*: numpy 1.0, here .*; install there"):
        quantize(mlp(), tmp_path / "q.onnx", workers=two)


def test_without_its_package_workers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "distributed" else find(name))
    with pytest.raises(OptionError, match=r"--workers 2: needs the package distributed; install it: pip install"):
        quantize(mlp(), tmp_path / "q.onnx", workers=2)


def test_an_address_without_a_scheduler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE_S", 0.5)
    with pytest.raises(OptionError, match=r"--workers tcp://127.0.0.1:9: no scheduler answers there \(.*\); start one"):
        quantize(mlp(), tmp_path / "q.onnx", workers="tcp://127.0.0.1:9")


def test_a_scheduler_without_workers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE_S", 0.5)
    with threads(1) as cluster:
        cluster.scale(0)
        while cluster.scheduler.workers:
            time.sleep(0.01)
        with pytest.raises(OptionError, match="the scheduler has no workers; start some with"):
            quantize(mlp(), tmp_path / "q.onnx", workers=cluster.scheduler_address)


def test_a_run_whose_workers_are_gone_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE_S", 1.0)
    monkeypatch.setattr(workers, "LOOK_S", 0.2)
    begin = crew.Crew.see_inputs
    with threads(1) as local:

        def leaving(its: Any) -> Any:
            local.scale(0)
            return begin(its)

        monkeypatch.setattr(crew.Crew, "see_inputs", leaving)
        with pytest.raises(RuntimeFailure, match="all workers are gone; start others and run the same command again"):
            quantize(mlp(), tmp_path / "q.onnx", workers=local.scheduler_address)
