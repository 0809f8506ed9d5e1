"""Build the site: README.md, CONTRIBUTING.md, CHANGELOG.md and docs/, an API reference and a gallery of reports.

    python tools/make_site.py
    python tools/make_site.py --no-reports --to DIR

It needs the extra `docs`, and for the reports ONNX Runtime. The pages are written to build/docs (or DIR/docs), with
links between them as mkdocs wants them; mkdocs builds them to build/site, and any warning (a link or an anchor that
leads nowhere, a page that is in no menu) ends it with an error. --no-reports leaves the reports of the gallery out,
which takes a few seconds instead of a minute.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click

import comq_onnx
from comq_onnx.report import several, several_page

ROOT = Path(__file__).parents[1]
# pages beside docs/, by their names in the site
BESIDE = {"README.md": "start.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# what the gallery shows: (file, what it is, model, options)
GALLERY = (
    ("cnn-4", "A small convolutional network at 4 bits", "fashion_cnn", {"bits": 4}),
    ("cnn-3", "The same network at 3 bits, all layers alike", "fashion_cnn", {"bits": 3, "uniform": True}),
    ("cnn-auto", "The same network at 18% of its size", "fashion_cnn", {"bits": "auto", "size": "18%"}),
    ("vit-4", "A small vision transformer at 4 bits", "fashion_vit", {"bits": 4}),
)
# what the theme lacks: options that stay whole in tables, which scroll where they are wide, as formulas do
STYLE = """.md-typeset td code { overflow-wrap: normal; word-break: normal }
.formula { overflow-x: auto; overflow-y: hidden; margin: 1em 0 }
"""
# code, which stays as it is, and formulas between dollars, as GitHub shows them
FORMULA = re.compile(r"```.*?```|`[^`]*`|\$\$(.+?)\$\$|\$(\S(?:[^$`]*?\S)?)\$", re.DOTALL)
# what its table has of each
SHOWN = ("MB", "size", "SQNR dB", "agreement", "speed")


def in_site(text: str, folder: Path) -> str:
    """Return a page with its links as they are in the site; folder: where the page lies in the repository.

    Links to code lose their address: the site has no code.
    """

    def moved(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        place = (folder / target).resolve().relative_to(ROOT)
        if str(place) in BESIDE:
            return f"[{label}]({BESIDE[str(place)]}{anchor})"
        if place.parts[0] == "docs":
            name = "index.md" if place.name == "README.md" else str(place.relative_to("docs"))
            return f"[{label}]({name}{anchor})"
        return label

    return re.sub(r"\[([^\]]*)\]\((?!\w+://|#)([^)#\s]+)(#[^)\s]*)?\)", moved, text)


def with_formulas(text: str) -> str:
    """Return a page with its formulas as MathML, which browsers show by themselves."""
    from latex2mathml.converter import convert  # of the extra docs: --help does without

    def shown(match: re.Match[str]) -> str:
        if match[1] is not None:
            return f'<div class="formula">{convert(match[1].strip(), display="block")}</div>'
        # in a span: Markdown would take a formula at the start of a line for a paragraph of its own
        return f"<span>{convert(match[2])}</span>" if match[2] is not None else match[0]

    return FORMULA.sub(shown, text)


def write_pages(pages: Path) -> None:
    """Write all pages that are in the repository."""
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    for path in sorted((ROOT / "docs").iterdir()):
        if path.suffix == ".md":
            name = "index.md" if path.name == "README.md" else path.name
            text = with_formulas(in_site(path.read_text(encoding="utf-8"), path.parent))
            (pages / name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, pages / path.name)
    (pages / "extra.css").write_text(STYLE, encoding="utf-8")
    for source, name in BESIDE.items():
        (pages / name).write_text(in_site((ROOT / source).read_text(encoding="utf-8"), ROOT), encoding="utf-8")


def write_reference(pages: Path) -> None:
    """Write the page that mkdocstrings fills with all public names."""
    entries = "\n\n".join(f"::: comq_onnx.{name}" for name in comq_onnx.__all__)
    text = (
        "# API reference\n\nEverything that `import comq_onnx` has; [From Python](python.md) tells how it is used.\n\n"
    )
    (pages / "api.md").write_text(f"{text}{entries}\n", encoding="utf-8")


def write_gallery(pages: Path, reports: bool) -> None:
    """Write the gallery; reports: quantize its models, or only say that they are left out."""
    lines = ["# Gallery of reports", "", "What `--report` writes, of the models in this repository.", ""]
    if not reports:
        lines.append("The reports were left out of this build.")
    else:
        runs = []
        for name, title, model, options in GALLERY:
            source, calib = f"models/{model}.onnx", "models/fashion_calib.npz"
            report = comq_onnx.quantize(source, None, calib, max_samples=128, **options)  # type: ignore[arg-type]
            report.save_html(pages / f"report-{name}.html")
            runs.append(several.Run(title, report, link=f"report-{name}.html"))
        page = several_page.render(runs, f"{len(runs)} runs compared")
        (pages / "compared.html").write_text(page, encoding="utf-8")
        lines += [*_table(runs), "", "[All of them compared](compared.html), as several models in one call are.", ""]
        lines += [f"## {runs[0].name}", "", _preview(runs[0])]
    (pages / "gallery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(runs: list[several.Run]) -> list[str]:
    """Return the lines of a table of runs, with links to their reports."""
    columns = [name for name in several.used_columns(runs) if name in SHOWN]
    rows = [["report", *columns], ["---"] * (1 + len(columns))]
    for run in runs:
        assert run.report is not None
        rows.append([f"[{run.name}]({run.link})", *(several.used_columns(runs)[n](run.report) for n in columns)])
    return [f"| {' | '.join(row)} |" for row in rows]


def _preview(run: several.Run) -> str:
    """Show a report on the page, in a frame."""
    style = "width: 100%; height: 40rem; border: 1px solid var(--md-default-fg-color--lightest)"
    return f'<iframe src="{run.link}" title="{run.name}" loading="lazy" style="{style}"></iframe>'


def write_settings(folder: Path) -> Path:
    """Write the settings of mkdocs for pages that lie in a folder, and return their file."""
    settings = folder / "mkdocs.yml"
    settings.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nsite_dir: site\n", encoding="utf-8")
    return settings


@click.command()
@click.option("--reports/--no-reports", default=True, show_default=True, help="Quantize the models of the gallery.")
@click.option("--to", "folder", default=ROOT / "build", type=click.Path(path_type=Path), help="Where it is built.")
def main(reports: bool, folder: Path) -> None:
    """Build the site to build/site."""
    folder = folder.resolve()
    # reports name the files that they are given
    os.chdir(ROOT)
    pages = folder / "docs"
    write_pages(pages)
    write_reference(pages)
    write_gallery(pages, reports)
    # not --quiet, which hides warnings from --strict too
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(write_settings(folder))]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(build, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        sys.exit(done.returncode)
    click.echo(f"wrote    {folder / 'site'}")


if __name__ == "__main__":
    main()
