"""What the engine asks of its device: copies that do not wait, recorded work, a look at memory.

The only file of the engine that speaks to torch.cuda; the CPU class is the same contract where
copies are free and nothing is ever under way, so everything above runs, and is tested, on both.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import torch

_ALIGNMENT = 128
"""Bytes. Every tensor of a copy starts as a fresh one would, for kernels that load 16 at a time."""

_TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


class Device:
    """A CPU."""

    is_host: ClassVar[bool] = True
    """Whether kernels read the host's memory, and launching them costs nothing worth recording."""

    def __init__(self, device: torch.device) -> None:
        """`device` is where the tensors live."""
        self.device = device

    def put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The arrays (int64, int32 or float32) as tensors on the device, moved in one copy."""
        sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values()]
        host = self._host_bytes(sum(sizes))
        target, at = host.numpy(), 0
        for array, size in zip(arrays.values(), sizes, strict=True):
            target[at : at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            at += size
        parts = self._moved(host).split_with_sizes(sizes)
        return {
            name: part[: array.nbytes].view(_TORCH_DTYPES[array.dtype]).view(array.shape)
            for (name, array), part in zip(arrays.items(), parts, strict=True)
        }

    def fetch(self, *tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Start copying tensors to the host; the call that is returned waits and hands them over.

        It waits for the work launched up to now, not for what is launched afterwards.
        """
        return lambda: tensors

    def recorder(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """A function that turns work on tensors into a call that repeats it on what they then hold.

        The work must not look at their content. What one recorder recorded shares memory, and is to
        be repeated one at a time. On a CPU the repetition is the work itself.
        """
        return lambda work: work

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Run `work`; bytes of device memory that it takes and gives back. Unknown, 0, on a CPU."""
        work()
        return 0

    def used_bytes(self) -> int:
        """Device memory that this and other processes hold; 0 on a CPU, which nobody sizes by."""
        return 0

    def trim(self) -> None:
        """Hand memory that only waits to be used again back to the device."""

    def _host_bytes(self, n: int) -> torch.Tensor:
        return torch.empty(n, dtype=torch.uint8)

    def _moved(self, host: torch.Tensor) -> torch.Tensor:
        return host


class CudaDevice(Device):
    """A CUDA device, all of whose work is launched on the current stream."""

    is_host = False

    def __init__(self, device: torch.device) -> None:
        """`device` with or without an index; without one it is the current device."""
        index = torch.cuda.current_device() if device.index is None else device.index
        super().__init__(torch.device("cuda", index))
        # One for all recordings: libraries keep a workspace for every stream that they have seen.
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def fetch(self, *tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        """As the base class says, into pinned memory."""
        hosts = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
        for host, x in zip(hosts, tensors, strict=True):
            host.copy_(x, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> tuple[torch.Tensor, ...]:
            arrived.synchronize()
            return hosts

        return wait

    def recorder(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """As the base class says, by CUDA graphs.

        Work is done once before it is recorded: kernels are compiled and libraries take their
        workspaces then, which recording forbids.
        """
        pool = torch.cuda.graph_pool_handle()

        def record(work: Callable[[], None]) -> Callable[[], None]:
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                work()
            current.wait_stream(self._side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._side):
                work()
            return graph.replay

        return record

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """As the base class says, by what torch reserves, so that fragments count."""
        self.trim()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved() - before
        self.trim()
        return peak

    def used_bytes(self) -> int:
        """As the driver counts, the context and libraries included."""
        free, total = torch.cuda.mem_get_info()
        return total - free

    def trim(self) -> None:
        """Empty torch's cache of freed blocks."""
        torch.cuda.empty_cache()

    def _host_bytes(self, n: int) -> torch.Tensor:
        # Fresh per step: torch's pinned allocator hands a block out again only after the copies
        # that read it are done, which is the ring of buffers and events one would write here.
        return torch.empty(n, dtype=torch.uint8, pin_memory=True)

    def _moved(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.device, non_blocking=True)


def open_device(name: str) -> Device:
    """The device called cpu or cuda."""
    device = torch.device(name)
    return CudaDevice(device) if device.type == "cuda" else Device(device)
