"""Test several models in one call: one that fails does not stop the others, and a queue that was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Said, run  # noqa: F401
from reports import report

import comq_onnx
from comq_onnx import folders
from comq_onnx.errors import OptionError, OutOfMemory, SamplesError
from models import mlp

Quantize = Callable[..., comq_onnx.Report]


def names(folder: Path) -> list[str]:
    """Return the files of a folder and of those below it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Make three models, the second in a folder with a configuration."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "config.json").write_text("{}")
    for name in ("a.onnx", "f/b.onnx", "c.onnx"):
        onnx.save(mlp(), tmp_path / name)
    return [tmp_path / "a.onnx", tmp_path / "f", tmp_path / "c.onnx"]


class Pretended:
    """Stand in for `pipeline.quantize`: write what it would, and fail for some models.

    calls: the models it was called for
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, BaseException] = {}

    def __call__(self, model: Path, out: Path, *_: object, **__: Any) -> comq_onnx.Report:
        """Quantize nothing."""
        self.calls.append(model.name)
        out.write_bytes(b"quantized " + model.name.encode())
        if model.name in self.failing:
            raise self.failing[model.name]
        return report(2, model=str(model), output=str(out), command=f"comq-onnx {model} -o {out}")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """Put Pretended in the place of the pipeline."""
    made = Pretended()
    monkeypatch.setattr(folders.pipeline, "quantize", made)
    return made


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (SamplesError("arrays do not fit"), SamplesError, 4),
        (MemoryError(), OutOfMemory, 5),
        (OSError(28, "No space left on device"), OptionError, 2),
        (ZeroDivisionError("division by zero"), comq_onnx.ComqError, 1),
    ],
)
def test_one_that_fails_does_not_stop_the_others(
    models: list[Path], tmp_path: Path, pretended: Pretended, error: Exception, kind: type, code: int
) -> None:
    pretended.failing["b.onnx"] = error
    done = folders.quantize_all(models, tmp_path / "out")
    assert [one.output and one.output.name for one in done] == ["a.onnx", None, "c.onnx"]
    # neither a part of the model, nor what lay beside it alone
    assert names(tmp_path / "out") == ["a.onnx", "c.onnx"]
    assert not (tmp_path / "out" / "f").exists()
    assert isinstance(done[1].error, kind)
    assert done[1].error.exit_code == code
    assert done[0].report is not None
    assert done[0].report.command.endswith(f"-o {tmp_path / 'out' / 'a.onnx'}")


def test_where_all_fail_nothing_is_written(models: list[Path], tmp_path: Path, pretended: Pretended) -> None:
    pretended.failing = {name: SamplesError("no") for name in ("a.onnx", "b.onnx", "c.onnx")}
    before = names(tmp_path)
    assert all(one.error is not None for one in folders.quantize_all(models, tmp_path / "out"))
    assert names(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_stops_the_process_stops_all(
    models: list[Path], tmp_path: Path, pretended: Pretended, stop: type[BaseException]
) -> None:
    pretended.failing["b.onnx"] = stop()
    before = names(tmp_path)
    with pytest.raises(stop):
        folders.quantize_all(models, tmp_path / "out")
    assert pretended.calls == ["a.onnx", "b.onnx"]
    assert names(tmp_path) == before


def test_what_cannot_be_read_is_known_before_the_first_is_quantized(
    models: list[Path], tmp_path: Path, pretended: Pretended
) -> None:
    models[0].write_bytes(b"broken")
    queue = folders.find_queue(models, tmp_path / "out", comq_onnx.Options())
    assert [job.error is not None for job in queue.jobs] == [True, False, False]
    done = folders.quantize_all(models, tmp_path / "out")
    assert "not an ONNX model" in done[0].named_error
    assert pretended.calls == ["b.onnx", "c.onnx"]


def test_the_command_tells_each_failure_and_exits_with_the_code_of_the_first(
    models: list[Path],
    tmp_path: Path,
    pretended: Pretended,
    run: Callable[..., Said],  # noqa: F811
) -> None:
    pretended.failing["b.onnx"] = SamplesError("arrays do not\nfit")
    pretended.failing["c.onnx"] = OptionError("no room")
    pages = {"--report": tmp_path / "p.html", "--json": tmp_path / "p.json"}
    said = run(*models, "-o", tmp_path / "out", *(word for pair in pages.items() for word in pair))
    assert said.code == 4
    assert said.err.splitlines() == [
        f"comq-onnx: {tmp_path}/f/b.onnx: arrays do not fit", f"comq-onnx: {tmp_path}/c.onnx: no room",
    ]  # fmt: skip
    # a long name is broken into lines on a narrow terminal
    assert said.out.count("failed") >= 2
    assert f"wrote    {tmp_path / 'out'}" in said.out
    assert "b.onnx failed" in pages["--report"].read_text()
    assert (tmp_path / "p_models" / "01-a.html").is_file()
    assert [one["failed"] for one in json.loads(pages["--json"].read_text())["models"]] == [False, True, True]


# Where it was cut off


def test_finished_models_are_not_quantized_again(models: list[Path], tmp_path: Path, pretended: Pretended) -> None:
    kept, call = (
        tmp_path / "kept",
        lambda: folders.quantize_all(models, tmp_path / "out", workdir=str(tmp_path / "kept")),
    )
    pretended.failing["c.onnx"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        call()
    # a damaged file is made again
    (kept / "files-0001" / "f" / "b.onnx").write_bytes(b"cut o")
    pretended.failing["c.onnx"] = SamplesError("no")
    pretended.calls.clear()
    done = call()
    assert pretended.calls == ["b.onnx", "c.onnx"]
    assert done[0].report == report(
        2, model=str(models[0]), output=str(tmp_path / "out" / "a.onnx"),
        command=f"comq-onnx {models[0]} -o {tmp_path / 'out' / 'a.onnx'}",
    )  # fmt: skip
    # while one fails the others stay
    pretended.failing.clear()
    pretended.calls.clear()
    call()
    assert pretended.calls == ["c.onnx"]
    assert names(tmp_path / "out") == ["a.onnx", "c.onnx", "f/b.onnx", "f/config.json"]
    assert [(tmp_path / "out" / name).read_bytes() for name in ("a.onnx", "f/b.onnx")] == [
        b"quantized a.onnx", b"quantized b.onnx",
    ]  # fmt: skip
    assert names(kept) == []


def test_a_directory_of_another_queue_is_refused(models: list[Path], tmp_path: Path, pretended: Pretended) -> None:
    kept = str(tmp_path / "kept")
    samples = {"x": np.zeros((4, 32), np.float32)}
    pretended.failing["c.onnx"] = SamplesError("no")
    folders.quantize_all(models, tmp_path / "out", samples, workdir=kept)
    with pytest.raises(OptionError, match="holds a run with other --bits"):
        folders.quantize_all(models, tmp_path / "out", samples, workdir=kept, bits=3)
    with pytest.raises(OptionError, match="holds a run with other models"):
        folders.quantize_all(models[:2], tmp_path / "out", samples, workdir=kept)
    with pytest.raises(OptionError, match="holds a run with other samples"):
        folders.quantize_all(models, tmp_path / "out", {"x": samples["x"] + 1}, workdir=kept)
    (tmp_path / "kept" / "mine.txt").touch()
    with pytest.raises(OptionError, match="which is not of a run of several models"):
        folders.quantize_all(models, tmp_path / "out", samples, workdir=kept)
    assert names(tmp_path / "out") == ["a.onnx", "f/b.onnx", "f/config.json"]


def test_a_model_that_changed_meanwhile_is_named(models: list[Path], tmp_path: Path, pretended: Pretended) -> None:
    kept = str(tmp_path / "kept")
    pretended.failing["c.onnx"] = SamplesError("no")
    folders.quantize_all(models, tmp_path / "out", workdir=kept)
    onnx.save(mlp(seed=9), models[0])
    done = folders.quantize_all(models, tmp_path / "out", workdir=kept)
    assert "has changed since it was quantized there" in done[0].named_error


def test_a_full_disk_is_told_for_the_model_that_met_it(
    models: list[Path], tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.finished, "_link", full)
    done = folders.quantize_all(models[:1], tmp_path / "out", workdir=str(tmp_path / "kept"))
    assert done[0].named_error.endswith("a finished model cannot be kept (No space left on device); make room there")
    assert pretended.calls == ["a.onnx"]


def test_the_bytes_are_those_of_single_runs(tmp_path: Path) -> None:
    for i in range(2):
        onnx.save(mlp(seed=i), tmp_path / f"{i}.onnx")
    samples = {"x": np.random.default_rng(0).standard_normal((16, 32), np.float32)}
    folders.quantize_all(
        [tmp_path / "0.onnx", tmp_path / "1.onnx"], tmp_path / "out", samples, workdir=str(tmp_path / "k")
    )
    for i in range(2):
        comq_onnx.quantize(tmp_path / f"{i}.onnx", tmp_path / "one.onnx", samples)
        assert (tmp_path / "out" / f"{i}.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()
