"""Make the feeds of one step of decoding: one token, after a cache that is full of the tokens before it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comq_onnx.samples.language_inputs import role_of
from comq_onnx.samples.samples import ModelInput

Arrays = Mapping[str, Any]


def decoding_feeds(inputs: Sequence[ModelInput], feeds: Arrays, outputs: Arrays) -> dict[str, Any] | None:
    """Return the feeds of the token behind a whole sample; None where the model cannot take up its own cache.

    feeds, outputs: of one sample, which began with an empty past
    """
    pasts, caches = [i.name for i in inputs if role_of(i.name) == "past"], _caches(outputs)
    if not pasts or not all(_goes_on(np.asarray(feeds[name]), caches.get(cache_of(name))) for name in pasts):
        return None
    return next_feeds(inputs, feeds, outputs)


def next_feeds(inputs: Sequence[ModelInput], feeds: Arrays, outputs: Arrays) -> dict[str, Any]:
    """Return the feeds of one more token, with the cache that a model returned; the token is the last one once more.

    feeds, outputs: of the tokens before, by a model that can take up its own cache
    """
    caches = _caches(outputs)
    made: dict[str, Any] = {}
    for info in inputs:
        role = role_of(info.name)
        made[info.name] = caches[cache_of(info.name)] if role == "past" else _next(role, np.asarray(feeds[info.name]))
    return made


def _caches(outputs: Arrays) -> dict[str, Any]:
    """Return the caches among the outputs, by what their names have in common with those of the past."""
    return {cache_of(name): array for name, array in outputs.items() if name.lower().startswith("present")}


def cache_of(name: str) -> str:
    """Return what the names of a past and of the cache that it comes from have in common: from the first digit on."""
    return re.sub(r"^\D*", "", name)


def _goes_on(past: Any, cache: Any) -> bool:
    """Tell whether a cache is a past of more positions."""
    if not isinstance(cache, np.ndarray) or cache.ndim != 4 or past.ndim != 4 or past.shape[2] != 0:
        return False
    return bool(cache.shape[2] > 0 and np.delete(cache.shape, 2).tolist() == np.delete(past.shape, 2).tolist())


def _next(role: str, given: Any) -> Any:
    """Return what an input gets for the token behind a sample."""
    match role:
        case "mask":
            return np.concatenate([given, np.ones_like(given[:, :1])], axis=1)
        case "positions":
            return (given[..., -1:] + 1).astype(given.dtype)
        case "flag":
            return np.ones_like(given)
        case "logits":
            return given
        case _:
            return given[:, -1:]
