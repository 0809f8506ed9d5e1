"""Choose the device to run on: `cpu`, or a GPU by CUDA, which is shown to work before the long work begins.

Devices are named as torch names them: `cpu`, `cuda:0`. Finished models may also run on `tensorrt:0`.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from comq_onnx.errors import OptionError, RuntimeFailure
from comq_onnx.runtime import memory
from comq_onnx.runtime import session as runtime

# packages that put a module `onnxruntime` in the same place
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
# tensors between stages may take one part in so many of the free memory
SHARE = 2


@dataclass(frozen=True)
class ChosenDevice:
    """Name the device to run on.

    device: `cpu`, `cuda:0`, `tensorrt:0`, ...
    why: the reason why `auto` is no GPU although ONNX Runtime is built for one; None everywhere else.
    """

    device: str
    why: str | None = None


def check_name(device: str, others: Sequence[str] = ()) -> None:
    """Check that a name is auto, cpu, cuda, cuda:1 or one of `others`. Raises OptionError where it is not."""
    names = ("auto", "cpu", "cuda", *others)
    kind, colon, number = device.partition(":")
    if kind not in names or (colon and (kind in ("auto", "cpu") or not re.fullmatch("[0-9]{1,3}", number))):
        raise OptionError(f"--device {device!r}: choose one of {', '.join(names)}, or a GPU by its number, as cuda:1")


def choose(device: str, others: Sequence[str] = ()) -> ChosenDevice:
    """Choose the device for `auto`, `cpu`, `cuda` or `cuda:1`: a GPU only after a product was computed on it.

    others: names of devices that are allowed too, such as `tensorrt`.

    Raises OptionError for another name, RuntimeFailure with the reason where a GPU is asked for and does not work.
    """
    check_name(device, others)
    if device == "cpu":
        return ChosenDevice(device)
    if device != "auto":
        return ChosenDevice(_working(device))
    if CUDA not in runtime.providers():
        return ChosenDevice("cpu")
    try:
        return ChosenDevice(_working("cuda"))
    except RuntimeFailure as error:
        return ChosenDevice("cpu", str(error))


def is_gpu(device: str) -> bool:
    """Tell whether a chosen device is a GPU."""
    return device != "cpu"


def budget(device: str) -> int:
    """Return the bytes of the device's memory that tensors between stages may take."""
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0] if is_gpu(device) else memory.free()) // SHARE


def installed() -> dict[str, str]:
    """Return the versions of the installed packages that bring the module `onnxruntime`, by package."""
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _working(device: str) -> str:
    """Return `cuda:0` for `cuda`, after checking everything that can be wrong with it. Raises RuntimeFailure."""
    kind, _, number = device.partition(":")
    index = int(number or 0)
    _check_packages(device)
    _check_provider(device, kind)
    count = _gpus(device)
    if index >= count:
        raise RuntimeFailure(
            f"--device {device}: there {'is one GPU' if count == 1 else f'are {count} GPUs'}, from cuda:0 on"
        )
    reason = runtime.refusal(f"{kind}:{index}")
    if reason is not None:
        raise RuntimeFailure(
            f"--device {device}: ONNX Runtime fell back to the CPU ({reason}); its CUDA and cuDNN libraries must be of "
            "the versions it is built for: pip install 'comq-onnx[gpu]' in a new environment, or use --device cpu"
        )
    return f"{kind}:{index}"


def _check_packages(device: str) -> None:
    """Raise RuntimeFailure where more than one package brings the module `onnxruntime`."""
    packages = [f"{name} {number}" for name, number in installed().items()]
    if len(packages) > 1:
        raise RuntimeFailure(
            f"--device {device}: {' and '.join(packages)} are installed over each other; pip uninstall both, then "
            "pip install 'comq-onnx[gpu]' alone"
        )


def _check_provider(device: str, kind: str) -> None:
    """Raise RuntimeFailure where ONNX Runtime is not built for CUDA, or for TensorRT where `kind` is that."""
    there = runtime.providers()
    if CUDA not in there:
        raise RuntimeFailure(
            f"--device {device}: ONNX Runtime has no CUDA here (it has {', '.join(there)}); "
            "install comq-onnx[gpu] in place of comq-onnx[cpu], or use --device cpu"
        )
    if kind == "tensorrt" and TENSORRT not in there:
        raise RuntimeFailure(
            f"--device {device}: ONNX Runtime has no TensorRT here (it has {', '.join(there)}); use --device cuda"
        )


def _gpus(device: str) -> int:
    """Count the GPUs that torch sees. Raises RuntimeFailure where it sees none, or is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeFailure(
            f"--device {device}: torch is not installed; pip install 'comq-onnx[gpu]', or use --device cpu"
        )
    import torch

    if torch.version.cuda is None:
        raise RuntimeFailure(
            f"--device {device}: torch {torch.__version__} is built without CUDA; pip install 'comq-onnx[gpu]' in a "
            "new environment, or use --device cpu"
        )
    if not torch.cuda.is_available():
        raise RuntimeFailure(
            f"--device {device}: there is no GPU, or no driver for it ({_cuda_error(torch)}); install NVIDIA's driver, "
            "in a container pass the GPU on (docker run --gpus all), or use --device cpu"
        )
    return int(torch.cuda.device_count())


def _cuda_error(torch: Any) -> str:
    """Return what CUDA says when it is started, in one line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return runtime.one_line(error)
    return "CUDA does not say why"
