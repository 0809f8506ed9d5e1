"""Test that a model that is not as planned never gets the name of the output: every fault put into one is found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import comq_onnx
from comq_onnx.bits import choose
from comq_onnx.errors import InternalError
from comq_onnx.model import graph as graphs
from comq_onnx.model.layers import nodes_by_name
from comq_onnx.plan.solved import Solved
from comq_onnx.targets.catalog import OPENVINO, ORT_CPU, ORT_CUDA, TARGETS, TENSORRT
from comq_onnx.write import check
from comq_onnx.write import emit as emit_module
from comq_onnx.write.check import check_emitted, lint, missing
from comq_onnx.write.emit import emit
from models import cnn, samples_for, tokens

Emitted = tuple[ir.Model, Solved]
Mutate = Callable[[ir.Model], None]


def emitted(monkeypatch: pytest.MonkeyPatch, source: object, **options: object) -> Emitted:
    """Return a model as it is written, and what was to be written."""
    seen: list[Emitted] = []

    def spy(model: ir.Model, solved: Solved) -> None:
        seen.append((model, solved))
        check_emitted(model, solved)

    monkeypatch.setattr(choose, "check_emitted", spy)
    comq_onnx.quantize(source, None, samples_for(source), **options)
    return seen[-1]


@pytest.fixture(scope="module")
def written() -> Emitted:
    """Make a convolutional model for ort-cpu at 4 bits."""
    with pytest.MonkeyPatch.context() as patch:
        return emitted(patch, cnn(size=12), bits=4, uniform=True, activations="8")


@pytest.fixture(scope="module")
def signed() -> Emitted:
    """Make the same for tensorrt at 8 bits."""
    with pytest.MonkeyPatch.context() as patch:
        return emitted(patch, cnn(size=12), bits=8, target="tensorrt")


def constant(model: ir.Model, name: str, array: np.ndarray) -> None:
    """Give an initializer other numbers."""
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(array, name=name)
    # clones share the types of their values
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)


def numbers(model: ir.Model, name: str) -> np.ndarray:
    """Copy the numbers of an initializer."""
    found = graphs.constant(model.graph.initializers[name])
    assert found is not None
    return np.array(found)


def float_weight(model: ir.Model) -> None:
    """Let a layer read a float weight, as if emission had left it out."""
    node = nodes_by_name(model)["point"]
    node.replace_input_with(1, graphs.add_initializer(model.graph, "w3", np.zeros((16, 16, 1, 1), np.float32)))


def stale_weight(model: ir.Model) -> None:
    """Add a float weight that nothing reads."""
    graphs.add_initializer(model.graph, "w3", np.zeros((16, 16, 1, 1), np.float32))


def other_codes(model: ir.Model) -> None:
    """Change one code by one step."""
    codes = numbers(model, "w3.codes")
    codes[3, 5, 0, 0] = 3 if codes[3, 5, 0, 0] != 3 else 2
    constant(model, "w3.codes", codes)


def wide_codes(model: ir.Model) -> None:
    """Put codes in a larger container than planned."""
    constant(model, "w3.codes", numbers(model, "w3.codes").astype(np.int8))


def unquantized_input(model: ir.Model) -> None:
    """Let a layer read its input before it is quantized."""
    node = nodes_by_name(model)["point"]
    pair = node.inputs[0].producer().inputs[0].producer()
    node.replace_input_with(0, pair.inputs[0])


def lost_node(model: ir.Model) -> None:
    """Rename a layer."""
    nodes_by_name(model)["point"].name = "other"


def half_quantized(model: ir.Model) -> None:
    """Add a float reader of a value that all readers are to read quantized."""
    name = next(n for n in nodes_by_name(model) if n == "s.quantize" or n.startswith("p.quant"))
    raw = nodes_by_name(model)[name].inputs[0]
    extra = ir.node("Neg", [raw], name="extra")
    extra.outputs[0].name = "extra"
    model.graph.insert_after(raw.producer(), extra)


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (float_weight, "layer 'point' reads no codes where INT4 was planned"),
        (stale_weight, "the float weight 'w3' is left"),
        (other_codes, "layer 'point' reads other codes than were solved for"),
        (wide_codes, "layer 'point' reads INT8 where INT4 was planned"),
        (unquantized_input, "layer 'point' reads an input that is not quantized"),
        (lost_node, "layer 'point' has no node"),
        (half_quantized, "is read before it is quantized"),
    ],
)
def test_what_is_not_as_planned_is_an_error_of_one_line(written: Emitted, mutate: Mutate, words: str) -> None:
    model, solved = written
    assert missing(model, solved) == []
    wrong = model.clone()
    mutate(wrong)
    with pytest.raises(InternalError, match=re.escape(words)) as error:
        check_emitted(wrong, solved)
    assert str(error.value).startswith("a fault of comq-onnx, nothing was written: ")
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_a_faulty_model_never_gets_the_outputs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test emission that forgets a layer in the file, but not in the walk."""
    plain = emit

    def forgetful(model: ir.Model, solved: Solved) -> None:
        plain(model, solved)
        lost_node(model)

    monkeypatch.setattr(emit_module, "emit", forgetful)
    with pytest.raises(InternalError, match="layer 'point' has no node"):
        comq_onnx.quantize(cnn(size=12), tmp_path / "q.onnx", samples_for(cnn(size=12)), bits=8)
    assert list(tmp_path.iterdir()) == []


def test_a_looked_up_table_and_products_in_blocks_are_as_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TARGETS:
        model, solved = emitted(monkeypatch, tokens(), bits=4, target=name, activations="none", uniform=True)
        assert missing(model, solved) == []
        codes = numbers(model, "table.codes")
        codes[0, 0] = codes[0, 0] // 2 + 5
        constant(model, "table.codes", codes)
        assert missing(model, solved) == ["layer 'embed' reads other codes than were solved for"]


# A target's rules


def scale(value: object, suffix: str) -> Mutate:
    """Change the numbers of the first initializer whose name ends in `suffix`."""

    def mutate(model: ir.Model) -> None:
        name = next(n for n in model.graph.initializers if n.endswith(suffix))
        constant(model, name, np.asarray(value(numbers(model, name))))  # type: ignore[operator]

    return mutate


def version(opset: int | None = None, ir_version: int | None = None) -> Mutate:
    """Set the opset or the IR version."""

    def mutate(model: ir.Model) -> None:
        if opset is not None:
            model.graph.opset_imports[""] = opset
        if ir_version is not None:
            model.ir_version = ir_version

    return mutate


def other_axis(model: ir.Model) -> None:
    """Put the scales of a weight along another axis."""
    node = nodes_by_name(model)["point.weight"]
    node.attributes["axis"] = ir.AttrInt64("axis", 1)


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (
            scale(lambda s: s.reshape(1), "image.scale"),
            "an activation's scale has rank 1; only rank 0 runs in integers",
        ),
        (scale(lambda s: s * 0, "image.scale"), "scales must be finite and above 0"),
        (scale(lambda s: s * np.float32(np.nan), "point.scale"), "scales must be finite and above 0"),
        (scale(lambda s: -s, "image.scale"), "scales must be finite and above 0"),
        (scale(lambda s: s[:3], "point.scale"), "3 scales for 16 channels along axis 0"),
        (scale(lambda z: z.astype(np.int8), "image.zero_point"), "activations are int8; ort-cpu takes uint8 or uint16"),
        (other_axis, "scales along axis 1 of a Conv's weight, whose channels are axis 0"),
        (version(opset=27), "opset 27: ort-cpu reads 13 to 26"),
        (version(opset=12), "opset 12: ort-cpu reads 13 to 26"),
        (version(ir_version=14), "IR version 14: ort-cpu reads up to 13"),
    ],
)
def test_a_broken_rule_is_named(written: Emitted, mutate: Mutate, words: str) -> None:
    model, _ = written
    assert lint(model, ORT_CPU) == []
    wrong = model.clone()
    mutate(wrong)
    assert any(words in line for line in lint(wrong, ORT_CPU)), lint(wrong, ORT_CPU)


def test_each_target_has_rules_of_its_own(written: Emitted, signed: Emitted) -> None:
    unsigned, int8 = written[0], signed[0]
    assert lint(unsigned, OPENVINO) == []
    assert lint(int8, TENSORRT) == []
    of_tensorrt = "\n".join(lint(unsigned, TENSORRT))
    assert "activations are uint8; tensorrt takes int8" in of_tensorrt
    assert "'stem.weight': scales must be finite and above 0" in of_tensorrt
    assert "an int32 bias; tensorrt takes float ones" in of_tensorrt
    assert "activations are int8; openvino takes uint8" in "\n".join(lint(int8, OPENVINO))
    assert "ort-cuda takes no quantized activations" in "\n".join(lint(int8, ORT_CUDA))


def test_signed_activations_have_zero_point_zero(signed: Emitted) -> None:
    wrong = signed[0].clone()
    scale(lambda z: z + np.int8(3), "image.zero_point")(wrong)
    assert any("a zero point of 3; signed activations have 0" in line for line in lint(wrong, TENSORRT))


def test_containers_blocks_and_zero_points_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    source = cnn(size=12)
    two, _ = emitted(monkeypatch, source, bits=2, uniform=True)
    assert any("INT2 weights; openvino takes INT4, INT8" in line for line in lint(two, OPENVINO))
    zero, _ = emitted(monkeypatch, source, bits=8, symmetric=False)
    assert any("a weight's zero point other than 0; tensorrt takes none" in line for line in lint(zero, TENSORRT))
    blocks, _ = emitted(monkeypatch, tokens(), bits=4, activations="none", uniform=True)
    assert lint(blocks, ORT_CUDA) == []
    fault = "blocks of 32 do not fill 24 inputs, or do so once; tensorrt wants two or more"
    assert any(fault in line for line in lint(blocks, TENSORRT))


def test_what_one_line_names_is_bounded(written: Emitted) -> None:
    model, solved = written
    wrong = model.clone()
    for layer in solved.plan.layers:
        nodes_by_name(wrong)[layer.name].name = f"other.{layer.name}"
    with pytest.raises(InternalError, match=rf"; {len(solved.plan.layers) - check.MOST_NAMED} more\)"):
        check_emitted(wrong, solved)
