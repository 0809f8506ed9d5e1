"""Test what the parameters offer: completion in a shell, suggestions for typing errors, numbers with units."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from command import Said, files, run
from shell import ENVIRONMENT, assert_one_line

from comq_onnx.cli.parameters import Gigabytes

# Completion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion_script(run: Callable[..., Said], shell: str) -> None:
    said = run("--completion", shell)
    assert (said.code, said.err) == (0, "")
    assert f"_COMQ_ONNX_COMPLETE={shell}_complete" in said.out
    assert "comq-onnx" in said.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [("comq-onnx --gran", "--granularity"), ("comq-onnx --solver g", "gptq"), ("comq-onnx m.onnx --eff", "--effort")],
)
def test_options_and_choices_are_completed(words: str, expected: str) -> None:
    command = shutil.which("comq-onnx", path=str(Path(sys.executable).parent))
    assert command is not None
    settings = {
        **ENVIRONMENT, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1),
        "_COMQ_ONNX_COMPLETE": "bash_complete",
    }  # fmt: skip
    done = subprocess.run([command], capture_output=True, text=True, env=settings, timeout=60)
    assert done.stdout.split() == [f"plain,{expected}"]


# Suggestions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "suggestion"),
    [
        (["--bitz", "4"], "--bits"),
        (["--calibb", "x"], "--calib"),
        (["--target", "ort-cp"], "did you mean ort-cpu?"),
        (["--solver", "gtpq"], "did you mean gptq?"),
        (["--solver", "COMQ "], "did you mean comq?"),
        (["--include", "depthwize"], "did you mean depthwise?"),
        (["--exclude", "^HEAD$"], "did you mean head?"),
        (["--bits-for", "piont=8"], "did you mean point?"),
        (["--completion", "bahs"], "did you mean bash?"),
    ],
)
def test_what_is_mistyped_gets_a_suggestion(
    run: Callable[..., Said], files: Path, options: list[str], suggestion: str
) -> None:
    said = run(files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx", *options)
    assert_one_line(said, 2, suggestion, files)


def test_what_is_like_nothing_gets_none(run: Callable[..., Said], files: Path) -> None:
    said = run(files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx", "--include", "zzzz")
    assert "did you mean" not in said.err
    assert "--plan" in said.err


# Units ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [("1", 1.0), ("1.5", 1.5), ("1GB", 1.0), ("500 MB", 0.5), ("2g", 2.0), ("0", 0.0), (".5TB", 500.0), ("3e-1", 0.3)],
)
def test_memory_takes_a_unit(text: str, gigabytes: float) -> None:
    assert Gigabytes(0).convert(text, None, None) == pytest.approx(gigabytes)


@pytest.mark.parametrize("text", ["GB", "1XB", "-1GB", "1 2"])
def test_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Gigabytes(0).convert(text, None, None)
