"""Print docs/options.md: every option of the command line, from the code.

python tools/option_reference.py > docs/options.md
"""

from __future__ import annotations

import click

from comq_onnx.cli.command import command
from comq_onnx.cli.parameters import by_long_name, grouped, is_in_config

HEAD = """# Options

Made by `python tools/option_reference.py` from the code; do not edit. `comq-onnx --help` prints the same.

    comq-onnx [OPTIONS] MODEL

MODEL is an ONNX file, with external data beside it or not, or a directory with one `.onnx` file. Every option that has
a name in the last column can stand in the TOML file of `--config` under that name; the command line wins over the file.
Patterns and other options that may be repeated are lists of texts there. `--save-config` writes such a file:

```toml
bits = 4
bits-for = ["head|stem=8"]
calib = "photos"
preprocess = "imagenet"
asymmetric = true
```
"""


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def row(option: click.Option, ctx: click.Context) -> str:
    """Format one option: names, meaning, name in a configuration file."""
    record = option.get_help_record(ctx)
    assert record is not None
    names, meaning = record
    known = [name for name, other in by_long_name(command).items() if other is option]
    in_config = "" if not known or not is_in_config(str(option.name)) else ", ".join(f"`{name}`" for name in known)
    # brackets would be links
    said = cell(" ".join(meaning.replace(chr(8), "").split())).replace("[", "\\[")
    return f"| `{cell(names)}` | {said} | {in_config} |"


def reference() -> str:
    """Make the whole page."""
    ctx = click.Context(command, info_name="comq-onnx", max_content_width=1000, show_default=True)
    lines = [HEAD.rstrip()]
    for title, options in grouped(command, ctx):
        lines += ["", f"## {title}", "", "| option | what it does | in a file |", "|---|---|---|"]
        lines += [row(option, ctx) for option in options]
    lines += [
        "",
        "Exit codes: 0 done, 1 a fault of comq-onnx itself, 2 the command line, 3 the model, 4 the samples, 5 the "
        "runtime, 130 interrupted.",
    ]
    return "\n".join(lines) + "\n"


@click.command()
def main() -> None:
    """Print the reference of all options as Markdown, made from the code of the command line."""
    click.echo(reference(), nl=False)


if __name__ == "__main__":
    main()
