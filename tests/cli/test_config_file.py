"""Test options in a TOML file and as a command line: they are read back as written, and a fault is one line."""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import click
import numpy as np
import onnx
import pytest

import comq_onnx
from comq_onnx import Options, pipeline
from comq_onnx.cli import command as cli
from comq_onnx.cli.config_file import load_config
from comq_onnx.cli.parameters import by_long_name, is_in_config
from comq_onnx.errors import OptionError
from comq_onnx.options import keywords
from comq_onnx.options.keywords import OptionKeywords
from comq_onnx.options.spelling import command_line, differing, long_name
from models import mlp, samples_for

EVERYTHING = [
    "--bits", "3", "--bits-for", "fc1=8", "--bits-for", "^fc=2$=4", "--include", "fc", "--exclude", "nope|never",
    "--samples", "33", "--batch-size", "5", "--target", "ort-cuda", "--activations", "none", "--granularity", "16",
    "--asymmetric", "--solver", "paper", "--order", "cyclic", "--sweeps", "2", "--shrink", "0.75", "--independent",
    "--effort", "default", "--size", "25%", "--max-drop", "1", "--uniform", "--mean", "0.5", "--std", "0.1,0.2,0.3",
    "--resize", "40", "--crop", "32x24", "--layout", "nchw", "--channels", "rgb", "--dtype", "float32", "--tokenizer",
    "t.json", "--text-field", "text", "--length", "64", "--cpu", "vnni",
    "--device", "cpu", "--seed", "7", "--memory", "1.5", "--workdir", "kept", "--preprocess", "imagenet",
    "--workers", "2", "--nbits-op", "--float16",
    "--json", "r.json", "--report", "r.html", "-o", "q.onnx", "--calib", "s.npz", "-q", "-v",
]  # fmt: skip


@pytest.fixture
def parsed() -> Callable[..., dict[str, Any]]:
    """Make a function that parses a command line without running it, and returns the parameters."""

    def parse(*arguments: object) -> dict[str, Any]:
        with cli.command.make_context("comq-onnx", [*map(str, arguments)]) as ctx:
            return {name: value for name, value in ctx.params.items() if name not in ("config", "save_config")}

    return parse


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory with a model and samples."""
    onnx.save(mlp(), tmp_path / "m.onnx")
    np.savez(tmp_path / "s.npz", **samples_for(mlp()))
    monkeypatch.chdir(tmp_path)


def test_every_option_comes_back_from_a_file(
    parsed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: dict[str, Any] = {}

    def remember(*_: object, **options: Any) -> Any:
        called.update(options)
        raise OptionError("enough")

    monkeypatch.setattr(pipeline, "quantize", remember)
    with pytest.raises(OptionError, match="enough"):
        cli.command.main(["m.onnx", *EVERYTHING, "--save-config", "quant.toml"], standalone_mode=False)
    direct = parsed("m.onnx", *EVERYTHING)
    assert parsed("m.onnx", "--config", "quant.toml") == direct
    # every option that can be in a file is in this one
    written = set(load_config(Path("quant.toml")))
    options = [str(p.name) for p in cli.command.params if isinstance(p, click.Option)]
    assert {str(by_long_name(cli.command)[name].name) for name in written} == set(filter(is_in_config, options))
    assert called["bits_for"] == (("fc1", 8), ("^fc=2$", 4))


def test_the_command_line_wins_over_the_file(parsed: Callable[..., dict[str, Any]]) -> None:
    Path("quant.toml").write_text('bits = 3\nseed = 5\nsymmetric = false\ninclude = ["fc1"]\n')
    found = parsed("m.onnx", "--config", "quant.toml", "--bits", 8, "--symmetric")
    assert (found["bits"], found["seed"], found["symmetric"], found["include"]) == (8, 5, True, ("fc1",))
    Path("quant.toml").write_text("asymmetric = true\n")
    assert parsed("m.onnx", "--config", "quant.toml")["symmetric"] is False


def test_a_run_from_a_file_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (
        ["--calib", "s.npz", "--bits", "3", "--asymmetric", "-q", "-o", "a.onnx", "--save-config", "quant.toml"],
        ["--config", "quant.toml", "-o", "b.onnx"],
    ):
        monkeypatch.setattr(sys, "argv", ["comq-onnx", "m.onnx", *arguments])
        cli.main()
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    expected = {"output": "a.onnx", "calib": "s.npz", "bits": 3, "symmetric": False, "quiet": True}
    assert list(load_config(Path("quant.toml")).items()) == list(expected.items())


BAD = {
    "an unknown name": ("bitz = 4", "no option is called 'bitz'; expected long names without dashes, such as bits"
                        "; did you mean bits?"),
    "the name of a field": ("max_samples = 4", "no option is called 'max_samples'"),
    "what is of one run": ("plan = true", "no option is called 'plan'"),
    "a list for a number": ("bits = [4, 8]", "bits = [4, 8]; expected one value"),
    "a truth for a number": ("bits = true", "bits = True; expected one value"),
    "a number for a truth": ("independent = 1", "independent = 1; expected true or false"),
    "a table": ("[include]\nx = 1", "include = {'x': 1}; expected a list of texts"),
    "a date": ("seed = 2026-01-01", "expected one value"),
    "no TOML": ("bits: 4", "not a TOML file"),
    "no text": ("\xff\xfe", "not a TOML file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_is_one_error(parsed: Callable[..., dict[str, Any]], case: str) -> None:
    text, words = BAD[case]
    Path("quant.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(OptionError) as error:
        parsed("m.onnx", "--config", "quant.toml")
    assert words in str(error.value)
    assert str(error.value).startswith("--config quant.toml: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_one_error(parsed: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(OptionError, match=r"--config none\.toml: cannot be read \(No such file"):
        parsed("m.onnx", "--config", "none.toml")


def test_a_single_text_stands_for_a_list_of_one(parsed: Callable[..., dict[str, Any]]) -> None:
    Path("quant.toml").write_text('include = "fc1"\nbits-for = "fc=8"\n')
    found = parsed("m.onnx", "--config", "quant.toml")
    assert (found["include"], found["bits_for"]) == (("fc1",), (("fc", 8),))


def test_a_command_line_says_what_differs_from_the_defaults(parsed: Callable[..., dict[str, Any]]) -> None:
    assert differing(Options()) == {}
    options = Options(bits_for=(("a b", 8),), symmetric=False, memory_gb=2.0, max_samples=9)
    line = command_line("m.onnx", "q.onnx", "my photos", differing(options))
    found = parsed(*shlex.split(line)[1:])
    assert (found["bits_for"], found["symmetric"], found["memory_gb"]) == ((("a b", 8),), False, 2.0)
    assert (found["max_samples"], str(found["calib"]), found["plan"]) == (9, "my photos", False)
    assert command_line("m.onnx", None, None, {}) == "comq-onnx m.onnx --plan"


def test_every_field_of_the_options_is_an_option_by_its_long_name() -> None:
    options = {name: str(option.name) for name, option in by_long_name(cli.command).items()}
    for field in vars(Options()):
        assert options[long_name(field)] == field


def test_the_typed_keywords_are_the_options() -> None:
    made = {field.name: field.type for field in fields(Options)}
    assert OptionKeywords.__annotations__.keys() == made.keys()
    hints = get_type_hints(OptionKeywords)
    assert hints == {name: hint for name, hint in get_type_hints(Options).items() if name in made}
    for function in (comq_onnx.quantize, comq_onnx.plan, comq_onnx.inspect_samples):
        assert inspect.signature(function).parameters["options"].annotation == "Unpack[OptionKeywords]"


def test_the_typed_keywords_are_what_their_tool_prints() -> None:
    tool = Path(__file__).parents[2] / "tools" / "option_keywords.py"
    made = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True, check=True).stdout
    assert made == Path(keywords.__file__).read_text(), "python tools/option_keywords.py"
