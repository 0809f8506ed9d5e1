"""Test the walk over the stages: the same bytes however the work is divided, and models and samples that are hard."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from walks import MODELS, never, quantize

from comq_onnx.calibrate import cut_tensors, layer_moments, layer_solver
from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.runtime import session as runtime
from comq_onnx.solve import moments
from models import (
    attention,
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


# However the work is divided ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*MODELS.values(), encoder], ids=[*MODELS, "encoder"])
@pytest.mark.parametrize("limit", [None, "LEAST_POSITIONS", "CHUNK_BYTES", "survey"])
def test_the_batch_size_changes_no_byte(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], limit: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit == "LEAST_POSITIONS":  # positions are drawn, too
        monkeypatch.setattr(layer_moments, "LEAST_POSITIONS", 100)
        monkeypatch.setattr(layer_moments, "MOST_POSITIONS", 100)
        monkeypatch.setattr(layer_moments, "POSITIONS_PER_INPUT", 1)
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

    # files are written, not mapped and filled: on a full disk that would end the process
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
    # random rows have no structure that the solver could use, but a layer's bias and later layers take up some error
    assert reached["comq"] > reached["rtn"]


# Hard inputs ----------------------------------------------------------------------------------------------------------

EMPTY = "left = Slice (x, zero, zero, axis)"


@pytest.mark.parametrize("activations", ["auto", "none"])
def test_a_layer_that_no_sample_reaches_is_named(tmp_path: Path, activations: str) -> None:
    with pytest.raises(SamplesError, match="aside"):
        quantize(never(EMPTY), tmp_path / "q.onnx", activations=activations)
    assert not (tmp_path / "q.onnx").exists()


def test_a_layer_that_no_sample_reaches_can_be_excluded(quantized: Run) -> None:
    report = quantized(never(EMPTY), exclude=("aside",)).report
    assert [layer.name for layer in report.layers] == ["main"]


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
    # an embedding of one sentence a sample, [n, 1, seq], with more or less padding
    samples = {
        "input_ids": np.random.default_rng(0).integers(0, 50, (24, 1, 9)),
        "attention_mask": (np.arange(9) < np.random.default_rng(1).integers(3, 10, (24, 1, 1))).astype(np.int64),
    }
    report = quantize(tokens(), tmp_path / "q.onnx", samples, bits=8, exclude=("embed",))
    assert report.outputs[0].sqnr_db >= 25
