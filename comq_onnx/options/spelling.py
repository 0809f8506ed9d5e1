"""Spell options by their long names, as a configuration file and a command line have them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from comq_onnx.options.option import Option, options_of
from comq_onnx.options.options import Options

OPTIONS: dict[str, Option] = options_of(Options)


def long_name(field: str) -> str:
    """Return the long name, without dashes, of a field of Options or of another parameter of the command."""
    return OPTIONS[field].name if field in OPTIONS else field.replace("_", "-")


def spell(values: Mapping[str, Any]) -> dict[str, Any]:
    """Spell values by field as TOML has them, by long name. Those that are None are left out.

    Several numbers of one option become one word; pairs of a pattern and bits become RE=N.
    """
    return {long_name(field): _spelled(field, value) for field, value in values.items() if value is not None}


def differing(options: Options) -> dict[str, Any]:
    """Spell the options that differ from their defaults."""
    defaults = vars(Options())
    return spell({field: value for field, value in vars(options).items() if value != defaults[field]})


def _spelled(field: str, value: Any) -> Any:
    """Spell the value of one option as TOML has it."""
    separator = OPTIONS[field].separator if field in OPTIONS else None
    if isinstance(value, tuple | list):
        if separator is not None:
            return separator.join(map(str, value))
        return ["=".join(map(str, v)) if isinstance(v, tuple | list) else str(v) for v in value]
    return value if isinstance(value, bool | int | float) else str(value)


def command_line(model: str, output: str | None, calib: str | None, options: Mapping[str, Any]) -> str:
    """Return the command line that repeats a run.

    output: None for a command that only plans
    options: what `spell` returns
    """
    opposites = {option.name: option.off for option in OPTIONS.values() if option.off is not None}
    words = ["comq-onnx", model]
    if calib is not None:
        words += ["--calib", calib]
    for name, value in options.items():
        if isinstance(value, bool):
            flag = name if value else opposites.get(name)
            words += [f"--{flag}"] if flag is not None else []
        elif isinstance(value, list):
            words += [word for one in value for word in (f"--{name}", one)]
        else:
            words += [f"--{name}", str(value)]
    words += ["-o", output] if output is not None else ["--plan"]
    return shlex.join(words)
