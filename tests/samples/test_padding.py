"""Test which inputs are masks, which masks are believed, and that calibration leaves out what they hide."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Solved
from onnx import numpy_helper

import comq_onnx
from comq_onnx.bits import choose
from comq_onnx.calibrate import layer_moments as calibrate
from comq_onnx.calibrate.walk import walk
from comq_onnx.plan.solved import Solved as Found
from comq_onnx.samples import padding
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.padding import find_mask, has_positions, is_ignored, take_kept
from comq_onnx.samples.samples import Samples
from models import Arrays, build, codes, encoder, infer, normal, sentences, tokens, weight

Run = Callable[..., Any]
MODELS = {"masked mean": tokens, "masked attention": encoder}
HALF = np.array([[1, 1, 0], [1, 0, 0]])


def quantize(model: onnx.ModelProto, out: Path, samples: Arrays, **options: Any) -> comq_onnx.Report:
    """Quantize to 4 bits on the CPU."""
    return comq_onnx.quantize(model, out, samples, **{"bits": 4, "device": "cpu", **options})


def used(report: comq_onnx.Report, samples: Arrays) -> Arrays:
    """Return the samples that a run calibrated on."""
    return Samples(samples, "").split(report.samples["used"], report.samples["held_back"], 0)[0].arrays


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Found]:
    """Gather what each walk of this test finds."""
    seen: list[Found] = []
    monkeypatch.setattr(choose, "walk", lambda *given, **more: seen.append(walk(*given, **more)) or seen[-1])
    return seen


# Which inputs are masks


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32, np.bool_])
@pytest.mark.parametrize("name", ["attention_mask", "mask", "Input_Mask:0", "padMask"])
def test_zeros_and_ones_by_the_name_of_a_mask_are_one(name: str, dtype: type) -> None:
    assert find_mask({"input_ids": np.arange(6).reshape(2, 3), name: HALF.astype(dtype)}) == name


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("attention", HALF),
        ("input_ids", HALF),
        ("mask", np.ones((2, 3), np.int64)),
        ("mask", np.zeros((2, 3), np.int64)),
        ("mask", np.array([[1, 2, 0]])),
        ("mask", np.array([[1, 0.5, 0]], np.float32)),
        ("mask", np.array([[1, np.nan, 0]], np.float32)),
        ("mask", np.array([[0, -10000]], np.float32)),
        ("mask", HALF[:, None]),
        ("mask", HALF[0]),
        ("mask", np.zeros((0, 3), np.int64)),
        ("mask", np.array([["1", "0"]], object)),
    ],
    ids=["no mask's name", "tokens", "all ones", "all zeros", "a two", "a half", "nan", "added", "rank 3", "rank 1",
         "no samples", "strings"],
)  # fmt: skip
def test_what_is_no_mask(name: str, array: np.ndarray) -> None:
    assert find_mask({name: array}) is None


# Which masks are believed

IDS = np.array([[3, 4, 9], [5, 9, 9]])
FEEDS = {"ids": IDS, "mask": HALF}


def test_a_mean_over_what_is_kept_ignores_the_rest() -> None:
    assert is_ignored(lambda f: {"y": (f["ids"] * f["mask"]).sum(1) / f["mask"].sum(1)}, FEEDS, "mask")


def test_a_mean_over_everything_does_not() -> None:
    assert not is_ignored(lambda f: {"y": f["ids"].mean(1) * f["mask"].any(1)}, FEEDS, "mask")


def test_outputs_where_it_is_masked_may_change() -> None:
    assert is_ignored(lambda f: {"y": f["ids"] * 2.0}, FEEDS, "mask")
    assert is_ignored(lambda f: {"y": f["ids"][..., None] * np.ones(4)}, FEEDS, "mask")
    assert is_ignored(lambda f: {"flat": f["ids"].reshape(6, 1)}, FEEDS, "mask")


def test_every_output_must_stay() -> None:
    def run(feeds: Any) -> dict[str, np.ndarray]:
        return {"same": feeds["ids"] * 1.0, "other": np.roll(feeds["ids"], 1, axis=1) * 1.0}

    assert not is_ignored(run, FEEDS, "mask")


def test_a_mask_the_other_way_round_is_not_believed() -> None:
    # True where PyTorch's key_padding_mask hides
    assert not is_ignored(lambda f: {"y": (f["ids"] * (1 - f["mask"])).sum(1)}, FEEDS, "mask")


def test_rounding_errors_of_what_is_masked_are_no_change() -> None:
    assert is_ignored(lambda f: {"y": (f["ids"] * (f["mask"] + 1e-7)).sum(1)}, FEEDS, "mask")


@pytest.mark.parametrize("kind", [int, str, bool])
def test_outputs_that_are_no_floats_must_be_equal(kind: type) -> None:
    def run(feeds: Any, hidden: bool) -> dict[str, np.ndarray]:
        total = (feeds["ids"] * (feeds["mask"] if hidden else 1)).sum(1) + 10_000
        return {"y": np.array([kind(n % 2 == 0) if kind is bool else kind(n) for n in total], object)}

    assert is_ignored(functools.partial(run, hidden=True), FEEDS, "mask")
    # one more in 10,000 would be no change of a float
    assert not is_ignored(functools.partial(run, hidden=False), {**FEEDS, "ids": IDS + (IDS == 9)}, "mask")


def test_what_is_not_tested_is_not_believed() -> None:
    def run(feeds: Any) -> dict[str, np.ndarray]:
        return {"y": feeds["mask"].sum(1)}

    assert not is_ignored(run, {"mask": HALF}, "mask")
    assert not is_ignored(run, {"ids": IDS[:, :2], "mask": HALF}, "mask")
    assert not is_ignored(run, {"ids": IDS, "mask": np.ones_like(HALF)}, "mask")
    assert not is_ignored(run, {"ids": np.full_like(IDS, 9), "mask": HALF}, "mask")


def test_what_is_masked_gets_only_values_from_elsewhere_and_the_feeds_stay() -> None:
    seen = []
    ids, embedded = IDS.copy(), normal(2, 3, 4)
    is_ignored(lambda f: seen.append(f) or {"y": f["ids"]}, {"ids": ids, "e": embedded, "mask": HALF, "n": 2}, "mask")
    first, second = seen
    assert np.array_equal(ids, IDS)
    assert np.array_equal(first["ids"], IDS)
    kept = HALF == 1
    # tokens outside the vocabulary would be an error
    assert set(second["ids"][~kept]) <= set(IDS[kept])
    assert np.array_equal(second["ids"][kept], IDS[kept])
    assert second["e"].shape == embedded.shape
    assert np.array_equal(second["e"][kept], embedded[kept])
    assert set(second["e"][~kept].ravel()) <= set(embedded[kept].ravel())
    assert second["mask"] is HALF


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_that_mask_are_believed(make: Callable[[], onnx.ModelProto]) -> None:
    assert is_ignored(functools.partial(infer, make()), sentences(), "attention_mask")


def test_a_model_that_reads_its_mask_in_vain_is_not() -> None:
    assert not is_ignored(functools.partial(infer, tokens(masked=False)), sentences(), "attention_mask")


# What has positions


def test_only_arrays_over_the_masks_axes_have_positions() -> None:
    kept = HALF == 1
    assert has_positions(IDS, kept)
    assert has_positions(normal(2, 3, 4), kept)
    assert not has_positions(normal(3, 2, 4), kept)
    assert not has_positions(normal(2, 4, 3), kept)
    assert not has_positions(normal(2), kept)
    assert not has_positions([1, 2], kept)
    assert not has_positions(IDS, kept, least_rank=3)


def test_what_is_kept_of_an_array() -> None:
    kept, array = HALF == 1, normal(2, 3, 4)
    assert np.array_equal(take_kept(array, kept), array[[0, 0, 1], [0, 1, 0]])
    assert np.array_equal(take_kept(array.reshape(6, 4), kept), array[[0, 0, 1], [0, 1, 0]])
    assert take_kept(array, None) is array
    for whole in (normal(2, 4), normal(4, 4), normal(2, 3)):
        assert take_kept(whole, kept, least_rank=3) is whole
    assert take_kept("text", kept) == "text"


# What the walk leaves out


class Cut(Samples):
    """Hold the same sentences without their padding, fed one at a time."""

    def batch_counts(self, _size: int) -> list[int]:
        return [1] * len(self)

    def batches(self, _size: int) -> Iterator[dict[str, np.ndarray]]:
        for feeds in super().batches(1):
            kept = feeds["attention_mask"][0] == 1
            yield {name: array[:, kept] for name, array in feeds.items()}


@pytest.mark.parametrize("activations", ["auto", "none"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_padded_sentences_give_the_model_that_sentences_without_padding_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], onnx.ModelProto], activations: str,
    found: list[Found], solved: Solved,
) -> None:  # fmt: skip
    samples = sentences()
    report = quantize(make(), tmp_path / "padded.onnx", samples, activations=activations, batch_size=8)
    assert any("padding" in note for note in report.notes)
    padded = dict(solved.on)

    def walk_cut(plan: Any, data: Dataset, context: Any, **more: Any) -> Any:
        cut = Cut(data.calibration.arrays, data.calibration.source)
        found.append(walk(plan, replace(data, calibration=cut, mask=None), context, **more))
        return found[-1]

    monkeypatch.setattr(choose, "walk", walk_cut)
    quantize(make(), tmp_path / "cut.onnx", samples, activations=activations, batch_size=8)

    assert list(solved.on) == list(padded)
    for name, statistics in solved.on.items():
        assert padded[name].count == statistics.count
        assert padded[name].half.count == statistics.half.count
    for name, grid in found[1].activation_grids.items():
        # the runtime's products of other shapes differ in the last bits
        assert found[0].activation_grids[name].scale == pytest.approx(grid.scale, rel=1e-5)
    mine, other = codes(tmp_path / "padded.onnx"), codes(tmp_path / "cut.onnx")
    assert list(mine) == list(other)
    # and may turn a code that is nearly a tie
    same = sum(int((mine[name] == other[name]).sum()) for name in mine)
    assert same >= 0.995 * sum(c.size for c in mine.values())


def whole_table(model: onnx.ModelProto) -> np.ndarray:
    """Make the embedding whole numbers, whose float32 sums are exact, and return it."""
    tensor = next(t for t in model.graph.initializer if t.name == "table")
    table = np.rint(3 * numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(table, "table"))
    return table


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_moments_are_those_of_the_kept_tokens_exactly(tmp_path: Path, solved: Solved, batch_size: int) -> None:
    model, samples = tokens(), sentences()
    table = whole_table(model)
    report = quantize(
        model, tmp_path / "q.onnx", samples, activations="none", exclude=("embed",), batch_size=batch_size
    )
    taken = used(report, samples)
    rows = table[taken["input_ids"][taken["attention_mask"] == 1]].astype(np.float64)
    statistics = solved.on["proj"]
    assert statistics.count == len(rows)
    assert np.array_equal(statistics.gram[0], rows.T @ rows / len(rows))
    assert np.array_equal(statistics.mean[0], rows.sum(0) / len(rows))
    # behind the pooling there is one position a sentence
    assert solved.on["head"].count == len(taken["input_ids"])


def test_positions_are_kept_layer_by_layer(tmp_path: Path, solved: Solved) -> None:
    samples = sentences()
    report = quantize(encoder(), tmp_path / "q.onnx", samples)
    kept = int(used(report, samples)["attention_mask"].sum())
    # "up" is a Gemm over [batch * seq, 32]
    assert {name: s.count for name, s in solved.on.items()} == dict.fromkeys(["q", "k", "v", "out", "up", "head"], kept)


GARBAGE = 49


def with_garbage(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give the model a token whose embedding is huge."""
    tensor = next(t for t in model.graph.initializer if t.name == "table")
    table = numpy_helper.to_array(tensor).copy()
    table[GARBAGE] *= 1e4
    tensor.CopyFrom(numpy_helper.from_array(table, "table"))
    return model


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_garbage_in_masked_positions_changes_nothing(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], found: list[Found]
) -> None:
    model = with_garbage(make())
    for pad in (0, GARBAGE):
        report = quantize(model, tmp_path / f"{pad}.onnx", sentences(pad=pad))
        assert any("padding" in note for note in report.notes)
    assert found[0].activation_grids
    assert found[0].activation_grids == found[1].activation_grids
    clean, garbage = codes(tmp_path / "0.onnx"), codes(tmp_path / f"{GARBAGE}.onnx")
    assert list(clean) == list(garbage)
    for name in clean:
        assert np.array_equal(clean[name], garbage[name])


def test_garbage_does_harm_where_no_mask_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[Found]
) -> None:
    monkeypatch.setattr(padding, "find_mask", lambda _: None)
    for pad in (0, GARBAGE):
        quantize(with_garbage(tokens()), tmp_path / "q.onnx", sentences(pad=pad), activations="8")
    assert found[1].activation_grids["e"].scale > 1000 * found[0].activation_grids["e"].scale


def test_leaving_out_padding_is_better_for_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # three of four positions are padding, of one token far from all others
    model, samples = with_garbage(tokens()), sentences(count=80, longest=48, pad=GARBAGE)
    samples["attention_mask"][:, 16:], samples["input_ids"][:, 16:] = 0, GARBAGE
    reached = []
    for find in (find_mask, lambda _: None):
        monkeypatch.setattr(padding, "find_mask", find)
        reached.append(quantize(model, tmp_path / "q.onnx", samples).outputs[0].sqnr_db)
    assert reached[0] > reached[1] + 10


def test_positions_are_drawn_among_those_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    for limit in ("LEAST_POSITIONS", "MOST_POSITIONS"):
        monkeypatch.setattr(calibrate, limit, 64)
    monkeypatch.setattr(calibrate, "POSITIONS_PER_INPUT", 1)
    model, samples = with_garbage(tokens()), sentences(pad=GARBAGE)
    report = quantize(model, tmp_path / "q.onnx", samples)
    # a share of each batch, rounded
    assert solved.on["proj"].count == pytest.approx(64, abs=1)
    assert solved.on["proj"].count < used(report, samples)["attention_mask"].sum()
    # squares of normal numbers; a huge token's are 1e8
    assert solved.on["proj"].gram.max() < 100


def test_features_that_are_as_many_as_positions_are_no_positions(tmp_path: Path, solved: Solved) -> None:
    # pooled [batch, 32] looks like [batch, positions] of a mask [batch, 32]
    samples = sentences(longest=32)
    report = quantize(tokens(), tmp_path / "q.onnx", samples)
    assert any("padding" in note for note in report.notes)
    assert solved.on["head"].count == report.samples["used"]


def test_the_range_of_pooled_features_is_that_of_all_of_them(tmp_path: Path, found: list[Found]) -> None:
    samples = sentences(longest=32)
    report = quantize(tokens(), tmp_path / "q.onnx", samples)
    model = tokens()
    model.graph.output.append(onnx.helper.make_tensor_value_info("pooled", onnx.TensorProto.FLOAT, None))
    pooled = infer(model, used(report, samples))["pooled"]
    grid = found[0].activation_grids["pooled"]
    assert grid.scale * grid.qmax == pytest.approx(np.ptp(pooled), rel=1e-3)


def test_a_weight_on_the_left_mixes_positions_and_keeps_all_its_columns(tmp_path: Path, solved: Solved) -> None:
    model = build(
        """g (int64[batch, 24] input_ids, int64[batch, 24] attention_mask) => (float[batch, 16, 20] y)
        <int64[1] two = {2}> {
            [embed] e = Gather (table, input_ids)
            mf = Cast <to = 1> (attention_mask)
            m = Unsqueeze (mf, two)
            em = Mul (e, m)
            [mix] y = MatMul (w, em)
        }""",
        {"table": normal(50, 20), "w": weight(16, 24, fan=24)},
    )
    report = quantize(model, tmp_path / "q.onnx", sentences(longest=24))
    assert any("padding" in note for note in report.notes)
    assert solved.on["mix"].count == report.samples["used"] * 20


def test_a_sentence_that_is_all_padding_is_left_out(tmp_path: Path, solved: Solved) -> None:
    samples = sentences()
    samples["attention_mask"][::4] = 0
    report = quantize(encoder(), tmp_path / "q.onnx", samples, batch_size=1)
    assert any("padding" in note for note in report.notes)
    assert solved.on["q"].count == used(report, samples)["attention_mask"].sum()


# What the report says


@pytest.mark.parametrize(("longest", "share"), [(9, "25%"), (6, "50%"), (11, "8%")])
def test_the_report_says_how_much_is_padding(tmp_path: Path, longest: int, share: str) -> None:
    samples = sentences()
    samples["attention_mask"][:] = np.arange(12) < longest
    report = quantize(tokens(), tmp_path / "q.onnx", samples, activations="none")
    assert report.notes == [f"{share} of the positions are padding (attention_mask): not calibrated on"]
    assert comq_onnx.plan(tokens(), samples, device="cpu", activations="none").notes == report.notes


def test_a_mask_that_does_not_hide_is_noted_and_all_positions_count(tmp_path: Path, solved: Solved) -> None:
    samples = sentences()
    report = quantize(tokens(masked=False), tmp_path / "q.onnx", samples, activations="none")
    assert report.notes == [
        "attention_mask does not keep what it masks from the outputs: calibrated on all positions"
    ]  # fmt: skip
    assert solved.on["proj"].count == used(report, samples)["attention_mask"].size


def test_a_mask_is_tested_on_a_batch_that_it_masks(tmp_path: Path, solved: Solved) -> None:
    # only the last sentences have padding, as where they are sorted by length
    samples = sentences()
    samples["attention_mask"][:30] = 1
    report = quantize(tokens(masked=False), tmp_path / "q.onnx", samples, activations="none", batch_size=4)
    assert "does not keep" in report.notes[-1]
    assert solved.on["proj"].count == used(report, samples)["attention_mask"].size


def test_without_padding_nothing_is_said(tmp_path: Path, solved: Solved) -> None:
    samples = sentences()
    samples["attention_mask"][:] = 1
    report = quantize(tokens(), tmp_path / "q.onnx", samples, activations="none")
    assert report.notes == []
    assert solved.on["proj"].count == report.samples["used"] * 12


def test_complete_feeds_are_calibrated_on_whole(tmp_path: Path, solved: Solved) -> None:
    samples = {name: array[:, None] for name, array in sentences().items()}
    report = quantize(tokens(), tmp_path / "q.onnx", samples, activations="none")
    assert report.notes == []
    assert solved.on["proj"].count == report.samples["used"] * 12


def test_a_padded_model_keeps_its_outputs(quantized: Run) -> None:
    for make in MODELS.values():
        samples = sentences()
        done = quantized(make(), samples, floor=0)
        kept = samples["attention_mask"] == 1
        before, after = (take_kept(infer(path, samples)["y"], kept) for path in (done.source, done.out))
        assert np.linalg.norm(before - after) < 0.06 * np.linalg.norm(before)  # 8 bits: 25 dB or better
