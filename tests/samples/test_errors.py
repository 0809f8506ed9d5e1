"""Test every message of the samples package, whole: what was found, what was expected, what to do, in one line."""

from __future__ import annotations

import ast
import re
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from inputs import BERT, GREY, IDS, MASK, NCHW, VECTOR, an_input
from onnx import numpy_helper
from PIL import Image
from texts import a_tokenizer

import comq_onnx.samples
from comq_onnx.errors import ComqError, OptionError, SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.runtime import memory
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Clues
from comq_onnx.samples.text import read_lines
from models import normal

Act = Callable[[Path], Any]
TWO = [an_input(None, 4, name="a"), an_input(None, 4, name="b")]
WAVE = [an_input(None, 400, name="wave")]
BYTES = [an_input(None, 3, 16, 16, name="image", dtype=np.uint8)]
PAST = [IDS, MASK, an_input(None, None, None, 8, name="past_key_values.0.key")]
KINDS = "samples are .npz, .npy, input_<i>.pb, image, .wav, .txt or .jsonl files, a folder or a pattern of them, or "
KINDS += "module:name of a Python reader"
PRESETS = "imagenet, imagenet-inception, clip, 0-1, raw"
FIELDS = "scale, mean, std, resize, crop, crop_pct, channels, layout, resample, dtype"
BY_READER = "give an .npz or a Python reader"
DEEP = "[" * 100_000
BESIDE = "lies beside the model and cannot be"


def unpacking_to_much(folder: Path) -> Any:
    """Load arrays where hardly any memory is free."""
    np.savez(folder / "a.npz", x=normal(4, 32))
    with mock.patch.object(memory, "free", return_value=100):
        return load_samples(folder / "a.npz", VECTOR)


def arrays(inputs: list[Any], **given: Any) -> Act:
    """Load these arrays."""
    return lambda _: load_samples(given, inputs)


def file(name: str, content: bytes | str | np.ndarray | dict[str, np.ndarray], inputs: list[Any], **said: Any) -> Act:
    """Write a file, as numpy does where it is arrays, and load it, the model beside it."""

    def act(folder: Path) -> Any:
        write(folder / name, content)
        return load_samples(folder / name, inputs, SampleOptions(**said), clues=Clues(folder))

    return act


def write(path: Path, content: bytes | str | np.ndarray | dict[str, np.ndarray]) -> None:
    """Write a file of this content, as numpy does where it is arrays."""
    path.parent.mkdir(exist_ok=True, parents=True)
    match content:
        case bytes():
            path.write_bytes(content)
        case str():
            path.write_text(content)
        case dict():
            np.savez(path, **content)
        case _:
            np.save(path, content)


def files(inputs: list[Any], **content: Any) -> Act:
    """Write files (their names with _ for the dot) into a folder and load that."""

    def act(folder: Path) -> Any:
        for name, given in content.items():
            write(folder / "/".join(name.rsplit("__", 1)).replace("_npy", ".npy").replace("_npz", ".npz"), given)
        return load_samples(folder, inputs)

    return act


def photo(inputs: list[Any], clues: dict[str, Any] | None = None, **said: Any) -> Act:
    """Load one picture of 20 x 20 pixels."""

    def act(folder: Path) -> Any:
        Image.new("RGB", (20, 20), "red").save(folder / "a.png")
        return load_samples(folder / "a.png", inputs, SampleOptions(**said), clues=Clues(folder, **(clues or {})))

    return act


def beside(name: str, content: str, act: Act) -> Act:
    """Do the same with another file in the folder."""

    def both(folder: Path) -> Any:
        (folder / name).write_text(content)
        return act(folder)

    return both


def text(inputs: list[Any], lines: str = "the fox\nthe dog", limit: int | None = None, **said: Any) -> Act:
    """Load a text with a tokenizer beside it."""

    def act(folder: Path) -> Any:
        a_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "a.txt").write_text(lines)
        limits = {} if limit is None else {"input_ids": limit}
        return load_samples(folder / "a.txt", inputs, SampleOptions(**said), clues=Clues(folder, limits))

    return act


def chat(inputs: list[Any]) -> Act:
    """Load a conversation with a tokenizer beside it."""

    def act(folder: Path) -> Any:
        a_tokenizer().save(str(folder / "tokenizer.json"))
        return file("a.jsonl", '{"messages": [{"role": "fox", "content": "the dog"}]}', inputs)(folder)

    return act


def sound(inputs: list[Any], points: int = 500, **said: Any) -> Act:
    """Load a .wav file of 16 bits."""

    def act(folder: Path) -> Any:
        with wave.open(str(folder / "a.wav"), "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(8000)
            out.writeframes((normal(points) * 3000).astype("<i2").tobytes())
        return load_samples(folder / "a.wav", inputs, SampleOptions(**said), clues=Clues(folder))

    return act


def tensors(inputs: list[Any], **sets: np.ndarray) -> Act:
    """Load test data sets: set0_1 is input_1.pb of test_data_set_0."""

    def act(folder: Path) -> Any:
        for name, array in sets.items():
            number, index = name.removeprefix("set").split("_")
            path = folder / f"test_data_set_{number}" / f"input_{index}.pb"
            write(path, numpy_helper.from_array(array).SerializeToString())
        return load_samples(folder, inputs)

    return act


def python(code: str, name: str = "r", inputs: list[Any] = VECTOR, **said: Any) -> Act:
    """Load samples from Python source in m.py."""

    def act(folder: Path) -> Any:
        (folder / "m.py").write_text("import numpy as np\nfrom PIL import Image\n" + code)
        return load_samples(f"{folder / 'm.py'}:{name}", inputs, SampleOptions(**said))

    return act


def external_tensor() -> bytes:
    """Make a tensor whose data lie in a file of its choice."""
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    return bytes(tensor.SerializeToString())


# ~ is the folder of the test, ... what a library says
CASES: list[tuple[str, Act]] = [
    # where samples are
    (f"~/no.npz: no such file or folder of samples; {KINDS}", lambda d: load_samples(d / "no.npz", VECTOR)),
    ("~/*.jpg: no file matches this pattern", lambda d: load_samples(d / "*.jpg", NCHW)),
    (f"~: the folder holds no samples; {KINDS}", lambda d: load_samples(d, NCHW)),
    (f"~/a.csv: {KINDS}", file("a.csv", "1,2", VECTOR)),
    # arrays
    ("~/a.npz: cannot be read as numpy arrays without pickles (...)", file("a.npz", b"no", VECTOR)),
    ("~/a.npy: one array for 2 inputs (a, b); use an .npz with these names", file("a.npy", normal(8, 4), TWO)),
    ("~/a.npz: ... GB of arrays when unpacked, and ... GB of memory are free; give fewer samples", unpacking_to_much),
    ("~/a.npz: 'x' is a single number; give an array with an axis of samples",
     file("a.npz", {"x": np.float32(1)}, VECTOR)),
    ("~/b.npz: has arrays ['y'], a.npz has ['x']",
     files(VECTOR, a_npz={"x": normal(4, 32)}, b_npz={"y": normal(4, 32)})),
    ("~/b.npy: 'x' has samples of (31,), a.npy of (32,); pad them to one shape",
     files(VECTOR, a_npy=normal(4, 32), b_npy=normal(4, 31))),
    ("arrays: arrays 'y'; the model has inputs 'x': name each array like its input", arrays(VECTOR, y=normal(4, 32))),
    ("arrays: 'x' holds no samples", arrays(VECTOR, x=normal(0, 32))),
    ("arrays: 'x' has shape (8,); expected [n, 32] or [n, ?, 32], samples first", arrays(VECTOR, x=normal(8))),
    ("arrays: 'x' has shape (8, 31); expected [n, 32] or [n, ?, 32], samples first", arrays(VECTOR, x=normal(8, 31))),
    ("arrays: 'x' has NaN or Inf in 1 of 8 samples, first in 5",
     arrays(VECTOR, x=np.where(np.arange(8)[:, None] == 5, np.nan, normal(8, 32)))),
    ("arrays: the arrays hold different numbers of samples: {'a': 8, 'b': 7}",
     arrays(TWO, a=normal(8, 4), b=normal(7, 4))),
    ("arrays: the inputs fix different batch sizes [2, 4]; give complete tensors instead",
     arrays([an_input(2, 3, name="a"), an_input(4, 3, name="b")], a=normal(8, 3), b=normal(8, 3))),
    ("arrays: 'x' is complex128; the model wants float32", arrays(VECTOR, x=normal(8, 32).astype(complex))),
    # test data of ONNX
    ("~/input_0.pb: cannot be read as an ONNX tensor (...)", file("input_0.pb", b"\xff\xff no tensor", VECTOR)),
    ("~/input_0.pb: cannot be read as an ONNX tensor (its data lies in another file)",
     file("input_0.pb", external_tensor(), VECTOR)),
    ("~/test_data_set_0/input_3.pb: input number 3; the model has 2",
     tensors(TWO, set0_0=normal(1, 4), set0_3=normal(1, 4))),
    ("~/test_data_set_0: no input_<i>.pb for 'b'", tensors(TWO, set0_0=normal(1, 4))),
    ("test_data_set_1: 'x' has shape (2, 32), in test_data_set_0 (1, 32); pad them to one shape",
     tensors(VECTOR, set0_0=normal(1, 32), set1_0=normal(2, 32))),
    # options
    ("--layout nwhc: choose one of nchw, nhwc; did you mean nhwc?", lambda _: SampleOptions(layout="nwhc")),
    ("--channels cmyk: choose one of rgb, bgr, grey", lambda _: SampleOptions(channels="cmyk")),
    (
        "--dtype int4: choose one of float32, float16, uint8, int8; did you mean int8?",
        lambda _: SampleOptions(dtype="int4"),
    ),
    ("--mean 1,2: one number, or three in the order of --channels", lambda _: SampleOptions(mean=(1.0, 2.0))),
    ("--std 0: pixels are divided by it, so none may be 0", lambda _: SampleOptions(std=(0.0,))),
    ("--resize 0: whole pixels of 1 or more, one number or HEIGHTxWIDTH", lambda _: SampleOptions(resize=0)),
    ("--length 0: must be 1 or more", lambda _: SampleOptions(length=0)),
    ("--mean is for images, not for tensors (~/a.npz): leave it out, or give other samples",
     file("a.npz", {"x": normal(8, 32)}, VECTOR, mean=(0.5,))),
    ("--tokenizer is for text, not for images (~/a.png): leave it out, or give other samples",
     photo(NCHW, tokenizer="t.json")),
    ("--length is for text and sound, not for images (~/a.png): leave it out, or give other samples",
     photo(NCHW, length=3)),
    ("--crop is for images, not for text (~/a.txt): leave it out, or give other samples", text(BERT, crop=3)),
    ("--std is for images, not for sound (~/a.wav): leave it out, or give other samples", sound(WAVE, std=(3.0,))),
    ("--preprocess is for images, not for arrays: leave it out, or give other samples",
     lambda _: load_samples({"x": normal(8, 32)}, VECTOR, SampleOptions("raw"))),
    ("--preprocess is for images, not for synthetic samples of this model: leave it out, or give other samples",
     lambda _: load_samples(None, VECTOR, SampleOptions("raw"))),
    ("--preprocess is for images, not for tensors from Python: leave it out, or give other samples",
     python("r = np.zeros((1, 9, 32), np.float32)", preprocess="raw")),
    # preprocessing
    (f"images need --preprocess: one of {PRESETS}, or a JSON file with {FIELDS}; or --mean and --std; or a "
     "preprocessor_config.json beside the model", photo(NCHW)),
    (f"--preprocess 'imagenot': neither a preset ({PRESETS}) nor a JSON file", photo(NCHW, preprocess="imagenot")),
    (f"--preprocess how.json: no JSON object; expected a JSON object with some of {FIELDS}",
     beside("how.json", "[]", photo(NCHW, preprocess="how.json"))),
    (f"--preprocess how.json: crop_pct is 3, not above 0 and at most 1; expected a JSON object with some of {FIELDS}",
     beside("how.json", '{"crop_pct": 3}', photo(NCHW, preprocess="how.json"))),
    (f"--preprocess how.json: nested too deeply; expected a JSON object with some of {FIELDS}",
     beside("how.json", DEEP, photo(NCHW, preprocess="how.json"))),
    (f"~/preprocessor_config.json: {BESIDE} used (cannot convert float infinity to integer); say how to preprocess "
     "with --preprocess",
     beside("preprocessor_config.json", '{"do_resize": true, "size": {"height": 1e400, "width": 9}}', photo(NCHW))),
    ("--mean 127.5: pixels are 0..1 here; give a mean of that range, or add --preprocess raw for pixels 0..255",
     photo(NCHW, mean=(127.5,), std=(127.5,))),
    (f"~/preprocessor_config.json: {BESIDE} used (a size of longest_edge, not of shortest_edge or height and width); "
     "say how to preprocess with --preprocess",
     beside("preprocessor_config.json", '{"do_resize": true, "size": {"longest_edge": 9}}', photo(NCHW))),
    (f"~/config.json: {BESIDE} used (crop_mode 'border', not center or squash); say how to preprocess with "
     "--preprocess",
     beside("config.json", '{"input_size": [3, 9, 9], "mean": 0, "std": 1, "crop_mode": "border"}', photo(NCHW))),
    # pictures
    (f"images fit a model with one input of rank 4; this one has 'x': {BY_READER}", photo(VECTOR, preprocess="raw")),
    ("~/a.png: not a readable image (...)", file("a.png", b"none", NCHW, preprocess="raw")),
    ("three means or deviations for 'image', which has one channel: give one number to --mean and --std",
     photo(GREY, preprocess="imagenet")),
    ("--channels grey: 'image' has 3 channels, not 1", photo(NCHW, preprocess="raw", channels="grey")),
    ("images have 1 or 3 channels; 'x' has 7 first: if that is another axis give --layout, else an .npz",
     photo([an_input(None, 7, 9, 9)], preprocess="raw")),
    ("'image' takes uint8, whole numbers 0 to 255; preprocessed pixels are -2.04 to 2.25: use --preprocess raw, with "
     "--mean 128 for int8", photo(BYTES, preprocess="imagenet")),
    ("--dtype float32: 'image' takes uint8", photo(BYTES, dtype="float32")),
    # text
    ("~/a.txt: holds no text", file("a.txt", "\n \n", BERT)),
    ("~/a.txt: cannot be read (Permission denied)", lambda d: read_lines([unreadable(d / "a.txt")], None, 9, 0)),
    ("~/a.txt: after line 0: not UTF-8 (invalid start byte); convert it", file("a.txt", b"\xff\xfe\x00", BERT)),
    ("~/a.jsonl: line 2: no text in 'text' (it has words, label); choose one with --text-field",
     file("a.jsonl", '{"text": "a"}\n{"words": "b", "label": 1}', BERT)),
    ("~/a.jsonl: line 1: not JSON (...)", file("a.jsonl", "the fox", BERT)),
    ("~/a.jsonl: line 1: not JSON (nested too deeply)", file("a.jsonl", DEEP, BERT)),
    ("--text-field t: is for .jsonl files; ~/a.txt holds plain lines", file("a.txt", "a", BERT, text_field="t")),
    (f"text fits a model with an input of token ids [batch, tokens]; this one has 'x': {BY_READER}", text(VECTOR)),
    ("text needs a tokenizer.json (of the tokenizers library): put it beside the model, or name it with --tokenizer",
     file("a.txt", "a", BERT)),
    ("--tokenizer t.json: no such file, nor a folder with a tokenizer.json", text(BERT, tokenizer="t.json")),
    ("~/tokenizer.json: not a tokenizer of the tokenizers library (...)",
     lambda d: beside("tokenizer.json", "{}", file("a.txt", "a", BERT))(d)),
    ("--length 9: 'input_ids' has 16 tokens, always",
     text([an_input(None, 16, name="input_ids", dtype=np.int64)], length=9)),
    ("~/tokenizer.json: gives token 12, the model's 'input_ids' knows 9: it is another model's tokenizer; give this "
     "one's with --tokenizer", text(BERT, limit=9)),
    ("the text has 8 tokens, not the 16 of one sample: give more",
     text([an_input(None, 16, name="input_ids", dtype=np.int64)])),
    ("text fits a model with one input of strings; this one has 'a', 'b'",
     text([an_input(None, name="a", dtype=object), an_input(None, name="b", dtype=object)])),
    ("text gives no values for input 'speed'; give all inputs in an .npz or by a Python reader",
     text([IDS, MASK, an_input(None, 1, name="speed")])),
    ("'past_key_values.0.key' has no fixed heads and width, so an empty past cannot be made; give all inputs in "
     "an .npz",
     text(PAST)),
    ("~: conversations ('messages') need the chat template of the tokenizer: put its tokenizer_config.json or "
     "chat_template.jinja beside tokenizer.json, or give lines with a text", chat(BERT)),
    ("~/tokenizer_config.json: cannot be read as JSON (...)", beside("tokenizer_config.json", "{", chat(BERT))),
    ("~/tokenizer_config.json: its chat template cannot write these messages (...)",
     beside("tokenizer_config.json", '{"chat_template": "{% for"}', chat(BERT))),
    ("the model tokenizes 'a' by itself, without a chat template: give lines of text",
     chat([an_input(None, name="a", dtype=object)])),
    # sound
    ("~/a.wav: not a readable .wav file (...)", file("a.wav", b"RIFF no", WAVE)),
    ("~/a.wav: holds no sound", sound(WAVE, points=0)),
    ("~/a.wav: a sample has 400 points; the longest of 1 files has 300", sound(WAVE, points=300)),
    ("--length 9: 'wave' has 400 points, always", sound(WAVE, length=9)),
    (f"sound fits a model with one input of floats [batch, points]; this one has 'image': {BY_READER}", sound(NCHW)),
    ("sound gives no values for input 'text'; give all inputs in an .npz or by a Python reader",
     sound([*WAVE, an_input(None, 3, name="text", dtype=np.int64)])),
    (f"~/preprocessor_config.json: {BESIDE} read (...); correct or remove it",
     beside("preprocessor_config.json", '{"sampling_rate": "high"}', sound(WAVE))),
    (f"~/preprocessor_config.json: {BESIDE} read (nested too deeply); correct or remove it",
     beside("preprocessor_config.json", DEEP, sound(WAVE))),
    (f"~/preprocessor_config.json: {BESIDE} read (cannot convert float infinity to integer); correct or remove it",
     beside("preprocessor_config.json", '{"sampling_rate": 1e400}', sound(WAVE))),
    ("~/preprocessor_config.json: a sampling_rate of 0; correct or remove it",
     beside("preprocessor_config.json", '{"sampling_rate": 0}', sound(WAVE))),
    # Python
    ("~/none.py: no such Python file", lambda d: load_samples(f"{d}/none.py:r", VECTOR)),
    ("no_such_module:r: importing no_such_module failed with ModuleNotFoundError: No module named 'no_such_module'",
     lambda _: load_samples("no_such_module:r", VECTOR)),
    ("~/m.py:q: ~/m.py has no 'q'", python("r = 1", "q")),
    ("~/m.py:r: is of type int; samples from Python are a callable, a CalibrationDataReader or something that can "
     "be iterated",
     python("r = 1")),
    ("~/m.py:r: failed with ZeroDivisionError: division by zero", python("def r():\n    yield 1 / 0")),
    ("~/m.py:r: gave no samples", python("r = []")),
    ("~/m.py:r: gives 'y'; the model has inputs 'x': 'x' missing", python("r = [{'y': 1}]")),
    ("~/m.py:r: an item is of type float; the model has 2 inputs ('a', 'b'): give mappings by name",
     python("r = [1.5]", inputs=TWO)),
    ("~/m.py:r: 'x' is of type list, not an array (...)", python("r = [{'x': [[1, 2], [3]]}]")),
    ("~/m.py:r: 'x' is None, not an array of numbers", python("r = [{'x': None}]")),
    ("~/m.py:r, item 1: 'x' has samples of (31,), the first item of (32,); pad them to one shape",
     python("r = [np.zeros((2, n), np.float32) for n in (32, 31)]")),
    ("~/m.py:r, item 1: 'x' has shape (31,), in ~/m.py:r, item 0 (32,); pad them to one shape",
     python("r = [np.zeros(n, np.float32) for n in (32, 31)]")),
    ("~/m.py:r: no text in 'body'; it has 'title'", python("r = [{'title': 'a'}]", inputs=BERT, text_field="body")),
    ("~/m.py:r: text in 'title', 'body'; choose one with --text-field",
     python("r = [{'title': 'a', 'body': 'b'}]", inputs=BERT)),
    ("~/m.py:r: an item is of type int where the first has a text or a picture",
     python("r = [{'picture': Image.new('RGB', (9, 9))}, {'picture': 3}]", inputs=NCHW, preprocess="raw")),
]  # fmt: skip


def unreadable(path: Path) -> Path:
    """Make a file that cannot be opened, whoever runs the tests."""
    path.write_text("text")

    class Locked(type(path)):  # type: ignore[misc]
        def open(self, *_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied")

    return Locked(path)


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("line", "act"), CASES, ids=[re.sub(r"\W+", "-", line)[:60] for line, _ in CASES])
def test_the_whole_line(tmp_path: Path, line: str, act: Act) -> None:
    with pytest.raises((SamplesError, OptionError)) as caught:
        act(tmp_path)
    said = str(caught.value)
    pattern = re.escape(line.replace("~", str(tmp_path))).replace(re.escape("..."), ".+")
    assert re.fullmatch(pattern, said), said
    assert "\n" not in said


def raised() -> Iterator[tuple[str, int]]:
    """Yield file and line of each place in the package that raises one of the two errors."""
    for path in sorted(Path(comq_onnx.samples.__file__).parent.rglob("*.py")):
        if path.name == "dataset.py":
            continue  # wants a whole model: tests/cli/test_messages.py shows those
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.exc.func if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) else None
            if getattr(called, "id", "") in ("SamplesError", "OptionError"):
                yield path.name, node.lineno


def test_no_message_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for i, (_, act) in enumerate(CASES):
        (folder := tmp_path / str(i)).mkdir()
        monkeypatch.chdir(folder)
        try:
            act(folder)
        except ComqError as error:
            last = error.__traceback__
            while last is not None and last.tb_next is not None:
                last = last.tb_next
            assert last is not None
            seen.add((Path(last.tb_frame.f_code.co_filename).name, last.tb_lineno))
    assert sorted(set(raised()) - seen) == []
