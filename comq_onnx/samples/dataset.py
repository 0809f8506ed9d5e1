"""Load the samples of a run: some to calibrate on, and others that are held back to compare on."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from comq_onnx.context import Context, Journal
from comq_onnx.errors import ComqError, OutOfMemory, RuntimeFailure, SamplesError
from comq_onnx.metrics import suspicious_scores
from comq_onnx.model.float_model import FloatModel
from comq_onnx.samples import padding
from comq_onnx.samples.clues import read_clues, suspicious_statistics
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.next_token import predicts_next
from comq_onnx.samples.samples import AnyArray, Clues, Samples

# one in so many samples is held back, and never more than the second number
HELD_BACK_SHARE, MOST_HELD_BACK = 8, 64
# the outputs of the samples that run at once take about so many bytes at most: logits over a vocabulary are large
OUTPUT_BYTES = 1 << 26
# with fewer samples to calibrate on a model is worse than it could be
ENOUGH = 32
# the number of samples by which it is told whether all look like those of training
LOOKED_AT = 4


@dataclass(frozen=True)
class Dataset:
    """Hold the samples of a run.

    calibration: the samples to calibrate on
    held_back: other samples, to compare on
    first_feeds: the first batch of `calibration`, by the name of the input
    first_outputs: the outputs of the float model for it, by name
    mask: the input whose zeros mark positions that the model ignores; None where there is none
    batch_size: how many samples run at once: as asked for, or fewer where the outputs are large
    is_of_decoder: whether the model predicts the next token
    """

    calibration: Samples
    held_back: Samples
    first_feeds: Mapping[str, AnyArray]
    first_outputs: Mapping[str, Any]
    mask: str | None
    batch_size: int
    is_of_decoder: bool = False

    @property
    def is_synthetic(self) -> bool:
        """Tell whether no samples were given."""
        return self.calibration.source == "synthetic"

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of all samples, those that are held back too."""
        digest = hashlib.sha256()
        for samples in (self.calibration, self.held_back):
            for name, array in sorted(samples.arrays.items()):
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(pickle.dumps(array) if array.dtype == object else np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def kept(self, batch: Mapping[str, AnyArray]) -> padding.Mask | None:
        """Return the positions [samples, positions] of a batch that the model does not ignore; None for all."""
        return None if self.mask is None else batch[self.mask] == 1


def load_dataset(source: FloatModel, samples: Any, context: Context) -> Dataset:
    """Load samples for a model, hold some back, and run one batch, so that faults of the samples show here.

    samples: as `quantize` takes them

    Raises SamplesError for samples that the model cannot take, OptionError for options that do not fit the samples.
    """
    options, journal = context.options, context.journal
    wanted = options.max_samples
    held = min(MOST_HELD_BACK, max(1, wanted // HELD_BACK_SHARE))
    clues = read_clues(source.model, source.path, source.session, context.device)
    everything = load_samples(samples, source.session.inputs, options, wanted + held, options.seed, clues)
    journal.notes += everything.notes
    journal.warnings += everything.warnings
    _warn_of_constants(everything, journal)
    calibration, held_back = split(everything, wanted, options.seed, journal)
    size = _batch_size(source, calibration, options.batch_size)
    feeds = next(calibration.batches(size))
    outputs = _first_outputs(source, feeds, everything.source)
    if everything.source != "synthetic":  # made-up samples show nothing that has a class
        _warn_of_first_batch(next(calibration.first(LOOKED_AT).batches(size)), outputs, clues, journal)
    mask, is_of_decoder = find_mask(source, calibration, size, journal), predicts_next(source.session.inputs, clues)
    return Dataset(calibration, held_back, feeds, outputs, mask, size, is_of_decoder)


def split(everything: Samples, wanted: int, seed: int, journal: Journal) -> tuple[Samples, Samples]:
    """Split samples into at most `wanted` to calibrate on and others to compare on. Raises SamplesError for too few."""
    total, unit = len(everything), everything.fixed_batch or 1
    if total < 2 * unit:
        raise SamplesError(
            f"{everything.source}: {total} sample(s); at least {2 * unit} are needed, one batch to calibrate on "
            "and one to compare on, and 128 or more are better"
        )
    # a share of the samples for calibration, or all that it leaves where they are more
    spare = max(min(total, wanted) // HELD_BACK_SHARE, total - wanted)
    held = max(unit, min(MOST_HELD_BACK, spare) // unit * unit)
    used = min(wanted, total - held) // unit * unit or unit
    if used < ENOUGH and everything.source != "synthetic":
        journal.warnings.append(f"only {used} calibration samples: 128 or more give a better model")
    return everything.split(used, held, seed)


def find_mask(source: FloatModel, calibration: Samples, batch_size: int, journal: Journal) -> str | None:
    """Find the input that masks positions, if the model ignores what it masks when tried; None otherwise.

    batch_size: how many samples run at once
    """
    name = None if calibration.per_item else padding.find_mask(calibration.arrays)
    if name is None:
        return None
    notes = journal.notes
    # a batch with padding: on others there is nothing to try
    feeds = next(batch for batch in calibration.batches(batch_size) if (batch[name] != 1).any())
    if not padding.is_ignored(source.session.run, feeds, name):
        notes.append(f"{name} does not keep what it masks from the outputs: calibrated on all positions")
        return None
    share = float((calibration.arrays[name] != 1).mean())
    notes.append(f"{share:.0%} of the positions are padding ({name}): not calibrated on")
    return name


def _batch_size(source: FloatModel, samples: Samples, asked: int) -> int:
    """Return how many samples run at once: as many as asked for, or fewer where the outputs of one are large."""
    try:
        outputs = source.session.run(next(samples.batches(1)))
    except OutOfMemory:
        raise
    except ComqError:  # that is found with the first batch, and told
        return asked
    size = sum(x.nbytes for x in outputs.values() if isinstance(x, np.ndarray)) // samples.batch_counts(1)[0]
    return max(1, min(asked, OUTPUT_BYTES // max(size, 1)))


def _first_outputs(source: FloatModel, feeds: Mapping[str, AnyArray], name: str) -> dict[str, Any]:
    """Run the float model on the first batch. Raises SamplesError where it cannot run on the samples `name`."""
    try:
        return source.session.run(feeds)
    except OutOfMemory:
        raise
    except RuntimeFailure as error:
        raise SamplesError(f"{name}: the model cannot run on these samples: {error}") from error


def _warn_of_constants(samples: Samples, journal: Journal) -> None:
    """Warn of inputs that are the same number in all samples."""
    for name, array in samples.arrays.items():
        if array.dtype.kind == "f" and array.size and (array == array.flat[0]).all():
            journal.warnings.append(
                f"{name} is {array.flat[0]:g} in all samples: a model calibrated so is fit for that"
            )


def _warn_of_first_batch(
    feeds: Mapping[str, AnyArray], outputs: Mapping[str, Any], clues: Clues, journal: Journal
) -> None:
    """Warn where samples or outputs look as if the samples were preprocessed wrongly.

    feeds: a few samples; outputs: those of the first batch
    """
    doubts = [suspicious_scores(name, output) for name, output in outputs.items()]
    journal.warnings += filter(None, [*doubts, suspicious_statistics(clues, feeds)])
