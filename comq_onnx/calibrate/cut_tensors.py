"""Keep the tensors at a cut, and compute with them where they are: numpy arrays on the CPU, torch tensors on a GPU.

On a GPU floating-point tensors stay where ONNX Runtime made them, and torch works on them without a copy. Beyond a
share of the GPU's memory they move to pinned memory of the host, beyond `--memory` to files. What was moved is fetched
on a stream of its own while the batch before it is worked on. Integers and strings are numpy arrays everywhere. All of
it runs on torch's CPU too, where it is tested.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from comq_onnx import arrays
from comq_onnx.errors import OptionError, OutOfMemory
from comq_onnx.plan.activation_grid import ActivationGrid
from comq_onnx.runtime import device
from comq_onnx.runtime import session as runtime
from comq_onnx.runtime.session import Session

T = TypeVar("T")
# smaller tensors are not worth moving
LEAST_BYTES = 1 << 16
# copies to the host that may run at once: each holds its tensor on the GPU until it is done
UNDER_WAY = 4


def uses_tensors(name: str) -> bool:
    """Tell whether cut tensors are torch tensors on the device `name`, not numpy arrays."""
    return device.is_gpu(name)


@contextlib.contextmanager
def opened(name: str, memory: int, directory: Path) -> Iterator[Host]:
    """Open the place where cut tensors are kept and worked on.

    name: the device
    memory: the bytes for tensors on the host
    directory: where the files of tensors beyond that lie

    Raises OutOfMemory where the memory of the device does not suffice.
    """
    host = Host(memory, directory)
    if not uses_tensors(name):
        yield host
        return
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        # the smaller of both: with --memory 0 nothing is kept on the device either
        yield Device(name, min(device.budget(name), memory), host)
    except RuntimeError as error:
        if not runtime.is_memory(error):
            raise
        raise OutOfMemory(f"no memory on {name}: {runtime.one_line(error)}") from error
    finally:
        torch.set_float32_matmul_precision(precision)
        if device.is_gpu(name):
            torch.cuda.empty_cache()


class Host:
    """Keep numpy arrays in memory up to a budget, beyond it in files that vanish with the arrays."""

    def __init__(self, budget: int, directory: Path) -> None:
        """Begin with nothing kept; budget: the bytes in memory; directory: where the files lie."""
        self._budget, self._directory, self._held, self._files = budget, directory, 0, 0
        self._mapped: dict[int, mmap.mmap] = {}

    def run(self, session: Session, feeds: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Run a segment, and return its outputs `names`."""
        return session.run(feeds, names)

    def ahead(self, count: int, get: Callable[[int], T]) -> Iterator[T]:
        """Yield get(0), get(1), ..., `count` of them; on a GPU each is fetched while the one before is worked on.

        What of a file was read into memory for one is given back before the next.
        """
        for i in range(count):
            yield get(i)
            self._rest()

    def fetch(self, value: Any) -> Any:
        """Bring a kept array to where it is worked on."""
        return value

    def fake_quantize(self, grid: ActivationGrid, x: Any) -> Any:
        """Compute DequantizeLinear(QuantizeLinear(x))."""
        return grid.fake_quantize(x)

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Return an array of this shape that takes no memory, to ask the kind of a layer about it."""
        return np.broadcast_to(np.float32(0), shape)

    def keep(self, array: Any) -> Any:
        """Keep an array: return it in memory, or mapped from a file. Raises OptionError where that cannot be written.

        Sequences and arrays of objects are returned as they are.
        """
        if not isinstance(array, np.ndarray) or array.dtype == object:
            return array
        if self.has_room(array.nbytes) or array.nbytes <= LEAST_BYTES:
            return self.hold(array)
        return self._in_file(array)

    def on_host(self, value: Any) -> Any:
        """Return a kept tensor as it is written to a work directory."""
        return value

    def restore(self, value: Any) -> Any:
        """Keep a tensor that was read from a work directory: in memory, or mapped as it is."""
        if not isinstance(value, np.ndarray) or value.dtype == object:
            return value
        return self.hold(np.array(value)) if self.has_room(value.nbytes) else value

    def has_room(self, size: int) -> bool:
        """Tell whether the budget has `size` bytes left."""
        return self._held + size <= self._budget

    def hold(self, array: Any) -> Any:
        """Count an array in memory as long as it exists, and return it."""
        self._held += array.nbytes
        weakref.finalize(array, self._release, array.nbytes)
        return array

    def _in_file(self, array: Any) -> Any:
        """Write an array to a file, and return it mapped from there."""
        self._files += 1
        path = self._directory / f"cut{self._files}.npy"
        # written before it is mapped: on a full disk writing raises an error, writing to a mapping kills the process
        try:
            np.save(path, array)
            mapped = np.load(path, mmap_mode="r+")
        except OSError as error:
            raise OptionError(
                f"{self._directory.parent}: tensors kept between stages cannot be written there ({error}); free "
                "some space, set TMPDIR to a larger disk, or give more --memory"
            ) from error
        self._mapped[self._files] = mapped._mmap
        weakref.finalize(mapped, self._remove, self._files, path)
        return mapped

    def _rest(self) -> None:
        """Give back the memory that was read of files: they are read again where they are needed again."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            for pages in self._mapped.values():
                pages.madvise(mmap.MADV_DONTNEED)

    def _remove(self, number: int, path: Path) -> None:
        del self._mapped[number]
        path.unlink(missing_ok=True)

    def _release(self, size: int) -> None:
        self._held -= size


class Device(Host):
    """Keep torch tensors on a device up to a budget, beyond it in (pinned) memory of the host, then in files."""

    def __init__(self, name: str, budget: int, host: Host) -> None:
        """Begin with nothing kept; budget: the bytes on the device `name`; host: keeps what is beyond that."""
        import torch

        self._torch, self._host = torch, host
        self._device = torch.device(name)
        self._gpu = self._device.type == "cuda"
        self._budget, self._held = budget, 0
        self._copies = torch.cuda.Stream(self._device) if self._gpu else None
        self._under_way: deque[tuple[Any, Any]] = deque()

    def run(self, session: Session, feeds: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Run a segment, and return its outputs `names` as tensors on the device."""
        return session.run_tensors(feeds, names)

    def ahead(self, count: int, get: Callable[[int], T]) -> Iterator[T]:
        """Yield get(0), get(1), ..., each fetched on a stream of its own while the one before is worked on."""
        copies = self._copies
        if copies is None:
            yield from map(get, range(count))
            return
        compute = self._torch.cuda.current_stream(self._device)

        def fetched(i: int) -> tuple[T, Any]:
            with self._torch.cuda.stream(copies):
                # the batch before may still be read: its memory must not be used again until then
                copies.wait_stream(compute)
                return get(i), copies.record_event()

        following = fetched(0) if count else None
        for i in range(count):
            assert following is not None
            item, done = following
            following = fetched(i + 1) if i + 1 < count else None
            compute.wait_event(done)
            yield item

    def fetch(self, value: Any) -> Any:
        """Bring a kept tensor to the device; integers and strings stay numpy arrays."""
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            value = self._torch.as_tensor(value)
        if not arrays.is_tensor(value) or value.device == self._device:
            return value
        return value.to(self._device, non_blocking=True)

    def fake_quantize(self, grid: ActivationGrid, x: Any) -> Any:
        """Compute DequantizeLinear(QuantizeLinear(x)) on the device."""
        # a scale on the device: with a Python number torch multiplies by its inverse, which rounds differently
        scale = self._torch.tensor(float(grid.scale), dtype=x.dtype, device=x.device)
        q = (self._torch.round(x / scale) + grid.zero_point).clamp(0, grid.qmax)
        return (q - grid.zero_point) * scale

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Return a tensor of this shape that takes no memory."""
        return self._torch.empty(shape, device="meta")

    def on_host(self, value: Any) -> Any:
        """Return a kept tensor as it is written to a work directory: a numpy array."""
        return arrays.on_host(value) if arrays.is_tensor(value) else value

    def restore(self, value: Any) -> Any:
        """Keep a tensor that was read from a work directory."""
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            return self._host.restore(value)
        return self.keep(self.fetch(np.array(value)))

    def keep(self, array: Any) -> Any:
        """Keep a tensor on the device, in memory of the host or in a file: the first of them that has room."""
        if not arrays.is_tensor(array):
            return self._host.keep(array)
        if self.has_room(array.nbytes) or array.nbytes <= LEAST_BYTES:
            return self.hold(array)
        if not self._host.has_room(array.nbytes):
            return self._host.keep(arrays.on_host(array))
        return self._host.hold(self._on_host(array))

    def _on_host(self, array: Any) -> Any:
        """Copy a tensor to (pinned) memory of the host; on a GPU the copy goes on while others are worked on."""
        moved = self._torch.empty(array.shape, dtype=array.dtype, pin_memory=self._gpu)
        if self._copies is None:
            moved.copy_(array)
        else:
            self._copies.wait_stream(self._torch.cuda.current_stream(self._device))
            with self._torch.cuda.stream(self._copies):
                moved.copy_(array, non_blocking=True)
                self._under_way.append((array, self._copies.record_event()))
            while len(self._under_way) > UNDER_WAY or (self._under_way and self._under_way[0][1].query()):
                self._under_way.popleft()[1].synchronize()
        return moved
