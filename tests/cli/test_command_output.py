"""Test what the command shows, and where: quiet, verbose, in a terminal, in a file."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from command import Said, files, run
from shell import ENVIRONMENT, in_shell

from comq_onnx.evaluate import speed
from models import mlp


def test_a_quiet_run_prints_nothing(run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # which of two tiny models is faster is chance, and there is a warning where the quantized one is slower
    monkeypatch.setattr(speed, "latency", lambda *_, **__: [1.0, 1.0])
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "-q")
    assert said == Said(0, "", "")
    assert (files / "q.onnx").exists()


def test_a_quiet_run_still_warns(run: Callable[..., Said], files: Path) -> None:
    said = run(files / "mlp.onnx", "-o", files / "q.onnx", "-q", "--samples", 20)
    assert (said.code, said.out) == (0, "")
    assert all(line.startswith("warning: ") for line in said.err.splitlines())
    assert "synthetic" in said.err


def test_a_verbose_run_logs_every_layer(run: Callable[..., Said], files: Path) -> None:
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "-v")
    assert said.code == 0
    assert "fc1: error" in said.err
    assert "fc2: error" in said.err


# Names ----------------------------------------------------------------------------------------------------------------


def test_a_name_with_brackets_is_printed_as_it_is(run: Callable[..., Said], files: Path) -> None:
    # rich takes [bold] for markup
    model = mlp()
    model.graph.node[0].name = "/block[0]/[bold]fc"
    onnx.save(model, files / "m.onnx")
    said = run(files / "m.onnx", "--plan")
    assert "/block[0]/[bold]fc" in "".join(said.out.split())


@pytest.mark.parametrize("name", ["[red]q.onnx", "[", "q[", "x]y.onnx"])
def test_a_path_with_brackets_is_printed_as_it_is(run: Callable[..., Said], files: Path, name: str) -> None:
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / name)
    assert said.code == 0
    assert f"{files / name}\n" in said.out
    assert (files / name).exists()


def test_a_closing_tag_in_a_name_is_no_error(run: Callable[..., Said], files: Path) -> None:
    model = mlp()
    model.graph.node[0].name = "a[/b]"
    onnx.save(model, files / "m.onnx")
    said = run(files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert said.code == 0
    assert "a[/b]" in said.out


# Terminals and files --------------------------------------------------------------------------------------------------


def terminal(*arguments: object, **environment: str) -> tuple[int, str]:
    """Run the command on a terminal of 100 columns; return its exit code and all that was shown."""
    import pty
    import select

    leader, follower = pty.openpty()
    settings = {**ENVIRONMENT, "COLUMNS": "100", "TERM": "xterm-256color", **environment}
    command = [sys.executable, "-m", "comq_onnx", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower, env=settings, close_fds=True)
    os.close(follower)
    shown = b""
    while True:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                part = os.read(leader, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            shown += part
        elif process.poll() is not None:
            break
    os.close(leader)
    return process.wait(timeout=60), shown.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_progress_with_the_time_left_and_colours(files: Path) -> None:
    code, shown = terminal(files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx")
    assert code == 0
    for step in ("prepare", "stages", "layers", "samples", "compare"):
        assert step in shown
    assert re.search(r"layers .*\d/4", shown)
    # hours:minutes:seconds left, or dashes before that is known
    assert re.search(r"(\d+:\d\d:\d\d|-:--:--)", shown)
    assert "\x1b[1m" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_no_color_leaves_no_colour(files: Path) -> None:
    model = files / "mlp.onnx"
    code, coloured = terminal(model, "--samples", 20, "-o", files / "q.onnx")
    assert code == 0
    colour = r"\x1b\[[\d;]*3[0-7](;\d+)*m"
    assert re.search(colour, coloured)
    code, plain = terminal(model, "--samples", 20, "-o", files / "q.onnx", NO_COLOR="1")
    assert code == 0
    assert not re.search(colour, plain)
    assert "warning: calibrated on synthetic noise" in plain


def test_what_goes_to_a_file_is_plain_and_not_cut_at_80_columns(files: Path) -> None:
    model = mlp()
    model.graph.node[0].name = "/a/long/name/of/some/forty/letters/fc1/x"
    onnx.save(model, files / "m.onnx")
    done = in_shell(files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "/a/long/name/of/some/forty/letters/fc1/x" in line]
    assert len(line.split()) == 8
