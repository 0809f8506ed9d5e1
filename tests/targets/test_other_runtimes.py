"""Test what other runtimes make of the files written for them: every planned layer runs in integers there.

OpenVINO compiles for the CPU; TensorRT for RTX builds engines without a GPU. Both come with the extra `runtimes`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from recurrent import recurrent, sequences
from zoo import ZOO_FEEDS, zoo

import comq_onnx
from comq_onnx.metrics import sqnr_of
from comq_onnx.plan import forms
from comq_onnx.runtime.session import Session
from models import cnn, encoder, mlp, samples_for, tokens

ROOT = Path(__file__).parents[2]
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "cnn": cnn, "mlp": mlp, "tokens": tokens, "encoder": encoder,
    "fashion_cnn": lambda: onnx.load(ROOT / "models" / "fashion_cnn.onnx"),
    "fashion_vit": lambda: onnx.load(ROOT / "models" / "fashion_vit.onnx"),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", MODELS)
Feeds = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def runtimes() -> Any:
    """Import tools/check/_runtimes.py, which reads what the runtimes made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools" / "check"))
        return import_module("_runtimes")


@pytest.fixture
def openvino(runtimes: Any) -> Any:
    pytest.importorskip("openvino", reason="OpenVINO is not here: pip install '.[runtimes]'")
    return runtimes


@pytest.fixture
def tensorrt(runtimes: Any) -> Any:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not here: pip install '.[runtimes]'")
    return runtimes


class Made:
    """Hold a model quantized for a target: the file, one feed for it, the planned layers by form."""

    def __init__(self, out: Path, source: onnx.ModelProto, **options: Any) -> None:
        samples = samples_for(source, count=16)
        self.path = out
        self.report = comq_onnx.quantize(source, out, samples, uniform=True, **options)
        self.feeds: Feeds = {k: v[:2] for k, v in samples.items()}

    def layers(self, *forms: str) -> list[str]:
        return [layer.name for layer in self.report.layers if layer.form in forms]


@EVERY
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_openvino_runs_every_planned_layer_in_integers(tmp_path: Path, openvino: Any, name: str, bits: int) -> None:
    made = Made(tmp_path / "q.onnx", MODELS[name](), bits=bits, target="openvino")
    program = openvino.openvino_program(made.path)
    planned = made.layers("integer")
    assert planned
    assert openvino.in_integers(planned, program.products, made.path) == dict.fromkeys(planned, True)
    assert program.unpacking == []
    expected = Session(made.path, float_matmul_nbits=True, disable_qdq_fusion=True).run(made.feeds)
    found = {k.any_name: v for k, v in openvino.openvino_compiled(made.path, "f32")(made.feeds).items()}
    # roundings that fall the other way: 26.9 dB was the least
    assert sqnr_of(expected, found) > 20


@pytest.mark.parametrize("bits", [8, 4])
def test_openvino_reads_packed_weights_of_weight_only_products(tmp_path: Path, openvino: Any, bits: int) -> None:
    made = Made(tmp_path / "q.onnx", encoder(), bits=bits, target="openvino", activations="none")
    # CPUs that are faster at bfloat16 name the products by it
    program = openvino.openvino_program(made.path, "f32")
    # by number: what is fused with attention has not the layer's name
    read = [p.types for p in program.products if p.kind == "FullyConnected"]
    assert read == [(f"i{bits}",)] * len(made.layers("blocked"))
    assert len(read) == 6


def test_openvino_would_run_bit_planes_in_float(tmp_path: Path, openvino: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Show why the target has no bit planes, and that the checks of this module can fail."""
    monkeypatch.setattr(forms, "PLANE_NODE_BYTES", 0)
    made = Made(tmp_path / "q.onnx", cnn(), bits=3, target="ort-cpu")
    program = openvino.openvino_program(made.path)
    planned = made.layers("integer")
    assert not all(openvino.in_integers(planned, program.products, made.path).values())
    assert program.unpacking


@EVERY
@pytest.mark.parametrize("bits", [8, 4])
def test_tensorrt_runs_every_planned_layer_in_integers(tmp_path: Path, tensorrt: Any, name: str, bits: int) -> None:
    made = Made(tmp_path / "q.onnx", MODELS[name](), bits=bits, target="tensorrt")
    program = tensorrt.tensorrt_program(made.path, made.feeds)
    planned = made.layers("integer")
    assert planned
    assert tensorrt.in_integers(planned, program.products, made.path) == dict.fromkeys(planned, True)


@EVERY
def test_tensorrt_keeps_int4_weights_packed(tmp_path: Path, tensorrt: Any, name: str) -> None:
    made = Made(tmp_path / "q.onnx", MODELS[name](), bits=4, target="tensorrt", activations="none")
    program = tensorrt.tensorrt_program(made.path, made.feeds)
    nodes = onnx.load(made.path).graph.node
    blocked = [n for n in nodes if any(a.name == "block_size" for a in n.attribute)]
    assert program.int4_weights >= len(blocked)
    # of a width that two blocks of a power of two fill; 24 inputs are none
    wide = [x for x in made.report.layers if x.form == "blocked" and x.weight_shape[0] % 32 == 0]
    assert len(blocked) >= len(wide)


def test_tensorrt_refuses_what_ort_cpu_takes(tmp_path: Path, tensorrt: Any) -> None:
    made = Made(tmp_path / "q.onnx", cnn(), bits=8, target="ort-cpu")
    with pytest.raises(tensorrt.Refused, match=r"(?i)zero.point"):
        tensorrt.tensorrt_program(made.path, made.feeds)


def test_tensorrt_takes_a_layer_of_every_kind(tmp_path: Path, tensorrt: Any) -> None:
    for options in ({"bits": 8}, {"bits": 4, "granularity": "tensor"}, {"bits": 2, "activations": "none"}):
        out = tmp_path / "q.onnx"
        comq_onnx.quantize(zoo(), out, ZOO_FEEDS, uniform=True, target="tensorrt", **options)
        feeds = {k: v[:2] for k, v in ZOO_FEEDS.items()}
        assert tensorrt.tensorrt_program(out, feeds).bytes > 0


def test_openvino_takes_a_layer_of_every_kind(tmp_path: Path, openvino: Any) -> None:
    for options in ({"bits": 8, "activations": "none"}, {"bits": 4, "granularity": "16"}, {"bits": 2}):
        out = tmp_path / "q.onnx"
        comq_onnx.quantize(zoo(), out, ZOO_FEEDS, uniform=True, target="openvino", **options)
        feeds = {k: v[:2] for k, v in ZOO_FEEDS.items()}
        expected = Session(out, float_matmul_nbits=True, disable_qdq_fusion=True).run(feeds)
        found = {k.any_name: v for k, v in openvino.openvino_compiled(out, "f32")(feeds).items()}
        # it rounds the inputs of weight-only products to 8 bits by itself
        assert sqnr_of(expected, found) > 25


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_openvino_keeps_the_kernel_of_a_recurrent_node(tmp_path: Path, openvino: Any, op: str) -> None:
    source = recurrent(op, direction="bidirectional", **({"linear_before_reset": 1} if op == "GRU" else {}))
    feeds = sequences(source)
    comq_onnx.quantize(source, tmp_path / "q.onnx", feeds, bits=4, uniform=True, target="openvino")
    compiled = openvino.openvino_compiled(tmp_path / "q.onnx", "f32")
    kinds = [node.get_rt_info()["layerType"] for node in compiled.get_runtime_model().get_ops()]
    # one for each direction
    assert kinds.count("RNNSeq") == 2
    assert sqnr_of(Session(tmp_path / "q.onnx").run(feeds), {"y": compiled(feeds)["y"]}) > 80


def test_tensorrt_takes_recurrent_nodes(tmp_path: Path, tensorrt: Any) -> None:
    # stacks of INT4 matrices, which it takes only with a scale for each channel
    options: dict[str, Any] = {"bits": 4, "granularity": "tensor", "uniform": True}
    source = recurrent("GRU", direction="bidirectional")
    feeds = sequences(source)
    comq_onnx.quantize(source, tmp_path / "q.onnx", feeds, target="tensorrt", **options)
    assert tensorrt.tensorrt_program(tmp_path / "q.onnx", {"x": feeds["x"][:2]}).bytes > 0


# what forms there are for scales of groups, channels and blocks
FINE = [({"bits": bits, "activations": "none", "granularity": size}) for bits in (8, 4) for size in ("channel", "16")]


@pytest.mark.parametrize("options", FINE, ids=str)
def test_tensorrt_takes_scales_of_groups_and_blocks(tmp_path: Path, tensorrt: Any, options: dict[str, Any]) -> None:
    comq_onnx.quantize(zoo(), tmp_path / "q.onnx", ZOO_FEEDS, uniform=True, target="tensorrt", **options)
    tensorrt.tensorrt_program(tmp_path / "q.onnx", {k: v[:2] for k, v in ZOO_FEEDS.items()})


@pytest.mark.parametrize("options", [*FINE, {"bits": 8}], ids=str)
def test_openvino_takes_scales_of_groups_and_blocks(tmp_path: Path, openvino: Any, options: dict[str, Any]) -> None:
    out = tmp_path / "q.onnx"
    comq_onnx.quantize(zoo(), out, ZOO_FEEDS, uniform=True, target="openvino", **options)
    feeds = {k: v[:2] for k, v in ZOO_FEEDS.items()}
    expected = Session(out, float_matmul_nbits=True, disable_qdq_fusion=True).run(feeds)
    found = {k.any_name: v for k, v in openvino.openvino_compiled(out, "f32")(feeds).items()}
    # OpenVINO rounds the inputs of weight-only products, which leaves 41 dB; in integers, roundings fall the other way
    assert sqnr_of(expected, found) > (30 if options == {"bits": 8} else 38)
