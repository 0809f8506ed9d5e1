"""Test which device is chosen, and that it is seen to work before; all messages are in test_messages."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from comq_onnx import Options, pipeline
from comq_onnx.errors import OptionError, OutOfMemory, RuntimeFailure
from comq_onnx.evaluate.comparison import compare
from comq_onnx.runtime import device
from comq_onnx.runtime import session as runtime
from models import mlp, samples_for

WITH_CUDA = [device.CUDA, "CPUExecutionProvider"]


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_devices_are_named_as_torch_names_them(name: str) -> None:
    device.check_name(name)
    assert Options(device=name).device == name


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "auto:1", "cuda:1:2", "tensorrt"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="choose one of auto, cpu, cuda"):
        Options(device=name)


def test_auto_is_the_cpu_where_there_is_no_cuda_and_says_why_where_it_does_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "providers", lambda: ["CPUExecutionProvider"])
    assert device.choose("auto") == device.ChosenDevice("cpu")
    monkeypatch.setattr(runtime, "providers", lambda: WITH_CUDA)
    monkeypatch.setattr(device, "_gpus", lambda _: 1)
    # ONNX Runtime's own word: this build has no CUDA
    found = device.choose("auto")
    assert found.device == "cpu"
    assert found.why is not None
    assert "ONNX Runtime fell back to the CPU (" in found.why
    report = pipeline.quantize(mlp(), None, samples_for(mlp()), bits=8, effort="fast", max_samples=20)
    assert any(warning.startswith("calibrated on the CPU, not on the GPU: ") for warning in report.warnings)
    assert report.runtime["device"] == "cpu"


def test_a_gpu_is_chosen_by_its_number_once_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(runtime, "providers", lambda: [device.TENSORRT, *WITH_CUDA])
    monkeypatch.setattr(device, "_gpus", lambda _: 2)
    monkeypatch.setattr(runtime, "refusal", lambda name: asked.append(name))
    names = {"auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1"}
    assert {name: device.choose(name).device for name in names} == names
    assert device.choose("tensorrt:1", ("tensorrt",)).device == "tensorrt:1"
    assert asked == [*names.values(), "tensorrt:1"]


def test_providers_and_their_options_are_those_of_the_device() -> None:
    assert [name for name, _ in runtime._providers("cpu")] == ["CPUExecutionProvider"]
    (cuda, options), *rest = runtime._providers("cuda:3")
    assert (cuda, options["device_id"], options["use_tf32"]) == (device.CUDA, "3", "0")
    assert [name for name, _ in rest] == ["CPUExecutionProvider"]
    assert [name for name, _ in runtime._providers("tensorrt:0")][:2] == [device.TENSORRT, device.CUDA]


def test_tensorrt_is_for_comparing_and_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "providers", lambda: WITH_CUDA)
    with pytest.raises(RuntimeFailure, match="--device tensorrt: ONNX Runtime has no TensorRT here"):
        compare(mlp(), mlp(), samples_for(mlp()), device="tensorrt")


def test_a_session_that_fell_back_to_the_cpu_is_refused() -> None:
    with pytest.raises(RuntimeFailure, match="--device cuda:0: ONNX Runtime fell back to the CPU for the thing"):
        runtime.Session(mlp().SerializeToString(), "cuda:0", what="the thing")


def test_without_memory_on_a_gpu_batches_get_smaller_then_nothing_is_kept_then_one_line_says_so() -> None:
    tried = [Options(batch_size=16)]
    for _ in range(3):
        tried.append(pipeline._with_less_memory(tried[-1], MemoryError(), on_gpu=True))
    assert [(options.batch_size, options.memory_gb) for options in tried] == [(16, None), (4, None), (1, None), (1, 0)]
    with pytest.raises(OutOfMemory, match="not enough memory, even for one sample at once"):
        pipeline._with_less_memory(tried[-1], MemoryError(), on_gpu=True)
    with pytest.raises(OutOfMemory):
        pipeline._with_less_memory(Options(batch_size=1), MemoryError(), on_gpu=False)


def test_torch_is_not_imported_where_there_is_no_gpu_to_work_on() -> None:
    code = (
        "import sys, comq_onnx, comq_onnx.cli.command, comq_onnx.runtime.device as device\n"
        "device.choose('cpu')\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_packages_that_bring_onnxruntime_are_found() -> None:
    found = device.installed()
    assert len(found) == 1
    assert next(iter(found)).startswith("onnxruntime")
    assert np.all([version[0].isdigit() for version in found.values()])
