"""Let models be pickled, as protobuf messages: the nodes of a graph are linked, and pickle would follow every link."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnx_ir as ir

from comq_onnx.errors import ModelError


def enable() -> None:
    """Pickle every onnx_ir.Model of this process as a message; a process that reads one does so from then on."""
    copyreg.pickle(ir.Model, _reduce)


def _reduce(model: ir.Model) -> tuple[Callable[..., ir.Model], tuple[Any, ...]]:
    """Return what makes the model again. Raises ModelError where it is too large for one message."""
    folders = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                folders[str(value.name)] = str(value.const_value.base_dir)
    try:
        return restore, (ir.to_proto(model).SerializeToString(), folders)
    except Exception as error:  # protobuf has errors of its own
        raise ModelError(f"the model is too large for one message ({error}): run it without --workers") from error


def restore(message: bytes, folders: Mapping[str, str]) -> ir.Model:
    """Make a model of a message; folders: of the external data of initializers, by name."""
    # who got it may pass it on
    enable()
    model: ir.Model = ir.from_proto(onnx.ModelProto.FromString(message))
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.base_dir = folders[str(value.name)]
    return model
