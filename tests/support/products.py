"""Build models of matrix products with many operators behind them: each pattern that ONNX Runtime might fuse."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx

from models import build, normal, weight

WIDTH = 32
# what stands behind a product v: reads v and mostly nothing else, writes r; x is the input of the product
BEHIND = {
    "nothing": "r = Identity (v)",
    "abs": "r = Abs (v)",
    "relu": "r = Relu (v)",
    "relu_identity": "a = Identity (v)\n r = Relu (a)",
    "relu_twice": "a = Relu (v)\n r = Add (a, v)",
    "relu_add": "a = Relu (v)\n r = Add (a, x)",
    "relu_sqrt": "a = Relu (v)\n r = Sqrt (a)",
    "clip": "r = Clip (v, zero, six)",
    "clip_low": "r = Clip (v, minus, six)",
    "clip_open": "r = Clip (v, zero)",
    "max_min": "a = Max (v, zero)\n r = Min (a, six)",
    "max": "r = Max (v, zero)",
    "sigmoid": "r = Sigmoid (v)",
    "tanh": "r = Tanh (v)",
    "leaky": "r = LeakyRelu <alpha = 0.1> (v)",
    "prelu": "r = PRelu (v, six)",
    "elu": "r = Elu (v)",
    "selu": "r = Selu (v)",
    "celu": "r = Celu (v)",
    "thresholded": "r = ThresholdedRelu (v)",
    "softplus": "r = Softplus (v)",
    "softsign": "r = Softsign (v)",
    "hard_swish": "r = HardSwish (v)",
    "hard_sigmoid": "r = HardSigmoid (v)",
    "silu": "a = Sigmoid (v)\n r = Mul (v, a)",
    "quick_gelu": "a = Mul (v, six)\n b = Sigmoid (a)\n r = Mul (v, b)",
    "gelu": "a = Div (v, root)\n b = Erf (a)\n c = Add (b, one)\n d = Mul (v, c)\n r = Mul (d, half)",
    "erf": "r = Erf (v)",
    "softmax": "r = Softmax <axis = -1> (v)",
    "norm": "r = LayerNormalization <axis = -1> (v, many)",
    "add_input": "r = Add (v, x)",
    "input_add": "r = Add (x, v)",
    "add_relu": "a = Add (v, x)\n r = Relu (a)",
    "add_norm": "a = Add (v, x)\n r = LayerNormalization <axis = -1> (a, many)",
    "add_constant": "r = Add (v, many)",
    "add_one": "r = Add (v, one)",
    "mul_input": "r = Mul (v, x)",
    "mul_constant": "r = Mul (v, six)",
    "div_constant": "r = Div (v, six)",
    "sub_input": "r = Sub (v, x)",
    "pow": "r = Pow (v, two)",
    "cast": "a = Cast <to = 10> (v)\n r = Cast <to = 1> (a)",
}
# products of x, by what makes them; all have their weights to themselves
PRODUCTS = {
    "matmul": "v = MatMul (x, w)",
    "biased": "m = MatMul (x, w)\n v = Add (m, bias)",
    "bias_first": "m = MatMul (x, w)\n v = Add (bias, m)",
    "gemm": "v = Gemm <transB = 1> (x, w, bias)",
    "gemm_alone": "v = Gemm (x, w)",
    "gemm_scaled": "v = Gemm <alpha = 0.5, beta = 2.0> (x, w, bias)",
    "gemm_of_rows": "v = Gemm <beta = 0.5> (x, w, x)",
    "gemm_of_one": "v = Gemm (x, w, single)",
}
SHAPES = {"2 open": ["n"], "2 known": [8], "3 open": ["n", "m"], "3 known": [8, 3], "4 open": ["n", "m", 2]}
OF_THEIR_OWN = ("v", "r", "a", "b", "c", "d", "m", "w", "bias")
CONSTANTS: dict[str, Any] = {
    "zero": 0, "six": 6, "minus": -1, "one": 1, "two": 2, "half": 0.5, "root": 2**0.5, "many": 1 + normal(WIDTH),
    "single": np.ones(1, np.float32),
}  # fmt: skip


def branches(product: str, shape: str, tail: str = "out = Mul (r, two)") -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Build x -> one product for each operator of BEHIND, and the samples; tail: reads r behind that, writes out."""
    lines = ["[front] f = MatMul (given, front_w)", "x = Tanh (f)"]
    weights: dict[str, Any] = {"front_w": weight(WIDTH, WIDTH)}
    for i, (name, behind) in enumerate(BEHIND.items()):
        text = f"{PRODUCTS[product]}\n{behind}\n{tail}"
        text = re.sub(r"(\w+) = (MatMul|Gemm) ", rf"[{name}] \1 = \2 ", text, count=1)
        for part in (*OF_THEIR_OWN, "out", "tail_w"):
            text = re.sub(rf"(?<!\[)\b{part}\b(?!\])", f"{name}_{part}", text)
        lines.append(text)
        weights |= {
            f"{name}_w": weight(WIDTH, WIDTH, seed=i),
            f"{name}_bias": normal(WIDTH, seed=i),
            f"{name}_tail_w": weight(WIDTH, WIDTH, seed=i + 100),
        }
    body = "\n".join(lines)
    weights |= {name: np.asarray(value, np.float32) for name, value in CONSTANTS.items()}
    read = set(re.findall(r"\w+", body))
    dims = [*SHAPES[shape], WIDTH]
    kind = f"float[{', '.join(map(str, dims))}]"
    outputs = ", ".join(f"{kind} {name}_out" for name in BEHIND)
    model = build(
        f"g ({kind} given) => ({outputs}) {{\n{body}\n}}", {n: w for n, w in weights.items() if n in read}, opset=18
    )
    return model, {"given": normal(64, *(2 if d == "m" else d for d in dims[1:-1]), WIDTH)}
