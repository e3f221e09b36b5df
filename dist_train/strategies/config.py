"""How gradients are exchanged, as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StrategyName = Literal["allreduce", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How the ranks come to the same gradient."""

    strategy: StrategyName = "allreduce"
    """`allreduce` (Horovod-style, overlapped), `ddp` (PyTorch's wrapper), `fsdp2` or DeepSpeed's `zero1`, `zero2` and
    `zero3` (state sharded over the ranks)."""
    bucket_megabytes: float = 25.0
    """Gradients are exchanged in buckets of about this size (10^6 bytes)."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        if self.bucket_megabytes <= 0:
            found.append(f"exchange.bucket_megabytes is {self.bucket_megabytes}: use a positive number (25 is usual)")
        return found

    @property
    def bucket_bytes(self) -> int:
        """`bucket_megabytes` in bytes."""
        return int(self.bucket_megabytes * 1e6)
