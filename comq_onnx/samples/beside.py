"""Files that lie beside a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def beside(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of these names beside a model; also one folder up where it lies in a folder `onnx`, as Hugging Face
    keeps them."""
    places = [folder, folder.parent] if folder.name == "onnx" else [folder]
    return [path for place in places for name in names if (path := place / name).is_file()]


# Configurations
# ---------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError, also for one nested more deeply than the parser goes."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
