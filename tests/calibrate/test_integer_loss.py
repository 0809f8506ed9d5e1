"""Test that layers leave integers where their quantized activations alone make noise of the outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import comq_onnx
from models import Arrays, attention, build, infer, samples_for, sqnr, weight


def frames_of_many_levels() -> onnx.ModelProto:
    """Build a convolution over sound whose frames a LayerNormalization makes equally loud, and two layers behind it."""
    return build(
        """g (float[N, 1, T] audio) => (float[N, F, 12] y) {
            [first] a = Conv <kernel_shape = [16], strides = [8]> (audio, w0)
            [point] c = Conv <kernel_shape = [1]> (a, w1)
            t = Transpose <perm = [0, 2, 1]> (c)
            n = LayerNormalization <axis = -1> (t, one, zero)
            [up] u = MatMul (n, w2)
            r = Relu (u)
            [head] y = MatMul (r, w3)
        }""",
        {
            "w0": weight(32, 1, 16),
            "w1": weight(32, 32, 1, seed=2),
            "one": np.ones(32, np.float32),
            "zero": np.zeros(32, np.float32),
            "w2": weight(32, 64, seed=3),
            "w3": weight(64, 12, seed=4),
        },
    )


def sounds(seed: int = 0) -> Arrays:
    """Draw [48, 1, 512] sounds: one frame loud, and the rest a thousand times more quiet."""
    sound = np.random.default_rng(seed).standard_normal((48, 1, 512)) * 1e-3
    sound[..., 256:272] *= 1e3
    return {"audio": sound.astype(np.float32)}


def quantized(out: Path, **options: Any) -> tuple[comq_onnx.Report, float]:
    """Quantize the model of sounds, and return the report and the SQNR on sounds that were not calibrated on."""
    model, fresh = frames_of_many_levels(), sounds(seed=1)
    report = comq_onnx.quantize(model, out, sounds(), bits=8, device="cpu", **options)
    return report, sqnr(infer(model, fresh)["y"], infer(out, fresh)["y"])


def in_integers(path: Path) -> set[str]:
    """Return the names of the layers whose activation comes from a DequantizeLinear."""
    nodes = onnx.load(path).graph.node
    made = {name: node for node in nodes for name in node.output}
    layers = [node for node in nodes if node.op_type in ("Conv", "MatMul")]
    return {x.name for x in layers if x.input[0] in made and made[x.input[0]].op_type == "DequantizeLinear"}


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "tensorrt"])
def test_layers_whose_integers_make_noise_are_weight_only(tmp_path: Path, target: str) -> None:
    """The layers before the normalization leave integers, and those behind it stay."""
    given, loud = tmp_path / "given.onnx", quantized(tmp_path / "given.onnx", target=target, activations="8")[1]
    out, kept = tmp_path / "default.onnx", quantized(tmp_path / "default.onnx", target=target)[1]
    assert loud < 10
    assert kept > 25
    assert in_integers(given) == {"first", "point", "up", "head"}
    assert in_integers(out) == {"up", "head"}


def test_a_note_names_the_layers_and_the_option(tmp_path: Path) -> None:
    """The report says which layers are weight-only, why, and how to have them in integers."""
    report, _ = quantized(tmp_path / "q.onnx", target="openvino")
    note = next(note for note in report.notes if "quantized activations alone" in note)
    assert "first" in note
    assert "--activations 8" in note


def test_a_model_that_bears_integers_keeps_them(tmp_path: Path) -> None:
    """The file is the same as with all layers in integers where the outputs bear that."""
    files = [tmp_path / "default.onnx", tmp_path / "given.onnx"]
    for out, activations in zip(files, ("auto", "8"), strict=True):
        model = attention()
        given = samples_for(model)
        comq_onnx.quantize(model, out, given, bits=8, device="cpu", target="openvino", activations=activations)
    assert in_integers(files[0]) == in_integers(files[1]) != set()
