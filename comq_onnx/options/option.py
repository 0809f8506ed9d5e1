"""What is said of an option beside its name, type and default: the one place where it is declared."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comq_onnx.errors import OptionError, did_you_mean

# the titles under which help and the option reference show options
INPUT_OUTPUT = "Input and output"
SAMPLES = "Samples"
QUANTIZATION = "What is quantized, and how"
SOLVER = "Solver"
RUNNING = "Running"
OUTPUT = "What is said"
GROUPS = (INPUT_OUTPUT, SAMPLES, QUANTIZATION, SOLVER, RUNNING, OUTPUT)


@dataclass(frozen=True)
class Option:
    """Describe an option of the library and of the command line.

    name: the long name without dashes
    group: the title under which help shows it
    help: what it does, in a sentence
    metavar: what stands for its value in help
    choices: the values that it can have; other: a pattern of values that it can have beside them
    bounds: the least and the greatest number; above: whether the least itself is excluded
    expected: what a number out of bounds should have been, for the error
    check: raises OptionError for a value that cannot be
    separator: what stands between several numbers in one word
    off: the long name of the flag that turns it off
    lasting: whether the written model depends on it
    in_config: whether a configuration file may have it
    """

    name: str
    group: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    other: str | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    above: bool = False
    expected: str = "1 or more"
    check: Callable[[Any], object] | None = None
    separator: str | None = None
    off: str | None = None
    lasting: bool = True
    in_config: bool = True

    def verify(self, value: Any) -> None:
        """Raise OptionError where the option cannot have a value; None is always possible."""
        if value is None:
            return
        if self.choices and value not in self.choices and not (self.other and re.fullmatch(self.other, str(value))):
            raise OptionError(
                f"--{self.name} {value}: choose one of {', '.join(self.choices)}{did_you_mean(value, self.choices)}"
            )
        least, most = self.bounds
        if self.bounds != (-math.inf, math.inf) and not (
            (value > least if self.above else value >= least) and value <= most
        ):
            raise OptionError(f"--{self.name} {value}: must be {self.expected}")
        if self.check is not None:
            self.check(value)


def declare(default: Any, group: str, help: str, *, name: str = "", **more: Any) -> Any:
    """Declare an option as the field of a dataclass; `name` where the long name is not that of the field."""
    return dataclasses.field(default=default, metadata={"option": Option(name, group, help, **more)})


def options_of(declared: Any) -> dict[str, Option]:
    """Return the options of a dataclass (or of its instance) by field, each with its long name."""
    return {
        field.name: dataclasses.replace(option, name=option.name or field.name.replace("_", "-"))
        for field in dataclasses.fields(declared)
        for option in [field.metadata["option"]]
    }


def verify(options: Any) -> None:
    """Raise OptionError for the first option that cannot have its value."""
    for field, option in options_of(options).items():
        option.verify(getattr(options, field))
