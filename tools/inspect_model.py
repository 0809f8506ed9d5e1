"""Show what a model consists of: inputs and outputs, operators, weights, and what comq-onnx would quantize and leave.

    python tools/inspect_model.py model.onnx
    python tools/inspect_model.py model.onnx --json model.json
    python tools/inspect_model.py model_q.onnx --target tensorrt

Nothing is calibrated or written. A quantized model may be looked at too, by whatever tool it was made: then what it
consists of is shown, and with --target which rules of a runtime it breaks (exit code 1 where there are any).
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click
import onnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

import comq_onnx
from comq_onnx.model.source import find_model, load_source
from comq_onnx.targets.catalog import TARGETS
from comq_onnx.write.check import lint


def value(info: onnx.ValueInfoProto) -> dict[str, Any]:
    """Describe an input or output: name, type and dimensions."""
    tensor = info.type.tensor_type
    dims = [d.dim_param or (d.dim_value if d.HasField("dim_value") else "?") for d in tensor.shape.dim]
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type else "not a tensor"
    return {"name": info.name, "type": kind, "dims": dims}


def operators(graph: onnx.GraphProto) -> Counter[str]:
    """Count the nodes by operator, subgraphs included."""
    counts: Counter[str] = Counter()
    for node in graph.node:
        counts[f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type] += 1
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                counts += operators(attribute.g)
    return counts


def weights(graph: onnx.GraphProto) -> Counter[str]:
    """Count the bytes of the initializers by type."""
    sizes: Counter[str] = Counter()
    bits = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}
    for tensor in graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if kind == "STRING":
            continue
        width = bits.get(kind) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        sizes[kind.lower()] += math.ceil(math.prod(tensor.dims) * width / 8)
    return sizes


def inspect(path: Path, target: str | None = None) -> dict[str, Any]:
    """Collect all that is known about a model without running samples through it."""
    path = find_model(path)
    model, source = load_source(path)
    proto = onnx.load(path, load_external_data=False)
    initializers = {tensor.name for tensor in proto.graph.initializer}
    found: dict[str, Any] = {
        "model": str(path),
        "bytes": source.size,
        "ir_version": proto.ir_version,
        "opsets": {o.domain or "ai.onnx": o.version for o in proto.opset_import},
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "metadata": {p.key: p.value for p in proto.metadata_props},
        "inputs": [value(v) for v in proto.graph.input if v.name not in initializers],
        "outputs": [value(v) for v in proto.graph.output],
        "operators": dict(operators(proto.graph).most_common()),
        "weight_bytes": dict(weights(proto.graph).most_common()),
        "broken_rules": None if target is None else lint(model, TARGETS[target]),
    }
    try:
        plan = comq_onnx.plan(path)
    except comq_onnx.ModelError as error:
        return found | {"quantizable": [], "left": {}, "why_not": str(error)}
    layers = [
        {"name": x.name, "op": x.op, "weight": list(x.weight_shape), "bytes": x.bytes_before, "stage": x.stage,
         "form": x.form}
        for x in plan.layers
    ]  # fmt: skip
    return found | {"quantizable": layers, "left": plan.skipped, "why_not": None}


def show(found: dict[str, Any], console: Console) -> None:
    """Print what was found."""
    lines = [f"{found['model']}: {found['bytes'] / 1e6:,.2f} MB, {found['producer'] or 'producer unknown'}"]
    lines.append(f"IR {found['ir_version']}, " + ", ".join(f"{d} {v}" for d, v in found["opsets"].items()))
    for which in ("inputs", "outputs"):
        lines += [f"{which[:-1]} {v['name']} {v['type']} {v['dims']}" for v in found[which]]
    lines.append("operators: " + ", ".join(f"{n} {op}" for op, n in found["operators"].items()))
    lines.append("weights: " + ", ".join(f"{n / 1e6:,.2f} MB {kind}" for kind, n in found["weight_bytes"].items()))
    broken = found["broken_rules"]
    if broken is not None:
        lines += [f"breaks a rule: {fault}" for fault in broken] or ["keeps every rule of the target"]
    if found["why_not"]:
        lines.append(f"nothing to quantize: {found['why_not']}")
    for line in lines:
        console.print(line, markup=False, highlight=False)
    if found["why_not"]:
        return
    layers = found["quantizable"]
    size = sum(layer["bytes"] for layer in layers)
    title = f"{len(layers)} layers can be quantized, {size / 1e6:,.2f} MB of weights"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("layer", "op", "weight", "kB", "stage"):
        table.add_column(column, justify="right" if column in ("weight", "kB", "stage") else "left", overflow="fold")
    for layer in layers:
        shape = "x".join(map(str, layer["weight"]))
        table.add_row(Text(layer["name"]), layer["op"], shape, f"{layer['bytes'] / 1e3:,.1f}", str(layer["stage"]))
    console.print(table)
    for name, reason in found["left"].items():
        console.print(f"left: {name}: {reason}", markup=False, highlight=False)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(list(TARGETS)), help="Look whether the model keeps this target's rules.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write what is found as JSON.")
def main(model: Path, target: str | None, json_path: Path | None) -> None:
    """Show what MODEL consists of, and what comq-onnx would quantize."""
    logging.basicConfig(level=logging.ERROR)
    try:
        found = inspect(model, target)
    except comq_onnx.ComqError as error:
        click.echo(f"inspect_model: {error}", err=True)
        sys.exit(error.exit_code)
    console = Console()
    show(found, console if console.is_terminal else Console(width=140))
    if json_path:
        json_path.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["broken_rules"]))


if __name__ == "__main__":
    main()
