"""Make the plan: which values are quantized, which layers run in integers, and the bits of each before any survey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from comq_onnx.context import Context
from comq_onnx.errors import ModelError, OptionError
from comq_onnx.model.float_model import FloatModel
from comq_onnx.model.layers import Layer, Prepared
from comq_onnx.model.probe import probe
from comq_onnx.plan import integer_gain, smoothing
from comq_onnx.plan.activations import ActivationPlan, plan_activations, plan_between_pairs
from comq_onnx.plan.forms import BLOCKS_OPSET, WeightForm
from comq_onnx.plan.half import too_large_for_half
from comq_onnx.plan.initial_bits import fill_containers, initial_bits
from comq_onnx.plan.plan import Bits, Plan
from comq_onnx.plan.subgraphs import Specialized, specialize
from comq_onnx.plan.tied import tie
from comq_onnx.samples.dataset import Dataset

# the number of samples that show how large the channels of activations are, and how many of them run at once
SMOOTHING_SAMPLES, SMOOTHING_BATCH = 64, 4
# layers that are named in a note, at most
MOST_NAMED = 3
PROBED = "the model with its activations as outputs"


def make_plan(source: FloatModel, prepared: Prepared, data: Dataset, context: Context) -> Plan:
    """Plan the quantization of a prepared model.

    Raises ModelError where the samples reach no layer, OptionError for options that the model's opset cannot express.
    """
    specialized = specialize(prepared, data.calibration, context)
    _check_reached(specialized, source)
    dtype = context.target.activation_dtype(context.options.activations)
    _check_opset(prepared, dtype, context)
    plan = Plan(
        prepared, specialized.prepared, specialized.probes, ActivationPlan("float32"), context.target,
        nbits_op=context.options.nbits_op, unpacked=_never_packed(specialized.prepared, prepared, context),
    )  # fmt: skip
    if context.options.float16:
        plan = replace(plan, too_large=too_large_for_half(prepared, data, context))
    plan = _choose_activations(plan, dtype, data, context)
    plan = _unpack_in_branches(plan, data.is_of_decoder)
    plan = tie(plan, context)
    bits = initial_bits(plan, context.options)
    _tell_unreached(plan, specialized.unreached, bits, context)
    if context.options.fixed_bits is not None and not context.options.uniform:
        bits = fill_containers(plan, bits, context)
    return smooth_activations(plan.with_bits(bits, context.options), dtype, data, context)


def _check_reached(specialized: Specialized, source: FloatModel) -> None:
    """Raise ModelError where the samples reach no layer."""
    if not specialized.prepared.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(specialized.unreached.items())[:3])
        raise ModelError(f"{source.path}: the samples reach no layer that can be quantized ({reasons})")


def _tell_unreached(plan: Plan, reasons: Mapping[str, str], bits: Bits, context: Context) -> None:
    """Note what is done with layers that the samples do not reach; reasons: why, by the name of the layer."""
    if not plan.unreached:
        return
    rounded = [layer.name for layer in plan.layers if plan.is_unseen(layer)]
    named = "; ".join(f"{name} ({reasons[name]})" for name in sorted(plan.unreached)[:MOST_NAMED])
    more = f"; {len(plan.unreached) - MOST_NAMED} more" if len(plan.unreached) > MOST_NAMED else ""
    shared = len(plan.unreached) - len(rounded)
    how = [f"{shared} take the weights of others that are calibrated"] if shared else []
    if rounded:
        how.append(f"{len(rounded)} are rounded to {max(bits[name] for name in rounded)} bits")
    context.journal.notes.append(
        f"{len(plan.unreached)} layers are weight-only because the samples do not reach them; {' and '.join(how)}: "
        f"{named}{more}"
    )


def _check_opset(prepared: Prepared, dtype: str | None, context: Context) -> None:
    """Raise OptionError for options that need a newer opset than the model has."""
    if prepared.opset >= BLOCKS_OPSET:
        return
    if context.options.block_size is not None:
        raise OptionError(
            f"--granularity {context.options.granularity} needs opset {BLOCKS_OPSET}; this model could not be raised "
            f"above {prepared.opset}: use --granularity channel"
        )
    if context.options.float16:
        raise OptionError(
            f"--float16 needs opset {BLOCKS_OPSET}; this model could not be raised above {prepared.opset}"
        )
    if dtype == "uint16":
        raise OptionError(
            f"--activations 16 needs opset {BLOCKS_OPSET}; this model could not be raised above {prepared.opset}"
        )


def _choose_activations(plan: Plan, dtype: str | None, data: Dataset, context: Context) -> Plan:
    """Choose the values that are quantized; with --activations auto only where that makes the model faster."""
    walked = plan.walked
    # with scales per block every MatMul is weight-only: one before a MatMul in integers would lose its kernel
    blocks = context.options.block_size is not None
    whole = [
        layer
        for layer in walked.layers
        if layer.name not in plan.probes and not (blocks and layer.op in ("MatMul", "Gemm"))
    ]

    def planned(layers: Sequence[Layer]) -> ActivationPlan:
        return plan_activations(walked.model, layers, plan.target, dtype)

    found = planned(whole) if dtype is not None else plan_between_pairs(walked.model, whole, plan.target)
    if plan.target.costs is None or not (found.integer_layers or any(_may_be_packed(x) for x in walked.layers)):
        return replace(plan, activations=found)
    shapes = _shapes(walked, found, data, context)
    plan = replace(plan, unpacked=plan.unpacked | integer_gain.unpacked(walked, shapes, plan.target))
    if dtype is None or context.options.activations != "auto":
        return replace(plan, activations=found)
    faster = integer_gain.choose(walked, whole, planned, shapes, plan.target)
    slower = found.integer_layers - faster.integer_layers
    if slower:
        context.journal.notes.append(
            f"{len(slower)} of {len(found.integer_layers)} layers are weight-only because integers would make them "
            "slower (--activations 8 has them in integers too)"
        )
    return replace(plan, activations=faster, slower=slower)


def _never_packed(walked: Prepared, written: Prepared, context: Context) -> frozenset[str]:
    """Return the names of the products whose weights are unpacked at load because the target has no kernel for them."""
    if context.target.packed_products:
        return frozenset()
    return frozenset(x.name for x in (*walked.layers, *written.layers) if x.kind.is_matrix)


def _unpack_in_branches(plan: Plan, is_of_decoder: bool) -> Plan:
    """Unpack the products in branches of an If that are not known to gain by packed weights.

    Where no sample shows how many rows a product has, it is as another one of its weight; else one row at a time is
    what a decoder works on. Other runtimes than ONNX Runtime were not tried on packed weights in a branch.
    """
    products = [x for x in plan.layers if x.in_branch and x.kind.is_matrix]
    seen = [x for x in plan.walked.layers if x.name not in plan.probes]
    packed = {x.weight: plan.form(x) is WeightForm.BLOCKED for x in seen if x.kind.is_matrix}
    if plan.target.runs_outside_ort:
        packed = {x.weight: False for x in products}
    unpacked = {x.name for x in products if not packed.get(x.weight, is_of_decoder)}
    return replace(plan, unpacked=plan.unpacked | unpacked)


def _may_be_packed(layer: Layer) -> bool:
    """Tell whether a layer may run on packed weights."""
    return layer.kind.is_lookup or (layer.kind.is_matrix and (not layer.nested or layer.in_branch))


def _shapes(prepared: Prepared, found: ActivationPlan, data: Dataset, context: Context) -> integer_gain.Shapes:
    """Return the shapes of tensors of the main graph for one sample, by name.

    They are those of all tensors where convolutions may run in integers, else those that matrix products read and make.
    """
    if any(x.name in found.integer_layers and integer_gain.is_measured(x) for x in prepared.layers):
        names = [str(v.name) for node in prepared.model.graph for v in node.outputs if v.name]
    else:
        of_nodes = {str(v.name) for node in prepared.model.graph for v in node.outputs}
        products = [x for x in prepared.layers if x.kind.is_matrix]
        names = [n for n in dict.fromkeys(n for x in products for n in (x.input, x.output)) if n in of_nodes]
    feeds = next(data.calibration.batches(1))
    made = next(iter(probe(prepared.model, names, [feeds], context.device, PROBED))) if names else {}
    values = {**feeds, **made}
    return {name: value.shape for name, value in values.items() if isinstance(value, np.ndarray)}


def smooth_activations(plan: Plan, dtype: str | None, data: Dataset, context: Context) -> Plan:
    """Even out the channels of activations where that gains, in the model that is walked and in the written one.

    dtype: the type of quantized activations; None where there are none
    """
    factors = _smoothing_factors(plan, data, context)
    if not factors:
        return plan
    written, walked = plan.written, plan.walked
    layers = smoothing.apply(written.model, written.layers, factors)
    inputs = {layer.name: layer.input for layer in layers}
    if walked.model is not written.model:
        smoothing.apply(walked.model, walked.layers, factors)
    walked = replace(walked, layers=[replace(x, input=inputs[x.name]) for x in walked.layers])
    integer = [x for x in walked.layers if plan.is_integer(x)]
    activations = plan_activations(walked.model, integer, plan.target, dtype)
    context.journal.notes.append(f"{len(factors)} activations evened out across channels before they are quantized")
    return replace(plan, written=replace(written, layers=layers), walked=walked, activations=activations)


def _smoothing_factors(plan: Plan, data: Dataset, context: Context) -> smoothing.Factors:
    """Find the factors for the channels of some activations, from a few samples."""
    candidates = {
        name: layers
        for name, layers in smoothing.candidates(plan.walked, plan.activations).items()
        if not any(layer.weight in plan.unreached_weights for layer in layers)
    }
    if not candidates:
        return {}
    few = data.calibration.few(SMOOTHING_SAMPLES)
    masks = [data.kept(batch) for batch in few.batches(SMOOTHING_BATCH)]
    values = probe(plan.walked.model, list(candidates), few.batches(SMOOTHING_BATCH), context.device, PROBED)
    return smoothing.find_factors(plan.walked, candidates, plan.activations.dtype, plan.grids, values, masks)
