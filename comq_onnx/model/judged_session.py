"""Run a model for the values by which it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from comq_onnx.model.files import private_directory, to_bytes_or_file
from comq_onnx.model.judged import Judged, judged_model
from comq_onnx.runtime.session import Session

# makes a session of a serialized model or a path
Load = Callable[[bytes | str], Session]


def load_part(model: ir.Model, load: Load) -> Session:
    """Load a model that is in memory."""
    with private_directory() as work:
        return load(to_bytes_or_file(model, work, "part"))


def judged_part(model: ir.Model, found: Judged) -> tuple[ir.Model, Mapping[str, str]]:
    """Return what makes the values by which a model is judged, and the name of each value there."""
    if found.is_plain:
        return model, {name: name for name in found.names}
    return judged_model(model, found)


@dataclass(frozen=True)
class JudgedSession:
    """Run a model for the values by which it is judged.

    names: the name of each value in the session's model
    """

    session: Session
    names: Mapping[str, str]

    @classmethod
    def of(cls, model: ir.Model, found: Judged, load: Load) -> JudgedSession:
        """Load what makes the judged values of a model; load: makes the session."""
        part, names = judged_part(model, found)
        return cls(load_part(part, load), names)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Return the judged values by name. Raises RuntimeFailure where the model cannot run."""
        found = self.session.run(feeds, list(self.names.values()))
        return {name: found[there] for name, there in self.names.items()}
