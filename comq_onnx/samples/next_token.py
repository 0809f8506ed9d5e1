"""Tell whether a model predicts the next token, so that texts may follow one another in a sample of its own length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from comq_onnx.errors import ComqError
from comq_onnx.samples.fit import fit_to_inputs
from comq_onnx.samples.language_inputs import complete, role_of, token_inputs
from comq_onnx.samples.samples import AnyArray, Clues, Feeds, ModelInput

LEAST_VOCABULARY = 32  # outputs of fewer scores are not logits over tokens
TRIED_TOKENS = 8  # of the two samples that show whether a model looks ahead


def predicts_next(inputs: Sequence[ModelInput], clues: Clues) -> bool:
    """Tell whether a model predicts the next token: it keeps a past, or no logits depend on later tokens when tried."""
    tokens, run = token_inputs(inputs), runner(inputs, clues)
    if not tokens or any(role_of(i.name) == "past" for i in inputs):
        return bool(tokens)
    if run is None:
        return False
    limit = clues.token_limits.get(tokens[0].name, 2 * TRIED_TOKENS)
    width = (tokens[0].dims or (None, None))[1] or TRIED_TOKENS
    ids = (np.arange(2 * width) % limit).reshape(2, width)

    def fill(ids: AnyArray) -> Feeds:
        given = {i.name: ids.astype(i.dtype) for i in tokens}
        return complete(given, inputs, ids, np.ones_like(ids), np.zeros_like(ids))

    try:
        return find_logits(run, fill, ids) is not None
    except ComqError:  # the model takes other feeds than these
        return False


def runner(inputs: Sequence[ModelInput], clues: Clues) -> Callable[[Feeds], Feeds] | None:
    """Return a function that runs the float model on arrays of samples; None where there is no model."""
    run = clues.run
    if run is None:
        return None
    return lambda arrays: run(next(fit_to_inputs(arrays, inputs, "tokens").batches(max(map(len, arrays.values())))))


def find_logits(run: Callable[[Feeds], Feeds], fill: Callable[[AnyArray], Feeds], ids: AnyArray) -> str | None:
    """Find the output of logits over the vocabulary that does not depend on later tokens; None where there is none."""
    changed = ids.copy()
    changed[:, -1] = ids[:, 0]
    before, after = run(fill(ids)), run(fill(changed))
    for name, output in before.items():
        if isinstance(output, np.ndarray) and output.shape[:2] == ids.shape and output.ndim == 3:
            large_enough = output.shape[-1] > ids.max() and output.shape[-1] >= LEAST_VOCABULARY
            if large_enough and np.allclose(output[:, :-1], after[name][:, :-1], rtol=1e-3, atol=1e-4):
                return name
    return None
