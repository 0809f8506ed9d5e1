"""Find configurations that lie beside a model, and parse them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comq_onnx.model.files import HUB


def find_beside(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of these names in the folder of a model, in the order of `names`.

    Where that folder is `onnx`, the folder above counts too: Hugging Face keeps configurations there.
    """
    places = [folder, folder.parent] if folder.name == HUB else [folder]
    return [path for place in places for name in names if (path := place / name).is_file()]


def parse_json(text: str) -> Any:
    """Parse a JSON text. Raises ValueError, also for one that is nested more deeply than the parser can go."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
