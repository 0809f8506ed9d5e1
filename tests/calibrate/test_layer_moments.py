"""Test the moments of layer inputs: those of the shipped model, however the rows are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Solved
from walks import MODELS, quantize, tapped

from comq_onnx.calibrate import cut_tensors, layer_moments
from comq_onnx.calibrate.layer_moments import LayerInput, in_groups
from comq_onnx.model.layers import Layer
from comq_onnx.model.operators import MatMul
from comq_onnx.samples.samples import Samples
from comq_onnx.solve import patches
from models import (
    attention,
    batchnorm_cnn,
    build,
    cnn,
    mlp,
    normal,
    samples_for,
    sqnr,
    weight,
)  # fmt: skip


@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("make", [mlp, attention])
def test_the_moments_are_those_of_the_input_in_the_shipped_model(
    tmp_path: Path,
    make: Callable[[], onnx.ModelProto],
    activations: str,
    solved: Solved,
) -> None:
    samples = samples_for(make(), free=12)
    # every Gemm becomes a MatMul without activations: 8 bits would be written per channel, 4 bits in blocks
    report = quantize(make(), tmp_path / "q.onnx", samples, activations=activations)
    counts = report.samples
    (name,) = samples
    used, _ = Samples(samples, "").split(counts["used"], counts["held_back"], 0)
    written = {node.name for node in onnx.load(tmp_path / "q.onnx").graph.node}
    layers = {layer.name: 0 for layer in report.layers if layer.name in written}
    assert len(layers) >= len(report.layers) - 1
    x_hat = tapped(tmp_path / "q.onnx", layers, {name: used.arrays[name]})
    assert set(solved.on) == {layer.name for layer in report.layers}
    for name in layers:
        statistics, rows = solved.on[name], x_hat[name].reshape(-1, x_hat[name].shape[-1]).astype(np.float64)
        assert statistics.count == len(rows)
        # codes of activations differ here and there: the runtime fuses a segment in other places than the whole model;
        # without them float32 products in another order are all that differs
        assert sqnr(statistics.gram[0], rows.T @ rows / len(rows)) > (100 if activations == "none" else 50)


def test_convolutions_too_are_solved_on_what_the_shipped_model_computes(tmp_path: Path, solved: Solved) -> None:
    # few enough that no position is left out
    samples = samples_for(cnn(), 30)
    report = quantize(cnn(), tmp_path / "q.onnx", samples)
    used, _ = Samples(samples, "").split(report.samples["used"], report.samples["held_back"], 0)
    x_hat = tapped(tmp_path / "q.onnx", {"point": 0}, used.arrays)["point"]
    rows = x_hat.transpose(0, 2, 3, 1).reshape(-1, 16).astype(np.float64)
    assert sqnr(solved.on["point"].gram[0], rows.T @ rows / len(rows)) > 50


def test_the_first_layer_knows_only_the_quantization_of_its_input(tmp_path: Path, solved: Solved) -> None:
    quantize(mlp(), tmp_path / "q.onnx", activations="none")
    first, second = solved.on["fc1"], solved.on["fc2"]
    # before the first layer nothing is quantized, so x^ is x; behind it x^ differs from x
    assert first.residue is None or not first.residue.any()
    assert second.residue is not None
    assert np.trace(second.residue[0]) > 0


def test_independent_layers_see_the_float_model(tmp_path: Path, solved: Solved) -> None:
    samples = samples_for(mlp())
    report = quantize(mlp(), tmp_path / "q.onnx", samples, independent=True)
    used, _ = Samples(samples, "").split(report.samples["used"], report.samples["held_back"], 0)
    x = used.arrays["x"].astype(np.float64)
    # float32 products of 35 rows: 7 digits less two
    np.testing.assert_allclose(solved.on["fc1"].gram[0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert all(statistics.residue is None for statistics in solved.on.values())


def test_layers_that_read_the_same_rows_share_their_moments(tmp_path: Path, solved: Solved) -> None:
    quantize(attention(), tmp_path / "q.onnx")
    assert solved.on["q"] is solved.on["k"] is solved.on["v"]
    assert solved.on["out"] is not solved.on["q"]


# Two halves of the samples --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*MODELS.values(), batchnorm_cnn], ids=[*MODELS, "3x3"])
def test_the_batch_size_changes_no_half(tmp_path: Path, make: Callable[[], onnx.ModelProto], solved: Solved) -> None:
    seen = []
    for batch_size in (16, 5):
        # independent: of activations rounded to 8 bits, one in a thousand may be rounded the other way
        quantize(make(), tmp_path / "q.onnx", batch_size=batch_size, independent=True)
        seen.append(dict(solved.on))
    for name, first in seen[0].items():
        second = seen[1][name]
        assert first.half is not None
        assert second.half is not None
        assert 0 < first.half.count == second.half.count < first.count == second.count
        # float32 products in another order
        assert sqnr(first.gram, second.gram) > 100
        assert sqnr(first.half.gram, second.half.gram) > 100


# Convolutions by their patches ----------------------------------------------------------------------------------------


def supported(*call: Any) -> bool:
    """Tell whether patches are possible at all, whether they pay or not."""
    _, kernel, strides, dilations, group = call
    return len(kernel) == 2 and group == 1 and all(step == 1 for step in (*strides, *dilations))


@pytest.mark.parametrize("options", [{}, {"activations": "none"}, {"independent": True}], ids=str)
def test_moments_by_patches_are_those_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved, options: dict[str, Any]
) -> None:
    seen, images = [], {"image": np.abs(normal(40, 3, 8, 8))}
    for pays in (lambda *_: False, supported):
        monkeypatch.setattr(patches, "pays", pays)
        # as many images as there are stretches, or twice as many: no image is cut in two
        quantize(batchnorm_cnn(), tmp_path / "q.onnx", images, max_samples=32, **options)
        seen.append(dict(solved.on))
    assert list(seen[0]) == list(seen[1]) == ["conv1", "conv2"]
    for name, rows in seen[0].items():
        found = seen[1][name]
        assert found.count == rows.count == 32 * 64
        assert found.half is not None
        assert rows.half is not None
        assert found.half.count == rows.half.count == 16 * 64
        differs = name == "conv2" or options == {}
        assert (rows.residue is not None) == (differs and "independent" not in options)
        for part in ("gram", "mean", "cross", "residue", "mean_error"):
            for one, other in ((found, rows), (found.half, rows.half)):
                a, b = getattr(one, part), getattr(other, part)
                assert (a is None) == (b is None)
                # float32 sums of 1,024 products: their errors, some 32 roundings of 6e-8, are 114 dB below; but one
                # code of 324 in conv1 that changes by them shows in what conv2 reads
                assert a is None or sqnr(b, a) > (100 if name == "conv1" or "independent" in options else 40)


def test_an_image_is_never_in_both_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved) -> None:
    monkeypatch.setattr(patches, "pays", supported)
    report = quantize(batchnorm_cnn(), tmp_path / "q.onnx", {"image": normal(40, 3, 8, 8)})
    for statistics in solved.on.values():
        assert statistics.half is not None
        assert statistics.count == report.samples["used"] * 64
        assert statistics.half.count % 64 == 0
        assert 0.3 * statistics.count < statistics.half.count < 0.7 * statistics.count


# Positions and groups of samples --------------------------------------------------------------------------------------


def test_beyond_a_number_of_positions_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    for limit in ("LEAST_POSITIONS", "MOST_POSITIONS"):
        monkeypatch.setattr(layer_moments, limit, 100)
    monkeypatch.setattr(layer_moments, "POSITIONS_PER_INPUT", 1)
    quantize(attention(), tmp_path / "q.onnx")
    for statistics in solved.on.values():
        # a share of each batch, rounded
        assert statistics.count == pytest.approx(100, abs=2)
        assert statistics.half is not None
        assert statistics.half.count == pytest.approx(50, abs=4)


HOST = cut_tensors.Host(1 << 30, Path("unused"))


def an_input(batches: list[np.ndarray], counts: list[int]) -> LayerInput:
    """Return batches as the input of a MatMul."""
    layer = Layer("fc", "MatMul", MatMul((5, 4)), "x", "y", "w")
    return LayerInput(layer, batches, batches, None, counts, [None] * len(batches))


def test_rows_are_grouped_the_same_whatever_the_batches() -> None:
    array = normal(23, 5)
    for rows in (1, 5):
        whole = np.repeat(array, rows, axis=0)
        for size in (1, 4, 16, 23):
            counts = [size] * (23 // size) + ([23 % size] if 23 % size else [])
            batches = np.split(whole, np.cumsum(counts)[:-1] * rows)
            groups = in_groups(an_input(batches, counts), HOST).x
            assert groups is not batches
            assert groups.counts == [16, 7]
            np.testing.assert_array_equal(groups[0], whole[: 16 * rows])
            np.testing.assert_array_equal(groups[1], whole[16 * rows :])


def test_tensors_of_other_rows_are_not_grouped() -> None:
    for batches, counts in (
        ([normal(4, 3), normal(4, 3)], [4, 3]),
        ([normal(4, 3), normal(3, 2)], [4, 3]),
        ([normal(3), normal(3)], [3, 3]),
        ([normal(0, 3), normal(0, 3)], [3, 3]),
    ):
        given = an_input(batches, counts)
        assert in_groups(given, HOST) is given


def test_layers_whose_first_axis_is_no_batch_are_solved_on_their_rows(tmp_path: Path) -> None:
    # weights on the left, transposed and stacked: inputs joined along their first axis would be other rows
    model = build(
        """g (float[32, 12] x, float[2, 6, 32] z) => (float[16, 12] l, float[12, 16] t, float[2, 6, 8] s) {
            [left] l = MatMul (w, x)
            [turned] t = Gemm <transA = 1> (x, v)
            [stacked] s = MatMul (z, u)
        }""",
        {"w": weight(16, 32), "v": weight(32, 16), "u": weight(2, 32, 8, fan=32)},
    )
    samples = {"x": normal(24, 32, 12), "z": normal(24, 2, 6, 32)}
    report = quantize(model, tmp_path / "q.onnx", samples, bits=8)
    assert min(output.sqnr_db for output in report.outputs) > 35
