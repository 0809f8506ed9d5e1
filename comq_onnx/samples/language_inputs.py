"""Make the inputs that language models have beside their tokens: masks, segments, positions, an empty past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comq_onnx.errors import SamplesError
from comq_onnx.samples.samples import AnyArray, ModelInput


def token_inputs(inputs: Sequence[ModelInput]) -> list[ModelInput]:
    """Return the inputs that take token ids: whole numbers of rank 2, by name, else the only one of that rank."""
    whole = [i for i in inputs if i.dtype.kind in "iu" and (i.dims is None or len(i.dims) == 2)]
    named = [i for i in whole if i.name.lower().endswith(("input_ids", "input.ids", "tokens", "token_ids"))]
    others = [i for i in whole if role_of(i.name) == "ids"]
    return named or (others if len(others) == 1 else [])


def complete(
    arrays: dict[str, AnyArray], inputs: Sequence[ModelInput], ids: AnyArray, mask: AnyArray, segments: AnyArray
) -> dict[str, AnyArray]:
    """Add to `arrays` those of the other inputs that language models have, and return them.

    These are masks, segments, positions, an empty past where the model keeps keys and values, and numbers that say how
    to run it: without a past, with the logits of all positions.

    arrays: what is known already, by input name
    ids, mask, segments: the tokens and what is told of each [samples, tokens]

    Raises SamplesError for an input of another kind.
    """
    past = max((_past_length(i) for i in inputs if role_of(i.name) == "past"), default=0)
    for info in inputs:
        if info.name in arrays:
            continue
        match role_of(info.name):
            case "mask":
                # a past of a fixed length holds zeros, which the model must ignore
                made: Any = np.pad(mask, ((0, 0), (past, 0)))
            case "segments":
                made = segments
            case "positions" if info.dims is not None and len(info.dims) == 1:
                made = np.broadcast_to(past + np.arange(ids.shape[1]), ids.shape)
            case "positions":
                made = past + np.maximum(mask.cumsum(axis=1) - 1, 0)
            case "past":
                made = _empty_past(info, len(ids))
            case "flag" | "logits":
                # 0 logits to keep are all of them
                made = np.zeros((len(ids), *(d or 1 for d in info.dims or ())))
            case _:
                raise SamplesError(
                    f"text gives no values for input {info.name!r}; give all inputs in an .npz or by a Python reader"
                )
        arrays[info.name] = made.astype(info.dtype)
    return arrays


def complete_tokens(
    arrays: Mapping[str, AnyArray], inputs: Sequence[ModelInput]
) -> tuple[Mapping[str, AnyArray], list[str]]:
    """Add to tokens the other inputs that language models have: (all arrays, the names of those added).

    Arrays without tokens [samples, tokens], or that lack an input of another kind, stay as they are. All tokens count
    where a model with a past gets no mask; that of other models tells padding, and must be given.

    Raises SamplesError for a past of unknown shape.
    """
    missing = [i.name for i in inputs if i.name not in arrays]
    roles = {role_of(name) for name in missing}
    ids = next((arrays[i.name] for i in token_inputs(inputs) if i.name in arrays), None)
    unknown = roles & {"ids", "other"} or ("mask" in roles and not any(role_of(i.name) == "past" for i in inputs))
    if not missing or unknown or ids is None or ids.ndim != 2:
        return arrays, []
    masks = [array for name, array in arrays.items() if role_of(name) == "mask" and array.shape == ids.shape]
    mask = masks[0] if masks else np.ones_like(ids)
    return complete(dict(arrays), inputs, ids, mask, np.zeros_like(ids)), missing


def lacks_samples(info: ModelInput) -> bool:
    """Tell whether an input has no axis of samples: a number, or what is said of all positions or of the whole call."""
    if info.dims is None or len(info.dims) > 1:
        return False
    return not info.dims or role_of(info.name) in ("flag", "logits") or "cache_position" in info.name.lower()


def role_of(name: str) -> str:
    """Tell what an input of a language model is for, by the names that exporters give; `other` for other names."""
    name = name.lower()
    for role, words in (
        ("logits", ("logits_to_keep",)),
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
    """Return the fixed length of a past [batch, heads, past, width], or 0 where it is free."""
    return (info.dims[-2] or 0) if info.dims is not None and len(info.dims) >= 3 else 0


def _empty_past(info: ModelInput, count: int) -> AnyArray:
    """Return an empty past: zeros of the fixed length, or of length 0 where it is free. Raises SamplesError."""
    dims = info.dims or ()
    if len(dims) < 3 or any(d is None for axis, d in enumerate(dims) if axis not in (0, len(dims) - 2)):
        raise SamplesError(
            f"{info.name!r} has no fixed heads and width, so an empty past cannot be made; give all inputs in an .npz"
        )
    return np.zeros((count, *(d or 0 for d in dims[1:])), info.dtype)
