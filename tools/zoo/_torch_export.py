"""Export PyTorch networks as ONNX."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

OPSET = 17


def export(
    net: nn.Module,
    inputs: dict[str, torch.Tensor],
    output: str,
    axes: dict[int, str],
    model: Path,
    *,
    output_axes: dict[int, str] | None = None,
    external: bool = False,
) -> None:
    """Write a network as ONNX with the tracing exporter.

    inputs: an example of each input, by name
    axes: the dynamic axes of every input, and of the output unless `output_axes` says otherwise
    external: store the weights in a file of their own beside the model
    """
    data = io.BytesIO()
    dynamic = dict.fromkeys(inputs, axes) | {output: output_axes or axes}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecation and tracing notes
        torch.onnx.export(
            net.eval(),
            tuple(inputs.values()),
            data,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes=dynamic,
        )
    if not external:
        model.write_bytes(data.getvalue())
        return
    side = model.with_name(model.name + ".data")
    side.unlink(missing_ok=True)  # onnx appends to what is there
    onnx.save_model(onnx.load_from_string(data.getvalue()), model, save_as_external_data=True, location=side.name)
