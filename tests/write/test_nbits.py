"""Test products written as MatMulNBits: the codes of the solution, and the same numbers as in the QDQ form."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoders import genai
from written import Quantize, quantize
from zoo import model_of, node, noise

import comq_onnx
from comq_onnx.errors import OptionError
from comq_onnx.solve.grid import Grid, QuantizedWeight
from comq_onnx.write.check import missing
from comq_onnx.write.nbits import pack_blocks, stored_codes
from models import infer

ROWS, INPUTS, OUTPUTS = 4, 200, 130


def product(op: str = "MatMul", outputs: int = OUTPUTS, inputs: int = INPUTS) -> onnx.ModelProto:
    """Build x [n, inputs] -> Tanh -> product of odd widths, with a bias."""
    weights = {"w": noise(inputs, outputs) if op == "MatMul" else noise(outputs, inputs), "b": (outputs,)}
    nodes = [node("Tanh", "x", "t")]
    if op == "MatMul":
        nodes += [node("MatMul", "t w", "p"), node("Add", "p b", "y")]
    else:
        nodes += [node("Gemm", "t w b", "y", transB=1)]
    return model_of(nodes, weights, {"x": ["n", inputs]}, ["y"])


def run(model: onnx.ModelProto, x: np.ndarray, exact: bool) -> np.ndarray:
    """Return what ONNX Runtime computes; exact: on float inputs, without the rounding of accuracy level 4."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for made in copy.graph.node:
        for attribute in made.attribute:
            if attribute.name == "accuracy_level" and exact:
                attribute.i = 0
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0" if exact else "4")
    session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("granularity", ["channel", "32", "128"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_forms_give_the_same_numbers(
    quantize: Quantize, op: str, bits: int, granularity: str, symmetric: bool
) -> None:
    feeds = {"x": noise(40, INPUTS)}
    options = {"bits": bits, "granularity": granularity, "symmetric": symmetric, "activations": "none"}
    qdq = quantize(product(op), feeds, **options)
    nbits = quantize(product(op), feeds, nbits_op=True, **options)
    assert "DequantizeLinear" not in {n.op_type for n in nbits.proto.graph.node}
    (made,) = (n for n in nbits.proto.graph.node if n.op_type == "MatMulNBits")
    assert nbits.initializers[made.input[1]].name == "w.codes"
    x = noise(ROWS, INPUTS)
    expected, found = run(qdq.proto, x, exact=True), run(nbits.proto, x, exact=True)
    # sums of 200 floats in another order
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    # and the kernel that runs by default is the same one
    np.testing.assert_allclose(run(nbits.proto, x, exact=False), run(qdq.proto, x, exact=False), rtol=0,
                               atol=2e-6 * np.abs(expected).max())  # fmt: skip


@pytest.mark.parametrize("inputs", [64, 70])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 16), (4, 128)])
def test_bytes_hold_the_codes_and_zero_points_behind_them(inputs: int, bits: int, block: int) -> None:
    random = np.random.default_rng(0)
    grid = Grid(bits, symmetric=False, block_size=block)
    codes = random.integers(grid.qmin, grid.qmax + 1, (1, 6, inputs)).astype(np.int8)
    shape = (1, 6, grid.blocks(inputs))
    zero = random.integers(grid.qmin, grid.qmax + 1, shape).astype(np.int8)
    stored = pack_blocks(QuantizedWeight(codes, np.ones(shape, np.float32), zero, grid), bits, block)
    assert stored.shape == (6, -(-inputs // block), block * bits // 8)
    of = {"K": inputs, "bits": bits}
    np.testing.assert_array_equal(stored_codes(ir.node("MatMulNBits", [], of), stored), codes[0])
    behind = stored_codes(ir.node("MatMulNBits", [], of | {"K": stored.shape[1] * block}), stored)[:, inputs:]
    np.testing.assert_array_equal(behind, np.broadcast_to(zero[0][:, -1:], behind.shape))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_reads_the_codes_of_the_head(tmp_path: Path, bits: int) -> None:
    """Test it on a decoder as GenAI's builder writes it: one table in the file, the same numbers as in QDQ."""
    model, files = genai(vocabulary=2400), {}
    options = {"device": "cpu", "max_samples": 16, "uniform": True, "bits_for": (("lm_head", bits),)}
    for nbits in (False, True):
        files[nbits] = tmp_path / f"{nbits}.onnx"
        report = comq_onnx.quantize(model, files[nbits], nbits_op=nbits, **options)
    proto = onnx.load(files[True])
    assert [x.name for x in proto.graph.initializer if np.prod(x.dims) * 8 // bits == 2400 * 32] == ["table.codes"]
    assert {"MatMulNBits", "GatherBlockQuantized"} <= {n.op_type for n in proto.graph.node}
    assert {x.name: x for x in report.layers}["lm_head"].bytes_after == 0, "its codes are counted once"
    tokens = np.arange(12)[None] * 190
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    pasts = [x.name for x in model.graph.input if x.name.startswith("past")]
    feeds |= {name: np.zeros((1, 1, 0, 16), np.float32) for name in pasts}
    for node_ in proto.graph.node:
        for attribute in node_.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    expected, found = infer(files[False], feeds, exact=True)["logits"], infer(proto, feeds, exact=True)["logits"]
    # two layers of float32 sums in another order
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_cannot_be_written_so_stays_and_is_named(quantize: Quantize) -> None:
    options = {"activations": "none", "nbits_op": True, "bits": 2}
    written = quantize(product(outputs=132), {"x": noise(40, INPUTS)}, **options)
    assert "DequantizeLinear" in {n.op_type for n in written.proto.graph.node}
    report = comq_onnx.plan(product(outputs=132), {"x": noise(40, INPUTS)}, device="cpu", uniform=True, **options)
    name = report.layers[0].name
    assert f"--nbits-op: 1 weight-only products stay QDQ: {name} (2 bits)" in report.notes


def test_only_onnx_runtime_has_the_operator() -> None:
    with pytest.raises(OptionError, match="--nbits-op: MatMulNBits is an operator of ONNX Runtime alone, and openvino"):
        comq_onnx.plan(product(), nbits_op=True, target="openvino")


def test_other_codes_than_were_solved_for_are_found(quantize: Quantize) -> None:
    written = quantize(product(), {"x": noise(40, INPUTS)}, activations="none", nbits_op=True)
    model = ir.from_proto(written.proto)
    assert missing(model, written.solved) == []
    changed = written.array("w.codes").copy()
    changed[3, 0, 5] ^= 1
    model.graph.initializers["w.codes"].const_value = ir.tensor(changed, name="w.codes")
    (name,) = written.layers
    assert missing(model, written.solved) == [f"layer {name!r} reads other codes than were solved for"]
