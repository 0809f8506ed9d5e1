"""Run a Python file or the command in the process of the tests, as if in one of its own: imports are paid for once."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from command import Said

from comq_onnx.cli import command

TOOLS = str(Path(__file__).parents[2] / "tools")


@contextlib.contextmanager
def _as_before(argv: list[str], *folders: str) -> Iterator[None]:
    """Set the arguments and the path of modules; afterwards forget the modules of tools/, and restore what was set."""
    before = set(sys.modules)
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "path", [*folders, *sys.path]),
        mock.patch.dict(os.environ),
    ):
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", None)).startswith(TOOLS):
                    del sys.modules[name]


def _said(run: Callable[[], object]) -> Said:
    """Run a function; return the exit code that it asks for, and what it prints."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


def run_script(path: Path, *arguments: object) -> Said:
    """Run a Python file as `python path arguments` does."""
    with _as_before([str(path), *map(str, arguments)], str(path.parent)):
        return _said(lambda: runpy.run_path(str(path), run_name="__main__"))


def run_command(*arguments: object) -> Said:
    """Run `comq-onnx arguments`."""
    with _as_before(["comq-onnx", *map(str, arguments)]):
        return _said(command.main)


def run_text(text: str) -> Said:
    """Run Python code as `python -c text` does."""
    with _as_before(["-c"], ""):
        return _said(lambda: exec(compile(text, "<text>", "exec"), {"__name__": "__main__"}))
