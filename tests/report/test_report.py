"""Test what a run fills into its report, and the model that the report gives back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import Done
from reports import Page, activation, report

import comq_onnx
from comq_onnx import errors
from comq_onnx.plan.observed_range import ObservedRange
from models import build, cnn, infer, mlp, normal, op_types, samples_for, sqnr, weight, worst_sqnr

# The ranges of activations


def test_the_central_values_of_a_range_are_numpys_quantiles() -> None:
    seen = ObservedRange()
    values = np.concatenate([normal(200_000), [900.0, -50.0]]).astype(np.float32)
    for part in np.array_split(np.random.default_rng(1).permutation(values), 40):
        seen.observe(part)
    low, high = seen.between(0.999)
    # bins a quarter of a power of two wide, outwards
    for found, exact in ((low, np.quantile(values, 0.0005)), (high, np.quantile(values, 0.9995))):
        assert 0.97 <= found / exact <= 1.3
    assert (seen.low, seen.high) == (-50.0, 900.0)
    assert activation(0, low=-50, high=900, typical_low=low, typical_high=high).outlier_ratio > 80


@pytest.mark.parametrize("values", [[0.0], [0.0, 2.0], [-3.0, -1.0], [1e-30, 1e30]])
def test_all_of_a_range_lies_between_its_ends(values: list[float]) -> None:
    seen = ObservedRange()
    seen.observe(np.asarray(values, np.float32))
    low, high = seen.between(1.0)
    assert seen.low <= low <= high <= seen.high
    assert low == pytest.approx(seen.low)
    assert high == pytest.approx(seen.high)


def test_a_range_that_saw_nothing_is_empty() -> None:
    assert ObservedRange().between(0.999) == (0.0, 0.0)


# What a run fills in


def test_a_run_fills_the_report_in(quantized: Callable[..., Done]) -> None:
    done = quantized(cnn(), exclude=("head",), bits=8)
    found = done.report
    assert [x.kernel for x in found.layers] == ["QLinearConv"] * 3
    sizes = {x.name: (x.bytes_before, x.bytes_after) for x in found.layers}
    for name, (before, after) in sizes.items():
        assert before == 4 * np.prod(next(x.weight_shape for x in found.layers if x.name == name))
        # a byte a weight, and a float32 scale a channel
        assert after == before // 4 + 4 * next(x.weight_shape[0] for x in found.layers if x.name == name)
    names = [a.name for a in found.activations]
    image = found.activations[names.index("image")]
    used = found.inputs[0]
    assert (image.low, image.high) == pytest.approx((used.low, used.high))
    assert image.low <= image.typical_low < image.typical_high <= image.high
    assert found.float_kernels
    json.loads(found.to_json(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert "pictures" not in found.to_json()
    assert "in_memory" not in found.to_json()
    assert "head" in Page(found.to_html()).text


def test_a_value_with_the_name_of_a_layer_is_not_taken_for_it(quantized: Callable[..., Done]) -> None:
    # what comes out of `one` is called `one` and read by another product
    made = build(
        """g (float[batch, 32] x) => (float[batch, 8] y) {
            [one] one = MatMul (x, w)
            [two] two = Gemm <transB = 1> (one, v, b)
            [three] y = MatMul (two, u)
        }""",
        {"w": weight(32, 24), "v": weight(16, 24), "b": normal(16), "u": weight(16, 8)},
    )
    kernels = {x.name: x.kernel for x in quantized(made).report.layers}
    assert kernels == {"one": "QLinearMatMul", "two": "QGemm", "three": "MatMulIntegerToFloat"}


def test_a_float_layer_is_seen_as_float(quantized: Callable[..., Done]) -> None:
    found = quantized(cnn(), activations="none").report
    assert {x.form for x in found.layers} == {"folded", "blocked"}
    assert all(x.runs_in_float for x in found.layers if x.form == "folded")
    assert [x.kernel for x in found.layers if x.form == "blocked"] == ["MatMulNBits"]


def test_the_command_of_a_report_does_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shlex
    import sys

    from comq_onnx.cli import command as cli

    onnx.save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "s.npz", **samples_for(mlp()))
    options = {
        "bits": 3, "symmetric": False, "bits_for": (("fc2", 8),), "max_samples": 30, "independent": True, "seed": 4,
        "memory_gb": 0.5,
    }  # fmt: skip
    found = comq_onnx.quantize(tmp_path / "m.onnx", tmp_path / "q 1.onnx", tmp_path / "s.npz", **options)
    first = (tmp_path / "q 1.onnx").read_bytes()
    (tmp_path / "q 1.onnx").unlink()
    monkeypatch.setattr(sys, "argv", shlex.split(found.command))
    cli.main()
    assert (tmp_path / "q 1.onnx").read_bytes() == first


# Graphs in and out


@pytest.mark.parametrize("kind", ["path", "proto", "graphsurgeon"])
def test_a_model_comes_in_any_form_and_stays_in_memory(tmp_path: Path, kind: str) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    given = {"path": tmp_path / "m.onnx", "proto": mlp(), "graphsurgeon": gs.import_onnx(mlp())}[kind]
    before = sorted(tmp_path.iterdir())
    found = comq_onnx.quantize(given, samples=samples_for(mlp()), bits=4)
    assert sorted(tmp_path.iterdir()) == before
    assert found.output is None
    model = found.onnx_model()
    onnx.checker.check_model(model)
    # 4 bits of normal weights in two layers
    assert worst_sqnr(mlp(), model, samples_for(mlp())) > 12
    graph = found.graph()
    assert isinstance(graph, gs.Graph)
    again = gs.export_onnx(graph)
    again.ir_version = model.ir_version
    assert op_types(again) == op_types(model)
    feeds = samples_for(mlp())
    for name, array in infer(model, feeds).items():
        assert sqnr(array, infer(again, feeds)[name]) > 100
    assert "-o OUTPUT" in found.command
    assert ("MODEL" in found.command) is (kind != "path")


def test_two_models_in_memory_are_compared() -> None:
    given = samples_for(mlp())
    found = comq_onnx.quantize(mlp(), samples=given, bits=8)
    compared = comq_onnx.compare(mlp(), found.graph(), given, count=30, seconds=0)
    assert compared.samples == 30
    # 8 bits of normal weights and activations in two layers
    assert compared.outputs[0].sqnr_db > 25
    assert compared.kernels["QGemm"] == 2
    assert compared.size["after"] < compared.size["before"]


def test_samples_may_be_samples() -> None:
    made = comq_onnx.Samples(samples_for(mlp()), "mine")
    one, other = (comq_onnx.quantize(mlp(), samples=x, bits=8).in_memory for x in (made, made.arrays))
    assert one == other


def test_a_report_reads_the_model_it_wrote(tmp_path: Path) -> None:
    found = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", samples_for(mlp()))
    assert found.onnx_model() == onnx.load(tmp_path / "q.onnx")
    with pytest.raises(ValueError, match="plan"):
        comq_onnx.plan(mlp()).onnx_model()


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(errors.OptionError, match="cannot be written"):
        report().save_html(tmp_path / "no" / "report.html")
    with pytest.raises(errors.OptionError, match="cannot be written"):
        report().save_json(tmp_path)
    assert list(tmp_path.iterdir()) == []
