"""The command line: exit codes, one line for every foreseen error, and what is printed where."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from command import Said, files, run
from onnx import helper
from PIL import Image

import comq_onnx
from comq_onnx import errors, evaluate
from comq_onnx.bits import choose
from comq_onnx.cli import command as cli
from comq_onnx.model import files as writing
from models import attention, build, cnn, codes, infer, mlp, normal, samples_for, weight, worst_sqnr

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"OMP_NUM_THREADS": "1"}


def module(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m comq_onnx` in a process of its own."""
    command = [sys.executable, "-m", "comq_onnx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


# A run that works


def test_a_model_is_quantized_from_a_shell(files: Path) -> None:
    done = module(files / "mlp.onnx", "--calib", files / "mlp.npz", "--bits", 8, "-o", files / "q.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    assert "fc1" in done.stdout
    assert "q.onnx" in done.stdout
    assert worst_sqnr(files / "mlp.onnx", files / "q.onnx", samples_for(mlp())) >= 25


def test_an_error_is_one_line_in_a_shell_too(files: Path) -> None:
    done = module(files / "none.onnx", "-o", files / "q.onnx")
    assert done.returncode == 3
    assert done.stdout == ""
    assert re.fullmatch(r"comq-onnx: .*none\.onnx: no such file[^\n]*\n", done.stderr)


def test_the_installed_command_is_the_module() -> None:
    command = shutil.which("comq-onnx", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run([command, "--version"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0
    assert comq_onnx.version() in done.stdout


def test_the_version_is_printed(run: Callable[..., Said]) -> None:
    said = run("--version")
    assert said.code == 0
    assert comq_onnx.version() in said.out


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_option_with_its_meaning(run: Callable[..., Said], option: str) -> None:
    said = run(option)
    assert said.code == 0
    for parameter in cli.command.params:
        if isinstance(parameter, click.Option):
            assert all(name in said.out for name in parameter.opts)
            assert parameter.help
    words = " ".join(said.out.split())
    assert "Exit codes: 0 done, 2 the command line, 3 the model, 4 the samples, 5 the runtime" in words


def test_the_exit_codes_of_the_help_are_those_of_the_errors() -> None:
    kinds = (errors.OptionError, errors.ModelError, errors.SamplesError, errors.RuntimeFailure)
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5]


def test_a_plan_lists_the_layers_and_writes_nothing(run: Callable[..., Said], files: Path) -> None:
    before = sorted(files.iterdir())
    said = run(files / "cnn.onnx", "--plan", "-o", files / "q.onnx")
    assert said.code == 0
    for name in ("stem", "depthwise", "point", "head"):
        assert name in said.out
    assert sorted(files.iterdir()) == before


def test_a_quiet_run_prints_nothing(run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # which of two tiny models is faster is chance, and the slower one is warned about
    monkeypatch.setattr(evaluate, "latency", lambda *_, **__: [1.0, 1.0])
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "-q")
    assert said == Said(0, "", "")
    assert (files / "q.onnx").exists()


def test_a_quiet_run_still_warns(run: Callable[..., Said], files: Path) -> None:
    said = run(files / "mlp.onnx", "-o", files / "q.onnx", "-q", "--samples", 20)
    assert (said.code, said.out) == (0, "")
    assert all(line.startswith("warning: ") for line in said.err.splitlines())
    assert "synthetic" in said.err


def test_a_verbose_run_logs_every_layer(run: Callable[..., Said], files: Path) -> None:
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "-v")
    assert said.code == 0
    assert "fc1: error" in said.err
    assert "fc2: error" in said.err


def test_the_json_report_holds_every_figure(run: Callable[..., Said], files: Path) -> None:
    said = run(
        files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx", "--json", files / "report.json",
        "--exclude", "stem",
    )  # fmt: skip
    assert said.code == 0
    report = json.loads((files / "report.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert set(report) >= {
        "model", "output", "version", "target", "bits", "samples", "seconds", "peak_rss_mb", "size", "layers",
        "skipped", "outputs", "latency_ms",
    }  # fmt: skip
    assert report["model"] == str(files / "cnn.onnx")
    assert report["output"] == str(files / "q.onnx")
    assert (report["target"], report["bits"]) == ("ort-cpu", 4)
    assert report["samples"] == {"source": str(files / "cnn.npz"), "used": 35, "held_back": 5}
    assert set(report["seconds"]) >= {"load", "calibrate", "solve", "emit", "compare", "total"}
    assert report["size"] == {
        "before": (files / "cnn.onnx").stat().st_size, "after": (files / "q.onnx").stat().st_size
    }  # fmt: skip
    assert [layer["name"] for layer in report["layers"]] == ["depthwise", "point", "head"]
    assert set(report["layers"][0]) >= {
        "name", "op", "weight_shape", "bits", "granularity", "error_db", "rtn_error_db", "seconds"
    }  # fmt: skip
    assert "--exclude" in report["skipped"]["stem"]
    assert set(report["outputs"][0]) == {"name", "sqnr_db", "cosine", "top1_agreement"}
    assert set(report["latency_ms"]) == {"before", "after"}
    assert report["peak_rss_mb"] > 0


def test_a_plan_has_a_json_report_too(run: Callable[..., Said], files: Path) -> None:
    assert run(files / "mlp.onnx", "--plan", "--json", files / "plan.json").code == 0
    report = json.loads((files / "plan.json").read_text())
    assert [layer["error_db"] for layer in report["layers"]] == [None, None]


def test_a_perfect_layer_is_json_too(run: Callable[..., Said], files: Path) -> None:
    # weights on the grid have no error: minus infinity dB has no JSON number
    model = build(
        "g (float[batch, 32] x) => (float[batch, 16] y) { [fc] y = MatMul (x, w) }",
        {"w": np.random.default_rng(0).choice([-7, -3, 0, 5, 7], (32, 16)).astype(np.float32)},
    )
    onnx.save(model, files / "m.onnx")
    said = run(
        files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "--json", files / "r.json",
        "--activations", "none",
    )  # fmt: skip
    assert said.code == 0
    json.loads((files / "r.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    # the weights are exact, but ONNX Runtime's MatMulNBits rounds activations to 8 bits in blocks: some 45 dB
    assert worst_sqnr(files / "m.onnx", files / "q.onnx", samples_for(mlp())) > 40


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", 3],
        ["--bits", 8, "--bits-for", "head=4", "--bits-for", "^point$=2"],
        ["--granularity", "tensor", "--asymmetric"],
        ["--activations", "none", "--granularity", 16],
        ["--activations", "16"],
        ["--solver", "rtn", "--independent", "--batch-size", 3, "--seed", 9],
        ["--solver", "paper", "--memory", 0, "--samples", 10],
        ["--solver", "paper", "--order", "cyclic", "--sweeps", 1, "--shrink", 0.9],
        ["--solver", "gptq", "--bits", 3],
        ["--effort", "fast"],
        ["--effort", "default", "--solver", "gptq"],
        ["--effort", "max", "--granularity", 16],
        ["--include", "head", "--include", "point", "--device", "cpu", "--target", "ort-cpu"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_every_option_works(run: Callable[..., Said], files: Path, options: list[object]) -> None:
    said = run(files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx", *options)
    assert said.code == 0
    assert infer(files / "q.onnx", samples_for(cnn()))["logits"].shape == (40, 10)


def test_every_solver_and_effort_gives_another_model_that_runs(run: Callable[..., Said], files: Path) -> None:
    ways = {
        "fast": ["--effort", "fast"], "default": [], "max": ["--effort", "max"], "gptq": ["--solver", "gptq"],
        "rtn": ["--solver", "rtn"], "greedy": ["--solver", "paper"],
        "cyclic": ["--solver", "paper", "--order", "cyclic"], "one sweep": ["--solver", "paper", "--sweeps", 1],
        "shrunk": ["--solver", "paper", "--shrink", 0.7],
    }  # fmt: skip
    found = {}
    for name, options in ways.items():
        said = run(
            files / "mlp.onnx", "--calib", files / "mlp.npz", "--bits", 3, "-o", files / f"{name}.onnx", *options
        )
        assert said.code == 0
        found[name] = b"".join(array.tobytes() for _, array in sorted(codes(files / f"{name}.onnx").items()))
        # 3 bits of normal weights: 15 dB a layer, two layers, little less
        assert worst_sqnr(files / "mlp.onnx", files / f"{name}.onnx", samples_for(mlp())) > 8
    assert len(set(found.values())) == len(ways)


@pytest.mark.parametrize(
    ("told", "default"),
    [
        (["--effort", "default"], []),
        (["--solver", "comq"], []),
        (["--solver", "paper", "--order", "greedy"], ["--solver", "paper"]),
        (["--solver", "paper", "--sweeps", 3], ["--solver", "paper"]),
        (["--solver", "paper", "--shrink", 0.8], ["--solver", "paper"]),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_the_defaults_are_what_help_and_the_paper_say(
    run: Callable[..., Said], files: Path, told: list[object], default: list[object]
) -> None:
    for name, options in (("told", told), ("default", default)):
        arguments = ("--calib", files / "mlp.npz", "--bits", 3, "--uniform", "-o", files / f"{name}.onnx")
        assert run(files / "mlp.onnx", *arguments, *options).code == 0
    one, other = codes(files / "told.onnx"), codes(files / "default.onnx")
    assert list(one) == list(other)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_name_with_brackets_is_printed_as_it_is(run: Callable[..., Said], files: Path) -> None:
    # rich takes [bold] for markup
    model = mlp()
    model.graph.node[0].name = "/block[0]/[bold]fc"
    onnx.save(model, files / "m.onnx")
    said = run(files / "m.onnx", "--plan")
    assert "/block[0]/[bold]fc" in "".join(said.out.split())


@pytest.mark.parametrize("name", ["[red]q.onnx", "[", "q[", "x]y.onnx"])
def test_a_path_with_brackets_is_printed_as_it_is(run: Callable[..., Said], files: Path, name: str) -> None:
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / name)
    assert said.code == 0
    assert f"{files / name}\n" in said.out
    assert (files / name).exists()


def test_a_closing_tag_in_a_name_is_no_error(run: Callable[..., Said], files: Path) -> None:
    model = mlp()
    model.graph.node[0].name = "a[/b]"
    onnx.save(model, files / "m.onnx")
    said = run(files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert said.code == 0
    assert "a[/b]" in said.out


# Runs that do not


def text_file(folder: Path) -> None:
    (folder / "m.onnx").write_text("no model\n" * 100)


def truncated(folder: Path) -> None:
    whole = (folder / "mlp.onnx").read_bytes()
    (folder / "m.onnx").write_bytes(whole[: len(whole) // 2])


def saved(model: onnx.ModelProto) -> Callable[[Path], None]:
    """A change that writes `model` to m.onnx."""
    return lambda folder: onnx.save(model, folder / "m.onnx")


def edited(**changes: object) -> onnx.ModelProto:
    """The MLP with another ir_version, opset, node or attribute."""
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


def assert_one_line(said: Said, code: int, words: str, folder: Path) -> None:
    """One line on stderr that holds `words`, nothing on stdout, the exit code, no output and nothing half-written."""
    assert (said.code, said.out) == (code, "")
    assert len(said.err.splitlines()) == 1
    assert said.err.endswith("\n")
    assert "Traceback" not in said.err
    assert words in said.err
    assert not [p for p in folder.iterdir() if p.name.startswith((".comq", "q.onnx"))]


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


def test_pictures_need_a_recipe(run: Callable[..., Said], files: Path) -> None:
    (files / "photos").mkdir()
    Image.new("RGB", (20, 20)).save(files / "photos" / "a.png")
    said = run(files / "cnn.onnx", "--calib", files / "photos", "-o", files / "q.onnx")
    assert_one_line(said, 4, "--preprocess", files)
    said = run(files / "cnn.onnx", "--calib", files / "photos", "-o", files / "q.onnx", "--preprocess", "imagenot")
    assert_one_line(said, 2, "imagenot", files)


# what click itself refuses
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
    [
        *(case for case in USAGE_ERRORS),
        *(case for case in LATE_ERRORS),
        *BAD_OPTIONS,
    ],
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
    assert_one_line(run(files / "mlp.onnx", "other.onnx", "-o", files / "q.onnx"), 2, "other.onnx", files)


@pytest.mark.parametrize("where", ["directory", "missing", "itself", "symlink", "unwritable"])
def test_an_output_that_cannot_be_is_one_line_and_code_2(
    run: Callable[..., Said], files: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "link.onnx").symlink_to(files / "mlp.onnx")
    if where == "unwritable":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
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


def test_a_full_disk_is_one_line_and_code_2(
    run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert_one_line(said, 2, "No space left on device", files)


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


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(KeyboardInterrupt, 130, "interrupted"), (MemoryError, 5, "even for one sample at once")],
)
def test_an_interrupt_and_too_little_memory_are_one_line(
    run: Callable[..., Said],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    code: int,
    words: str,
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(choose, "walk", stop)
    said = run(files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    # click ends the line that the terminal's ^C began
    assert_one_line(Said(said.code, said.out, said.err.removeprefix("\n")), code, words, files)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="other signals here")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(files: Path, number: int) -> None:
    (files / "tmp").mkdir()
    arguments = [files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx", "--effort", "max"]
    process = subprocess.Popen(
        [sys.executable, "-m", "comq_onnx", *map(str, arguments)], stderr=subprocess.PIPE, text=True,
        env={**ENVIRONMENT, "TMPDIR": str(files / "tmp")},
        # nohup would have it ignored
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not any((files / "tmp").iterdir()):
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.strip().splitlines() == [
        f"comq-onnx: {'interrupted' if number == signal.SIGINT else 'stopped'}; nothing was written"
    ]
    assert not any((files / "tmp").iterdir())
    assert not (files / "q.onnx").exists()


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


def test_the_attention_model_has_a_plan_with_its_stages(run: Callable[..., Said], files: Path) -> None:
    onnx.save(attention(), files / "attention.onnx")
    said = run(files / "attention.onnx", "--plan", "--json", files / "plan.json")
    assert said.code == 0
    stages = {layer["name"]: layer["stage"] for layer in json.loads((files / "plan.json").read_text())["layers"]}
    assert stages["q"] == stages["k"] == stages["v"] < stages["out"] < stages["up"] < stages["down"]


# What is said, where


def terminal(*arguments: object, **environment: str) -> tuple[int, str]:
    """The command on a terminal of 100 columns: its exit code and all that was shown."""
    import pty
    import select

    leader, follower = pty.openpty()
    settings = {**ENVIRONMENT, "COLUMNS": "100", "TERM": "xterm-256color", **environment}
    command = [sys.executable, "-m", "comq_onnx", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, stdin=follower, env=settings, close_fds=True)
    os.close(follower)
    shown = b""
    while True:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                part = os.read(leader, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not part:
                break
            shown += part
        elif process.poll() is not None:
            break
    os.close(leader)
    return process.wait(timeout=60), shown.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_progress_with_the_time_left_and_colours(files: Path) -> None:
    code, shown = terminal(files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx")
    assert code == 0
    for step in ("prepare", "stages", "layers", "samples", "compare"):
        assert step in shown
    assert re.search(r"layers .*\d/4", shown)
    # hours:minutes:seconds left, or what stands there before it is known
    assert re.search(r"(\d+:\d\d:\d\d|-:--:--)", shown)
    assert "\x1b[1m" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_no_color_leaves_no_colour(files: Path) -> None:
    model = files / "mlp.onnx"
    code, coloured = terminal(model, "--samples", 20, "-o", files / "q.onnx")
    assert code == 0
    colour = r"\x1b\[[\d;]*3[0-7](;\d+)*m"
    assert re.search(colour, coloured)
    code, plain = terminal(model, "--samples", 20, "-o", files / "q.onnx", NO_COLOR="1")
    assert code == 0
    assert not re.search(colour, plain)
    assert "warning: calibrated on synthetic noise" in plain


def test_what_goes_to_a_file_is_plain_and_not_cut_at_80_columns(files: Path) -> None:
    model = mlp()
    model.graph.node[0].name = "/a/long/name/of/some/forty/letters/fc1/x"
    onnx.save(model, files / "m.onnx")
    done = module(files / "m.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "/a/long/name/of/some/forty/letters/fc1/x" in line]
    assert len(line.split()) == 8


def test_the_page_is_written_and_named(run: Callable[..., Said], files: Path) -> None:
    said = run(
        files / "mlp.onnx", "--calib", files / "mlp.npz", "-o", files / "q.onnx", "--report", files / "r.html",
        "--save-config", files / "c.toml",
    )  # fmt: skip
    assert said.code == 0
    assert said.out.splitlines()[-3:] == [f"wrote    {files / name}" for name in ("q.onnx", "r.html", "c.toml")]
    page = (files / "r.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "fc1" in page
    assert run(files / "mlp.onnx", "--plan", "--report", files / "plan.html").code == 0
    assert "a plan" in (files / "plan.html").read_text()


@pytest.mark.parametrize("option", ["--report", "--save-config"])
def test_no_file_overwrites_another(run: Callable[..., Said], files: Path, option: str) -> None:
    before = (files / "mlp.onnx").read_bytes()
    arguments = ("--calib", files / "mlp.npz", "-o", files / "q.onnx", "--json", files / "r.json")
    for name in ("mlp.onnx", "q.onnx", "mlp.npz", "r.json", "no/r"):
        assert_one_line(run(files / "mlp.onnx", *arguments, option, files / name), 2, option, files)
    assert (files / "mlp.onnx").read_bytes() == before


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion_script(run: Callable[..., Said], shell: str) -> None:
    said = run("--completion", shell)
    assert (said.code, said.err) == (0, "")
    assert f"_COMQ_ONNX_COMPLETE={shell}_complete" in said.out
    assert "comq-onnx" in said.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [("comq-onnx --gran", "--granularity"), ("comq-onnx --solver g", "gptq"), ("comq-onnx m.onnx --eff", "--effort")],
)
def test_options_and_choices_are_completed(words: str, expected: str) -> None:
    command = shutil.which("comq-onnx", path=str(Path(sys.executable).parent))
    assert command is not None
    settings = {
        **ENVIRONMENT, "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1),
        "_COMQ_ONNX_COMPLETE": "bash_complete",
    }  # fmt: skip
    done = subprocess.run([command], capture_output=True, text=True, env=settings, timeout=60)
    assert done.stdout.split() == [f"plain,{expected}"]


# Suggestions


@pytest.mark.parametrize(
    ("options", "suggestion"),
    [
        (["--bitz", "4"], "--bits"),
        (["--calibb", "x"], "--calib"),
        (["--target", "ort-cp"], "did you mean ort-cpu?"),
        (["--solver", "gtpq"], "did you mean gptq?"),
        (["--solver", "COMQ "], "did you mean comq?"),
        (["--include", "depthwize"], "did you mean depthwise?"),
        (["--exclude", "^HEAD$"], "did you mean head?"),
        (["--bits-for", "piont=8"], "did you mean point?"),
        (["--completion", "bahs"], "did you mean bash?"),
    ],
)
def test_what_is_mistyped_gets_a_suggestion(
    run: Callable[..., Said], files: Path, options: list[str], suggestion: str
) -> None:
    said = run(files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx", *options)
    assert_one_line(said, 2, suggestion, files)


def test_what_is_like_nothing_gets_none(run: Callable[..., Said], files: Path) -> None:
    said = run(files / "cnn.onnx", "--calib", files / "cnn.npz", "-o", files / "q.onnx", "--include", "zzzz")
    assert "did you mean" not in said.err
    assert "--plan" in said.err
