"""Test the pass for Olive's workflows: its parameters, its samples, and the workflow that the documentation shows.

Needs the extra `olive`; skipped where it is not installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import comq_onnx
from comq_onnx.errors import OptionError
from comq_onnx.options.options import Options
from models import mlp, op_types, samples_for

ROOT = Path(__file__).parents[1]
DUMMY = {"input_names": ["x"], "input_shapes": [[2, 32]], "input_types": ["float32"], "max_samples": 8}


@pytest.fixture(scope="module")
def found() -> Any:
    """Import the pass."""
    try:
        import olive  # noqa: F401
    except ImportError as error:
        pytest.skip(f"needs Olive: pip install 'comq-onnx[olive]' ({error})")
    from comq_onnx import olive as module

    return module


def spec(provider: str | None = None) -> Any:
    """Return what Olive runs a pass for."""
    from olive.hardware.accelerator import AcceleratorSpec

    return AcceleratorSpec("cpu", provider)


def quantized(found: Any, folder: Path, **config: Any) -> Any:
    """Run the pass on a small model, and return the handler of its result."""
    from olive.model import ONNXModelHandler

    onnx.save(mlp(), folder / "net.onnx")
    given = {"bits": 8, "device": "cpu", "uniform": True, **config}
    made = found.Comq(spec(), found.Comq.generate_config(spec(), given, disable_search=True))
    return made.run(ONNXModelHandler(folder / "net.onnx"), str(folder / "out"))


def test_nothing_imports_olive_but_the_pass() -> None:
    code = "import sys, comq_onnx.cli.command; sys.exit('olive' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_parameters_are_the_options(found: Any) -> None:
    config = found.Comq.default_config(spec())
    options = {name: value for name, value in vars(Options()).items() if name != "sensitivity"}
    assert set(config) == {"calib", "data_config", *options}
    assert {name: config[name].default_value for name in options} == options
    chosen = found.Comq.generate_config(
        spec(), {"bits": "auto", "size": "25%", "exclude": ["fc1"], "bits_for": [["fc2", 8]]}, disable_search=True
    )
    assert (chosen.exclude, chosen.bits_for) == (("fc1",), (("fc2", 8),))
    # pydantic must not change one kind of number into another
    assert [found.Comq.generate_config(spec(), {"bits": b}, disable_search=True).bits for b in (4, 3.5)] == [4, 3.5]


@pytest.mark.parametrize(
    ("provider", "target"),
    [(None, "ort-cpu"), ("CPUExecutionProvider", "ort-cpu"), ("CUDAExecutionProvider", "ort-cuda"),
     ("TensorrtExecutionProvider", "tensorrt"), ("OpenVINOExecutionProvider", "openvino"),
     ("QNNExecutionProvider", "ort-cpu")],
)  # fmt: skip
def test_the_target_is_that_of_the_accelerator(found: Any, provider: str | None, target: str) -> None:
    assert found.Comq.default_config(spec(provider))["target"].default_value == target


def test_a_search_tries_bits(found: Any) -> None:
    _, fixed, searched = found.Comq.get_config_params(spec(), {})
    assert list(searched) == ["bits"]
    assert "target" in fixed
    assert list(found.Comq.get_config_params(spec(), {"bits": [3, 5]})[2]["bits"].support) == [3, 5]


def test_the_pass_writes_what_the_library_writes(found: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **samples_for(mlp()))
    made = quantized(found, tmp_path, calib=str(tmp_path / "s.npz"))
    comq_onnx.quantize(
        tmp_path / "net.onnx", tmp_path / "q.onnx", tmp_path / "s.npz", bits=8, device="cpu", uniform=True
    )
    assert Path(made.model_path).read_bytes() == (tmp_path / "q.onnx").read_bytes()
    (report,) = made.model_attributes["additional_files"]
    assert json.loads(Path(report).read_text())["bits"] == 8


def test_samples_come_from_a_data_configuration(found: Any, tmp_path: Path) -> None:
    data = {"name": "made_up", "type": "DummyDataContainer", "load_dataset_config": {"params": DUMMY}}
    made = quantized(found, tmp_path, data_config=data)
    assert "QuantizeLinear" in op_types(onnx.load(made.model_path))
    told = json.loads((Path(made.model_path).parent / "comq_report.json").read_text())
    assert told["samples"]["used"] + told["samples"]["held_back"] == 16
    with pytest.raises(OptionError, match="both give samples"):
        quantized(found, tmp_path, data_config=data, calib="s.npz")


def test_large_models_have_their_data_beside_them(found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comq_onnx.model.files.INLINE_LIMIT", 100)
    made = quantized(found, tmp_path)
    folder = Path(made.get_resource("model_path"))
    assert sorted(path.name for path in folder.iterdir()) == ["comq_report.json", "net.onnx", "net.onnx.data"]
    assert len(made.load_model().graph.node) > 2


def test_the_workflow_of_the_documentation_runs(found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import olive

    shown = re.search(r"```json\n(.*?)```", (ROOT / "docs" / "olive.md").read_text(), re.DOTALL)
    assert shown is not None
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    # as the first of the commands there prints it
    packages = json.loads(json.dumps(found.package_config()))
    olive.run(json.loads(shown[1]), package_config=packages)
    out = tmp_path / "quantized" / "model.onnx"
    assert out.stat().st_size < 0.3 * (ROOT / "models" / "fashion_cnn.onnx").stat().st_size
    assert (tmp_path / "quantized" / "comq_report.json").is_file()
