"""Test that targets are data: each is complete and consistent, options that one cannot keep are refused, and no other
module names one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from stages import planned

import comq_onnx
from comq_onnx import Options
from comq_onnx.bits.choose import file_size_at
from comq_onnx.cli import command as cli
from comq_onnx.errors import ModelError, OptionError
from comq_onnx.targets.catalog import ORT_CPU, TARGETS, TENSORRT
from comq_onnx.targets.target import WIDTHS, Target
from models import cnn, mlp, samples_for

PACKAGE = Path(comq_onnx.__file__).parent
EVERY = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@EVERY
def test_a_target_says_what_it_is_and_where_that_is_said(target: Target) -> None:
    assert target.about
    assert len(target.why) > 80
    assert target.sources
    # outputs, skips and operators between are quantized for the sake of integer layers
    assert target.needs_output | target.skip_layers <= target.integer_layers
    assert bool(target.integer_layers) == (target.activation is not None)
    assert target.min_opset <= target.max_opset
    for storage in (target.integer, target.weight_only):
        for bits in range(2, 9):
            container, opset = storage.container(bits)
            assert WIDTHS[container] >= bits
            assert target.min_opset <= opset <= target.max_opset


def test_no_other_module_names_a_target() -> None:
    names = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in TARGETS), re.IGNORECASE)
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).as_posix()
        if place == "targets/catalog.py":
            continue
        # what a comment or docstring says about a runtime, and the default, are no branches
        code = re.sub(r'"""(?:[^"]|"(?!""))*"""|#[^\n]*', "", path.read_text())
        found = {match.group() for match in names.finditer(code)}
        # ONNX Runtime has devices and packages of the same names
        if place not in ("runtime/session.py", "runtime/device.py", "evaluate/comparison.py"):
            assert found <= {"ort-cpu"}, f"{place}: {found}"
        assert not re.search(r"target\.name\s*[!=]=", code), place


@EVERY
@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 32, 48, 96, 128, 129, 256, 1000, 4096])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_block_is_one_that_the_target_takes(target: Target, inputs: int, bits: int) -> None:
    block = target.block_of(inputs, bits)
    if block is None:
        smallest = target.takes_blocks(inputs, 16)
        assert bits > target.block_bits or not smallest
        return
    assert block in (16, 32, 64, 128)
    assert target.takes_blocks(inputs, block)
    # nothing larger would do
    assert block == 128 or block >= inputs or not target.takes_blocks(inputs, 2 * block)


def test_the_block_that_ort_cpu_had() -> None:
    assert [ORT_CPU.block_of(n, 4) for n in (8, 16, 17, 100, 1000)] == [16, 16, 32, 128, 128]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "ort-cuda", "activations": "8"},
         "--activations 8: ort-cuda runs nothing with activations of 8 bits; use auto or none"),
        ({"target": "tensorrt", "activations": "16"},
         "--activations 16: tensorrt runs nothing with activations of 16 bits; use auto or none"),
        ({"target": "openvino", "symmetric": False},
         "--asymmetric: openvino takes only weights of zero point 0; leave it out"),
        ({"target": "tensort"},
         "--target tensort: choose one of ort-cpu, ort-cuda, ort-web, tensorrt, openvino; did you mean tensorrt?"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_do_is_refused(options: dict, words: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(words)}$"):
        Options(**options)


def test_an_opset_beyond_the_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "tensorrt", replace(TENSORRT, max_opset=16))
    with pytest.raises(ModelError, match=r"has opset 17; tensorrt reads 16 at most: export the model with a lower one"):
        comq_onnx.plan(mlp(), target="tensorrt")


def test_help_has_a_line_for_each_target() -> None:
    text = CliRunner().invoke(cli.command, ["--help"]).output
    for target in TARGETS.values():
        assert re.search(rf"^ +{target.name}: {re.escape(target.about)}", text, re.MULTILINE)


def test_a_target_may_stand_in_a_configuration_file(tmp_path: Path) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    (tmp_path / "quant.toml").write_text('target = "tensorrt"\nbits = 8\n')
    done = CliRunner().invoke(
        cli.command, [str(tmp_path / "m.onnx"), "--plan", "--json", str(tmp_path / "p.json"), "--config",
                      str(tmp_path / "quant.toml")]
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert '"target": "tensorrt"' in (tmp_path / "p.json").read_text()


@EVERY
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_size_that_a_budget_reckons_with_is_that_of_the_file(tmp_path: Path, target: Target, bits: int) -> None:
    source, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(cnn(size=12), source)
    feeds = samples_for(cnn(size=12))
    options = {"bits": bits, "uniform": True, "target": target.name}
    made = planned(source, feeds, **options)
    predicted = file_size_at(made.plan, made.plan.bits, made.source, made.data, made.context)
    written = comq_onnx.quantize(source, out, feeds, device="cpu", **options)
    assert written.size["after"] == out.stat().st_size
    # float32 numbers of 0 and of anything else take the same bytes
    assert predicted == pytest.approx(written.size["after"], abs=8)


def test_a_budget_in_bytes_is_kept_on_every_target(tmp_path: Path) -> None:
    source = mlp(width=256)
    whole = len(source.SerializeToString())
    for name in TARGETS:
        out = tmp_path / f"{name}.onnx"
        comq_onnx.quantize(source, out, samples_for(source), bits="auto", size="30%", target=name)
        assert 0.1 * whole < out.stat().st_size <= 0.3 * whole


def test_bits_that_cost_nothing_are_taken() -> None:
    """Ask for few bits of TensorRT, which keeps the codes of integer layers in INT8 whatever their bits."""
    feeds = samples_for(cnn(size=12))
    report = comq_onnx.plan(cnn(size=12), feeds, bits=4, target="tensorrt")
    assert {layer.bits for layer in report.layers} == {8}
    assert any("have more bits than asked for, which their containers on tensorrt hold" in n for n in report.notes)
    told = comq_onnx.plan(cnn(size=12), feeds, bits=4, target="tensorrt", bits_for=(("stem", 5),))
    assert {layer.name: layer.bits for layer in told.layers}["stem"] == 5
    for options in ({"uniform": True, "target": "tensorrt"}, {"uniform": True}):
        same = comq_onnx.plan(cnn(size=12), feeds, bits=4, **options)
        assert {layer.bits for layer in same.layers} == {4}


@pytest.mark.parametrize("name", ["ort-cuda", "ort-web", "tensorrt", "openvino"])
def test_nothing_is_timed_where_the_target_is_not(tmp_path: Path, name: str) -> None:
    report = comq_onnx.quantize(mlp(), tmp_path / "q.onnx", {"x": np.ones((8, 32), np.float32)}, bits=8, target=name)
    assert (report.latency_ms, report.kernels) == ({}, {})
    assert report.outputs
    assert any(f"compared by ONNX Runtime, not on {name}" in note for note in report.notes)
