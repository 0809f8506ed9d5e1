"""Test --float16: half precision of what is not quantized, and float32 of what it cannot hold."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import HEAD, genai
from onnx import TensorProto
from written import Quantize, Written, quantize
from zoo import ZOO_FEEDS, model_of, node, noise, zoo

import comq_onnx
from comq_onnx.metrics import sqnr_of
from models import infer

HALF = {"target": "ort-cuda", "float16": True}


def types(written: Written) -> set[int]:
    """Return the types of the numbers that a file holds."""
    return {t.data_type for t in written.proto.graph.initializer}


def large() -> onnx.ModelProto:
    """Build x [n, 64] -> product -> the mean of its squares, which float16 cannot hold -> normalized -> product."""
    return model_of(
        [
            node("MatMul", "x w1", "h"), node("Mul", "h h", "squares"),
            node("ReduceMean", "squares axes", "mean", keepdims=1), node("Sqrt", "mean", "root"),
            node("Div", "h root", "normal"), node("MatMul", "normal w2", "y"),
        ],
        {"w1": 800 * noise(64, 64) / 8, "w2": (64, 32), "axes": np.array([-1])},
        {"x": ["n", 64]},
        ["y"],
    )  # fmt: skip


@pytest.mark.parametrize("target", ["ort-cuda", "tensorrt"])
def test_every_layer_computes_in_half_precision(quantize: Quantize, target: str) -> None:
    options = {"bits": 4, "target": target}
    single = quantize(zoo(), ZOO_FEEDS, **options).proto
    half = quantize(zoo(), ZOO_FEEDS, float16=True, **options)
    assert TensorProto.FLOAT not in types(half)
    assert TensorProto.FLOAT16 in types(half)
    assert [o.type.tensor_type.elem_type for o in half.proto.graph.output] == [
        o.type.tensor_type.elem_type for o in half.source.graph.output
    ]
    before, after = (infer(model, ZOO_FEEDS) for model in (single, half.proto))
    # float16 has 11 bits: the noise of one rounding is 70 dB below the number
    assert sqnr_of(before, after) > 40
    assert half.solved.plan.too_large == frozenset()


def test_what_float16_cannot_hold_stays_float32(quantize: Quantize) -> None:
    feeds = {"x": noise(24, 64)}
    single = quantize(large(), feeds, target="ort-cuda").proto
    half = quantize(large(), feeds, **HALF)
    assert half.solved.plan.too_large == {"squares", "mean"}
    before, after = (infer(model, feeds) for model in (single, half.proto))
    assert sqnr_of(before, after) > 40
    casts = {n.input[0]: n for n in half.proto.graph.node if n.op_type == "Cast"}
    # the product goes into its squares, the root comes out of them
    assert casts["h"].attribute[0].i == TensorProto.FLOAT


def test_a_half_precision_decoder_gets_no_casts(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 60, (24, 12))
    comq_onnx.quantize(genai(half=True), tmp_path / "q.onnx", {"input_ids": ids}, device="cpu", uniform=True, **HALF)
    half = onnx.load(tmp_path / "q.onnx")
    assert {o.type.tensor_type.elem_type for o in half.graph.output} == {TensorProto.FLOAT16}
    # that of the rows of an embedding is not one of a number
    casts = [n for n in half.graph.node if n.op_type == "Cast" and n.attribute[0].i != TensorProto.INT32]
    assert [n.name for n in casts] == ["embed.row"]
    past = np.zeros((24, 1, 0, HEAD), np.float16)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds |= {i.name: past for i in half.graph.input if i.name.startswith("past")}
    before, after = (infer(model, feeds) for model in (genai(half=True), half))
    assert sqnr_of(before, after) > 10
    assert TensorProto.FLOAT not in {t.data_type for t in half.graph.initializer}


def test_a_layer_that_stays_float_takes_half_the_bytes(quantize: Quantize) -> None:
    feeds = {"x": noise(24, 64)}
    half = quantize(large(), feeds, exclude=("^y$",), **HALF)
    assert half.initializers["w2"].data_type == TensorProto.FLOAT16


def test_the_default_is_float32(quantize: Quantize) -> None:
    written = quantize(large(), {"x": noise(24, 64)}, target="ort-cuda")
    assert TensorProto.FLOAT16 not in types(written)
