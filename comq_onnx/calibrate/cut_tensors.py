"""Where the tensors at a cut lie and what runs on them there: numpy arrays on the CPU, torch tensors on a GPU.

On a GPU floating-point tensors stay where ONNX Runtime made them, and torch works on them without a copy. Past a
share of the GPU's memory they move to pinned memory of the host, past `--memory` to files; what was moved is fetched on
a stream of its own while the batch before it is worked on. Integers and strings are numpy arrays everywhere. All of it
runs on torch's CPU too, where it is tested.
"""

from __future__ import annotations

import contextlib
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
# copies to the host that may be under way at once: each holds its tensor on the GPU until it is done
UNDER_WAY = 4


def uses_tensors(name: str) -> bool:
    """Tell whether cut tensors are torch's on a device, not numpy arrays."""
    return device.is_gpu(name)


@contextlib.contextmanager
def opened(name: str, memory: int, directory: Path) -> Iterator[Host]:
    """Open the place where cut tensors lie and are worked on.

    name: the device; memory: bytes for tensors on the host; directory: for files of what is beyond that
    """
    host = Host(memory, directory)
    if not uses_tensors(name):
        yield host
        return
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        # the least of both where nothing is to be kept at all
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
    """numpy arrays, in memory up to a budget, beyond it in files that vanish with them."""

    def __init__(self, budget: int, directory: Path) -> None:
        self._budget, self._directory, self._held, self._files = budget, directory, 0, 0

    def run(self, session: Session, feeds: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """The outputs of a segment."""
        return session.run(feeds, names)

    def ahead(self, count: int, get: Callable[[int], T]) -> Iterator[T]:
        """get(0), get(1), ..., on a GPU each fetched while the one before is worked on."""
        return map(get, range(count))

    def fetch(self, value: Any) -> Any:
        """What was kept, where it is worked on."""
        return value

    def fake_quantize(self, grid: ActivationGrid, x: Any) -> Any:
        """DequantizeLinear(QuantizeLinear(x))."""
        return grid.fake_quantize(x)

    def empty(self, shape: tuple[int, ...]) -> Any:
        """An array of this shape that takes no memory, to ask a layer about."""
        return np.broadcast_to(np.float32(0), shape)

    def keep(self, array: Any) -> Any:
        """The same array, in memory or mapped from a file."""
        if not isinstance(array, np.ndarray) or array.dtype == object:
            return array
        if not self.has_room(array.nbytes) and array.nbytes > LEAST_BYTES:
            self._files += 1
            path = self._directory / f"cut{self._files}.npy"
            # written before it is mapped: on a full disk writing fails with an error, touching a mapping kills
            try:
                np.save(path, array)
                mapped = np.load(path, mmap_mode="r+")
            except OSError as error:
                raise OptionError(
                    f"{self._directory.parent}: tensors kept between stages cannot be written there ({error}); free "
                    "some space, set TMPDIR to a larger disk, or give more --memory"
                ) from error
            weakref.finalize(mapped, path.unlink, missing_ok=True)
            return mapped
        return self.hold(array)

    def has_room(self, size: int) -> bool:
        """Whether the budget has so many bytes left."""
        return self._held + size <= self._budget

    def hold(self, array: Any) -> Any:
        """Count an array in memory as long as it lives."""
        self._held += array.nbytes
        weakref.finalize(array, self._release, array.nbytes)
        return array

    def _release(self, size: int) -> None:
        self._held -= size


class Device(Host):
    """torch tensors on a device up to a budget, beyond it in (pinned) memory of the host, then in files."""

    def __init__(self, name: str, budget: int, host: Host) -> None:
        import torch

        self._torch, self._host = torch, host
        self._device = torch.device(name)
        self._gpu = self._device.type == "cuda"
        self._budget, self._held = budget, 0
        self._copies = torch.cuda.Stream(self._device) if self._gpu else None
        self._under_way: deque[tuple[Any, Any]] = deque()

    def run(self, session: Session, feeds: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        return session.run_tensors(feeds, names)

    def ahead(self, count: int, get: Callable[[int], T]) -> Iterator[T]:
        copies = self._copies
        if copies is None:
            yield from map(get, range(count))
            return
        compute = self._torch.cuda.current_stream(self._device)

        def fetched(i: int) -> tuple[T, Any]:
            with self._torch.cuda.stream(copies):
                # what is worked on may still be read: its memory must not be written anew before
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
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            value = self._torch.as_tensor(value)
        if not arrays.is_tensor(value) or value.device == self._device:
            return value
        return value.to(self._device, non_blocking=True)

    def fake_quantize(self, grid: ActivationGrid, x: Any) -> Any:
        # a scale on the device: torch multiplies with the inverse of a number, which is another rounding
        scale = self._torch.tensor(float(grid.scale), dtype=x.dtype, device=x.device)
        q = (self._torch.round(x / scale) + grid.zero_point).clamp(0, grid.qmax)
        return (q - grid.zero_point) * scale

    def empty(self, shape: tuple[int, ...]) -> Any:
        return self._torch.empty(shape, device="meta")

    def keep(self, array: Any) -> Any:
        if not arrays.is_tensor(array):
            return self._host.keep(array)
        if self.has_room(array.nbytes) or array.nbytes <= LEAST_BYTES:
            return self.hold(array)
        if not self._host.has_room(array.nbytes):
            return self._host.keep(arrays.on_host(array))
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
        return self._host.hold(moved)
