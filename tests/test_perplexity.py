"""Test that tools/perplexity.py prints the perplexity of decoders with and without a past."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import genai
from script import run_script
from texts import WORDS, a_tokenizer

from comq_onnx.runtime.session import Session
from models import build, decoder, normal

TOOL = Path(__file__).parents[1] / "tools" / "perplexity.py"


def without_cache() -> onnx.ModelProto:
    """Build a language model of one product: input_ids [batch, seq] -> logits [batch, seq, 60]."""
    return build(
        """plain (int64[batch, seq] input_ids) => (float[batch, seq, 60] logits) {
            x = Gather (table, input_ids)
            logits = MatMul (x, head)
        }""",
        {"table": normal(60, 16), "head": normal(16, 60)},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Store models, a tokenizer and a text."""
    for name, model in {"plain": without_cache(), "cached": genai(), "other": decoder()}.items():
        onnx.save(model, tmp_path / f"{name}.onnx")
    a_tokenizer().save(str(tmp_path / "tokenizer.json"))
    words = np.random.default_rng(0).choice(WORDS, 50)
    (tmp_path / "text.txt").write_text(" ".join(words))
    return tmp_path


def test_the_perplexity_is_that_of_the_tokens_that_follow(folder: Path) -> None:
    out = folder / "figures.json"
    models = [folder / f"{name}.onnx" for name in ("plain", "cached")]
    done = run_script(TOOL, *models, "--text", folder / "text.txt", "--context", 8, "--json", out)
    assert done.code == 0, done.err
    assert "48 tokens of text.txt in windows of 8" in done.out
    plain, cached = json.loads(out.read_text())
    ids = np.array(a_tokenizer().encode((folder / "text.txt").read_text(), add_special_tokens=False).ids[:48])
    scores = Session(models[0], "cpu").run({"input_ids": ids.reshape(6, 8)})["logits"].astype(np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    loss = -np.take_along_axis(scores[:, :-1], ids.reshape(6, 8)[:, 1:, None], 2).mean()
    assert plain["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert (plain["rise"], plain["divergence"], plain["top1_agreement"]) == (1, 0, 1)
    assert cached["rise"] == pytest.approx(cached["perplexity"] / plain["perplexity"])
    assert cached["divergence"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["plain.onnx", "--context", 64], "50 tokens; a window takes 64: give a longer text or fewer --context"),
        (["plain.onnx", "other.onnx", "--context", 8], "another vocabulary than that of"),
    ],
)
def test_what_cannot_be_measured_is_one_line(folder: Path, options: list[object], said: str) -> None:
    given = [folder / o if str(o).endswith(".onnx") else o for o in options]
    done = run_script(TOOL, *given, "--text", folder / "text.txt")
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err


def test_the_benchmark_of_quantizers_prints_a_line_for_each(folder: Path) -> None:
    onnx.save(without_cache(), folder / "model.onnx")
    np.savez(folder / "test.npz", input_ids=np.random.default_rng(0).integers(0, 60, (3, 12)))
    done = run_script(TOOL.parent / "bench" / "language.py", folder, "--only", "comq-onnx rounding, per")
    assert done.code == 0, done.err
    (line,) = (line for line in done.out.splitlines() if line.startswith("comq-onnx rounding, per channel"))
    (of_float,) = (float(line.split()[-3]) for line in done.out.splitlines() if line.startswith("float"))
    *_, perplexity, times, rate = map(float, line.split()[-6:])
    # both figures are printed with few digits
    assert times == pytest.approx(perplexity / of_float, rel=2e-3)
    assert rate > 0
