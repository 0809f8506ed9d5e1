"""List the targets: what each runtime runs in integers, as data. Adding a target is adding one constant here.

Measurements are in docs/runtimes.md; each target's `sources` names the other places that a rule comes from.
"""

from __future__ import annotations

from dataclasses import replace

from comq_onnx.targets.costs import ORT_CPU_COSTS, ORT_WEB_COSTS
from comq_onnx.targets.target import Storage, Target

# (bits, dtype, opset) as in Storage
_INT8 = (8, "INT8", 13)
_INT4_INT8 = ((4, "INT4", 21), _INT8)
# the opset of BitwiseOr, with which ONNX Runtime joins bit planes
_PLANES = 18

ORT_CPU = Target(
    name="ort-cpu",
    about="ONNX Runtime, CPU; uint8 activations, packed weights",
    why=(
        "ONNX Runtime on the CPU fuses uint8 activations with int8 weights. Packed INT4 and INT2 weights behind a Cast "
        "to INT8, and bit planes joined by constant operators, are unpacked once at load and run in the same kernels"
    ),
    sources=(
        "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
        "https://github.com/microsoft/onnxruntime/pull/12088 (weights outside [-64, 63] overflow without VNNI)",
        "measured with ONNX Runtime 1.23 to 1.31: docs/runtimes.md",
    ),
    device="cpu",
    providers=("CPUExecutionProvider",),
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
    signed_scales=True,
    integer_bias=True,
    unpack="Cast",
    safe_bits=7,
    exact_depthwise=True,
    # ONNX Runtime 1.31: MatMulNBits of INT2 codes gives garbage for other numbers of outputs
    int2_columns=4,
    # its kernels compute in float32, between Casts
    half=False,
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
    providers=("CUDAExecutionProvider",),
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
    signed_scales=True,
    integer_bias=False,
    unpack="Cast",
)

ORT_WEB = replace(
    ORT_CPU,
    name="ort-web",
    about="onnxruntime-web in WebAssembly; uint8 activations, packed weights",
    why=(
        "onnxruntime-web's WebAssembly has the graph optimizations of the CPU and integer kernels that add in 32 bits. "
        "Its MatMulNBits unpacks weights at every call, so the weights of weight-only products are unpacked at load; "
        "its float convolutions have no layout of their own. So the forms are those of ort-cpu but for weight-only "
        "products, and what gains by integers differs"
    ),
    sources=(
        "https://github.com/microsoft/onnxruntime/pull/9191 (products by i32x4.dot_i16x8_s)",
        "measured with onnxruntime-web 1.30 in Node: docs/web.md",
    ),
    device="wasm",
    packed_products=False,
    costs=ORT_WEB_COSTS,
)

TENSORRT = Target(
    name="tensorrt",
    about="int8 activations, INT8 weights; INT4 if weight-only",
    why=(
        "TensorRT runs int8 times int8, only with zero points of 0, and with a float bias. Every input of a weighted "
        "layer must be quantized, and also what an Add adds to a convolution. Outputs stay as they are, except one "
        "that is taken apart (queries, keys and values of one product): TensorRT computes such a product in float "
        "unless its output is quantized. Codes must go into a DequantizeLinear. INT4 codes stay packed only in "
        "weight-only products, in two or more blocks that fill the inputs; with int8 activations they would be cast "
        "at run time or refused, so those are INT8"
    ),
    sources=(
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html",
        "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
        "quantized-types-explicit-quantization.html",
        "engines built with TensorRT for RTX 1.7.1: docs/runtimes.md",
    ),
    device=None,
    providers=("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"),
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
    # it asks for positive ones
    signed_scales=False,
    integer_bias=False,
    unpack="DequantizeLinear",
    whole_blocks=True,
    block_bits=4,
)

OPENVINO = Target(
    name="openvino",
    about="OpenVINO, CPU; uint8 activations, INT4 or INT8 weights",
    why=(
        "OpenVINO on the CPU runs the forms of ort-cpu in integers, also INT4 codes behind a Cast. It reads no INT2 "
        "and no blocks that do not fill the inputs, and it joins bit planes at every call, in float"
    ),
    sources=(
        "compiled with OpenVINO 2026.4.1: docs/runtimes.md",
        "https://docs.openvino.ai/latest/pot_saturation_issue.html (7 bits without VNNI)",
    ),
    device=None,
    providers=("OpenVINOExecutionProvider",),
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
    signed_scales=True,
    integer_bias=True,
    unpack="Cast",
    safe_bits=7,
    whole_blocks=True,
    half=False,
)

# by name
TARGETS: dict[str, Target] = {target.name: target for target in (ORT_CPU, ORT_CUDA, ORT_WEB, TENSORRT, OPENVINO)}
