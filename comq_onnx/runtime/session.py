"""ONNX Runtime, the only module that imports it: sessions, runs, and what its errors mean."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser

from comq_onnx import arrays
from comq_onnx.errors import ModelError, OutOfMemory, RuntimeFailure

try:
    import onnxruntime as ort
except ImportError as error:  # the extras bring it
    ort = None
    _missing = str(error)


Feeds = Mapping[str, Any]
# what takes longer for one batch is ended: a Loop may have no end
MOST_SECONDS = 1800.0
# official builds since 1.31 report what they run to their makers and leave a file among the temporary ones; this counts
# only before the import, and who wants it sets 0
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


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


def providers() -> list[str]:
    """The execution providers that this build of ONNX Runtime knows; their libraries need not be there."""
    runtime = require()
    _preload()
    # since 1.31 a provider may be a plugin, which only its devices tell of
    plugins = [str(d.ep_name) for d in runtime.get_ep_devices()] if hasattr(runtime, "get_ep_devices") else []
    return list(dict.fromkeys([*runtime.get_available_providers(), *plugins]))


@functools.cache
def _preload() -> str:
    """Load CUDA's libraries out of the packages that the extra `gpu` brings; what ONNX Runtime says of it."""
    said = io.StringIO()
    if getattr(ort, "cuda_version", "") and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ort.preload_dlls()
    return one_line(said.getvalue())


def _providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """The execution providers for `cpu`, `cuda:1` or `tensorrt:1`, the preferred one first, with their options."""
    kind, _, index = device.partition(":")
    cpu: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
    if kind == "cpu":
        return cpu
    own = {"device_id": index or "0"}
    # TF32 has three digits; the search for the fastest convolution takes another one from run to run; an arena that
    # doubles takes what torch needs
    exact = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    cuda = [("CUDAExecutionProvider", own | exact), *cpu]
    return [("TensorrtExecutionProvider", own), *cuda] if kind == "tensorrt" else cuda


def refusal(device: str) -> str | None:
    """Why a product does not run on a GPU, `cuda:1` or `tensorrt:1`; None where it does.

    ONNX Runtime goes on with the CPU where its libraries for the GPU do not load, so a session that may not is made,
    and run, and its result looked for on the device.
    """
    runtime = require()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    given, wanted = np.ones((8, 8), np.float32), _providers(device)[:-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session = runtime.InferenceSession(_product(), options, providers=wanted)
        if wanted[0][0] not in session.get_providers():
            return _preload() or f"the session has {', '.join(session.get_providers())}"
        binding = session.io_binding()
        binding.bind_cpu_input("x", given)
        binding.bind_output("y", "cuda", int(wanted[0][1]["device_id"]))
        session.run_with_iobinding(binding)
        (result,) = binding.get_outputs()
    except Exception as error:
        return _reason(error)
    if result.device_name() != "cuda":
        return f"its result is on the {result.device_name()}"
    return None if np.array_equal(result.numpy(), given @ given) else "its product is wrong"


def _product() -> bytes:
    text = '<ir_version: 8, opset_import: ["": 13]> g (float[8, 8] x) => (float[8, 8] y) { y = MatMul (x, x) }'
    return bytes(onnx.parser.parse_model(text).SerializeToString())


def has_device(device: str) -> bool:
    """Whether ONNX Runtime runs models on `cpu` or `cuda` here."""
    return device == "cpu" or "CUDAExecutionProvider" in require().get_available_providers()


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
_FLOATING = ("tensor(float)", "tensor(double)", "tensor(float16)")


def _is_numeric(kind: str) -> bool:
    return kind.startswith("tensor(") and kind != "tensor(string)"


class Session:
    """One loaded model. `optimized` names a file for the graph that ONNX Runtime made of it; level as in its
    API; float_matmul_nbits keeps activations float where the model has no QuantizeLinear for them; disable_qdq_fusion computes each
    QuantizeLinear and DequantizeLinear as it is written, with no integer kernels of its own; check is called before
    each run: external data are mapped, not read."""

    def __init__(
        self,
        model: bytes | str | Path,
        device: str = "cpu",
        threads: int = 0,
        level: int | None = None,
        optimized: Path | None = None,
        what: str = "the model",
        float_matmul_nbits: bool = False,
        disable_qdq_fusion: bool = False,
        check: Callable[[], None] | None = None,
    ) -> None:
        runtime = require()
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # the arena keeps what the largest segment needed for good
        options.enable_cpu_mem_arena = False
        if float_matmul_nbits:
            # float activations in weight-only MatMuls: the default rounds them to int8
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if disable_qdq_fusion:
            # its rewriting of int8 activations to uint8 fails on some models, besides
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if level is not None:
            options.graph_optimization_level = runtime.GraphOptimizationLevel(level)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        if device != "cpu":
            options.use_deterministic_compute = True
        providers = _providers(device)
        source = str(model) if isinstance(model, Path) else model
        # from a GPU it would go on with the CPU, in a run too, and from the CPU with the CPU, and print that
        fallback = {"enable_fallback": 0}
        try:
            self._session = runtime.InferenceSession(source, options, providers=providers, **fallback)
        except Exception as error:
            if is_memory(error):
                raise OutOfMemory(f"no memory to load {what}: {_reason(error)}") from error
            raise ModelError(f"ONNX Runtime {runtime.__version__} cannot load {what}: {_reason(error)}") from error
        if providers[0][0] not in self._session.get_providers():
            raise RuntimeFailure(
                f"--device {device}: ONNX Runtime fell back to the CPU for {what}; see its log, or use --device cpu"
            )
        self.output_names: list[str] = [o.name for o in self._session.get_outputs()]
        self.inputs: list[InputInfo] = [_input_info(i) for i in self._session.get_inputs()]
        # numbers that stay on the device; integers are mostly shapes and indices, which the CPU wants
        self._floating = {o.name for o in self._session.get_outputs() if o.type in _FLOATING}
        self._tensors = {o.name for o in self._session.get_outputs() if _is_numeric(o.type)}
        self._what, self._check = what, check
        self._device = device

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Outputs by name. Raises RuntimeFailure with the runtime's own reason in one line, OutOfMemory where that is
        memory, ModelError where it takes more than MOST_SECONDS."""
        wanted = list(names) if names is not None else self.output_names
        inputs = dict(feeds)
        with self._failures():
            outputs = self._stoppable(lambda options: self._session.run(wanted, inputs, options))
            return dict(zip(wanted, outputs, strict=True))

    def run_tensors(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Any]:
        """`run` with torch tensors on the session's device, without a copy either way: floating-point outputs are such,
        all others numpy arrays. Feeds may be either.

        What the outputs hold belongs to ONNX Runtime and lives as long as they do.
        """
        import torch

        wanted = list(names) if names is not None else self.output_names
        plain = all(arrays.is_tensor(x) or (isinstance(x, np.ndarray) and x.dtype != object) for x in feeds.values())
        device = torch.device(self._device)
        if not plain or not self._tensors.issuperset(wanted):  # strings, sequences
            outputs = self.run({name: arrays.on_host(x) for name, x in feeds.items()}, wanted)
            return {k: torch.as_tensor(v, device=device) if k in self._floating else v for k, v in outputs.items()}
        binding = self._session.io_binding()
        held = []  # the inputs: ONNX Runtime reads them where they are
        with self._failures():
            for name, value in feeds.items():
                if arrays.is_tensor(value):
                    held.append(require().OrtValue.from_dlpack(value.detach().contiguous()))
                    binding.bind_ortvalue_input(name, held[-1])
                else:
                    binding.bind_cpu_input(name, np.asarray(value, order="C"))
            for name in wanted:
                on = (device.type, device.index or 0) if name in self._floating else ("cpu", 0)
                binding.bind_output(name, *on)
            if device.type == "cuda":
                # ONNX Runtime has a stream of its own: what torch still does to the inputs, or to memory that was
                # given back to ONNX Runtime, must be done
                torch.cuda.current_stream(device).synchronize()
            self._stoppable(lambda options: self._session.run_with_iobinding(binding, options))
            outputs = dict(zip(wanted, binding.get_outputs(), strict=True))
        return {k: torch.from_dlpack(v) if k in self._floating else v.numpy() for k, v in outputs.items()}

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turns what ONNX Runtime raises into RuntimeFailure or OutOfMemory, what takes too long into ModelError."""
        if self._check is not None:
            self._check()
        try:
            yield
        except TimeoutError as error:
            raise ModelError(
                f"{self._what}: no end after {MOST_SECONDS:,.0f} s on one batch; it may loop without end; if it is "
                "only slow, give a smaller --batch-size"
            ) from error
        except Exception as error:
            if is_memory(error):
                raise OutOfMemory(f"no memory to run {self._what}: {_reason(error)}") from error
            raise RuntimeFailure(f"ONNX Runtime failed running {self._what}: {_reason(error)}") from error

    def close(self) -> None:
        """Release the loaded model: it cannot run again."""
        del self._session

    def milliseconds(self, feeds: Feeds) -> float:
        """How long one run takes, of which it is known that it ends."""
        inputs = dict(feeds)
        start = time.perf_counter()
        self._session.run(None, inputs)
        return (time.perf_counter() - start) * 1e3

    def _stoppable(self, compute: Callable[[Any], Any]) -> Any:
        """What `compute` makes with run options, in a thread beside this one, which native code does not keep from
        seeing signals and the time. Raises TimeoutError."""
        options, ended = require().RunOptions(), threading.Event()
        outputs: list[Any] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                outputs.append(compute(options))
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
        return outputs.pop()


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


def is_memory(error: BaseException) -> bool:
    """Whether an error says that there is too little memory, of the computer or of a GPU."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _reason(error: BaseException) -> str:
    """ONNX Runtime's message without its codes and source places, in one line of printable characters."""
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    text = _PLACE.sub("", text)
    return one_line(text)


def one_line(said: object) -> str:
    """What a library says in one line of printable characters, 400 of them at most."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(said).split()))[:400]
