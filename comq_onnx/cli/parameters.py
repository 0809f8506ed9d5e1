"""Make the parameters of the command: those of the library from the fields of Options, and those of its own."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from comq_onnx.cli.config_file import load_config
from comq_onnx.cli.demo import run_demo
from comq_onnx.errors import OptionError, did_you_mean
from comq_onnx.options.option import GROUPS, INPUT_OUTPUT, OUTPUT, QUANTIZATION, RUNNING, SAMPLES, SOLVER
from comq_onnx.options.option import Option as Declared
from comq_onnx.options.options import Options
from comq_onnx.options.samples import Size
from comq_onnx.options.spelling import OPTIONS
from comq_onnx.solve.grid import MAX_BITS, MIN_BITS

PROGRAM = "comq-onnx"


class Choice(click.Choice[str]):
    """Take one of some values, or another that a pattern allows; an error names the value that may have been meant."""

    def __init__(self, choices: Sequence[str], other: str | None = None) -> None:
        """Take the values, and the pattern of other values."""
        super().__init__(choices)
        self._other = other

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value if it is possible."""
        if self._other is not None and re.fullmatch(self._other, str(value)):
            return str(value)
        return super().convert(value, param, ctx)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Say which values are possible, and which is nearest."""
        message = super().get_invalid_choice_message(value, ctx).rstrip(".")
        return message + did_you_mean(str(value), map(str, self.choices))


class BitsFor(click.ParamType[tuple[str, int]]):
    """Take a pattern and a number of bits."""

    name = "RE=N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return (pattern, bits)."""
        if isinstance(value, tuple):
            return value
        pattern, separator, number = str(value).rpartition("=")
        if not separator or not number.isdigit():
            self.fail(f"{value!r} is not a pattern and a number of bits, such as 'fc=8'", param, ctx)
        return pattern, int(number)


class Numbers(click.ParamType[tuple[float, ...]]):
    """Take numbers with commas between them."""

    name = "N[,N,N]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers."""
        try:
            return value if isinstance(value, tuple) else tuple(float(number) for number in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not one number, or three with commas between", param, ctx)


class Pixels(click.ParamType[Size]):
    """Take a number of pixels, or a height and a width."""

    name = "N|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        """Return the number, or (height, width)."""
        sides = [str(value)] if isinstance(value, int) else str(value).lower().split("x")
        if len(sides) > 2 or not all(side.isdecimal() for side in sides):
            self.fail(f"{value!r} is not a number of pixels, or HEIGHTxWIDTH", param, ctx)
        return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


class Bits(click.ParamType[int | float | str]):
    """Take a number of bits, a mean number of bits, or auto."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float | str:
        """Return the number, as an int if it is whole, or "auto"."""
        if value == "auto":
            return "auto"
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of bits, such as 4 or 3.5, nor auto", param, ctx)
        if not MIN_BITS <= number <= MAX_BITS:
            self.fail(f"{value} bits: {MIN_BITS} to {MAX_BITS} are possible, or auto", param, ctx)
        return int(number) if number.is_integer() else number


class Gigabytes(click.FloatRange):
    """Take a number of gigabytes, or one with its unit, such as 500MB."""

    name = "GB"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the gigabytes."""
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt])b?", str(value).strip().lower())
        if found is None:
            return float(super().convert(value, param, ctx))
        return float(found[1]) * 1000.0 ** ("kmgt".index(found[2]) - 2)


# The options of the library
# ----------------------------------------------------------------------------------------------------------------------

TYPES = typing.get_type_hints(Options)
DEFAULTS = {field.name: field.default for field in fields(Options)}
# what converts the types of fields that are neither plain numbers nor texts
CONVERTERS: list[tuple[Any, click.ParamType[Any]]] = [
    (int | float | str, Bits()),
    (tuple[float, ...] | None, Numbers()),
    (Size | None, Pixels()),
    (tuple[tuple[str, int], ...], BitsFor()),
]
# those of options whose numbers have a unit
BY_NAME: dict[str, click.ParamType[Any]] = {"memory": Gigabytes(0)}


def from_library(group: str) -> list[click.Option]:
    """Make the options of the command from the fields of Options that belong to a group."""
    return [_click_option(name, option) for name, option in OPTIONS.items() if option.group == group]


def _click_option(field: str, option: Declared) -> click.Option:
    """Make the option of the command from one field of Options."""
    kind, default = TYPES[field], DEFAULTS[field]
    is_flag = isinstance(default, bool)
    flags = f"--{option.name}" + (f"/--{option.off}" if option.off is not None else "")
    several = isinstance(default, tuple)
    return click.Option(
        [flags, field],
        type=None if is_flag else _click_type(kind, option),
        is_flag=is_flag,
        default=None if default == () else default,
        multiple=several,
        metavar=option.metavar,
        help=option.help,
    )


def _click_type(kind: Any, option: Declared) -> click.ParamType[Any] | None:
    """Choose what converts a text to the value of an option; kind: the type of the field."""
    found = BY_NAME.get(option.name) or next((converter for known, converter in CONVERTERS if known == kind), None)
    if found is not None:
        return found
    if option.choices:
        return Choice(option.choices, option.other)
    least, most = (None if math.isinf(bound) else bound for bound in option.bounds)
    wanted = [t for t in (int, float) if t is kind or t in typing.get_args(kind)]
    if str in typing.get_args(kind) or not wanted:
        return click.STRING
    if least is None and most is None:
        return click.INT if wanted == [int] else click.FLOAT
    if wanted == [int]:
        return click.IntRange(None if least is None else int(least), None if most is None else int(most))
    return click.FloatRange(least, most, min_open=option.above)


# All parameters of the command
# ----------------------------------------------------------------------------------------------------------------------


def by_long_name(command: click.Command) -> dict[str, click.Option]:
    """Return the options of a command by their long names without dashes."""
    options = [p for p in command.params if isinstance(p, click.Option)]
    return {
        name.removeprefix("--"): option
        for option in options
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("--")
    }


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    """Read a configuration file, whose options count where the command line does not give them."""
    if path is not None:
        ctx.default_map = read_by_parameter(path, ctx.command)
    return path


def read_by_parameter(path: Path, command: click.Command) -> dict[str, Any]:
    """Read a configuration file as values by parameter. Raises OptionError."""
    return _by_parameter(load_config(path), path, command)


def _by_parameter(given: dict[str, Any], path: Path, command: click.Command) -> dict[str, Any]:
    """Return the values of a configuration file by parameter; given: those by long name.

    Raises OptionError for a name that is no option, or a value of the wrong type.
    """
    options = {name: option for name, option in by_long_name(command).items() if is_in_config(str(option.name))}
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


def _print_completion(ctx: click.Context, _param: click.Parameter, shell: str | None) -> None:
    """Print the script that completes the command in a shell, and end the command."""
    if shell is None or ctx.resilient_parsing:
        return
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.command, {}, PROGRAM, f"_{PROGRAM}_COMPLETE".replace("-", "_").upper()).source())
    ctx.exit()


def _file(flag: str, help: str, metavar: str | None = None, **more: Any) -> click.Option:
    """Make an option that takes a path."""
    return click.Option([*flag.split()], type=click.Path(path_type=Path), metavar=metavar, help=help, **more)


def _flag(flags: str, help: str) -> click.Option:
    """Make an option without a value."""
    return click.Option(flags.split(), is_flag=True, help=help)


# parameters of one run, not of how a model is quantized: no configuration file may have them
ONE_RUN = frozenset(
    {"model", "config", "save_config", "plan", "inspect", "sheet", "open", "version", "demo", "completion", "help"}
)


def is_in_config(parameter: str) -> bool:
    """Tell whether a configuration file may have a parameter."""
    return parameter not in ONE_RUN and (parameter not in OPTIONS or OPTIONS[parameter].in_config)


def parameters() -> dict[str, list[click.Option]]:
    """Make all options of the command, by the title under which help shows them."""
    return {
        INPUT_OUTPUT: [
            _file("-o --output", "Where the quantized model goes."),
            _file("--report", "Write the report as one HTML page.", "FILE"),
            _flag("--open", "Open the page of --report in the browser when it is written."),
            _file("--json", "Write the report as JSON.", "FILE"),
            _flag("--plan", "List layers, bits and stages; calibrate and write nothing."),
            *from_library(INPUT_OUTPUT),
            _file("--config", "Take options from a TOML file, by long names; the command line wins.", "FILE",
                  is_eager=True, callback=_read_config),
            _file("--save-config", "Write the options given to a TOML file for --config.", "FILE"),
        ],
        SAMPLES: [
            _file("--calib", "Samples: arrays, images, text, sound; files, folders, patterns; file.py:name.", "PATH"),
            *from_library(SAMPLES),
            _flag("--inspect-samples inspect", "Show what the model would be fed; write nothing else."),
            _file("--contact-sheet sheet", "With --inspect-samples: the pictures as the model sees them, as PNG.",
            "FILE"),
        ],
        QUANTIZATION: from_library(QUANTIZATION),
        SOLVER: from_library(SOLVER),
        RUNNING: from_library(RUNNING),
        OUTPUT: [
            _flag("-q --quiet", "Print only warnings and errors."),
            _flag("-v --verbose", "Log every layer and list them all."),
            _version(),
            click.Option(["--demo"], is_flag=True, is_eager=True, expose_value=False, callback=run_demo,
                         help="Quantize a small model that comes with this package, in the folder comq-demo."),
            click.Option(["--completion"], type=Choice(["bash", "zsh", "fish"]), is_eager=True, expose_value=False,
                         callback=_print_completion, help="Print the completion script of a shell."),
        ],
    }  # fmt: skip


def _version() -> click.Option:
    """Make the option that prints the version and ends."""

    @click.version_option(None, "--version", package_name=PROGRAM)
    def holder() -> None:
        """Hold the option until it is taken."""

    (option,) = holder.__click_params__  # type: ignore[attr-defined]
    return typing.cast(click.Option, option)


def grouped(command: click.Command, ctx: click.Context) -> list[tuple[str, list[click.Option]]]:
    """Return the options of a command by title, in the order of GROUPS; --help itself is the last."""
    options = {str(p.name): p for p in command.get_params(ctx) if isinstance(p, click.Option)}
    titles = {title: [str(option.name) for option in members] for title, members in parameters().items()}
    found = [(title, [options.pop(name) for name in titles[title] if name in options]) for title in GROUPS]
    found[-1][1].extend(options.values())
    return [(title, members) for title, members in found if members]
