"""Find the values by which a quantized model is judged: its outputs, or what tells more where an output misleads.

An output that a last Concat joins may hold numbers of different units, such as boxes in pixels and scores below one:
the noise of the large ones hides that of the small ones. Such an output is judged by each of its parts.

An output behind an operator that selects (NonMaxSuppression, NonZero, ...) has rows that depend on the data: one score
that crosses a threshold moves all rows behind it. Such an output is judged by the float values that are selected from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import onnx_ir as ir

from comq_onnx.model import graph as graphs
from comq_onnx.model.operators import OP_KINDS

# operators whose output has a shape, or an order, that depends on the numbers that they read
SELECTORS = frozenset({"NonMaxSuppression", "NonZero", "Unique", "Compress"})
# operators that select as many rows whatever the numbers: only rows that are taken right behind them are a selection
FIXED_SELECTORS = frozenset({"TopK"})
# operators that only move or retype the numbers of their first input
CARRIERS = frozenset({"Identity", "Reshape", "Transpose", "Cast", "Squeeze", "Unsqueeze", "Flatten"})
# an output of more parts is judged as a whole
MOST_PARTS = 16
# the beginnings of the names of outputs that are keys and values for the next call
CACHES = ("present", "past_key", "past_value", "key_cache", "value_cache", "updated_key", "updated_value")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


NamedT = TypeVar("NamedT", bound=_Named)


@dataclass(frozen=True)
class Judged:
    """Hold what the outputs of a model are judged by.

    values: by output, the names of the values that stand for it; the output itself where it stands for itself
    selected: the outputs whose rows depend on the data
    """

    values: dict[str, tuple[str, ...]]
    selected: frozenset[str]

    @property
    def names(self) -> list[str]:
        """Return the names of all values, each once."""
        return list(dict.fromkeys(name for names in self.values.values() for name in names))

    @property
    def whole(self) -> list[str]:
        """Return the outputs that stand for themselves."""
        return [output for output, names in self.values.items() if names == (output,)]

    @property
    def without_caches(self) -> Judged:
        """Return what the outputs are judged by that are no caches; all, where there are no others."""
        kept = {output: names for output, names in self.values.items() if not is_cache(output)}
        return Judged(kept or self.values, self.selected)

    @property
    def is_plain(self) -> bool:
        """Tell whether every output stands for itself."""
        return len(self.whole) == len(self.values)


def is_cache(output: str) -> bool:
    """Tell by its name whether an output holds keys or values for the next call of a decoder."""
    return output.lower().startswith(CACHES)


def without_caches(outputs: Sequence[NamedT]) -> list[NamedT]:
    """Return what is known of outputs without those that are caches; all, where there are no others."""
    return [o for o in outputs if not is_cache(o.name)] or list(outputs)


def judged(model: ir.Model) -> Judged:
    """Choose the values by which the outputs of a model are judged."""
    values: dict[str, tuple[str, ...]] = {}
    selected = set()
    for output in model.graph.outputs:
        name = str(output.name)
        before = _selected_from(output)
        if before:
            selected.add(name)
            values[name] = tuple(dict.fromkeys(str(v.name) for v in before))
        else:
            # what a cache holds already is no noise of the model
            parts = [] if is_cache(name) else [str(v.name) for v in _parts(output)]
            values[name] = tuple(dict.fromkeys(parts)) if 1 < len(parts) <= MOST_PARTS else (name,)
    return Judged(values, frozenset(selected))


def judged_model(model: ir.Model, found: Judged) -> tuple[ir.Model, dict[str, str]]:
    """Return a model that gives the judged values, and the name that each of them has there.

    What is quantized between layers is taken as its readers take it, dequantized.
    """
    there = {str(v.name) for v in graphs.walk_values(model)}
    names = {name: f"{name}.dequantized" if f"{name}.dequantized" in there else name for name in found.names}
    return graphs.with_outputs(model, list(names.values())), names


def _parts(value: ir.Value) -> list[ir.Value]:
    """Return the values that a last Concat joins, behind operators that only move numbers; else the value itself."""
    at = value
    while (node := at.producer()) is not None and node.op_type in CARRIERS and node.inputs[0] is not None:
        at = node.inputs[0]
    if node is None or node.op_type != "Concat" or node.domain not in ("", "ai.onnx"):
        return [value]
    joined = [v for v in node.inputs if v is not None and not graphs.is_constant(v) and not _is_whole_number(v)]
    return [part for v in joined for part in _parts(v)]


def _selected_from(output: ir.Value) -> list[ir.Value]:
    """Return the float values that the nearest selecting operators before an output choose from, by layers' work."""
    found: list[ir.Value] = []
    for node, moved_only in _before(output):
        selects = node.op_type in SELECTORS or (node.op_type in FIXED_SELECTORS and moved_only)
        if selects and node.domain in ("", "ai.onnx"):
            found += [v for v in _float_sources(node) if _depends_on_layers(v)]
    return found


def _before(output: ir.Value) -> Iterator[tuple[ir.Node, bool]]:
    """Yield the nodes before an output up to the nearest that select, and whether no layer lies between."""
    pending: list[tuple[ir.Value, bool]] = [(output, True)]
    seen: set[tuple[int, bool]] = set()
    while pending:
        value, moved_only = pending.pop()
        node = value.producer()
        if node is None or (id(node), moved_only) in seen:
            continue
        seen.add((id(node), moved_only))
        yield node, moved_only
        if node.op_type in SELECTORS or (node.op_type in FIXED_SELECTORS and moved_only):
            continue
        behind = moved_only and not _is_layer(node)
        pending += [(v, behind) for v in node.inputs if v is not None]


def _float_sources(node: ir.Node) -> list[ir.Value]:
    """Return the float values that a node chooses by: its inputs, through comparisons and other tests of numbers."""
    found: list[ir.Value] = []
    pending = [v for v in node.inputs if v is not None]
    seen: set[int] = set()
    while pending:
        value = pending.pop(0)
        if id(value) in seen or graphs.is_constant(value):
            continue
        seen.add(id(value))
        if value.dtype in FLOATS or (value.dtype is None and not _is_whole_number(value)):
            found.append(value)
        elif (maker := value.producer()) is not None:
            pending += [v for v in maker.inputs if v is not None]
    return found


def _depends_on_layers(value: ir.Value) -> bool:
    """Tell whether a layer with a weight lies before a value.

    Quantization cannot change what masks and shapes select.
    """
    pending, seen = [value], set()
    while pending:
        node = pending.pop().producer()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if _is_layer(node):
            return True
        pending += [v for v in node.inputs if v is not None]
    return False


def _is_layer(node: ir.Node) -> bool:
    return any(not kind.is_lookup for kind in OP_KINDS.get(node.op_type, {}).values())


def _is_whole_number(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype not in FLOATS
