"""Quantize a made-up decoder that is larger than the memory it may take, and see what its process took.

    python tools/check/large.py --gigabytes 4 --memory 1
    python tools/check/large.py --gigabytes 1 --solver rtn

The decoder (attention with 16 heads, gated feed-forward blocks, a table and a head of 32,000 tokens; random weights) is
written tensor by tensor, so that this program takes little memory itself. The command runs in a process of its own,
whose peak resident memory is read from the system; it counts mapped pages of files too. The result is loaded, and must
give finite numbers for a sample. With COMQ the samples are a few random tokens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import click
import numpy as np
import onnx
import onnxruntime
from onnx import helper

WIDTH, INNER, HEADS, VOCABULARY = 2048, 5632, 16, 32_000
BLOCK_NUMBERS = 4 * WIDTH**2 + 3 * WIDTH * INNER


@dataclass
class Writer:
    """Write weights behind one another to a file, and hold what a model says of them.

    data: the file
    tensors: the initializers so far
    nodes: the nodes so far
    """

    data: BinaryIO
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def weight(self, name: str, *shape: int) -> str:
        """Write random numbers of the size that keeps the size of what they multiply. Returns the name."""
        rng = np.random.default_rng(len(self.tensors))
        array = rng.standard_normal(shape, np.float32) * np.float32(shape[0] ** -0.5)
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT, raw_data=b"")
        onnx.external_data_helper.set_external_data(tensor, "model.onnx.data", self.data.tell(), array.nbytes)
        tensor.ClearField("raw_data")
        self.data.write(array.data)
        self.tensors.append(tensor)
        return name

    def small(self, name: str, array: np.ndarray) -> str:
        """Keep a small weight in the model itself."""
        self.tensors.append(onnx.numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, out: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        """Add a node with one output. Returns the name of that."""
        self.nodes.append(helper.make_node(op, list(inputs), [out], out, domain=domain, **attributes))
        return out


def write_decoder(folder: Path, blocks: int) -> Path:
    """Write a decoder of so many blocks, with its weights beside it."""
    path = folder / "model.onnx"
    with (folder / "model.onnx.data").open("wb") as data:
        to = Writer(data)
        gain = to.small("gain", np.ones(WIDTH, np.float32))
        x = to.node("Gather", "embedded", to.weight("embed", VOCABULARY, WIDTH), "input_ids")
        for i in range(blocks):
            x = _block(to, x, i, gain)
        last = to.node("SimplifiedLayerNormalization", "normed", x, gain, axis=-1, epsilon=1e-5)
        to.node("MatMul", "logits", last, to.weight("head", WIDTH, VOCABULARY))
    graph = helper.make_graph(
        to.nodes, "decoder",
        [helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "seq"])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", "seq", VOCABULARY])],
        to.tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


def _block(to: Writer, x: str, i: int, gain: str) -> str:
    """Add attention and a gated feed-forward block. Returns the name of what they make."""
    h = to.node("SimplifiedLayerNormalization", f"h{i}", x, gain, axis=-1, epsilon=1e-5)
    q, k, v = (to.node("MatMul", f"{n}{i}", h, to.weight(f"w{n}{i}", WIDTH, WIDTH)) for n in "qkv")
    attended = to.node(
        "MultiHeadAttention", f"attended{i}", q, k, v, domain="com.microsoft", num_heads=HEADS, unidirectional=1
    )
    out = to.node("MatMul", f"o{i}", attended, to.weight(f"wo{i}", WIDTH, WIDTH))
    x = to.node("Add", f"x{i}", x, out)
    h = to.node("SimplifiedLayerNormalization", f"g{i}", x, gain, axis=-1, epsilon=1e-5)
    gate, up = (to.node("MatMul", f"{n}{i}", h, to.weight(f"w{n}{i}", WIDTH, INNER)) for n in ("gate", "up"))
    gated = to.node("Mul", f"gated{i}", to.node("Mul", f"silu{i}", gate, to.node("Sigmoid", f"s{i}", gate)), up)
    down = to.node("MatMul", f"down{i}", gated, to.weight(f"wdown{i}", INNER, WIDTH))
    return to.node("Add", f"y{i}", x, down)


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.option("--gigabytes", default=4.0, show_default=True, help="About the size of the decoder.")
@click.option("--memory", default="1", show_default=True, help="What the command is told, in GB.")
@click.option("--solver", default="comq", show_default=True, help="Without samples where it is rtn.")
@click.option("--samples", default=8, show_default=True, help="Number of samples of 64 tokens.")
@click.option("--option", "options", multiple=True, help="One more option of the command.")
def main(gigabytes: float, memory: str, solver: str, samples: int, options: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        blocks = max(1, round((gigabytes * 1e9 / 4 - 2 * VOCABULARY * WIDTH) / BLOCK_NUMBERS))
        model = write_decoder(folder, blocks)
        size = sum(f.stat().st_size for f in folder.iterdir())
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, (samples, 64))
        np.savez(folder / "calib.npz", input_ids=tokens)
        command = [sys.executable, "-m", "comq_onnx", str(model), "--bits", "4", "--uniform", "--memory", memory]
        command += ["--solver", solver, "-o", str(folder / "q.onnx"), "-q", *options]
        command += [] if solver == "rtn" else ["--calib", str(folder / "calib.npz")]
        begun = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise click.ClickException(f"the command ended with {os.waitstatus_to_exitcode(status)}")
        seconds, cpu = time.perf_counter() - begun, used.ru_utime + used.ru_stime
        made = sum(f.stat().st_size for f in folder.glob("q.onnx*"))
        click.echo(
            f"{blocks} blocks, {size / 1e9:.2f} GB -> {made / 1e9:.2f} GB: {seconds:.0f} s, {cpu:.0f} CPU s, "
            f"peak {used.ru_maxrss / 1024**2:.2f} GiB resident"
        )
        session = onnxruntime.InferenceSession(folder / "q.onnx", providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"input_ids": tokens[:1]})
        if not np.isfinite(logits).all():
            raise click.ClickException("the result gives numbers that are not finite")
        click.echo("the result loads and runs")


if __name__ == "__main__":
    main()
