"""Where samples come from, what fits a model, and what is refused: nothing is unpickled, nothing is guessed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from inputs import GREY, NCHW, NHWC, VECTOR, Input, an_input
from pictures import picture
from PIL import Image

import comq_onnx
from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.runtime import memory
from comq_onnx.samples.images.preprocess import PREPROCESS
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Clues, Samples
from models import Arrays, build, cnn, infer, mlp, normal, samples_for, several_inputs, tokens, weight

Run = Callable[..., Any]


# Files of arrays


@pytest.mark.parametrize("form", ["npz", "compressed", "npy", "folder", "mapping", "lists"])
def test_arrays_are_read_whatever_the_form(tmp_path: Path, form: str) -> None:
    x = normal(24, 32)
    source: Any = tmp_path / "s.npz"
    match form:
        case "npz":
            np.savez(source, x=x)
        case "compressed":
            np.savez_compressed(source, x=x)
        case "npy":
            source = tmp_path / "s.npy"
            np.save(source, x)
        case "folder":
            source = tmp_path
            for i in range(3):
                np.savez(tmp_path / f"part{i}.npz", x=x[8 * i : 8 * i + 8])
        case "mapping":
            source = {"x": x}
        case "lists":
            source = {"x": [list(map(float, row)) for row in x]}
    np.testing.assert_array_equal(load_samples(source, VECTOR).arrays["x"], x)


def test_a_folder_of_npy_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    x = normal(6, 32)
    for i in (2, 0, 1):
        np.save(tmp_path / f"{i}.npy", x[2 * i : 2 * i + 2])
    np.testing.assert_array_equal(load_samples(tmp_path, VECTOR).arrays["x"], x)


def test_arrays_that_no_input_wants_are_ignored_in_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", x=normal(8, 32), label=np.arange(8))
    assert list(load_samples(tmp_path / "s.npz", VECTOR).arrays) == ["x"]


def test_a_folder_is_quantized_from(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    samples = samples_for(mlp())["x"]
    for i in range(4):
        np.savez(tmp_path / "parts" / f"{i}.npz", x=samples[10 * i : 10 * i + 10])
    report = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", tmp_path / "parts", bits=8, device="cpu")
    assert report.samples == {"source": str(tmp_path / "parts"), "used": 35, "held_back": 5}


# What does not fit


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"X": normal(8, 32)}, "arrays 'X'.* 'x'"),
        ({"x": normal(8, 32), "z": normal(8, 2)}, "'z'"),
        ({}, "none"),
        ({"x": normal(8, 31)}, r"\(8, 31\); expected \[n, 32\]"),
        ({"x": normal(8)}, r"\(8,\); expected \[n, 32\]"),
        ({"x": np.float32(3)}, "no samples"),
        ({"x": normal(2, 2, 2, 32)}, "expected"),
        ({"x": normal(0, 32)}, "no samples"),
        ({"x": normal(8, 32).astype(complex)}, "complex128"),
        ({"x": np.full((8, 32), "a")}, "the model wants float32"),
        (
            {"x": np.where(np.arange(8)[:, None] == 5, np.nan, normal(8, 32))},
            "NaN or Inf in 1 of 8 samples, first in 5",
        ),
        (
            {"x": np.where(np.arange(8)[:, None] >= 6, np.inf, normal(8, 32))},
            "NaN or Inf in 2 of 8 samples, first in 6",
        ),
        ({"x": np.full((8, 32), 1e300)}, "NaN or Inf"),
    ],
)
def test_arrays_that_cannot_fit_are_refused_with_what_was_expected(arrays: dict[str, Any], words: str) -> None:
    with np.errstate(over="ignore"), pytest.raises(SamplesError, match=words):
        load_samples(arrays, VECTOR)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (np.uint8, np.float32),
        (np.int8, np.float32),
        (np.int16, np.float32),
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float16),
        (np.int64, np.int32),
        (np.int32, np.int64),
        (np.uint8, np.int64),
        (np.int64, np.bool_),
    ],
)
def test_dtypes_that_lose_nothing_are_converted(given: Any, wanted: Any) -> None:
    array = np.array([[0, 1], [1, 0], [1, 1]], given)
    got = load_samples({"x": array}, [an_input(None, 2, dtype=wanted)]).arrays["x"]
    assert got.dtype == wanted
    np.testing.assert_array_equal(got.astype(float), array.astype(float))


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.array([[300], [1]]), np.uint8),
        (np.array([[-1], [1]]), np.uint32),
        (np.array([[2], [1]]), np.bool_),
        (np.array([[1.5], [1.0]]), np.int64),
        (np.array([[1.0], [1.0]]), np.bool_),
    ],
)
def test_dtypes_that_lose_numbers_are_refused(array: np.ndarray, wanted: Any) -> None:
    with pytest.raises(SamplesError, match="the model wants"):
        load_samples({"x": array}, [an_input(None, 1, dtype=wanted)])


def test_arrays_of_different_counts_are_refused() -> None:
    inputs = [an_input(None, 4, name="a"), an_input(None, 4, name="b")]
    with pytest.raises(SamplesError, match=r"different numbers of samples: \{'a': 8, 'b': 7\}"):
        load_samples({"a": normal(8, 4), "b": normal(7, 4)}, inputs)


def test_parts_of_different_shapes_are_refused_by_the_files_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", normal(4, 32))
    np.save(tmp_path / "b.npy", normal(4, 31))
    with pytest.raises(SamplesError, match=r"b\.npy"):
        load_samples(tmp_path, VECTOR)


def test_parts_of_different_names_are_refused_by_the_files_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=normal(4, 32))
    np.savez(tmp_path / "b.npz", y=normal(4, 32))
    with pytest.raises(SamplesError, match=r"b\.npz"):
        load_samples(tmp_path, VECTOR)


def test_one_array_for_several_inputs_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", normal(4, 32))
    with pytest.raises(SamplesError, match=r"one array for 2 inputs \(a, b\)"):
        load_samples(tmp_path / "a.npy", [an_input(None, 32, name="a"), an_input(None, 32, name="b")])


@pytest.mark.parametrize("name", ["s.md", "s.onnx", "s.csv"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("1, 2, 3")
    with pytest.raises(SamplesError, match=r"samples are \.npz, \.npy, input_<i>\.pb"):
        load_samples(tmp_path / name, VECTOR)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="no such file or folder"):
        load_samples(tmp_path / "nothing.npz", VECTOR)
    with pytest.raises(SamplesError, match="the folder holds no samples"):
        load_samples(tmp_path, VECTOR)


@pytest.mark.parametrize("name", ["s.npz", "s.npy"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no zip", b"\x93NUMPY\x01\x00", b"text"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SamplesError, match="cannot be read"):
        load_samples(tmp_path / name, VECTOR)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"s.{suffix}"
    if suffix == "npz":
        np.savez_compressed(path, x=normal(100, 32))
    else:
        np.save(path, normal(100, 32))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(SamplesError, match=path.name):
        load_samples(path, VECTOR)


def test_a_damaged_member_of_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.npz"
    np.savez_compressed(path, x=normal(100, 32))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(SamplesError, match="cannot be read"):
        load_samples(path, VECTOR)


class _Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("suffix", ["npz", "npy", "pickle called npy"])
def test_nothing_is_ever_unpickled(tmp_path: Path, suffix: str) -> None:
    array = np.array([_Trap(tmp_path / "sprung")], dtype=object)
    path = tmp_path / ("s.npz" if suffix == "npz" else "s.npy")
    if suffix == "npz":
        np.savez(path, x=array)
    elif suffix == "npy":
        np.save(path, array, allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    with pytest.raises(SamplesError, match="without pickles"):
        load_samples(path, VECTOR)
    assert not (tmp_path / "sprung").exists()


def _npy(shape: object, content: bytes, descr: str = "<f4", version: tuple[int, int] = (1, 0)) -> bytes:
    """An .npy file whose header says what it likes."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return (
        b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(header)) + header + content
    )


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_npy("(1099511627776, 32)", bytes(128)), "should hold"),
        (_npy("(4611686018427387904, 4611686018427387904)", bytes(128)), "should hold"),
        (_npy("(-1, 32)", bytes(128)), "should hold"),
        (_npy("(2, 32)", bytes(128)), "should hold"),
        (_npy("(2, 32", bytes(256)), "damaged header"),
        (_npy("(2, 32)", bytes(256), version=(9, 9)), "version"),
        (_npy("__import__('os').abort()", bytes(256)), "damaged header"),
        (_npy("(1,)" + "," * 60_000, bytes(4), version=(2, 0)), "damaged header"),
    ],
    ids=["terabytes", "overflow", "negative", "short", "brackets", "version", "code", "long"],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(
    tmp_path: Path, suffix: str, content: bytes, words: str
) -> None:
    path = tmp_path / f"s.{suffix}"
    if suffix == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)
    tracemalloc.start()
    with pytest.raises(SamplesError, match=words):
        load_samples(path, VECTOR)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_an_archive_that_unpacks_to_more_than_fits_is_refused(tmp_path: Path) -> None:
    # 2 MB that would become 64 GB of zeros: the members overlap
    with zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("x.npy", _npy("(131072, 32)", bytes(1 << 24)))
    whole = (tmp_path / "s.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "s.npz") as archive:
        entry = whole[archive.start_dir : whole.rindex(b"PK\x05\x06")]
    count = 4096
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(entry) * count, archive.start_dir, 0)
    (tmp_path / "s.npz").write_bytes(whole[: archive.start_dir] + entry * count + end)
    with pytest.raises(SamplesError, match=r"68\.7 GB of arrays when unpacked"):
        load_samples(tmp_path / "s.npz", VECTOR)


def test_only_the_arrays_that_are_wanted_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "s.npz", x=normal(10, 32), other=np.zeros(100_000))
    monkeypatch.setattr(memory, "free", lambda: 10_000)
    assert len(load_samples(tmp_path / "s.npz", VECTOR)) == 10


def test_members_that_lead_elsewhere_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "s.npz", "w") as archive:
        for name in ("x.npy", "../up.npy", "/etc/comq.npy"):
            archive.writestr(name, _npy("(4, 32)", bytes(512)))
    assert len(load_samples(tmp_path / "in" / "s.npz", VECTOR)) == 4
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "s.npz"]


def test_samples_keep_their_numbers_in_the_source() -> None:
    samples = Samples({"x": np.arange(40)}, "a file")
    used, held = samples.split(20, 8, 3)
    for part in (used, held, used.take([3, 1, 7])):
        assert [part.number(i) for i in range(len(part))] == part.arrays["x"].tolist()


# Batches


def test_a_batch_axis_left_free_takes_any_batch_and_a_ragged_tail() -> None:
    samples = load_samples({"x": normal(10, 32)}, VECTOR)
    assert samples.batch_counts(4) == [4, 4, 2]
    batches = [b["x"] for b in samples.batches(4)]
    assert [len(b) for b in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(batches), samples.arrays["x"])


@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_is_the_only_batch_and_its_ragged_tail_is_left_out(batch: int) -> None:
    samples = load_samples({"x": normal(11, 32)}, [an_input(batch, 32)])
    assert samples.fixed_batch == batch
    assert samples.batch_counts(16) == [batch] * (11 // batch)
    assert {len(b["x"]) for b in samples.batches(16)} == {batch}


def test_arrays_with_one_axis_more_are_complete_tensors() -> None:
    samples = load_samples({"x": normal(10, 5, 32)}, [an_input(None, 32)])
    assert samples.per_item == {"x"}
    assert samples.batch_counts(16) == [1] * 10
    assert {b["x"].shape for b in samples.batches(16)} == {(5, 32)}


def test_inputs_that_fix_different_batches_are_refused() -> None:
    with pytest.raises(SamplesError, match=r"different batch sizes \[2, 4\]"):
        load_samples({"a": normal(8, 3), "b": normal(8, 3)}, [an_input(2, 3, name="a"), an_input(4, 3, name="b")])


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_with_a_fixed_batch_is_quantized(tmp_path: Path, batch: int) -> None:
    model = cnn(batch=str(batch))
    samples = {"image": normal(42, 3, 16, 16)}
    report = comq_onnx.quantize(model, tmp_path / "q.onnx", samples, bits=8, device="cpu")
    assert report.samples["used"] % batch == 0
    assert report.samples["used"] + report.samples["held_back"] <= 42
    feeds = {"image": samples["image"][:batch]}
    assert infer(tmp_path / "q.onnx", feeds)["logits"].shape == (batch, 10)
    assert report.outputs[0].sqnr_db >= 25


def test_complete_tensors_are_quantized_from(quantized: Run) -> None:
    # what a model without a batch axis, or one whose sizes differ from sample to sample, is calibrated with
    model = build(
        "g (float[12, 32] x) => (float[12, 16] y) { [fc] y = MatMul (x, w) }", {"w": weight(32, 16)}, opset=17
    )
    done = quantized(model, {"x": normal(20, 12, 32)}, per_item=True)
    assert done.report.samples["used"] + done.report.samples["held_back"] == 20


def test_several_inputs_with_ints_and_bools_are_quantized_from(quantized: Run) -> None:
    samples = samples_for(several_inputs())
    assert {a.dtype.kind for a in samples.values()} == {"f", "b", "i"}
    quantized(several_inputs(), samples)


def test_uint8_pictures_for_a_float_input_are_quantized_from(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), np.uint8)
    report = comq_onnx.quantize(cnn(), tmp_path / "q.onnx", {"image": pictures}, bits=8, device="cpu")
    assert report.outputs[0].sqnr_db >= 25


@pytest.mark.parametrize("count", [1, 0])
def test_too_few_samples_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(SamplesError):
        comq_onnx.quantize(mlp(), tmp_path / "q.onnx", {"x": normal(count, 32)})
    assert not (tmp_path / "q.onnx").exists()


def test_fewer_samples_than_two_fixed_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="at least 8 are needed"):
        comq_onnx.quantize(cnn(batch="4"), tmp_path / "q.onnx", {"image": normal(7, 3, 16, 16)})


def test_two_samples_are_enough_and_warned_about(tmp_path: Path) -> None:
    report = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", {"x": normal(2, 32)}, bits=8, device="cpu")
    assert report.samples["used"] == report.samples["held_back"] == 1
    assert any("only 1 calibration samples" in w for w in report.warnings)


# The split


@pytest.mark.parametrize("unit", [None, 4])
def test_what_is_held_back_is_never_calibrated_on(unit: int | None) -> None:
    samples = Samples({"x": np.arange(50)[:, None]}, "numbers", fixed_batch=unit)
    used, held = samples.split(32, 12, seed=3)
    assert len(used) == 32
    assert len(held) == 12
    assert not set(used.arrays["x"].ravel()) & set(held.arrays["x"].ravel())


def test_the_split_depends_on_the_seed_alone() -> None:
    samples = Samples({"x": np.arange(50)[:, None]}, "numbers")
    first, again, other = (samples.split(30, 10, seed)[1].arrays["x"].ravel().tolist() for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_at_most_the_samples_asked_for_are_used(tmp_path: Path) -> None:
    report = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", {"x": normal(100, 32)}, max_samples=33, device="cpu")
    assert report.samples["used"] == 33
    assert report.samples["held_back"] >= 1


# Images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of several kinds, some in a folder below, beside a file that is none."""
    (tmp_path / "pictures" / "below" / "deeper").mkdir(parents=True)
    root = tmp_path / "pictures"
    picture(seed=0).save(root / "a.png")
    picture(seed=1).save(root / "b.JPG", format="JPEG")
    picture(seed=2).convert("L").save(root / "below" / "c.png")
    picture(seed=3).convert("RGBA").save(root / "below" / "d.png")
    picture(seed=4).convert("P").save(root / "below" / "deeper" / "e.gif")
    picture(seed=5).convert("CMYK").save(root / "f.jpeg")
    picture(seed=6).convert("LA").save(root / "g.png")
    picture(seed=7).convert("1").save(root / "h.bmp")
    (root / "notes.txt").write_text("not a picture")
    return root


@pytest.mark.parametrize("preset", PREPROCESS)
@pytest.mark.parametrize("inputs", [NCHW, NHWC, GREY], ids=["nchw", "nhwc", "grey"])
def test_pictures_of_every_kind_become_an_input(folder: Path, preset: str, inputs: list[Input]) -> None:
    if inputs is GREY and len(PREPROCESS[preset].mean) == 3:
        pytest.skip("three means for one channel")
    array = load_samples(folder, inputs, SampleOptions(preset)).arrays["image"]
    assert array.shape == (8, *(inputs[0].dims or ())[1:])
    assert array.dtype == np.float32
    assert np.isfinite(array).all()
    assert array.std() > 0


def test_three_means_do_not_fit_a_grey_input(folder: Path) -> None:
    with pytest.raises((SamplesError, OptionError)):
        load_samples(folder, GREY, SampleOptions("imagenet"))


@pytest.mark.parametrize(("preset", "low", "high"), [("0-1", 0, 1), ("raw", 0, 255), ("imagenet-inception", -1, 1)])
def test_white_and_black_become_the_ends_of_the_range(tmp_path: Path, preset: str, low: float, high: float) -> None:
    Image.new("RGB", (20, 20), "black").save(tmp_path / "a.png")
    Image.new("RGB", (20, 20), "white").save(tmp_path / "b.png")
    array = load_samples(tmp_path, NCHW, SampleOptions(preset)).arrays["image"]
    # 255 times the float32 nearest 1 / 255 is 1 to the last bit or two
    np.testing.assert_allclose(array[0], low, atol=1e-6)
    np.testing.assert_allclose(array[1], high, rtol=1e-6)


def test_the_imagenet_numbers_are_those_everybody_uses(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (255, 128, 0)).save(tmp_path / "a.png")
    array = load_samples(tmp_path, NCHW, SampleOptions("imagenet")).arrays["image"][0]
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    np.testing.assert_allclose(array.mean(axis=(1, 2)), expected, rtol=1e-5)


def test_nchw_and_nhwc_hold_the_same_numbers(folder: Path) -> None:
    first = load_samples(folder, NCHW, SampleOptions("imagenet")).arrays["image"]
    last = load_samples(folder, NHWC, SampleOptions("imagenet")).arrays["image"]
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    left_white = Image.new("RGB", (40, 40), "black")
    left_white.paste("white", (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to show": left becomes top
    left_white.save(tmp_path / "a.png", exif=exif)
    array = load_samples(tmp_path, NCHW, SampleOptions("0-1")).arrays["image"][0, 0]
    assert array[:4].min() > 0.9
    assert array[-4:].max() < 0.1


def test_the_centre_is_cropped(tmp_path: Path) -> None:
    wide = Image.new("RGB", (80, 20), "black")
    wide.paste("white", (30, 0, 50, 20))
    wide.save(tmp_path / "a.png")
    assert load_samples(tmp_path, NCHW, SampleOptions("0-1")).arrays["image"].min() > 0.9


def test_a_json_file_says_how_to_preprocess(folder: Path, tmp_path: Path) -> None:
    how = tmp_path / "how.json"
    how.write_text(json.dumps({"scale": 1.0, "mean": 127.5, "std": [127.5] * 3, "channels": "bgr", "resize": 16}))
    array = load_samples(folder, NCHW, SampleOptions(str(how))).arrays["image"]
    same = tmp_path / "same.json"
    same.write_text(json.dumps({"mean": [0.5], "std": 0.5, "resize": 16}))
    rgb = load_samples(folder, NCHW, SampleOptions(str(same))).arrays["image"]
    # x / 127.5 - 1 either way; float32 keeps 6 digits of numbers near 1
    np.testing.assert_allclose(array[:, ::-1], rgb, atol=2e-6)


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", "3", '{"means": [1]}', '{"mean": "big"}'],
)
def test_a_json_file_that_is_no_recipe_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "how.json").write_text(text)
    with pytest.raises(OptionError, match=r"how\.json"):
        load_samples(folder, NCHW, SampleOptions(str(tmp_path / "how.json")))


def test_a_deviation_of_zero_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "how.json").write_text('{"std": 0}')
    with np.errstate(all="ignore"), pytest.raises((OptionError, SamplesError)):
        load_samples(folder, NCHW, SampleOptions(str(tmp_path / "how.json")))


@pytest.mark.parametrize("field", ["resample", "channels", "layout", "crop", "resize", "mean", "std"])
def test_a_json_file_with_values_that_cannot_work_is_refused(folder: Path, tmp_path: Path, field: str) -> None:
    bad = {"resample": "magic", "channels": "xyz", "layout": "hwcn", "crop": 0, "resize": -3}
    text = json.dumps({field: bad.get(field, [1, 2])})
    (tmp_path / "how.json").write_text(text)
    with pytest.raises((OptionError, SamplesError)):
        load_samples(folder, NCHW, SampleOptions(str(tmp_path / "how.json")))


def test_a_preset_that_does_not_exist_is_refused_by_the_names_of_those_that_do(folder: Path) -> None:
    with pytest.raises(OptionError, match="imagenet"):
        load_samples(folder, NCHW, SampleOptions("imagenot"))


def test_pictures_without_a_recipe_are_refused(folder: Path) -> None:
    with pytest.raises(SamplesError, match="--preprocess"):
        load_samples(folder, NCHW)


def test_pictures_do_not_fit_a_model_of_vectors_or_several_inputs(folder: Path) -> None:
    for inputs in (VECTOR, [*NCHW, *VECTOR]):
        with pytest.raises(SamplesError, match="one input of rank 4"):
            load_samples(folder, inputs, SampleOptions("0-1"))


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", "half"])
def test_a_picture_that_cannot_be_read_is_named(folder: Path, content: bytes | str) -> None:
    whole = (folder / "a.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(SamplesError, match=r"broken\.png: not a readable image"):
        load_samples(folder, NCHW, SampleOptions("0-1"))


@pytest.mark.parametrize("share", [0.9, 0.4], ids=["warning", "error"])
def test_a_picture_too_large_to_be_one_is_refused(folder: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with Image.open(folder / "a.png") as opened:
        pixels = opened.width * opened.height
    # Pillow warns from its limit on, and fails from twice the limit on
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(share * pixels))
    with pytest.raises(SamplesError, match="decompression bomb"):
        load_samples(folder / "a.png", NCHW, SampleOptions("imagenet"))


def test_no_more_pictures_than_asked_for_are_read_and_the_seed_chooses(folder: Path) -> None:
    first, again, other = (
        load_samples(folder, NCHW, SampleOptions("0-1"), 3, seed).arrays["image"] for seed in (1, 1, 2)
    )
    assert len(first) == 3
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_picture_smaller_than_the_input_is_enlarged(tmp_path: Path) -> None:
    picture(5, 9).save(tmp_path / "a.png")
    assert load_samples(tmp_path, NCHW, SampleOptions("0-1")).arrays["image"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("nhwc", [False, True])
def test_a_folder_of_pictures_is_quantized_from(tmp_path: Path, nhwc: bool) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(36):
        picture(seed=i).save(tmp_path / "photos" / f"{i}.png")
    report = comq_onnx.quantize(
        cnn(nhwc=nhwc), tmp_path / "q.onnx", tmp_path / "photos", bits=8, preprocess="imagenet", device="cpu"
    )
    assert report.samples["used"] == 32
    assert report.outputs[0].sqnr_db >= 25


# Synthesis


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
    """Synthetic samples for these inputs."""
    return load_samples(None, inputs, **{"count": 20, **options}).arrays


def test_synthetic_tokens_stay_inside_the_vocabulary() -> None:
    ids = synthetic(an_input(None, None, name="ids", dtype=np.int64), clues=Clues(token_limits={"ids": 50}))["ids"]
    assert ids.min() >= 0
    assert 40 < ids.max() < 50


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
