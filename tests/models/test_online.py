"""Online inference equals the unidirectional model on the whole clip, and its cache is an explicit, pure value."""

import pytest
import torch
from torch import nn

from models.video import tsm_resnet18, tsm_resnet50, tsm_resnet101
from models.video.online import cache_bytes, forward_frame, initial_cache


def _model(make=tsm_resnet18, **options):
    """A model in whose logits every feature shows: drawn statistics, and a head that is not near zero."""
    torch.manual_seed(0)
    model = make(num_classes=5, direction="unidirectional", **{"width": 16, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.fc.weight)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tsm_resnet18, {}),
        (tsm_resnet18, {"shift_place": "block", "shift_div": 4}),
        (tsm_resnet18, {"stem_stride": 2}),
        (tsm_resnet50, {}),
        (tsm_resnet101, {"width": 8}),
    ],
    ids=["resnet18", "block", "stem2", "resnet50", "resnet101"],
)
@torch.no_grad()
def test_frame_by_frame_equals_the_whole_clip_per_frame_and_averaged(make, options):
    model = _model(make, **options)
    clips = torch.randn(2, 8, 3, 45, 61)

    cache = initial_cache(model, height=45, width=61, batch_size=2)
    frames = []
    for t in range(8):
        logits, cache = forward_frame(model, clips[:, t], cache)
        frames.append(logits)
    online = torch.stack(frames, dim=1)

    scale = online.abs().max()
    torch.testing.assert_close(online / scale, model.segment_logits(clips) / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(online.mean(dim=1) / scale, model(clips) / scale, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_past_counts_and_reaches_the_next_frame_only_through_the_cache():
    model = _model()
    first, second = torch.randn(2, 1, 3, 32, 32)
    empty = initial_cache(model, height=32, width=32)

    _, cache = forward_frame(model, first, empty)
    with_past, _ = forward_frame(model, second, cache)
    without_past, _ = forward_frame(model, second, empty)

    assert (with_past - without_past).abs().max() > 1e-3


@torch.no_grad()
def test_a_cache_is_never_written_to_so_a_stream_can_be_forked():
    model = _model()
    frame = torch.randn(1, 3, 32, 32)
    _, cache = forward_frame(model, frame, initial_cache(model, height=32, width=32))
    before = [part.clone() for part in cache]

    once, _ = forward_frame(model, frame, cache)
    again, _ = forward_frame(model, frame, cache)

    assert torch.equal(once, again)
    assert all(torch.equal(part, kept) for part, kept in zip(cache, before, strict=True))


@torch.no_grad()
def test_cache_holds_memory_of_its_own_and_not_the_features_it_was_cut_from():
    model = _model()
    _, cache = forward_frame(model, torch.randn(1, 3, 32, 32), initial_cache(model, height=32, width=32))

    assert sum(part.untyped_storage().nbytes() for part in cache) == cache_bytes(cache)


def test_cache_of_resnet50_is_702464_values_a_stream_at_224_and_917504_at_256():
    with torch.device("meta"):
        model = tsm_resnet50(direction="unidirectional").eval()

    assert cache_bytes(initial_cache(model, height=224, width=224)) == 4 * 702_464
    assert cache_bytes(initial_cache(model, height=224, width=224, dtype=torch.uint8)) == 702_464
    # The paper's 0.9 MB (arXiv 1811.08383): one byte a value at 256x256.
    assert cache_bytes(initial_cache(model, height=256, width=256, dtype=torch.uint8)) == 917_504
    assert cache_bytes(initial_cache(model, height=224, width=224, batch_size=3)) == 3 * 4 * 702_464


def test_models_that_cannot_run_online_are_refused_with_what_to_do():
    bidirectional = tsm_resnet18(num_classes=5, width=16).eval()
    training = tsm_resnet18(num_classes=5, width=16, direction="unidirectional")

    with pytest.raises(ValueError, match="build and train it with direction='unidirectional'"):
        initial_cache(bidirectional, height=32, width=32)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        initial_cache(training, height=32, width=32)
    with pytest.raises(ValueError, match="height=0"):
        initial_cache(training.eval(), height=0, width=32)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (torch.zeros(3, 32, 32), r"expected a float frame \[B, 3, H, W\], got torch.float32 \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(1, 3, 64, 64), "the cache does not fit frames"),
        (torch.zeros(2, 3, 32, 32), "the cache does not fit frames"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(frame, message):
    model = _model()
    cache = initial_cache(model, height=32, width=32)

    with pytest.raises(ValueError, match=message):
        forward_frame(model, frame, cache)
