"""Go on with ten prompts greedily, by a loop of our own and by ONNX Runtime GenAI: the texts, and tokens a second.

    python tools/decode.py smollm2 smollm2_q4 --tokens 32

Each folder holds a model, tokenizer.json and, for ONNX Runtime GenAI, genai_config.json. Both get the same tokens, on
one thread. GenAI keeps keys and values in buffers of its own, so that a text that is the same shows that the quantized
model works there as it does by itself. Where onnxruntime-genai is not installed, the loop runs alone. The last line of
a model says for how many prompts both texts are the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import onnxruntime
from _language_model import Decoded, LanguageModel
from tokenizers import Tokenizer

from comq_onnx.errors import ComqError

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "Water boils when",
    "My favourite book is about",
    "The first thing to do in the morning is",
    "Two plus two is",
    "In the year 1969",
    "A good friend is someone who",
    "The ship left the harbour and",
    "def add(a, b):",
)
SETTINGS = {"model": {"decoder": {"session_options": {"intra_op_num_threads": 1, "inter_op_num_threads": 1}}}}


def genai() -> ModuleType | None:
    """Return ONNX Runtime GenAI; None where it is not installed."""
    try:
        import onnxruntime_genai
    except ImportError:
        return None
    return onnxruntime_genai


class GenAI:
    """Go on with prompts by ONNX Runtime GenAI."""

    def __init__(self, library: ModuleType, folder: Path) -> None:
        config = library.Config(str(folder))
        config.overlay(json.dumps(SETTINGS))
        self.library: Any = library
        self.model = library.Model(config)

    def greedy(self, prompt: Sequence[int], count: int) -> Decoded:
        """Go on with the likeliest token, `count` times or until the model says that it ends."""
        params = self.library.GeneratorParams(self.model)
        params.set_search_options(max_length=len(prompt) + count, do_sample=False)
        generator = self.library.Generator(self.model, params)
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        start, steps = time.perf_counter(), 0
        while not generator.is_done():
            generator.generate_next_token()
            steps += 1
        seconds = max(time.perf_counter() - start, 1e-9)
        return Decoded([int(t) for t in generator.get_sequence(0)[len(prompt) :]], steps / seconds)


def ends(folder: Path) -> list[int]:
    """Return the tokens that end a text, as genai_config.json has them; [] where there is none."""
    path = folder / "genai_config.json"
    found = json.loads(path.read_text(encoding="utf-8"))["model"].get("eos_token_id", []) if path.exists() else []
    return found if isinstance(found, list) else [found]


def decode(folder: Path, prompts: Sequence[str], count: int, library: ModuleType | None) -> None:
    """Print what a model goes on with."""
    tokenizer, last = Tokenizer.from_file(str(folder / "tokenizer.json")), ends(folder)
    model = LanguageModel.open(folder, threads=1)
    other = GenAI(library, folder) if library is not None and (folder / "genai_config.json").exists() else None
    rates: list[list[float]] = [[], []]
    same = 0
    for prompt in prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        ours = model.greedy(ids, count, last)
        rates[0].append(ours.rate)
        click.echo(f"{folder}: {prompt!r} ... {tokenizer.decode(ours.tokens)!r}")
        if other is not None:
            theirs = other.greedy(ids, count)
            rates[1].append(theirs.rate)
            # GenAI leaves out the token that ends a text
            is_same = [t for t in theirs.tokens if t not in last] == [t for t in ours.tokens if t not in last]
            same += is_same
            if not is_same:
                click.echo(f"  onnxruntime-genai: {tokenizer.decode(theirs.tokens)!r}")
    said = f"{folder}: {np.median(rates[0]):.0f} tokens/s by our loop"
    if other is not None:
        said += f", {np.median(rates[1]):.0f} by onnxruntime-genai; the same text for {same} of {len(prompts)} prompts"
    click.echo(said)


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A prompt a line.")
@click.option("--tokens", default=32, show_default=True, type=click.IntRange(1), help="Tokens of each text.")
def main(folders: tuple[Path, ...], prompts: Path | None, tokens: int) -> None:
    library = genai()
    version = f"onnxruntime-genai {library.__version__}" if library else "onnxruntime-genai is not installed"
    click.echo(f"onnxruntime {onnxruntime.__version__}, {version}, one thread")
    given = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()] if prompts else PROMPTS
    try:
        for folder in folders:
            decode(folder, given, tokens, library)
    except ComqError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
