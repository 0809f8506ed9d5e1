"""Run the command line: read what is asked, show the result. No other module prints or exits."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.logging import RichHandler

from comq_onnx import folders, pipeline
from comq_onnx.cli import config_file
from comq_onnx.cli.parameters import PROGRAM, grouped, is_in_config, parameters
from comq_onnx.cli.progress import shown_progress
from comq_onnx.errors import ComqError, OptionError
from comq_onnx.options.spelling import OPTIONS, spell
from comq_onnx.report import several
from comq_onnx.report.report import Report
from comq_onnx.runtime import memory

EPILOG = """\b
Examples:
  comq-onnx model.onnx --calib photos/ --preprocess imagenet -o model_q.onnx
  comq-onnx model.onnx --calib samples.npz --bits 8 -o model_q.onnx --report report.html
  comq-onnx model.onnx --calib samples.npz --bits 4 --bits-for 'head|stem=8' -o model_q.onnx
  comq-onnx model.onnx --calib samples.npz --activations none --granularity 32 -o model_q.onnx
  comq-onnx model.onnx --calib samples.npz --bits auto --size 20% -o model_q.onnx
  comq-onnx folder/ --calib lines.txt -o folder_q4/
  comq-onnx a.onnx b.onnx c/ --calib photos/ -o quantized/ --report compared.html
  comq-onnx model.onnx --plan
  comq-onnx model.onnx --config quant.toml

\b
Shell completion, for this shell or in its start-up file:
  eval "$(comq-onnx --completion bash)"      # or zsh; for fish: comq-onnx --completion fish | source

Exit codes: 0 done, 1 a fault of comq-onnx, 2 the command line, 3 the model, 4 the samples, 5 the runtime;
  of several models, that of the first that failed: the others are written."""
# the columns of a table that goes to a file, which would be cut at 80 otherwise
PLAIN_WIDTH = 140
# an error of more characters is cut in its middle
LONGEST_LINE = 600
SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


class _Command(click.Command):
    """Show the options in groups in the help of a command."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their titles."""
        for title, options in grouped(self, ctx):
            records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(records)


@dataclass(frozen=True)
class _Asked:
    """Hold what one call of the command asks for beside the options of the library.

    models, output, calib: the paths of the sources, of the result and of the samples
    plan: only plan
    inspect: only show the samples
    sheet: where the pictures of the samples are written
    report, json: where the report is written, as a page and as JSON
    open: open the page in the browser
    save_config: where the options are written
    quiet, verbose: print less, or more
    """

    models: tuple[Path, ...]
    output: Path | None
    calib: str | None
    plan: bool
    inspect: bool
    sheet: Path | None
    report: Path | None
    open: bool
    json: Path | None
    save_config: Path | None
    quiet: bool
    verbose: bool

    @property
    def to_folder(self) -> bool:
        """Tell whether several models, or all of a folder, go to a folder."""
        named = self.output is not None and self.output.suffix != ".onnx" and not self.plan
        return len(self.models) > 1 or (named and self.models[0].is_dir())


def _run(**given: Any) -> None:
    """Quantize the ONNX MODEL with COMQ and write a QDQ model that runs in integers.

    Several models, or all of a folder with what lies beside them, go to a folder. Part of the samples is held back, and
    both models run on it at the end: the table shows what it cost and won.
    """
    options = {name: value for name, value in given.items() if name in OPTIONS}
    own = {name: value for name, value in given.items() if name not in OPTIONS and name not in ("config", "model")}
    asked = _Asked(models=given["model"], **own)
    console, errors = _console(), Console(stderr=True, soft_wrap=True)
    _log_to(errors, asked.verbose)
    _check_files(
        [path for path in (*asked.models, asked.output) if path is not None]
        + ([] if asked.calib is None else [Path(asked.calib)]),
        {
            "--json": asked.json,
            "--report": asked.report,
            "--save-config": asked.save_config,
            "--contact-sheet": asked.sheet,
        },
    )
    if asked.open and asked.report is None:
        raise OptionError("--open: opens the page of a report; give its path with --report")
    if asked.to_folder:
        return _quantize_to_folder(asked, options, console, errors)
    if asked.inspect or asked.sheet is not None:
        return _inspect(asked, options)
    _check_one(asked, options)
    if asked.save_config is not None:
        config_file.save_config(asked.save_config, spell(_explicit(click.get_current_context())))
    report = _quantize_or_plan(asked, options, errors)
    written = "" if asked.plan else f"; the model was written to {asked.output}"
    if asked.json is not None:
        _save("--json", asked.json, report.save_json, written)
    if asked.report is not None:
        _save("--report", asked.report, report.save_html, written)
    files = [path for path in (report.output, asked.report, asked.save_config) if path]
    _open(asked, errors)
    try:
        _print(report, files, console, errors, asked.quiet, asked.verbose)
    except OSError as error:
        raise OptionError(f"the report cannot be printed ({error.strerror or error}){written}") from error


command = _Command(
    PROGRAM,
    params=[
        click.Argument(["model"], type=click.Path(path_type=Path), nargs=-1, required=True),
        *(option for options in parameters().values() for option in options),
    ],
    callback=_run, help=_run.__doc__, epilog=EPILOG, context_settings=SETTINGS,
)  # fmt: skip


def _check_one(asked: _Asked, options: dict[str, Any]) -> None:
    """Raise OptionError where a run of one model lacks something, or is asked for what it does not do."""
    if not asked.plan and asked.output is None:
        raise OptionError("no output: give the quantized model's path with -o, or --plan to only look")
    if options["sensitivity"] and not asked.plan:
        raise OptionError("--sensitivity: only with --plan; the report of a run holds the same figures (--json)")


def _quantize_or_plan(asked: _Asked, options: dict[str, Any], errors: Console) -> Report:
    """Run the library, and show its progress."""
    if asked.plan:
        return pipeline.plan(asked.models[0], asked.calib, **options)
    with shown_progress(errors, asked.quiet) as update:
        return pipeline.quantize(asked.models[0], asked.output, asked.calib, progress=update, **options)


def _quantize_to_folder(asked: _Asked, options: dict[str, Any], console: Console, errors: Console) -> None:
    """Quantize several models, print what became of them in one table, and exit with the code of the first error."""
    ones = {
        "--plan": asked.plan, "--inspect-samples": asked.inspect, "--contact-sheet": asked.sheet,
        "--sensitivity": options["sensitivity"],
    }  # fmt: skip
    if given := [name for name, value in ones.items() if value]:
        raise OptionError(f"{given[0]}: is for one model; name one, and for a run a file for it with -o")
    if asked.output is None:
        raise OptionError("no output: give the folder that the models go to with -o")
    if asked.save_config is not None:
        config_file.save_config(asked.save_config, spell(_explicit(click.get_current_context())))
    with shown_progress(errors, asked.quiet) as update:
        done = folders.quantize_all(asked.models, asked.output, asked.calib, progress=update, **options)
    runs = folders.as_runs(done)
    written = f"; the models were written to {asked.output}"
    if asked.json is not None:
        _save("--json", asked.json, lambda path: several.save_json(runs, path), written)
    if asked.report is not None:
        from comq_onnx.report.several_page import save_html  # it imports matplotlib

        _save("--report", asked.report, lambda path: save_html(runs, path), written)
    _open(asked, errors)
    whole = any(one.error is None for one in done)
    files = [path for path in (asked.output if whole else None, asked.report, asked.save_config) if path]
    if not asked.quiet:
        console.print(several.table(runs, asked.verbose))
        _name(files, console)
    _tell_each(done, asked.quiet)
    if failed := [one.error.exit_code for one in done if one.error is not None]:
        sys.exit(failed[0])


def _tell_each(done: Sequence[folders.Done], quiet: bool) -> None:
    """Print the error of each model that failed in one line; if quiet, warnings too."""
    for one in done:
        if one.error is not None:
            click.echo(f"{PROGRAM}: {_in_one_line(one.named_error)}", err=True)
        for warning in one.report.warnings if one.report is not None and quiet else ():
            click.echo(_in_one_line(f"warning: {one.source}: {warning}"), err=True)


def _open(asked: _Asked, errors: Console) -> None:
    """Open the page of the report in the browser, if asked; where there is none, say so."""
    if asked.open and asked.report is not None and not webbrowser.open(asked.report.resolve().as_uri()):
        errors.print(
            f"warning: --open: no browser was found; the page is {asked.report}", markup=False, highlight=False
        )


def _name(files: Sequence[object], console: Console) -> None:
    """Print the names of files that were written."""
    for path in files:
        console.print(f"wrote    {path}", soft_wrap=True, highlight=False, markup=False)


def _log_to(errors: Console, verbose: bool) -> None:
    """Print the log on a console."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR, format="%(message)s",
        handlers=[RichHandler(console=errors, show_path=False, show_time=False)], force=True,
    )  # fmt: skip
    if verbose:
        for noisy in ("onnxscript", "onnx_ir"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


def _explicit(ctx: click.Context) -> dict[str, Any]:
    """Return the options that the command line or a configuration file gives, by parameter."""
    names = [str(p.name) for p in ctx.command.params]
    return {
        name: ctx.params[name]
        for name in names
        if is_in_config(name) and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _save(option: str, path: Path, save: Callable[[Path], None], written: str) -> None:
    """Write a report. Raises OptionError where that fails; written: the part of the error about the model."""
    try:
        save(path)
    except (OSError, OptionError) as error:
        if path.is_file():
            path.unlink()
        cause = error.__cause__ if isinstance(error, OptionError) and isinstance(error.__cause__, OSError) else error
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else cause
        raise OptionError(f"{option} {path}: cannot be written ({reason}){written}") from error


def _print(
    report: Report, files: Sequence[object], console: Console, errors: Console, quiet: bool, verbose: bool
) -> None:
    """Print a report and the names of the files that were written; if quiet, only warnings."""
    if quiet:
        for warning in report.warnings:
            errors.print(f"warning: {warning}", markup=False, highlight=False)
        return
    console.print(report.rich(verbose))
    _name(files, console)


def _console() -> Console:
    """Return the console of the table: as wide as the terminal, or wide enough for most names where there is none."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=PLAIN_WIDTH)


def _check_files(taken: list[Path], written: dict[str, Path | None]) -> None:
    """Raise OptionError for files that could not be written at the end, or that would overwrite something else.

    taken: files that must stay
    written: the files to write, by option
    """
    for option, path in written.items():
        if path is None:
            continue
        if path.is_dir() or not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise OptionError(f"{option} {path}: a directory, or in one that does not exist or cannot be written")
        if any(os.path.realpath(path) == os.path.realpath(other) for other in taken):
            raise OptionError(
                f"{option} {path}: would overwrite the model, the samples, the output or another file asked for; "
                "choose another file"
            )
        taken = [*taken, path]


def _inspect(asked: _Asked, options: dict[str, Any]) -> None:
    """Print what the model would be fed, and write the sheet of pictures if asked."""
    if not asked.inspect:
        raise OptionError(f"--contact-sheet {asked.sheet}: is for --inspect-samples; add that")
    others = {"-o": asked.output, "--plan": asked.plan, "--json": asked.json, "--report": asked.report}
    if given := [name for name, value in others.items() if value]:
        raise OptionError(f"{given[0]}: --inspect-samples only shows the samples; leave one of the two out")
    found = pipeline.inspect_samples(asked.models[0], asked.calib, **options)
    if asked.sheet is not None:
        if found.sheet is None:
            raise OptionError(f"--contact-sheet {asked.sheet}: the model takes no pictures of 1 or 3 channels")
        asked.sheet.write_bytes(found.sheet)
    _console().print(found.rich())


def main() -> None:
    """Run the command. Every foreseen error prints one line, and ends the process with its exit code."""
    memory.limit()
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), _stop)
    try:
        with _signals_waiting():
            # it tries a file in it, which a signal would leave there
            tempfile.gettempdir()
        command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _end("interrupted", signal.SIGINT)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()) + " (comq-onnx --help lists the options)", error.exit_code)
    except _Stopped as stopped:
        _end("stopped", stopped.args[0])
    except ComqError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        # a full disk can stop anything: temporary files, the cache of compiled code
        _fail(f"{error}; nothing was written: free some space, or check the permissions", OptionError.exit_code)
    except MemoryError:
        _fail("out of memory; try a smaller --batch-size, fewer --samples, or --memory", 5)


@contextlib.contextmanager
def _signals_waiting() -> Iterator[None]:
    """Let signals that end the process wait until the end of a `with` block."""
    came: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    theirs = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in theirs:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in theirs.items():
            signal.signal(number, handler)
    for number in came[:1]:
        signal.raise_signal(number)


class _Stopped(BaseException):
    """Tell that a signal asks the process to end: temporary files are removed first, as for Ctrl-C."""


def _stop(number: int, _frame: object) -> None:
    """Raise _Stopped for a signal."""
    raise _Stopped(number)


def _end(how: str, number: int) -> None:
    """Say that a signal ended the run, and end the process."""
    # objects that the signal left half made would print tracebacks as they go
    sys.unraisablehook = lambda _: None
    _fail(f"{how}; nothing was written", 128 + number)


def _fail(message: str, code: int) -> None:
    """Print an error in one line, and end the process."""
    click.echo(f"{PROGRAM}: {_in_one_line(message)}", err=True)
    sys.exit(code)


def _in_one_line(message: str) -> str:
    """Return a message without line breaks, what cannot be printed, and the middle of what is very long."""
    # names in it come from files that anybody may have made
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
