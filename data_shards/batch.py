"""What a loader hands out: the clips of one micro-batch on one rank, and what it cost to make them."""

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """One micro-batch. B clips, T frames, C = 3 channels, H = W = crop size."""

    clips: torch.Tensor
    """uint8 (B, T, C, H, W), stored as BTHWC: `clips.flatten(0, 1)` is a channels-last (B*T, C, H, W) view, no copy."""
    labels: torch.Tensor
    """int64 (B,), indices into the manifest's classes."""
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

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: what a copy to a device moves."""
        tensors = (self.clips, self.labels, self.weights, self.sample_ids, self.positions)
        return sum(tensor.nbytes for tensor in tensors)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on `device`, clips in the same memory layout; costs are carried along.

        `non_blocking` overlaps the copy with computation where the batch is in pinned memory.
        """
        return replace(
            self,
            clips=self.clips.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            weights=self.weights.to(device, non_blocking=non_blocking),
            sample_ids=self.sample_ids.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
        )
