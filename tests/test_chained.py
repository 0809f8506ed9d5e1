"""Test models that read what others of their folder give: an encoder, and decoders behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from translators import START, VOCABULARY, decoder, decoder_with_past, encoder, write_folder

import comq_onnx
from comq_onnx import chained
from comq_onnx.chained import Link, find_links, first_samples, make_samples
from comq_onnx.errors import SamplesError
from comq_onnx.options.options import Options
from models import infer

OPTIONS: dict[str, Any] = {"device": "cpu", "bits": 8, "uniform": True}
NAMES = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")


def texts(count: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    """Make token ids of texts of 6 to 9 tokens, padded to 9."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCABULARY, (count, 9))
    mask = (np.arange(9) < rng.integers(6, 10, count)[:, None]).astype(np.int64)
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with a translator."""
    write_folder(tmp_path / "translator")
    return tmp_path / "translator"


def translate(folder: Path, given: dict[str, np.ndarray], steps: int = 12) -> np.ndarray:
    """Translate texts with the three files of a folder, token by token: [texts, steps]."""
    states = infer(folder / NAMES[0], given)["last_hidden_state"]
    ids, mask = np.full((len(states), 1), START), given["attention_mask"]
    feeds = {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": mask}
    found = infer(folder / NAMES[1], feeds)
    cache = {name: found[name] for name in found if name != "logits"}
    said = [found["logits"][:, -1].argmax(-1)]
    for _ in range(steps - 1):
        past = {name.replace("present", "past_key_values"): array for name, array in cache.items()}
        step = infer(folder / NAMES[2], {"input_ids": said[-1][:, None], "encoder_attention_mask": mask, **past})
        cache |= {name: array for name, array in step.items() if name != "logits"}
        said.append(step["logits"][:, -1].argmax(-1))
    return np.stack(said, axis=1)


def test_links_follow_the_names_of_inputs_and_caches(folder: Path) -> None:
    paths = sorted(folder.glob("*.onnx"))
    links = find_links(paths)
    first, second, third = (folder / name for name in NAMES)
    assert links[second] == Link(first, {"encoder_hidden_states": "last_hidden_state"})
    assert links[third].before == second
    assert links[third].reads["past_key_values.0.encoder.key"] == "present.0.encoder.key"
    assert len(links[third].reads) == 4
    assert first not in links
    assert [chained.depth(path, links) for path in (first, second, third)] == [0, 1, 2]


def test_a_circle_is_no_link(tmp_path: Path) -> None:
    def named(x: str, y: str) -> onnx.ModelProto:
        node = onnx.helper.make_node("Tanh", [x], [y])
        sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in (x, y)]
        return onnx.helper.make_model(onnx.helper.make_graph([node], "g", sides[:1], sides[1:]))

    onnx.save(named("a", "b"), tmp_path / "1.onnx")
    onnx.save(named("b", "a"), tmp_path / "2.onnx")
    assert find_links(sorted(tmp_path.glob("*.onnx"))) == {}


def test_a_decoder_reads_what_the_quantized_encoder_gives(folder: Path, tmp_path: Path) -> None:
    links = find_links(sorted(folder.glob("*.onnx")))
    first, second, third = (folder / name for name in NAMES)
    rough = tmp_path / "rough.onnx"
    comq_onnx.quantize(first, rough, texts(), device="cpu", bits=2, uniform=True)
    given = first_samples(first, texts(), Options(device="cpu"))
    samples = make_samples(second, links[second], given, rough)
    assert "encoder_model.onnx gives; 32 tokens" in samples.notes[0]
    # the texts of the samples, in the order in which they were drawn
    rows = [
        int(np.flatnonzero((texts()["attention_mask"] == mask).all(-1))[0])
        for mask in samples.arrays["encoder_attention_mask"]
    ]
    assert len(rows) == len(samples)
    source = {tuple(x.ravel()) for x in infer(rough, texts())["last_hidden_state"]}
    assert all(tuple(x.ravel()) in source for x in samples.arrays["encoder_hidden_states"])
    # the tokens are those of the float models: they begin with the start, and the decoder's choice follows
    ids = samples.arrays["input_ids"]
    assert ids.shape == (len(samples), 32)
    assert (ids[:, 0] == START).all()
    behind = make_samples(third, links[third], make_samples(second, links[second], given, None), None)
    assert behind.arrays["input_ids"].shape == (len(samples), 1)
    assert behind.arrays["past_key_values.0.decoder.key"].shape[2] == 31


def test_tokens_are_what_the_float_models_go_on_with(folder: Path) -> None:
    links = find_links(sorted(folder.glob("*.onnx")))
    given = first_samples(folder / NAMES[0], texts(), Options(device="cpu"))
    samples = make_samples(folder / NAMES[1], links[folder / NAMES[1]], given, None)
    feeds = {name: array[:5] for name, array in samples.arrays.items()}
    logits = infer(folder / NAMES[1], feeds)["logits"]
    np.testing.assert_array_equal(logits[:, :-1].argmax(-1), feeds["input_ids"][:, 1:])


def test_a_translator_says_the_same_when_it_is_quantized(folder: Path, tmp_path: Path) -> None:
    done = comq_onnx.quantize_all([folder], tmp_path / "q", texts(), activations="none", **OPTIONS)
    assert [one.source.name for one in done] == list(NAMES)
    assert [one.error for one in done] == [None] * 3
    assert any("what encoder_model.onnx gives" in note for note in done[1].report.notes)
    assert any("what decoder_model.onnx gives" in note for note in done[2].report.notes)
    assert (tmp_path / "q" / "config.json").is_file()
    unseen = texts(16, seed=1)
    same = translate(folder, unseen) == translate(tmp_path / "q", unseen)
    # of a random model; behind the first other token all may be others
    assert same[:, 0].all()
    assert same.mean() > 0.8


def test_arrays_that_hold_the_inputs_are_taken_as_they_are(tmp_path: Path) -> None:
    states = np.random.default_rng(2).standard_normal((40, 9, 32)).astype(np.float32)
    given = texts() | {"encoder_hidden_states": states, "encoder_attention_mask": texts()["attention_mask"]}
    np.savez(tmp_path / "s.npz", **given)
    assert chained.gives(tmp_path / "s.npz", ["encoder_hidden_states"])
    assert chained.gives(given, ["encoder_hidden_states"])
    assert not chained.gives(texts(), ["encoder_hidden_states"])
    assert not chained.gives(None, ["encoder_hidden_states"])


def test_a_decoder_without_scores_needs_samples(folder: Path) -> None:
    model = decoder()
    del model.graph.output[0]
    onnx.save(model, folder / NAMES[1])
    links = find_links(sorted(folder.glob("*.onnx")))
    given = first_samples(folder / NAMES[0], texts(), Options(device="cpu"))
    with pytest.raises(SamplesError, match="no output has scores for each token"):
        make_samples(folder / NAMES[1], links[folder / NAMES[1]], given, None)


def test_the_parts_are_models_of_their_own() -> None:
    for model in (encoder(), decoder(), decoder_with_past()):
        onnx.checker.check_model(model)
