"""Test samples for decoders in the forms that people deploy: caches whose width the graph or a file tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from decoders import GROUPS, HEAD, genai
from texts import LINES, a_tokenizer

import comq_onnx
from comq_onnx.context import Context
from comq_onnx.model.float_model import open_model
from comq_onnx.options.options import Options
from comq_onnx.runtime.session import Session
from comq_onnx.samples.cache_shapes import cache_shapes
from comq_onnx.samples.clues import read_clues
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.padding import find_mask
from models import build, encoder, normal, weight

KEYS = ("key", "value")
FREE = "float[batch, heads, past, width]"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tokenizer.json and lines.txt."""
    a_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n\n")
    return tmp_path


def shapes_of(model: onnx.ModelProto, folder: Path) -> set[tuple[int | None, int | None]]:
    """Return the different shapes that are found for the pasts of a model."""
    return set(cache_shapes(ir.from_proto(model), folder).values())


def reader(text: str, more: str = "") -> onnx.ModelProto:
    """Build a model of one node that reads a past of unknown heads and width.

    more: inputs beside the queries, keys and values [batch, seq, 32]
    """
    return build(
        f"""reader (float[batch, seq, 32] q, float[batch, seq, 32] k, float[batch, seq, 32] v{more},
            {FREE} past_key, {FREE} past_value) => (float[batch, seq, 32] y, {FREE} present) {{ {text} }}""",
        opset=23, domains=["com.microsoft"],
    )  # fmt: skip


def test_the_width_of_a_past_is_that_of_the_product_that_holds_queries_keys_and_values(tmp_path: Path) -> None:
    assert shapes_of(genai(), tmp_path) == {(GROUPS, HEAD)}
    assert shapes_of(genai(width=HEAD), tmp_path) == set()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (
            reader("""y, present, p = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2>
                (q, k, v, past_key, past_value, n, m)""", ", int32[batch] n, int32 m"),
            (2, 16),
        ),
        (
            reader("""y, present, p = com.microsoft.MultiHeadAttention <num_heads = 4>
                (q, k, v, , , , past_key, past_value)"""),
            (4, 8),
        ),
        (
            reader("""y, present, p = Attention <q_num_heads = 4, kv_num_heads = 4>
                (q, k, v, , past_key, past_value)"""),
            (4, 8),
        ),
        (
            reader("""present = Concat <axis = 2> (past_key, h)
                p = Concat <axis = 2> (past_value, h)
                y = Identity (q)""", ", float[batch, 3, seq, 5] h"),
            (3, 5),
        ),
        (reader("present = Identity (past_key) y = Identity (q)"), (None, None)),
    ],
    ids=["GroupQueryAttention", "MultiHeadAttention", "Attention", "Concat", "none"],
)  # fmt: skip
def test_the_operator_that_reads_a_past_tells_its_shape(
    model: onnx.ModelProto, shape: tuple[int | None, int | None], tmp_path: Path
) -> None:
    assert cache_shapes(ir.from_proto(model), tmp_path)["past_key"] == shape


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("genai_config.json", {"model": {"decoder": {"num_key_value_heads": 3, "head_size": 7}}}),
        ("config.json", {"num_attention_heads": 3, "hidden_size": 21}),
        ("config.json", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 21, "head_dim": 7}),
        ("config.json", {"n_head": 3, "n_embd": 21}),
    ],
)
def test_else_a_configuration_beside_the_model_tells_it(name: str, content: object, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    assert shapes_of(reader("present = Identity (past_key) y = Identity (q)"), tmp_path) == {(3, 7)}


def test_a_configuration_of_another_kind_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    assert shapes_of(reader("present = Identity (past_key) y = Identity (q)"), tmp_path) == {(None, None)}
    (tmp_path / "config.json").write_text("not JSON")
    assert shapes_of(reader("present = Identity (past_key) y = Identity (q)"), tmp_path) == {(None, None)}


@pytest.mark.parametrize("tied", [True, False])
def test_a_graph_of_the_model_builder_is_quantized_from_a_text(folder: Path, tied: bool) -> None:
    onnx.save(genai(tied=tied), folder / "model.onnx")
    report = comq_onnx.quantize(
        folder / "model.onnx", folder / "q.onnx", folder / "lines.txt", bits=8, device="cpu", max_samples=40
    )
    assert {x.name for x in report.layers} == {"embed", "lm_head"} | {
        f"{name}{i}" for name in ("qkv", "out", "gate", "up", "down") for i in (0, 1)
    }
    assert report.outputs[0].sqnr_db >= 25
    past = {x.name: x.shape for x in report.inputs}
    assert past["past_key_values.0.key"] == (GROUPS, 0, HEAD)


def test_without_samples_the_past_is_empty_too() -> None:
    report = comq_onnx.plan(genai(), max_samples=8, device="cpu")
    assert {x.name: x.shape for x in report.inputs}["past_key_values.1.value"] == (GROUPS, 0, HEAD)


KEEPING = ("num_logits_to_keep", "cache_position", "use_cache_branch")


def feeds(count: int, tokens: int = 12) -> dict[str, np.ndarray]:
    """Draw samples for `genai(keeping=True)`, the inputs without an axis of samples as one call has them."""
    ids = np.random.default_rng(1).integers(0, 60, (count, tokens))
    past = {f"past_key_values.{i}.{kv}": np.zeros((count, GROUPS, 0, HEAD), np.float32) for i in (0, 1) for kv in KEYS}
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        **past,
        "num_logits_to_keep": np.array(0),
        "cache_position": np.arange(tokens),
        "use_cache_branch": np.array([False]),
    }


def test_numbers_that_say_how_to_run_a_decoder_are_made(folder: Path) -> None:
    onnx.save(genai(keeping=True), folder / "model.onnx")
    for source in (folder / "lines.txt", None):
        found = comq_onnx.inspect_samples(folder / "model.onnx", source, max_samples=16, device="cpu")
        shapes = {x.name: x.shape for x in (*found.inputs, *found.outputs)}
        samples, tokens = shapes["input_ids"]
        assert [shapes[name] for name in KEEPING] == [(samples,), (samples, tokens), (samples, 1)]
        assert shapes["logits"][1:] == (tokens, 60)
        assert shapes["logits"][0] > 1, "a batch is more than one sample"


def test_a_decoder_draws_its_own_tokens_also_where_numbers_say_how_to_run_it() -> None:
    notes = comq_onnx.inspect_samples(genai(keeping=True), max_samples=16, device="cpu").notes
    assert "synthetic tokens drawn from the model's own predictions of the next one" in notes


def test_arrays_without_samples_are_those_of_all(tmp_path: Path) -> None:
    model = genai(keeping=True)
    np.savez(tmp_path / "a.npz", **feeds(20))
    np.savez(tmp_path / "b.npz", **feeds(12))
    inputs = Session(model.SerializeToString(), "cpu").inputs
    for source in (str(tmp_path / "*.npz"), feeds(32), iter([feeds(20), feeds(12)])):
        found = load_samples(source, inputs, count=32)
        assert len(found) == 32
        assert found.shared == set(KEEPING)
        assert found.batch_counts(8) == [8] * 4
        batch = next(found.batches(8))
        assert [batch[name].shape for name in KEEPING] == [(), (12,), (1,)]


def test_numbers_that_differ_from_sample_to_sample_are_fed_one_by_one() -> None:
    inputs = Session(genai(keeping=True).SerializeToString(), "cpu").inputs
    found = load_samples({**feeds(6), "num_logits_to_keep": np.arange(6)}, inputs)
    assert found.shared == {"cache_position", "use_cache_branch"}
    assert found.batch_counts(8) == [1] * 6


# Padding


def padded(count: int = 40, longest: int = 12) -> dict[str, np.ndarray]:
    """Draw samples for `genai` of which some end in padding."""
    ids = np.random.default_rng(2).integers(4, 60, (count, longest))
    mask = (np.arange(longest) < np.random.default_rng(3).integers(3, longest + 1, (count, 1))).astype(np.int64)
    past = {f"past_key_values.{i}.{kv}": np.zeros((count, GROUPS, 0, HEAD), np.float32) for i in (0, 1) for kv in KEYS}
    return {"input_ids": np.where(mask, ids, 2), "attention_mask": mask, **past}


def test_padding_is_found_where_a_model_returns_its_cache() -> None:
    report = comq_onnx.plan(genai(), padded(), device="cpu", uniform=True)
    assert any("of the positions are padding (attention_mask): not calibrated on" in note for note in report.notes)


def test_a_mask_of_past_and_present_is_no_mask_of_positions() -> None:
    given = {"input_ids": np.ones((4, 3), np.int64), "attention_mask": np.repeat([[0, 0, 1, 1, 1]], 4, axis=0)}
    assert find_mask(given) is None
    assert find_mask({**given, "past": np.zeros((4, 5))}) == "attention_mask"


# Whole windows of text


def test_a_model_that_predicts_the_next_token_gets_samples_without_padding(folder: Path, tmp_path: Path) -> None:
    for name, make, joined in (("genai", genai, True), ("encoder", encoder, False), ("causal", causal, True)):
        onnx.save(make(), tmp_path / f"{name}.onnx")
        source = open_model(tmp_path / f"{name}.onnx", Context.of(Options(device="cpu")))
        clues = read_clues(source.model, source.path, source.session, "cpu")
        made = load_samples(folder / "lines.txt", source.session.inputs, clues=clues).arrays["attention_mask"]
        assert bool(made.all()) is joined, name


def causal() -> onnx.ModelProto:
    """Build a decoder without a cache: logits [batch, seq, 40] of the running sum of the tokens' embeddings."""
    return build(
        """causal (int64[batch, seq] input_ids, int64[batch, seq] attention_mask) => (float[batch, seq, 40] logits)
        <int64 along = {1}> {
            words = Gather (table, input_ids)
            sums = CumSum (words, along)
            [head] logits = MatMul (sums, head)
        }""",
        {"table": normal(40, 32), "head": weight(32, 40)},
    )
