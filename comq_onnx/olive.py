"""Quantize in a workflow of Olive: a pass that does what `comq_onnx.quantize` does, with the same options.

    python -m comq_onnx.olive > passes.json
    olive run --config workflow.json --package-config passes.json

Olive finds passes in a list, and has no place where packages could add to it: the first command prints Olive's own list
with this pass in it. This is the only module that imports Olive.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from olive.common.config_utils import validate_config
from olive.data.config import DataConfig
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from olive.resource_path import LocalFile, LocalFolder
from olive.search.search_parameter import Categorical

from comq_onnx.errors import OptionError
from comq_onnx.model.files import data_names
from comq_onnx.options.options import Options
from comq_onnx.options.spelling import OPTIONS
from comq_onnx.pipeline import quantize
from comq_onnx.targets.catalog import TARGETS

# what a search tries where the workflow does not say
SEARCHED = {"bits": (4, 8)}
REPORT = "comq_report.json"
FIELDS = {field.name: field for field in dataclasses.fields(Options) if OPTIONS[field.name].in_config}


class Comq(Pass):  # type: ignore[misc]  # Olive has no types here
    """Quantize an ONNX model by COMQ."""

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:  # noqa: ARG004
        """Tell that what is written depends on the execution provider."""
        return False

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        """Return the parameters: samples, and the options by the names that `quantize` has for them."""
        types = get_type_hints(Options)
        defaults = {name: field.default for name, field in FIELDS.items()}
        provider = str(accelerator_spec.execution_provider)
        defaults["target"] = next((t.name for t in TARGETS.values() if provider in t.providers), defaults["target"])
        return {
            "calib": PassConfigParam(type_=str, description="Samples, as --calib takes them; none: made-up ones."),
            "data_config": PassConfigParam(
                type_=DataConfig | dict, description="Samples, as a data configuration of Olive; in place of calib."
            ),
            **{
                name: PassConfigParam(
                    type_=types[name], default_value=defaults[name], description=OPTIONS[name].help,
                    search_defaults=Categorical(list(SEARCHED[name])) if name in SEARCHED else None,
                )
                for name in FIELDS
            },
        }  # fmt: skip

    def _run_for_config(self, model: ONNXModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        """Quantize a model, and write the report beside it. Raises ComqError."""
        source = Path(model.model_path)
        out = Path(resolve_onnx_path(output_model_path, source.name))
        report = quantize(source, out, _samples(config), **{name: getattr(config, name) for name in FIELDS})
        report.save_json(out.with_name(REPORT))
        others = (model.model_attributes or {}).get("additional_files") or []
        told = {**(model.model_attributes or {}), "additional_files": sorted({*others, str(out.with_name(REPORT))})}
        if any(out.with_name(name).is_file() for name in data_names(out)):
            place = LocalFolder({"path": out.parent})
            return ONNXModelHandler(model_path=place, onnx_file_name=out.name, model_attributes=told)
        return ONNXModelHandler(model_path=LocalFile({"path": out}), model_attributes=told)


def _samples(config: Any) -> Any:
    """Return the samples that a workflow names. Raises OptionError where it names two."""
    if config.data_config is None:
        return config.calib
    if config.calib is not None:
        raise OptionError("calib and data_config: both give samples; leave one out")
    container = validate_config(config.data_config, DataConfig).to_data_container()

    def data_config() -> Iterator[Any]:
        """Yield inputs, without the labels behind them."""
        for batch in container.create_dataloader():
            yield batch[0] if isinstance(batch, (tuple, list)) else batch

    return data_config


def package_config() -> dict[str, Any]:
    """Return Olive's list of passes with this one in it, as `olive.run` and `--package-config` take it."""
    found: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    found["passes"]["Comq"] = {
        "module_path": "comq_onnx.olive.Comq",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["int4", "int8"],
        "supported_algorithms": [],
        "supported_quantization_encodings": ["qdq"],
        "dataset": "dataset_optional",
    }
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(package_config(), indent=2) + "\n")
