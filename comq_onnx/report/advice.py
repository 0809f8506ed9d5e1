"""Point out what stands out in a report, and what to do about it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from comq_onnx.evaluate.evaluation import ENOUGH_SAMPLES, remedies
from comq_onnx.model.judged import without_caches

if TYPE_CHECKING:
    from comq_onnx.report.report import LayerReport, Report

# a layer is worth more bits where its error is above LOSES_DB, and LOSES_MORE_DB above that of the middle layer
LOSES_DB, LOSES_MORE_DB = -15.0, 6.0
# where the range of an activation is 4 times that of 99.9% of its values, nearly all of them have 2 bits fewer
OUTLIER_RATIO = 4.0
# outputs below these have changed enough to matter to most users
LOW_SQNR_DB, LOW_AGREEMENT = 10.0, 0.95
# and so is a higher perplexity of a language model than this share
HIGH_RISE = 0.1
MOST_NAMED = 4  # layers in one message


@dataclass(frozen=True)
class Advice:
    """Hold what was found, and what to do about it."""

    found: str
    remedy: str


def advise(report: Report) -> list[Advice]:
    """Return what stands out in a finished run, the most telling first; nothing for a plan."""
    if not report.outputs:
        return []
    advisers = (_advise_on_outputs, _advise_on_layers, _advise_on_activations, _advise_on_float_kernels)
    return [advice for adviser in advisers if (advice := adviser(report)) is not None]


def _advise_on_outputs(report: Report) -> Advice | None:
    what = _lost(report)
    if what is None:
        return None
    bits = "auto" if report.options.get("bits") == "auto" else min(layer.bits for layer in report.layers)
    samples = report.samples.get("used", ENOUGH_SAMPLES) + report.samples.get("held_back", 0)
    first = remedies(bits, samples, str(report.options.get("activations"))).removeprefix("try ")
    return Advice(what, f"{first}; docs/accuracy.md says what to try in which order")


def _lost(report: Report) -> str | None:
    """Say by how much the outputs have changed; None where that matters little to most users."""
    outputs = without_caches(report.outputs)
    # language models are judged by their loss, outputs of class scores by their classes
    if report.language is not None and report.language.rise is not None:
        rise = report.language.rise
        return None if rise <= 1 + HIGH_RISE else f"perplexity {rise:.2f} times as high"
    agreements = [o.top1_agreement for o in outputs if o.top1_agreement is not None]
    if agreements and min(agreements) < LOW_AGREEMENT:
        return f"top-1 agreement {min(agreements):.1%}"
    worst = min((o.sqnr_db for o in outputs if o.top1_agreement is None), default=math.inf)
    return f"SQNR {worst:.1f} dB" if worst < LOW_SQNR_DB else None


def _advise_on_layers(report: Report) -> Advice | None:
    solved = [layer for layer in report.layers if layer.error_db is not None]
    if len(solved) < 3:
        return None
    middle = median(layer.error_db or 0.0 for layer in solved)
    bad = [x for x in solved if (x.error_db or 0.0) > max(LOSES_DB, middle + LOSES_MORE_DB) and x.bits < 8]
    if not bad:
        return None
    bad.sort(key=lambda layer: -(layer.error_db or 0.0))
    named = bad[:MOST_NAMED]
    losses = ", ".join(f"{layer.name} {layer.error_db:.1f} dB" for layer in named)
    rest = f" and {len(bad) - len(named)} more" if len(bad) > len(named) else ""
    return Advice(f"{losses}{rest} lose most (the middle layer {middle:.1f} dB)", f"--bits-for '{pattern(bad)}=8'")


def pattern(layers: Sequence[LayerReport]) -> str:
    """Return a regular expression that matches the first MOST_NAMED of these layers and no others."""
    names = [re.escape(layer.name) for layer in layers[:MOST_NAMED]]
    return f"^{names[0]}$" if len(names) == 1 else f"^({'|'.join(names)})$"


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'s' * (len(things) != 1)}"


def _advise_on_activations(report: Report) -> Advice | None:
    bad = sorted(report.activations, key=lambda a: -a.outlier_ratio)
    bad = [a for a in bad if a.outlier_ratio >= OUTLIER_RATIO]
    if not bad or not _advise_on_outputs(report):
        return None
    worst = bad[0]
    return Advice(
        f"{_count(bad, 'activation')} with outliers, {worst.name} {worst.low:.3g} to {worst.high:.3g} where 99.9% lie "
        f"in {worst.typical_low:.3g} to {worst.typical_high:.3g}",
        "--activations none keeps all of them float, --exclude the layers that read these",
    )


def _advise_on_float_kernels(report: Report) -> Advice | None:
    left = [layer for layer in report.layers if layer.form == "integer" and layer.runs_in_float]
    if not left:
        return None
    return Advice(
        f"{_count(left, 'layer')} written for integer kernels, but in float in ONNX Runtime "
        f"{report.runtime.get('onnxruntime', '')}: {', '.join(x.name for x in left[:MOST_NAMED])}",
        "--exclude them, and tell us: this version may need another form",
    )
