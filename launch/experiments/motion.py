"""The embedded motion set: what a frame cannot tell and a shift in time can. A few minutes on two CPU cores.

reelscale make-data motion clips && reelscale pack clips shards
reelscale train motion_tsm --data.root shards
"""

from __future__ import annotations

from dataclasses import replace

from data_shards.clips import ClipConfig
from data_shards.loader import LoaderConfig
from dist_train.checkpoint import CheckpointConfig
from dist_train.optimizers import OptimizerConfig
from dist_train.run import TrainingConfig
from dist_train.schedules import ScheduleConfig
from launch.config import DataConfig, Experiment, ModelConfig


def motion_tsm() -> Experiment:
    """TSM ResNet-18 of width 16, 8 segments at 56 pixels.

    No flip: it would swap left and right.
    """
    return Experiment(
        name="motion_tsm",
        data=DataConfig(
            evaluation_split="test",
            clip=ClipConfig(num_segments=8, crop_size=56, short_side=64, multi_scale_crop=False),
            loader=LoaderConfig(num_workers=1),
        ),
        model=ModelConfig(name="tsm_resnet18", width=16, dropout=0.0),
        optimizer=OptimizerConfig(base_learning_rate=0.1, base_batch_clips=32, weight_decay=5e-4),
        schedule=ScheduleConfig(kind="cosine", warmup_epochs=0.5),
        training=TrainingConfig(batch_clips=32, epochs=4, log_every_steps=5, label_smoothing=0.1),
        checkpoint=CheckpointConfig(every_epochs=1),
    )


def motion_tsn() -> Experiment:
    """The same without the shift: it must stay near 50 %."""
    experiment = motion_tsm()
    return replace(experiment, name="motion_tsn", model=replace(experiment.model, name="tsn_resnet18"))
