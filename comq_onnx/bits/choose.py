"""Choose the bits of each layer and solve them; where an accuracy is to be kept, try again until it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comq_onnx.bits.drop_check import DropCheck, check_drop, max_noise
from comq_onnx.bits.knapsack import Allocation
from comq_onnx.bits.survey import BITS, survey
from comq_onnx.bits.tradeoff import UPGRADE_SHARE, Tradeoff, node_bytes
from comq_onnx.calibrate.walk import round_all, walk
from comq_onnx.context import Context
from comq_onnx.errors import OptionError
from comq_onnx.evaluate.language import language_of_data
from comq_onnx.evaluate.outputs import compare_parts, compare_sessions, quantized_session
from comq_onnx.metrics import Floats, lead_changes, leads, scores_among
from comq_onnx.model.files import file_size, private_directory, to_bytes_or_file
from comq_onnx.model.float_model import FloatModel
from comq_onnx.model.layers import Layer
from comq_onnx.options.budgets import Drop, parse_drop, parse_size
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.plan.initial_bits import REFERENCE_BITS, has_explicit_bits
from comq_onnx.plan.plan import Bits, Plan
from comq_onnx.plan.solved import Solved
from comq_onnx.plan.tied import with_tied
from comq_onnx.samples.dataset import Dataset
from comq_onnx.solve.grid import MAX_BITS, Grid, check_codes
from comq_onnx.solve.layer import blank
from comq_onnx.write.check import check_emitted
from comq_onnx.write.emit import Emitted, emit_model
from comq_onnx.write.finish import finish
from comq_onnx.write.provenance import provenance

# the leads of so many samples tell how often the best class changes, to within some percents
LEADS = 128
# how many models are made at most to keep an accuracy; the noise of the next one over the noise that should just do;
# and the share of the best size so far that another model must get below to be worth making
MOST_ATTEMPTS, NEXT_ATTEMPT, WORTHWHILE = 5, 0.9, 0.97


@dataclass(frozen=True)
class Chosen:
    """Hold a plan with the bits that were chosen for it.

    tradeoff: the costs of all allocations; None where nothing was to be chosen
    allocation: the allocation that was chosen; None where none was
    """

    plan: Plan
    tradeoff: Tradeoff | None = None
    allocation: Allocation | None = None


@dataclass(frozen=True)
class Quantized:
    """Hold the model that was made of a choice.

    chosen: the plan with its bits
    emitted: the quantized model
    """

    chosen: Chosen
    emitted: Emitted


def choose_and_solve(plan: Plan, source: FloatModel, data: Dataset, context: Context) -> Quantized:
    """Choose the bits of each layer, calibrate and solve all of them, and make the model.

    Raises OptionError where a budget cannot be kept.
    """
    tradeoff = make_tradeoff(plan, source, data, context)
    if tradeoff is not None and context.options.max_drop is not None:
        return _within_drop(plan, tradeoff, _drop(tradeoff, context), source, data, context)
    return _solve(choose_bits(plan, tradeoff, source, context), source, data, context)


def choose_bits(plan: Plan, tradeoff: Tradeoff | None, source: FloatModel, context: Context) -> Chosen:
    """Choose the bits under the budget; with a fixed number of bits, more for the layers that gain most."""
    options = context.options
    if tradeoff is None:
        return Chosen(plan)
    if options.size is not None:
        allocation = tradeoff.within_size(parse_size(options.size, source.file.size))
    elif options.max_drop is not None:
        drop = _drop(tradeoff, context)
        allocation = tradeoff.within_noise(max_noise(drop, tradeoff.leads), drop.kind)
    elif options.fixed_bits is None:
        assert isinstance(options.bits, float)
        allocation = tradeoff.within_mean(options.bits)
    elif options.uniform or options.fixed_bits == MAX_BITS:
        return Chosen(plan, tradeoff)
    else:
        allocation = tradeoff.within_size(int(tradeoff.file_size(plan.bits) * (1 + UPGRADE_SHARE)))
    return Chosen(plan.with_bits(tradeoff.bits(allocation), options), tradeoff, allocation)


def _drop(tradeoff: Tradeoff, context: Context) -> Drop:
    """Return the accuracy that may be lost, as what the model is judged by."""
    assert context.options.max_drop is not None
    drop = parse_drop(context.options.max_drop)
    return drop.of_perplexity() if tradeoff.by_loss else drop


def _solve(chosen: Chosen, source: FloatModel, data: Dataset, context: Context, attempt: int = 0) -> Quantized:
    """Calibrate and solve a plan, make the model and check it against the plan.

    attempt: how many plans were solved before
    """
    source.session.rest()
    if context.options.solver == "rtn" and data.is_synthetic:
        solved = with_tied(round_all(chosen.plan, context))
    else:
        solved = with_tied(walk(chosen.plan, data, context, name=f"solve{attempt}"))
    for solution in solved.solutions.values():
        check_codes(solution.weight)
    with context.journal.timed("emit"):
        emitted = emit_model(solved)
        check_emitted(emitted.model, solved)
        emitted = finish(emitted, provenance(source, data, context), source.described)
    return Quantized(chosen, emitted)


# What there is to choose
# ----------------------------------------------------------------------------------------------------------------------


def make_tradeoff(plan: Plan, source: FloatModel, data: Dataset, context: Context) -> Tradeoff | None:
    """Measure what every number of bits costs each layer in accuracy and bytes; None where nothing is to be chosen."""
    with context.journal.timed("survey"):
        if not has_choice(plan, context):
            return None
        least = context.options.fixed_bits or BITS[0]
        wanted = sorted({REFERENCE_BITS, *plan.bits.values(), *(bits for bits in BITS if bits >= least)})
        language = language_of_data(source.session.inputs, data)
        by_loss = language is not None and language.predicts_next
        found = survey(plan, data, context, wanted, language)
        layers = {layer.name: layer for layer in plan.layers}
        code_bytes = {name: {bits: plan.code_bytes(layers[name], bits) for bits in wanted} for name in found.groups}

        def size_of(bits: Bits) -> int:
            return file_size_at(plan, bits, source, data, context)

        return Tradeoff(
            sensitivity=found,
            widths={name: _widths(plan, name, members, context) for name, members in found.groups.items()},
            code_bytes=code_bytes,
            node_bytes=node_bytes(found.groups, code_bytes, size_of),
            counts={name: math.prod(layers[name].weight_shape) for name in found.groups},
            file_size=size_of,
            leads=None if by_loss else _leads(plan, source, data, context),
            by_loss=by_loss,
        )


def has_choice(plan: Plan, context: Context) -> bool:
    """Tell whether the bits of any layer are to be chosen, or the layers to be ranked."""
    options = context.options
    if options.fixed_bits is None or options.sensitivity:
        return True
    free = [x.name for x in plan.layers if not (has_explicit_bits(x.name, options) or x.kind.is_lookup)]
    return not options.uniform and any(plan.bits[name] < MAX_BITS for name in free)


def _widths(plan: Plan, name: str, members: Sequence[str], context: Context) -> Sequence[int]:
    """Return the numbers of bits that a group of layers may get; members: its layers, `name` the first of them."""
    fixed = context.options.fixed_bits is not None
    layer = next(x for x in plan.layers if x.name == name)
    explicit = any(has_explicit_bits(member, context.options) for member in members)
    if explicit or name in plan.tied_layers or plan.is_unseen(layer) or (fixed and layer.kind.is_lookup):
        return (plan.bits[name],)
    return _distinct(plan, layer, [bits for bits in BITS if not fixed or bits >= plan.bits[name]], context)


def _distinct(plan: Plan, layer: Layer, widths: Sequence[int], context: Context) -> Sequence[int]:
    """Leave out widths at which a layer has the same codes as at another that takes no more bytes."""
    kept: dict[Grid, int] = {}
    for bits in widths:
        grid = plan.grid_at(layer, bits, context.options)
        if grid not in kept or plan.code_bytes(layer, bits) <= plan.code_bytes(layer, kept[grid]):
            kept[grid] = bits
    return sorted(kept.values())


def file_size_at(plan: Plan, bits: Bits, source: FloatModel, data: Dataset, context: Context) -> int:
    """Return the bytes of the file with these bits: the model is made, with empty codes."""
    plan = plan.with_bits(bits, context.options)
    solutions = {x.name: blank(plan.written.weight(x), plan.grids[x.name]) for x in plan.layers}
    one = ActivationGrid(np.float32(1), 0, plan.activations.dtype)
    grids = {name: value.given or one for name, value in plan.activations.values.items()}
    solved = Solved(plan, solutions, grids)
    return file_size(finish(emit_model(solved), provenance(source, data, context), source.described).model)


def _own_outputs(plan: Plan, data: Dataset) -> dict[str, Any]:
    """Return the first outputs of the float model that stand for themselves."""
    return {name: x for name, x in data.first_outputs.items() if name in plan.written.judged.whole}


def _leads(plan: Plan, source: FloatModel, data: Dataset, context: Context) -> Floats | None:
    """Return the leads of the float model's best class on many samples; None where it gives no class scores.

    They are those of all samples where points of agreement are to be kept, and else those of LEADS.
    """
    name = scores_among(_own_outputs(plan, data))
    if name is None:
        return None
    drop = context.options.max_drop
    counts = drop is not None and parse_drop(drop).points is not None
    samples = [one if counts else one.few(LEADS // 2) for one in (data.calibration, data.held_back)]
    batches = itertools.chain.from_iterable(one.batches(context.options.batch_size) for one in samples)
    return np.concatenate([leads(source.session.run(feeds, [name])[name]) for feeds in batches])


# Keeping an accuracy
# ----------------------------------------------------------------------------------------------------------------------


def _within_drop(
    plan: Plan, tradeoff: Tradeoff, drop: Drop, source: FloatModel, data: Dataset, context: Context
) -> Quantized:
    """Make the smallest model that keeps the accuracy asked for on the samples held back.

    Each model that is measured tells which to try next: corrected by how far off the prediction was; or, once there are
    both, between a model that keeps the accuracy and one that does not.

    Raises OptionError where even the most bits lose more.
    """
    noise = max_noise(drop, tradeoff.leads)
    passed: float | None = None
    failed: float | None = None
    most = tradeoff.within_codes(tradeoff.limits()[1])
    best: Quantized | None = None
    for attempt in range(MOST_ATTEMPTS):
        last = attempt == MOST_ATTEMPTS - 1
        allocation = most if last and best is None else tradeoff.within_noise(noise, drop.kind)
        if best is not None and allocation.size > WORTHWHILE * _allocated_size(best):
            break
        chosen = Chosen(plan.with_bits(tradeoff.bits(allocation), context.options), tradeoff, allocation)
        quantized = _solve(chosen, source, data, context, attempt)
        check = _check_accuracy(quantized, drop, source, data, context)
        mean = tradeoff.mean_bits(chosen.plan.bits)
        context.journal.notes.append(f"tried {mean:.2f} bits in the mean: {check.said}")
        predicted = float(tradeoff.noise(allocation)[drop.kind])
        if check.enough:
            best, passed = quantized, predicted
        elif allocation.size >= most.size:
            raise _not_reached(mean, check, data, context)
        else:
            failed = predicted
        if passed is None or failed is None:
            noise = predicted * check.ratio * NEXT_ATTEMPT
        else:
            noise = float(np.sqrt(passed * failed))
    assert best is not None
    return best


def _not_reached(mean: float, check: DropCheck, data: Dataset, context: Context) -> OptionError:
    """Return the error for an accuracy that even the most bits do not keep; mean: their mean over all weights."""
    wider = [x for x in ("16", "none") if x != context.options.activations]
    others = "" if context.options.activations == "none" else f"--activations {' or '.join(wider)}, or "
    return OptionError(
        f"--max-drop {context.options.max_drop}: not reached. At {mean:.1f} bits in the mean {check.said} on "
        f"{len(data.held_back)} samples held back; allow more, or try {others}more calibration samples"
    )


def _allocated_size(quantized: Quantized) -> int:
    """Return the bytes of the allocation that a model was made with."""
    allocation = quantized.chosen.allocation
    assert allocation is not None
    return allocation.size


def _check_accuracy(quantized: Quantized, drop: Drop, source: FloatModel, data: Dataset, context: Context) -> DropCheck:
    """Measure whether a model keeps the accuracy on the samples held back."""
    tradeoff = quantized.chosen.tradeoff
    assert tradeoff is not None
    size = context.options.batch_size
    with private_directory() as work:
        session = quantized_session(to_bytes_or_file(quantized.emitted.model, work, "quantized"), context)
        prepared = quantized.chosen.plan.written
        compared, _ = compare_sessions(
            source.session, session, data.held_back, size, selected=prepared.judged.selected,
            language=language_of_data(source.session.inputs, data),
        )  # fmt: skip
        compared.outputs.extend(compare_parts(prepared, quantized.emitted.model, data, context))
        changes = None
        if drop.points is not None:
            name = scores_among(_own_outputs(quantized.chosen.plan, data))
            assert name is not None
            changes = np.concatenate([
                lead_changes(source.session.run(feeds, [name])[name], session.run(feeds, [name])[name])
                for feeds in data.held_back.batches(size)
            ])  # fmt: skip
    return check_drop(drop, tradeoff.leads, compared, changes)
