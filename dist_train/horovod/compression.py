"""What travels in an all-reduce instead of a gradient: `Compression.none`, `.fp16` and `.bf16`."""

from __future__ import annotations

from typing import Any

import torch


class Compressor:
    """A pair of static methods; any class that has them may be passed as `compression`."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """What is sent for `tensor`, and what `decompress` needs to know."""
        raise NotImplementedError

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The tensor for what was received."""
        raise NotImplementedError


class NoneCompressor(Compressor):
    """Sends tensors as they are."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: None) -> torch.Tensor:  # noqa: ARG004
        """The tensor itself."""
        return tensor


class _CastCompressor(Compressor):
    """Sends floating-point tensors in `wire_dtype`, others as they are."""

    wire_dtype: torch.dtype

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        """The tensor in `wire_dtype`, and the dtype it had."""
        return (tensor.to(cls.wire_dtype) if tensor.is_floating_point() else tensor), tensor.dtype

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype) -> torch.Tensor:
        """The tensor in the dtype it had."""
        return tensor.to(ctx)


class FP16Compressor(_CastCompressor):
    """Half the bytes of float32; sums beyond 65504 overflow to infinity (`gradient_predivide_factor` helps)."""

    wire_dtype = torch.float16


class BF16Compressor(_CastCompressor):
    """Half the bytes of float32 with its range, at 8 bits of precision. Horovod 0.28 has no such compressor."""

    wire_dtype = torch.bfloat16


class Compression:
    """The compressors by name."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
