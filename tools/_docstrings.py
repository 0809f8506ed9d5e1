"""Show the lines `name: meaning` of docstrings as lists in the site's API reference: an extension of griffe."""

from __future__ import annotations

import re
from typing import Any

import griffe

# a name, or several, and what they mean; lines that go on are indented
_ENTRY = re.compile(r"^(\w+(?:, \w+)*): (.*(?:\n +.*)*)$", re.MULTILINE)


def as_lists(text: str) -> str:
    """Return a docstring whose entries are lists, with a blank line before each."""
    return re.sub(
        r"(?:^\w+(?:, \w+)*: .*\n?(?:^ +.*\n?)*)+",
        lambda block: "\n" + _ENTRY.sub(r"- `\1`: \2", block[0]) + "\n",
        text,
        flags=re.MULTILINE,
    )


class Lists(griffe.Extension):
    """Change the docstrings of all objects."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)
