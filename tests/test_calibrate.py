"""The stage walk: what it solved on is what the shipped model computes, however the work was divided."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Solved
from onnx import helper, numpy_helper

import comq_onnx
from comq_onnx import calibrate
from comq_onnx.errors import ModelError, SamplesError
from comq_onnx.samples import Samples
from comq_onnx.solve import METHODS
from models import Arrays, attention, build, cnn, codes, infer, mlp, normal, samples_for, sqnr, tokens, weight

Run = Callable[..., Any]
MODELS = {"mlp": mlp, "cnn": cnn, "attention": attention}


def quantize(model: onnx.ModelProto, out: Path, samples: Arrays | None = None, **options: Any) -> comq_onnx.Report:
    """4 bits on the CPU, on the model's usual samples."""
    given = samples_for(model) if samples is None else samples
    return comq_onnx.quantize(model, out, given, **{"bits": 4, "device": "cpu", **options})


def tapped(path: Path, layers: dict[str, int], feeds: Arrays) -> Arrays:
    """What the layers (by node name, with the index of the input) read in the model at `path`."""
    model = onnx.load(path)
    nodes = {node.name: node for node in model.graph.node}
    wanted = {layer: nodes[layer].input[index] for layer, index in layers.items()}
    for name in dict.fromkeys(wanted.values()):
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    made = infer(model, feeds, exact=True)
    return {layer: made[name] for layer, name in wanted.items()}


# The input of a layer as the walk saw it is its input in the shipped model


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
    samples = samples_for(cnn())
    report = quantize(cnn(), tmp_path / "q.onnx", samples)
    used, _ = Samples(samples, "").split(report.samples["used"], report.samples["held_back"], 0)
    x_hat = tapped(tmp_path / "q.onnx", {"point": 0}, used.arrays)["point"]
    rows = x_hat.transpose(0, 2, 3, 1).reshape(-1, 16).astype(np.float64)
    assert sqnr(solved.on["point"].gram[0], rows.T @ rows / len(rows)) > 50


def test_the_first_layer_knows_only_the_quantization_of_its_input(tmp_path: Path, solved: Solved) -> None:
    quantize(mlp(), tmp_path / "q.onnx", activations="none")
    first, second = solved.on["fc1"], solved.on["fc2"]
    # before the first layer nothing is quantized, so x^ is x; behind it it is not
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


# However the work is divided


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_batch_size_changes_no_solution(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    first = quantize(make(), tmp_path / "a.onnx", batch_size=16)
    second = quantize(make(), tmp_path / "b.onnx", batch_size=5)
    for a, b in zip(first.layers, second.layers, strict=True):
        # float32 sums in another order move an error by some 1e-6 of itself; one tied code by less than 1e-3 dB
        assert a.error_db == pytest.approx(b.error_db, abs=1e-3)
    mine, other = codes(tmp_path / "a.onnx"), codes(tmp_path / "b.onnx")
    assert list(mine) == list(other)
    same = sum(int((mine[name] == other[name]).sum()) for name in mine)
    assert same >= 0.999 * sum(c.size for c in mine.values())


def test_without_memory_everything_goes_by_disk_and_comes_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "temporary"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    files = []
    true = np.lib.format.open_memmap
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda *a, **k: files.append(a[0]) or true(*a, **k))
    # batches of 16 pictures of 32 x 32 are large enough to be worth a file
    model = cnn(size=32)
    quantize(model, tmp_path / "default.onnx")
    assert not files
    quantize(model, tmp_path / "disk.onnx", memory_gb=0.0)
    assert len(files) > 5
    assert not list(work.iterdir())
    default, disk = (onnx.load(tmp_path / f"{name}.onnx") for name in ("default", "disk"))
    for written in (default, disk):
        # the option itself is written down
        del written.metadata_props[:]
    assert default.SerializeToString() == disk.SerializeToString()


def test_an_error_in_the_walk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "temporary"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "solve_together", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(cnn(size=32), tmp_path / "q.onnx", memory_gb=0.0)
    assert not list(work.iterdir())
    assert not (tmp_path / "q.onnx").exists()


def test_progress_counts_every_layer_and_every_stage(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    report = quantize(attention(), tmp_path / "q.onnx", progress=lambda *step: said.append(step))
    for what in ("layers", "stages"):
        counts = [done for kind, done, _ in said if kind == what]
        totals = {total for kind, _, total in said if kind == what}
        assert counts == sorted(counts)
        assert totals == {counts[-1]}
    assert max(total for kind, _, total in said if kind == "layers") == len(report.layers)


# Solvers


@pytest.mark.parametrize("solver", METHODS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_solver_gives_a_model_that_runs(quantized: Run, make: Callable[[], onnx.ModelProto], solver: str) -> None:
    # the paper's variant updates scales with its own rule, and 8 bits leave it room: all reach 25 dB
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


def test_independent_calibration_gives_another_model_that_works(tmp_path: Path, quantized: Run) -> None:
    quantized(attention(), independent=True)
    quantize(attention(), tmp_path / "a.onnx")
    quantize(attention(), tmp_path / "b.onnx", independent=True)
    first, second = codes(tmp_path / "a.onnx"), codes(tmp_path / "b.onnx")
    assert list(first) == list(second)
    assert any((first[name] != second[name]).any() for name in first)


def test_solving_in_sequence_beats_rounding_where_it_counts(tmp_path: Path) -> None:
    samples = samples_for(attention(), count=72)
    reference = infer(attention(), samples)["y"]
    reached = {}
    for solver in ("comq", "rtn"):
        quantize(attention(), tmp_path / "q.onnx", samples, solver=solver, bits=3)
        reached[solver] = sqnr(reference, infer(tmp_path / "q.onnx", samples)["y"])
    # random rows have no structure to use, still the error of a layer can lean on its bias and its neighbours
    assert reached["comq"] > reached["rtn"]


# Hard inputs


def never(condition: str) -> onnx.ModelProto:
    """A layer beside the main way that reads what `condition` leaves of x [batch, 12, 32]."""
    return build(
        f"""g (float[batch, 12, 32] x) => (float[batch, 16] y) {{
            {condition}
            [aside] m = MatMul (left, w1)
            a = ReduceSum <keepdims = 0> (m, axis)
            [main] h = MatMul (x, w2)
            b = ReduceSum <keepdims = 0> (h, axis)
            y = Add (a, b)
        }}""",
        {
            "w1": weight(32, 16),
            "w2": weight(32, 16, seed=2),
            "axis": np.array([1]),
            "zero": np.array([0]),
            "minus": np.float32(-1),
        },
    )


EMPTY = "left = Slice (x, zero, zero, axis)"
NOT_A_NUMBER = "absolute = Abs (x)\nnegative = Mul (absolute, minus)\nleft = Log (negative)"
INFINITE = "absolute = Abs (x)\nnothing = Sub (absolute, absolute)\nleft = Reciprocal (nothing)"


@pytest.mark.parametrize("activations", ["auto", "none"])
def test_a_layer_that_no_sample_reaches_is_named(tmp_path: Path, activations: str) -> None:
    with pytest.raises(SamplesError, match="aside"):
        quantize(never(EMPTY), tmp_path / "q.onnx", activations=activations)
    assert not (tmp_path / "q.onnx").exists()


def test_a_layer_that_no_sample_reaches_can_be_excluded(quantized: Run) -> None:
    report = quantized(never(EMPTY), exclude=("aside",)).report
    assert [layer.name for layer in report.layers] == ["main"]


@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("condition", [NOT_A_NUMBER, INFINITE], ids=["nan", "inf"])
def test_activations_that_are_not_finite_are_refused_by_their_name(
    tmp_path: Path, activations: str, condition: str
) -> None:
    with pytest.raises(ModelError, match=r"NaN or Inf at 'left'"):
        quantize(never(condition), tmp_path / "q.onnx", activations=activations)
    assert not (tmp_path / "q.onnx").exists()


def test_an_infinite_mask_is_no_layers_input_and_stays(quantized: Run) -> None:
    done = quantized(attention(masked=True))
    # row i of a causal model does not depend on later rows: the mask still holds
    x = done.samples["x"][:2].copy()
    before = infer(done.out, {"x": x})["y"]
    x[:, 6:] += 1
    np.testing.assert_array_equal(infer(done.out, {"x": x})["y"][:, :6], before[:, :6])


@pytest.mark.parametrize("make", [mlp, cnn])
def test_samples_that_are_all_zero_give_a_model_that_runs(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    (name, array), *_ = samples_for(make()).items()
    quantize(make(), tmp_path / "q.onnx", {name: np.zeros_like(array)}, bits=8)
    assert np.isfinite(next(iter(infer(tmp_path / "q.onnx", {name: array}).values()))).all()


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_scale_of_the_samples_does_not_matter(quantized: Run, factor: float) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            [fc1] h = MatMul (x, w1)
            r = Relu (h)
            [fc2] y = MatMul (r, w2)
        }""",
        {"w1": weight(32, 16), "w2": weight(16, 10)},
    )
    quantized(model, {"x": normal(40, 32, scale=factor)})


@pytest.mark.parametrize("dead", ["inputs", "outputs", "all"])
def test_dead_channels_are_harmless(quantized: Run, dead: str) -> None:
    model = mlp()
    tensor = next(t for t in model.graph.initializer if t.name == "w1")
    array = numpy_helper.to_array(tensor).copy()
    array[{"inputs": np.s_[:, :8], "outputs": np.s_[:8], "all": np.s_[:]}[dead]] = 0
    tensor.CopyFrom(numpy_helper.from_array(array, "w1"))
    quantized(model)


def test_fewer_samples_than_inputs_are_enough_to_run(quantized: Run) -> None:
    quantized(mlp(width=256), {"x": normal(20, 256)}, bits=4, floor=8)


def test_repeated_samples_are_enough_to_run(quantized: Run) -> None:
    quantized(mlp(), {"x": np.repeat(normal(1, 32), 40, axis=0)})


def test_sizes_that_differ_from_sample_to_sample_fit_one_walk(tmp_path: Path) -> None:
    # an embedding behind which rows of padding differ: [n, 1, seq] with one sentence each
    samples = {
        "input_ids": np.random.default_rng(0).integers(0, 50, (24, 1, 9)),
        "attention_mask": (np.arange(9) < np.random.default_rng(1).integers(3, 10, (24, 1, 1))).astype(np.int64),
    }
    report = quantize(tokens(), tmp_path / "q.onnx", samples, bits=8, exclude=("embed",))
    assert report.outputs[0].sqnr_db >= 25
