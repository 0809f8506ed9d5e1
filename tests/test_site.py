"""Test how pages become pages of the site; that mkdocs finds nothing wrong in them is `make site`."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the modules of tools/ be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_links_lead_to_pages_of_the_site() -> None:
    in_site = import_module("make_site").in_site
    docs = "[a](samples.md#x) [b](../README.md) "
    docs += "[c](../comq_onnx/solve/comq.py) [d](https://x.org/y.md) [e](#f) ![g](a.png)"
    found = "[a](samples.md#x) [b](start.md) c [d](https://x.org/y.md) [e](#f) ![g](a.png)"
    assert in_site(docs, ROOT / "docs") == found
    beside = "[a](docs/README.md) [b](docs/bits.md#x) [c](CONTRIBUTING.md) [d](LICENSE)"
    assert in_site(beside, ROOT) == "[a](index.md) [b](bits.md#x) [c](contributing.md) d"


def test_formulas_are_shown_and_code_is_not_touched() -> None:
    pytest.importorskip("latex2mathml", reason="needs the extra docs: pip install -e '.[docs]'")
    with_formulas = import_module("make_site").with_formulas
    code = "`eval $x$` costs $ 3 or 4$ \n```console\n$ ls $HOME$\n```\n"
    assert with_formulas(code) == code
    text = with_formulas("a $W_1 x$ b\n\n$$ \\frac{a}\n{b} $$\n")
    assert re.sub(r"<[^>]*>", "", text) == "a W1x b\n\nab\n"
    assert text.count("<math") == 2
    assert '<div class="formula"><math' in text
    # at the start of a line it would be a paragraph of its own
    assert with_formulas("$W$ is").startswith("<span>")


def test_every_page_is_in_the_menu_once() -> None:
    menu = re.findall(r"^ +- .*: ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md"]
    made = ["index.md", "api.md", "gallery.md", *import_module("make_site").BESIDE.values()]
    assert sorted(menu) == sorted([*pages, *made])


def test_entries_of_docstrings_become_lists() -> None:
    pytest.importorskip("griffe", reason="needs the extra docs")
    as_lists = import_module("_docstrings").as_lists
    text = "Do it.\n\na: first\nb, c: second\n    and more\n\nRaises X: never.\n"
    assert as_lists(text) == "Do it.\n\n\n- `a`: first\n- `b, c`: second\n    and more\n\n\nRaises X: never.\n"
