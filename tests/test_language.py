"""Test that models with logits over a vocabulary are judged by loss: perplexity, divergence, the likeliest token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import HEAD, VOCABULARY, genai
from rich.console import Console

import comq_onnx
from comq_onnx import metrics
from comq_onnx.bits.drop_check import check_drop, max_noise
from comq_onnx.evaluate.language import Language, language_of
from comq_onnx.evaluate.outputs import Compared, compare_sessions
from comq_onnx.metrics import ComparisonSums, LanguageComparison, LanguageSums, OutputComparison, divergence
from comq_onnx.model import files
from comq_onnx.model.files import to_bytes_or_file, weight_bytes
from comq_onnx.options.budgets import Drop, parse_drop
from comq_onnx.report.page import _tiles
from comq_onnx.runtime.session import Session
from comq_onnx.samples import dataset
from comq_onnx.samples.load import load_samples
from models import Arrays, normal

RNG = np.random.default_rng(0)
KEPT = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Compute it by its definition, in float64."""
    p = np.exp(logits.astype(np.float64))
    return np.log(p / p.sum(-1, keepdims=True))


def text(count: int, length: int = 12) -> Arrays:
    """Make the samples of a small decoder: tokens, some of them padding."""
    ids = RNG.integers(1, VOCABULARY, (count, length))
    mask = np.ones_like(ids)
    mask[::3, length - 4 :] = 0
    past = np.zeros((count, 1, 0, HEAD), np.float32)
    pasts = {f"past_key_values.{i}.{kind}": past for i in range(2) for kind in ("key", "value")}
    return {"input_ids": ids, "attention_mask": mask, **pasts}


# The figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_the_figures_are_their_definitions_however_many_positions_are_looked_at_together(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PIECE", piece)
    before = normal(9, 40)
    after = before + normal(9, 40, scale=0.3)
    following = np.array([3, 0, -1, 39, 7, 7, -1, 2, 1])
    sums, numbers = LanguageSums(), ComparisonSums(scores=True)
    sums.add(before, after, following)
    numbers.add(before, after)
    found = sums.result("logits")
    a, b = log_softmax(before), log_softmax(after)
    known = following >= 0
    loss = [-x[known, following[known]].mean() for x in (a, b)]
    # float32 sums of 40 numbers
    assert found.perplexity["before"] == pytest.approx(math.exp(loss[0]), rel=1e-5)
    assert found.perplexity["after"] == pytest.approx(math.exp(loss[1]), rel=1e-5)
    assert found.rise == pytest.approx(math.exp(loss[1] - loss[0]), rel=1e-5)
    assert found.divergence == pytest.approx((np.exp(a) * (a - b)).sum(-1).mean(), rel=1e-4)
    assert found.top1_agreement == (a.argmax(-1) == b.argmax(-1)).mean()
    assert found.positions == 9
    noise = ((before.astype(float) - after) ** 2).sum()
    assert numbers.result("").sqnr_db == pytest.approx(10 * np.log10((before.astype(float) ** 2).sum() / noise))


def test_words_that_cannot_follow_count_where_the_other_model_allows_them() -> None:
    never = np.array([[0.0, -np.inf, 1.0]], np.float32)
    assert divergence(never, never) == 0
    assert divergence(never, np.zeros((1, 3), np.float32)) == pytest.approx(
        sum(p * math.log(3 * p) for p in (1 / (1 + math.e), math.e / (1 + math.e))), rel=1e-5
    )
    assert divergence(np.zeros((1, 3), np.float32), never) == np.inf


def test_without_tokens_that_follow_there_is_no_perplexity() -> None:
    sums = LanguageSums()
    sums.add(normal(2, 40), normal(2, 40), np.full(2, -1))
    assert sums.result("logits").perplexity == {}
    assert sums.result("logits").rise is None


# What they are measured on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", [0, 3])
def test_padding_is_left_out_and_so_are_tokens_behind_it(past: int) -> None:
    language = Language("logits", "input_ids", "attention_mask", True)
    ids = np.arange(10).reshape(2, 5)
    feeds = {"input_ids": ids, "attention_mask": np.pad(KEPT, ((0, 0), (past, 0)))}
    assert language.kept(feeds).tolist() == (KEPT == 1).tolist()
    assert language.following(feeds).tolist() == [[1, 2, -1, -1, -1], [6, 7, 8, 9, -1]]


@pytest.mark.parametrize(
    ("shape", "found"),
    [((2, 5, 40), True), ((2, 5, 31), False), ((2, 5), False), ((2, 4, 40), False), ((5, 2, 40), False)],
)
def test_logits_have_the_positions_of_the_tokens_and_a_vocabulary(shape: tuple[int, ...], found: bool) -> None:
    session = Session(genai().SerializeToString(), "cpu")
    feeds = {"input_ids": np.full((2, 5), 30), "attention_mask": KEPT}
    feeds |= {i.name: np.zeros((2, 1, 0, 16), np.float32) for i in session.inputs if i.name not in feeds}
    language = language_of(session.inputs, feeds, {"hidden": normal(2, 5, 8), "scores": normal(*shape)}, True)
    assert (language is not None) == found
    if language is not None:
        assert language == Language("scores", "input_ids", "attention_mask", True)


def test_the_report_of_a_decoder_has_the_perplexity_of_both_on_what_is_no_padding(tmp_path: Path) -> None:
    source, out, samples = tmp_path / "m.onnx", tmp_path / "q.onnx", text(24)
    onnx.save(genai(), source)
    report = comq_onnx.quantize(source, out, samples, bits=4, uniform=True, device="cpu")
    found = comq_onnx.compare(source, out, samples, seconds=0.0).language
    assert found is not None
    loss = []
    for path in (source, out):
        session = Session(path, "cpu")
        feeds = next(load_samples(samples, session.inputs).batches(24))
        scores = log_softmax(session.run(feeds)["logits"])
        ids, mask = samples["input_ids"], samples["attention_mask"]
        mine = np.take_along_axis(scores[:, :-1], ids[:, 1:, None], axis=2)[..., 0]
        loss.append(-mine[(mask[:, 1:] == 1)].mean())
    assert found.perplexity["before"] == pytest.approx(math.exp(loss[0]), rel=1e-4)
    # kernels of 4 bits add up in another order in batches of another size
    assert found.perplexity["after"] == pytest.approx(math.exp(loss[1]), rel=1e-3)
    assert found.positions == samples["attention_mask"].sum()
    assert report.language is not None
    console = Console(width=200, record=True, file=(tmp_path / "shown").open("w"))
    console.print(report.rich())
    assert f"perplexity {report.language.perplexity['before']:.4g} -> " in console.export_text()
    assert "perplexity" in [what for what, *_ in _tiles(report)]
    assert f"of {report.language.positions:,} positions of logits" in report.to_html()
    assert report.to_dict()["language"]["divergence"] == report.language.divergence
    # one figure for one thing
    assert report.outputs[0].top1_agreement == report.language.top1_agreement


def test_one_pass_of_the_source_serves_all_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, samples = tmp_path / "m.onnx", tmp_path / "q.onnx", text(8)
    onnx.save(genai(), source)
    comq_onnx.quantize(source, out, samples, bits=8, uniform=True, device="cpu")
    before, *others = (Session(path, "cpu") for path in (source, out, out))
    runs = []
    run = before.run
    monkeypatch.setattr(before, "run", lambda *given: runs.append(1) or run(*given))
    data = load_samples(samples, before.inputs)
    compared, beside = compare_sessions(before, others[0], data, 4, beside=others[1])
    assert len(runs) == 2
    assert beside == compared
    failure = comq_onnx.RuntimeFailure("a fault")

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(others[1], "run", fail)
    assert compare_sessions(before, others[0], data, 4, beside=others[1]) == (compared, failure)


# Keeping a perplexity -------------------------------------------------------------------------------------------------


def compared(before: float, after: float, spread: float, sqnr_db: float = 30.0) -> Compared:
    """Make the comparison of two language models."""
    outputs = [OutputComparison("logits", sqnr_db, 1.0, 0.9), OutputComparison("present.0.key", 3.0, 0.5, None)]
    return Compared(outputs, [], LanguageComparison("logits", {"before": before, "after": after}, spread, 0.9, 100))


def test_a_rise_is_kept_as_measured_and_as_expected() -> None:
    drop = parse_drop("2%").of_perplexity()
    assert drop == Drop(rise=2.0)
    assert parse_drop("20dB").of_perplexity() == Drop(sqnr_db=20.0)
    assert max_noise(drop, None) == pytest.approx(0.5 * math.log(1.02))
    kept = check_drop(drop, None, compared(40.0, 40.4, 0.005), None)
    assert kept.enough
    assert kept.said == "the perplexity rises by 1.00% (0.50% expected)"
    assert kept.ratio == pytest.approx(0.5 * math.log(1.02) / 0.005)
    # more than allowed, and by luck less than the distributions tell
    assert not check_drop(drop, None, compared(40.0, 41.0, 0.005), None).enough
    assert not check_drop(drop, None, compared(40.0, 40.0, 0.018), None).enough


def test_caches_do_not_decide_whether_an_sqnr_is_kept() -> None:
    assert check_drop(Drop(sqnr_db=20.0), None, compared(1, 1, 0), None).said == "30.00 dB remain"


def test_bits_are_chosen_to_keep_a_perplexity(tmp_path: Path) -> None:
    samples = text(64)
    sizes = []
    for drop in ("0.1%", "10%"):
        report = comq_onnx.quantize(
            genai(vocabulary=300), tmp_path / "q.onnx", samples, bits="auto", max_drop=drop, device="cpu"
        )
        assert report.language is not None
        assert report.language.rise is not None
        assert report.language.rise <= 1 + float(drop[:-1]) / 100
        assert any("the perplexity rises by" in note for note in report.notes)
        assert all(point.perplexity_rise is not None for point in report.frontier)
        sizes.append(report.size["after"])
    assert sizes[1] < sizes[0]


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "size"), [(1 << 26, 8), (40_000, 6), (1, 1)])
def test_fewer_samples_run_at_once_where_outputs_are_large(
    most: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # logits of 12 x 60 numbers, and keys and values of two layers, each 12 x 16: 5,952 bytes
    monkeypatch.setattr(dataset, "OUTPUT_BYTES", most)
    report = comq_onnx.plan(genai(), text(16), batch_size=8, uniform=True, device="cpu")
    assert report.options["batch_size"] == size
    assert len(comq_onnx.inspect_samples(genai(), text(16), batch_size=8, device="cpu").outputs) == 5


def test_a_large_model_goes_to_a_runtime_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [ir.from_proto(genai()) for _ in range(2)]
    assert isinstance(to_bytes_or_file(given[0], tmp_path, "m"), bytes)
    monkeypatch.setattr(files, "MESSAGE_LIMIT", weight_bytes(given[1]) - 1)
    path = to_bytes_or_file(given[1], tmp_path, "m")
    assert (tmp_path / "m.data").stat().st_size >= weight_bytes(given[1]) / 2
    # the model still holds its weights
    assert all(not isinstance(v.const_value, ir.ExternalTensor) for v in given[1].graph.initializers.values())
    assert Session(path, "cpu").output_names == Session(genai().SerializeToString(), "cpu").output_names
