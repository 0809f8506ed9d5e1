"""The stage walk: what it solved on is what the shipped model computes, however the work was divided."""

from __future__ import annotations

import errno
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
from comq_onnx.calibrate import cut_tensors, layer_solver
from comq_onnx.calibrate import layer_moments as calibrate
from comq_onnx.calibrate.layer_moments import LayerInput, in_groups
from comq_onnx.errors import ModelError, OptionError, SamplesError
from comq_onnx.model import prepare as prepare_module
from comq_onnx.model.layers import Layer
from comq_onnx.model.operators import MatMul
from comq_onnx.plan import smoothing as smooth
from comq_onnx.runtime import session as runtime
from comq_onnx.samples.samples import Samples
from comq_onnx.solve import moments, patches
from comq_onnx.solve.layer import METHODS
from models import (
    Arrays,
    attention,
    batchnorm_cnn,
    build,
    cnn,
    codes,
    encoder,
    infer,
    mlp,
    normal,
    samples_for,
    sentences,
    sqnr,
    tokens,
    weight,
)  # fmt: skip

Run = Callable[..., Any]
MODELS = {"mlp": mlp, "cnn": cnn, "attention": attention}


def quantize(model: onnx.ModelProto, out: Path, samples: Arrays | None = None, **options: Any) -> comq_onnx.Report:
    """4 bits on the CPU, on the model's usual samples."""
    given = samples_for(model) if samples is None else samples
    return comq_onnx.quantize(model, out, given, **{"bits": 4, "uniform": True, "device": "cpu", **options})


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
    monkeypatch.setattr(smooth, "candidates", lambda *_: {})
    report = quantize(encoder(), tmp_path / "q.onnx", sentences(), solver=solver, independent=True)
    weights = {t.name: numpy_helper.to_array(t) for t in encoder().graph.initializer}
    written = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    errors = []
    for layer in report.layers:
        if layer.name in ("q", "k", "v"):
            w = weights[f"w{layer.name}"].astype(np.float64)
            w_q = written[f"w{layer.name}.codes"].astype(np.float64) * written[f"{layer.name}.scale"]
            # comq's shift of the bias takes away the mean of the error
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

    # folding would make one of the two
    monkeypatch.setattr(prepare_module.optimizer, "optimize_ir", refuse)
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
    # one weight, once in the file
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


# Two halves of the samples


@pytest.mark.parametrize("make", [*MODELS.values(), batchnorm_cnn], ids=[*MODELS, "3x3"])
def test_the_batch_size_changes_no_half(tmp_path: Path, make: Callable[[], onnx.ModelProto], solved: Solved) -> None:
    seen = []
    for batch_size in (16, 5):
        # of activations rounded to 8 bits one in a thousand may fall the other way
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


# Convolutions by their patches


def supported(*call: Any) -> bool:
    """Where patches can be had at all, whatever they pay."""
    _, kernel, strides, dilations, group = call
    return len(kernel) == 2 and group == 1 and all(step == 1 for step in (*strides, *dilations))


@pytest.mark.parametrize("options", [{}, {"activations": "none"}, {"independent": True}], ids=str)
def test_moments_by_patches_are_those_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved, options: dict[str, Any]
) -> None:
    seen, images = [], {"image": np.abs(normal(40, 3, 8, 8))}
    for pays in (lambda *_: False, supported):
        monkeypatch.setattr(patches, "pays", pays)
        # as many images as there are stretches, or twice: either way none is cut in two
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
                # code of 324 in conv1 that turns for it shows in what conv2 reads
                assert a is None or sqnr(b, a) > (100 if name == "conv1" or "independent" in options else 40)


def test_an_image_is_never_in_both_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved) -> None:
    monkeypatch.setattr(patches, "pays", supported)
    report = quantize(batchnorm_cnn(), tmp_path / "q.onnx", {"image": normal(40, 3, 8, 8)})
    for statistics in solved.on.values():
        assert statistics.half is not None
        assert statistics.count == report.samples["used"] * 64
        assert statistics.half.count % 64 == 0
        assert 0.3 * statistics.count < statistics.half.count < 0.7 * statistics.count


# However the work is divided


def test_beyond_a_number_of_positions_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    for limit in ("LEAST_POSITIONS", "MOST_POSITIONS"):
        monkeypatch.setattr(calibrate, limit, 100)
    monkeypatch.setattr(calibrate, "POSITIONS_PER_INPUT", 1)
    quantize(attention(), tmp_path / "q.onnx")
    for statistics in solved.on.values():
        # a share of each batch, rounded
        assert statistics.count == pytest.approx(100, abs=2)
        assert statistics.half is not None
        assert statistics.half.count == pytest.approx(50, abs=4)


@pytest.mark.parametrize("make", [*MODELS.values(), encoder], ids=[*MODELS, "encoder"])
@pytest.mark.parametrize("limit", [None, "MOST_POSITIONS", "CHUNK_BYTES", "survey"])
def test_the_batch_size_changes_no_byte(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], limit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "MOST_POSITIONS":  # positions are drawn, too
        monkeypatch.setattr(calibrate, "LEAST_POSITIONS", 100)
        monkeypatch.setattr(calibrate, "MOST_POSITIONS", 100)
        monkeypatch.setattr(calibrate, "POSITIONS_PER_INPUT", 1)
    if limit == "CHUNK_BYTES":  # a few samples at a time are summed over
        monkeypatch.setattr(moments, "CHUNK_BYTES", 4000)
    samples = sentences() if make is encoder else samples_for(make())
    written = []
    # what ONNX Runtime computes for a sample is the same to the bit in batches of multiples of 8 (of any size, for
    # convolutions)
    for batch_size in (16, 24) if limit == "survey" else (16, 8, 24, 40):
        quantize(make(), tmp_path / "q.onnx", samples, batch_size=batch_size, uniform=limit != "survey")
        written.append((tmp_path / "q.onnx").read_bytes())
    assert len(set(written)) == 1


@pytest.mark.parametrize(
    "make", [lambda: mlp(width=512), lambda: cnn(size=32), attention], ids=["mlp", "cnn", "attention"]
)
def test_the_threads_of_onnx_runtime_change_no_byte(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    true, written = runtime.Session.__init__, []
    for count in (1, 2):

        def with_threads(self: runtime.Session, *arguments: Any, count: int = count, **options: Any) -> None:
            true(self, *arguments, **{**options, "threads": count})

        monkeypatch.setattr(runtime.Session, "__init__", with_threads)
        # the survey, too
        quantize(make(), tmp_path / "q.onnx", uniform=False)
        written.append((tmp_path / "q.onnx").read_bytes())
    assert written[0] == written[1]


HOST = cut_tensors.Host(1 << 30, Path("unused"))


def an_input(batches: list[np.ndarray], counts: list[int]) -> LayerInput:
    """Return batches as the input of a product."""
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
    # weights on the left, transposed and stacked: inputs one behind the other would be other rows
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
    assert (tmp_path / "default.onnx").read_bytes() == (tmp_path / "disk.onnx").read_bytes()


def test_a_full_disk_for_what_is_kept_between_stages_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # written, not mapped and touched: that would end the process on a full disk
    monkeypatch.setattr(cut_tensors.np, "save", full)
    with pytest.raises(OptionError, match=r"No space left.*TMPDIR"):
        quantize(cnn(size=32), tmp_path / "q.onnx", memory_gb=0.0)
    assert not (tmp_path / "q.onnx").exists()


def test_an_error_in_the_walk_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "temporary"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_solver, "solve_together", interrupt)
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
    with pytest.raises(ModelError, match=r"NaN or Inf at 'left' \(read by 'aside'\) for sample \d+ of arrays"):
        quantize(never(condition), tmp_path / "q.onnx", activations=activations)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("make", [mlp, cnn])
@pytest.mark.parametrize("bad", [1e30, np.float32(3.4e38)])
def test_numbers_too_large_are_refused_with_the_sample(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], bad: float
) -> None:
    samples = samples_for(make())
    array = next(iter(samples.values()))
    # one that the split with seed 0 leaves to calibration
    _, held = Samples(samples, "").split(35, 5, 0)
    number = next(i for i in range(20, 40) if i not in {held.number(k) for k in range(len(held))})
    array[(number, *[0] * (array.ndim - 1))] = bad
    with pytest.raises(ModelError, match=rf"numbers up to .*too large.* for sample {number} of arrays"):
        quantize(make(), tmp_path / "q.onnx", samples)


def test_a_sample_that_turns_out_not_finite_is_named(tmp_path: Path) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 10] y) {
            [fc1] h = MatMul (x, w1)
            l = Log (x)
            [fc2] m = MatMul (l, w2)
            y = Add (h, m)
        }""",
        {"w1": weight(32, 10), "w2": weight(32, 10)},
    )
    samples = {"x": np.abs(normal(40, 32)) + 1}
    _, held = Samples(samples, "").split(35, 5, 0)
    number = next(i for i in range(20, 40) if i not in {held.number(k) for k in range(len(held))})
    samples["x"][number] = -1
    for batch_size in (16, 5, 1):
        with pytest.raises(ModelError, match=rf"at 'l' \(read by 'fc2'\) for sample {number} of arrays"):
            quantize(model, tmp_path / "q.onnx", samples, batch_size=batch_size)


def test_numbers_too_small_to_square_are_zeros(tmp_path: Path) -> None:
    report = quantize(mlp(), tmp_path / "q.onnx", {"x": normal(40, 32, scale=1e-31)}, bits=8)
    assert np.isfinite(infer(tmp_path / "q.onnx", samples_for(mlp()))["y"]).all()
    assert report.outputs


def test_weights_too_large_are_refused_with_the_layer(tmp_path: Path) -> None:
    model = mlp()
    array = numpy_helper.to_array(model.graph.initializer[0]) * np.float32(1e20)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, model.graph.initializer[0].name))
    with pytest.raises(ModelError, match=r"layer 'fc1': weights up to .* are too large"):
        quantize(model, tmp_path / "q.onnx")


def test_a_loop_that_never_turns_is_named(tmp_path: Path) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 32] y) <int64 none = {0}, bool yes = {1}> {
            [fc] h = MatMul (x, w1)
            y = Loop (none, yes, h) <
                body = b (int64 i, bool go, float[batch, 32] v) => (bool on, float[batch, 32] u) {
                    on = Identity (go)
                    [inner] u = MatMul (v, w2)
                }
            >
        }""",
        {"w1": weight(32, 32), "w2": weight(32, 32, seed=2)},
    )
    with pytest.raises(SamplesError, match="no sample reaches layer 'inner'"):
        quantize(model, tmp_path / "q.onnx")
    assert quantize(model, tmp_path / "q.onnx", exclude=("inner",)).layers


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
