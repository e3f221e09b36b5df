"""Online inference: a unidirectional TSM frame by frame, with an explicit cache instead of hidden state.

Lin, Gan, Han 2019 (arXiv 1811.08383), section 4.3: each shifted block keeps the first 1 / shift_div of the
channels of its last input, and uses them in the next frame in place of its own. Frame t of a stream gives
exactly the logits of segment t of the whole clip; the clip's logits are the mean over its frames.

    model = tsm_resnet50(direction="unidirectional").eval()
    cache = initial_cache(model, height=224, width=224)
    for frame_BCHW in stream:
        logits_BK, cache = forward_frame(model, frame_BCHW, cache)

The functions are pure: a cache is never written to, so a stream can be forked, replayed, or batched with
others along B. A ResNet-50 with shift_div 8 caches 702,464 values per stream at 224x224 (2.81 MB in
float32) and 917,504 at 256x256; the paper states 0.9 MB, which these counts meet with one byte a value at
256x256.
"""

import torch
from torch import Tensor

from models.video.shift import TemporalShift
from models.video.tsm import TSM

Cache = tuple[Tensor, ...]
"""One tensor `[B, fold, h, w]` per shifted block, in the order of computation."""


def _check_model(model: TSM) -> None:
    if model.direction != "unidirectional":
        raise ValueError(
            f"online inference needs a unidirectional model, this one is {model.direction}: "
            "build and train it with direction='unidirectional' (a bidirectional one sees the future)"
        )
    if model.training:
        raise ValueError("online inference needs the model in evaluation mode: call model.eval() first")


def initial_cache(
    model: TSM,
    *,
    height: int,
    width: int,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Cache:
    """The cache before the first frame: zeros, as the shift pads the start of a clip.

    Args:
        model: a unidirectional TSM in evaluation mode.
        height, width: of the frames, in pixels.
        batch_size: number of streams that run side by side (B).
        device, dtype: of the features; those of the model's weights by default. Under autocast give its
            dtype.

    Raises:
        ValueError: if the model is bidirectional or in training mode, or a size is below 1.
    """
    _check_model(model)
    for name, value in (("height", height), ("width", width), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    weight = model.conv1.weight
    shapes = _cache_shapes(model, batch_size, height, width)
    return tuple(torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype) for shape in shapes)


def _cache_shapes(model: TSM, batch_size: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Every layer that strides does so by 2 with padding, so each halves the size and rounds up."""
    stride: int = model.stem_stride
    channels = model.conv1.out_channels
    shapes = []
    for block in model.blocks():
        if isinstance(block.shift, TemporalShift):
            fold = channels // block.shift.fold_div
            shapes.append((batch_size, fold, -(-height // stride), -(-width // stride)))
        stride *= block.stride
        channels = block.last_norm.num_features
    return shapes


def cache_bytes(cache: Cache) -> int:
    """Memory that a cache holds, in bytes."""
    return sum(part.numel() * part.element_size() for part in cache)


def forward_frame(model: TSM, frame_BCHW: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """One step of a stream.

    Args:
        model: a unidirectional TSM in evaluation mode.
        frame_BCHW: the next frame of each stream, float and normalized as in training.
        cache: what the last call returned, or `initial_cache` at the start of a stream.

    Returns:
        Logits `[B, num_classes]` of this frame, and the cache for the next one.

    Raises:
        ValueError: if the model cannot run online, or the frame or the cache does not fit it.
    """
    _check_model(model)
    channels = model.conv1.in_channels
    if frame_BCHW.ndim != 4 or frame_BCHW.shape[1] != channels or not frame_BCHW.is_floating_point():
        raise ValueError(
            f"expected a float frame [B, {channels}, H, W], got {frame_BCHW.dtype} {tuple(frame_BCHW.shape)}"
        )
    expected = _cache_shapes(model, frame_BCHW.shape[0], frame_BCHW.shape[2], frame_BCHW.shape[3])
    if [tuple(part.shape) for part in cache] != expected:
        raise ValueError(
            f"the cache does not fit frames {tuple(frame_BCHW.shape)} of this model: start the stream with "
            "initial_cache(model, height=..., width=..., batch_size=...)"
        )
    previous = iter(cache)
    kept: list[Tensor] = []
    x = model.stem(frame_BCHW)
    for block in model.blocks():
        if isinstance(block.shift, TemporalShift):
            fold = x.shape[1] // block.shift.fold_div
            shifted = torch.cat((next(previous), x[:, fold:]), dim=1)
            # A copy, not a view: a view would keep the block's whole input alive until the next frame.
            kept.append(x[:, :fold].clone())
            x = block.join(x, shifted)
        else:
            x = block(x)
    return model.head(x), tuple(kept)
