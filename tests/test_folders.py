"""Test folders of models as they are published: what is quantized, copied and named, and what failures leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command import Said, run  # noqa: F401
from decoders import genai, merged
from texts import LINES, a_tokenizer

import comq_onnx
from comq_onnx import folders
from comq_onnx.errors import OptionError
from comq_onnx.options.options import Options
from models import build, mlp

OPTIONS: dict[str, Any] = {"device": "cpu", "uniform": True, "max_samples": 16}


def names(folder: Path) -> list[str]:
    """Return the files of a folder and of those below it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def put(folder: Path, **texts: str) -> None:
    """Write text files; a name has _json for .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name.replace("_json", ".json")).write_text(text, encoding="utf-8")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Make a folder as repositories of the hub are: two models in onnx/, one of them in half precision too."""
    put(tmp_path / "repo", config_json="{}", tokenizer_json="{}")
    (tmp_path / "repo" / "onnx").mkdir()
    (tmp_path / "repo" / "model.safetensors").write_bytes(b"the same weights")
    put(tmp_path / "repo" / ".git", HEAD="hidden")
    for name in ("model.onnx", "model_fp16.onnx", "encoder_model.onnx"):
        onnx.save(mlp(), tmp_path / "repo" / "onnx" / name)
    return tmp_path / "repo"


def test_a_folder_for_genai_comes_out_under_the_same_names(tmp_path: Path) -> None:
    source = tmp_path / "genai"
    put(source, genai_config_json='{"model": {"decoder": {"filename": "model.onnx"}}}', tokenizer_config_json="{}")
    a_tokenizer().save(str(source / "tokenizer.json"))
    data = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    onnx.save(genai(), source / "model.onnx", **data)
    (tmp_path / "lines.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    (done,) = comq_onnx.quantize_all([source], tmp_path / "out", tmp_path / "lines.txt", **OPTIONS, length=8)
    assert names(tmp_path / "out") == ["genai_config.json", "model.onnx", "tokenizer.json", "tokenizer_config.json"]
    assert done.report is not None
    assert "text tokenized with tokenizer.json beside the model" in done.report.notes
    assert done.report.output == str(tmp_path / "out" / "model.onnx")
    assert done.report.command.endswith(f"-o {tmp_path / 'out' / 'model.onnx'}")
    assert (tmp_path / "out" / "genai_config.json").read_bytes() == (source / "genai_config.json").read_bytes()
    assert names(source) == sorted([*names(tmp_path / "out"), "model.onnx.data"])


@pytest.mark.parametrize(("bits", "end"), [(8, "quantized"), (4, "q4"), (3.5, "quantized")])
def test_models_of_the_hub_are_named_by_their_bits(hub: Path, tmp_path: Path, bits: float, end: str) -> None:
    queue = folders.find_queue([hub], tmp_path / "out", Options(bits=bits))
    assert [str(job.target) for job in queue.jobs] == [f"onnx/encoder_model_{end}.onnx", f"onnx/model_{end}.onnx"]
    assert sorted(map(str, queue.copies)) == ["config.json", "tokenizer.json"]


def test_half_precision_shows_in_the_names_of_the_hub(hub: Path) -> None:
    options = Options(bits=4, float16=True, target="ort-cuda")
    queue = folders.find_queue([hub], hub.parent / "q", options)
    assert [job.target.name for job in queue.jobs] == ["encoder_model_q4f16.onnx", "model_q4f16.onnx"]


def test_a_run_may_go_to_its_own_folder_where_names_differ(
    hub: Path,
    run: Callable[..., Said],  # noqa: F811
) -> None:
    before = names(hub)
    said = run(hub, "-o", hub, "--bits", 8, "--samples", 16, "--device", "cpu")
    assert said.code == 0
    assert said.out.startswith("2 models")
    assert f"wrote    {hub}" in said.out
    made = ["onnx/encoder_model_quantized.onnx", "onnx/model_quantized.onnx"]
    assert names(hub) == sorted([*before, *made, "README.md", "quantize_config.json"])
    # a second run takes the float models again, not what the first one made
    again = folders.find_queue([hub], hub, Options(bits=8))
    assert [str(job.target) for job in again.jobs] == made


def test_what_has_no_layer_is_copied_with_its_data(tmp_path: Path, run: Callable[..., Said]) -> None:  # noqa: F811
    put(tmp_path / "in")
    tiny = build("g (float[batch, 4] x) => (float[batch, 4] y) {\n y = Add (x, b) }", {"b": np.ones(4, np.float32)})
    onnx.save(tiny, tmp_path / "in" / "post.onnx", save_as_external_data=True, location="post.bin", size_threshold=0)
    onnx.save(mlp(), tmp_path / "in" / "model.onnx")
    said = run(tmp_path / "in", "-o", tmp_path / "out", "--samples", 16, "--device", "cpu")
    assert said.code == 0
    assert names(tmp_path / "out") == ["model.onnx", "post.bin", "post.onnx"]
    assert "copied as it is: the model has no layer to quantize" in " ".join(said.out.split())
    assert (tmp_path / "out" / "post.onnx").read_bytes() == (tmp_path / "in" / "post.onnx").read_bytes()


def test_a_list_of_models_and_folders_goes_to_one_folder(tmp_path: Path, hub: Path) -> None:
    onnx.save(mlp(), tmp_path / "a.onnx")
    queue = folders.find_queue([tmp_path / "a.onnx", hub], tmp_path / "out", Options())
    assert [str(job.target) for job in queue.jobs] == [
        "a.onnx", "repo/onnx/encoder_model_q4.onnx", "repo/onnx/model_q4.onnx",
    ]  # fmt: skip
    assert sorted(map(str, queue.copies)) == ["repo/config.json", "repo/tokenizer.json"]


def test_a_folder_below_the_source_is_no_source(hub: Path) -> None:
    (hub / "out" / "onnx").mkdir(parents=True)
    onnx.save(mlp(), hub / "out" / "onnx" / "model.onnx")
    queue = folders.find_queue([hub], hub / "out", Options())
    assert len(queue.jobs) == 2
    # and one above is no reason to leave anything out
    assert len(folders.find_queue([hub], hub.parent, Options()).jobs) == 3


@pytest.mark.parametrize("failing", ["copy", "move"])
def test_a_failure_leaves_nothing(hub: Path, tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def pretend(model: Path, out: Path, *_: object, **__: object) -> comq_onnx.Report:
        out.write_bytes(b"quantized")
        return comq_onnx.Report(str(model), str(out), "", "", 4, [], {})

    monkeypatch.setattr(folders.pipeline, "quantize", pretend)
    if failing == "copy":
        monkeypatch.setattr(folders.shutil, "copyfile", fail)
    elif failing == "move":
        monkeypatch.setattr(folders.os, "replace", fail)
    before = names(tmp_path)
    said = {"copy": "cannot copy", "move": "cannot be written"}[failing]
    with pytest.raises(OptionError, match=said):
        comq_onnx.quantize_all([hub], tmp_path / "out")
    assert names(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_merged_decoders_are_named_as_the_hub_has_them(tmp_path: Path) -> None:
    (tmp_path / "repo" / "onnx").mkdir(parents=True)
    onnx.save(merged(genai()), tmp_path / "repo" / "onnx" / "decoder_model_merged.onnx")
    (job,) = folders.find_queue([tmp_path / "repo"], tmp_path / "out", Options()).jobs
    assert str(job.target) == "onnx/decoder_model_merged_q4.onnx"
