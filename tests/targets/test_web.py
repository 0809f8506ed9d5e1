"""Test the models written for the browser with onnxruntime-web: in Node, and on the page of docs/web.md in Chromium.

npm installs onnxruntime-web into build/web once. Skipped with the reason where Node, npm, the package or, for the
page, a browser is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from browser import BROWSER, OPTIONS, needs_browser
from command import Said
from script import run_command, run_text
from zoo import ZOO_FEEDS, zoo

import comq_onnx
from comq_onnx.errors import OptionError
from comq_onnx.evaluate.kernels import INTEGER_PRODUCTS, executed_kernels
from comq_onnx.metrics import sqnr_of
from comq_onnx.runtime.session import Session
from comq_onnx.targets.catalog import ORT_CPU, ORT_WEB, TARGETS
from models import cnn, encoder, mlp, samples_for

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "web.md"
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {"cnn": cnn, "mlp": mlp, "encoder": encoder, "zoo": zoo}
# whole numbers add up to the same; floats are added in another order, by which a number may be rounded to the next code
SAME_DB = 40


@pytest.fixture(scope="module")
def web() -> Any:
    """Import tools/bench/_web.py, which installs and runs onnxruntime-web."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools" / "bench"))
        return import_module("_web")


@pytest.fixture(scope="module")
def package(web: Any) -> Path:
    """Return the folder of onnxruntime-web."""
    try:
        found = web.install(ROOT / web.FOLDER)
    except (click.ClickException, subprocess.SubprocessError) as error:
        pytest.skip(f"onnxruntime-web is not here: {error}")
    assert isinstance(found, Path)
    return found


@pytest.fixture(scope="module")
def wasm(web: Any, package: Path) -> Iterator[Any]:
    """Start Node."""
    with web.Wasm(package) as started:
        yield started


def feeds_of(name: str, source: onnx.ModelProto) -> Any:
    return ZOO_FEEDS if name == "zoo" else samples_for(source, count=16)


@pytest.mark.parametrize("activations", ["8", "none"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_form_gives_the_same_in_webassembly(
    tmp_path: Path, wasm: Any, name: str, bits: int, activations: str
) -> None:
    source, out = MODELS[name](), tmp_path / "q.onnx"
    feeds = feeds_of(name, source)
    options = {"bits": bits, "activations": activations, "device": "cpu"}
    report = comq_onnx.quantize(source, out, feeds, target="ort-web", **options)
    forms = {layer.form for layer in report.layers}
    assert "blocked" not in forms
    assert ("integer" in forms) == (activations == "8")
    one = {n: np.asarray(a)[:1] for n, a in feeds.items()}
    [[ran]] = wasm.run([([out], one)])
    assert ran.error == ""
    assert sqnr_of(Session(out).run(one), dict(ran.outputs)) > SAME_DB


def test_blocks_of_inputs_load_in_webassembly(tmp_path: Path, wasm: Any) -> None:
    source, out = mlp(width=64), tmp_path / "q.onnx"
    feeds = samples_for(source, count=16)
    comq_onnx.quantize(source, out, feeds, bits=4, granularity="32", target="ort-web", device="cpu")
    one = {n: np.asarray(a)[:1] for n, a in feeds.items()}
    [[ran]] = wasm.run([([out], one)])
    assert ran.error == ""
    assert sqnr_of(Session(out).run(one), dict(ran.outputs)) > SAME_DB


def test_what_node_cannot_load_is_an_error_of_that_model(tmp_path: Path, wasm: Any) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    good = tmp_path / "good.onnx"
    onnx.save(mlp(), good)
    one = {n: np.asarray(a)[:1] for n, a in samples_for(mlp(), count=1).items()}
    [[bad, ran]] = wasm.run([([tmp_path / "bad.onnx", good], one)], seconds=0.01)
    assert bad.error
    assert bad.outputs is None
    assert (ran.error, len(ran.times_ms) >= 3) == ("", True)


def test_no_product_is_packed_for_the_browser(tmp_path: Path) -> None:
    """A MatMulNBits unpacks its weights at every call in WebAssembly."""
    source, feeds = encoder(), samples_for(encoder(), count=16)
    for name, packed in (("ort-cpu", True), ("ort-web", False)):
        out = tmp_path / f"{name}.onnx"
        report = comq_onnx.quantize(source, out, feeds, target=name, activations="none", granularity="32", device="cpu")
        assert any(layer.form == "blocked" for layer in report.layers) == packed
        assert ("MatMulNBits" in executed_kernels(out).counts) == packed


def test_matmulnbits_is_refused_for_the_browser() -> None:
    with pytest.raises(OptionError, match="--nbits-op: MatMulNBits needs a good kernel, and ort-web has none; leave"):
        comq_onnx.Options(nbits_op=True, target="ort-web")


def test_the_browser_has_costs_of_its_own() -> None:
    assert TARGETS["ort-web"] is ORT_WEB
    assert ORT_WEB.costs is not None
    assert ORT_WEB.costs != ORT_CPU.costs
    assert not ORT_WEB.costs.blocked
    assert set(ORT_WEB.costs.operators) <= ORT_WEB.any_scale | ORT_WEB.same_scale


def test_planned_layers_are_what_runs_in_integers(tmp_path: Path) -> None:
    source, out = ROOT / "models" / "fashion_vit.onnx", tmp_path / "q.onnx"
    calib = ROOT / "models" / "fashion_calib.npz"
    report = comq_onnx.quantize(source, out, calib, max_samples=16, target="ort-web", solver="rtn", device="cpu")
    planned = sum(layer.form == "integer" for layer in report.layers)
    counts = executed_kernels(out, level=2).counts
    assert planned == sum(n for op, n in counts.items() if op in INTEGER_PRODUCTS) > 0


class Quiet(SimpleHTTPRequestHandler):
    """Serve files without a word."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """Serve a folder on this machine, and return its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def block(language: str) -> str:
    """Return the first block of the page in a language."""
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@needs_browser
def test_the_page_of_the_documentation_answers(
    tmp_path: Path, package: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "models", tmp_path / "models")
    command = next(line[2:] for line in block("console").splitlines() if line.startswith("$ comq-onnx "))
    said: Said = run_command(*command.split()[1:])
    assert said.code == 0, said.err
    assert run_text(block("python")).code == 0
    (tmp_path / "index.html").write_text(block("html"))
    (tmp_path / "node_modules").symlink_to(package.parent)
    assert BROWSER is not None
    opened = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000", "--dump-dom"]
    page = subprocess.run([*opened, f"{served}/index.html"], capture_output=True, text=True, timeout=240).stdout
    found = re.search(r'<pre id="answer">(.*?)</pre>', page, re.DOTALL)
    assert found is not None, page[-2000:]
    answer = np.array([float(x) for x in unescape(found[1]).split()], np.float32)
    image = np.fromfile(tmp_path / "image.bin", np.float32).reshape(1, 1, 28, 28)
    expected = Session(tmp_path / "vit_web.onnx").run({"image": image})["logits"]
    assert answer.shape == expected[0].shape
    assert sqnr_of({"logits": expected[0]}, {"logits": answer}) > SAME_DB
