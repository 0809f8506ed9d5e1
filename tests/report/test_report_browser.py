"""Test the page in a real browser: plots have marks, nothing overflows, light and dark, on a phone and on a desktop.

Needs a Chromium (support/browser.py); skipped with the reason where there is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENSHOTS, WIDTHS, needs_browser, open_page
from reports import activation, layer, plan, report

from comq_onnx.metrics import OutputComparison
from comq_onnx.report.report import Report
from comq_onnx.report.several import Run
from comq_onnx.report.several_page import render

pytestmark = needs_browser

LONG = "/" + "/".join(f"a_module_with_a_long_name_{i}" for i in range(8)) + "/MatMul"
# a window is at least some 500 pixels wide: the pages stand in frames of the widths wanted
HOST = """<!DOCTYPE html><meta name="color-scheme" content="light dark"><style>body {{ margin: 0 }}
iframe {{ border: 0; height: {height}px; display: block }}</style>
{frames}<pre id="found"></pre><script>
const measure = page => {{
  const root = page.documentElement;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const shown = e => {{ const box = e.getBoundingClientRect(); return box.width > 0 && box.height > 0; }};
  const scrolled = e => e.closest(".scroll, .sideways") !== null;
  const text = e => e.tagName + "." + e.className + ": " + e.textContent.trim().slice(0, 40);
  const wide = [...page.body.querySelectorAll("*")].filter(e => !scrolled(e) && shown(e));
  const svgs = [...page.querySelectorAll("figure svg")].filter(shown);
  const outside = svg => {{
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll(".mark > *:not(title, .reach), text")].filter(e => {{
      const b = e.getBoundingClientRect();
      return b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1;
    }}).length;
  }};
  const letters = svg => Math.min(...[...svg.querySelectorAll("text")].map(
    e => parseFloat(getComputedStyle(e).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width));
  return {{
    width: root.clientWidth,
    scrolls: root.scrollWidth - root.clientWidth,
    beyond: wide.filter(e => e.getBoundingClientRect().right > root.clientWidth + 1).map(text),
    svgs: svgs.map(svg => ({{
      marks: [...svg.querySelectorAll(".mark")].filter(shown).length, outside: outside(svg),
      width: svg.getBoundingClientRect().width, letters: letters(svg),
      colours: [...new Set([...svg.querySelectorAll(".mark > *:not(title, .label, .reach)")].map(
        e => getComputedStyle(e).fill))],
    }})),
    tiles: [...page.querySelectorAll(".tile")].map(e => e.getBoundingClientRect().bottom),
    pictures: [...page.querySelectorAll("img")].map(e => e.complete && e.naturalWidth > 0),
    paper: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color,
  }};
}};
addEventListener("load", () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) found[frame.id] = measure(frame.contentDocument);
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>"""


def bad_case() -> Report:
    """Make a report of long names, every kind of remark, layers that do not run in integers, several outputs."""
    layers = [
        layer(i, name=f"{LONG}_{i}", kernel="Conv" if i == 3 else "QLinearConv", error_db=-7.0 if i == 5 else -25.0)
        for i in range(70)
    ]
    return report(
        70, layers=layers, model=f"some/{'long/' * 12}model.onnx", output=f"{'o' * 120}.onnx",
        outputs=[
            OutputComparison(f"a_long_output_name_{'x' * 60}", 3.2, 0.7, 0.5), OutputComparison("b", 9.0, 0.9, None),
        ],
        warnings=[f"{LONG} is slower: try --activations none"], notes=["54% of the positions are padding"],
        skipped={f"{LONG}_{i}": f"MatMul: {'because ' * 12}" for i in range(20)},
        activations=[activation(i, name=f"{LONG}_{i}", high=10.0 ** (i % 7)) for i in range(70)],
        command=f"comq-onnx model.onnx --bits-for '{LONG}=8' -o {'o' * 120}.onnx",
    )  # fmt: skip


CASES: dict[str, Callable[[], Report]] = {
    "usual": lambda: report(50),
    "one layer": lambda: report(1),
    "bad": bad_case,
    "large": lambda: report(400, activations=[activation(i) for i in range(400)]),
    "plan": plan,
    "uneven": lambda: report(
        20, layers=[layer(i, bytes_before=40_000_000 if i == 0 else 9000, bytes_after=9000) for i in range(20)]
    ),
    "no samples": lambda: replace(report(9), inputs=[], activations=[]),
}


def compared(count: int, failed: int = 0) -> str:
    """Make the page that compares `count` runs of long names, some of which failed."""
    runs = [
        Run(
            f"{'out/' * 9}a_model_with_a_long_name_{i}.onnx",
            report(
                9 + i, size={"before": 4_000_000, "after": 400_000 + 90_000 * (i % 5)}, warnings=[f"{LONG} is slower"],
                outputs=[OutputComparison("logits", 20.0 + 7 * i % 11, 0.99, 0.97)], peak_rss_mb=500.0 + i,
                latency_ms={"before": 10.0, "after": 3.0 + i % 4}, options={"bits": i % 3, "exclude": (LONG,)},
            ),
            link="report.html",
        )
        for i in range(count)
    ]  # fmt: skip
    return render([*runs, *(Run(f"{LONG}{i}", None, said=LONG, failed=True) for i in range(failed))], "compared")


# pages that compare runs, and the marks of their plots
COMPARED: dict[str, tuple[Callable[[], str], list[int]]] = {
    "compared": (lambda: compared(12, failed=2), [12, 12]),
    "none done": (lambda: compared(0, failed=2), []),
}


def host(pages: dict[str, tuple[int, str]], height: int) -> str:
    """Make a page with others in frames; pages: their widths and texts by id."""
    frames = "".join(
        f'<iframe id="{name}" style="width:{width}px" srcdoc="{escape(page)}"></iframe>'
        for name, (width, page) in pages.items()
    )
    return HOST.format(height=height, frames=frames)


def browse(folder: Path, page: str, dark: bool, *options: str) -> str:
    """Open a page in the browser, and return what it prints."""
    path = folder / "host.html"
    path.write_text(page)
    return open_page(path.as_uri(), folder / "profile", dark, *options)


@pytest.fixture(scope="module")
def pages() -> dict[str, tuple[int, str]]:
    """Render every case at both widths."""
    made = {case: make().to_html() for case, make in CASES.items()} | {n: make() for n, (make, _) in COMPARED.items()}
    return {f"{case} {width}": (width, page) for case, page in made.items() for width in WIDTHS}


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pages: dict[str, tuple[int, str]]
) -> dict[str, Any]:
    """Measure every page in the browser."""
    folder, dark = tmp_path_factory.mktemp("browser"), request.param
    printed = browse(folder, host(pages, 900), dark, "--dump-dom")
    found = re.search(r'<pre id="found">(.+?)</pre>', printed, re.DOTALL)
    assert found is not None
    if SCREENSHOTS is not None:
        for name, (width, page) in pages.items():
            out = Path(SCREENSHOTS) / f"{name.replace(' ', '-')}-{'dark' if dark else 'light'}.png"
            size = f"--window-size={max(width, 500)},3600"
            browse(folder, host({"one": (width, page)}, 3600), dark, size, f"--screenshot={out}")
    return {"dark": dark, **json.loads(unescape(found[1]))}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_plots_have_marks_and_nothing_overflows(seen: dict[str, Any], case: str, width: int) -> None:
    shown, found = CASES[case](), seen[f"{case} {width}"]
    assert found["width"] == width
    assert (found["scrolls"], found["beyond"]) == (0, [])
    layers, activations = len(shown.layers), len(shown.activations)
    expected = [layers] if shown.layers[0].error_db is None else [layers] * 3
    # the frontier, the network, the ranges of activations, the weights of the worst layers
    expected += [len(shown.frontier), layers] + [activations] * bool(activations) + [40] * len(shown.histograms)
    assert [svg["marks"] for svg in found["svgs"]] == expected
    for i, svg in enumerate(found["svgs"]):
        assert svg["outside"] == 0
        # letters that can be read, plots that fill the page
        assert svg["letters"] >= 8.5
        assert svg["width"] > (0.85 if i < len(found["svgs"]) - len(shown.histograms) or width < 700 else 0.4) * min(
            width, 1184
        )
    assert all(found["pictures"])
    assert len(found["pictures"]) == sum(len(i.pictures) for i in shown.inputs) + len(shown.answers)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", COMPARED)
def test_pages_that_compare_have_marks_and_nothing_overflows(seen: dict[str, Any], case: str, width: int) -> None:
    found = seen[f"{case} {width}"]
    assert (found["width"], found["scrolls"], found["beyond"]) == (width, 0, [])
    assert [svg["marks"] for svg in found["svgs"]] == COMPARED[case][1]
    assert all(svg["outside"] == 0 and svg["letters"] >= 8.5 for svg in found["svgs"])


@pytest.mark.parametrize("width", WIDTHS)
def test_what_it_cost_and_won_stands_on_the_first_screen(seen: dict[str, Any], width: int) -> None:
    tiles = seen[f"usual {width}"]["tiles"]
    assert len(tiles) == 4
    assert max(tiles) < 600


def light(colour: str) -> float:
    """Return how light an rgb() colour is, 0 to 1."""
    return sum(float(n) for n in re.findall(r"[\d.]+", colour)[:3]) / 765


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_light_or_dark_as_the_reader_has_it(seen: dict[str, Any], width: int) -> None:
    found = seen[f"usual {width}"]
    paper, ink = light(found["paper"]), light(found["ink"])
    if seen["dark"]:
        assert paper < 0.15 < 0.7 < ink
    else:
        assert paper > 0.9 > 0.3 > ink
    colours = [colour for svg in found["svgs"] for colour in svg["colours"]]
    assert len(colours) >= 7
    # marks stand out from the paper
    assert all(abs(light(colour) - paper) > 0.2 for colour in colours)
