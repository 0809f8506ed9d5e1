"""Test that every foreseen error is one line with its exit code, and leaves nothing behind."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command import Said, files, run
from onnx import helper
from PIL import Image
from shell import ENVIRONMENT, assert_one_line

import comq_onnx
from comq_onnx.bits import choose
from comq_onnx.cli import command as cli
from comq_onnx.model import files as model_files
from models import build, mlp, normal, samples_for, weight

# Models ---------------------------------------------------------------------------------------------------------------


def text_file(folder: Path) -> None:
    """Write a text to m.onnx."""
    (folder / "m.onnx").write_text("no model\n" * 100)


def truncated(folder: Path) -> None:
    """Write the first half of a model to m.onnx."""
    whole = (folder / "mlp.onnx").read_bytes()
    (folder / "m.onnx").write_bytes(whole[: len(whole) // 2])


def saved(model: onnx.ModelProto) -> Callable[[Path], None]:
    """Make a function that writes `model` to m.onnx in a folder."""
    return lambda folder: onnx.save(model, folder / "m.onnx")


def edited(**changes: object) -> onnx.ModelProto:
    """Build the MLP with another ir_version, opset, node or attribute."""
    model = mlp()
    if "ir_version" in changes:
        model.ir_version = int(str(changes["ir_version"]))
    if "opset" in changes:
        model.opset_import[0].version = int(str(changes["opset"]))
    if "op_type" in changes:
        model.graph.node[1].op_type = str(changes["op_type"])
    if "domain" in changes:
        model.graph.node[1].domain = str(changes["domain"])
        model.opset_import.append(helper.make_opsetid(str(changes["domain"]), 1))
    if "input" in changes:
        model.graph.node[1].input[0] = str(changes["input"])
    if "cycle" in changes:
        model.graph.node[0].input[0] = model.graph.node[1].output[0]
    if "twice" in changes:
        model.graph.node[1].output[0] = model.graph.node[0].output[0]
    return model


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no such file": (lambda _: None, "no such file"),
    "an empty file": (lambda folder: (folder / "m.onnx").touch(), "empty"),
    "a text file": (text_file, "not an ONNX model"),
    "a picture": (lambda folder: Image.new("RGB", (9, 9)).save(folder / "m.onnx", format="PNG"), "m.onnx"),
    "a truncated model": (truncated, "m.onnx"),
    "a directory without a model": (lambda folder: (folder / "m.onnx").mkdir(), "0 .onnx files"),
    "an IR version of the future": (saved(edited(ir_version=99)), "IR"),
    "an opset of the future": (saved(edited(opset=999)), "pset"),
    "an operator that does not exist": (saved(edited(op_type="Frobnicate")), "Frobnicate"),
    "a domain nobody has": (saved(edited(op_type="Frobnicate", domain="my.ops")), "Frobnicate"),
    "a value that nobody makes": (saved(edited(input="nowhere")), "nowhere"),
    "a cycle": (saved(edited(cycle=True)), "m.onnx"),
    "a value made twice": (saved(edited(twice=True)), "m.onnx"),
    "a quantized model": (
        lambda folder: comq_onnx.quantize(mlp(), folder / "m.onnx", samples_for(mlp()), bits=8) and None,
        "already quantized",
    ),
    "a model without layers": (
        saved(build("g (float[batch, 32] x) => (float[batch, 32] y) { y = Relu (x) }")),
        "no layer to quantize",
    ),
    "an input that is a sequence": (
        saved(
            build(
                "g (seq(float[32]) x, float[batch, 32] z) => (int64 y, float[batch, 32] v) {"
                "y = SequenceLength (x)\n v = MatMul (z, w) }",
                {"w": weight(32, 32)},
            )
        ),
        "'x'",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
@pytest.mark.parametrize("plan", [False, True], ids=["quantize", "plan"])
def test_a_model_that_cannot_be_is_one_line_and_code_3(
    run: Callable[..., Said], files: Path, case: str, plan: bool
) -> None:
    make, words = BAD_MODELS[case]
    make(files)
    arguments = ["--plan"] if plan else ["--calib", files / "mlp.npz", "-o", files / "q.onnx"]
    assert_one_line(run(files / "m.onnx", *arguments), 3, words, files)


def test_weights_that_are_not_finite_are_code_3(run: Callable[..., Said], files: Path) -> None:
    model = mlp()
    model.graph.initializer[0].raw_data = np.full((48, 32), np.nan, np.float32).tobytes()
    onnx.save(model, files / "m.onnx")
    said = run(files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert_one_line(said, 3, "fc1", files)


def test_activations_that_are_not_finite_are_code_3(run: Callable[..., Said], files: Path) -> None:
    model = build(
        """g (float[batch, 32] x) => (float[batch, 16] y) {
            [fc1] h = MatMul (x, w)
            l = Log (h)
            [fc2] y = MatMul (l, w2)
        }""",
        {"w": weight(32, 16), "w2": weight(16, 16)},
    )
    onnx.save(model, files / "m.onnx")
    said = run(files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert_one_line(said, 3, "NaN or Inf", files)


@pytest.mark.parametrize("name", ["n" * 5000, "\x1b[31mred", "two\nlines", "\u202eback"])
def test_a_hostile_name_in_a_model_makes_no_other_line(run: Callable[..., Said], files: Path, name: str) -> None:
    model = mlp()
    model.graph.node[0].name = name
    model.graph.initializer[0].raw_data = np.full((48, 32), np.nan, np.float32).tobytes()
    onnx.save(model, files / "m.onnx")
    said = run(files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert_one_line(said, 3, "NaN or Inf", files)
    assert len(said.err) < 700
    assert said.err.rstrip("\n").isprintable()


def test_a_link_that_leads_to_itself_is_no_model(run: Callable[..., Said], files: Path) -> None:
    (files / "m.onnx").symlink_to("m.onnx")
    said = run(files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "--json", files / "r.json")
    assert_one_line(said, 3, "no such file", files)


# Samples --------------------------------------------------------------------------------------------------------------

BAD_SAMPLES: dict[str, tuple[object, str]] = {
    "another name": ({"y": normal(20, 32)}, "'y'"),
    "another width": ({"x": normal(20, 31)}, "(20, 31)"),
    "another dtype": ({"x": np.full((20, 32), "a")}, "<U1"),
    "one sample": ({"x": normal(1, 32)}, "1 sample"),
    "no sample": ({"x": normal(0, 32)}, "no samples"),
    "no array": ({}, "none"),
    "NaN": ({"x": np.where(np.arange(20)[:, None] == 3, np.nan, normal(20, 32)).astype(np.float32)}, "NaN or Inf in 1"),
    "Inf": ({"x": np.full((20, 32), np.inf, np.float32)}, "NaN or Inf in 20"),
    "a text": ("no samples here", "cannot be read"),
    "nothing there": (None, "no such file"),
    "pickles": ({"x": np.array([{"a": 1}], dtype=object)}, "pickle"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_samples_that_cannot_be_are_one_line_and_code_4(run: Callable[..., Said], files: Path, case: str) -> None:
    content, words = BAD_SAMPLES[case]
    if isinstance(content, dict):
        np.savez(files / "s.npz", **content)
    elif content is not None:
        (files / "s.npz").write_text(str(content))
    said = run(files / "mlp.onnx", "--calib", files / "s.npz", "-o", files / "q.onnx")
    assert_one_line(said, 4, words, files)


def test_token_ids_outside_the_vocabulary_are_code_4(run: Callable[..., Said], files: Path) -> None:
    model = build(
        "g (int64[batch, 5] ids) => (float[batch, 5, 8] y) {\n e = Gather (t, ids)\n y = MatMul (e, w) }",
        {"t": normal(50, 24), "w": weight(24, 8)},
    )
    onnx.save(model, files / "m.onnx")
    np.savez(files / "s.npz", ids=np.full((20, 5), 1000))
    said = run(files / "m.onnx", "--calib", files / "s.npz", "-o", files / "q.onnx")
    assert_one_line(said, 4, "indices", files)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_a_picture_that_cannot_be_read_is_code_4(run: Callable[..., Said], files: Path, content: bytes) -> None:
    (files / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (i, 99, 9)).save(files / "photos" / f"{i}.png")
    (files / "photos" / "broken.png").write_bytes(content)
    arguments = ("--calib", files / "photos", "-o", files / "q.onnx", "--preprocess")
    assert_one_line(run(files / "cnn.onnx", *arguments, "0-1"), 4, "broken.png", files)


def test_pictures_need_preprocessing(run: Callable[..., Said], files: Path) -> None:
    (files / "photos").mkdir()
    Image.new("RGB", (20, 20)).save(files / "photos" / "a.png")
    said = run(files / "cnn.onnx", "--calib", files / "photos", "-o", files / "q.onnx")
    assert_one_line(said, 4, "--preprocess", files)
    said = run(files / "cnn.onnx", "--calib", files / "photos", "-o", files / "q.onnx", "--preprocess", "imagenot")
    assert_one_line(said, 2, "imagenot", files)


# Options --------------------------------------------------------------------------------------------------------------

# refused by click itself
USAGE_ERRORS: dict[str, tuple[list[str], str]] = {
    "an option that does not exist": (["--frobnicate"], "--frobnicate"),
    "a target that does not exist": (["--target", "toaster"], "toaster"),
    "a solver that does not exist": (["--solver", "magic"], "magic"),
    "a device that does not exist": (["--device", "abacus"], "abacus"),
    "activations of 9 bits": (["--activations", "9"], "'9'"),
    "no bits": (["--bits", "0"], "0"),
    "99 bits": (["--bits", "99"], "99"),
    "bits that are no number": (["--bits", "four"], "four"),
    "no samples": (["--samples", "0"], "0"),
    "an empty batch": (["--batch-size", "0"], "0"),
    "less than no memory": (["--memory", "-1"], "-1"),
    "bits for nothing": (["--bits-for", "fc"], "fc"),
    "an effort that does not exist": (["--effort", "heroic"], "heroic"),
    "an order that does not exist": (["--solver", "paper", "--order", "random"], "random"),
    "no sweeps": (["--solver", "paper", "--sweeps", "0"], "0"),
    "half a sweep": (["--solver", "paper", "--sweeps", "0.5"], "0.5"),
    "shrunk to nothing": (["--solver", "paper", "--shrink", "0"], "0"),
    "shrunk to more than twice": (["--solver", "paper", "--shrink", "2.1"], "2.1"),
}
LATE_ERRORS: dict[str, tuple[list[str], str]] = {
    "memory that is no number": (["--memory", "nan"], "nan"),
    "a report that is a directory": (["--json", "."], "--json"),
    "a factor that is no number": (["--solver", "paper", "--shrink", "nan"], "nan"),
    "an order without the paper": (
        ["--order", "cyclic"],
        "--order cyclic: the paper's solver alone has it; add --solver paper",
    ),
    "sweeps without the paper": (["--sweeps", "2"], "add --solver paper"),
    "a factor without the paper": (["--shrink", "0.9"], "add --solver paper"),
    "an order for rounding": (["--solver", "rtn", "--order", "greedy"], "add --solver paper"),
    "an effort for rounding": (["--solver", "rtn", "--effort", "max"], "not --solver rtn"),
    "an effort for the paper": (["--solver", "paper", "--effort", "fast"], "not --solver paper"),
}
BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "a block that is no power of two": (["--granularity", "48"], "48"),
    "a granularity that does not exist": (["--granularity", "row"], "row"),
    "bits for a bad pattern": (["--bits-for", "(=4"], "regular expression"),
    "bits for a layer that is not there": (["--bits-for", "nope=4"], "nope"),
    "too many bits for a layer": (["--bits-for", "fc1=99"], "99"),
    "an include that matches nothing": (["--include", "nope"], "nope"),
    "an exclude that matches nothing": (["--exclude", "nope"], "nope"),
    "a bad pattern": (["--exclude", "["], "regular expression"),
    "a report in a directory that is not there": (["--json", "/no/such/directory/report.json"], "--json"),
}


@pytest.mark.parametrize(
    "case",
    [*USAGE_ERRORS, *LATE_ERRORS, *BAD_OPTIONS],
)
def test_an_option_that_cannot_be_is_one_line_and_code_2(
    run: Callable[..., Said], files: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, words = (USAGE_ERRORS | LATE_ERRORS | BAD_OPTIONS)[case]
    monkeypatch.chdir(files)
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", *options)
    assert_one_line(said, 2, words, files)


def test_no_model_and_no_output_are_code_2(run: Callable[..., Said], files: Path) -> None:
    assert_one_line(run(), 2, "MODEL", files)
    assert_one_line(run(files / "mlp.onnx"), 2, "-o", files)
    assert_one_line(run(files / "mlp.onnx", "other.onnx", "-o", files / "q.onnx"), 2, "go to a folder", files)


# Files that are written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["directory", "missing", "itself", "symlink", "unwritable"])
def test_an_output_that_cannot_be_is_one_line_and_code_2(
    run: Callable[..., Said], files: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "link.onnx").symlink_to(files / "mlp.onnx")
    if where == "unwritable":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(model_files.tempfile, "TemporaryFile", refuse)
    out, words = {
        "directory": (files, "is a directory"),
        "missing": (files / "no" / "q.onnx", "no such directory"),
        "itself": (files / "mlp.onnx", "never modified"),
        "symlink": (files / "link.onnx", "never modified"),
        "unwritable": (files / "q.onnx", "Permission denied"),
    }[where]
    before = (files / "mlp.onnx").read_bytes()
    assert_one_line(run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", out), 2, words, files)
    assert (files / "mlp.onnx").read_bytes() == before


def test_the_report_may_not_overwrite_the_model_or_the_output(run: Callable[..., Said], files: Path) -> None:
    before = (files / "mlp.onnx").read_bytes()
    for name in ("mlp.onnx", "q.onnx", "mlp.npz"):
        said = run(
            files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "--json", files / name
        )  # fmt: skip
        assert_one_line(said, 2, "--json", files)
    assert (files / "mlp.onnx").read_bytes() == before


@pytest.mark.parametrize("option", ["--report", "--save-config"])
def test_no_file_overwrites_another(run: Callable[..., Said], files: Path, option: str) -> None:
    before = (files / "mlp.onnx").read_bytes()
    arguments = ("--calib", files / "mlp.npz", "-o", files / "q.onnx", "--json", files / "r.json")
    for name in ("mlp.onnx", "q.onnx", "mlp.npz", "r.json", "no/r"):
        assert_one_line(run(files / "mlp.onnx", *arguments, option, files / name), 2, option, files)
    assert (files / "mlp.onnx").read_bytes() == before


def test_a_full_disk_is_one_line_and_code_2(
    run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_files.os, "replace", full)
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert_one_line(said, 2, "No space left on device", files)


def test_a_report_that_cannot_be_written_says_that_the_model_was(
    run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_report: object, path: Path) -> None:
        path.write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(comq_onnx.Report, "save_json", full)
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "--json", files / "r.json")
    assert said.code == 2
    assert len(said.err.splitlines()) == 1
    assert f"No space left on device); the model was written to {files / 'q.onnx'}" in said.err
    assert (files / "q.onnx").exists()
    assert not (files / "r.json").exists()


def test_a_report_that_cannot_be_printed_says_that_the_model_was_written(
    run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_print", full)
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert said.code == 2
    assert "the report cannot be printed (No space left on device)" in said.err
    assert f"the model was written to {files / 'q.onnx'}" in said.err


# The runtime, memory and signals --------------------------------------------------------------------------------------


def test_cuda_where_there_is_none_is_one_line_and_code_5(
    run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comq_onnx.runtime import session as runtime

    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "--device", "cuda")
    assert_one_line(said, 5, "--device cuda", files)


def test_a_missing_runtime_is_one_line_and_code_5(
    run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comq_onnx.runtime import session as runtime

    monkeypatch.setattr(runtime, "ort", None)
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert_one_line(said, 5, "comq-onnx[cpu]", files)
