"""The command line: options, progress, the table. The only module that prints or exits."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from comq_onnx import pipeline
from comq_onnx.cli import config_file
from comq_onnx.cli.config_file import load_config
from comq_onnx.errors import ComqError, OptionError, did_you_mean
from comq_onnx.options.samples import CHANNELS, DTYPES, LAYOUTS, Size
from comq_onnx.options.spelling import chosen
from comq_onnx.report.report import Report
from comq_onnx.runtime import memory
from comq_onnx.samples.images.preprocess import PREPROCESS
from comq_onnx.solve.effort import EFFORTS
from comq_onnx.solve.grid import MAX_BITS, MIN_BITS
from comq_onnx.solve.layer import METHODS
from comq_onnx.solve.paper import ORDERS, SWEEPS
from comq_onnx.targets.catalog import TARGETS

PROGRAM = "comq-onnx"
EPILOG = """\b
Examples:
  comq-onnx model.onnx --calib photos/ --preprocess imagenet -o model_q.onnx
  comq-onnx model.onnx --calib samples.npz --bits 8 -o model_q.onnx --report report.html
  comq-onnx model.onnx --calib samples.npz --bits 4 --bits-for 'head|stem=8' -o model_q.onnx
  comq-onnx model.onnx --calib samples.npz --activations none --granularity 32 -o model_q.onnx
  comq-onnx model.onnx --calib samples.npz --bits auto --size 20% -o model_q.onnx
  comq-onnx model.onnx --plan
  comq-onnx model.onnx --config quant.toml

\b
Shell completion, for this shell or in its start-up file:
  eval "$(comq-onnx --completion bash)"      # or zsh; for fish: comq-onnx --completion fish | source

Exit codes: 0 done, 2 the command line, 3 the model, 4 the samples, 5 the runtime."""
# how --help and docs/options.md group the options, by parameter names
GROUPS: dict[str, tuple[str, ...]] = {
    "Input and output": ("output", "report_path", "json_path", "plan", "sensitivity", "config", "save_config"),
    "Samples": (
        "calib", "preprocess", "mean", "std", "resize", "crop", "layout", "channels", "dtype", "tokenizer",
        "text_field", "length", "max_samples", "batch_size", "seed", "inspect", "sheet",
    ),
    "What is quantized, and how": (
        "bits", "size", "max_drop", "uniform", "bits_for", "include", "exclude", "activations", "granularity",
        "symmetric", "target",
    ),
    "Solver": ("solver", "effort", "order", "sweeps", "shrink", "independent"),
    "Running": ("device", "memory_gb"),
    "What is said": ("quiet", "verbose", "version", "completion", "_click_default_help"),
}  # fmt: skip
# of one run, not of how a model is quantized: in no configuration file
NOT_IN_CONFIG = frozenset(
    {
        "model", "config", "save_config", "plan", "inspect", "sheet", "sensitivity", "version", "completion", "help",
    }
)  # fmt: skip
# lines of a table that goes to a file are not cut at 80 columns
PLAIN_WIDTH = 140


class _Command(click.Command):
    """A command whose help shows the options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, options in grouped(self.get_params(ctx)):
            records = [record for option in options if (record := option.get_help_record(ctx)) is not None]
            with formatter.section(title):
                formatter.write_dl(records)


def grouped(parameters: Sequence[click.Parameter]) -> list[tuple[str, list[click.Option]]]:
    """The options under their titles, in the order of GROUPS; those of no group last."""
    options = {str(p.name): p for p in parameters if isinstance(p, click.Option)}
    found = [(title, [options.pop(name) for name in names if name in options]) for title, names in GROUPS.items()]
    return [(title, members) for title, members in [*found, ("More", list(options.values()))] if members]


class _Choice(click.Choice[str]):
    """A choice whose error says which one may have been meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        message = super().get_invalid_choice_message(value, ctx).rstrip(".")
        return message + did_you_mean(str(value), map(str, self.choices))


class _Device(_Choice):
    """A choice that takes the number of a GPU too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value) if re.fullmatch("cuda:[0-9]{1,3}", str(value)) else super().convert(value, param, ctx)


LONGEST_LINE = 600


class _BitsFor(click.ParamType[tuple[str, int]]):
    name = "RE=N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        pattern, separator, number = str(value).rpartition("=")
        if not separator or not number.isdigit():
            self.fail(f"{value!r} is not a pattern and a number of bits, such as 'fc=8'", param, ctx)
        return pattern, int(number)


class _Numbers(click.ParamType[tuple[float, ...]]):
    name = "N[,N,N]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return value if isinstance(value, tuple) else tuple(float(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not one number, or three with commas between", param, ctx)


class _Size(click.ParamType[Size]):
    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        sides = [str(value)] if isinstance(value, int) else str(value).lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            self.fail(f"{value!r} is not a number of pixels, or HEIGHTxWIDTH", param, ctx)
        return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


class _Bits(click.ParamType[int | float | str]):
    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float | str:
        if value == "auto":
            return "auto"
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of bits, such as 4 or 3.5, nor auto", param, ctx)
        if not MIN_BITS <= number <= MAX_BITS:
            self.fail(f"{value} bits: {MIN_BITS} to {MAX_BITS} are possible, or auto", param, ctx)
        return int(number) if number.is_integer() else number


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Take the options of a configuration file for those that the command line does not give."""
    if path is not None:
        ctx.default_map = _by_parameter(load_config(path), path, ctx.command)
    return path


def _by_parameter(given: dict[str, Any], path: Path, command: click.Command) -> dict[str, Any]:
    """Values by long name as values by parameter name. Raises OptionError for what is no option or has no such type."""
    options = {name: option for name, option in by_long_name(command).items() if option.name not in NOT_IN_CONFIG}
    found = {}
    for name, value in given.items():
        option = options.get(name)
        if option is None:
            raise OptionError(
                f"--config {path}: no option is called {name!r}; expected long names without dashes, such as bits"
                f"{did_you_mean(name, options)}"
            )
        values = value if isinstance(value, list) else [value]
        fits = all(isinstance(v, str | int | float) and isinstance(v, bool) == option.is_flag for v in values)
        if not fits or (isinstance(value, list) and not option.multiple):
            expected = "true or false" if option.is_flag else "a list of texts" if option.multiple else "one value"
            raise OptionError(f"--config {path}: {name} = {value!r}; expected {expected}")
        opposite = f"--{name}" in option.secondary_opts
        found[str(option.name)] = [str(v) for v in values] if option.multiple else (not value if opposite else value)
    return found


def by_long_name(command: click.Command) -> dict[str, click.Option]:
    """The options of a command by their long names without dashes."""
    options = [p for p in command.params if isinstance(p, click.Option)]
    return {
        name.removeprefix("--"): option
        for option in options
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--")
    }


def _given(ctx: click.Context) -> dict[str, Any]:
    """The options that the command line or a configuration file gave, by parameter name."""
    names = [str(p.name) for p in ctx.command.params]
    return {
        name: ctx.params[name]
        for name in names
        if name not in NOT_IN_CONFIG and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }


def _print_completion(ctx: click.Context, _param: click.Parameter, shell: str | None) -> None:
    """Print the script that completes the command in a shell, and end."""
    if shell is None or ctx.resilient_parsing:
        return
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.command, {}, PROGRAM, f"_{PROGRAM}_COMPLETE".replace("-", "_").upper()).source())
    ctx.exit()


SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.command(cls=_Command, context_settings=SETTINGS, epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the quantized model goes.")
@click.option("--bits", type=_Bits(), default=4, metavar="N|auto",
              help=f"Of a weight, {MIN_BITS} to {MAX_BITS}; 3.5 in the mean; auto with --size or --max-drop.",
)  # fmt: skip
@click.option("--size", metavar="25%|3MB", help="With --bits auto: the most that the file may take.")
@click.option("--max-drop", metavar="0.5|20dB",
              help="With --bits auto: points of top-1 agreement that may be lost, or the SQNR to keep.")  # fmt: skip
@click.option("--uniform", is_flag=True,
              help="The same bits for all layers, none more for those that gain most by it.")  # fmt: skip
@click.option("--calib", "calib", type=click.Path(path_type=Path), metavar="PATH",
              help="Samples: arrays, images, text, sound; files, folders, patterns; file.py:name.")  # fmt: skip
@click.option(
    "--preprocess",
    metavar="NAME|FILE",
    help=f"For images: {', '.join(PREPROCESS)}, or a JSON file.  [default: a file beside the model]",
)
@click.option("--mean", type=_Numbers(), help="For images: one number, or three in the order of --channels.")
@click.option("--std", type=_Numbers(), help="For images, likewise.")
@click.option(
    "--resize",
    type=_Size(),
    metavar="N|HxW",
    help="For images: the short side, or HxW exactly.  [default: crop / 0.875]",
)
@click.option("--crop", type=_Size(), metavar="N|HxW", help="For images: of the centre.  [default: the model's input]")
@click.option("--layout", type=click.Choice(LAYOUTS), help="For images.  [default: as the model shows]")
@click.option("--channels", type=click.Choice(CHANNELS), help="For images.  [default: rgb, or grey for one channel]")
@click.option("--dtype", type=click.Choice(DTYPES), help="For images: of the pixels.  [default: the input's]")
@click.option("--tokenizer", metavar="FILE", help="For text: a tokenizer.json.  [default: the one beside the model]")
@click.option("--text-field", metavar="NAME", help="For .jsonl text: where each line has it.  [default: text]")
@click.option(
    "--length",
    type=click.IntRange(1),
    metavar="N",
    help="Tokens of a text at most, points of a sound.  [default: the model's, or 128 and 16000]",
)
@click.option(
    "--inspect-samples", "inspect", is_flag=True, help="Show what the model would be fed; write nothing else."
)
@click.option("--contact-sheet", "sheet", type=click.Path(path_type=Path), metavar="FILE",
              help="With --inspect-samples: the pictures as the model sees them, as PNG.")  # fmt: skip
@click.option(
    "--samples",
    "max_samples",
    type=click.IntRange(1),
    metavar="N",
    default=pipeline.DEFAULT_SAMPLES,
    help="Samples to calibrate on, at most.",
)
@click.option("--batch-size", type=click.IntRange(1), default=16, metavar="N", help="Samples run at once.")
@click.option("--target", type=_Choice(list(TARGETS)), default="ort-cpu",
              help="What will run the model.\n\n\b\n" + "\n".join(f"{t.name}: {t.about}." for t in TARGETS.values()),
)  # fmt: skip
@click.option("--activations", type=_Choice(["auto", "none", "8", "16"]), default="auto",
              help="Bits of activations; auto: 8 where integers are faster; none: weight-only.")  # fmt: skip
@click.option("--granularity", default="channel", metavar="channel|tensor|BLOCK", help="What shares a weight scale.")
@click.option("--symmetric/--asymmetric", default=True, help="Whether weights have zero point 0.")
@click.option("--include", multiple=True, metavar="RE", help="Only layers whose name matches; may be repeated.")
@click.option("--exclude", multiple=True, metavar="RE", help="Not the layers whose name matches; may be repeated.")
@click.option(
    "--bits-for",
    multiple=True,
    type=_BitsFor(),
    metavar="RE=N",
    help="Other bits for the layers that match; may be repeated.",
)
@click.option("--solver", type=_Choice(METHODS), default="comq",
              help="comq; for comparison paper (the authors' COMQ), gptq, and rtn (plain rounding).")  # fmt: skip
@click.option("--effort", type=_Choice(list(EFFORTS)), default="default",
              help="How long comq searches: fast takes a third of default's time, max 15 times it.")  # fmt: skip
@click.option("--order", type=_Choice(ORDERS), help="Of the paper's solver.  [default: greedy]")
@click.option("--sweeps", type=click.IntRange(1), metavar="N", help=f"Of the paper's solver.  [default: {SWEEPS}]")
@click.option("--shrink", type=click.FloatRange(0, 2, min_open=True), metavar="X",
              help="Of the paper's solver: factor on the first scale.  [default: by the bits]")  # fmt: skip
@click.option("--independent", is_flag=True, help="Calibrate every layer on the float model, as the paper does.")
@click.option("--device", type=_Device(["auto", "cpu", "cuda"]), default="auto", metavar="auto|cpu|cuda[:N]",
              help="Where to calibrate and solve; N is the number of a GPU.")  # fmt: skip
@click.option("--memory", "memory_gb", type=click.FloatRange(min=0.0), metavar="GB",
              help="For tensors kept between stages, then the disk.  [default: half of what is free]")  # fmt: skip
@click.option("--plan", is_flag=True, help="List layers, bits and stages; calibrate and write nothing.")
@click.option("--sensitivity", is_flag=True, help="With --plan: rank the layers by what quantizing each costs.")
@click.option("--report", "report_path", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the report as one HTML page.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as JSON.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", is_eager=True, callback=_read_config,
              help="Take options from a TOML file, by long names; the command line wins.")  # fmt: skip
@click.option("--save-config", type=click.Path(path_type=Path), metavar="FILE",
              help="Write the options given to a TOML file for --config.")  # fmt: skip
@click.option("--seed", default=0, metavar="N", help="Which samples are used and held back.")
@click.option("-q", "--quiet", is_flag=True, help="Print only warnings and errors.")
@click.option("-v", "--verbose", is_flag=True, help="Log every layer and list them all.")
@click.option("--completion", type=_Choice(["bash", "zsh", "fish"]), is_eager=True, expose_value=False,
              callback=_print_completion, help="Print the completion script of a shell.")  # fmt: skip
@click.version_option(None, "--version", package_name="comq-onnx")
@click.pass_context
def command(
    ctx: click.Context, /, model: Path, output: Path | None, calib: str | None, plan: bool, report_path: Path | None,
    json_path: Path | None, save_config: Path | None, quiet: bool, verbose: bool, inspect: bool, sheet: Path | None,
    **options: Any,
) -> None:  # fmt: skip
    """Quantize the ONNX MODEL with COMQ and write a QDQ model that runs in integers.

    Part of the samples is held back, and both models run on it at the end: the table shows what it cost and won.
    """
    del options["config"]
    console, errors = _console(), Console(stderr=True, soft_wrap=True)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR, format="%(message)s",
        handlers=[RichHandler(console=errors, show_path=False, show_time=False)], force=True,
    )  # fmt: skip
    if verbose:
        for noisy in ("onnxscript", "onnx_ir"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
    samples = [] if calib is None else [Path(calib)]
    _check_files(
        [p for p in (model, output) if p is not None] + samples,
        {"--json": json_path, "--report": report_path, "--save-config": save_config, "--contact-sheet": sheet},
    )
    if inspect or sheet is not None:
        others = {"-o": output, "--plan": plan, "--json": json_path, "--report": report_path}
        return _inspect(model, calib, inspect, sheet, others, options)
    if not plan and output is None:
        raise OptionError("no output: give the quantized model's path with -o, or --plan to only look")
    if options["sensitivity"] and not plan:
        raise OptionError("--sensitivity: only with --plan; the report of a run holds the same figures (--json)")
    if save_config is not None:
        config_file.save_config(save_config, chosen(_given(ctx), {}, _long_names()))
    if plan:
        report = pipeline.plan(model, calib, **options)
    else:
        with _progress(errors, quiet) as update:
            report = pipeline.quantize(model, output, calib, progress=update, **options)
    written = "" if plan else f"; the model was written to {output}"
    if json_path is not None:
        _save("--json", json_path, report.save_json, written)
    if report_path is not None:
        _save("--report", report_path, report.save_html, written)
    files = [path for path in (report.output, report_path, save_config) if path]
    try:
        _print(report, files, console, errors, quiet, verbose)
    except OSError as error:
        raise OptionError(f"the report cannot be printed ({error.strerror or error}){written}") from error


def _save(option: str, path: Path, save: Callable[[Path], None], written: str) -> None:
    """Write a report; where that fails, say that the model was written."""
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
    if quiet:
        for warning in report.warnings:
            errors.print(f"warning: {warning}", markup=False, highlight=False)
        return
    console.print(report.rich(verbose))
    for path in files:
        console.print(f"wrote    {path}", soft_wrap=True, highlight=False, markup=False)


def _console() -> Console:
    """Where the table goes: as wide as the terminal, else wide enough for most names."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=PLAIN_WIDTH)


def _long_names() -> dict[str, str]:
    """The long name, without dashes, of each parameter."""
    names: dict[str, str] = {}
    for name, option in by_long_name(command).items():
        names.setdefault(str(option.name), name)
    return names


def _check_files(taken: list[Path], written: dict[str, Path | None]) -> None:
    """Refuse files that could not be written at the end, or that would overwrite something else."""
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


def _inspect(
    model: Path, calib: str | None, inspect: bool, sheet: Path | None, others: dict[str, Any], options: dict[str, Any]
) -> None:
    """Print what the model would be fed, and write the sheet of pictures where one is asked for."""
    if not inspect:
        raise OptionError(f"--contact-sheet {sheet}: is for --inspect-samples; add that")
    if given := [name for name, value in others.items() if value]:
        raise OptionError(f"{given[0]}: --inspect-samples only shows the samples; leave one of the two out")
    found = pipeline.inspect_samples(model, calib, **options)
    if sheet is not None:
        if found.sheet is None:
            raise OptionError(f"--contact-sheet {sheet}: the model takes no pictures of 1 or 3 channels")
        sheet.write_bytes(found.sheet)
    _console().print(found.rich())


class _progress:
    """One bar per long step on a terminal, with the time left; nothing elsewhere."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            # stages take from a second to many minutes: the speed is that of all so far
            speed_estimate_period=24 * 3600,
            console=console, disable=quiet or not console.is_terminal, transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def _update(self, what: str, done: int, total: int) -> None:
        if what in self._tasks and done < self._bar.tasks[self._tasks[what]].completed:
            self._bar.reset(self._tasks[what], total=total)
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._bar.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def main() -> None:
    """Run the command; one line for every foreseen error, with its exit code."""
    memory.limit()
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), _stop)
    try:
        command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        _fail("interrupted; nothing was written", 130)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()) + " (comq-onnx --help lists the options)", error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)
    except _Stopped as stopped:
        _fail("stopped; nothing was written", 128 + stopped.args[0])
    except ComqError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        # a full disk is met anywhere: by temporary files, by the cache of compiled code
        _fail(f"{error}; nothing was written: free some space, or check the permissions", OptionError.exit_code)
    except MemoryError:
        _fail("out of memory; try a smaller --batch-size, fewer --samples, or --memory", 5)


class _Stopped(BaseException):
    """A signal asks the process to end: temporary files are to be removed first, as for Ctrl-C."""


def _stop(number: int, _frame: object) -> None:
    raise _Stopped(number)


def _fail(message: str, code: int) -> None:
    # names come from files that anybody may have made
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    click.echo(f"{PROGRAM}: {line}", err=True)
    sys.exit(code)
