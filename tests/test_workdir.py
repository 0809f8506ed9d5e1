"""Test that a run that was cut off goes on from its work directory with the same bytes, and all that can be wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from walks import MODELS, quantize

import comq_onnx
from comq_onnx import workdir
from comq_onnx.calibrate import layer_solver, walk
from comq_onnx.errors import OptionError
from comq_onnx.model import files
from comq_onnx.workdir import Workdir, opened
from models import attention, cnn, encoder, samples_for, sentences

RUN = {"model": "a", "--bits": "4"}
LARGE = np.arange(40_000, dtype=np.float32)


class Cut(Exception):
    """Ends a run."""


def cut_off(steps: int, *given: Any, **options: Any) -> comq_onnx.Report | None:
    """Quantize until so many steps were kept; return the report of a run that ended before."""
    kept, save = [0], Workdir.save

    def saving(*given: Any) -> None:
        save(*given)
        kept[0] += 1
        if kept[0] == steps:
            raise Cut

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Cut):
        patch.setattr(Workdir, "save", saving)
        return quantize(*given, **{"uniform": False, **options})
    return None


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, 0.0])
@pytest.mark.parametrize("make", [*MODELS.values(), encoder], ids=[*MODELS, "encoder"])
def test_a_run_that_is_cut_off_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], memory: float | None
) -> None:
    samples = sentences() if make is encoder else samples_for(make())
    quantize(make(), tmp_path / "whole.onnx", samples, bits=3, uniform=False)
    work, out = tmp_path / "work", tmp_path / "q.onnx"
    report = None
    while report is None:
        assert not out.exists()
        report = cut_off(2, make(), out, samples, bits=3, workdir=str(work), memory_gb=memory)
    assert out.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert not list(work.iterdir())
    assert any("went on after stage" in note for note in report.notes)


def test_what_was_solved_is_not_solved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    solve = layer_solver.solve_together

    def counted(weights: Any, *more: Any) -> Any:
        solved.append(len(weights))
        return solve(weights, *more)

    monkeypatch.setattr(layer_solver, "solve_together", counted)
    quantize(cnn(), tmp_path / "whole.onnx", uniform=False)
    whole, solved[:] = sum(solved), []
    for steps in (3, 4, 100):
        cut_off(steps, cnn(), tmp_path / "q.onnx", workdir=str(tmp_path / "work"))
    assert (tmp_path / "q.onnx").exists()
    assert sum(solved) == whole


def test_all_tries_for_an_accuracy_are_kept(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"bits": "auto", "max_drop": "33dB"}
    before = quantize(cnn(), tmp_path / "whole.onnx", uniform=False, **asked)
    work = tmp_path / "work"
    assert cut_off(11, cnn(), tmp_path / "q.onnx", workdir=str(work), **asked) is None
    assert {"survey", "solve0", "solve1"} <= {path.name.split("-")[0] for path in work.glob("*.state")}
    after = cut_off(100, cnn(), tmp_path / "q.onnx", workdir=str(work), **asked)
    assert after is not None
    assert (tmp_path / "q.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    assert [n for n in after.notes if n.startswith("tried")] == [n for n in before.notes if n.startswith("tried")]


def test_a_disk_that_is_full_loses_no_more_than_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = str(tmp_path / "work")
    synced: list[int] = []

    def full(_descriptor: int) -> None:
        synced.append(1)
        if len(synced) > 30:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptionError, match=r"No space left on device.*whole: make room"):
        quantize(attention(), tmp_path / "q.onnx", workdir=work)
    monkeypatch.undo()
    report = quantize(attention(), tmp_path / "q.onnx", workdir=work)
    assert any("went on after stage" in note for note in report.notes)


def test_the_room_that_is_needed_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage())
    monkeypatch.setattr(walk._Walk, "_begin", lambda _self: pytest.fail("the work began"))
    with pytest.raises(OptionError, match=r"--workdir .*work: 0.0 GB are needed there, 0.0 GB are free"):
        quantize(cnn(), tmp_path / "q.onnx", workdir=str(tmp_path / "work"))


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    work, out = str(tmp_path / "work"), tmp_path / "q.onnx"
    assert cut_off(2, cnn(), out, workdir=work) is None
    changes: list[tuple[dict[str, Any], str]] = [
        ({"bits": 3}, "--bits"), ({"effort": "fast"}, "--effort"), ({"seed": 1}, "samples and --seed"),
    ]  # fmt: skip
    for change, what in changes:
        with pytest.raises(OptionError, match=rf"holds a run with other {what}; run that command again"):
            cut_off(9, cnn(), out, workdir=work, **change)
    with pytest.raises(OptionError, match="holds a run with other model and samples"):
        cut_off(9, cnn(size=8), out, workdir=work)
    # what changes no byte may change
    assert cut_off(99, cnn(), out, workdir=work, memory_gb=1.0) is not None


# The directory --------------------------------------------------------------------------------------------------------


def test_arrays_come_back_and_those_that_are_one_are_one(tmp_path: Path) -> None:
    with opened(tmp_path / "w", RUN) as work:
        work.save("a", 1, {"x": [LARGE, LARGE], "small": np.ones(3)}, LARGE)
        found = work.load("a")
        assert found is not None
        fixed, changing = found
        assert fixed["x"][0] is fixed["x"][1]
        assert (fixed["x"][0] == LARGE).all()
        assert (changing == LARGE).all()
        changing += 1
        assert len(list((tmp_path / "w").glob("*.npy"))) == 1
    assert not list((tmp_path / "w").iterdir())


def test_an_array_is_written_once_and_removed_with_its_last_state(tmp_path: Path) -> None:
    other = LARGE + 1
    with opened(tmp_path / "w", RUN) as work:
        work.save("a", 1, [LARGE], None)
        (first,) = (tmp_path / "w").glob("*.npy")
        stamp = first.stat().st_mtime_ns
        for step in (2, 3, 4):
            work.save("a", step, [LARGE, other], None)
        assert first.stat().st_mtime_ns == stamp
        for step in (5, 6):
            work.save("a", step, [other], None)
        assert not first.exists()
        assert len(list((tmp_path / "w").glob("*.npy"))) == 1


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _change(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")


@pytest.mark.parametrize("damage", [_shorten, _change, Path.unlink])
@pytest.mark.parametrize("what", ["a.0002.state", "2.npy"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, what: str, damage: Callable[[Path], None]) -> None:
    with opened(tmp_path / "w", RUN) as work:
        work.save("a", 1, [LARGE], 1)
        work.save("a", 2, [LARGE + 1], 2)
        damage(tmp_path / "w" / what)
        again = Workdir(work.path)
        found = again.load("a")
        assert found is not None
        assert found[1] == 1
        assert (found[0][0] == LARGE).all()
        assert bool(again.damaged) == (damage is not Path.unlink or what == "2.npy")
        # what is made next does not take the name of an array that a state has
        again.save("a", 2, [found[0][0], LARGE + 2], 2)
        third = Workdir(work.path).load("a")
        assert third is not None
        assert [(a[:2] - LARGE[:2]).tolist() for a in third[0]] == [[0, 0], [2, 2]]


def test_with_no_whole_state_all_begins_again(tmp_path: Path) -> None:
    with opened(tmp_path / "w", RUN) as work:
        work.save("a", 1, [LARGE], 1)
        _shorten(tmp_path / "w" / "a.0001.state")
        assert work.load("a") is None
        assert work.load("b") is None
        assert "damaged" in work.damaged[0]


def test_a_damaged_description_of_the_run_empties_the_directory(tmp_path: Path) -> None:
    with contextlib.suppress(Cut), opened(tmp_path / "w", RUN) as work:
        work.save("a", 1, [LARGE], 1)
        raise Cut
    (tmp_path / "w" / workdir.RUN).write_text("{")
    with opened(tmp_path / "w", RUN) as work:
        assert work.load("a") is None
        assert "damaged" in work.damaged[0]


def test_a_directory_is_used_by_one_run_and_holds_nothing_else(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "w", RUN),
        pytest.raises(OptionError, match="another run uses it now"),
        opened(tmp_path / "w", RUN),
    ):
        pass
    (tmp_path / "w" / "mine.txt").write_text("")
    with pytest.raises(OptionError, match="holds 'mine"), opened(tmp_path / "w", RUN):
        pass
    assert (tmp_path / "w" / "mine.txt").exists()
    with pytest.raises(OptionError, match="cannot be used"), opened(tmp_path / "w" / "mine.txt", RUN):
        pass
    with pytest.raises(OptionError, match="cannot be used"), opened(tmp_path / "no" / "w", RUN):
        pass
    assert files.hold is workdir.hold
