"""Quantize a language model to 4 bits here and by ONNX Runtime's own tools: perplexity, size, CPU seconds, memory.

    python tools/zoo/export.py zoo --only smollm2
    python tools/bench/language.py zoo/smollm2 --tokens ids.npy --context 256

Every quantizer runs in a process of its own. ONNX Runtime's leave the embedding float; `k_quant` needs blocks, `hqq`
too. The perplexity is that of the tokens in an .npy file [tokens], cut into windows, or of the model's test.npz.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnxruntime

from comq_onnx.evaluate.language import language_of
from comq_onnx.metrics import LanguageSums
from comq_onnx.runtime.session import Session

# run in a process; the model is loaded with its external data, which the file that is written would point at otherwise
ORT_SCRIPT = """
import sys
import onnx
from onnxruntime.quantization import matmul_nbits_quantizer as tools
source, out, how, block = sys.argv[1:]
block = int(block)
config = {
    "rounding": lambda: None,
    "k_quant": lambda: tools.KQuantWeightOnlyQuantConfig(),
    "hqq": lambda: tools.HQQWeightOnlyQuantConfig(block_size=block, bits=4),
}[how]()
model = onnx.load(source)
quantizer = tools.MatMulNBitsQuantizer(model, bits=4, block_size=block, is_symmetric=True, algo_config=config)
quantizer.process()
quantizer.model.save_model_to_file(out, True)
"""


@dataclass(frozen=True)
class Row:
    """Hold what a quantizer took and made."""

    what: str
    seconds: float
    megabytes: float
    size: float
    perplexity: float


def commands(source: Path, calib: Path, out: Path, blocks: Sequence[int]) -> dict[str, list[str]]:
    """Return the command of each quantizer, by what it is called."""
    found = {
        f"onnxruntime {how}, blocks of {block}": [
            sys.executable, "-c", ORT_SCRIPT, str(source), str(out), how, str(block),
        ]
        for block in blocks
        for how in ("rounding", "k_quant", "hqq")
    }  # fmt: skip
    ours = [sys.executable, "-m", "comq_onnx", str(source), "-o", str(out), "-q", "--bits", "4", "--uniform"]
    ours += ["--activations", "none"]
    for granularity in (*map(str, blocks), "channel"):
        name = f"blocks of {granularity}" if granularity.isdigit() else f"per {granularity}"
        options = [*ours, "--granularity", granularity]
        found[f"comq-onnx rounding, {name}"] = [*options, "--solver", "rtn"]
        found[f"comq-onnx, {name}"] = [*options, "--calib", str(calib)]
    return found


def run(command: list[str]) -> tuple[float, float]:
    """Run a command; return its CPU seconds and its peak megabytes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, used = os.wait4(process.pid, 0)
    if status:
        lines = said.strip().splitlines() or ["nothing was said"]
        raise click.ClickException(lines[-1])
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def perplexity(path: Path, windows: np.ndarray) -> float:
    """Return the perplexity of a model with one input of tokens on windows [windows, context]."""
    session, sums = Session(path, "cpu", threads=1), LanguageSums()
    (tokens,) = session.inputs
    for window in windows:
        feeds = {tokens.name: window[None].astype(tokens.dtype)}
        outputs = session.run(feeds)
        language = language_of(session.inputs, feeds, outputs, predicts_next=True)
        if language is None:
            raise click.ClickException(f"{path}: no output has a score for each token of a vocabulary")
        logits = outputs[language.output][0]
        sums.add(logits, logits, np.append(window[1:], -1))
    return sums.result("").perplexity["after"]


def _size(path: Path) -> float:
    """Return the megabytes of a model with its external data."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tokens", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="An .npy of token ids.")
@click.option("--context", default=256, show_default=True, help="Tokens of a window.")
@click.option("--count", default=12288, show_default=True, help="Tokens at most.")
@click.option("--block", "blocks", multiple=True, default=(32,), type=int, show_default=True, help="May be repeated.")
@click.option("--only", default="", help="Only quantizers whose name holds this.")
def main(folder: Path, tokens: Path | None, context: int, count: int, blocks: tuple[int, ...], only: str) -> None:
    source, calib = folder / "model.onnx", folder / "calib.npz"
    if tokens is None:
        windows = next(iter(np.load(folder / "test.npz").values()))
    else:
        ids = np.load(tokens)[:count]
        windows = ids[: len(ids) // context * context].reshape(-1, context)
    click.echo(f"onnxruntime {onnxruntime.__version__}, {windows.size:,} tokens in windows of {windows.shape[1]}")
    click.echo(f"{'':36} {'CPU s':>7} {'peak MB':>8} {'MB':>7} {'perplexity':>10} {'times':>6}")
    start = time.process_time()
    least = perplexity(source, windows)
    click.echo(f"{'float':36} {time.process_time() - start:7.0f} {'':>8} {_size(source):7.1f} {least:10.2f} {1:6.3f}")
    for what, command in commands(source, calib, Path("q.onnx"), blocks).items():
        if only not in what:
            continue
        with tempfile.TemporaryDirectory() as work:
            out = Path(work) / "q.onnx"
            seconds, megabytes = run([str(out) if part == "q.onnx" else part for part in command])
            row = Row(what, seconds, megabytes, _size(out), perplexity(out, windows))
        figures = f"{row.seconds:7.0f} {row.megabytes:8.0f} {row.size:7.1f} {row.perplexity:10.2f}"
        click.echo(f"{row.what:36} {figures} {row.perplexity / least:6.3f}")


if __name__ == "__main__":
    main()
