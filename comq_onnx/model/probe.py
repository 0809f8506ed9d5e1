"""Run a part of a model to get some of its values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from comq_onnx.model.files import private_directory, to_bytes_or_file
from comq_onnx.model.graph import with_outputs
from comq_onnx.runtime.session import Session


def probe(
    model: ir.Model, names: Sequence[str], batches: Iterable[Mapping[str, Any]], device: str, what: str
) -> Iterator[dict[str, Any]]:
    """Yield some values of a model for each batch of feeds, by name.

    Only the nodes that make these values run.

    names: the names of the values
    batches: arrays by the name of the input; inputs that these nodes do not read may be among them
    device: where they run
    what: the name of this part of the model in errors

    Raises ModelError where the part cannot be loaded, RuntimeFailure where it cannot run.
    """
    with private_directory() as work:
        part = to_bytes_or_file(with_outputs(model, names), work, "probe")
        # large models go by a file
        session = Session(part, device, what=what, small=isinstance(part, str))
        read = {i.name for i in session.inputs}
        for batch in batches:
            yield session.run({name: array for name, array in batch.items() if name in read}, names)
