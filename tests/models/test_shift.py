"""The fast temporal shift is the plain one: in values, in gradients of any order, and in memory format."""

import pytest
import torch

from models.video.shift import DIRECTIONS, TemporalShift, temporal_shift, temporal_shift_reference

FORMATS = [torch.contiguous_format, torch.channels_last]

CASES = [
    # num_clips, num_segments, channels, height, width, fold_div
    (2, 8, 16, 5, 3, 8),
    (1, 4, 21, 4, 4, 4),
    (3, 1, 8, 2, 2, 2),
    (0, 8, 16, 4, 4, 8),
    (2, 2, 7, 3, 3, 8),
]


def _frames(case, memory_format, seed=0):
    num_clips, num_segments, channels, height, width, _ = case
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_clips * num_segments, channels, height, width, generator=generator)
    return frames.contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_shift_equals_the_reference_forward_and_backward(case, direction, memory_format):
    x = _frames(case, memory_format).requires_grad_()
    grad = _frames(case, memory_format, seed=1)
    options = {"fold_div": case[-1], "direction": direction}

    fast = temporal_shift(x, case[1], **options)
    reference = temporal_shift_reference(x, case[1], **options)
    (fast_grad,) = torch.autograd.grad(fast, x, grad)
    (reference_grad,) = torch.autograd.grad(reference, x, grad)

    assert torch.equal(fast, reference)
    assert torch.equal(fast_grad, reference_grad)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_shift_keeps_the_memory_format_of_its_input_and_of_its_gradient(direction, memory_format):
    x = _frames(CASES[0], memory_format).requires_grad_()

    shifted = temporal_shift(x, 8, direction=direction)
    (grad,) = torch.autograd.grad(shifted, x, _frames(CASES[0], memory_format, seed=1))

    assert shifted.is_contiguous(memory_format=memory_format)
    assert grad.is_contiguous(memory_format=memory_format)


def test_bidirectional_shift_takes_the_first_fold_from_the_next_frame_and_the_second_from_the_previous():
    frames = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])

    shifted = temporal_shift(frames, 3, fold_div=4)

    assert shifted.tolist() == [[20, 0, 12, 13], [30, 11, 22, 23], [0, 21, 32, 33]]


def test_unidirectional_shift_takes_the_first_fold_from_the_previous_frame_only():
    frames = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])

    shifted = temporal_shift(frames, 3, fold_div=4, direction="unidirectional")

    assert shifted.tolist() == [[0, 11, 12, 13], [10, 21, 22, 23], [20, 31, 32, 33]]


def test_shift_never_mixes_clips_of_a_batch():
    frames = torch.ones(8, 8)
    frames[:4] = 100

    for direction in DIRECTIONS:
        shifted = temporal_shift(frames, 4, fold_div=2, direction=direction)
        assert set(shifted[:4].unique().tolist()) == {0, 100}
        assert set(shifted[4:].unique().tolist()) == {0, 1}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shift_is_differentiable_twice(direction):
    x = torch.randn(6, 5, 2, dtype=torch.float64, requires_grad=True)

    def squared(x):
        # The square makes the second derivative depend on x, so that a wrong one shows.
        return temporal_shift(x, 3, fold_div=2, direction=direction) ** 2

    assert torch.autograd.gradcheck(squared, (x,))
    assert torch.autograd.gradgradcheck(squared, (x,))


def test_shift_saves_no_tensor_for_backward_and_leaves_its_input_alone():
    x = _frames(CASES[0], torch.channels_last).requires_grad_()
    before = x.detach().clone()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda _: None):
        shifted = temporal_shift(x, 8)

    assert saved == []
    assert torch.equal(x, before)
    assert shifted.data_ptr() != x.data_ptr()


def test_shift_keeps_bfloat16():
    x = _frames(CASES[0], torch.channels_last).bfloat16()

    assert torch.equal(temporal_shift(x, 8), temporal_shift_reference(x, 8))
    assert temporal_shift(x, 8).dtype == torch.bfloat16


def test_shift_module_has_no_state():
    assert TemporalShift(8).state_dict() == {}


@pytest.mark.parametrize(
    ("frames", "num_segments", "options", "message"),
    [
        (10, 4, {}, "10 frames do not divide into clips of num_segments=4"),
        (8, 0, {}, "num_segments=0"),
        (8, 4, {"fold_div": 1}, "fold_div=1: a bidirectional shift needs at least 2"),
        (8, 4, {"direction": "sideways"}, "direction='sideways': choose one of bidirectional, unidirectional"),
    ],
)
def test_shift_refuses_what_it_cannot_mean(frames, num_segments, options, message):
    with pytest.raises(ValueError, match=message):
        temporal_shift(torch.zeros(frames, 8), num_segments, **options)
