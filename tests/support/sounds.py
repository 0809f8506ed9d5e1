"""Make tones, and a model of waveforms."""

from __future__ import annotations

import numpy as np
import onnx

from models import build, weight

RATE = 8000


def tone(points: int = 1000, hertz: float = 440, rate: int = RATE) -> np.ndarray:
    """Make a tone of amplitude 0.5."""
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(points) / rate)


def wave_net() -> onnx.ModelProto:
    """Build wave [batch, 1, points] -> Conv, Relu, mean, MatMul -> y [batch, 8]."""
    return build(
        """g (float[batch, 1, points] wave) => (float[batch, 8] y) {
            [conv] a = Conv <kernel_shape = [16], strides = [8]> (wave, w1)
            r = Relu (a)
            m = GlobalAveragePool (r)
            f = Flatten (m)
            [head] y = MatMul (f, w2)
        }""",
        {"w1": weight(16, 1, 16, fan=16), "w2": weight(16, 8)},
    )
