"""A language model that is open: its logits, and the text that it goes on with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from comq_onnx.evaluate.language import language_of
from comq_onnx.model.source import find_model, read_model
from comq_onnx.runtime.session import Session
from comq_onnx.samples.cache_shapes import cache_shapes, with_cache_shapes
from comq_onnx.samples.decoding import decoding_feeds, next_feeds
from comq_onnx.samples.fit import fit_to_inputs
from comq_onnx.samples.language_inputs import complete, token_inputs
from comq_onnx.samples.samples import ModelInput


@dataclass(frozen=True)
class Decoded:
    """Hold what a model went on with.

    tokens: the likeliest ones, one by one
    rate: tokens a second behind the first one, which takes the whole prompt; 0 where there is only that
    """

    tokens: list[int]
    rate: float


@dataclass(frozen=True)
class LanguageModel:
    """Hold a language model that is open.

    inputs: described as far as the model tells
    """

    path: Path
    session: Session
    inputs: Sequence[ModelInput]

    @classmethod
    def open(cls, path: Path, threads: int | None = None) -> LanguageModel:
        """Open a file, or the one model of a folder."""
        path = find_model(path)
        session = Session(path, "cpu", what=str(path), threads=threads)
        return cls(path, session, with_cache_shapes(session.inputs, cache_shapes(read_model(path), path.parent)))

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits of a window [1, context], [context, vocabulary]; the past is empty."""
        feeds = self._feeds(ids)
        return self._scores(feeds, self.session.run(feeds))

    def greedy(self, prompt: Sequence[int], count: int, ends: Sequence[int] = ()) -> Decoded:
        """Go on with the likeliest token, `count` times or until one of `ends`; on its own cache, where it has one."""
        ids, made = list(prompt), []
        feeds, start = self._feeds(np.array([ids])), time.perf_counter()
        while True:
            outputs = self.session.run(feeds)
            made.append(int(self._scores(feeds, outputs)[-1].argmax()))
            if len(made) == 1:
                start, step = time.perf_counter(), decoding_feeds(self.inputs, feeds, outputs)
            elif step is not None:
                step = next_feeds(self.inputs, feeds, outputs)
            if len(made) == count or made[-1] in ends:
                break
            feeds = self._feeds(np.array([ids + made])) if step is None else step | self._token(made[-1])
        return Decoded(made, (len(made) - 1) / max(time.perf_counter() - start, 1e-9))

    def _feeds(self, ids: np.ndarray) -> dict[str, Any]:
        """Return all inputs for tokens [1, context] behind an empty past."""
        info = self._tokens()
        arrays = complete({info.name: ids.astype(info.dtype)}, self.inputs, ids, np.ones_like(ids), np.zeros_like(ids))
        return dict(next(fit_to_inputs(arrays, self.inputs, "text").batches(1)))

    def _token(self, token: int) -> dict[str, Any]:
        """Return the input of one token."""
        info = self._tokens()
        return {info.name: np.array([[token]], info.dtype)}

    def _tokens(self) -> ModelInput:
        """Return the input that takes tokens. Raises ClickException where there are several, or none."""
        found = token_inputs(self.inputs)
        if len(found) != 1:
            raise click.ClickException(f"{self.path}: {len(found)} inputs take tokens; give models with one")
        return found[0]

    def _scores(self, feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> np.ndarray:
        """Return the logits among the outputs, [positions, vocabulary]. Raises ClickException where there are none."""
        language = language_of(self.inputs, feeds, outputs, predicts_next=True)
        if language is None:
            raise click.ClickException(f"{self.path}: no output has a score for each token of a vocabulary")
        return np.asarray(outputs[language.output][0])
