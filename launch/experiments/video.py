"""Your own videos: ResNet-18 networks at 112 pixels, sized for one GPU or a patient laptop.

reelscale pack my_videos shards && reelscale train video_tsm --data.root shards
"""

from __future__ import annotations

from dataclasses import replace

from data_shards.clips import ClipConfig
from dist_train.optimizers import OptimizerConfig
from dist_train.run import TrainingConfig
from dist_train.schedules import ScheduleConfig
from launch.config import DataConfig, Experiment, ModelConfig


def video_tsm() -> Experiment:
    """TSM ResNet-18, 8 segments at 112 pixels, for your own videos.

    Flip them with `--data.clip.horizontal-flip` unless their classes know left from right.
    """
    return Experiment(
        name="video_tsm",
        data=DataConfig(clip=ClipConfig(num_segments=8, crop_size=112, short_side=128)),
        model=ModelConfig(name="tsm_resnet18", dropout=0.5),
        optimizer=OptimizerConfig(base_learning_rate=0.05, base_batch_clips=64, weight_decay=5e-4),
        schedule=ScheduleConfig(kind="cosine", warmup_epochs=2),
        training=TrainingConfig(batch_clips=32, epochs=30, label_smoothing=0.1, clip_gradient_norm=20.0),
    )


def video_tsn() -> Experiment:
    """The same without the shift: what single frames can tell."""
    experiment = video_tsm()
    return replace(experiment, name="video_tsn", model=replace(experiment.model, name="tsn_resnet18"))
