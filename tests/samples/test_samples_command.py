"""Test samples on the command line: options, what is shown, and what is refused."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command import Said, files, run
from pictures import picture
from PIL import Image
from scipy.io import wavfile
from sounds import tone, wave_net
from texts import LINES, a_tokenizer

from comq_onnx.cli import command as cli
from models import infer, tokens

Call = Callable[..., Said]
MODELS = Path(__file__).parents[2] / "models"
CNN = MODELS / "fashion_cnn.onnx"


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    """Write pictures of what fashion_cnn knows, as files."""
    (tmp_path / "clothes").mkdir()
    with np.load(MODELS / "fashion_calib.npz") as loaded:
        pictures = loaded["image"][:48, 0]
    for i, pixels in enumerate(pictures):
        Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(tmp_path / "clothes" / f"{i}.png")
    return tmp_path / "clothes"


def test_photos_and_a_preset_are_all_it_takes(run: Call, clothes: Path, tmp_path: Path) -> None:
    said = run(
        CNN, "--calib", clothes, "--preprocess", "0-1", "--bits", 8, "-o", tmp_path / "q.onnx", "--effort", "fast"
    )
    assert (said.code, said.err) == (0, "")
    with np.load(MODELS / "fashion_test.npz") as loaded:
        image = loaded["image"][:200]
    before, after = (infer(path, {"image": image})["logits"].argmax(-1) for path in (CNN, tmp_path / "q.onnx"))
    assert (before == after).mean() > 0.97


def test_inspection_shows_what_the_model_is_fed_and_writes_nothing(run: Call, clothes: Path) -> None:
    said = run(CNN, "--calib", clothes, "--preprocess", "0-1", "--inspect-samples")
    assert said.code == 0
    assert "42 samples to calibrate on and 6 to compare on, from" in said.out
    row = next(line.split() for line in said.out.splitlines() if line.startswith("image"))
    assert row[:5] == ["image", "float32", "42x1x28x28", "0", "1"]
    assert "undecided" not in said.out
    assert "BatchNormalizations" not in said.out
    assert sorted(p.name for p in clothes.parent.iterdir()) == ["clothes"]


@pytest.mark.parametrize("wrong", [("--preprocess", "raw"), ("--mean", "0.9", "--std", "0.02")])
def test_wrong_preprocessing_is_warned_about(run: Call, clothes: Path, wrong: tuple[str, ...]) -> None:
    said = run(CNN, "--calib", clothes, *wrong, "--inspect-samples")
    assert said.code == 0
    assert "warning: these samples are not what the model was trained on" in " ".join(said.out.split())


def test_the_sheet_is_written(run: Call, clothes: Path, tmp_path: Path) -> None:
    said = run(
        CNN, "--calib", clothes, "--preprocess", "0-1", "--inspect-samples", "--contact-sheet", tmp_path / "s.png"
    )
    assert said.code == 0
    assert Image.open(io.BytesIO((tmp_path / "s.png").read_bytes())).size == (896, 448)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--contact-sheet", "s.png"), "--contact-sheet s.png: is for --inspect-samples; add that"),
        (("--inspect-samples", "-o", "q.onnx"),
         "-o: --inspect-samples only shows the samples; leave one of the two out"),
        (("--inspect-samples", "--plan"), "--plan: --inspect-samples only shows the samples; leave one of the two out"),
        (("--inspect-samples", "--json", "r.json"),
         "--json: --inspect-samples only shows the samples; leave one of the two out"),
        (("--inspect-samples", "--contact-sheet", "no/s.png"),
         "--contact-sheet no/s.png: a directory, or in one that does not exist or cannot be written"),
        (("--mean", "a,b"),
         "Invalid value for '--mean': 'a,b' is not one number, or three with commas between "
         "(comq-onnx --help lists the options)"),
        (("--resize", "3x4x5"),
         "Invalid value for '--resize': '3x4x5' is not a number of pixels, or HEIGHTxWIDTH "
         "(comq-onnx --help lists the options)"),
        (("--plan", "--mean", "1,2"), "--mean 1,2: one number, or three in the order of --channels"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(
    run: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run(CNN, *arguments)
    assert (said.code, said.err) == (2, f"comq-onnx: {line}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_of_no_pictures_is_refused(run: Call, tmp_path: Path, files: Path) -> None:
    said = run(files / "mlp.onnx", "--inspect-samples", "--contact-sheet", tmp_path / "s.png")
    line = f"comq-onnx: --contact-sheet {tmp_path / 's.png'}: the model takes no pictures of 1 or 3 channels\n"
    assert (said.code, said.err) == (2, line)
    assert not (tmp_path / "s.png").exists()


def test_every_option_of_pictures_is_heard(run: Call, tmp_path: Path, files: Path) -> None:
    for i in range(12):
        picture(40, 30, seed=i).save(tmp_path / f"{i}.png")
    plain = ("--preprocess", "raw", "--inspect-samples")
    seen = {}
    for option, value in (
        ("--mean", "100,90,80"), ("--std", "58"), ("--resize", "30"), ("--resize", "16x16"), ("--crop", "16"),
        ("--channels", "bgr"), ("--layout", "nchw"), ("--dtype", "uint8"), ("--preprocess", "imagenet"),
    ):  # fmt: skip
        said = run(files / "cnn.onnx", "--calib", tmp_path / "*.png", *plain, option, value)
        assert said.code == 0, said.err
        seen[option, value] = next(line for line in said.out.splitlines() if line.startswith("image"))
    # what these say is what the model and the preset have anyway
    same = {seen[k] for k in (("--crop", "16"), ("--layout", "nchw"), ("--dtype", "uint8"))}
    others = {v for k, v in seen.items() if k[0] not in ("--crop", "--layout", "--dtype")}
    assert len(others) == 6
    assert not others & same


# docs/samples.md


def documented_rows() -> list[str]:
    """Return the first column of the table of samples in docs/samples.md."""
    text = (MODELS.parent / "docs" / "samples.md").read_text()
    table = text.split("| samples | how they reach the model |\n|---|---|\n")[1].split("\n\n")[0]
    return [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()]


def example(row: str, folder: Path) -> tuple[list[object], Path | None]:
    """Make (arguments, samples) of a row of that table: the model with what it needs, and samples as the row says."""
    with np.load(MODELS / "fashion_calib.npz") as loaded:
        image = loaded["image"][:20]
    if "photos" in row:
        (folder / "photos" / "below").mkdir(parents=True)
        for i in range(20):
            picture(seed=i).save(folder / "photos" / "below" / f"{i}.jpg")
        return [CNN, "--preprocess", "0-1"], Path("photos/**/*.jpg")
    if "lines" in row:
        onnx.save(tokens(), folder / "model.onnx")
        a_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "lines.txt").write_text("\n".join(LINES))
        return ["model.onnx", "--length", 6], Path("lines.txt")
    if "input_0.pb" in row:
        for i in range(4):
            (folder / "data" / f"test_data_set_{i}").mkdir(parents=True)
            onnx.save_tensor(
                onnx.numpy_helper.from_array(image[i : i + 1]), folder / "data" / f"test_data_set_{i}" / "input_0.pb"
            )
        return [CNN], Path("data")
    if "a.wav" in row:
        onnx.save(wave_net(), folder / "model.onnx")
        (folder / "sounds").mkdir()
        wavfile.write(folder / "sounds" / "a.wav", 8000, tone(8000).astype(np.float32))
        return ["model.onnx", "--length", 400], Path("sounds")
    if "file.py:name" in row:
        (folder / "reader.py").write_text(
            "import numpy as np\n\ndef samples():\n    for i in range(20):\n"
            "        yield {'image': np.full((1, 1, 28, 28), i / 20, np.float32)}\n"
        )
        return [CNN], Path("reader.py:samples")
    if "npz" in row:
        np.savez(folder / "samples.npz", image=image)
        return [CNN], Path("samples.npz")
    assert row == "nothing"
    return [CNN], None


@pytest.mark.parametrize("row", documented_rows())
def test_every_documented_kind_of_samples_works(
    run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, source = example(row, tmp_path)
    calib = ["--calib", source] if source is not None else []
    said = run(*arguments, *calib, "--inspect-samples", "--samples", 16)
    assert said.code == 0, said.err
    assert f"from {source or 'synthetic'}" in said.out.replace("\n", "")


def test_the_page_on_samples_names_options_that_exist() -> None:
    known = {name for parameter in cli.command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    text = (MODELS.parent / "docs" / "samples.md").read_text()
    section = text.split("## Your model, your samples")[1].split("\n## ")[0]
    named = set(re.findall(r"--[a-z][a-z-]+", section))
    assert len(named) > 12
    assert named <= known | {"--samples"}
