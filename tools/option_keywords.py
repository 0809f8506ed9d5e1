"""Print comq_onnx/options/keywords.py: the options as typed keywords, from the fields of Options.

python tools/option_keywords.py > comq_onnx/options/keywords.py
"""

from __future__ import annotations

import dataclasses
import textwrap

import click

from comq_onnx.options.option import options_of
from comq_onnx.options.options import Options

HEAD = '''"""Type the options as keywords, for editors and mypy.

Made by `python tools/option_keywords.py` from the fields of Options; do not edit.
"""

from __future__ import annotations

from typing import TypedDict

from comq_onnx.options.samples import Size


class OptionKeywords(TypedDict, total=False):
    """Type the fields of Options, each of which may be left out."""

'''


def keyword(field: dataclasses.Field[object], meaning: str) -> str:
    """Write one keyword with its meaning."""
    line = " ".join(meaning.replace(chr(8), "").split()).replace("\\", "\\\\")
    told = textwrap.wrap(f'"""{line}"""', 116)
    return "\n".join([f"    {field.name}: {field.type}", *(f"    {part}" for part in told)])


@click.command()
def main() -> None:
    """Print the options as typed keywords, a module made from the fields of Options."""
    meanings = {name: option.help for name, option in options_of(Options).items()}
    click.echo(HEAD + "\n".join(keyword(field, meanings[field.name]) for field in dataclasses.fields(Options)))


if __name__ == "__main__":
    main()
