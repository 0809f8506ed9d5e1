"""Test samples from Python: callables, readers, loaders and datasets, batches and single samples, pictures, texts."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inputs import BERT, NCHW, VECTOR, an_input
from onnxruntime.quantization import CalibrationDataReader
from pictures import picture
from texts import LINES, a_tokenizer

import comq_onnx
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Clues
from models import mlp, normal, several_inputs

X = normal(24, 32)


class Reader(CalibrationDataReader):
    """Stand for the reader that a user of onnxruntime.quantization has already."""

    def __init__(self) -> None:
        self.feeds = iter([{"x": X[i : i + 1]} for i in range(24)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


class Tensor:
    """Stand for a tensor of PyTorch, with as much of it as is used; numpy alone cannot read it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def detach(self) -> Tensor:
        return self

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        return self.array


class Loader:
    """Give what a DataLoader gives: lists of a batch of inputs and one of labels, again on each pass."""

    def __iter__(self) -> Iterator[list[Any]]:
        for i in range(0, 24, 5):
            yield [Tensor(X[i : i + 5]), Tensor(np.zeros(5))]


class Indexed:
    """Stand for a map-style dataset of PyTorch: no iteration, no end but its length."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return X[index % 24], 3


def single() -> Iterator[np.ndarray]:
    """Yield samples one at a time, without a batch axis."""
    yield from X


@pytest.mark.parametrize(
    "source",
    [
        Reader, Reader(), Loader(), Indexed(), single, single(), [{"x": X[:12]}, {"x": X[12:]}], lambda: {"x": X},
        [{"x": row.tolist(), "label": 3} for row in X], [(row, 3) for row in X],
        (X[i : i + 4] for i in range(0, 24, 4)),
    ],
    ids=["class", "reader", "loader", "indexed", "function", "generator", "batches", "mapping", "rows", "pairs",
         "arrays"],
)  # fmt: skip
def test_whatever_gives_samples_gives_the_same(source: Any) -> None:
    np.testing.assert_allclose(load_samples(source, VECTOR).arrays["x"], X, rtol=1e-6)


def test_no_more_is_asked_for_than_wanted() -> None:
    asked = itertools.count()
    endless = ({"x": X[next(asked) % 24][None]} for _ in itertools.repeat(None))
    assert len(load_samples(endless, VECTOR, count=10)) == 10
    assert next(asked) == 10


def test_feeds_whose_batch_is_anywhere_are_complete_feeds() -> None:
    inputs = [an_input(None, 4, name="a"), an_input(2, None, 3, name="state"), an_input(name="rate", dtype=np.int64)]
    feeds = [{"a": normal(1, 4), "state": normal(2, 1, 3), "rate": np.int64(8000)} for _ in range(6)]
    made = load_samples(feeds, inputs)
    assert made.per_item == {"a", "state"}
    assert made.shared == {"rate"}
    assert made.arrays["state"].shape == (6, 2, 1, 3)


def test_pictures_in_memory_are_preprocessed_like_files(tmp_path: Path) -> None:
    for i in range(3):
        picture(seed=i).save(tmp_path / f"{i}.png")
    files = load_samples(tmp_path, NCHW, SampleOptions("imagenet")).arrays["image"]
    rows = [{"img": picture(seed=i), "label": i, "name": 3} for i in range(3)]
    for source in (rows, [row["img"] for row in rows]):
        np.testing.assert_array_equal(load_samples(source, NCHW, SampleOptions("imagenet")).arrays["image"], files)


def test_texts_in_memory_are_tokenized_like_lines(tmp_path: Path) -> None:
    a_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    files = load_samples(tmp_path / "lines.txt", BERT, clues=Clues(tmp_path)).arrays["input_ids"]
    rows = [{"text": line, "title": "the fox"} for line in LINES]
    for source in (LINES, rows, [{"sentence": line, "label": 1} for line in LINES]):
        made = load_samples(source, BERT, clues=Clues(tmp_path)).arrays["input_ids"]
        np.testing.assert_array_equal(made, files)
    other = load_samples(rows, BERT, SampleOptions(text_field="title"), clues=Clues(tmp_path)).arrays["input_ids"]
    assert other.shape == (len(LINES), 4)


CODE = """
    import numpy as np
    from beside import scale

    def samples():
        for i in range(40):
            yield {"x": np.random.default_rng(i).standard_normal((1, 32)).astype(np.float32) * scale}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a module in the current folder that imports one beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "my_samples.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "beside.py").write_text("scale = 2")
    return tmp_path / "my_samples.py"


@pytest.mark.parametrize("form", ["my_samples:samples", "my_samples.py:samples", "full"])
def test_code_is_named_by_its_module_or_its_file(module: Path, form: str) -> None:
    source = f"{module}:samples" if form == "full" else form
    report = comq_onnx.quantize(mlp(), module.parent / "q.onnx", source, bits=8, device="cpu")
    assert report.samples == {"source": source, "used": 35, "held_back": 5}


def test_code_beside_a_model_is_never_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "samples.py").write_text("raise SystemExit('ran')")
    onnx.save(mlp(), tmp_path / "model.onnx")
    np.savez(tmp_path / "s.npz", x=X)
    comq_onnx.plan(tmp_path / "model.onnx", tmp_path, device="cpu")
    comq_onnx.plan(tmp_path / "model.onnx", device="cpu")


def test_a_reader_gives_several_inputs(tmp_path: Path) -> None:
    feeds = [
        {"image": normal(2, 3, 8, 8, seed=i), "vector": normal(2, 20, seed=i), "use": np.array([[True], [False]]),
         "count": np.array([[1], [2]])}
        for i in range(20)
    ]  # fmt: skip
    report = comq_onnx.quantize(several_inputs(), tmp_path / "q.onnx", feeds, bits=8, device="cpu")
    assert report.samples["used"] == 35
    assert report.outputs[0].sqnr_db >= 25
