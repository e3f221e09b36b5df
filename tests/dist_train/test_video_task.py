"""The classifier's task: views are averaged to one prediction a sample, mixed clips have mixed targets."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_train.tasks.clip_input import normalize, rgb_differences
from dist_train.tasks.mixing import MixConfig, draw_mixing, mix, partners
from dist_train.tasks.video_classification import VideoClassification
from tests.dist_train.toy import NUM_CLASSES, ToyModel, toy_batch

MIXES = [
    MixConfig(mixup_alpha=0.4),
    MixConfig(cutmix_alpha=1.0),
    MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.7),
]


def batch_of(positions: range) -> Any:
    ids = torch.tensor(positions)
    return toy_batch(ids, ids * 5 % 48)


def task_of(model: nn.Module, **options: Any) -> VideoClassification:
    return VideoClassification(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def toy_task(**options: Any) -> VideoClassification:
    torch.manual_seed(0)
    return task_of(ToyModel().eval(), **options)


class Fixed(nn.Module):
    """Gives the logits that were written into the clips' first pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips[:, 0, 0, 0] * self.scale


def batch_of_logits(logits: torch.Tensor, labels: list[int], weights: list[float] | None = None) -> Any:
    """uint8 'clips' (B*V, 1, 3, 1, K) whose first row of pixels is what `Fixed` returns, once normalised."""
    return SimpleNamespace(
        clips=logits[:, None, None, None, :].expand(-1, 1, 3, 1, -1).to(torch.uint8),
        labels=torch.tensor(labels),
        weights=torch.tensor(weights or [1.0] * len(labels)),
        sample_ids=torch.arange(len(labels)) + 100,
        positions=torch.arange(len(labels)),
    )


# Evaluation


def test_a_samples_views_give_one_prediction_the_mean_of_their_softmaxes():
    values = torch.tensor([[200, 10, 0], [90, 100, 0], [95, 100, 0], [0, 30, 60], [0, 70, 60], [40, 0, 60]])
    batch = batch_of_logits(values, labels=[0, 2])
    sums, found = task_of(Fixed()).evaluation_sums(batch)
    logits = normalize(batch.clips)[:, 0, 0, 0]
    mean = logits.softmax(1).view(2, 3, 3).mean(1)
    assert [row.prediction for row in found] == mean.argmax(1).tolist() == [0, 2]
    assert logits[:3].mean(0).argmax() == 0
    assert logits[1:3].argmax(1).tolist() == [1, 1]  # two of three views say otherwise
    assert [row.sample_id for row in found] == [100, 101]
    assert [row.probability for row in found] == pytest.approx(mean.max(1).values.tolist(), abs=1e-4)
    assert int(sums["num_samples"]) == 2
    assert int(sums["top1"]) == 2
    torch.testing.assert_close(sums["loss"], -mean[[0, 1], [0, 2]].log().sum())


def test_one_view_is_plain_cross_entropy_and_softmax():
    task, batch = toy_task(), batch_of(range(12))
    sums, found = task.evaluation_sums(batch)
    logits = task.phases[0].module(normalize(batch.clips))
    assert torch.equal(sums["loss"], F.cross_entropy(logits, batch.labels, reduction="sum"))
    assert [row.prediction for row in found] == logits.argmax(1).tolist()
    assert int(sums["top1"]) == int((logits.argmax(1) == batch.labels).sum())
    assert int(sums["top5"]) == 12  # of three classes


def test_a_sample_that_was_skipped_counts_nowhere_whatever_its_views():
    values = torch.tensor([[200, 10, 0], [200, 10, 0], [0, 0, 0], [0, 0, 0], [0, 10, 0], [0, 10, 0]])
    sums, found = task_of(Fixed()).evaluation_sums(batch_of_logits(values, [0, 0, 1], [1, 0, 1]))
    assert int(sums["num_samples"]) == int(sums["top1"]) == 2
    assert [row.sample_id for row in found] == [100, 102]


# Differences


def test_differences_are_of_neighbours_within_a_snippet_stacked_as_channels():
    clips = torch.randint(0, 256, (2, 9, 5, 6, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    frames = normalize(clips)
    out = rgb_differences(frames, 2)
    assert out.shape == (2, 3, 6, 5, 6)
    for segment in range(3):
        for step in range(2):
            at = segment * 3 + step
            expected = frames[:, at + 1] - frames[:, at]
            assert torch.equal(out[:, segment, 3 * step : 3 * step + 3], expected)
    assert out.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_a_task_of_differences_gives_its_model_differences():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1 * 3 * 8 * 8, NUM_CLASSES))
    batch = batch_of(range(4))  # two frames a clip, so one difference
    losses = task_of(model, num_differences=1).losses(task_of(model).phases[0], batch)
    logits = model(rgb_differences(normalize(batch.clips), 1))
    assert torch.equal(losses["cross_entropy"], F.cross_entropy(logits, batch.labels, reduction="none").sum() / 4)


def test_a_still_clip_has_no_motion():
    frame = torch.randint(0, 256, (1, 1, 3, 4, 4), dtype=torch.uint8)
    assert rgb_differences(normalize(frame.expand(1, 6, 3, 4, 4)), 5).abs().max() == 0


# Mixing


@pytest.mark.parametrize("config", MIXES)
def test_a_mixed_clip_is_its_share_of_both_and_so_is_its_target(config):
    torch.manual_seed(0)
    clips, positions = torch.randn(64, 2, 3, 16, 20), torch.arange(640, 704)
    mixing = draw_mixing(positions, config, seed=5, height=16, width=20)
    mixed, shares = mix(clips, mixing, torch.ones(64, dtype=torch.bool))
    kinds = set()
    for row in range(64):
        partner, weight, share = row ^ 1, float(mixing.weights[row]), float(shares[row])
        top, bottom, left, right = mixing.boxes[row].tolist()
        expected = weight * clips[row] + (1 - weight) * clips[partner]
        expected[:, :, top:bottom, left:right] = clips[partner, :, :, top:bottom, left:right]
        torch.testing.assert_close(mixed[row], expected)
        area = (bottom - top) * (right - left) / (16 * 20)
        assert share == pytest.approx(weight if weight < 1 else 1 - area)
        assert share == shares[partner]
        kinds.add("cut" if area else "mixed" if weight < 1 else "whole")
    assert ("mixed" in kinds) == (config.mixup_alpha > 0)
    assert ("cut" in kinds) == (config.cutmix_alpha > 0)
    assert "whole" in kinds or config.probability == 1


@pytest.mark.parametrize("config", MIXES)
def test_the_loss_is_that_of_soft_targets(config):
    task, batch = toy_task(mixing=config, seed=3, label_smoothing=0.1), batch_of(range(32, 64))
    (loss,) = task.losses(task.phases[0], batch).values()
    mixing = draw_mixing(batch.positions, config, seed=3, height=8, width=8)
    inputs, shares = mix(normalize(batch.clips), mixing, batch.weights > 0)
    one_hot = F.one_hot(batch.labels, NUM_CLASSES).float()
    targets = shares[:, None] * one_hot + (1 - shares[:, None]) * partners(one_hot)
    logits = task.phases[0].module(inputs)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, label_smoothing=0.1))


@pytest.mark.parametrize("config", MIXES)
def test_any_ranks_and_micro_batches_mix_the_clips_of_one_process(config):
    clips, positions = torch.randn(24, 2, 3, 8, 8), torch.arange(48, 72)
    counted = torch.ones(24, dtype=torch.bool)
    whole, shares = mix(clips, draw_mixing(positions, config, seed=1, height=8, width=8), counted)
    for size in (2, 4, 6, 8, 12):
        parts = [
            mix(part, draw_mixing(at, config, seed=1, height=8, width=8), counted[: len(part)])
            for part, at in zip(clips.split(size), positions.split(size), strict=True)
        ]
        assert torch.equal(torch.cat([mixed for mixed, _ in parts]), whole)
        assert torch.equal(torch.cat([share for _, share in parts]), shares)
    other = draw_mixing(positions, config, seed=2, height=8, width=8)
    assert not torch.equal(mix(clips, other, counted)[0], whole)


def test_the_mean_loss_over_ranks_is_the_loss_of_the_whole_batch():
    config = MixConfig(mixup_alpha=0.4, cutmix_alpha=1.0)
    task = toy_task(mixing=config)
    (whole,) = task.losses(task.phases[0], batch_of(range(8, 32))).values()
    for size in (4, 6, 12):
        parts = [task.losses(task.phases[0], batch_of(range(at, at + size))) for at in range(8, 32, size)]
        torch.testing.assert_close(torch.stack([part["cross_entropy"] for part in parts]).mean(), whole)


def test_neither_a_skipped_clip_nor_its_partner_is_mixed():
    clips, counted = torch.randn(6, 1, 3, 8, 8), torch.tensor([True, False, True, True, False, False])
    mixing = draw_mixing(torch.arange(6), MixConfig(mixup_alpha=1.0), seed=0, height=8, width=8)
    mixed, shares = mix(clips, mixing, counted)
    assert torch.equal(mixed[[0, 1, 4, 5]], clips[[0, 1, 4, 5]])
    assert not torch.equal(mixed[2:4], clips[2:4])
    assert (shares == 1).tolist() == [True, True, False, False, True, True]


def test_weights_are_beta_and_boxes_have_their_area():
    positions = torch.arange(4000)
    weights = draw_mixing(positions, MixConfig(mixup_alpha=0.5), seed=0, height=8, width=8).weights[::2]
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(weights.var()) == pytest.approx(0.125, abs=0.01)  # of Beta(1/2, 1/2)
    mixing = draw_mixing(positions, MixConfig(cutmix_alpha=1.0), seed=0, height=100, width=60)
    top, bottom, left, right = mixing.boxes.unbind(1)
    assert bool(((top >= 0) & (top <= bottom) & (bottom <= 100) & (left >= 0) & (left <= right) & (right <= 60)).all())
    torch.testing.assert_close(mixing.shares, 1 - ((bottom - top) * (right - left) / 6000))
    mostly = draw_mixing(positions, MixConfig(mixup_alpha=1.0, probability=0.25), seed=0, height=8, width=8)
    assert float((mostly.shares < 1).float().mean()) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("positions", [range(3), range(1, 5), (0, 2)])
def test_a_micro_batch_without_whole_pairs_is_refused(positions):
    with pytest.raises(ValueError, match="not made of whole pairs: mixup and CutMix need an even number of clips"):
        draw_mixing(torch.tensor(positions), MIXES[0], seed=0, height=8, width=8)


def test_options_out_of_range_are_all_named():
    with pytest.raises(ValueError, match=r"mix.mixup_alpha is -1.*mix.probability is 2.*label_smoothing is 1"):
        toy_task(mixing=MixConfig(mixup_alpha=-1, probability=2), label_smoothing=1)


def test_mixed_clips_keep_their_memory_layout():
    clips = normalize(torch.randint(0, 256, (4, 2, 8, 8, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3))
    mixed, _ = mix(clips, draw_mixing(torch.arange(4), MIXES[0], seed=0, height=8, width=8), torch.ones(4) > 0)
    assert mixed.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_mixing_reads_no_global_random_numbers():
    task, batch = toy_task(mixing=MIXES[2]), batch_of(range(8))
    (first,) = task.losses(task.phases[0], batch).values()
    torch.manual_seed(77)
    (again,) = task.losses(task.phases[0], replace(batch)).values()
    assert torch.equal(first, again)
