"""Read reports that were written as JSON."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from comq_onnx.errors import OptionError
from comq_onnx.report.report import Report
from comq_onnx.report.several import Run


def read_runs(path: Path) -> list[Run]:
    """Read the report of a run, or those of a queue, from a JSON file. Raises OptionError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "models" not in values:
            return [Run(str(path), _made(Report, values))]
        return [
            Run(one["name"], one["report"] and _made(Report, one["report"]), said=one["said"], failed=one["failed"])
            for one in values["models"]
        ]
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror or error}); give reports of --json") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(f"{path}: is no report ({error}); give what --json of comq-onnx wrote") from error


def _made(kind: Any, value: Any) -> Any:
    """Make a value of a type from what JSON keeps of it; fields that the type does not have are left out."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        return kind(**{name: _made(hints[name], one) for name, one in value.items() if name in known})  # type: ignore[operator]
    if origin in (typing.Union, types.UnionType):
        made = [one for one in inner if dataclasses.is_dataclass(one)]
        return value if value is None or not made else _made(made[0], value)
    if origin is list:
        return [_made(inner[0], one) for one in value]
    if origin is tuple:
        return tuple(_made(inner[0], one) for one in value)
    return value
