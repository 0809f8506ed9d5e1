"""Test the survey against quantizing layers one by one, and the bits that whole runs choose by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from stages import Planned, planned

import comq_onnx
from comq_onnx import Options
from comq_onnx.bits import choose
from comq_onnx.bits.survey import BITS, Sensitivity, survey
from comq_onnx.errors import OptionError
from comq_onnx.plan.plan import Plan
from comq_onnx.report.report import Report
from models import Arrays, attention, build, cnn, encoder, infer, mlp, normal, samples_for, sentences, weight

MODELS = Path(__file__).parents[2] / "models"


def opened(model: onnx.ModelProto, samples: Arrays, folder: Path, **options: Any) -> Planned:
    """Save a model and make its plan."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    return planned(path, samples, **options)


def surveyed(model: onnx.ModelProto, samples: Arrays, folder: Path, **options: Any) -> tuple[Sensitivity, Plan]:
    """Survey a model; return the sensitivity and the plan."""
    made = opened(model, samples, folder, **options)
    return survey(made.plan, made.data, made.context), made.plan


def noise(before: np.ndarray, after: np.ndarray) -> float:
    """Return the energy of the difference over that of `before`."""
    return float(((before - after) ** 2).sum() / (before**2).sum())


@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("make", [cnn, attention, mlp], ids=lambda make: make.__name__)
def test_more_bits_cost_less(tmp_path: Path, make: Callable[[], onnx.ModelProto], activations: str) -> None:
    found, planned = surveyed(make(), samples_for(make(), 60), tmp_path, activations=activations)
    assert [name for group in found.groups.values() for name in group] == [x.name for x in planned.layers]
    for name in found.groups:
        errors = [found.errors[name][bits] for bits in BITS]
        assert errors == sorted(errors, reverse=True)
        # a bit is worth some 6 dB
        assert 100 < found.errors[name][2] / found.errors[name][6] < 3000
        assert found.gains[name][0] > 0
    assert (found.base[0] < 1e-10) == (activations == "none")
    assert found.base[0] < found.together[0]


def test_a_layers_cost_is_the_noise_of_quantizing_it_alone(tmp_path: Path) -> None:
    model, samples = mlp(), samples_for(mlp(), 400)
    found, _ = surveyed(model, samples, tmp_path, activations="none")
    for name, other in (("fc1", "fc2"), ("fc2", "fc1")):
        out = tmp_path / f"{name}.onnx"
        comq_onnx.quantize(
            model, out, samples, bits=4, uniform=True, effort="fast", activations="none", exclude=(other,), device="cpu"
        )
        alone = noise(infer(model, samples)["y"], infer(out, samples, exact=True)["y"])
        # the survey solves on a sixth of the samples, twice as many as inputs, and measures on few others: some dB more
        assert 0.6 * alone < found.cost(name, 4) < 3 * alone
    # two independent noises add up
    assert found.together[0] == pytest.approx(found.cost("fc1", 4) + found.cost("fc2", 4), rel=0.3)


def test_a_layer_that_hardly_reaches_the_output_costs_little(tmp_path: Path) -> None:
    model = build(
        """g (float[n, 32] x) => (float[n, 16] y) {
            [loud] a = MatMul (x, w1)
            [faint] b = MatMul (x, w2)
            small = Mul (b, hundredth)
            y = Add (a, small)
        }""",
        {"w1": weight(32, 16), "w2": weight(32, 16, seed=2), "hundredth": np.float32(0.01)},
    )
    found, _ = surveyed(model, {"x": normal(60, 32)}, tmp_path, activations="none")
    np.testing.assert_allclose(found.gains["loud"] / found.gains["faint"], 1e4, rtol=0.5)


def test_layers_that_share_a_weight_are_one_group(tmp_path: Path) -> None:
    model = build(
        """g (float[n, 32] x) => (float[n, 32] y) {
            [one] a = MatMul (x, w)
            b = Tanh (a)
            [two] y = MatMul (b, w)
        }""",
        {"w": weight(32, 32)},
    )
    found, planned = surveyed(model, {"x": normal(60, 32)}, tmp_path)
    assert found.groups == {"one": ["one", "two"]}
    assert found.cost("two", 3) == found.cost("one", 3)
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", {"x": normal(60, 32)}, bits=4.5, device="cpu")
    assert len({layer.bits for layer in report.layers}) == 1
    assert len(planned.layers) == 2


def test_outputs_that_are_no_numbers_leave_the_layers_own_errors(tmp_path: Path) -> None:
    model = build(
        """g (float[n, 32] x) => (int64[n] best) {
            [fc] a = MatMul (x, w)
            best = ArgMax <axis = 1, keepdims = 0> (a)
        }""",
        {"w": weight(32, 16)},
    )
    found, _ = surveyed(model, {"x": normal(60, 32)}, tmp_path)
    assert found.gains["fc"].tolist() == [1.0, 0.0]
    assert comq_onnx.quantize(model, tmp_path / "q.onnx", {"x": normal(60, 32)}, bits="auto", size="1GB", device="cpu")


# Whole runs ---------------------------------------------------------------------------------------------------------


def quantize_trained(out: Path, **options: Any) -> Report:
    """Quantize a trained model on 64 samples with the least effort."""
    return comq_onnx.quantize(
        MODELS / "fashion_cnn.onnx", out, MODELS / "fashion_calib.npz",
        effort="fast", max_samples=64, device="cpu", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """Keep what several tests look at, once one of them has made it: the fixtures that make it are those of a test."""
    return {}


@pytest.fixture
def _one_survey(kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Survey the trained model once for each kind of activations: no other option of these runs changes a survey."""
    real = choose.survey

    def found(plan: Plan, data: Any, context: Any, widths: Any, language: Any) -> Sensitivity:
        kind = context.options.activations
        if kind not in kept:
            kept[kind] = real(plan, data, context, language=language)
        assert set(widths) <= set(BITS)
        return kept[kind]

    monkeypatch.setattr(choose, "survey", found)


@pytest.fixture
def at_a_fifth(kept: dict[str, Any], tmp_path: Path) -> tuple[Report, bytes]:
    """Quantize the trained model to a fifth of its size; return the report and the file."""
    if "fifth" not in kept:
        out = tmp_path / "fifth.onnx"
        kept["fifth"] = quantize_trained(out, bits="auto", size="20%"), out.read_bytes()
        out.unlink()
    return kept["fifth"]


def quantized(tmp_path: Path, **options: Any) -> Report:
    """Quantize the trained model to q.onnx."""
    return quantize_trained(tmp_path / "q.onnx", **options)


@pytest.mark.usefixtures("_one_survey")
@pytest.mark.parametrize("size", ["20%", "120kB"])
def test_a_size_is_kept_and_used(tmp_path: Path, at_a_fifth: tuple[Report, bytes], size: str) -> None:
    if size == "20%":
        report, written = at_a_fifth
        budget = report.size["before"] // 5
    else:
        report, budget = quantized(tmp_path, bits="auto", size=size), 120_000
        written = (tmp_path / "q.onnx").read_bytes()
    assert len(written) == report.size["after"] <= budget
    # the bytes left over are too few to give any layer another bit
    assert report.size["after"] > 0.97 * budget
    assert len({layer.bits for layer in report.layers}) > 1
    (chosen,) = [point for point in report.frontier if point.chosen]
    assert abs(chosen.size - report.size["after"]) <= 64


@pytest.mark.usefixtures("_one_survey")
def test_chosen_bits_beat_equal_ones_at_the_same_size(tmp_path: Path) -> None:
    same = quantized(tmp_path, bits=3, uniform=True, activations="none")
    chosen = quantized(tmp_path, bits="auto", size=str(same.size["after"]), activations="none")
    assert chosen.size["after"] <= same.size["after"]
    assert chosen.outputs[0].sqnr_db > same.outputs[0].sqnr_db + 1


@pytest.mark.usefixtures("_one_survey")
def test_at_a_number_of_bits_some_layers_get_more(tmp_path: Path) -> None:
    same, more = quantized(tmp_path, bits=4, uniform=True), quantized(tmp_path, bits=4)
    assert {layer.bits for layer in same.layers} == {4}
    assert min(layer.bits for layer in more.layers) == 4
    assert max(layer.bits for layer in more.layers) > 4
    assert same.size["after"] < more.size["after"] <= 1.03 * same.size["after"]
    assert all(layer.output_noise_db is not None for layer in more.layers)


def test_embeddings_and_layers_told_keep_their_bits(tmp_path: Path) -> None:
    report = comq_onnx.quantize(
        encoder(), tmp_path / "q.onnx", sentences(), bits=3, bits_for=(("up", 2),), device="cpu", effort="fast"
    )
    bits = {layer.name: layer.bits for layer in report.layers}
    assert bits["up"] == 2
    assert {x.bits for x in report.layers if x.op == "Gather"} == {8}
    report = comq_onnx.quantize(
        encoder(), tmp_path / "q.onnx", sentences(), bits=3.5, bits_for=(("up", 2),), device="cpu", effort="fast"
    )
    assert {layer.name: layer.bits for layer in report.layers}["up"] == 2
    assert {x.bits for x in report.layers if x.op == "Gather"} != {8}


@pytest.mark.usefixtures("_one_survey")
def test_mean_bits_are_those_of_the_weights(tmp_path: Path) -> None:
    report = quantized(tmp_path, bits=3.5, activations="none")
    counts = [np.prod(layer.weight_shape) for layer in report.layers]
    mean = sum(n * layer.bits for n, layer in zip(counts, report.layers, strict=True)) / sum(counts)
    assert 3.2 < mean <= 3.5
    assert report.bits == 3.5


@pytest.mark.usefixtures("_one_survey")
def test_a_drop_is_kept_by_the_fewest_bits_tried(tmp_path: Path) -> None:
    report = quantized(tmp_path, bits="auto", max_drop="26dB")
    assert report.outputs[0].sqnr_db >= 26
    tried = [note for note in report.notes if note.startswith("tried ")]
    assert tried
    best = min(float(note.split()[1]) for note in tried if float(note.split(": ")[1].split()[0]) >= 26)
    counts = [np.prod(layer.weight_shape) for layer in report.layers]
    mean = sum(n * layer.bits for n, layer in zip(counts, report.layers, strict=True)) / sum(counts)
    assert mean == pytest.approx(best, abs=0.01)
    points = quantized(tmp_path, bits="auto", max_drop=5)
    assert points.outputs[0].top1_agreement is not None
    assert points.outputs[0].top1_agreement >= 0.95


@pytest.mark.usefixtures("_one_survey")
def test_a_drop_that_cannot_be_kept_is_refused_with_the_best_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as refused:
        quantized(tmp_path, bits="auto", max_drop="90dB")
    assert str(refused.value).startswith("--max-drop 90dB: not reached. At 7.2 bits in the mean 3")
    assert str(refused.value).endswith(
        " dB remain on 64 samples held back; allow more, or try --activations 16 or none, or more calibration samples"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_one_survey")
def test_a_prediction_that_is_off_is_corrected_by_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = choose.survey

    def far_off(factor: float) -> Callable[..., Sensitivity]:
        def made(*arguments: Any) -> Sensitivity:
            found = real(*arguments)
            return replace(found, together=found.base + factor * (found.together - found.base))

        return made

    for factor in (0.1, 10.0):
        monkeypatch.setattr(choose, "survey", far_off(factor))
        report = quantized(tmp_path, bits="auto", max_drop="26dB", activations="none")
        assert report.outputs[0].sqnr_db >= 26
        assert len([note for note in report.notes if note.startswith("tried ")]) > 1
        assert report.size["after"] < 0.3 * report.size["before"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, at_a_fifth: tuple[Report, bytes]) -> None:
    quantized(tmp_path, bits="auto", size="20%")
    assert (tmp_path / "q.onnx").read_bytes() == at_a_fifth[1]


def test_a_plan_shows_the_frontier_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_fifth: tuple[Report, bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    report = comq_onnx.plan(
        MODELS / "fashion_cnn.onnx", MODELS / "fashion_calib.npz", bits="auto", size="20%", max_samples=64
    )
    assert list(tmp_path.iterdir()) == []
    said = json.loads(report.to_json())["frontier"]
    assert [point["size"] for point in said] == sorted(point["size"] for point in said)
    assert sum(point["chosen"] for point in said) == 1
    assert [layer.bits for layer in at_a_fifth[0].layers] == [layer.bits for layer in report.layers]


def test_a_plan_without_samples_shows_equal_bits_and_says_so() -> None:
    report = comq_onnx.plan(MODELS / "fashion_cnn.onnx")
    assert {layer.bits for layer in report.layers} == {4}
    assert (
        "without samples it cannot be told which layers gain most from more bits: shown with equal bits" in report.notes
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"bits": "auto"}, "--bits auto: needs one budget: --size 25%, --size 3MB, --max-drop 0.5 or --max-drop 20dB"),
        (
            {"bits": "auto", "size": "25%", "max_drop": 1},
            "--bits auto: needs one budget: --size 25%, --size 3MB, --max-drop 0.5 or --max-drop 20dB",
        ),
        ({"size": "25%"}, "--size: only with --bits auto, not with --bits 4"),
        ({"bits": 3.5, "max_drop": 1}, "--max-drop: only with --bits auto, not with --bits 3.5"),
        (
            {"bits": 3.5, "uniform": True},
            "--uniform: all layers cannot have the same with --bits 3.5; give a whole number",
        ),
        (
            {"bits": "auto", "size": "25%", "uniform": True},
            "--uniform: all layers cannot have the same with --bits auto; give a whole number",
        ),
        ({"bits": 8.5}, "8.5 bits: 2 to 8 are possible, or auto"),
        ({"bits": "some"}, "some bits: 2 to 8 are possible, or auto"),
        ({"bits": "auto", "size": "big"}, "--size big: a share such as 25%, or a size such as 3MB or 800kB"),
    ],
    ids=str,
)  # fmt: skip
def test_budgets_that_cannot_be_say_what_can(options: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as refused:
        Options(**options)
    assert str(refused.value) == line
