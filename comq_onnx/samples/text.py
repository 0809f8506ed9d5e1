"""Read text as samples: lines of it through a tokenizer, padded and masked as the inputs of the model ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from comq_onnx.errors import OptionError, SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.chat import MESSAGES, Messages, is_conversation, write_out
from comq_onnx.samples.language_inputs import complete, role_of, token_inputs
from comq_onnx.samples.model_folder import find_beside, parse_json
from comq_onnx.samples.next_token import predicts_next
from comq_onnx.samples.samples import AnyArray, Clues, ModelInput, names_of

TEXT_SUFFIXES = frozenset({".txt", ".jsonl"})
DEFAULT_LENGTH = 128  # tokens, where neither the model nor the caller says
# the tokens that tokenizers pad with, by their names
PADS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")


def read_lines(paths: Sequence[Path], field: str | None, count: int, seed: int) -> list[str | Messages]:
    """Read up to `count` texts, drawn with `seed` and in the order of the files; empty lines are left out.

    Each line of a .txt file is a text; of a .jsonl file the field `field` of each line (where it is None `text`, or
    `messages`, a conversation).
    Raises SamplesError, and OptionError for a field where no file is .jsonl.
    """
    if field is not None and all(path.suffix.lower() != ".jsonl" for path in paths):
        raise OptionError(f"--text-field {field}: is for .jsonl files; {paths[0]} holds plain lines")
    rng = np.random.default_rng(seed)
    kept: list[tuple[int, str | Messages]] = []
    # a reservoir, so that a file of any length takes the memory of `count` lines
    for number, line in enumerate(line for path in paths for line in _read_texts(path, field)):
        if number < count:
            kept.append((number, line))
        elif (place := int(rng.integers(number + 1))) < count:
            kept[place] = (number, line)
    if not kept:
        raise SamplesError(f"{paths[0]}: holds no text")
    return [line for _, line in sorted(kept, key=lambda pair: pair[0])]


def _read_texts(path: Path, field: str | None) -> Iterator[str | Messages]:
    """Yield the texts and the conversations of a file. Raises SamplesError, with the line."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield _take_field(line, field) if path.suffix.lower() == ".jsonl" else line.strip()
    except UnicodeDecodeError as error:
        raise SamplesError(f"{path}: after line {number}: not UTF-8 ({error.reason}); convert it") from error
    except ValueError as error:
        raise SamplesError(f"{path}: line {number}: {error}") from error
    except OSError as error:
        raise SamplesError(f"{path}: cannot be read ({error.strerror})") from error


def _take_field(line: str, field: str | None) -> str | Messages:
    """Return the text or the conversation in a field of a JSON line. Raises ValueError."""
    try:
        value = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    fields = value if isinstance(value, dict) else {}
    name = field or ("text" if "text" in fields or MESSAGES not in fields else MESSAGES)
    found = fields.get(name)
    if isinstance(found, str) or is_conversation(found):
        return found
    have = ", ".join(value) if isinstance(value, dict) else type(value).__name__
    raise ValueError(f"no text in {name!r} (it has {have}); choose one with --text-field")


def texts_wanted(inputs: Sequence[ModelInput], count: int, clues: Clues) -> int:
    """Return how many texts to read for `count` samples: more where they are joined, for one sample takes several."""
    return 16 * count if token_inputs(inputs) and _are_joined(inputs, clues) else count


def _are_joined(inputs: Sequence[ModelInput], clues: Clues) -> bool:
    """Tell whether texts fill samples one after another: no mask tells padding from text, or the model writes texts."""
    return not any(role_of(i.name) == "mask" for i in inputs) or predicts_next(inputs, clues)


def tokenize(
    texts: Sequence[str | Messages], inputs: Sequence[ModelInput], options: SampleOptions, clues: Clues, count: int
) -> tuple[dict[str, AnyArray], list[str]]:
    """Turn texts into at most `count` samples: (arrays by input name, notes of what was decided).

    With a mask among the inputs each text is a sample, padded to the longest. Without one the model could not tell
    padding from text: texts are joined and cut into samples of one length. So they are for a model that predicts the
    next token. A conversation is written out by the chat template beside the tokenizer, which has all special tokens in
    it. Raises SamplesError, and OptionError for a --length that the model does not take.
    """
    if [i for i in inputs if i.dtype == object]:
        return _as_strings(texts, inputs), []
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
    longest = fixed or min(options.length or DEFAULT_LENGTH, (tokenizer.truncation or {}).get("max_length", 1 << 30))
    if options.length is not None and fixed is not None and options.length != fixed:
        raise OptionError(f"--length {options.length}: {info.name!r} has {fixed} tokens, always")
    encode = _join_texts if _are_joined(inputs, clues) else _pad_texts
    specials = all(isinstance(text, str) for text in texts)
    if not specials:
        notes.append("conversations written out by the chat template of the tokenizer")
    ids, mask, segments = (a[:count] for a in encode(tokenizer, write_out(texts, path), longest, fixed, specials))
    _check_vocabulary(ids, ids_inputs, clues, path)
    return complete({i.name: ids for i in ids_inputs}, inputs, ids, mask, segments), notes


def _check_vocabulary(ids: AnyArray, inputs: Sequence[ModelInput], clues: Clues, tokenizer: Path) -> None:
    """Raise SamplesError where a tokenizer gives tokens that the embedding of the model does not have."""
    for info in inputs:
        limit = clues.token_limits.get(info.name)
        if limit is not None and ids.max(initial=0) >= limit:
            raise SamplesError(
                f"{tokenizer}: gives token {ids.max()}, the model's {info.name!r} knows {limit}: it is another model's "
                "tokenizer; give this one's with --tokenizer"
            )


def find_tokenizer(options: SampleOptions, clues: Clues) -> tuple[Tokenizer, Path]:
    """Load the tokenizer that the options name, or the one beside the model: (tokenizer, its file).

    Raises SamplesError, and OptionError where the options name no tokenizer.
    """
    if options.tokenizer is not None:
        path = Path(options.tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise OptionError(f"--tokenizer {options.tokenizer}: no such file, nor a folder with a tokenizer.json")
    else:
        found = find_beside(clues.folder, ("tokenizer.json",)) if clues.folder is not None else []
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


def _pad_texts(tokenizer: Tokenizer, texts: Sequence[str], longest: int, fixed: int | None, specials: bool) -> Encoded:
    """Return ids, mask and segments [texts, tokens].

    Each text is cut at `longest` tokens, and padded to `fixed` tokens or else to the longest text.

    specials: add the special tokens of the tokenizer
    """
    pad = next((p for p in map(tokenizer.token_to_id, PADS) if p is not None), 0)
    tokenizer.enable_truncation(longest)
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=specials)
    width = fixed or max(1, *(len(e.ids) for e in encoded))
    ids = np.full((len(encoded), width), pad, np.int64)
    mask, segments = np.zeros_like(ids), np.zeros_like(ids)
    for i, e in enumerate(encoded):
        ids[i, : len(e.ids)], mask[i, : len(e.ids)], segments[i, : len(e.ids)] = e.ids, 1, e.type_ids
    return ids, mask, segments


def _join_texts(tokenizer: Tokenizer, texts: Sequence[str], longest: int, fixed: int | None, specials: bool) -> Encoded:
    """Return ids, ones and zeros [samples, tokens] of all texts one after another.

    A sample has `fixed` tokens or else `longest`, or fewer where there would be less than eight samples.

    specials: add the special tokens of the tokenizer
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=specials)
    stream = np.array([t for e in encoded for t in e.ids], np.int64)
    width = fixed or max(1, min(longest, len(stream) // 8))
    if len(stream) < width:
        raise SamplesError(f"the text has {len(stream)} tokens, not the {width} of one sample: give more")
    ids = stream[: len(stream) // width * width].reshape(-1, width)
    return ids, np.ones_like(ids), np.zeros_like(ids)


def _as_strings(texts: Sequence[str | Messages], inputs: Sequence[ModelInput]) -> dict[str, AnyArray]:
    """Return the texts themselves, for a model that tokenizes by itself. Raises SamplesError where it takes no text."""
    if len(inputs) != 1 or len(inputs[0].dims or (None,)) > 2:
        raise SamplesError(
            f"text fits a model with one input of strings; this one has {names_of(i.name for i in inputs)}"
        )
    if not all(isinstance(text, str) for text in texts):
        raise SamplesError(
            f"the model tokenizes {inputs[0].name!r} by itself, without a chat template: give lines of text"
        )
    rank = len(inputs[0].dims or (None,))
    array = np.array(texts, dtype=object)
    return {inputs[0].name: array if rank == 1 else array[:, None]}
