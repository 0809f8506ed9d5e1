"""Test what is written beside models in a folder of the hub: names, quantize_config.json, model card, config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from reports import report

import comq_onnx
from comq_onnx import folders, hub
from comq_onnx.errors import SamplesError
from comq_onnx.metrics import OutputComparison
from comq_onnx.model import files
from comq_onnx.options.options import Options
from models import infer, mlp, samples_for

CARD = "---\nlicense: apache-2.0\n---\n# A model\n\nIt is good.\n"
OPTIONS: dict[str, Any] = {"device": "cpu", "uniform": True, "max_samples": 16, "bits": 8}


def described(out: Path, name: str = "model_q4", stage: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Describe one model in `out`, and return quantize_config.json; stage: where copies of the source's files are."""
    stage = stage or out
    (out / "onnx").mkdir(parents=True, exist_ok=True)
    (out / "onnx" / f"{name}.onnx").write_bytes(b"a model")
    hub.describe([hub.Made(Path("onnx", f"{name}.onnx"), report(2, **changes))], stage, out)
    return json.loads((stage / "quantize_config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("bits", "half", "end"),
    [(8, False, "quantized"), (None, False, "quantized"), (4, False, "q4"), (4, True, "q4f16"), (2, True, "q2f16"),
     (3, False, "q3"), (8, True, "quantized")],
)  # fmt: skip
def test_names_end_as_transformers_js_has_them(bits: int | None, half: bool, end: str) -> None:
    assert hub.ending(bits, half) == end
    assert hub.VARIANT.search(f"decoder_model_merged_{end}") is not None


def test_the_configuration_says_how_each_model_was_made(tmp_path: Path) -> None:
    described(tmp_path, "model_quantized", bits=8, options={"bits": 8, "workdir": "private", "batch_size": 2})
    told = described(tmp_path, options={"bits": 4, "granularity": "32", "cpu": "vnni"})
    models = told.pop("per_model_config")
    assert told == {
        "modes": ["q4", "q8"], "per_channel": False, "reduce_range": False, "block_size": 32, "is_symmetric": True,
    }  # fmt: skip
    assert list(models) == ["model_q4", "model_quantized"]
    assert [models[name]["weight_type"] for name in models] == ["QInt4", "QInt8"]
    assert models["model_q4"]["op_types"] == ["Conv"]
    # what the file does not depend on is nobody's business
    assert models["model_quantized"]["comq_onnx"]["options"] == {"bits": 8}
    assert models["model_q4"]["comq_onnx"]["measured"] == {
        "bytes_before": 4_000_000, "bytes_after": 600_000, "sqnr_db": 24.3, "top1_agreement": 0.97, "speed": 2.0,
        "onnxruntime": "1.31.1",
    }  # fmt: skip


def test_models_that_are_gone_and_foreign_entries(tmp_path: Path) -> None:
    described(tmp_path, "gone_q4")
    (tmp_path / "onnx" / "gone_q4.onnx").unlink()
    told = json.loads((tmp_path / "quantize_config.json").read_text())
    told["per_model_config"]["theirs"] = {"op_types": ["Add"], "weight_type": "QUInt8"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(told))
    (tmp_path / "onnx" / "theirs.onnx").write_bytes(b"")
    assert list(described(tmp_path)["per_model_config"]) == ["model_q4", "theirs"]
    assert "theirs" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"per_model_config": 3}', "[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_replaced(tmp_path: Path, broken: str) -> None:
    (tmp_path / "quantize_config.json").write_text(broken)
    assert list(described(tmp_path)["per_model_config"]) == ["model_q4"]


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    described(tmp_path, outputs=[OutputComparison("y", float("inf"), 1.0, None)], latency_ms={})
    text = (tmp_path / "quantize_config.json").read_text()
    assert "Infinity" not in text
    assert "sqnr_db" not in text
    assert "| model | bits | MB | transformers.js |" in (tmp_path / "README.md").read_text()


def test_the_card_gets_a_table_that_the_next_run_replaces(tmp_path: Path) -> None:
    stage, out = tmp_path / "stage", tmp_path / "out"
    stage.mkdir()
    (stage / "README.md").write_text(CARD)
    described(out, stage=stage)
    made = (stage / "README.md").read_text()
    assert made.startswith(CARD + "\n" + hub.BEGIN)
    row = '| `onnx/model_q4.onnx` | 4 | 4.00 -> 0.60 | 24.3 | 97.0% | 2.00x | `dtype: "q4"` |'
    assert row in made
    # someone writes behind the table
    (out / "README.md").write_text(made + "\nMore.\n")
    (out / "quantize_config.json").write_text((stage / "quantize_config.json").read_text())
    described(out, "model_quantized", bits=8)
    again = (out / "README.md").read_text()
    assert again.count("## Quantized models") == again.count(hub.BEGIN) == 1
    assert row in again
    assert '`dtype: "q8"`' in again
    assert again.startswith(CARD)
    assert again.endswith("\nMore.\n")


def test_widths_without_a_word_and_made_up_samples_are_told(tmp_path: Path) -> None:
    described(tmp_path, "model_q3", bits=3, samples={"source": "synthetic"})
    text = (tmp_path / "README.md").read_text()
    assert '`model_file_name: "model_q3", dtype: "fp32"`' in text
    assert "The samples of `model_q3` were made up." in text


def test_a_card_that_is_no_text_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    described(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"


def test_other_folders_get_a_table_where_they_have_a_card(tmp_path: Path) -> None:
    made = [hub.Made(Path("model.onnx"), report(2))]
    hub.describe(made, tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "README.md").write_text(CARD)
    hub.describe(made, tmp_path, tmp_path)
    assert "| `model.onnx` | 4 | 4.00 -> 0.60 | 24.3 | 97.0% | 2.00x |\n" in (tmp_path / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("said", "external", "told"),
    [
        (None, False, None),
        (None, True, {"model": 0, "model_q4.onnx": 1}),
        # it would be looked for in vain
        (True, False, {"model": True, "model_q4.onnx": 0}),
        (2, True, {"model": 2, "model_q4.onnx": 1}),
        ({"model": 1, "other.onnx": 3}, False, {"model": 1, "other.onnx": 3, "model_q4.onnx": 0}),
    ],
)
def test_readers_are_told_which_models_have_external_data(tmp_path: Path, said: Any, external: bool, told: Any) -> None:
    config = {"model_type": "bert", "transformers.js_config": {"dtype": "q4"}}
    if said is not None:
        config["transformers.js_config"]["use_external_data_format"] = said  # type: ignore[index]
    text = json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "onnx").mkdir()
    if external:
        (tmp_path / "onnx" / "model_q4.onnx_data").write_bytes(b"")
    described(tmp_path)
    found = (tmp_path / "config.json").read_text()
    if told is None:
        assert found == text
    else:
        assert json.loads(found)["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": told}


def test_what_an_earlier_run_told_of_external_data_stays(tmp_path: Path) -> None:
    stage, out = tmp_path / "stage", tmp_path / "out"
    stage.mkdir()
    out.mkdir()
    (stage / "config.json").write_text('{"transformers.js_config": {"use_external_data_format": true}}')
    earlier = {"model": True, "model_quantized.onnx": 1}
    (out / "config.json").write_text(json.dumps({"transformers.js_config": {"use_external_data_format": earlier}}))
    described(out, stage=stage)
    found = json.loads((stage / "config.json").read_text())["transformers.js_config"]["use_external_data_format"]
    assert found == {"model": True, "model_quantized.onnx": 1, "model_q4.onnx": 0}


@pytest.mark.parametrize(
    ("out", "source", "name"),
    [("onnx/q.onnx", None, "q.onnx_data"), ("q.onnx", "model.onnx_data", "q.onnx_data"),
     ("q.onnx", "model.onnx.data", "q.onnx.data"), ("q.onnx", None, "q.onnx.data")],
)  # fmt: skip
def test_external_data_is_called_as_its_readers_look_for_it(
    tmp_path: Path, out: str, source: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "INLINE_LIMIT", 100)
    more = {} if source is None else {"save_as_external_data": True, "location": source, "size_threshold": 0}
    onnx.save(mlp(), tmp_path / "model.onnx", **more)
    (tmp_path / out).parent.mkdir(exist_ok=True)
    comq_onnx.quantize(tmp_path / "model.onnx", tmp_path / out, samples_for(mlp()), **OPTIONS)
    assert (tmp_path / out).with_name(name).stat().st_size > 100
    assert infer(tmp_path / out, samples_for(mlp()))["y"].shape == (40, 10)


def test_a_folder_of_the_hub_is_described_where_it_goes(tmp_path: Path) -> None:
    source, out = tmp_path / "repo", tmp_path / "out"
    (source / "onnx").mkdir(parents=True)
    onnx.save(mlp(), source / "onnx" / "model.onnx")
    (source / "README.md").write_text(CARD)
    (source / "config.json").write_text("{}")
    for bits in (8, 4):
        comq_onnx.quantize_all([source], out, samples_for(mlp()), **{**OPTIONS, "bits": bits})
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "README.md", "config.json", "onnx/model_q4.onnx", "onnx/model_quantized.onnx", "quantize_config.json",
    ]  # fmt: skip
    told = json.loads((out / "quantize_config.json").read_text())
    assert told["modes"] == ["q4", "q8"]
    sizes = [
        told["per_model_config"][name]["comq_onnx"]["measured"]["bytes_after"] for name in told["per_model_config"]
    ]
    assert sizes == [(out / "onnx" / name).stat().st_size for name in ("model_q4.onnx", "model_quantized.onnx")]
    assert (source / "README.md").read_text() == CARD


@pytest.fixture
def towers(tmp_path: Path) -> folders.Queue:
    """Make a folder with two models, and one for their samples."""
    (tmp_path / "clip").mkdir()
    for name in ("text_model.onnx", "vision_model.onnx"):
        onnx.save(mlp(), tmp_path / "clip" / name)
    (tmp_path / "calib").mkdir()
    np.savez(tmp_path / "calib" / "text_model.npz", **samples_for(mlp()))
    return folders.find_queue([tmp_path / "clip"], tmp_path / "out", Options())


def test_models_take_the_samples_of_their_names(tmp_path: Path, towers: folders.Queue) -> None:
    calib = tmp_path / "calib"
    said = (
        f"{calib}: has samples for text_model, none for vision_model; add a file or a folder of that name, such as "
        "vision_model.npz"
    )
    with pytest.raises(SamplesError) as raised:
        comq_onnx.quantize_all([tmp_path / "clip"], tmp_path / "out", calib)
    assert str(raised.value) == said
    assert not (tmp_path / "out").exists()
    (calib / "vision_model").mkdir()
    np.savez(calib / "vision_model" / "a.npz", **samples_for(mlp()))
    found = folders.samples_by_name(towers, calib, {})
    assert {model.stem: path.name for model, path in found.items()} == {
        "text_model": "text_model.npz", "vision_model": "vision_model"
    }  # fmt: skip
    done = comq_onnx.quantize_all([tmp_path / "clip"], tmp_path / "out", calib, **OPTIONS)
    assert [one.report and one.report.samples["source"] for one in done] == [str(p) for p in found.values()]


def test_samples_of_no_name_are_for_all(tmp_path: Path, towers: folders.Queue) -> None:
    calib = tmp_path / "calib"
    (calib / "text_model.npz").rename(calib / "some.npz")
    assert folders.samples_by_name(towers, calib, {}) == {}
    assert folders.samples_by_name(towers, calib / "some.npz", {}) == folders.samples_by_name(towers, None, {}) == {}
