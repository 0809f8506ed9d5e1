"""Quantize a model and look into the file that is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from zoo import Feeds

import comq_onnx
from comq_onnx.evaluate import speed
from comq_onnx.evaluate.kernels import Kernels, executed_kernels
from comq_onnx.model.layers import Layer
from comq_onnx.model.operators import Gather, Gemm
from comq_onnx.plan.solved import Solved
from comq_onnx.runtime.session import Session
from comq_onnx.write import emit as emit_module
from comq_onnx.write.emit import emit

ort.set_default_logger_severity(4)

PACKED = {8: TensorProto.INT8, 4: TensorProto.INT4, 3: TensorProto.INT4, 2: TensorProto.INT2}
WIDTHS = {TensorProto.INT8: 8, TensorProto.INT4: 4, TensorProto.INT2: 2}
NO_INT2 = PACKED | {2: TensorProto.INT4}
ALL_INT8 = dict.fromkeys(PACKED, TensorProto.INT8)
# the containers by bits: of layers that run in integers, and of all others
CONTAINERS = {
    "ort-cpu": (PACKED, PACKED), "ort-cuda": (NO_INT2, NO_INT2), "ort-web": (PACKED, PACKED),
    "tensorrt": (ALL_INT8, NO_INT2), "openvino": (NO_INT2, NO_INT2),
}  # fmt: skip
ALWAYS = {"up": "folded", "up1": "folded", "y3": "folded", "onleft": "folded", "y2": "folded", "gather": "looked up"}
CONVS, PRODUCTS = ["conv", "depthwise", "grouped"], ["gemm", "matmul", "rank3"]
INTEGER = ALWAYS | dict.fromkeys([*CONVS, *PRODUCTS], "integer")
WEIGHT_ONLY = ALWAYS | dict.fromkeys(CONVS, "folded") | dict.fromkeys(PRODUCTS, "blocked")


@dataclass(frozen=True)
class Written:
    """Hold what a run left.

    path, proto: the file that was written, and its content
    solved: what was to be written into it
    feeds: the samples
    source: the float model
    """

    path: Path
    proto: onnx.ModelProto
    solved: Solved
    feeds: Feeds
    source: onnx.ModelProto

    @property
    def layers(self) -> dict[str, Layer]:
        """Return the layers by name."""
        return {layer.name: layer for layer in self.solved.plan.layers}

    @property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """Return the initializers by name."""
        return {t.name: t for t in self.proto.graph.initializer}

    @property
    def kernels(self) -> Kernels:
        """Return the kernels that ONNX Runtime makes of the file."""
        return executed_kernels(self.path)

    def producer(self, name: str) -> onnx.NodeProto:
        """Return the node that makes a value."""
        return next(n for n in self.proto.graph.node if name in n.output)

    def node(self, name: str) -> onnx.NodeProto:
        """Return a node by its name."""
        return next(n for n in self.proto.graph.node if n.name == name)

    def array(self, name: str) -> np.ndarray:
        """Return the numbers of an initializer."""
        return numpy_helper.to_array(self.initializers[name])

    def before(self, name: str) -> tuple[list[onnx.NodeProto], set[str]]:
        """Return the nodes that make a value, and the names of all that they read."""
        wanted, nodes = {name}, []
        for n in reversed(self.proto.graph.node):
            if wanted & set(n.output):
                nodes.insert(0, n)
                wanted |= set(n.input)
        return nodes, wanted

    def behind(self, name: str) -> dict[str, onnx.TensorProto]:
        """Return the initializers that a value is made of."""
        return {n: self.initializers[n] for n in self.before(name)[1] if n in self.initializers}

    def value(self, name: str, feeds: Feeds | None = None) -> np.ndarray:
        """Compute a value of the file: only the nodes before it run, without any optimization."""
        nodes, wanted = self.before(name)
        graph = helper.make_graph(
            nodes,
            "part",
            [i for i in self.proto.graph.input if i.name in wanted],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
            [t for t in self.proto.graph.initializer if t.name in wanted],
        )
        part = helper.make_model(graph, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)
        return Session(part.SerializeToString(), threads=1, level=0).run(feeds or {})[name]


Quantize = Callable[..., Written]


@pytest.fixture
def quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Quantize:
    """Make a function that quantizes and returns what was written; it does not time the models."""

    def run(source: onnx.ModelProto, feeds: Feeds, **options: Any) -> Written:
        emitted = []

        def spy(model: Any, solved: Solved) -> None:
            emitted.append(solved)
            emit(model, solved)

        monkeypatch.setattr(emit_module, "emit", spy)
        monkeypatch.setattr(speed, "latency", lambda pair, _samples: [1.0] * len(pair))
        path = tmp_path / "quantized.onnx"
        comq_onnx.quantize(source, path, feeds, device="cpu", **({"uniform": True} | options))
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
        return Written(path, proto, emitted[-1], feeds, source)

    return run


def holds_the_solution(written: Written, bits: int, forms: dict[str, str], planes: bool = False) -> None:
    """Check that every weight of the zoo's file is that of the solution, packed, and that no float weight is left.

    forms: the form of each layer, by name
    planes: codes of 3 bits are in bit planes of 2 and 1 bits, except where MatMulNBits needs 4
    """
    plan = written.solved.plan
    assert {n: plan.form(layer).value for n, layer in written.layers.items()} == forms
    for name, layer in written.layers.items():
        solution = written.solved.solutions[name].weight
        # embeddings keep 8 bits unless told otherwise
        width = 8 if isinstance(layer.kind, Gather) else bits
        assert plan.bits[name] == width
        # 7 of 8 bits are safe on CPUs without VNNI
        assert solution.grid.bits == min(width, 7 if layer.weight in plan.narrow else 8)
        wanted = layer.kind.from_matrix(solution.dequantize())
        if isinstance(layer.kind, Gather):
            rows = np.arange(20).reshape(4, 5)
            found = written.value("gather", {"ids": rows}).reshape(20, 16)
            found_in = written.behind("gather")
        else:
            blocked_gemm = isinstance(layer.kind, Gemm) and forms[name] == "blocked"
            reader = written.node(f"{name}.matmul" if blocked_gemm else name)
            value = reader.input[1 if blocked_gemm else layer.kind.weight_index]
            found, found_in = written.value(value), written.behind(value)
            if blocked_gemm and layer.kind.trans_b:
                wanted = wanted.T
        # one multiplication of the same two float32 numbers
        assert np.array_equal(found, wanted), name
        assert layer.weight not in written.initializers
        stored = [t for tensor, t in sorted(found_in.items()) if tensor.startswith(f"{layer.weight}.codes")]
        container = CONTAINERS[plan.target.name][forms[name] != "integer"][width]
        widths = [2, 1] if planes and width == 3 and forms[name] != "blocked" else [WIDTHS[container]]
        assert {t.data_type for t in stored} == {container if len(widths) == 1 else TensorProto.UINT8}
        assert [len(t.raw_data) for t in stored] == [-(-np.prod(layer.weight_shape) * w // 8) for w in widths]


def no_float_as_large_as_a_weight(written: Written) -> None:
    """Check that every float tensor of a file is smaller than its smallest weight."""
    sizes = {t.name: np.prod(t.dims) for t in written.proto.graph.initializer if t.data_type == TensorProto.FLOAT}
    assert max(sizes.values()) < min(np.prod(layer.weight_shape) for layer in written.layers.values()), sizes
