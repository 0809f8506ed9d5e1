"""Test synthetic samples: pictures with the statistics of photographs, preprocessed as the model tells, and texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from inputs import BERT, NCHW, Input, an_input
from pictures import folded, norm_net, picture
from recurrent import recurrent
from texts import a_tokenizer

import comq_onnx
from comq_onnx import pipeline
from comq_onnx.errors import SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.clues import step_axes
from comq_onnx.samples.images.drawing import draw_pictures
from comq_onnx.samples.images.guess import CENTRED_NAME
from comq_onnx.samples.images.preprocess import PREPROCESS
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Clues
from comq_onnx.samples.synthetic import page_texts
from models import Arrays, build, cnn, decoder, encoder, mlp, several_inputs, tokens, weight

Run = Callable[..., Any]


# Pictures


def test_pictures_have_the_statistics_of_photographs() -> None:
    made = draw_pictures(48, 64, 64, 0).astype(np.float64)
    # 400 photos of ImageNet have a mean of 126, 117 and 104, and 32 from photo to photo; in one 60
    np.testing.assert_allclose(made.mean(axis=(0, 1, 2)), [125, 117, 104], atol=15)
    assert 20 < made.mean(axis=(1, 2, 3)).std() < 45
    assert 45 < made.std(axis=(1, 2, 3)).mean() < 80
    # edges: most neighbours are alike and some are not; of normal noise this is 3
    steps = np.diff(made.mean(axis=-1), axis=2)
    assert (steps**4).mean() / (steps**2).mean() ** 2 > 8
    # the power falls with the square of the frequency: a factor of 64 from 1 to 8, of white noise 1
    grey = made.mean(axis=-1)
    power = (np.abs(np.fft.rfft2(grey - grey.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    assert 20 < power[0, 1] / power[0, 8] < 300


def test_pictures_depend_on_the_seed_alone_and_differ() -> None:
    first, again, other = (draw_pictures(4, 16, 20, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len({p.tobytes() for p in first}) == 4
    assert first.shape == (4, 16, 20, 3)


def note_of(model: onnx.ModelProto, **options: Any) -> str:
    """Return the note of a plan without samples that speaks of pictures."""
    notes = comq_onnx.plan(model, None, device="cpu", max_samples=16, **options).notes
    return next(note for note in notes if "pictures preprocessed" in note or "beside the model" in note)


@pytest.mark.parametrize("name", [*PREPROCESS, CENTRED_NAME])
def test_the_statistics_of_batch_normalizations_choose_the_preprocessing(name: str) -> None:
    expected = {name, "clip", "imagenet"} if name in ("clip", "imagenet") else {name}  # 1 % apart
    chosen = note_of(norm_net(name)).removeprefix("synthetic pictures preprocessed as ").split(" (")[0]
    assert chosen in expected


@pytest.mark.parametrize("name", ["imagenet-inception", CENTRED_NAME])
def test_folded_ones_still_tell_the_scale(name: str) -> None:
    assert note_of(folded(norm_net(name))).startswith(f"synthetic pictures preprocessed as {name} (")


def test_photos_without_a_preprocessing_are_refused_with_what_the_model_wants(tmp_path: Path) -> None:
    for i in range(8):
        picture(32, 32, seed=i).save(tmp_path / f"{i}.png")
    with pytest.raises(SamplesError, match=r"images need --preprocess: .* this model wants --preprocess 0-1$"):
        comq_onnx.plan(norm_net("0-1"), tmp_path, device="cpu")
    with pytest.raises(SamplesError, match=r"wants --preprocess raw --mean 123\.675,116\.28,103\.53$"):
        comq_onnx.plan(folded(norm_net(CENTRED_NAME)), tmp_path, device="cpu")


def test_where_nothing_tells_it_is_a_guess_and_said() -> None:
    model = build(
        """g (float[batch, 3, 16, 16] image) => (float[batch, 8, 14, 14] y) {
            [conv] y = Conv <kernel_shape = [3, 3]> (image, w)
        }""",
        {"w": weight(8, 3, 3, 3, fan=27)},
    )
    assert note_of(model) == (
        "synthetic pictures preprocessed as imagenet-inception (by a guess: nothing in the model tells): "
        "--preprocess says another"
    )


def test_options_and_configurations_count_for_synthetic_pictures_too(tmp_path: Path) -> None:
    low, high = 100 / 255, 1.0
    given = load_samples(None, NCHW, SampleOptions("0-1"), 8).arrays["image"]
    assert given.min() >= 0
    assert low < given.max() <= high
    onnx.save(cnn(), tmp_path / "model.onnx")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.1] * 3}))
    seen = pipeline.inspect_samples(tmp_path / "model.onnx", None, device="cpu", max_samples=16)
    assert seen.inputs[0].low is not None
    assert -5 <= seen.inputs[0].low < -3


@pytest.mark.parametrize("dims", [(None, 16, 16, 3), (4, 3, 16, 16), (None, 1, 28, 28), (None, 3, None, None)])
def test_pictures_fit_any_input_of_pictures(dims: tuple[int | None, ...]) -> None:
    samples = load_samples(None, [an_input(*dims)], count=4)
    assert len(samples) == 4
    assert next(samples.batches(4))["x"].shape == (4, *(d or 224 for d in dims[1:]))


def test_whole_numbers_get_pixels() -> None:
    made = load_samples(None, [an_input(None, 3, 16, 16, dtype=np.uint8)], count=8).arrays["x"]
    assert made.dtype == np.uint8
    assert made.max() > 200


def test_tensors_of_other_channels_get_noise_of_the_spectrum_of_pictures() -> None:
    made = load_samples(None, [an_input(None, 7, 16, 16)], count=8).arrays["x"]
    assert abs(made.mean()) < 0.01
    assert (made < 0).any()


# Tokens


def test_the_page_gives_texts_of_all_lengths() -> None:
    texts = page_texts(200, 0)
    assert len(set(texts)) > 190
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) < 8
    assert max(lengths) > 70
    assert texts == page_texts(200, 0)
    assert texts != page_texts(200, 1)


def test_with_a_tokenizer_synthetic_tokens_are_text(tmp_path: Path) -> None:
    a_tokenizer().save(str(tmp_path / "tokenizer.json"))
    made = load_samples(None, BERT, SampleOptions(), 40, 0, Clues(tmp_path)).arrays
    assert len(made["input_ids"]) == 40
    assert (made["input_ids"][:, 0] == 1).all()  # [CLS]
    assert 0 < made["attention_mask"].mean() < 1
    the = a_tokenizer().token_to_id("the")
    assert (made["input_ids"] == the).sum() > 20
    named = load_samples(None, BERT, SampleOptions(tokenizer=str(tmp_path)), 40).arrays
    np.testing.assert_array_equal(named["input_ids"], made["input_ids"])


def test_a_model_without_a_mask_gets_as_many_samples_of_text(tmp_path: Path) -> None:
    a_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert len(load_samples(None, BERT[:1], SampleOptions(), 40, 0, Clues(tmp_path))) == 40


def chain(ahead: bool = False) -> onnx.ModelProto:
    """Build input_ids [batch, seq] -> logits [batch, seq, 48], which predict token i + 7 after token i.

    ahead: predictions depend on later tokens too
    """
    follows = 40 * np.roll(np.eye(48, dtype=np.float32), 7, axis=1)
    mean = "m = ReduceMean <axes = [1]> (e)" if ahead else "m = Mul (e, zero)"
    return build(
        f"""chain (int64[batch, seq] input_ids) => (float[batch, seq, 48] logits) {{
            [embed] e = Gather (table, input_ids)
            [head] h = MatMul (e, w)
            {mean}
            logits = Add (h, m)
        }}""",
        {"table": np.eye(48, dtype=np.float32), "w": follows, "zero": np.float32(0)},
    )


def drawn(model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[str]]:
    """Return the synthetic tokens of a model, and the notes."""
    seen: dict[str, Arrays] = {}
    describe = pipeline.describe
    monkeypatch.setattr(
        pipeline, "describe", lambda samples, *rest: seen.update(x=samples.arrays) or describe(samples, *rest)
    )
    onnx.save(model, tmp_path / "model.onnx")
    found = pipeline.inspect_samples(tmp_path / "model.onnx", None, device="cpu", max_samples=24)
    return seen["x"]["input_ids"], list(found.notes)


def test_a_model_that_predicts_the_next_token_draws_its_own_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, notes = drawn(chain(), tmp_path, monkeypatch)
    follows = ids[:, 1:] == (ids[:, :-1] + 7) % 48
    assert follows.all()
    assert notes == ["synthetic tokens drawn from the model's own predictions of the next one"]


def test_a_model_that_looks_ahead_gets_random_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, notes = drawn(chain(ahead=True), tmp_path, monkeypatch)
    assert ((ids[:, 1:] == (ids[:, :-1] + 7) % 48).mean()) < 0.1
    assert notes == []


# Whole


@pytest.mark.parametrize(
    ("make", "word"),
    [(cnn, "pictures"), (encoder, "tokens"), (decoder, "tokens"), (lambda: decoder("4"), "tokens")],
)
def test_models_are_quantized_without_samples_and_the_warning_says_what_it_costs(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], word: str
) -> None:
    report = comq_onnx.quantize(make(), tmp_path / "q.onnx", bits=8, device="cpu", max_samples=24)
    assert report.outputs[0].sqnr_db >= 25
    warning = next(w for w in report.warnings if w.startswith("calibrated on synthetic"))
    assert word in warning
    assert "--calib" in warning


# Noise, masks, batches


@pytest.mark.parametrize("make", [mlp, cnn, tokens, several_inputs])
def test_synthetic_samples_fit_and_are_warned_about(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    report = comq_onnx.quantize(make(), tmp_path / "q.onnx", max_samples=24, bits=8, device="cpu")
    assert report.samples["source"] == "synthetic"
    assert report.samples["used"] == 24
    assert any("synthetic" in w for w in report.warnings)
    assert report.outputs[0].sqnr_db >= 25


def test_real_samples_give_no_warning_about_synthetic_ones(quantized: Run) -> None:
    assert not any("synthetic" in w for w in quantized(mlp()).report.warnings)


def synthetic(*inputs: Input, **options: Any) -> Arrays:
    """Make synthetic samples for these inputs."""
    return load_samples(None, inputs, **{"count": 20, **options}).arrays


def test_synthetic_tokens_stay_inside_the_vocabulary() -> None:
    ids = synthetic(an_input(None, None, name="ids", dtype=np.int64), clues=Clues(token_limits={"ids": 50}))["ids"]
    assert ids.min() >= 0
    assert 40 < ids.max() < 50


@pytest.mark.parametrize("turned", [True, False])
def test_synthetic_sequences_are_as_long_as_they_may_be(turned: bool) -> None:
    """Read the steps from the second axis of x behind a Transpose, from its first one without."""
    source = recurrent("GRU", lengths=True)
    if not turned:
        source.graph.node.pop(0)
        source.graph.node[0].input[0] = "x"
    found = step_axes(ir.from_proto(source))
    assert found == {"lengths": ("x", 1 if turned else 0)}
    x = an_input(None, 6, 16) if turned else an_input(6, 3, 16)
    lengths = an_input(None if turned else 3, name="lengths", dtype=np.int32)
    made = synthetic(x, lengths, clues=Clues(step_axes=found))
    assert made["lengths"].shape == ((20,) if turned else (20, 3))
    assert (made["lengths"] == 6).all()


def test_synthetic_masks_hide_nothing() -> None:
    made = synthetic(an_input(None, 7, name="attention_mask", dtype=np.int64), an_input(None, 2, name="b", dtype=bool))
    assert all((array == 1).all() for array in made.values())


def test_synthetic_pictures_have_the_spectrum_of_pictures() -> None:
    pictures = synthetic(an_input(None, 3, 64, 64))["x"]
    power = np.abs(np.fft.rfft2(pictures)).mean(axis=(0, 1)) ** 2
    # 1/f in amplitude: 16 times the frequency is 256 times less power, noise within a factor of 2
    assert 128 < power[0, 1] / power[0, 16] < 512


def test_synthetic_samples_depend_on_the_seed_alone() -> None:
    first, again, other = (synthetic(an_input(None, 8), seed=seed)["x"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_synthetic_samples_fit_any_batch_axis(batch: int | None) -> None:
    samples = load_samples(None, [an_input(batch, 6), an_input(batch, 3, name="z")], count=8)
    assert len(samples) == 8
    for feeds in samples.batches(2):
        assert feeds["x"].shape[0] == (batch or 2)
