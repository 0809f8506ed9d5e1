"""Quantize a language model to 4 bits here and by ONNX Runtime's own tools: perplexity, size, seconds, memory, speed.

    python tools/zoo/export.py zoo --only smollm2
    python tools/bench/language.py zoo/smollm2 --tokens ids.npy --context 256
    python tools/bench/language.py genai_folder --calib texts.jsonl --text moby-dick.txt --block 32

Every quantizer runs in a process of its own. ONNX Runtime's leave the embedding float; `k_quant` and `hqq` need blocks.
`gptq` is the solver of that name in comq-onnx: ONNX Runtime's runs the whole model once for every layer and sample. The
perplexity is that of a text, or of the tokens in an .npy file [tokens], cut into windows, or of the model's test.npz.
Tokens a second are those behind a prompt, on one thread, of the models one by one and around again: each has the best
of its rounds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from comq_onnx.metrics import LanguageSums
from comq_onnx.model.source import find_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _language_model import LanguageModel

# tokens of the prompt, and behind it, when decoding is timed; how often each model is
PROMPT, DECODED, ROUNDS = 32, 32, 3

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
    path: Path
    seconds: float = 0.0
    megabytes: float = 0.0


def commands(source: Path, calib: Path, length: int, out: Path, blocks: Sequence[int]) -> dict[str, list[str]]:
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
    given = ["--calib", str(calib), "--length", str(length)]
    for granularity in (*map(str, blocks), "channel"):
        name = f"blocks of {granularity}" if granularity.isdigit() else f"per {granularity}"
        options = [*ours, "--granularity", granularity]
        found[f"comq-onnx rounding, {name}"] = [*options, "--solver", "rtn"]
        found[f"comq-onnx gptq, {name}"] = [*options, *given, "--solver", "gptq"]
        found[f"comq-onnx, {name}"] = [*options, *given]
        found[f"comq-onnx, {name}, asymmetric"] = [*options, *given, "--asymmetric"]
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
    """Return the perplexity of a model on windows [windows, context]; a past is empty."""
    model, sums = LanguageModel.open(path, threads=1), LanguageSums()
    for window in windows:
        logits = model.logits(window[None])
        sums.add(logits, logits, np.append(window[1:], -1))
    return sums.result("").perplexity["after"]


def rates(paths: Sequence[Path], prompt: np.ndarray) -> list[float]:
    """Return the tokens a second of each model behind a prompt [tokens], the models one by one and around again."""
    models = [LanguageModel.open(path, threads=1) for path in paths]
    rounds = [[model.greedy(prompt.tolist(), DECODED).rate for model in models] for _ in range(ROUNDS)]
    return np.max(rounds, axis=0).tolist()


def _size(path: Path) -> float:
    """Return the megabytes of a model with its external data."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6


def _windows(folder: Path, text: Path | None, tokens: Path | None, context: int, count: int) -> np.ndarray:
    """Return the windows [windows, context] of a text, of tokens or of the test samples of a model."""
    if text is not None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = np.asarray(tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids[:count])
    elif tokens is not None:
        ids = np.load(tokens)[:count]
    else:
        return np.asarray(next(iter(np.load(folder / "test.npz").values())))
    return ids[: len(ids) // context * context].reshape(-1, context)


def _print(rows: Sequence[Row], windows: np.ndarray) -> None:
    """Print the figures of all models; the first one is the float model."""
    found = [perplexity(row.path, windows) for row in rows]
    for row, value, rate in zip(rows, found, rates([row.path for row in rows], windows[0, :PROMPT]), strict=True):
        made = f"{row.seconds:7.0f} {row.megabytes:8.0f}" if row.seconds else f"{'':7} {'':8}"
        figures = f"{made} {_size(row.path):7.1f} {value:10.2f} {value / found[0]:6.3f} {rate:9.1f}"
        click.echo(f"{row.what:40} {figures}")


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--calib", type=click.Path(exists=True, path_type=Path), help="Samples.  [default: calib.npz]")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="To be judged on, UTF-8.")
@click.option("--tokens", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="An .npy of token ids.")
@click.option("--context", default=256, show_default=True, help="Tokens of a window.")
@click.option("--count", default=12288, show_default=True, help="Tokens at most.")
@click.option("--block", "blocks", multiple=True, default=(32,), type=int, show_default=True, help="May be repeated.")
@click.option("--only", default="", help="Only quantizers whose name matches this.", metavar="RE")
@click.option("--also", multiple=True, type=click.Path(exists=True, path_type=Path), help="A model made before.")
def main(
    folder: Path, calib: Path | None, text: Path | None, tokens: Path | None, context: int, count: int,
    blocks: tuple[int, ...], only: str, also: tuple[Path, ...],
) -> None:  # fmt: skip
    source = folder / "model.onnx"
    windows = _windows(folder, text, tokens, context, count)
    found = commands(source, calib or folder / "calib.npz", context, Path("q.onnx"), blocks)
    click.echo(f"onnxruntime {onnxruntime.__version__}, {windows.size:,} tokens in windows of {windows.shape[1]}")
    click.echo(f"{'':40} {'CPU s':>7} {'peak MB':>8} {'MB':>7} {'perplexity':>10} {'times':>6} {'tokens/s':>9}")
    rows = [Row("float", source)]
    with tempfile.TemporaryDirectory() as work:
        for what, command in found.items():
            if not re.search(only, what):
                continue
            out = Path(work) / str(len(rows)) / "model.onnx"
            out.parent.mkdir()
            for beside in folder.glob("*.json"):
                shutil.copy(beside, out.parent)
            rows.append(Row(what, out, *run([str(out) if part == "q.onnx" else part for part in command])))
        _print([*rows, *(Row(str(path.parent.name), path) for path in map(find_model, also))], windows)


if __name__ == "__main__":
    main()
