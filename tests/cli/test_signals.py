"""Test that a run which a signal or too little memory ends says so in one line, and leaves nothing behind."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Said, files, run
from shell import ENVIRONMENT, assert_one_line

from comq_onnx.bits import choose
from comq_onnx.cli import command as cli


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt, 130, "interrupted"), (MemoryError, 5, "even for one sample at once")],
)
def test_an_interrupt_and_too_little_memory_are_one_line(
    run: Callable[..., Said],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    code: int,
    words: str,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(choose, "walk", stop)
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    # click ends the line that the terminal's ^C began
    assert_one_line(Said(said.code, said.out, said.err.removeprefix("\n")), code, words, files)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="other signals here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(files: Path, number: int) -> None:
    (files / "tmp").mkdir()
    arguments = [files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx", "--effort", "max"]
    process = subprocess.Popen(
        [sys.executable, "-m", "comq_onnx", *map(str, arguments)], stderr=subprocess.PIPE, text=True,
        env={**ENVIRONMENT, "TMPDIR": str(files / "tmp")},
        # under nohup the signal would be ignored
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not any((files / "tmp").iterdir()):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.strip().splitlines() == [
        f"comq-onnx: {'interrupted' if number == signal.SIGINT else 'stopped'}; nothing was written"
    ]
    assert list((files / "tmp").iterdir()) == []
    assert not (files / "q.onnx").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="other signals here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_waits_until_a_temporary_directory_is_found(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    ended = []

    def find() -> str:
        signal.raise_signal(number)
        ended.append(True)
        return "found"

    monkeypatch.setattr(tempfile, "gettempdir", find)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert stopped.value.code == 128 + number
    assert ended == [True]


HALF_MADE = """
import sys
from comq_onnx.bits import choose
from comq_onnx.cli import command

class HalfMade:
    def __init__(self):
        raise KeyboardInterrupt
    def __del__(self):
        self.what_it_never_got

choose.walk = lambda *_, **__: HalfMade()
sys.argv[0] = "comq-onnx"
command.main()
"""


def test_what_an_interrupt_left_half_made_is_silent(files: Path) -> None:
    arguments = [files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx"]
    done = subprocess.run(
        [sys.executable, "-c", HALF_MADE, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (130, "comq-onnx: interrupted; nothing was written")
