"""Test text as samples: lines through a tokenizer, padded, masked and completed as the inputs of the model ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inputs import BERT, IDS, MASK, POSITIONS, Input, an_input
from texts import LINES, a_tokenizer

import comq_onnx
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Clues
from models import decoder, encoder, tokens

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a tokenizer.json and lines.txt."""
    a_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "lines.txt").write_text("\n".join(LINES) + "\n\n")
    return tmp_path


def load(folder: Path, inputs: list[Input], source: str = "lines.txt", **options: Any) -> dict[str, np.ndarray]:
    """Load the arrays of a text in the folder, with the model there too."""
    return load_samples(folder / source, inputs, SampleOptions(**options), clues=Clues(folder)).arrays


def test_a_line_becomes_its_tokens_padded_and_masked(folder: Path) -> None:
    (folder / "two.txt").write_text("the fox\nthe quick brown dog\n")
    made = load(folder, BERT, "two.txt")
    np.testing.assert_array_equal(made["input_ids"], [[1, 4, 7, 2, 0, 0], [1, 4, 5, 6, 12, 2]])
    np.testing.assert_array_equal(made["attention_mask"], [[1, 1, 1, 1, 0, 0], [1] * 6])
    assert not made["token_type_ids"].any()


def test_a_byte_order_mark_and_empty_lines_are_no_text(folder: Path) -> None:
    (folder / "two.txt").write_bytes(b"\xef\xbb\xbfthe fox\r\n\r\n   \nthe dog")
    np.testing.assert_array_equal(load(folder, BERT, "two.txt")["input_ids"], [[1, 4, 7, 2], [1, 4, 12, 2]])


def test_json_lines_are_read_from_their_field(folder: Path) -> None:
    lines = [json.dumps({"text": line, "other": "the dog", "label": 3}) for line in LINES]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    for name, array in load(folder, BERT).items():
        np.testing.assert_array_equal(load(folder, BERT, "lines.jsonl")[name], array)
    assert load(folder, BERT, "lines.jsonl", text_field="other")["input_ids"].shape == (48, 4)


def test_texts_are_cut_to_the_length_asked_for(folder: Path) -> None:
    assert load(folder, BERT)["input_ids"].shape == (48, 10)
    assert load(folder, BERT, length=6)["input_ids"].shape == (48, 6)


def test_a_fixed_length_of_the_model_is_always_filled(folder: Path) -> None:
    made = load(folder, [an_input(None, 16, name=i.name, dtype=np.int64) for i in BERT])
    assert {a.shape for a in made.values()} == {(48, 16)}
    assert made["attention_mask"].sum(axis=1).max() == 10


def test_inputs_of_int32_get_int32(folder: Path) -> None:
    made = load(folder, [an_input(None, None, name=i.name, dtype=np.int32) for i in BERT])
    assert {a.dtype for a in made.values()} == {np.dtype(np.int32)}


def test_positions_count_what_is_not_padding(folder: Path) -> None:
    (folder / "two.txt").write_text("the fox\nthe quick brown dog\n")
    made = load(folder, [IDS, MASK, POSITIONS], "two.txt")
    np.testing.assert_array_equal(made["position_ids"], [[0, 1, 2, 3, 3, 3], [0, 1, 2, 3, 4, 5]])


def test_without_a_mask_texts_are_joined_and_nothing_is_padded(folder: Path) -> None:
    made = load(folder, [IDS], length=20)["input_ids"]
    joined = load(folder, BERT)
    np.testing.assert_array_equal(made.ravel(), joined["input_ids"][joined["attention_mask"] == 1][: made.size])
    assert made.shape[1] == 20


def test_the_seed_chooses_among_more_lines_than_wanted(folder: Path) -> None:
    def some(seed: int) -> np.ndarray:
        return load_samples(folder / "lines.txt", [IDS, MASK], SampleOptions(), 10, seed, Clues(folder)).arrays[
            "input_ids"
        ]

    assert len(some(0)) == 10
    np.testing.assert_array_equal(some(0), some(0))
    assert some(0).shape != some(1).shape or (some(0) != some(1)).any()


def test_an_empty_past_and_the_positions_are_made_for_a_decoder(folder: Path) -> None:
    past = [an_input(None, 2, None, 8, name=f"past_key_values.0.{kv}") for kv in ("key", "value")]
    made = load(folder, [IDS, MASK, POSITIONS, *past])
    assert made["past_key_values.0.key"].shape == (8, 2, 0, 8)
    assert made["attention_mask"].all(), "texts are joined to whole samples"
    assert made["attention_mask"].shape == made["input_ids"].shape


def test_a_past_of_fixed_length_is_masked(folder: Path) -> None:
    past = [an_input(None, 2, 5, 8, name=f"past_key_values.0.{kv}") for kv in ("key", "value")]
    made = load(folder, [IDS, MASK, POSITIONS, *past])
    assert made["past_key_values.0.key"].shape == (8, 2, 5, 8)
    assert not made["attention_mask"][:, :5].any()
    assert made["attention_mask"][:, 5].all()
    assert made["position_ids"][0, 0] == 5


def test_a_model_of_strings_gets_the_lines_themselves(folder: Path) -> None:
    for dims in ((None,), (None, 1)):
        made = load_samples(folder / "lines.txt", [Input("text", np.dtype(object), dims)]).arrays["text"]
        assert made.ravel().tolist() == LINES


@pytest.mark.parametrize(
    ("make", "used"), [(encoder, 40), (tokens, 40), (decoder, 7), (lambda: decoder("4"), 7)]
)  # fmt: skip
def test_models_of_language_are_quantized_from_a_text(
    folder: Path, make: Callable[[], onnx.ModelProto], used: int
) -> None:
    onnx.save(make(), folder / "model.onnx")
    report = comq_onnx.quantize(
        folder / "model.onnx", folder / "q.onnx", folder / "lines.txt", bits=8, device="cpu", max_samples=40
    )
    assert report.samples["used"] == used
    assert "text tokenized with tokenizer.json beside the model" in report.notes
    assert report.outputs[0].sqnr_db >= 25


def test_the_padding_of_a_text_is_not_calibrated_on(folder: Path) -> None:
    onnx.save(encoder(), folder / "model.onnx")
    report = comq_onnx.plan(folder / "model.onnx", folder / "lines.txt", bits=8, device="cpu")
    assert any("are padding (attention_mask): not calibrated on" in note for note in report.notes)
