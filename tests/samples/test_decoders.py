"""Test samples for decoders in the forms that people deploy: caches whose width the graph or a file tells."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from decoders import GROUPS, HEAD, genai
from texts import LINES, a_tokenizer

import comq_onnx
from comq_onnx.samples.cache_shapes import cache_shapes
from models import build

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
