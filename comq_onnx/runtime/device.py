"""Which device to run on: `cpu`, or a GPU by CUDA, that is shown to work before the long work.

Devices are named as torch names them: `cpu`, `cuda:0`. For running finished models alone there is `tensorrt:0` too.
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
# of a GPU's free memory, what tensors between stages may take
SHARE = 2


@dataclass(frozen=True)
class Choice:
    """A device, and why `auto` is no GPU where ONNX Runtime has one of its packages for it."""

    device: str
    why: str | None = None


def check_name(device: str, others: Sequence[str] = ()) -> None:
    """Raises OptionError for what names no device: auto, cpu, cuda, cuda:1 and `others`."""
    names = ("auto", "cpu", "cuda", *others)
    kind, colon, number = device.partition(":")
    if kind not in names or (colon and (kind in ("auto", "cpu") or not re.fullmatch("[0-9]{1,3}", number))):
        raise OptionError(f"--device {device!r}: choose one of {', '.join(names)}, or a GPU by its number, as cuda:1")


def choose(device: str, others: Sequence[str] = ()) -> Choice:
    """The device for `auto`, `cpu`, `cuda` or `cuda:1`, a GPU only after a product on it.

    Raises OptionError for another name, RuntimeFailure where a GPU is asked for and does not work, with the reason.
    """
    check_name(device, others)
    if device == "cpu":
        return Choice(device)
    if device != "auto":
        return Choice(_working(device))
    if CUDA not in runtime.providers():
        return Choice("cpu")
    try:
        return Choice(_working("cuda"))
    except RuntimeFailure as error:
        return Choice("cpu", str(error))


def is_gpu(device: str) -> bool:
    """Whether a chosen device is a GPU."""
    return device != "cpu"


def budget(device: str) -> int:
    """Bytes of the device's memory that tensors between stages may take."""
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0] if is_gpu(device) else memory.free()) // SHARE


def installed() -> dict[str, str]:
    """The versions of the installed packages that bring the module `onnxruntime`."""
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _working(device: str) -> str:
    """`cuda:0` for `cuda`, after everything that can be wrong with it was looked at."""
    kind, _, number = device.partition(":")
    index = int(number or 0)
    packages = [f"{name} {number}" for name, number in installed().items()]
    if len(packages) > 1:
        raise RuntimeFailure(
            f"--device {device}: {' and '.join(packages)} are installed over each other; pip uninstall both, then "
            "pip install 'comq-onnx[gpu]' alone"
        )
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


def _gpus(device: str) -> int:
    """How many GPUs torch sees. Raises RuntimeFailure where it sees none, or is not there."""
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
            f"--device {device}: there is no GPU, or no driver for it ({_why_none(torch)}); install NVIDIA's driver, "
            "in a container pass the GPU on (docker run --gpus all), or use --device cpu"
        )
    return int(torch.cuda.device_count())


def _why_none(torch: Any) -> str:
    """What CUDA says when it is started, in one line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return runtime.one_line(error)
    return "CUDA does not say why"
