"""ONNX Runtime, the only module that imports it: sessions, runs, and what its errors mean."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comq_onnx.errors import ModelError, OutOfMemory, RuntimeFailure

Feeds = Mapping[str, Any]

# what takes longer for one batch is ended: a Loop may have no end
MOST_SECONDS = 1800.0

# official builds since 1.31 report what they run to their makers and leave a file among the temporary ones; this counts
# only before the import, and who wants it sets 0
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
try:
    import onnxruntime as ort
except ImportError as error:  # the extras bring it
    ort = None
    _missing = str(error)


def require() -> Any:
    """onnxruntime, or RuntimeFailure naming the extra to install."""
    if ort is None or not hasattr(ort, "InferenceSession"):
        raise RuntimeFailure(
            "onnxruntime is not installed; install one of the extras: "
            "pip install 'comq-onnx[cpu]' or pip install 'comq-onnx[gpu]' (never both)"
        )
    return ort


def version() -> str:
    """The version of ONNX Runtime."""
    return str(require().__version__)


def choose_device(device: str) -> str:
    """`cuda` or `cpu` for `auto`, `cpu` or `cuda`. Raises RuntimeFailure where CUDA is asked for and not there."""
    available = require().get_available_providers()
    if device == "auto":
        return "cuda" if "CUDAExecutionProvider" in available else "cpu"
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        raise RuntimeFailure(
            f"--device cuda: ONNX Runtime has no CUDA here (it has {', '.join(available)}); "
            "install comq-onnx[gpu] in place of comq-onnx[cpu], or use --device cpu"
        )
    return device


@dataclass(frozen=True)
class InputInfo:
    """A model input: its numpy dtype and its dimensions, None where one is free; dims is None where even the rank
    is."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...] | None


_DTYPES = {
    "float": np.float32, "double": np.float64, "float16": np.float16, "int64": np.int64, "int32": np.int32,
    "int16": np.int16, "int8": np.int8, "uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16,
    "uint8": np.uint8, "bool": np.bool_, "string": np.object_,
}  # fmt: skip


class Session:
    """One loaded model. `optimized` names a file for the graph that ONNX Runtime made of it; level as in its
    API; exact keeps activations float where the model has no QuantizeLinear for them; check is called before each run:
    external data are mapped, not read."""

    def __init__(
        self,
        model: bytes | str | Path,
        device: str = "cpu",
        threads: int = 0,
        level: int | None = None,
        optimized: Path | None = None,
        what: str = "the model",
        exact: bool = False,
        check: Callable[[], None] | None = None,
    ) -> None:
        runtime = require()
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # the arena keeps what the largest segment needed for good
        options.enable_cpu_mem_arena = False
        if exact:
            # float activations in weight-only MatMuls: the default rounds them to int8
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if level is not None:
            options.graph_optimization_level = runtime.GraphOptimizationLevel(level)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        providers = ["CUDAExecutionProvider"] if device == "cuda" else []
        source = str(model) if isinstance(model, Path) else model
        # from the CPU it would fall back to the CPU, and print that
        fallback = {"enable_fallback": int(device == "cuda")}
        try:
            self._session = runtime.InferenceSession(
                source, options, providers=[*providers, "CPUExecutionProvider"], **fallback
            )
        except Exception as error:
            if _is_memory(error):
                raise OutOfMemory(f"no memory to load {what}: {_reason(error)}") from error
            raise ModelError(f"ONNX Runtime {runtime.__version__} cannot load {what}: {_reason(error)}") from error
        if device == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeFailure("ONNX Runtime fell back to the CPU: its CUDA or cuDNN libraries do not load")
        self.output_names: list[str] = [o.name for o in self._session.get_outputs()]
        self.inputs: list[InputInfo] = [_input_info(i) for i in self._session.get_inputs()]
        self._what, self._check = what, check

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Outputs by name. Raises RuntimeFailure with the runtime's own reason in one line, OutOfMemory where that is
        memory, ModelError where it takes more than MOST_SECONDS."""
        wanted = list(names) if names is not None else self.output_names
        if self._check is not None:
            self._check()
        try:
            return dict(zip(wanted, self._stoppable(wanted, dict(feeds)), strict=True))
        except TimeoutError as error:
            raise ModelError(
                f"{self._what}: no end after {MOST_SECONDS:,.0f} s on one batch; it may loop without end; if it is "
                "only slow, give a smaller --batch-size"
            ) from error
        except Exception as error:
            if _is_memory(error):
                raise OutOfMemory(f"no memory to run {self._what}: {_reason(error)}") from error
            raise RuntimeFailure(f"ONNX Runtime failed running {self._what}: {_reason(error)}") from error

    def milliseconds(self, feeds: Feeds) -> float:
        """How long one run takes, of which it is known that it ends."""
        inputs = dict(feeds)
        start = time.perf_counter()
        self._session.run(None, inputs)
        return (time.perf_counter() - start) * 1e3

    def _stoppable(self, wanted: list[str], feeds: dict[str, Any]) -> list[Any]:
        """Run in a thread beside this one, which native code does not keep from seeing signals and the time."""
        options, ended = require().RunOptions(), threading.Event()
        outputs: list[Any] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                outputs.extend(self._session.run(wanted, feeds, options))
            except BaseException as error:
                errors.append(error)
            finally:
                ended.set()

        try:
            threading.Thread(target=work, daemon=True).start()
        except RuntimeError:  # no memory for its stack
            work()
        try:
            if not ended.wait(MOST_SECONDS):
                raise TimeoutError
        finally:
            # noticed before the next node
            options.terminate = True
            ended.wait()
        if errors:
            raise errors.pop()
        return outputs


def _input_info(node: Any) -> InputInfo:
    inner = re.fullmatch(r"tensor\((\w+)\)", node.type)
    dtype = _DTYPES.get(inner.group(1)) if inner else None
    if dtype is None:
        raise ModelError(f"input {node.name!r} has type {node.type}, which samples cannot be made for")
    dims = None if node.shape is None else tuple(d if isinstance(d, int) and d > 0 else None for d in node.shape)
    return InputInfo(node.name, np.dtype(dtype), dims)


# what allocators say: ONNX Runtime's own, C++'s, Python's, CUDA's
_NO_MEMORY = re.compile(r"allocate memory|bad.?alloc|out of memory|unable to allocate|ALLOC_FAILED", re.IGNORECASE)
# where in its source a message was made, with the signature of the function, which may hold parentheses, or its name
_PLACE = re.compile(
    r"(?:/\S*/)?[\w.-]+\.(?:cc|h|cpp|cu):\d+ "
    r"(?:[\w:~<>*&, ]*\((?:[^()]|\([^()]*\))*\)(?: const)? |[A-Z]\w*[a-z][A-Z]\w* )?"
)


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _reason(error: BaseException) -> str:
    """ONNX Runtime's message without its codes and source places, in one line of printable characters."""
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    text = _PLACE.sub("", text)
    return "".join(c if c.isprintable() else "?" for c in text)[:400]
