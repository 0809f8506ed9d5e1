"""Go through the stages of a run one by one, for tests that look between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comq_onnx import Options
from comq_onnx.context import Context
from comq_onnx.model.float_model import FloatModel, open_model
from comq_onnx.plan.faithful import prepare_faithfully
from comq_onnx.plan.make import make_plan
from comq_onnx.plan.plan import Plan
from comq_onnx.samples.dataset import Dataset, load_dataset


@dataclass(frozen=True)
class Planned:
    """Hold what a run has once its plan is made."""

    source: FloatModel
    data: Dataset
    plan: Plan
    context: Context


def planned(path: Path, samples: Any, **options: Any) -> Planned:
    """Open the model at `path`, load samples and make the plan, on the CPU."""
    context = Context.of(Options(**{"device": "cpu", **options}))
    source = open_model(path, context)
    data = load_dataset(source, samples, context)
    plan = make_plan(source, prepare_faithfully(source, data, context), data, context)
    return Planned(source, data, plan, context)
