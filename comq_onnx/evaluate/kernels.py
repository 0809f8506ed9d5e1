"""Count the kernels of the graph that ONNX Runtime makes of a model and executes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

from comq_onnx.model.files import private_directory
from comq_onnx.runtime.session import Session

# op types of matrix products and convolutions in integers, in graphs that ONNX Runtime has optimized
INTEGER_PRODUCTS = frozenset(
    {
        "QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits", "ConvInteger",
    }
)  # fmt: skip
# those in floats
FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul", "FusedGemm"})
# all op types that run in integers
INTEGER_KERNELS = INTEGER_PRODUCTS | frozenset(
    {
        "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool",
        "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax",
    }
)  # fmt: skip
# the index of the weight's scale among the inputs of an integer product
_SCALE_INPUT = {"QLinearConv": 4, "QGemm": 4, "QLinearMatMul": 4, "MatMulIntegerToFloat": 3, "MatMulNBits": 2}


def _layers_of(node: onnx.NodeProto) -> list[str]:
    """Return the layers whose constants a product of an optimized graph reads, by the names that write/ gives them."""
    if node.op_type in _SCALE_INPUT:
        names, ends = node.input[_SCALE_INPUT[node.op_type] :][:1], ("scale", "scale_T")
    elif node.op_type in FLOAT_PRODUCTS | {"ConvTranspose"}:
        names, ends = node.input, ("weight", "bias")
    else:
        return []
    parts = [name.rpartition(".") for name in names]
    return [layer for layer, _, end in parts if end in ends]


@dataclass(frozen=True)
class Kernels:
    """Describe the graph that ONNX Runtime executes.

    counts: the number of nodes by op type
    float_behind_dequantize: how many float products still read a dequantized value
    of_layer: the op type of the product that reads a layer's constants, by the name of the layer
    """

    counts: dict[str, int]
    float_behind_dequantize: int
    of_layer: dict[str, str]

    @property
    def integer(self) -> dict[str, int]:
        """Return the number of integer kernels by op type."""
        return {op: n for op, n in sorted(self.counts.items()) if op in INTEGER_KERNELS}

    @property
    def floating(self) -> dict[str, int]:
        """Return the number of all other nodes by op type, with those that only convert between integers and floats."""
        return {op: n for op, n in sorted(self.counts.items()) if op not in INTEGER_KERNELS}


def executed_kernels(path: Path, device: str = "cpu", level: int | None = None) -> Kernels:
    """Let ONNX Runtime optimize the model at `path`, and count the nodes of the result, with those in subgraphs.

    level: of the optimization, as `Session` takes it
    """
    with private_directory() as work:
        optimized = work / "optimized.onnx"
        Session(path, device, threads=1, level=level, optimized=optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    counts: Counter[str] = Counter()
    of_layer: dict[str, str] = {}
    left = 0
    pending = [graph]
    while pending:
        current = pending.pop()
        dequantized = {name for n in current.node if n.op_type == "DequantizeLinear" for name in n.output}
        for node in current.node:
            counts[node.op_type] += 1
            if node.op_type in FLOAT_PRODUCTS and dequantized & set(node.input):
                left += 1
            of_layer.update(dict.fromkeys(_layers_of(node), node.op_type))
            pending += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return Kernels(dict(counts), left, of_layer)
