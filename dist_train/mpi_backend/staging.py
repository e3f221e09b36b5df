"""From the caller's tensors to memory that MPI may use, and back: a copy only where MPI cannot use the tensor."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import torch

from dist_train.mpi_backend.library import MPI

CUDA_SWITCH = "REELSCALE_MPI_CUDA"


@functools.cache
def is_cuda_aware() -> bool:
    """True when this MPI takes pointers to a GPU's memory, by the switch, or by what the library says of itself."""
    if CUDA_SWITCH in os.environ:
        return os.environ[CUDA_SWITCH] == "1"
    if os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1" or os.environ.get("I_MPI_OFFLOAD", "0") != "0":
        return True  # Cray's and Intel's switches
    try:
        return "cuda" in (MPI.INFO_ENV.get("mpi_memory_alloc_kinds") or "")  # MPI 4.1's own answer
    except MPI.Exception:
        return False


class Staging:
    """The memory of one operation.

    The calling thread asks for memory, which is filled from the tensors (on CUDA in the order of the current stream).
    MPI may use it once `ready`. After MPI is done, `deliver` brings results to the caller's tensors.
    """

    def __init__(self, *, through_host: bool = False) -> None:
        self._through_host = through_host
        self._kept: list[torch.Tensor] = []  # MPI knows addresses only
        self._deliveries: list[Callable[[], object]] = []
        self._filled: torch.cuda.Event | None = None
        self._delivered: torch.cuda.Event | None = None
        self._device: torch.device | None = None

    def source(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory with the contents of `tensor`, for MPI to read."""
        if self._is_usable(tensor):
            return self._keep(tensor)
        return self._memory(tensor).copy_(tensor.detach(), non_blocking=True)

    def target(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory of the size of `tensor` for MPI to write; the tensor has it after `deliver`."""
        if self._is_usable(tensor):
            return self._keep(tensor)
        memory = self._memory(tensor)
        self.afterwards(lambda: tensor.copy_(memory, non_blocking=True))
        return memory

    def both(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for MPI to read and write in place."""
        memory = self.target(tensor)
        return memory if memory is tensor else memory.copy_(tensor.detach(), non_blocking=True)

    def sources(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The contents of several tensors, one after the other."""
        return self.source(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))

    def targets(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Memory for several tensors, one after the other."""
        flat = torch.empty(sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device)
        memory = self.target(flat)

        def split() -> None:
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))

        self.afterwards(split)
        return memory

    def afterwards(self, delivery: Callable[[], object]) -> None:
        """Adds something to do to the results, after what was added before."""
        self._deliveries.append(delivery)

    def fill(self) -> None:
        """Called by the caller's thread once all memory is asked for: marks the end of the copies on CUDA."""
        if self._device is not None:
            self._filled = torch.cuda.Event()
            self._filled.record(torch.cuda.current_stream(self._device))

    @property
    def ready(self) -> bool:
        """True when MPI may use the memory."""
        return self._filled is None or self._filled.query()

    def deliver(self) -> None:
        """Brings the results to the caller's tensors; on CUDA only in the order of a stream of this backend's."""
        if self._device is None:
            with torch.inference_mode():  # which may write to tensors of either mode, and never records
                for delivery in self._deliveries:
                    delivery()
            return
        stream = _delivery_stream(self._device)
        with torch.inference_mode(), torch.cuda.stream(stream):
            for tensor in self._kept:
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            for delivery in self._deliveries:
                delivery()
            self._delivered = torch.cuda.Event()
            self._delivered.record(stream)

    def join(self) -> None:
        """Makes the caller's current stream wait for the delivery."""
        if self._delivered is not None:
            torch.cuda.current_stream(self._device).wait_event(self._delivered)

    def _is_usable(self, tensor: torch.Tensor) -> bool:
        if tensor.layout != torch.strided:
            raise ValueError(f"mpi4py carries dense tensors, and this one is {tensor.layout}: use .to_dense()")
        if tensor.is_cuda:
            self._device = tensor.device
            if self._through_host or not is_cuda_aware():
                return False
        return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()

    def _memory(self, tensor: torch.Tensor) -> torch.Tensor:
        self._keep(tensor)
        on_gpu = tensor.is_cuda and is_cuda_aware() and not self._through_host
        device = tensor.device if on_gpu else torch.device("cpu")
        pinned = tensor.is_cuda and not on_gpu
        return self._keep(torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pinned))

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept.append(tensor)
        return tensor


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _delivery_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
