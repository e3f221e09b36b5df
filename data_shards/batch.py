"""What a loader hands out: the clips of one micro-batch on one rank, and what it cost to make them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch

_ALIGNMENT = 4096  # of each tensor of a batch and of the whole: pages, so that a batch can be page-locked by itself


class Lease(Protocol):
    """The memory of a batch, where the loader will use it again."""

    def used_by(self, device: torch.device) -> None:
        """What `device` was just asked to do uses the memory until it is done."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """One micro-batch. B samples of V views (1 in training), T frames, C = 3 channels, H = W = crop size."""

    clips: torch.Tensor
    """uint8 (B*V, T, C, H, W), the views of a sample in a row, stored as BTHWC: `clips.flatten(0, 1)` is a
    channels-last (B*V*T, C, H, W) view, no copy."""
    labels: torch.Tensor
    """int64 (B,), indices into the manifest's classes; the mirror class where `clip.flip_label_pairs` made it so."""
    weights: torch.Tensor
    """float32 (B,): 1, or 0 for a bad sample that was skipped (its clip is zeros)."""
    sample_ids: torch.Tensor
    """int64 (B,), rows of the manifest."""
    positions: torch.Tensor
    """int64 (B,): positions in the endless stream in training, sample ids in evaluation."""
    costs: dict[str, float]
    """What the worker that made the batch spent on it (see `data_shards.worker.BATCH_COST_NAMES`)."""
    skipped: list[str] = field(default_factory=list)
    """Where and why, one line for each bad sample of this batch; always empty with on_bad_sample="raise"."""
    lease: Lease | None = field(default=None, repr=False)
    """Keeps the memory of the tensors, where a worker's slab is lent out."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that a copy to a device moves."""
        tensors = (self.clips, self.labels, self.weights)
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on `device`, clips in the same memory layout; costs are carried along.

        Sample ids and positions stay on the host, where they are read: fetching them would wait for the device.
        `non_blocking` overlaps the copy with computation where the batch is in pinned memory.
        """
        moved = replace(
            self,
            clips=self.clips.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            weights=self.weights.to(device, non_blocking=non_blocking),
            sample_ids=self.sample_ids.clone(),
            positions=self.positions.clone(),
        )
        if self.lease is not None and moved.clips is not self.clips:
            self.lease.used_by(moved.clips.device)
            return replace(moved, lease=None)
        return moved


class BatchArrays(NamedTuple):
    """The tensors of a batch while it is made, clips stored as (B*V, T, H, W, C); otherwise as in `Batch`."""

    clips: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    sample_ids: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """How large a batch is, and where in a piece of memory its tensors lie."""

    num_clips: int
    """Samples of a whole batch."""
    sample_shape: tuple[int, int, int, int, int]
    """Of the pixels of a sample: views, frames, height, width, channels (`ClipConfig.sample_shape`)."""

    @property
    def num_bytes(self) -> int:
        """Of a whole batch with all of its tensors."""
        return sum(_aligned(num_bytes) for num_bytes in self._bytes(self.num_clips))

    def arrays(self, memory: torch.Tensor, num_clips: int) -> BatchArrays:
        """The tensors of a batch of `num_clips`, at most a whole one, in `memory` (uint8, `num_bytes`): views of it."""
        starts, start = [], 0
        for num_bytes in self._bytes(self.num_clips):
            starts.append(start)
            start += _aligned(num_bytes)
        parts = [
            memory[start : start + num_bytes] for start, num_bytes in zip(starts, self._bytes(num_clips), strict=True)
        ]
        return BatchArrays(
            clips=parts[0].view(num_clips * self.sample_shape[0], *self.sample_shape[1:]),
            labels=parts[1].view(torch.int64),
            weights=parts[2].view(torch.float32),
            sample_ids=parts[3].view(torch.int64),
            positions=parts[4].view(torch.int64),
        )

    def _bytes(self, num_clips: int) -> tuple[int, int, int, int, int]:
        """Bytes of each tensor of `BatchArrays`."""
        pixels = math.prod(self.sample_shape)
        return num_clips * pixels, num_clips * 8, num_clips * 4, num_clips * 8, num_clips * 8


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
