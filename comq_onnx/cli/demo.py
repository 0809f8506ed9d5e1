"""Show what the command does, on a small model that comes with the package."""

from __future__ import annotations

import shlex
import shutil
from importlib import resources
from pathlib import Path

import click

from comq_onnx.errors import OptionError

FOLDER = Path("comq-demo")


def run_demo(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
    """Write the model and its samples to FOLDER, run the command on them, and end.

    Raises OptionError where the folder is there already or cannot be made.
    """
    if not asked or ctx.resilient_parsing:
        return
    model, samples = FOLDER / "model.onnx", FOLDER / "samples.npz"
    try:
        FOLDER.mkdir()
        for name, path in (("demo.onnx", model), ("demo.npz", samples)):
            with (resources.files("comq_onnx.cli") / name).open("rb") as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
    except OSError as error:
        raise OptionError(
            f"--demo: {FOLDER} cannot be made here ({error.strerror or error}); run it in another directory"
        ) from error
    made = [str(FOLDER / "model_q.onnx"), "--report", str(FOLDER / "report.html")]
    words = [str(model), "--calib", str(samples), "--bits", "4", "-o", *made]
    click.echo(f"$ {ctx.info_name} {shlex.join(words)}")
    ctx.command.main(words, prog_name=ctx.info_name, standalone_mode=False)
    ctx.exit()
