"""Options by their long names, as a configuration file and a command line spell them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

if sys.version_info >= (3, 11):
    pass
else:
    pass


# options of several numbers in one word, and what stands between those
JOINED = {"mean": ",", "std": ",", "resize": "x", "crop": "x"}
# the long names of those fields of Options whose own says more
LONG_NAMES = {"max_samples": "samples", "memory_gb": "memory"}


def chosen(
    options: Mapping[str, Any], defaults: Mapping[str, Any], long_names: Mapping[str, str] = LONG_NAMES
) -> dict[str, Any]:
    """What differs from the defaults, by long names, as TOML has it: pairs of a pattern and bits become RE=N."""
    found: dict[str, Any] = {}
    for field, value in options.items():
        if value is None or value == defaults.get(field):
            continue
        name = long_names.get(field, field).replace("_", "-")
        if field in JOINED and isinstance(value, tuple | list):
            value = JOINED[field].join(map(str, value))
        elif isinstance(value, tuple | list):
            value = ["=".join(map(str, v)) if isinstance(v, tuple | list) else str(v) for v in value]
        found[name] = value if isinstance(value, bool | int | float | list) else str(value)
    return found


def command_line(model: str, output: str | None, calib: str | None, options: Mapping[str, Any]) -> str:
    """The command that does a run again; options: what `chosen` gives."""
    words = ["comq-onnx", model]
    if calib is not None:
        words += ["--calib", calib]
    for name, value in options.items():
        if value is True or (name == "symmetric" and value is False):
            words.append("--asymmetric" if name == "symmetric" else f"--{name}")
        elif isinstance(value, list):
            words += [word for one in value for word in (f"--{name}", one)]
        elif value is not False:
            words += [f"--{name}", str(value)]
    words += ["-o", output] if output is not None else ["--plan"]
    return shlex.join(words)
