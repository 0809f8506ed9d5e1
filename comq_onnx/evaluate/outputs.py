"""Run models on the same samples, and compare their outputs with those of the first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from comq_onnx.context import Context
from comq_onnx.errors import ModelError, RuntimeFailure
from comq_onnx.evaluate.language import Language, LanguageOutput
from comq_onnx.metrics import (
    ComparisonSums,
    LanguageComparison,
    OutputComparison,
    OutputMatch,
    add_matches,
    match_rows,
    match_values,
)
from comq_onnx.model.judged import Judged
from comq_onnx.model.judged_session import JudgedSession
from comq_onnx.model.layers import Prepared
from comq_onnx.runtime.session import Session
from comq_onnx.samples.dataset import Dataset
from comq_onnx.samples.samples import Samples

# what messages call the quantized model
QUANTIZED = "the quantized model"
Failure = ModelError | RuntimeFailure


@dataclass(frozen=True)
class Compared:
    """Hold how near the outputs of a model are to those of another.

    outputs: those of floats, by their noise
    matches: those of whole numbers, and those whose rows depend on the data
    language: the logits over a vocabulary, as distributions; None where there are none
    """

    outputs: list[OutputComparison]
    matches: list[OutputMatch]
    language: LanguageComparison | None


def compare_sessions(
    before: Session,
    after: Session,
    samples: Samples,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    selected: Collection[str] = (),
    language: Language | None = None,
    beside: Session | None = None,
) -> tuple[Compared, Compared | Failure | None]:
    """Run models on `samples` in one pass, and compare the outputs that they have in common with `before`.

    progress: called with the number of samples that are done, and of all
    selected: outputs whose rows depend on the data
    language: the output that is compared as distributions over a vocabulary
    beside: a third session, which is compared with `before` too: the second result, or the error where it fails
    """
    names = [name for name in before.output_names if name in after.output_names]
    sums = [_Sums(before, names, selected, language) for _ in range(2)]
    failed: Failure | None = None
    done = 0
    for feeds, count in zip(samples.batches(batch_size), samples.batch_counts(batch_size), strict=True):
        done += count
        progress(done, len(samples))
        if not names:
            continue
        expected = before.run(feeds, names)
        sums[0].add(feeds, expected, after.run(feeds, names))
        if beside is not None and failed is None:
            try:
                sums[1].add(feeds, expected, beside.run(feeds, names))
            except (ModelError, RuntimeFailure) as error:
                failed = error
    return sums[0].result(), failed or (None if beside is None else sums[1].result())


def compare_outputs(before: Session, after: Session, samples: Samples, batch_size: int) -> list[OutputComparison]:
    """Run both models on `samples` and compare every floating-point output that they have in common."""
    return compare_sessions(before, after, samples, batch_size)[0].outputs


class _Sums:
    """Add up the comparisons of all outputs of a model."""

    def __init__(
        self, before: Session, names: Sequence[str], selected: Collection[str], language: Language | None
    ) -> None:
        """Begin with nothing; names: of the outputs."""
        self._names, self._selected, self._whole = names, selected, before.whole_numbers
        self._floats: dict[str, ComparisonSums] = {}
        self._matches: dict[str, OutputMatch] = {}
        self._language = LanguageOutput(language) if language is not None and language.output in names else None

    def add(self, feeds: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Add the outputs of both models for a batch."""
        for name in self._names:
            a, b = before[name], after[name]
            if name in self._selected or name in self._whole:
                one = (match_rows if name in self._selected else match_values)(a, b, name)
                self._matches[name] = add_matches(self._matches[name], one) if name in self._matches else one
            elif isinstance(a, np.ndarray) and a.dtype.kind == "f":
                self._add_floats(name, feeds, a, b)

    def _add_floats(self, name: str, feeds: Mapping[str, Any], a: Any, b: Any) -> None:
        """Add an output of floats."""
        language = self._language if self._language is not None and self._language.language.output == name else None
        sums = self._floats.setdefault(name, language.numbers if language is not None else ComparisonSums())
        if a.shape != b.shape:
            sums.noise = np.inf
        elif language is not None:
            language.add(feeds, a, b)
        else:
            sums.add(a, b)

    def result(self) -> Compared:
        """Return the comparisons over all batches."""
        outputs = [sums.result(name) for name, sums in self._floats.items()]
        return Compared(
            outputs, list(self._matches.values()), None if self._language is None else self._language.result()
        )


def quantized_session(model: Path | bytes | str, context: Context) -> Session:
    """Load a quantized model to compute what its target would, as far as ONNX Runtime can."""
    # only ONNX Runtime on a CPU rounds the activations of weight-only products
    return Session(
        model, context.device, what=QUANTIZED, float_matmul_nbits=context.device != context.target.device,
        disable_qdq_fusion=context.target.runs_outside_ort,
    )  # fmt: skip


def compare_parts(prepared: Prepared, quantized: ir.Model, data: Dataset, context: Context) -> list[OutputComparison]:
    """Compare, on the samples held back, the values that stand for outputs which do not stand for themselves."""
    found = prepared.judged
    own = set(found.whole)
    label = {value: f"{output}: {value}" for output, values in found.values.items() for value in values}
    parts = Judged({o: values for o, values in found.values.items() if o not in own}, found.selected)
    if not parts.values:
        return []
    before = JudgedSession.of(prepared.model, parts, lambda x: Session(x, context.device, what="the prepared model"))
    after = JudgedSession.of(quantized, parts, lambda x: quantized_session(x, context))
    sums: dict[str, ComparisonSums] = {}
    for feeds in data.held_back.batches(context.options.batch_size):
        first, second = before.run(feeds), after.run(feeds)
        for name in parts.names:
            if isinstance(first[name], np.ndarray) and first[name].shape == second[name].shape:
                sums.setdefault(name, ComparisonSums(scores=False)).add(first[name], second[name])
    return [s.result(label[name]) for name, s in sums.items()]
