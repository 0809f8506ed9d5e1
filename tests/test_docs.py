"""Test README.md, CONTRIBUTING.md and docs/: every command block runs, every link leads somewhere, the option reference
is that of the code.

A block behind `<!-- needs: NAME -->` runs only where NAME is there: a file below the repository, such as zoo/minilm
(what tools/zoo/export.py makes; COMQ_ZOO names such a folder elsewhere), or a module; several with
commas between them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from command import Said
from packaging.version import Version
from script import run_command, run_script, run_text

import comq_onnx
from comq_onnx.cli import command as cli
from comq_onnx.cli.parameters import by_long_name, grouped, read_by_parameter

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "models" / "README.md")
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}  # fmt: skip
ZOO = Path(os.environ.get("COMQ_ZOO", ROOT / "zoo"))
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<need>\S+) -->\n+)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# the samples of each kind that commands find
SAMPLES = 96
# the pages whose commands run in processes of their own; those of others do so in the process of the tests
FIRST = ("README.md", "CONTRIBUTING.md")
# set-up has been done where tests run, and the tests are running
SET_UP = (
    "pip install", "python -m pip", "python -m venv", "git clone", "source ", ". ", "cd ", "#", "pytest", "bash .ci",
    "ruff", "mypy", "lint-imports", "make ",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """Describe a fenced block of a page: its language, its text, and what it needs."""

    language: str
    text: str
    need: str | None


def blocks(page: Path) -> list[Block]:
    """Return every fenced block of a page, in order."""
    return [
        Block(found["language"], re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE), found["need"])
        for found in BLOCK.finditer(page.read_text())
    ]


def commands(language: str, text: str) -> list[str]:
    """Return the commands of a shell block: the lines after `$ ` of a console, else all, with their continuations."""
    lines = text.replace("\\\n", " ").splitlines()
    if language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    steps = [part.strip().removeprefix(".venv/bin/") for line in lines for part in line.split(" && ")]
    return [step for step in steps if step and not step.startswith(SET_UP)]


def steps(found: Iterable[Block]) -> list[list[str]]:
    """Return the command lines that run some blocks, in order."""
    made: list[list[str]] = []
    for block in found:
        if block.language == "python":
            made.append(["python", "-c", block.text])
        elif block.language in ("console", "bash", "sh"):
            made += [["bash", "-c", command] for command in commands(block.language, block.text)]
    return made


def there(need: str) -> bool:
    """Tell whether what a block needs is there; several things have commas between them."""
    if "," in need:
        return all(there(one) for one in need.split(","))
    if need.startswith("zoo/"):
        return (ZOO / need.removeprefix("zoo/")).exists()
    return find_spec(need) is not None


def run(page: Path, folder: Path, chosen: list[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run blocks in a folder with the repository's models and tools, and fewer of its samples: no figure is checked."""
    for name in ("models", "tools"):
        shutil.copytree(ROOT / name, folder / name)
    for path in (folder / "models").glob("*.npz"):
        with np.load(path) as loaded:
            fewer = {name: array[:SAMPLES] for name, array in loaded.items()}
        np.savez(path, **fewer)
    if ZOO.is_dir():
        (folder / "zoo").symlink_to(ZOO)
    monkeypatch.chdir(folder)
    for step in steps(chosen):
        said = (in_a_process if page.name in FIRST else here)(step)
        assert said.code == 0, f"{page.name}: {step[-1]}\n{said.out[-2000:]}{said.err[-2000:]}"


def in_a_process(step: list[str]) -> Said:
    """Run a step as a user does."""
    done = subprocess.run(step, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    return Said(done.returncode, done.stdout, done.stderr)


def here(step: list[str]) -> Said:
    """Run Python code, `comq-onnx ...` and `python FILE ...` in the process of the tests, all else as a user does."""
    if step[0] == "python":
        return run_text(step[-1])
    name, *arguments = shlex.split(step[-1])
    if not set(step[-1]) & set("|&;<>$`*"):
        if name == "comq-onnx":
            return run_command(*arguments)
        if name == "python" and arguments[0].endswith(".py"):
            return run_script(Path(arguments[0]).resolve(), *arguments[1:])
    return in_a_process(step)


def test_the_commands_of_a_block_are_found() -> None:
    block = "$ pip install x\n$ comq-onnx a \\\n    -o b\nwrote b\n$ ls\n"
    assert [shlex.split(c) for c in commands("console", block)] == [["comq-onnx", "a", "-o", "b"], ["ls"]]
    assert commands("sh", "git clone x\n# why\nls -l\n\n") == ["ls -l"]
    set_up = "python -m venv .venv && .venv/bin/pip install . && .venv/bin/comq-onnx a"
    assert commands("sh", set_up) == ["comq-onnx a"]


def test_blocks_are_found_with_what_they_need(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n<!-- needs: zoo/minilm -->\n```console\n$ ls\n```\n"
        "- x\n\n  ```sh\n  if\n    ls\n  ```\n"
    )
    assert blocks(page) == [
        Block("python", "a = 1\n", None), Block("console", "$ ls\n", "zoo/minilm"), Block("sh", "if\n  ls\n", None)
    ]  # fmt: skip
    fences = re.findall(r"^ *```", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_seen(page: Path) -> None:
    assert len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page))


def running(page: Path) -> list[Block]:
    """Return the blocks of a page that need nothing but modules which are there: those go on from the plain ones."""
    return [b for b in blocks(page) if b.need is None or (there(b.need) and not b.need.startswith("zoo/"))]


RUNNING = [page for page in PAGES if steps(b for b in blocks(page) if b.need is None)]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_every_block_runs(tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(page, tmp_path, running(page), monkeypatch)


NEEDS = [(page, need) for page in PAGES for need in dict.fromkeys(b.need for b in blocks(page)) if need is not None]


@pytest.mark.parametrize(("page", "need"), NEEDS, ids=[f"{page.name}-{need}" for page, need in NEEDS])
def test_every_block_that_needs_something_runs_where_that_is(
    tmp_path: Path, page: Path, need: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not there(need):
        pytest.skip(f"{need} is not here" + (": python tools/zoo/export.py zoo" if need.startswith("zoo/") else ""))
    needing = [block for block in blocks(page) if block.need == need]
    if need.startswith("zoo/"):
        run(page, tmp_path, needing, monkeypatch)
    else:  # these have run with the plain ones of the page
        assert page in RUNNING
        assert all(block in running(page) for block in needing)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_file_shown_is_one(tmp_path: Path, page: Path) -> None:
    for block in blocks(page):
        if block.language == "toml":
            (tmp_path / "quant.toml").write_text(block.text)
            path = tmp_path / "quant.toml"
            assert read_by_parameter(path, cli.command)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if "://" in target:
            # nothing outside can be reached from where tests run
            assert re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", target), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index] == []
    assert "docs/README.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_is_named_is_there(page: Path) -> None:
    for file, name in re.findall(r"`([\w/]*test_\w+)::(\w+)`", page.read_text()):
        assert f"def {name}(" in (ROOT / "tests" / f"{file}.py").read_text(), name


def test_every_tool_and_module_is_named_where_it_should_be() -> None:
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    tools = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tools").rglob("[a-z]*.py"))]
    assert [tool for tool in tools if f"`{tool}`" not in contributing] == []
    modules = [p.stem for p in (ROOT / "comq_onnx").glob("*.py") if not p.stem.startswith("__")]
    packages = [p.parent.name for p in (ROOT / "comq_onnx").glob("*/__init__.py")]
    assert [name for name in modules + packages if f"`{name}`" not in contributing] == []


def test_the_option_reference_is_that_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "option_reference.py")], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    stored = (ROOT / "docs" / "options.md").read_text()
    assert done.stdout == stored, "python tools/option_reference.py > docs/options.md"
    assert all(f"--{name}" in done.stdout for name in by_long_name(cli.command))


@pytest.mark.parametrize("page", ["README.md", "docs/command-line.md"])
def test_every_option_that_is_named_exists(page: str) -> None:
    known = {name for parameter in cli.command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"`(--[a-z][a-z0-9-]+)", (ROOT / page).read_text()))
    assert len(named) > 12
    assert named <= known


def test_every_option_has_its_group() -> None:
    shown = [option.name for _, options in grouped(cli.command, click.Context(cli.command)) for option in options]
    assert shown[:-1] == [p.name for p in cli.command.params if isinstance(p, click.Option)]
    assert shown[-1] in ("help", "_click_default_help")


def test_the_licence_and_the_citation_are_whole() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    assert citation["version"] == last_version()
    paper = citation["preferred-citation"]
    assert paper["url"].endswith("2403.07134")
    assert [a["family-names"] for a in paper["authors"]] == ["Zhang", "Yang", "Wang", "Qi", "Xin", "Li", "Yin"]


def last_version() -> str:
    """Return the last version that the changelog tells of."""
    return re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]


def test_this_version_is_the_last_one_or_on_the_way_to_the_next() -> None:
    last, this = Version(last_version()), Version(comq_onnx.version())
    assert this == last or (this > last and this.is_devrelease)
