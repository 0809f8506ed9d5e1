"""Read and write configuration files: options by their long names, in TOML.

bits = 4
calib = "photos"
preprocess = "imagenet"
bits-for = ["head=8"]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from comq_onnx.errors import OptionError
from comq_onnx.model.files import write_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_config(path: Path) -> dict[str, Any]:
    """Read the options of a TOML file, by long name. Raises OptionError where that fails."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"--config {path}: cannot be read ({error.strerror}); give a TOML file") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or nested too deeply
        raise OptionError(
            f"--config {path}: not a TOML file ({error}); expected lines such as bits = 4, by options' long names"
        ) from error


def save_config(path: Path, options: Mapping[str, Any]) -> None:
    """Write options, by long name, as TOML. Raises OptionError where that fails."""
    write_text(path, tomli_w.dumps(dict(options)))
