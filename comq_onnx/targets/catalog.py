"""What each runtime runs in integers, as data: adding a target is adding one constant here.

What is measured stands in docs/runtimes.md; where else a rule comes from, in a target's `sources`.
"""

from __future__ import annotations

from comq_onnx.targets.costs import ORT_CPU_COSTS
from comq_onnx.targets.target import Storage, Target

_INT8 = (8, "INT8", 13)
_INT4_INT8 = ((4, "INT4", 21), _INT8)
# what ONNX Runtime joins with BitwiseOr
_PLANES = 18
ORT_CPU = Target(
    name="ort-cpu",
    about="ONNX Runtime, CPU; uint8 activations, packed weights",
    why=(
        "ONNX Runtime on the CPU fuses uint8 activations with int8 weights; packed INT4 and INT2 weights behind a Cast "
        "to INT8, and bit planes put together by constant operators, are unpacked once at load and run the same kernels"
    ),
    sources=(
        "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
        "measured with ONNX Runtime 1.23 to 1.31: docs/runtimes.md",
    ),
    device="cpu",
    activation="uint8",
    wide_activation="uint16",
    integer_layers=frozenset({"Conv", "MatMul", "Gemm"}),
    needs_output=frozenset({"Conv"}),
    fused_after=frozenset({"Relu", "Clip"}),
    skip_layers=frozenset(),
    split_outputs=False,
    any_scale=frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"}),
    same_scale=frozenset(
        {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "DepthToSpace", "SpaceToDepth", "Slice"}
    ),
    integer=Storage(((2, "INT2", 25), *_INT4_INT8), _PLANES),
    weight_only=Storage(((2, "INT2", 25), *_INT4_INT8), _PLANES),
    weight_zero_points=True,
    integer_bias=True,
    unpack="Cast",
    # ONNX Runtime 1.31: MatMulNBits of INT2 codes gives garbage for other numbers of outputs
    int2_columns=4,
    costs=ORT_CPU_COSTS,
)
ORT_CUDA = Target(
    name="ort-cuda",
    about="ONNX Runtime, NVIDIA; weight-only, float arithmetic",
    why=(
        "ONNX Runtime's CUDA provider fuses DequantizeLinear and MatMul to MatMulNBits (4 and 8 bits) and runs no "
        "other QDQ form in integers, so activations stay float; the weights of convolutions and other layers are "
        "unpacked to float once at load, by the same constant folding on the CPU as for ort-cpu"
    ),
    sources=(
        "https://github.com/microsoft/onnxruntime/pull/21846 (CUDA for DequantizeLinear and MatMul alone)",
        "https://github.com/microsoft/onnxruntime/pull/27614 (2 and 8 bits)",
        "not measured on a GPU: the form was looked at in the CPU provider, docs/runtimes.md",
    ),
    device="cuda",
    activation=None,
    wide_activation=None,
    integer_layers=frozenset(),
    needs_output=frozenset(),
    fused_after=frozenset(),
    skip_layers=frozenset(),
    split_outputs=False,
    any_scale=frozenset(),
    same_scale=frozenset(),
    integer=Storage(_INT4_INT8, _PLANES),
    weight_only=Storage(_INT4_INT8, _PLANES),
    weight_zero_points=True,
    integer_bias=False,
    unpack="Cast",
)
TENSORRT = Target(
    name="tensorrt",
    about="int8 activations, INT8 weights; INT4 if weight-only",
    why=(
        "TensorRT runs int8 times int8 with zero points of 0 alone and a float bias; it wants every input of a "
        "weighted layer quantized, what an Add adds to a convolution too, and outputs left alone but those that it "
        "takes apart (queries, keys and values of one product), which it else computes in float. Codes must go into a "
        "DequantizeLinear, and INT4 ones stay packed only in two blocks or more that fill the inputs, in weight-only "
        "products; with int8 activations they would be cast at run time or refused, so those are INT8"
    ),
    sources=(
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html",
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
        "quantized-types-explicit-quantization.html",
        "engines built with TensorRT for RTX 1.7.1: docs/runtimes.md",
    ),
    device=None,
    activation="int8",
    wide_activation=None,
    integer_layers=frozenset({"Conv", "MatMul", "Gemm"}),
    needs_output=frozenset(),
    fused_after=frozenset(),
    skip_layers=frozenset({"Conv"}),
    split_outputs=True,
    any_scale=frozenset(),
    same_scale=frozenset(),
    integer=Storage((_INT8,)),
    weight_only=Storage(_INT4_INT8),
    weight_zero_points=False,
    integer_bias=False,
    unpack="DequantizeLinear",
    whole_blocks=True,
    block_bits=4,
)
OPENVINO = Target(
    name="openvino",
    about="OpenVINO, CPU; uint8 activations, INT4 or INT8 weights",
    why=(
        "OpenVINO on the CPU runs the forms of ort-cpu in integers, INT4 codes behind a Cast among them; it reads no "
        "INT2 and no blocks that do not fill the inputs, and joins bit planes at every call, in float"
    ),
    sources=("compiled with OpenVINO 2026.4.1: docs/runtimes.md",),
    device=None,
    activation="uint8",
    wide_activation=None,
    integer_layers=ORT_CPU.integer_layers,
    needs_output=ORT_CPU.needs_output,
    fused_after=ORT_CPU.fused_after,
    skip_layers=frozenset(),
    split_outputs=False,
    any_scale=ORT_CPU.any_scale,
    same_scale=ORT_CPU.same_scale,
    integer=Storage(_INT4_INT8),
    weight_only=Storage(_INT4_INT8),
    weight_zero_points=False,
    integer_bias=True,
    unpack="Cast",
    whole_blocks=True,
)
TARGETS: dict[str, Target] = {target.name: target for target in (ORT_CPU, ORT_CUDA, TENSORRT, OPENVINO)}
