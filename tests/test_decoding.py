"""Test what a run chooses and reports for decoders: weight-only, blocks of 32, one token timed, caches in one line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import GROUPS, HEAD, genai
from rich.console import Console

import comq_onnx
from comq_onnx.bits.choose import _not_reached
from comq_onnx.errors import OptionError
from comq_onnx.metrics import OutputComparison
from comq_onnx.model.judged import is_cache, judged, without_caches
from comq_onnx.options.options import Options
from comq_onnx.report.advice import advise
from comq_onnx.report.page import _tiles
from comq_onnx.runtime.session import Session
from comq_onnx.samples.decoding import decoding_feeds
from comq_onnx.samples.load import load_samples
from models import decoder, mlp, normal


def test_a_decoder_is_weight_only_in_blocks_of_32_unless_told_otherwise() -> None:
    open_, eight, whole = Options(), Options(activations="8"), Options(granularity="channel")
    assert (open_.for_decoder().activations, open_.for_decoder().granularity) == ("none", "32")
    assert (eight.for_decoder().activations, eight.for_decoder().granularity) == ("8", None)
    assert (whole.for_decoder().activations, whole.for_decoder().granularity) == ("none", "channel")


def test_other_models_keep_their_defaults_and_decoders_say_theirs() -> None:
    said = "the model predicts the next token"
    report = comq_onnx.plan(genai(), max_samples=8, device="cpu", uniform=True)
    assert report.options["activations"] == "none"
    assert any(said in note for note in report.notes)
    report = comq_onnx.plan(mlp(), max_samples=8, device="cpu", uniform=True)
    assert (report.options["activations"], report.options["granularity"]) == ("auto", None)
    assert not any(said in note for note in report.notes)
    report = comq_onnx.plan(genai(), max_samples=8, device="cpu", uniform=True, activations="none", granularity="16")
    assert not any(said in note for note in report.notes)


# One token


@pytest.mark.parametrize("make", [genai, decoder], ids=["genai", "export"])
def test_a_step_of_decoding_gives_the_logits_of_the_whole_text(make: Any) -> None:
    session = Session(make().SerializeToString(), "cpu")
    ids = np.random.default_rng(0).integers(4, 50, (1, 9))
    whole, most = (next(load_samples(inputs_of(session, x), session.inputs).batches(1)) for x in (ids, ids[:, :8]))
    step = decoding_feeds(session.inputs, most, session.run(most))
    assert step is not None
    assert step["input_ids"].tolist() == [[ids[0, 7]]]
    # the token behind: the last one of the whole text
    logits = session.run({**step, "input_ids": ids[:, 8:]})["logits"]
    np.testing.assert_allclose(logits[:, -1], session.run(whole)["logits"][:, -1], rtol=1e-3, atol=1e-4)


def inputs_of(session: Session, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return all inputs of a decoder for these tokens: its past is empty."""
    made: dict[str, np.ndarray] = {}
    for info in session.inputs:
        match info.name:
            case "input_ids":
                made[info.name] = ids
            case "attention_mask":
                made[info.name] = np.ones_like(ids)
            case "position_ids":
                made[info.name] = np.arange(ids.shape[1])[None]
            case "cache_position":
                made[info.name] = np.arange(ids.shape[1])
            case "num_logits_to_keep":
                made[info.name] = np.array(0)
            case "use_cache_branch":
                made[info.name] = np.array([False])
            case _:
                made[info.name] = np.zeros((1, GROUPS, 0, HEAD), np.float32)
    return made


def test_numbers_that_say_how_to_run_a_decoder_go_on_with_its_cache() -> None:
    session = Session(genai(keeping=True).SerializeToString(), "cpu")
    feeds = inputs_of(session, np.ones((1, 4), np.int64))
    step = decoding_feeds(session.inputs, feeds, session.run(feeds))
    assert step is not None
    assert step["cache_position"].tolist() == [4]
    assert step["use_cache_branch"].tolist() == [True]
    assert step["num_logits_to_keep"] == 0
    assert step["attention_mask"].shape == (1, 5)
    assert session.run(step)["present.0.key"].shape == (1, GROUPS, 5, HEAD)


def test_what_has_no_cache_of_its_own_has_no_step_of_decoding() -> None:
    session = Session(mlp().SerializeToString(), "cpu")
    feeds = {"x": normal(1, 32)}
    assert decoding_feeds(session.inputs, feeds, session.run(feeds)) is None
    session = Session(genai().SerializeToString(), "cpu")
    feeds = inputs_of(session, np.ones((1, 4), np.int64))
    assert decoding_feeds(session.inputs, feeds, {"logits": normal(1, 4, 60)}) is None


def test_the_report_has_the_speed_of_one_token_and_caches_in_one_line(tmp_path: Path) -> None:
    report = comq_onnx.quantize(genai(), tmp_path / "q.onnx", max_samples=16, device="cpu", uniform=True)
    assert set(report.decoding_ms) == {"before", "after"}
    shown = text_of(report)
    assert "decoding " in shown
    assert "4 caches, the worst" in shown
    assert "present.0" not in shown
    assert "decoding" in [what for what, *_ in _tiles(report)], "on the page too"
    assert not report.skipped, "the angles of rotary positions are no weights"


def text_of(report: comq_onnx.Report) -> str:
    """Return the report as a terminal shows it."""
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(report.rich())
    return console.export_text()


# Caches among the outputs


def test_caches_are_known_by_their_names_and_not_judged_by_parts() -> None:
    assert [is_cache(name) for name in ("present.0.key", "present_key_values.1", "logits", "last_hidden_state")] == [
        True, True, False, False,
    ]  # fmt: skip
    found = judged(ir.from_proto(decoder()))
    assert found.values["present_0_key"] == ("present_0_key",)


def test_caches_alone_set_off_no_advice_and_count_where_there_is_nothing_else() -> None:
    report = comq_onnx.plan(mlp(), max_samples=8, device="cpu", uniform=True)
    good, bad = OutputComparison("logits", 40.0, 1.0, None), OutputComparison("present.0.key", 3.0, 0.7, None)
    assert advise(replace(report, outputs=[good, bad])) == []
    assert advise(replace(report, outputs=[bad]))
    assert without_caches([good, bad]) == [good]
    assert without_caches([bad]) == [bad]


# Samples and advice


def test_a_readers_batches_count_by_their_samples() -> None:
    session = Session(genai(keeping=True).SerializeToString(), "cpu")

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(5):
            feeds = inputs_of(session, np.ones((4, 6), np.int64))
            yield {n: np.repeat(a, 4, axis=0) if a.ndim == 4 else a for n, a in feeds.items()}

    assert len(load_samples(batches, session.inputs, count=16)) == 16


@pytest.mark.parametrize(
    ("given", "said"),
    [("auto", "try --activations 16 or none, or more"), ("16", "try --activations none, or more"),
     ("none", "try more calibration samples")],
)  # fmt: skip
def test_what_was_given_is_not_advised(given: str, said: str) -> None:
    class Stand:
        """Stand in for what the error is made of."""

        options = Options(bits="auto", max_drop="30dB", activations=given)
        said, held_back = "20 dB remain", range(8)

    error = _not_reached(8.0, Stand, Stand, Stand)  # type: ignore[arg-type]
    assert isinstance(error, OptionError)
    assert said in str(error)


# Half precision


def test_a_cache_of_float16_is_never_cast(tmp_path: Path) -> None:
    onnx.save(genai(half=True), tmp_path / "m.onnx")
    report = comq_onnx.quantize(
        tmp_path / "m.onnx", tmp_path / "q.onnx", max_samples=16, device="cpu", uniform=True, bits=8
    )
    assert report.outputs[0].sqnr_db > 30
    graph = onnx.load(tmp_path / "q.onnx").graph
    caches = {x.name for x in (*graph.input, *graph.output) if x.name.startswith(("past", "present"))}
    readers = {n.op_type for n in graph.node if caches & {*n.input, *n.output}}
    assert readers == {"GroupQueryAttention"}
    types = {x.type.tensor_type.elem_type for x in (*graph.input, *graph.output) if x.name in caches | {"logits"}}
    assert types == {onnx.TensorProto.FLOAT16}
    # the products in between are float32
    assert not any(x.data_type == onnx.TensorProto.FLOAT16 for x in graph.initializer if len(x.dims) == 1)


def test_a_cache_that_a_concat_lengthens_stays_float16(tmp_path: Path) -> None:
    onnx.save(in_half(decoder()), tmp_path / "m.onnx")
    report = comq_onnx.quantize(
        tmp_path / "m.onnx", tmp_path / "q.onnx", max_samples=16, device="cpu", uniform=True, bits=8
    )
    assert min(x.sqnr_db for x in report.outputs) > 30
    graph = onnx.load(tmp_path / "q.onnx").graph
    makers = {name: n.op_type for n in graph.node for name in n.output}
    for part in ("key", "value"):
        past, present = f"past_key_values_0_{part}", f"present_0_{part}"
        assert makers[present] == "Concat", "the cache that is returned"
        # the length of a cache is known without its numbers
        assert {n.op_type for n in graph.node if past in n.input} == {"Concat", "Shape"}
        # once, for the products, which a CPU computes in float32
        assert [n.op_type for n in graph.node if present in n.input] == ["Cast"]
    assert {x.type.tensor_type.elem_type for x in graph.output if "present" in x.name} == {onnx.TensorProto.FLOAT16}


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a decoder float16 throughout, and let it return how long its pasts are."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            numbers = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for attribute in (a for node in model.graph.node for a in node.attribute if a.name == "to"):
        attribute.i = onnx.TensorProto.FLOAT16
    for past in [x.name for x in model.graph.input if x.name.startswith("past")]:
        model.graph.node.append(onnx.helper.make_node("Shape", [past], [f"{past}.shape"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{past}.shape", onnx.TensorProto.INT64, [4]))
    return model


def test_a_decoder_that_cannot_go_on_with_its_cache_is_quantized_all_the_same(tmp_path: Path) -> None:
    model = genai()
    # the mask is as long as the tokens only where there is no past
    model.graph.node.append(onnx.helper.make_node("Concat", ["input_ids", "attention_mask"], ["both"], axis=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("both", onnx.TensorProto.INT64, ["pairs", "seq"]))
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", max_samples=16, device="cpu", uniform=True)
    assert report.decoding_ms == {}
    assert any("the speed of one token is not measured" in note for note in report.notes)
