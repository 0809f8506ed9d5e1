"""Test the command: what it writes and reports, with every option."""

# fixtures are imported by their names
# ruff: noqa: F401, F811

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from command import Said, files, run
from shell import ENVIRONMENT, in_shell

import comq_onnx
from comq_onnx import errors
from comq_onnx.cli import command as cli
from models import attention, build, cnn, codes, infer, mlp, samples_for, worst_sqnr


def test_a_model_is_quantized_from_a_shell(files: Path) -> None:
    done = in_shell(files / "mlp.onnx", "--calib", files / "mlp.npz", "--bits", 8, "-o", files / "q.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    assert "fc1" in done.stdout
    assert "q.onnx" in done.stdout
    assert worst_sqnr(files / "mlp.onnx", files / "q.onnx", samples_for(mlp())) >= 25


def test_an_error_is_one_line_in_a_shell_too(files: Path) -> None:
    done = in_shell(files / "none.onnx", "-o", files / "q.onnx")
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
    codes = "0 done, 1 a fault of comq-onnx, 2 the command line, 3 the model, 4 the samples, 5 the runtime;"
    assert f"Exit codes: {codes}" in words


def test_the_exit_codes_of_the_help_are_those_of_the_errors() -> None:
    kinds = (errors.OptionError, errors.ModelError, errors.SamplesError, errors.RuntimeFailure)
    assert [kind.exit_code for kind in kinds] == [2, 3, 4, 5]


# Plans and reports ----------------------------------------------------------------------------------------------------


def test_a_plan_lists_the_layers_and_writes_nothing(run: Callable[..., Said], files: Path) -> None:
    before = sorted(files.iterdir())
    said = run(files / "cnn.onnx", "--plan", "-o", files / "q.onnx")
    assert said.code == 0
    for name in ("stem", "depthwise", "point", "head"):
        assert name in said.out
    assert sorted(files.iterdir()) == before


def test_the_attention_model_has_a_plan_with_its_stages(run: Callable[..., Said], files: Path) -> None:
    onnx.save(attention(), files / "attention.onnx")
    said = run(files / "attention.onnx", "--plan", "--json", files / "plan.json")
    assert said.code == 0
    stages = {layer["name"]: layer["stage"] for layer in json.loads((files / "plan.json").read_text())["layers"]}
    assert stages["q"] == stages["k"] == stages["v"] < stages["out"] < stages["up"] < stages["down"]


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
    assert set(report["outputs"][0]) == {"name", "sqnr_db", "cosine", "top1_agreement", "changed"}
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


def test_the_demo_runs_the_command_that_it_prints(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = run("--demo")
    assert (said.code, said.err) == (0, "")
    first = said.out.splitlines()[0]
    assert first.startswith("$ comq-onnx comq-demo/model.onnx --calib comq-demo/samples.npz --bits 4 -o ")
    assert sorted(path.name for path in (tmp_path / "comq-demo").iterdir()) == [
        "model.onnx", "model_q.onnx", "report.html", "samples.npz",
    ]  # fmt: skip
    assert "17 layers" in said.out


@pytest.mark.parametrize("found", [True, False])
def test_open_shows_the_page_in_the_browser(
    run: Callable[..., Said], files: Path, monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(cli.webbrowser, "open", lambda address: opened.append(address) or found)
    said = run(files / "mlp.onnx", "--plan", "--report", files / "plan.html", "--open")
    assert (said.code, opened) == (0, [(files / "plan.html").as_uri()])
    assert ("no browser was found" in said.err) != found


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


# Options --------------------------------------------------------------------------------------------------------------


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
