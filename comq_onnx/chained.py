"""Make samples for a model that reads what another model of its folder gives: a decoder behind an encoder, say.

A model is behind another one where an input has the name of an output there, or where its past comes from a cache
there. optimum writes such folders:

    encoder_model.onnx             input_ids, attention_mask -> last_hidden_state
    decoder_model.onnx             input_ids, encoder_hidden_states, encoder_attention_mask -> logits, present.*
    decoder_with_past_model.onnx   one token and past_key_values.*, those of the encoder among them -> logits, present.*
    decoder_model_merged.onnx      both decoders, and use_cache_branch that chooses one

The model behind is calibrated on what the quantized one before it gives. The tokens of a decoder are those that the
float models go on with themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx.context import Context
from comq_onnx.errors import ModelError, SamplesError
from comq_onnx.model.float_model import open_model
from comq_onnx.model.source import read_model
from comq_onnx.options.options import Options
from comq_onnx.runtime.session import Session
from comq_onnx.samples.cache_shapes import cache_shapes, with_cache_shapes
from comq_onnx.samples.dataset import load_dataset
from comq_onnx.samples.decoding import cache_of
from comq_onnx.samples.fit import fit_to_inputs
from comq_onnx.samples.language_inputs import complete, complete_tokens, role_of, token_inputs
from comq_onnx.samples.model_folder import find_beside, parse_json
from comq_onnx.samples.samples import AnyArray, ModelInput, Samples

# what optimum calls an input, and the output that it comes from
_OTHER_NAMES = {"encoder_hidden_states": "last_hidden_state"}
# tokens of a decoder's sample
TOKENS = 32
BATCH = 8
# where the first token of a decoder stands
_CONFIGURATIONS = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class Link:
    """Tell which model comes before another one.

    before: its file
    reads: the name of its output, by the name of the input that reads it
    """

    before: Path
    reads: Mapping[str, str]


def find_links(models: Sequence[Path]) -> dict[Path, Link]:
    """Find the models that read what others of the same folder give, by their files.

    Where several do, the first of them counts. Files that cannot be read are left out.
    """
    sides = {path: side for path in models if (side := _sides(path)) is not None}
    links: dict[Path, Link] = {}
    for path, (inputs, outputs) in sides.items():
        # a cache that a model does not return itself must come from another one
        pasts = {name for name in inputs if role_of(name) == "past"}
        foreign = pasts if {cache_of(name) for name in pasts} - set(map(cache_of, outputs)) else set()
        for other, (_, given) in sides.items():
            if other == path or other.parent != path.parent:
                continue
            caches = {cache_of(name): name for name in given if name.lower().startswith("present")}
            reads = {name: given_as for name in inputs if (given_as := _OTHER_NAMES.get(name, name)) in given}
            reads |= {name: caches[cache_of(name)] for name in foreign if cache_of(name) in caches}
            if reads and foreign <= reads.keys():
                links[path] = Link(other, reads)
                break
    return {path: link for path, link in links.items() if path not in _chain(link.before, links)}


def depth(path: Path, links: Mapping[Path, Link]) -> int:
    """Return how many models come before one: they are quantized first."""
    return len(_chain(path, links)) - 1


def make_samples(path: Path, link: Link, given: Samples, quantized: Path | None) -> Samples:
    """Make the samples of a model from those of the model before it.

    given: the samples of that model
    quantized: its quantized file, which gives them; None for the float one

    Raises ComqError where one of them cannot run on these samples.
    """
    before, behind = Session(link.before, "cpu"), Session(path, "cpu")
    inputs = with_cache_shapes(behind.inputs, cache_shapes(read_model(path), path.parent))
    ids = token_inputs(inputs)
    arrays = _behind(link, given, before if quantized is None else Session(quantized, "cpu"))
    arrays |= {i.name: given.arrays[i.name] for i in inputs if i.name in given.arrays and i not in ids}
    tokens, made = [i.name for i in ids if i.name not in arrays], ""
    if tokens and any(role_of(name) == "past" for name in link.reads):
        # behind the cache of all tokens but the last
        arrays |= {name: given.arrays[name][:, -1:] for name in tokens if name in given.arrays}
    elif tokens:
        plain = _masked(arrays | _behind(link, given, before), inputs, given)
        arrays |= dict.fromkeys(tokens, _go_on(path, behind, inputs, plain, tokens))
        made = f"; {TOKENS} tokens of each are what the float model goes on with"
    arrays = _masked(arrays, inputs, given)
    if not ids and (read := [given.arrays[i.name] for i in token_inputs(before.inputs)]):
        # embeddings of tokens are the tokens of what reads them
        arrays = complete(arrays, inputs, read[0], np.ones_like(read[0]), np.zeros_like(read[0]))
    return fit_to_inputs(arrays, inputs, given.source, [f"calibrated on what {link.before.name} gives{made}"])


def first_samples(path: Path, samples: Any, options: Options) -> Samples:
    """Load the samples of a model that reads no other one; samples, options: as `quantize` takes them."""
    context = Context.of(options)
    source = open_model(path, context)
    data = load_dataset(source, samples, context)
    source.session.close()
    parts = (data.calibration.arrays, data.held_back.arrays)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Samples(arrays, data.calibration.source)


def gives(samples: Any, names: Iterable[str]) -> bool:
    """Tell whether samples are arrays that hold these inputs, so that nothing need be made."""
    if isinstance(samples, (str, os.PathLike)) and Path(samples).suffix == ".npz" and Path(samples).is_file():
        with np.load(samples) as stored:
            return set(names) <= set(stored.files)
    return isinstance(samples, Mapping) and set(names) <= set(samples)


# Models
# ----------------------------------------------------------------------------------------------------------------------


def _sides(path: Path) -> tuple[list[str], list[str]] | None:
    """Return the names of the inputs and of the outputs of a model; None where it cannot be read."""
    try:
        graph = read_model(path).graph
    except ModelError:
        return None
    return [str(v.name) for v in graph.inputs], [str(v.name) for v in graph.outputs]


def _chain(path: Path, links: Mapping[Path, Link]) -> list[Path]:
    """Return a model and all models before it, the nearest first; each once, also where they go in a circle."""
    chain = [path]
    while chain[-1] in links and links[chain[-1]].before not in chain:
        chain.append(links[chain[-1]].before)
    return chain


# Samples
# ----------------------------------------------------------------------------------------------------------------------


def _behind(link: Link, given: Samples, session: Session) -> dict[str, AnyArray]:
    """Return what a model gives for samples, by the names of the inputs that read it."""
    wanted, shared = list(link.reads.values()), fit_to_inputs(given.arrays, session.inputs, given.source)
    # the cache of a decoder's sample is that of all tokens but the last
    cut = token_inputs(session.inputs) if any(role_of(name) == "past" for name in link.reads) else []
    found: list[Mapping[str, Any]] = []
    for feeds in shared.batches(BATCH):
        short = {i.name: feeds[i.name][:, :-1] for i in cut}
        found.append(session.run({**feeds, **short}, wanted))
    return {name: np.concatenate([one[output] for one in found]) for name, output in link.reads.items()}


def _masked(arrays: Mapping[str, AnyArray], inputs: Sequence[ModelInput], given: Samples) -> dict[str, AnyArray]:
    """Add what tells padding of the samples before: encoder_attention_mask is their attention_mask."""
    made = dict(arrays)
    for info in inputs:
        if info.name not in made and role_of(info.name) == "mask":
            before = info.name.removeprefix("encoder_")
            if before != info.name and before in given.arrays:
                made[info.name] = given.arrays[before]
    return made


def _go_on(
    path: Path, session: Session, inputs: Sequence[ModelInput], given: Mapping[str, AnyArray], tokens: list[str]
) -> AnyArray:
    """Return TOKENS tokens that a float decoder goes on with for each sample, int64 [samples, TOKENS].

    given: what it reads beside them
    """
    count = len(next(iter(given.values())))
    ids = np.full((count, TOKENS), _first_token(path.parent), np.int64)
    for start in range(0, count, BATCH):
        some = slice(start, start + BATCH)
        rest = {name: array[some] for name, array in given.items()}
        for width in range(1, TOKENS):
            arrays, _ = complete_tokens({**rest, **dict.fromkeys(tokens, ids[some, :width])}, inputs)
            outputs = session.run(next(fit_to_inputs(arrays, inputs, str(path)).batches(BATCH)))
            ids[some, width] = _logits(path, outputs, width)[:, -1].argmax(axis=-1)
    return ids


def _logits(path: Path, outputs: Mapping[str, Any], width: int) -> AnyArray:
    """Return the scores [samples, width, vocabulary] among the outputs of a decoder. Raises SamplesError."""
    for array in outputs.values():
        if isinstance(array, np.ndarray) and array.ndim == 3 and array.shape[1] == width:
            return array
    raise SamplesError(f"{path}: no output has scores for each token, so no samples can be made for it; give an .npz")


def _first_token(folder: Path) -> int:
    """Return the token that a decoder begins with, as the configurations beside it say; 0 where they do not."""
    for path in find_beside(folder, _CONFIGURATIONS):
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(found, dict) and isinstance(found.get(name), int):
                return int(found[name])
    return 0
