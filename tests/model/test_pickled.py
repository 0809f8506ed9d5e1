"""Test that models are pickled, however many nodes they have, and with weights that lie in another file."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from comq_onnx.errors import ModelError
from comq_onnx.model import pickled
from comq_onnx.model.source import read_model
from models import build, cnn


def test_a_model_of_many_nodes_is_pickled() -> None:
    nodes = "\n".join(f"x{i + 1} = Relu (x{i})" for i in range(3000))
    source = build(f"many (float[n] x0) => (float[n] x3000) {{ {nodes} }}")
    pickled.enable()
    model = pickle.loads(pickle.dumps(ir.from_proto(source)))
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(ir.from_proto(source)).SerializeToString()


def test_one_model_stays_one() -> None:
    pickled.enable()
    model = ir.from_proto(cnn())
    first, second = pickle.loads(pickle.dumps((model, model)))
    assert first is second


def test_external_data_are_found_again(tmp_path: Path) -> None:
    pickled.enable()
    path = tmp_path / "model.onnx"
    onnx.save(cnn(), path, save_as_external_data=True, size_threshold=0, location="model.bin")
    before = read_model(path)
    after = pickle.loads(pickle.dumps(before))
    for name, value in before.graph.initializers.items():
        assert isinstance(after.graph.initializers[name].const_value, ir.ExternalTensor)
        assert np.array_equal(after.graph.initializers[name].const_value.numpy(), value.const_value.numpy())


def test_a_model_that_is_too_large_for_a_message_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large:
        @staticmethod
        def SerializeToString() -> bytes:
            raise ValueError("exceeds 2GB")

    pickled.enable()
    model = ir.from_proto(cnn())
    monkeypatch.setattr(ir, "to_proto", lambda _: Large)
    with pytest.raises(ModelError, match=r"too large for one message \(exceeds 2GB\): run it without --workers"):
        pickle.dumps(model)
