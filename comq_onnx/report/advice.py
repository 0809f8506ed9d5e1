"""What stands out in a report, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comq_onnx.report.report import LayerReport, Report

# a layer that loses more than this, and this much more than the middle one, is worth more bits
LOSES_DB, LOSES_MORE_DB = -15.0, 6.0
# where the span of an activation is so many times that of 99.9% of its values, 8 bits are 2 fewer for nearly all
OUTLIER_RATIO = 4.0
# outputs below these have changed enough to matter to most
LOW_SQNR_DB, LOW_AGREEMENT = 10.0, 0.95
MOST_NAMED = 4


@dataclass(frozen=True)
class Advice:
    """What was found, and what to do about it."""

    found: str
    remedy: str


def advise(report: Report) -> list[Advice]:
    """What stands out in a finished run, most telling first; nothing for a plan."""
    if not report.outputs:
        return []
    found = (_outputs(report), _layers(report), _activations(report), _float_kernels(report))
    return [advice for advice in found if advice is not None]


def _outputs(report: Report) -> Advice | None:
    agreements = [o.top1_agreement for o in report.outputs if o.top1_agreement is not None]
    worst = min(o.sqnr_db for o in report.outputs)
    if agreements and min(agreements) < LOW_AGREEMENT:
        what = f"top-1 agreement {min(agreements):.1%}"
    elif not agreements and worst < LOW_SQNR_DB:
        what = f"SQNR {worst:.1f} dB"
    else:
        return None
    bits = min(layer.bits for layer in report.layers)
    more = [f"--bits {min(2 * bits, 8)}"] if bits < 8 else []
    if report.samples.get("used", 128) < 128:
        more.append("128 samples or more")
    if report.options.get("activations") != "none":
        more.append("--activations none")
    first = " or ".join(more) or "--exclude for the layers that lose most"
    return Advice(what, f"{first}; docs/accuracy.md says what to try in which order")


def _layers(report: Report) -> Advice | None:
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
    """A regular expression that matches just the first few of these layers, worst first."""
    names = [re.escape(layer.name) for layer in layers[:MOST_NAMED]]
    return f"^{names[0]}$" if len(names) == 1 else f"^({'|'.join(names)})$"


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'s' * (len(things) != 1)}"


def _activations(report: Report) -> Advice | None:
    bad = sorted(report.activations, key=lambda a: -a.outlier_ratio)
    bad = [a for a in bad if a.outlier_ratio >= OUTLIER_RATIO]
    if not bad or not _outputs(report):
        return None
    worst = bad[0]
    return Advice(
        f"{_count(bad, 'activation')} with outliers, {worst.name} {worst.low:.3g} to {worst.high:.3g} where 99.9% lie "
        f"in {worst.typical_low:.3g} to {worst.typical_high:.3g}",
        "--activations none keeps all of them float, --exclude the layers that read these",
    )


def _float_kernels(report: Report) -> Advice | None:
    left = [layer for layer in report.layers if layer.form == "integer" and layer.runs_in_float]
    if not left:
        return None
    return Advice(
        f"{_count(left, 'layer')} written for integer kernels, but in float in ONNX Runtime "
        f"{report.runtime.get('onnxruntime', '')}: {', '.join(x.name for x in left[:MOST_NAMED])}",
        "--exclude them, and tell us: this version may need another form",
    )
