"""Read budgets as a user writes them: the size of a file, an accuracy to keep."""

from __future__ import annotations

import re
from dataclasses import dataclass

from comq_onnx.errors import OptionError


@dataclass(frozen=True)
class Drop:
    """Describe the accuracy that may be lost; one of the fields is not None.

    points: points of top-1 agreement that may be lost, in percent
    sqnr_db: the SQNR in dB that must remain
    rise: by how much the perplexity may rise, in percent
    """

    points: float | None = None
    sqnr_db: float | None = None
    rise: float | None = None

    @property
    def kind(self) -> int:
        """Return the index of the noise that counts: 0 for the relative one, 1 for that of choices (bits/survey.py)."""
        return 0 if self.sqnr_db is not None else 1

    def of_perplexity(self) -> Drop:
        """Return the same number as a rise of the perplexity, for a model that is judged by it; an SQNR stays one."""
        return self if self.points is None else Drop(rise=self.points)


def parse_size(text: str, source: int) -> int:
    """Read a size in bytes, such as `25%` (of `source` bytes), `3MB`, `800kB` or `120000`. Raises OptionError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[kKmMgG]?i?[bB]?)\s*", text)
    if not found:
        raise OptionError(f"--size {text}: a share such as 25%, or a size such as 3MB or 800kB")
    number, unit = float(found[1]), found[2].lower()
    if unit == "%":
        return int(number / 100 * source)
    step = 1024 if "i" in unit else 1000
    return int(number * step ** " kmg".index(unit[0] if unit[:1] in ("k", "m", "g") else " "))


def parse_drop(text: str | float) -> Drop:
    """Read a drop: `0.5` (or `0.5%`) is points of top-1 agreement, `20dB` an SQNR to keep. Raises OptionError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(db|%)?\s*", str(text), re.IGNORECASE)
    decibels = found is not None and (found[2] or "").lower() == "db"
    if not found or float(found[1]) <= 0 or (not decibels and float(found[1]) >= 100):
        raise OptionError(
            f"--max-drop {text}: points of top-1 agreement or percent of perplexity, above 0 and below 100, such "
            "as 0.5, or an SQNR to keep, such as 20dB"
        )
    if decibels:
        return Drop(sqnr_db=float(found[1]))
    return Drop(points=float(found[1]))
