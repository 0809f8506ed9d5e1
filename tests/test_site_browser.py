"""Test the site in a real browser: on a phone and on a desktop, light and dark, nothing overflows and all can be read.

Needs a Chromium (support/browser.py) and the extra `docs`; skipped with the reason where they are not.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENSHOTS, WIDTHS, needs_browser, open_page

ROOT = Path(__file__).parents[1]
pytestmark = [
    needs_browser,
    pytest.mark.skipif(
        None in map(find_spec, ("latex2mathml", "mkdocs", "mkdocstrings")),
        reason="the extra docs is not installed: pip install -e '.[docs]'",
    ),
]
# pages that are opened at once, each in a frame of every width
AT_ONCE = 9
# letters and what lies behind them; 4.5 is asked of small text, and the theme's own colours of code have less
CONTRAST = 3.0
HOST = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><style>body { margin: 0 }
iframe { border: 0; display: block }</style>%s<pre id="found"></pre><script>
const numbers = c => (c.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const over = (top, below) => {
  const a = top.length > 3 ? top[3] : 1;
  return [0, 1, 2].map(i => a * top[i] + (1 - a) * below[i]);
};
const behind = e => {
  const layers = [];
  for (; e; e = e.parentElement) layers.push(numbers(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((below, c) => over(c, below), [255, 255, 255]);
};
const contrast = e => {
  const paper = behind(e), ink = over(numbers(getComputedStyle(e).color), paper);
  const [a, b] = [light(paper), light(ink)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
};
const measure = page => {
  const root = page.documentElement, article = page.querySelector("article");
  for (const details of page.querySelectorAll("details")) details.open = true;
  const shown = e => { const box = e.getBoundingClientRect(); return box.width > 1 && box.height > 1; };
  const scrolled = e => {
    for (e = e.parentElement; e && e !== page.body; e = e.parentElement)
      if (getComputedStyle(e).overflowX !== "visible") return true;
    return false;
  };
  const text = e => e.tagName + ": " + e.textContent.trim().slice(0, 40);
  const all = [...article.querySelectorAll("*")].filter(shown);
  const words = all.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim() !== "")
    && getComputedStyle(e).opacity !== "0" && !e.matches(".headerlink"));
  return {
    width: root.clientWidth, height: root.scrollHeight, scrolls: root.scrollWidth - root.clientWidth,
    beyond: all.filter(e => !scrolled(e) && e.getBoundingClientRect().right > root.clientWidth + 1).map(text),
    words: words.length,
    faint: words.filter(e => contrast(e) < %f).map(e => contrast(e).toFixed(1) + " " + text(e)),
    raw: words.filter(e => !e.closest("code, pre") && /\\$\\S[^$]*\\$|\\\\[a-z]{3}/.test(e.textContent)
      && ![...e.querySelectorAll("code")].some(c => c.textContent.includes("$"))).map(text),
    formulas: page.querySelectorAll("math").length,
    loose: [...page.querySelectorAll("math")].filter(e => !e.closest("p, li, td, .formula")).length,
    pictures: [...page.querySelectorAll("img")].map(e => e.complete && e.naturalWidth > 0),
    paper: light(numbers(getComputedStyle(page.body).backgroundColor)),
  };
};
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) found[frame.id] = measure(frame.contentDocument);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    """Serve files, and print nothing."""

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Build the site without its reports, and serve it: (its folder, its address)."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, str(ROOT / "tools" / "make_site.py"), "--no-reports", "--to", str(folder)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder / "site", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def frames(names: list[str], height: int) -> str:
    """Return a page with pages of the site in frames of all widths."""
    made = [
        f'<iframe id="{name} {width}" style="width: {width}px; height: {height}px" src="{name}"></iframe>'
        for name in names
        for width in WIDTHS
    ]
    return HOST % ("".join(made), CONTRAST)


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, site: tuple[Path, str]) -> Any:
    """Measure every page at all widths."""
    (folder, address), dark = site, request.param
    profile = tmp_path_factory.mktemp("profile")
    names = sorted(path.name for path in folder.glob("*.html") if path.name not in ("404.html", "host.html"))
    measured: dict[str, Any] = {}
    for i in range(0, len(names), AT_ONCE):
        (folder / "host.html").write_text(frames(names[i : i + AT_ONCE], 900))
        printed = open_page(f"{address}/host.html", profile, dark, "--dump-dom")
        found = re.search(r'<pre id="found">(.+?)</pre>', printed, re.DOTALL)
        assert found is not None, printed[-2000:]
        measured |= json.loads(unescape(found[1]))
    if SCREENSHOTS is not None:
        for key, one in measured.items():
            take_picture(folder, address, profile, dark, key, min(one["height"], 12000))
    return {"dark": dark, "pages": measured}


def take_picture(folder: Path, address: str, profile: Path, dark: bool, key: str, height: int) -> None:
    """Save a picture of a page; key: its name and its width."""
    name, width = key.split()
    frame = f'<iframe style="width: {width}px; height: {height}px" src="{name}"></iframe>'
    style = '<meta name="color-scheme" content="light dark"><style>body { margin: 0 } iframe { border: 0 }</style>'
    (folder / "host.html").write_text(f"<!DOCTYPE html>{style}{frame}")
    out = Path(str(SCREENSHOTS)) / f"site-{Path(name).stem}-{width}-{'dark' if dark else 'light'}.png"
    size = f"--window-size={max(int(width), 500)},{height}"
    open_page(f"{address}/host.html", profile, dark, size, f"--screenshot={out}")


def test_nothing_overflows(seen: Any) -> None:
    pages = seen["pages"]
    assert len(pages) >= 25 * len(WIDTHS)
    assert {key: one["width"] for key, one in pages.items()} == {key: int(key.split()[1]) for key in pages}
    wrong = {key: one["beyond"] or one["scrolls"] for key, one in pages.items() if one["scrolls"] or one["beyond"]}
    assert wrong == {}


def test_everything_can_be_read(seen: Any) -> None:
    pages = seen["pages"]
    assert min(one["words"] for one in pages.values()) >= 2
    assert {key: one["faint"] for key, one in pages.items() if one["faint"]} == {}
    assert all(one["paper"] < 0.05 if seen["dark"] else one["paper"] > 0.9 for one in pages.values())


def test_formulas_are_formulas(seen: Any) -> None:
    pages = seen["pages"]
    assert {key: one["raw"] for key, one in pages.items() if one["raw"]} == {}
    assert pages["how-it-works.html 390"]["formulas"] > 40
    assert sum(one["loose"] for one in pages.values()) == 0


def test_no_picture_is_broken(seen: Any) -> None:
    pictures = {key: one["pictures"] for key, one in seen["pages"].items()}
    assert {key: found for key, found in pictures.items() if not all(found)} == {}
    assert any(pictures.values())
