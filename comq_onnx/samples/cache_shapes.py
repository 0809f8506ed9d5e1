"""Find how many heads a past of keys or values has, and how wide each is, where the model's inputs leave that free.

ONNX Runtime GenAI's model builder names the width of a past `kv_cache_dim` and gives no number. The operator that reads
the past tells it; else a configuration beside the model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from comq_onnx.model.graph import find_readers
from comq_onnx.model.op_kind import attribute
from comq_onnx.samples.language_inputs import role_of
from comq_onnx.samples.model_folder import find_beside, parse_json
from comq_onnx.samples.samples import AnyInput, ModelInput

# heads and width of a past, None where they are unknown
Shape = tuple[int | None, int | None]
UNKNOWN: Shape = (None, None)
# the files beside a model that may tell them
CONFIGURATIONS = ("genai_config.json", "config.json")


@dataclass(frozen=True)
class _Attention:
    """Describe an operator that reads a past.

    heads: its attributes for the number of heads of keys, the first that a node has
    past: the places of past keys and past values among its inputs, with the place of the keys or values they go before
    cosines: the place of the cosines of rotary positions, [positions, half the width]; None where it takes none
    packed: without keys, the queries hold the keys and the values too
    """

    heads: tuple[str, ...]
    past: Mapping[int, int]
    cosines: int | None = None
    packed: bool = False


_ATTENTION: Mapping[str, _Attention] = {
    "GroupQueryAttention": _Attention(("kv_num_heads", "num_heads"), {3: 1, 4: 2}, cosines=7, packed=True),
    "MultiHeadAttention": _Attention(("num_heads",), {6: 1, 7: 2}),
    "DecoderMaskedMultiHeadAttention": _Attention(("num_heads",), {5: 1, 6: 2}),
    "Attention": _Attention(("kv_num_heads",), {4: 1, 5: 2}),
}


def cache_shapes(model: ir.Model, folder: Path) -> dict[str, Shape]:
    """Return heads and width of each input that is a past and leaves one of them free.

    folder: that of the model, where configurations may lie
    """
    found: dict[str, Shape] = {}
    beside: Shape | None = None
    for value in model.graph.inputs:
        dims = list(value.shape) if value.shape is not None else []
        if role_of(str(value.name)) == "past" and len(dims) == 4 and not all(isinstance(d, int) for d in dims[1::2]):
            shapes = [_of_reader(node, index) for node, index in find_readers(value, {"Cast", "Identity"})]
            beside = beside or _of_folder(folder)
            found[str(value.name)] = _first_known([*shapes, beside])
    return found


def with_cache_shapes(inputs: Sequence[ModelInput], shapes: Mapping[str, Shape]) -> list[ModelInput]:
    """Return inputs with the heads and the widths of pasts, where they are known."""
    return [_with_shape(info, shapes[info.name]) if info.name in shapes else info for info in inputs]


def _with_shape(info: ModelInput, shape: Shape) -> ModelInput:
    batch, heads, past, width = info.dims or (None,) * 4
    return AnyInput(info.name, info.dtype, (batch, heads or shape[0], past, width or shape[1]))


def _first_known(shapes: Sequence[Shape]) -> Shape:
    """Return the first heads and the first width that are known."""
    heads = next((heads for heads, _ in shapes if heads is not None), None)
    return heads, next((width for _, width in shapes if width is not None), None)


def _of_reader(node: ir.Node, index: int) -> Shape:
    """Tell heads and width of what a node reads at a place: by its other inputs and its attributes."""
    if node.op_type == "Concat":
        shapes = [v.shape for i, v in enumerate(node.inputs) if i != index and v is not None and v.shape is not None]
        return _first_known([(_number(s[1]), _number(s[3])) for s in shapes if len(s) == 4])
    kind = _ATTENTION.get(node.op_type)
    if kind is None or index not in kind.past:
        return UNKNOWN
    counts = [attribute(node, name, None) for name in kind.heads]
    heads = next((int(n) for n in counts if n), None)
    return heads, _width_of_head(node, kind, heads, kind.past[index])


def _width_of_head(node: ir.Node, kind: _Attention, heads: int | None, place: int) -> int | None:
    """Tell how wide a head is from the keys or values at a place, from all in one, or from the cosines."""
    whole, packed = _width(_input(node, place)), _width(_input(node, 0))
    if _input(node, place) is not None:
        return whole // heads if whole and heads else None
    if kind.packed and packed and heads:
        return packed // (int(attribute(node, "num_heads", heads)) + 2 * heads)
    cosines = _width(_input(node, kind.cosines)) if kind.cosines is not None else None
    return 2 * cosines if cosines else None


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _width(value: ir.Value | None) -> int | None:
    """Return the last dimension of a value, also where only the product that makes it tells it."""
    if value is None:
        return None
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return value.shape[-1]
    node = value.producer()
    if node is None or node.op_type not in ("MatMul", "Add", "RotaryEmbedding", "Cast", "Identity"):
        return None
    sources = node.inputs[1:] if node.op_type == "MatMul" else node.inputs[: 2 if node.op_type == "Add" else 1]
    return next((width for source in sources if (width := _width(source)) is not None and width > 1), None)


def _number(dim: Any) -> int | None:
    return dim if isinstance(dim, int) else None


def _of_folder(folder: Path) -> Shape:
    """Read heads and width in the configurations beside a model."""
    return _first_known([_of_configuration(path) for path in find_beside(folder, CONFIGURATIONS)] or [UNKNOWN])


def _of_configuration(path: Path) -> Shape:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a file of another kind, which nobody asked for
        return UNKNOWN
    for key in ("model", "decoder"):  # of genai_config.json
        found = found.get(key, found) if isinstance(found, dict) else {}

    def number(*names: str) -> int | None:
        given = found.get(next((name for name in names if name in found), ""))
        return given if isinstance(given, int) and given > 0 else None

    of_queries, hidden = number("num_attention_heads", "n_head"), number("hidden_size", "n_embd")
    width = number("head_size", "head_dim") or (hidden // of_queries if hidden and of_queries else None)
    return number("num_key_value_heads") or of_queries, width
