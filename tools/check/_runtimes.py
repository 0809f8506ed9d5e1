"""Read, without a GPU, how OpenVINO and TensorRT compile a model: shared by runtimes.py and the tests.

OpenVINO tells the precision of every node of a compiled model. TensorRT for RTX builds engines ahead of time for a GPU
that need not be there; without one its engine inspector does not open them, but a plan built at detailed verbosity
holds the compiled program as text: every product with its inputs, every tensor with its type.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

INTEGERS = frozenset({"u8", "i8", "u4", "i4", "int8", "int4"})


@dataclass(frozen=True)
class Product:
    """Describe one matrix product of a compiled model.

    kind: the runtime's name for it
    nodes: the nodes of the ONNX model that are in it
    types: the types of its data and weight, as far as the runtime tells them
    """

    kind: str
    nodes: tuple[str, ...]
    types: tuple[str, ...]

    @property
    def integer(self) -> bool:
        """Tell whether it multiplies integers."""
        return all(name in INTEGERS for name in self.types)


def in_integers(layers: Iterable[str], products: Sequence[Product], path: Path) -> dict[str, bool]:
    """Tell for each layer of the model at `path` whether a product computes it in integers and none in float.

    A product may hold several layers, a layer may be in several products.
    """
    owners = _owners(path, layers)
    found: dict[str, list[bool]] = {name: [] for name in layers}
    for product in products:
        # OpenVINO appends what it took apart: /fc/Gemm/WithoutBiases
        names = (name.split("/WithoutBiases")[0] for name in product.nodes)
        for owner in dict.fromkeys(owners[name] for name in names if name in owners):
            found[owner].append(product.integer)
    return {name: bool(kinds) and all(kinds) for name, kinds in found.items()}


def _owners(path: Path, layers: Iterable[str]) -> dict[str, str]:
    """Map the names that a runtime may give to a layer to the layer.

    They are those of its node, of the sums and activations behind it, and of their outputs.
    """
    nodes = list(onnx.load(path, load_external_data=False).graph.node)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    by_name = {node.name: node for node in nodes}
    owners = {}
    for layer in layers:
        node = by_name.get(layer) or by_name.get(f"{layer}.matmul")
        while node is not None:
            owners[node.name] = owners[node.output[0]] = layer
            behind = readers.get(node.output[0], [])
            fuses = len(behind) == 1 and behind[0].op_type in ("Add", "Sum", "Mul", "Relu", "Clip", "QuantizeLinear")
            node = behind[0] if fuses and behind[0].name not in owners else None
    return owners


# OpenVINO
# ----------------------------------------------------------------------------------------------------------------------

_OPENVINO_PRODUCTS = frozenset({"Convolution", "FullyConnected", "Deconvolution", "MatMul"})


def openvino_compiled(path: Path, precision: str | None = None) -> Any:
    """Compile the model at `path` for one thread; precision: of its float arithmetic, f32 or bf16."""
    import openvino

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1}
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    return openvino.Core().compile_model(str(path), "CPU", options)


@dataclass(frozen=True)
class OpenVino:
    """Describe a model that OpenVINO compiled.

    unpacking: nodes that compute on constants alone at every call, as unpacking weights should not
    """

    products: list[Product]
    unpacking: list[str]


def openvino_program(path: Path, precision: str | None = None) -> OpenVino:
    """Compile the model at `path` for the CPU and list its products, and what is unpacked at every call.

    precision: of float arithmetic; what the CPU is fastest at unless told.
    """
    products, unpacking, constant = [], [], set()
    for op in openvino_compiled(path, precision).get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        kind = info["layerType"].astype(str)
        names = tuple(info["originalLayersNames"].astype(str).split(",")) if "originalLayersNames" in info else ()
        makers = [op.input_value(i).get_node().get_friendly_name() for i in range(op.get_input_size())]
        if kind == "Const":
            constant.add(op.get_friendly_name())
        elif makers and all(maker in constant for maker in makers):
            constant.add(op.get_friendly_name())
            # moves of constants are done once
            if kind in ("Eltwise", "Convert", "Gather", "Subgraph"):
                unpacking.append(op.get_friendly_name())
        if kind in _OPENVINO_PRODUCTS:
            products.append(Product(kind, names, (info["runtimePrecision"].astype(str),)))
    return OpenVino(products, unpacking)


def openvino_latency(models: Sequence[Any], feeds: Mapping[str, Any], seconds: float) -> list[float]:
    """Time compiled models in turn on one feed: the median milliseconds of each."""
    requests = [model.create_infer_request() for model in models]
    times: list[list[float]] = [[] for _ in requests]
    for request in requests:
        request.infer(dict(feeds))
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for request, spent in zip(requests, times, strict=True):
            start = time.perf_counter()
            request.infer(dict(feeds))
            spent.append((time.perf_counter() - start) * 1e3)
    return [float(np.median(t)) for t in times]


# TensorRT
# ----------------------------------------------------------------------------------------------------------------------

# a tensor of the program and its type; a call with its name, inputs and what it came from
_TENSOR = re.compile(rb'tensor=\{[^\n]*? name="([^"\n]+)"[^\n]*? type=(\w+) \}')
_CALL = re.compile(rb'\n +(\w+)=\{ name="?([^"\n ]+)[^\n]*? input=\{([^}\n]*)\}([^\n]*(?:\n\[ONNX Layer: [^\n]*)*)')
_TENSORRT_PRODUCTS = frozenset({"corrltn", "fully_connected", "deconvolution", "gemm", "convolution"})


class Refused(Exception):
    """Tell why TensorRT does not take a model."""


@dataclass(frozen=True)
class TensorRt:
    """Describe an engine of TensorRT: its products, how many weights stay INT4, its bytes."""

    products: list[Product]
    int4_weights: int
    bytes: int


def tensorrt_program(path: Path, feeds: Mapping[str, Any]) -> TensorRt:
    """Build an engine for the shapes of `feeds` and read what it computes in. Raises Refused with TensorRT's words."""
    plan = _tensorrt_plan(path, feeds)
    types = {name: kind.decode() for name, kind in _TENSOR.findall(plan)}
    products = []
    for kind, name, inputs, origin in _CALL.findall(plan):
        read = [types.get(value, "?") for value in re.findall(rb'"([^"]+)"', inputs)]
        if kind.decode() in _TENSORRT_PRODUCTS:
            nodes = re.findall(rb"\[ONNX Layer: ([^\]\n]*)\]", origin)
            products.append(Product(kind.decode(), tuple(n.decode() for n in (name, *nodes)), tuple(read[:2])))
    return TensorRt(products, sum(kind == "int4" for kind in types.values()), len(plan))


def _tensorrt_plan(path: Path, feeds: Mapping[str, Any]) -> bytes:
    import tensorrt_rtx_bindings as trt

    said: list[str] = []

    class Listener(trt.ILogger):
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                said.append(message)

    logger = Listener()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise Refused("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    # any GPU will do: which types a product reads is the same for all
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    free = [tensor for tensor in inputs if any(size < 0 for size in tensor.shape)]
    for tensor in free:
        profile.set_shape(tensor.name, *[tuple(feeds[tensor.name].shape)] * 3)
    if free:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused("; ".join(said) or "no reason given")
    return bytes(plan)
