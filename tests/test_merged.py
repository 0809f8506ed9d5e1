"""Test decoders in the merged form, an If on `use_cache_branch`: both branches are quantized, weights stored once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from decoders import GROUPS, HEAD, genai, merged

import comq_onnx
from comq_onnx.model.prepare import prepare_model
from comq_onnx.runtime.session import Session
from models import Arrays

# the least whose table is looked up
VOCABULARY = 2048
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (12, 12))


OPTIONS: dict[str, Any] = {"device": "cpu", "bits": 4, "uniform": True}


def feeds(count: int = len(IDS), ids: np.ndarray = IDS) -> Arrays:
    """Return samples with an empty past."""
    pasts = [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    given = {"input_ids": ids[:count], "attention_mask": np.ones_like(ids[:count])}
    return {**given, **{name: np.zeros((count, GROUPS, 0, HEAD), np.float32) for name in pasts}}


@pytest.mark.parametrize("copies", [True, False])
def test_both_branches_compute_what_the_plain_decoder_does(tmp_path: Path, copies: bool) -> None:
    decoder, plain = genai(vocabulary=VOCABULARY), tmp_path / "plain.onnx"
    comq_onnx.quantize(decoder, plain, feeds(), **OPTIONS)
    model = merged(decoder, copies)
    # every sample takes the branch that leaves the past out
    samples = {**feeds(), "use_cache_branch": np.zeros((len(IDS), 1), bool)}
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", samples, **OPTIONS)
    assert not report.skipped
    assert set(report.decoding_ms) == {"before", "after"}
    own, whole = Session(tmp_path / "q.onnx", "cpu"), Session(plain, "cpu")
    expected = whole.run(feeds(4))
    for flag in (False, True):
        found = own.run({**feeds(4), "use_cache_branch": np.array([flag])})
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    # one copy of all weights: nodes and names are what the second branch adds
    sizes = [sum(len(x.raw_data) for x in onnx.load(path).graph.initializer) for path in (tmp_path / "q.onnx", plain)]
    assert sizes[0] < 1.05 * sizes[1]


def test_a_step_of_decoding_goes_through_packed_weights(tmp_path: Path, optimized: Callable[[Path], Any]) -> None:
    model = merged(genai(vocabulary=VOCABULARY), copies=False)
    flags = (np.arange(len(IDS)) % 2 == 0)[:, None]
    samples = {**{name: array[:, None] for name, array in feeds().items()}, "use_cache_branch": flags}
    comq_onnx.quantize(model, tmp_path / "q.onnx", samples, **OPTIONS)
    codes = [x.name for x in onnx.load(tmp_path / "q.onnx").graph.initializer if ".codes" in x.name]
    assert len(codes) == 11, "those of two blocks of five products, and of the table that is the head too"
    # the products of both branches: ONNX Runtime packs no weight that lies outside
    branches = [a.g for node in optimized(tmp_path / "q.onnx").graph.node for a in node.attribute if a.g.node]
    assert [[n.op_type for n in graph.node].count("MatMulNBits") for graph in branches] == [11, 11]
    before, after = Session(model.SerializeToString(), "cpu"), Session(tmp_path / "q.onnx", "cpu")
    for flag in (False, True):
        given = {**feeds(), "use_cache_branch": np.array([flag])}
        first, second = (session.run(given)["logits"] for session in (before, after))
        assert 10 * np.log10((first**2).sum() / ((first - second) ** 2).sum()) > 10


@pytest.fixture
def optimized(tmp_path: Path) -> Callable[[Path], onnx.ModelProto]:
    """Return a function that gives a model as ONNX Runtime runs it."""

    def load(path: Path) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return onnx.load(tmp_path / "optimized.onnx")

    return load


def test_a_head_that_branches_transpose_is_their_table() -> None:
    # too large for the library to fold
    prepared = prepare_model(ir.from_proto(merged(genai(vocabulary=1 << 17), copies=False)), 21, 21)
    tables = [x for x in prepared.layers if x.kind.is_lookup]
    assert len(tables) == 2
    assert len({x.weight for x in tables}) == 1
