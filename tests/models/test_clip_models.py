"""TSN and TSM: published counts, what time does and does not do, memory format, and refusals."""

import pytest
import torch
from torch import nn

from models.video import TSM, TSN, tsm_resnet18, tsm_resnet50, tsm_resnet101, tsn_resnet18, tsn_resnet50
from models.video.resnet import resnet50
from models.video.shift import TemporalShift
from models.video.tsn import frames_of

SMALL = {"num_classes": 5, "width": 16, "dropout": 0.0}


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def _clips(num_clips=2, num_segments=8, size=32, seed=0):
    """Clips as the loader makes them: shape B T C H W, storage B T H W C."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(num_clips, num_segments, size, size, 3, generator=generator)
    return stored.permute(0, 1, 4, 2, 3)


def _noticeable_head(model):
    """The published head starts near zero; draw one in which differences of features show in the logits."""
    with torch.no_grad():
        nn.init.normal_(model.fc.weight, generator=torch.Generator().manual_seed(9))
    return model.eval()


@pytest.mark.parametrize(
    ("make", "options", "shape", "num_parameters", "giga_multiply_adds"),
    [
        (tsm_resnet50, {}, (8, 3, 224, 224), 24_327_632, 32.70),
        (tsn_resnet50, {}, (8, 3, 224, 224), 24_327_632, 32.70),
        (tsm_resnet50, {}, (8, 3, 256, 256), 24_327_632, 42.71),
        (tsm_resnet50, {"num_segments": 16}, (16, 3, 224, 224), 24_327_632, 65.41),
        (tsn_resnet50, {}, (25, 3, 224, 224), 24_327_632, 102.2),
        (tsm_resnet101, {}, (8, 3, 224, 224), 43_319_760, 62.40),
        (tsm_resnet50, {"in_channels": 10}, (8, 10, 224, 224), 24_349_584, 34.91),
        (tsm_resnet50, {"num_classes": 174}, (8, 3, 224, 224), 23_864_558, 32.70),
    ],
)
def test_counts_are_the_published_ones(multiply_adds, make, options, shape, num_parameters, giga_multiply_adds):
    with torch.device("meta"):
        model = make(**{"num_classes": 400, **options})

    assert _count(model) == num_parameters
    digits = 1 if giga_multiply_adds > 100 else 2
    assert round(multiply_adds(model, 1, *shape) / 1e9, digits) == giga_multiply_adds


def test_state_dict_keys_are_exactly_those_of_the_image_network():
    with torch.device("meta"):
        keys = [list(make(num_classes=7).state_dict()) for make in (resnet50, tsn_resnet50, tsm_resnet50)]

    assert keys[0] == keys[1] == keys[2]


def test_weights_of_a_tsn_load_into_a_tsm():
    tsn = tsn_resnet18(**SMALL)
    tsm = tsm_resnet18(**SMALL)

    tsm.load_state_dict(tsn.state_dict(), strict=True)

    assert torch.equal(tsm.layer3[1].conv2.weight, tsn.layer3[1].conv2.weight)


def test_head_is_drawn_as_in_the_tsm_repository():
    model = tsm_resnet18(num_classes=400)

    assert model.fc.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert model.fc.bias.abs().max() == 0
    assert model.dropout.p == 0.5


@pytest.mark.parametrize("make", [tsn_resnet18, tsm_resnet18])
def test_logits_of_a_clip_are_the_mean_over_its_segments(make):
    model = _noticeable_head(make(**SMALL))
    clips = _clips(num_clips=3)

    segments = model.segment_logits(clips)

    assert segments.shape == (3, 8, 5)
    assert torch.equal(model(clips), segments.mean(dim=1))


def test_tsn_cannot_tell_the_order_of_frames_and_tsm_can():
    clips = _clips()
    reversed_clips = clips.flip(1)
    tsn = _noticeable_head(tsn_resnet18(**SMALL))
    tsm = _noticeable_head(tsm_resnet18(**SMALL))

    torch.testing.assert_close(tsn(clips), tsn(reversed_clips))
    assert (tsm(clips) - tsm(reversed_clips)).abs().max() > 1e-3


def test_clips_of_a_batch_do_not_influence_each_other():
    model = _noticeable_head(tsm_resnet18(**SMALL))
    clips = _clips(num_clips=3)

    torch.testing.assert_close(model(clips)[1:2], model(clips[1:2]))


def test_unidirectional_model_sees_only_the_past_and_bidirectional_one_the_future_too():
    clips = _clips(num_clips=1)
    changed = clips.clone()
    changed[:, 5] += 1
    for direction, first_changed in (("unidirectional", 5), ("bidirectional", 0)):
        model = _noticeable_head(tsm_resnet18(direction=direction, **SMALL))
        difference = (model.segment_logits(clips) - model.segment_logits(changed)).abs().amax(dim=(0, 2))
        assert next(segment for segment in range(8) if difference[segment] > 0) == first_changed


def test_residual_shift_leaves_the_shortcut_alone_and_block_shift_does_not():
    clips = torch.rand(8, 16, 4, 4)
    shortcut = {}
    for place in ("blockres", "block"):
        block = tsm_resnet18(shift_place=place, zero_init_residual=True, **SMALL).eval().layer1[0]
        shortcut[place] = block(clips)  # the branch adds zero, so what is left is the shortcut

    assert torch.equal(shortcut["blockres"], clips)
    assert torch.equal(shortcut["block"], TemporalShift(8)(clips))


def test_every_block_shifts_but_in_resnet101_every_second_one_of_each_stage():
    def shifted(model):
        return [[isinstance(block.shift, TemporalShift) for block in stage] for stage in model.stages()]

    with torch.device("meta"):
        assert shifted(tsm_resnet50()) == [[True] * 3, [True] * 4, [True] * 6, [True] * 3]
        assert shifted(tsm_resnet101()) == [[i % 2 == 0 for i in range(n)] for n in (3, 4, 23, 3)]
        assert shifted(tsm_resnet101(shift_place="block")) == [[True] * n for n in (3, 4, 23, 3)]


@pytest.mark.parametrize("make", [tsm_resnet18, tsm_resnet50])
@pytest.mark.parametrize("stem_stride", [4, 2])
def test_channels_last_clips_stay_channels_last_through_every_layer_and_its_gradient(make, stem_stride):
    model = make(stem_stride=stem_stride, **SMALL).to(memory_format=torch.channels_last)
    seen = []

    def record(module, inputs, output):
        for tensor in (inputs[0], output):
            if tensor.ndim == 4:
                seen.append((module, tensor.is_contiguous(memory_format=torch.channels_last)))
        # Not the activations: the gradient of the average pooling enters the last one contiguous, once and small.
        if isinstance(module, TemporalShift | nn.Conv2d | nn.BatchNorm2d):
            output.register_hook(
                lambda grad: seen.append((module, grad.is_contiguous(memory_format=torch.channels_last)))
            )

    for module in model.modules():
        if not isinstance(module, nn.Sequential):
            module.register_forward_hook(record)
    model(_clips(size=64)).sum().backward()

    assert any(isinstance(module, TemporalShift) for module, _ in seen)
    assert [module for module, kept in seen if not kept] == []


def test_flattening_loader_clips_is_a_view():
    clips = _clips()

    frames = frames_of(clips)

    assert frames.data_ptr() == clips.data_ptr()
    assert frames.shape == (16, 3, 32, 32)
    assert frames.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(frames[11], clips[1, 3])


def test_flattening_a_slice_of_loader_clips_keeps_channels_last():
    clips = _clips()[:, :5]  # no view of it has the frames in one dimension

    frames = frames_of(clips)

    assert frames.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(frames[6], clips[1, 1])


def test_memory_format_does_not_change_the_answer():
    model = _noticeable_head(tsm_resnet18(**SMALL))
    clips = _clips()
    with torch.no_grad():
        contiguous = model(clips.contiguous())
        channels_last = model.to(memory_format=torch.channels_last)(clips)

    torch.testing.assert_close(channels_last, contiguous, rtol=1e-4, atol=1e-4)


def test_a_batch_without_clips_gives_logits_without_rows():
    model = tsm_resnet18(**SMALL).eval()

    assert model(_clips(num_clips=0)).shape == (0, 5)


def test_tsm_learns_the_direction_of_a_motion_that_a_tsn_cannot_see():
    def accuracy_after_training(make):
        torch.manual_seed(0)
        model = make(num_classes=2, num_segments=4, width=8, stem_stride=1, dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(60):
            clips, labels = _moving_dots(16, seed=step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(clips), labels).backward()
            optimizer.step()
        model.eval()
        clips, labels = _moving_dots(64, seed=1000)
        with torch.no_grad():
            return (model(clips).argmax(1) == labels).float().mean().item()

    assert accuracy_after_training(tsm_resnet18) > 0.9
    assert accuracy_after_training(tsn_resnet18) < 0.75


def _moving_dots(num_clips, seed):
    """A bright square that moves 2 pixels a frame to the right (label 0) or to the left (label 1), 4x16x16."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_clips) % 2
    clips = 0.1 * torch.randn(num_clips, 4, 3, 16, 16, generator=generator)
    for clip, label in zip(clips, labels.tolist(), strict=True):
        row, start = torch.randint(0, 12, (2,), generator=generator).tolist()
        for t in range(4):
            # The columns wrap around, so the set of positions says nothing about the direction.
            columns = [(start + (2 * t if label == 0 else 6 - 2 * t) + dx) % 16 for dx in range(3)]
            clip[t, :, row : row + 3, columns] += 2
    return clips, labels


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(2, 3, 32, 32), r"expected clips \[B, T, 3, H, W\], got the shape \(2, 3, 32, 32\)"),
        (torch.zeros(2, 8, 32, 32, 3), r"expected clips \[B, T, 3, H, W\]"),
        (torch.zeros(2, 16, 3, 32, 32), "clips have 16 frames, but the model was built with num_segments=8"),
        (torch.zeros(2, 8, 3, 32, 32, dtype=torch.uint8), "clips are torch.uint8; convert to float"),
    ],
)
def test_clips_of_another_shape_or_type_are_refused(clips, message):
    with pytest.raises(ValueError, match=message):
        tsm_resnet18(**SMALL)(clips)


def test_tsn_without_num_segments_takes_clips_of_any_length():
    model = tsn_resnet18(**SMALL).eval()

    assert model(_clips(num_segments=5)).shape == model(_clips(num_segments=8)).shape == (2, 5)
    with pytest.raises(ValueError, match="clips have 8 frames"):
        tsn_resnet18(num_segments=5, **SMALL)(_clips(num_segments=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_segments": 0}, "num_segments=0"),
        ({"shift_div": 1}, "fold_div=1|shift_div=1"),
        ({"shift_place": "nowhere"}, "shift_place='nowhere': choose blockres or block"),
        ({"direction": "backward"}, "direction='backward'"),
        ({"width": 4}, "shift_div=8 shifts none of the 4 channels"),
    ],
)
def test_tsm_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TSM(18, **{**SMALL, **options})
    with pytest.raises(ValueError, match="num_segments=0"):
        TSN(18, num_segments=0, **SMALL)
