"""Prepare the source in the most thorough way that leaves its outputs as they were."""

from __future__ import annotations

from comq_onnx.context import Context
from comq_onnx.errors import ModelError, OutOfMemory, RuntimeFailure
from comq_onnx.metrics import sqnr_of
from comq_onnx.model.files import private_directory, to_bytes_or_file
from comq_onnx.model.float_model import FloatModel
from comq_onnx.model.layers import Prepared, select
from comq_onnx.model.prepare import HARDSWISH_OPSET, Unprepared, prepare_model
from comq_onnx.model.source import read_model
from comq_onnx.model.unfuse.graph import Unfusing, has_fused
from comq_onnx.model.unfuse.graph import wanted_opset as unfuse_opset
from comq_onnx.plan.forms import BLOCKS_OPSET
from comq_onnx.plan.initial_bits import REFERENCE_BITS
from comq_onnx.runtime.session import Session
from comq_onnx.samples.dataset import Dataset

# the SQNR that must remain: float32 sums in another order stay above 90 dB in deep models, half precision above 40
SAME_DB, SAME_HALF_DB = 60.0, 30.0
# the number of samples that tell
COMPARED = 4


def prepare_faithfully(source: FloatModel, data: Dataset, context: Context) -> Prepared:
    """Prepare the source: fold constants and BatchNorms, raise the opset, and select the layers that options ask for.

    Where folding or the higher opset changes the outputs, or fails, a simpler way is taken.

    Raises ModelError where no way works, OptionError for patterns that match no layer.
    """
    least, wanted = context.target.min_opset, _wanted_opset(context)
    failed = []
    for fold, opset, unfusing in _ways(source, least, wanted, context):
        try:
            prepared = prepare_model(read_model(source.path), opset, least, fold, unfusing)
            found = _fidelity(prepared, source, data, context)
        except OutOfMemory:
            raise
        except (Unprepared, ModelError, RuntimeFailure) as error:
            failed.append(str(error))
            continue
        if found >= (SAME_HALF_DB if source.is_half or _rounds(prepared) else SAME_DB):
            if not fold:
                context.journal.notes.append("constants and BatchNorms were not folded: " + failed[0])
            if unfusing is Unfusing.NOTHING and has_fused(source.model):
                context.journal.notes.append("fused operators were not taken apart: " + failed[0])
            context.journal.notes += prepared.notes
            return select(prepared, context.options.include, context.options.exclude)
        failed.append(f"outputs changed (SQNR {found:.1f} dB)")
    raise ModelError(f"{source.path}: cannot be prepared for quantization: {failed[-1]}")


def _ways(source: FloatModel, least: int, wanted: int, context: Context) -> list[tuple[bool, int, Unfusing]]:
    """List the ways to prepare, the most thorough first: whether to fold, at which opset, and how much to unfuse."""
    plain = [(True, wanted), (False, wanted), (False, least)]
    without = [(fold, opset, Unfusing.NOTHING) for fold, opset in plain]
    if not has_fused(source.model):
        return without
    unfusing = Unfusing.TO_STANDARD if context.target.runs_outside_ort else Unfusing.FOR_WEIGHTS
    best = max(wanted, unfuse_opset(source.model, unfusing))
    return [(True, best, unfusing), (False, best, unfusing), *without]


def _wanted_opset(context: Context) -> int:
    """Return the opset that the smallest and fastest form of the model needs on the target."""
    options, target = context.options, context.target
    # where a budget decides, 4 bits have a container, and all other widths are bit planes
    widths = [options.fixed_bits or REFERENCE_BITS, *(bits for _, bits in options.bits_for)]
    dtype = target.activation_dtype(options.activations)
    modern = options.float16 or options.block_size is not None or dtype in (None, "uint16")
    # HardSwish as one operator came with its own opset
    return max(
        target.min_opset,
        HARDSWISH_OPSET,
        *(target.opset_for(bits) for bits in widths),
        BLOCKS_OPSET if modern else 0,
    )


def _rounds(prepared: Prepared) -> bool:
    """Tell whether the source itself rounds activations: there a float32 sum in another order may be a step."""
    return any("Quantize" in node.op_type or "QLinear" in node.op_type for node in prepared.model.graph.all_nodes())


def _fidelity(prepared: Prepared, source: FloatModel, data: Dataset, context: Context) -> float:
    """Return the SQNR in dB of the prepared model's outputs on a few samples; 200 for a model with random outputs."""
    with private_directory() as work:
        model = to_bytes_or_file(prepared.model, work, "prepared")
        # large models go by a file
        session = Session(model, context.device, what="the prepared model", small=isinstance(model, str))
        feeds = next(data.calibration.first(COMPARED).batches(data.batch_size))
        outputs = session.run(feeds)
    # a rounding error moves rows that are selected, which says nothing
    expected = {n: x for n, x in source.session.run(feeds).items() if n not in prepared.judged.selected}
    found = sqnr_of(expected, outputs)
    if found < SAME_DB and sqnr_of(expected, source.session.run(feeds)) < SAME_DB:
        context.journal.warnings.append(
            "the model gives other outputs each time it runs: nothing can be checked against it"
        )
        return 200.0
    return found
