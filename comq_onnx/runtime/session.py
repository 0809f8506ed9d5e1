"""Run models in ONNX Runtime: sessions, runs, and what its errors mean. No other module imports onnxruntime."""

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

# official builds since 1.31 report what they run to their makers and leave a file among the temporary ones. This has an
# effect only before the import; who wants the reports sets 0
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
try:
    import onnxruntime as ort
except ImportError:  # the extras bring it
    ort = None

# inputs by name: numpy arrays, and for `run_tensors` torch tensors
Feeds = Mapping[str, Any]
# a run of one batch is ended after so long: a Loop may have no end
MOST_SECONDS = 1800.0

_DTYPES = {
    "float": np.float32, "double": np.float64, "float16": np.float16, "int64": np.int64, "int32": np.int32,
    "int16": np.int16, "int8": np.int8, "uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16,
    "uint8": np.uint8, "bool": np.bool_, "string": np.object_,
}  # fmt: skip
_WHOLE = r"tensor\((u?int\d+|bool)\)"
_FLOATING = ("tensor(float)", "tensor(double)", "tensor(float16)")
# the optimizations that a session in little memory goes without: folding unpacks weights; and where nothing is
# folded, a Transpose moves behind a cubic Resize that can only run before it
_COSTLY = ("ConstantFolding", "TransposeOptimizer", "TransposeOptimizer_CPUExecutionProvider")
# what allocators say: ONNX Runtime's own, C++'s, Python's, CUDA's
_NO_MEMORY = re.compile(r"allocate memory|bad.?alloc|out of memory|unable to allocate|ALLOC_FAILED", re.IGNORECASE)
# the place in its source where a message was made, and the function: its signature, which may have parentheses, or name
_PLACE = re.compile(
    r"(?:/\S*/)?[\w.-]+\.(?:cc|h|cpp|cu):\d+ "
    r"(?:[\w:~<>*&, ]*\((?:[^()]|\([^()]*\))*\)(?: const)? |[A-Z]\w*[a-z][A-Z]\w* )?"
)


def require() -> Any:
    """Return the module onnxruntime. Raises RuntimeFailure, which names the extra to install, where there is none."""
    if ort is None or not hasattr(ort, "InferenceSession"):
        raise RuntimeFailure(
            "onnxruntime is not installed; install one of the extras: "
            "pip install 'comq-onnx[cpu]' or pip install 'comq-onnx[gpu]' (never both)"
        )
    return ort


def version() -> str:
    """Return the version of ONNX Runtime."""
    return str(require().__version__)


def providers() -> list[str]:
    """List the execution providers that this build of ONNX Runtime knows; their libraries may be missing."""
    runtime = require()
    _preload()
    # since 1.31 a provider may be a plugin, which is only found by its devices
    plugins = [str(d.ep_name) for d in runtime.get_ep_devices()] if hasattr(runtime, "get_ep_devices") else []
    return list(dict.fromkeys([*runtime.get_available_providers(), *plugins]))


def has_device(device: str) -> bool:
    """Tell whether ONNX Runtime has a provider for `cpu`, `cuda` or another device here."""
    return device == "cpu" or f"{device.upper()}ExecutionProvider" in require().get_available_providers()


def refusal(device: str) -> str | None:
    """Return the reason why a product does not run on a GPU, `cuda:1` or `tensorrt:1`; None where it runs.

    ONNX Runtime uses the CPU instead where its libraries for the GPU do not load. So this runs a session that may not
    do that, and checks that the result is on the GPU.
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


@dataclass(frozen=True)
class InputInfo:
    """Describe a model input.

    dtype: of numpy; object for strings.
    dims: its dimensions, None for each that is free; None altogether where even the rank is free.
    """

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...] | None


class Session:
    """Load one model, and run it.

    model: serialized, or a path.
    device: `cpu`, `cuda:1` or `tensorrt:1`.
    threads: of the CPU for one operator; 0 for as many as ONNX Runtime chooses.
    level: of graph optimization, as in ONNX Runtime's API: 0 none, 1 basic, 2 extended, 99 all; None for all.
    optimized: a file to write the graph to that ONNX Runtime made of the model; None for no file.
    what: the model's name in error messages.
    float_matmul_nbits: keep the activations of weight-only MatMuls float; ONNX Runtime's default rounds them to int8.
    disable_qdq_fusion: compute each QuantizeLinear and DequantizeLinear as it is written, without integer kernels.
    small: take less memory and more time: weights stay as they are in the file, neither unpacked nor rearranged.
    check: is called before each run, to find a file that has changed: external data are mapped, not read.

    output_names: the outputs, in the model's order.
    inputs: the inputs, in the model's order.

    Raises ModelError where ONNX Runtime cannot load the model, OutOfMemory where memory is missing, and RuntimeFailure
    where it uses the CPU instead of `device`.
    """

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
        small: bool = False,
    ) -> None:
        source = str(model) if isinstance(model, Path) else model
        how = (device, threads, level, optimized, float_matmul_nbits, disable_qdq_fusion, small)
        session = _inference_session(source, device, what, how)
        # a file can be loaded again; a message would have to be kept for that
        file = isinstance(source, str)
        self._load = functools.partial(_inference_session, source, device, what, how) if file else None
        self.output_names: list[str] = [o.name for o in session.get_outputs()]
        self.inputs: list[InputInfo] = [_input_info(i) for i in session.get_inputs()]
        # numbers that stay on the device; integers are mostly shapes and indices, which are needed on the CPU
        self._floating = {o.name for o in session.get_outputs() if o.type in _FLOATING}
        self._tensors = {o.name for o in session.get_outputs() if _is_numeric(o.type)}
        # names of the outputs of whole numbers and truth values
        self.whole_numbers = {o.name for o in session.get_outputs() if re.fullmatch(_WHOLE, o.type)}
        self._session: Any = session
        self._closed = False
        self._what, self._check = what, check
        self._device = device

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return outputs by name: those in `names`, or all of them.

        Raises RuntimeFailure with ONNX Runtime's reason in one line, OutOfMemory where that is memory, ModelError
        where the run takes more than MOST_SECONDS, and RuntimeError after `close`."""
        session, wanted, inputs = self._loaded(), list(names) if names is not None else self.output_names, dict(feeds)
        with self._failures():
            outputs = self._stoppable(lambda options: session.run(wanted, inputs, options))
            return dict(zip(wanted, outputs, strict=True))

    def run_tensors(self, feeds: Feeds, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Run as `run` does, with torch tensors on the session's device, which are not copied on their way in or out.

        Floating-point outputs are tensors, all others numpy arrays. Feeds may be either. The memory of the outputs
        belongs to ONNX Runtime, and stays as long as the outputs do.
        """
        import torch

        session = self._loaded()
        wanted = list(names) if names is not None else self.output_names
        plain = all(arrays.is_tensor(x) or (isinstance(x, np.ndarray) and x.dtype != object) for x in feeds.values())
        device = torch.device(self._device)
        if not plain or not self._tensors.issuperset(wanted):  # strings, sequences
            outputs = self.run({name: arrays.on_host(x) for name, x in feeds.items()}, wanted)
            return {k: torch.as_tensor(v, device=device) if k in self._floating else v for k, v in outputs.items()}
        binding = session.io_binding()
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
                # ONNX Runtime has a stream of its own: torch must have finished its work on the inputs, and on memory
                # that was given back to ONNX Runtime
                torch.cuda.current_stream(device).synchronize()
            self._stoppable(lambda options: session.run_with_iobinding(binding, options))
            outputs = dict(zip(wanted, binding.get_outputs(), strict=True))
        return {k: torch.from_dlpack(v) if k in self._floating else v.numpy() for k, v in outputs.items()}

    def milliseconds(self, feeds: Feeds) -> float:
        """Measure the time of one run, without the limit of `run`: the run is known to end. Raises as ONNX Runtime."""
        session, inputs = self._loaded(), dict(feeds)
        start = time.perf_counter()
        session.run(None, inputs)
        return (time.perf_counter() - start) * 1e3

    def rest(self) -> None:
        """Release a model that was loaded from a file, and its memory, until the next run loads it again."""
        if self._load is not None:
            self._session = None

    def close(self) -> None:
        """Release the loaded model and its memory; a later run raises RuntimeError."""
        self._session, self._closed = None, True

    def _loaded(self) -> Any:
        if self._closed:
            raise RuntimeError(f"the session of {self._what} is closed")
        if self._session is None and self._load is not None:
            if self._check is not None:
                self._check()
            self._session = self._load()
        return self._session

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn what ONNX Runtime raises into RuntimeFailure or OutOfMemory, and a TimeoutError into ModelError."""
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

    def _stoppable(self, compute: Callable[[Any], Any]) -> Any:
        """Return what `compute` makes of run options.

        It runs in a thread beside this one, which can then see signals and the time while native code runs. Raises
        TimeoutError after MOST_SECONDS."""
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
            # ONNX Runtime sees this before the next node
            options.terminate = True
            ended.wait()
        if errors:
            raise errors.pop()
        return outputs.pop()


def _inference_session(source: bytes | str, device: str, what: str, given: tuple[Any, ...]) -> Any:
    """Load a model. Raises as Session; given: what `_session_options` takes."""
    runtime, options, providers = require(), _session_options(*given), _providers(device)
    # with it, a session on a GPU goes on with the CPU after an error, in a run too; one on the CPU tries the CPU
    # again, and prints that
    more: dict[str, Any] = {"enable_fallback": 0}
    if given[-1]:  # small
        more["disabled_optimizers"] = list(_COSTLY)
    try:
        session = runtime.InferenceSession(source, options, providers=providers, **more)
    except Exception as error:
        if is_memory(error):
            raise OutOfMemory(f"no memory to load {what}: {_reason(error)}") from error
        raise ModelError(f"ONNX Runtime {runtime.__version__} cannot load {what}: {_reason(error)}") from error
    if providers[0][0] not in session.get_providers():
        raise RuntimeFailure(
            f"--device {device}: ONNX Runtime fell back to the CPU for {what}; see its log, or use --device cpu"
        )
    return session


def time_in_turn(sessions: Sequence[Session], feeds: Feeds, seconds: float, most: int = 200) -> list[float]:
    """Return the median milliseconds of each model on the same feeds; they run in turn.

    seconds: for about how long
    most: how often each model runs at most
    """
    for session in sessions:
        session.run(feeds)
    times: list[list[float]] = [[] for _ in sessions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < most):
        for session, spent in zip(sessions, times, strict=True):
            spent.append(session.milliseconds(feeds))
    return [float(np.median(t)) for t in times]


def is_memory(error: BaseException) -> bool:
    """Tell whether an error says that there is too little memory, on the computer or on a GPU."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def one_line(said: object) -> str:
    """Put what a library says into one line of printable characters, 400 of them at most."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(said).split()))[:400]


@functools.cache
def _preload() -> str:
    """Load CUDA's libraries from the packages of the extra `gpu`, and return what ONNX Runtime says about it."""
    said = io.StringIO()
    if getattr(ort, "cuda_version", "") and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ort.preload_dlls()
    return one_line(said.getvalue())


def _providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """Return the execution providers for `cpu`, `cuda:1` or `tensorrt:1`, with options, the preferred one first."""
    kind, _, index = device.partition(":")
    cpu: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
    if kind == "cpu":
        return cpu
    own = {"device_id": index or "0"}
    # TF32 has three digits; a search for the fastest convolution may find another one in each run; an arena that
    # doubles in size takes the memory that torch needs
    exact = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    cuda = [("CUDAExecutionProvider", own | exact), *cpu]
    return [("TensorrtExecutionProvider", own), *cuda] if kind == "tensorrt" else cuda


def _product() -> bytes:
    """Return a model of one product, x [8, 8] by itself."""
    text = '<ir_version: 8, opset_import: ["": 13]> g (float[8, 8] x) => (float[8, 8] y) { y = MatMul (x, x) }'
    return bytes(onnx.parser.parse_model(text).SerializeToString())


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _session_options(
    device: str,
    threads: int,
    level: int | None,
    optimized: Path | None,
    float_matmul_nbits: bool,
    disable_qdq_fusion: bool,
    small: bool,
) -> Any:
    """Make the options of an InferenceSession; each parameter as in `Session`."""
    runtime = require()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or cores()
    if threads == 0:
        # threads that wait for work in a loop take the time of those that have some
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # the arena would keep what the largest segment needed until the session ends
    options.enable_cpu_mem_arena = False
    if float_matmul_nbits:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if disable_qdq_fusion:
        # besides: its rewriting of int8 activations to uint8 fails on some models
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if small:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if level is not None:
        options.graph_optimization_level = runtime.GraphOptimizationLevel(level)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if device != "cpu":
        options.use_deterministic_compute = True
    return options


def _input_info(node: Any) -> InputInfo:
    """Describe an input of an InferenceSession. Raises ModelError for a type that no samples can be made for."""
    inner = re.fullmatch(r"tensor\((\w+)\)", node.type)
    dtype = _DTYPES.get(inner.group(1)) if inner else None
    if dtype is None:
        raise ModelError(f"input {node.name!r} has type {node.type}, which samples cannot be made for")
    dims = None if node.shape is None else tuple(d if isinstance(d, int) and d > 0 else None for d in node.shape)
    return InputInfo(node.name, np.dtype(dtype), dims)


def _is_numeric(kind: str) -> bool:
    """Tell whether ONNX Runtime's name of a type, such as `tensor(float)`, is that of a tensor of numbers."""
    return kind.startswith("tensor(") and kind != "tensor(string)"


def _reason(error: BaseException) -> str:
    """Return ONNX Runtime's message in one line of printable characters, without its codes and places in its source."""
    text = " ".join(str(error).split())
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^Load model from .*? failed:", "", text)
    text = _PLACE.sub("", text)
    return one_line(text)
