"""Text as samples: lines of it through a tokenizer, padded and masked as the model's inputs ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.beside import beside, parse_json
from comq_onnx.samples.samples import AnyArray, Clues, ModelInput, names_of

TEXT_SUFFIXES = frozenset({".txt", ".jsonl"})
TOKENS = 128
PADS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")


def read_lines(paths: Sequence[Path], field: str | None, count: int, seed: int) -> list[str]:
    """Up to `count` texts of .txt files (a line each) and .jsonl files (the field `field` of each line, `text` unless
    told), drawn with `seed` and in their order. Empty lines are left out. Raises SamplesError."""
    if field is not None and all(path.suffix.lower() != ".jsonl" for path in paths):
        raise OptionError(f"--text-field {field}: is for .jsonl files; {paths[0]} holds plain lines")
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, str]] = []
    # a reservoir, so that a file of any length takes the memory of `count` lines
    for number, line in enumerate(line for path in paths for line in _lines(path, field or "text")):
        if number < count:
            kept.append((number, line))
        elif (place := int(rng.integers(number + 1))) < count:
            kept[place] = (number, line)
    if not kept:
        raise SamplesError(f"{paths[0]}: holds no text")
    return [line for _, line in sorted(kept)]


def _lines(path: Path, field: str) -> Iterator[str]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield _field(line, field) if path.suffix.lower() == ".jsonl" else line.strip()
    except UnicodeDecodeError as error:
        raise SamplesError(f"{path}: after line {number}: not UTF-8 ({error.reason}); convert it") from error
    except ValueError as error:
        raise SamplesError(f"{path}: line {number}: {error}") from error
    except OSError as error:
        raise SamplesError(f"{path}: cannot be read ({error.strerror})") from error


def _field(line: str, field: str) -> str:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        have = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"no text in {field!r} (it has {have}); choose one with --text-field")
    return str(value[field])


def texts_wanted(inputs: Sequence[ModelInput], count: int) -> int:
    """How many texts to read for `count` samples: more where they are joined, since one sample takes several."""
    return count if any(role_of(i.name) == "mask" for i in inputs) or not token_inputs(inputs) else 16 * count


def token_inputs(inputs: Sequence[ModelInput]) -> list[ModelInput]:
    """The inputs that take token ids: whole numbers of rank 2 by name, else the only ones of that rank."""
    whole = [i for i in inputs if i.dtype.kind in "iu" and (i.dims is None or len(i.dims) == 2)]
    named = [i for i in whole if i.name.lower().endswith(("input_ids", "input.ids", "tokens", "token_ids"))]
    others = [i for i in whole if role_of(i.name) == "ids"]
    return named or (others if len(others) == 1 else [])


def tokenize(
    texts: Sequence[str], inputs: Sequence[ModelInput], options: SampleOptions, clues: Clues, count: int
) -> tuple[dict[str, AnyArray], list[str]]:
    """The arrays of all inputs for `count` samples of these texts, at the most, and what was decided.

    With a mask among the inputs each text is a sample, padded to the longest; without one, texts are joined and cut
    into samples of one length, since padding could not be told from text. Raises SamplesError.
    """
    if [i for i in inputs if i.dtype == object]:
        return _strings(texts, inputs), []
    ids_inputs = token_inputs(inputs)
    if not ids_inputs:
        raise SamplesError(
            f"text fits a model with an input of token ids [batch, tokens]; this one has "
            f"{names_of(i.name for i in inputs)}: give an .npz or a Python reader"
        )
    tokenizer, path = find_tokenizer(options, clues)
    notes = [] if options.tokenizer else [f"text tokenized with {path.name} beside the model"]
    info = ids_inputs[0]
    fixed = info.dims[1] if info.dims is not None else None
    masked = any(role_of(i.name) == "mask" for i in inputs)
    longest = fixed or min(options.length or TOKENS, (tokenizer.truncation or {}).get("max_length", 1 << 30))
    if options.length is not None and fixed is not None and options.length != fixed:
        raise OptionError(f"--length {options.length}: {info.name!r} has {fixed} tokens, always")
    ids, mask, kinds = (a[:count] for a in (_padded if masked else _packed)(tokenizer, texts, longest, fixed))
    for one in ids_inputs:
        limit = clues.token_limits.get(one.name)
        if limit is not None and ids.max(initial=0) >= limit:
            raise SamplesError(
                f"{path}: gives token {ids.max()}, the model's {one.name!r} knows {limit}: it is another model's "
                "tokenizer; give this one's with --tokenizer"
            )
    return complete({i.name: ids for i in ids_inputs}, inputs, ids, mask, kinds), notes


def find_tokenizer(options: SampleOptions, clues: Clues) -> tuple[Tokenizer, Path]:
    """The tokenizer that the options name, or the one beside the model. Raises SamplesError."""
    if options.tokenizer is not None:
        path = Path(options.tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise OptionError(f"--tokenizer {options.tokenizer}: no such file, nor a folder with a tokenizer.json")
    else:
        found = beside(clues.folder, ("tokenizer.json",)) if clues.folder is not None else []
        if not found:
            raise SamplesError(
                "text needs a tokenizer.json (of the tokenizers library): put it beside the model, or name it with "
                "--tokenizer"
            )
        path = found[0]
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8")), path
    except Exception as error:  # the library raises Exception itself
        raise SamplesError(f"{path}: not a tokenizer of the tokenizers library ({error})") from error


Encoded = tuple[AnyArray, AnyArray, AnyArray]


def _padded(tokenizer: Tokenizer, texts: Sequence[str], longest: int, fixed: int | None) -> Encoded:
    """Ids, mask and segment ids [n, tokens], each text padded to the longest, or to `fixed` tokens."""
    pad = next((p for p in map(tokenizer.token_to_id, PADS) if p is not None), 0)
    tokenizer.enable_truncation(longest)
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(list(texts))
    width = fixed or max(1, *(len(e.ids) for e in encoded))
    ids = np.full((len(encoded), width), pad, np.int64)
    mask, kinds = np.zeros_like(ids), np.zeros_like(ids)
    for i, e in enumerate(encoded):
        ids[i, : len(e.ids)], mask[i, : len(e.ids)], kinds[i, : len(e.ids)] = e.ids, 1, e.type_ids
    return ids, mask, kinds


def _packed(tokenizer: Tokenizer, texts: Sequence[str], longest: int, fixed: int | None) -> Encoded:
    """Ids, ones and zeros [n, tokens], of all texts one after another: `fixed` or `longest` tokens each, or fewer where
    there would be less than eight samples."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    stream = np.array([t for e in tokenizer.encode_batch(list(texts)) for t in e.ids], np.int64)
    width = fixed or max(1, min(longest, len(stream) // 8))
    if len(stream) < width:
        raise SamplesError(f"the text has {len(stream)} tokens, not the {width} of one sample: give more")
    ids = stream[: len(stream) // width * width].reshape(-1, width)
    return ids, np.ones_like(ids), np.zeros_like(ids)


def _strings(texts: Sequence[str], inputs: Sequence[ModelInput]) -> dict[str, AnyArray]:
    """Texts for a model that tokenizes by itself."""
    if len(inputs) != 1 or len(inputs[0].dims or (None,)) > 2:
        raise SamplesError(
            f"text fits a model with one input of strings; this one has {names_of(i.name for i in inputs)}"
        )
    rank = len(inputs[0].dims or (None,))
    array = np.array(texts, dtype=object)
    return {inputs[0].name: array if rank == 1 else array[:, None]}


# The inputs beside the tokens
# ---------------------------------------------------------------------------------------------------------


def complete(
    arrays: dict[str, AnyArray], inputs: Sequence[ModelInput], ids: AnyArray, mask: AnyArray, kinds: AnyArray
) -> dict[str, AnyArray]:
    """The arrays with those of the other inputs that language models have: masks, segments, positions, and an empty
    past where the model keeps keys and values. Raises SamplesError for an input of no such kind."""
    past = max((_past_length(i) for i in inputs if role_of(i.name) == "past"), default=0)
    for info in inputs:
        if info.name in arrays:
            continue
        match role_of(info.name):
            case "mask":
                # what a past of a fixed length holds are zeros, to be ignored
                made: Any = np.pad(mask, ((0, 0), (past, 0)))
            case "segments":
                made = kinds
            case "positions":
                made = past + np.maximum(mask.cumsum(axis=1) - 1, 0)
            case "past":
                made = _empty_past(info, len(ids))
            case "flag":
                made = np.zeros((len(ids), *(d or 1 for d in info.dims or ())))
            case _:
                raise SamplesError(
                    f"text gives no values for input {info.name!r}; give all inputs in an .npz or by a Python reader"
                )
        arrays[info.name] = made.astype(info.dtype)
    return arrays


def role_of(name: str) -> str:
    """What an input of a language model is for, by its name as exporters write it."""
    name = name.lower()
    for role, words in (
        ("past", ("past", "cache_k", "cache_v", "key_cache", "value_cache")),
        ("flag", ("use_cache",)),
        ("mask", ("mask",)),
        ("segments", ("token_type", "segment")),
        ("positions", ("position",)),
        ("ids", ("ids", "tokens", "input")),
    ):
        if any(word in name for word in words):
            return role
    return "other"


def _past_length(info: ModelInput) -> int:
    """The fixed length of a past [batch, heads, past, width], or 0 where it is free."""
    return (info.dims[-2] or 0) if info.dims is not None and len(info.dims) >= 3 else 0


def _empty_past(info: ModelInput, count: int) -> AnyArray:
    """Keys or values of nothing before: zeros of the fixed length, or none at all where the length is free."""
    dims = info.dims or ()
    if len(dims) < 3 or any(d is None for axis, d in enumerate(dims) if axis not in (0, len(dims) - 2)):
        raise SamplesError(
            f"{info.name!r} has no fixed heads and width, so an empty past cannot be made; give all inputs in an .npz"
        )
    return np.zeros((count, *(d or 0 for d in dims[1:])), info.dtype)
