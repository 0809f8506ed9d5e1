"""Test embeddings that are the weight of the head too: one set of codes, stored once, in the file and in what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from decoders import genai
from onnx import numpy_helper

import comq_onnx
from models import Arrays, build, infer, sqnr, weight

VOCABULARY, WIDTH = 2400, 32
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (40, 6))


def bare(how: str) -> onnx.ModelProto:
    """Build tokens [batch, seq] -> logits, the head of an embedding that an exporter stored in one of these ways.

    how: `twice`, a second time transposed; `product`, as the weight of a Gemm; `other`, a head of other numbers
    """
    table = weight(VOCABULARY, WIDTH, fan=4)
    weights = {"table": table, "flat": np.array([-1, WIDTH])}
    head = "[head] logits = MatMul (r, turned)"
    if how == "product":
        head = "rows = Reshape (r, flat)\n [head] logits = Gemm <transB = 1> (rows, table)"
    else:
        weights["turned"] = table.T.copy() if how == "twice" else weight(WIDTH, VOCABULARY)
    shape = "[n, 2400]" if how == "product" else "[batch, seq, 2400]"
    return build(
        f"""bare (int64[batch, seq] input_ids) => (float{shape} logits) {{
            [embed] x = Gather (table, input_ids)
            [mix] h = MatMul (x, mix)
            r = Tanh (h)
            {head}
        }}""",
        {**weights, "mix": weight(WIDTH, WIDTH)},
        opset=21,
    )


def quantize(model: onnx.ModelProto, out: Path, **options: Any) -> comq_onnx.Report:
    """Quantize weights alone, on the CPU."""
    given = {"device": "cpu", "activations": "none", "max_samples": 32, "uniform": True, **options}
    return comq_onnx.quantize(model, out, None if "attention_mask" in str(model.graph.input) else TOKENS_OF, **given)


TOKENS_OF = {"input_ids": TOKENS}


def tables(path: Path) -> Arrays:
    """Return the stored arrays with a number for each weight of the table."""
    stored = onnx.load(path).graph.initializer
    return {x.name: numpy_helper.to_array(x) for x in stored if np.prod(x.dims) == VOCABULARY * WIDTH}


@pytest.mark.parametrize("make", [lambda: genai(vocabulary=VOCABULARY), lambda: bare("twice"), lambda: bare("product")],
                         ids=["transposed", "twice", "product"])  # fmt: skip
def test_one_table_of_codes_serves_the_embedding_and_the_head(make: Any, tmp_path: Path) -> None:
    model = make()
    report = quantize(model, tmp_path / "q.onnx")
    assert list(tables(tmp_path / "q.onnx")) == ["table.codes"]
    of = {x.name: x for x in report.layers}
    head = of.get("lm_head") or of["head"]
    assert of["embed"].bits == head.bits == 8
    assert head.bytes_after == (VOCABULARY * WIDTH if head.op == "Gemm" else 0), "a Gemm reads the table itself"
    assert report.kernels["MatMulNBits"] >= 1
    assert report.outputs[0].sqnr_db > 12, "of 4 bits elsewhere"
    assert f"embed and {head.name} have one weight: stored once, for both" in report.notes


@pytest.mark.parametrize("bits", [6, 4])
def test_the_embedding_has_the_codes_that_the_head_was_solved_for(bits: int, tmp_path: Path) -> None:
    model = bare("twice")
    report = quantize(model, tmp_path / "q.onnx", bits=8, bits_for=(("embed", bits),))
    head = {x.name: x for x in report.layers}["head"]
    assert head.bits == bits
    assert head.error_db is not None
    assert head.error_db < -4.5 * bits
    made = infer(tmp_path / "q.onnx", {"input_ids": TOKENS}, exact=True)["logits"]
    # rounding alone gives about 6 dB a bit
    assert sqnr(infer(model, {"input_ids": TOKENS})["logits"], made) > 4 * bits - 2


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("other", {}),
        ("twice", {"bits_for": (("embed", 8), ("head", 4))}),
        ("twice", {"bits_for": (("head", 2),)}),
        ("twice", {"target": "openvino"}),
    ],
    ids=["other numbers", "other bits", "two bits", "another runtime"],
)
def test_what_cannot_be_one_table_stays_two(how: str, options: dict[str, Any]) -> None:
    given = {"device": "cpu", "activations": "none", "uniform": True, **options}
    assert not any("one weight" in note for note in comq_onnx.plan(bare(how), TOKENS_OF, **given).notes)


def test_a_budget_counts_the_table_once(tmp_path: Path) -> None:
    model = genai(vocabulary=VOCABULARY)
    report = quantize(model, tmp_path / "q.onnx", bits="auto", size="36%", uniform=False)
    assert report.size["after"] <= 0.36 * report.size["before"]
    assert {x.bits for x in report.layers if x.name in ("embed", "lm_head")} == {8}
