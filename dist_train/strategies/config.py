"""How gradients are exchanged, as configuration."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Literal

StrategyName = Literal["allreduce", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
Compression = Literal["none", "fp16", "bf16", "powersgd"]
Reduction = Literal["average", "sum", "adasum"]

USUAL_BUCKET_MEGABYTES = 25.0


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """How the ranks come to the same gradient."""

    strategy: StrategyName = "allreduce"
    """`allreduce` (Horovod-style, overlapped), `ddp` (PyTorch's wrapper), `fsdp2` or DeepSpeed's `zero1`, `zero2` and
    `zero3` (state sharded over the ranks)."""
    bucket_megabytes: float | Literal["auto"] = USUAL_BUCKET_MEGABYTES
    """Gradients are exchanged in buckets of at most this size (10^6 bytes), but four or more where that leaves 1 MB in
    each; `auto` measures some sizes in the first steps."""
    compression: Compression = "none"
    """What travels: gradients as they are, rounded to 16 bits, or PowerSGD's low-rank factors (with error feedback)."""
    powersgd_rank: int = 4
    """Rank of PowerSGD's factors."""
    reduction: Reduction = "average"
    """The mean of the ranks' gradients, their sum, or Adasum (a sum where they differ, a mean where they agree)."""
    hierarchical: Literal["off", "on", "auto"] = "off"
    """Reduce within each node first, then across nodes, in fewer rounds; `auto`: where it can help."""
    average_every_steps: int = 1
    """Post-local SGD: exchange no gradients and average the parameters every so many steps; 1: do not."""
    local_after_epochs: float = 0.0
    """Post-local SGD begins after so many epochs; until then gradients are exchanged."""
    timeout_seconds: float = 600.0
    """A rank that the others wait for longer ends the job, with what it was doing; a warning comes before."""

    def problems(self) -> list[str]:
        """What is wrong with these values, one line each."""
        found = []
        size = self.bucket_megabytes
        if size != "auto" and not (isinstance(size, (int, float)) and 0 < size < math.inf):
            found.append(f"exchange.bucket_megabytes is {size}: use a positive number (25 is usual) or auto")
        if self.powersgd_rank < 1:
            found.append(f"exchange.powersgd_rank is {self.powersgd_rank}: use 1 or more (1 to 4 are usual)")
        if self.average_every_steps < 1:
            found.append(f"exchange.average_every_steps is {self.average_every_steps}: use 1 (no local SGD) or more")
        if not 0 <= self.local_after_epochs < math.inf:
            found.append(f"exchange.local_after_epochs is {self.local_after_epochs}: use 0 or more")
        if not 0 < self.timeout_seconds < math.inf:
            found.append(f"exchange.timeout_seconds is {self.timeout_seconds}: use a positive number of seconds")
        if self.strategy in ("zero1", "zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
            found.append(
                f"exchange.strategy is {self.strategy!r}, which needs DeepSpeed: pip install 'reelscale[deepspeed]'"
            )
        return found + self._combinations()

    def _combinations(self) -> list[str]:
        """Values that are right alone and wrong together."""
        found = []
        only_allreduce = {
            "bucket_megabytes": ("auto", self.bucket_megabytes == "auto"),
            "compression": (self.compression, self.compression != "none"),
            "reduction": (self.reduction, self.reduction != "average"),
            "hierarchical": (self.hierarchical, self.hierarchical != "off"),
        }
        for name, (value, is_set) in only_allreduce.items():
            if is_set and self.strategy != "allreduce":
                found.append(f"exchange.{name} {value} needs exchange.strategy allreduce, not {self.strategy}")
        if self.strategy == "fsdp2" and self.bucket_megabytes not in ("auto", USUAL_BUCKET_MEGABYTES):
            found.append(
                f"exchange.bucket_megabytes is {self.bucket_megabytes}, but fsdp2 has no buckets: it sends a repeated "
                "block of the model at a time; leave it out"
            )
        if self.compression != "powersgd" and self.powersgd_rank not in (0, ExchangeConfig.powersgd_rank):
            found.append(
                f"exchange.powersgd_rank is {self.powersgd_rank} but exchange.compression is {self.compression}: use "
                "powersgd"
            )
        if self.average_every_steps > 1 and self.strategy not in ("allreduce", "ddp"):
            found.append(
                f"exchange.average_every_steps is {self.average_every_steps}: local SGD needs a whole model on each "
                f"rank, so exchange.strategy allreduce or ddp, not {self.strategy}"
            )
        if self.average_every_steps == 1 and self.local_after_epochs > 0:
            found.append(
                f"exchange.local_after_epochs is {self.local_after_epochs} but exchange.average_every_steps is 1: "
                "say how many steps the ranks go alone"
            )
        if self.reduction == "adasum" and self.compression != "none":
            found.append(
                f"exchange.reduction adasum does not combine with exchange.compression {self.compression}: its dot "
                "products would be those of rounded gradients; use one of the two"
            )
        if self.reduction == "adasum" and self.hierarchical == "on":
            found.append("exchange.reduction adasum has a tree of its own: use exchange.hierarchical off")
        if self.compression == "powersgd" and self.hierarchical == "on":
            found.append("exchange.compression powersgd sends too little to gain from exchange.hierarchical: use off")
        return found

    @property
    def bucket_bytes(self) -> int:
        """`bucket_megabytes` in bytes; the usual size where it is to be measured."""
        megabytes = USUAL_BUCKET_MEGABYTES if self.bucket_megabytes == "auto" else self.bucket_megabytes
        return int(megabytes * 1e6)
