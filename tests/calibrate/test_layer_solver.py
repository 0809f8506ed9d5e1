"""Test how the layers of one input or one weight are solved, by every solver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Solved
from onnx import numpy_helper
from walks import MODELS, quantize

from comq_onnx.model import prepare as prepare_module
from comq_onnx.plan import smoothing
from comq_onnx.solve import layer as solve_layer
from comq_onnx.solve.layer import METHODS
from models import (
    attention,
    build,
    codes,
    encoder,
    mlp,
    normal,
    sentences,
    weight,
)  # fmt: skip

Run = Callable[..., Any]


def test_layers_of_one_input_are_solved_as_one_where_they_carry_shifts_alike(tmp_path: Path, solved: Solved) -> None:
    quantize(encoder(), tmp_path / "q.onnx", sentences())
    assert solved.together == [["q", "k", "v"], ["out"], ["up"], ["head"]]
    solved.together.clear()
    # only q has a bias
    quantize(attention(), tmp_path / "q.onnx")
    assert solved.together == [["q"], ["k", "v"], ["out"], ["up"], ["down"]]


@pytest.mark.parametrize(
    ("options", "together"),
    [
        ({"granularity": "tensor"}, [["q"], ["k"], ["v"]]),
        ({"granularity": "16"}, [["q", "k", "v"]]),
        ({"bits_for": (("k", 8),)}, [["q", "v"], ["k"]]),
        ({"exclude": ("v",)}, [["q", "k"]]),
        ({"solver": "gptq"}, [["q", "k", "v"]]),
    ],
)
def test_layers_of_other_grids_are_solved_apart(
    tmp_path: Path, solved: Solved, options: dict[str, Any], together: list[list[str]]
) -> None:
    quantize(encoder(), tmp_path / "q.onnx", sentences(), **options)
    assert solved.together[: len(together)] == together


@pytest.mark.parametrize("solver", ["comq", "paper"])
def test_layers_solved_as_one_get_each_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved, solver: str
) -> None:
    # the weights as the source has them
    monkeypatch.setattr(smoothing, "candidates", lambda *_: {})
    # means of errors that may be chance go into the bias too
    monkeypatch.setattr(solve_layer, "SIGNIFICANT", 0.0)
    monkeypatch.setattr(solve_layer, "TOGETHER", -np.inf)
    report = quantize(encoder(), tmp_path / "q.onnx", sentences(), solver=solver, independent=True)
    weights = {t.name: numpy_helper.to_array(t) for t in encoder().graph.initializer}
    written = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    errors = []
    for layer in report.layers:
        if layer.name in ("q", "k", "v"):
            w = weights[f"w{layer.name}"].astype(np.float64)
            w_q = written[f"w{layer.name}.codes"].astype(np.float64) * written[f"{layer.name}.scale"]
            # the shift that comq adds to the bias takes away the mean of the error
            moments = solved.on[layer.name]
            gram = (moments.centred() if solver == "comq" else moments).gram[0]
            error = np.sum((w - w_q) * (gram @ (w - w_q))) / np.sum(w * (moments.gram[0] @ w))
            # float32 products
            assert layer.error_db == pytest.approx(10 * np.log10(error), abs=1e-3)
            errors.append(layer.error_db)
    assert len(set(errors)) == 3


def test_layers_of_one_weight_and_one_input_get_the_same_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not today")

    # constant folding would join the two layers
    monkeypatch.setattr(prepare_module, "fold_constants", refuse)
    model = build(
        """g (float[batch, 32] x) => (float[batch, 300] y, float[batch, 300] z) {
            [first] p = MatMul (x, w)
            y = Relu (p)
            [second] q = MatMul (x, w)
            z = Tanh (q)
        }""",
        {"w": weight(32, 300)},
    )
    report = quantize(model, tmp_path / "q.onnx", {"x": normal(40, 32)})
    assert solved.together == [["first"]]
    # the one weight is in the file once
    assert list(codes(tmp_path / "q.onnx")) == ["w.codes"]
    first, second = report.layers
    # the same sums, in other places of a product
    assert first.error_db == pytest.approx(second.error_db, abs=1e-6)


@pytest.mark.parametrize("bits_for", [(), (("second", 8),)])
def test_layers_of_one_weight_share_its_codes_unless_told_other_bits(
    tmp_path: Path, solved: Solved, bits_for: tuple[tuple[str, int], ...]
) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 32] y) {
            [first] p = MatMul (x, w)
            r = Relu (p)
            [second] y = MatMul (r, w)
        }""",
        {"w": weight(32, 32)},
    )
    report = quantize(model, tmp_path / "q.onnx", {"x": normal(40, 32)}, bits_for=bits_for)
    highest = [np.abs(c).max() for c in codes(tmp_path / "q.onnx").values()]
    if not bits_for:
        assert solved.together == [["first"]]
        assert len(highest) == 1
        return
    assert solved.together == [["first"], ["second"]]
    assert [layer.bits for layer in report.layers] == [4, 8]
    assert sorted(h > 8 for h in highest) == [False, True]


# Solvers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", METHODS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_solver_gives_a_model_that_runs(quantized: Run, make: Callable[[], onnx.ModelProto], solver: str) -> None:
    # the paper's variant updates scales by its own rule; at 8 bits all solvers reach 25 dB
    quantized(make(), solver=solver)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_solving_never_costs_more_than_rounding(tmp_path: Path, make: Callable[[], onnx.ModelProto], bits: int) -> None:
    report = quantize(make(), tmp_path / "q.onnx", bits=bits)
    for layer in report.layers:
        assert layer.error_db is not None
        assert layer.rtn_error_db is not None
        # both come from the same float64 sums
        assert layer.error_db <= layer.rtn_error_db + 1e-6


def test_rounding_reports_the_error_of_rounding(tmp_path: Path) -> None:
    for layer in quantize(mlp(), tmp_path / "q.onnx", solver="rtn", activations="none").layers:
        # a bias may take up the mean of the error: never more than rounding, and near it
        assert layer.error_db is not None
        assert layer.rtn_error_db is not None
        assert layer.rtn_error_db - 3 < layer.error_db <= layer.rtn_error_db + 1e-6
