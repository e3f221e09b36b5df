"""Kinetics-400 with the TSM repository's published recipe (mit-han-lab/temporal-shift-module, README and scripts).

8 uniform segments, 224 pixels, 50 epochs, SGD 0.02 at batch 128 (linear in the batch), steps at 20 and 40, weight
decay 1e-4, dropout 0.5, gradient norm 20, from ImageNet weights (`--model.weights resnet50.pth`). It reports 71.2 %
top-1 (TSM, 1 clip x 1 crop) and 68.8 % (TSN). Differences: no weight decay on norm and bias, one learning rate for
all layers, a warm-up of 5 epochs as MMAction2 uses for the same model (the repository has none; large batches need
one).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_shards.clips import ClipConfig
from data_shards.loader import LoaderConfig
from dist_train.loop import TrainingConfig
from dist_train.optimizers import SGDConfig
from dist_train.schedules import ScheduleConfig
from launch.config import DataConfig, Experiment, ModelConfig


def kinetics_tsm() -> Experiment:
    """TSM ResNet-50, 8 frames at 224 pixels, published recipe."""
    return Experiment(
        name="kinetics_tsm",
        data=DataConfig(
            root=Path("kinetics400"),
            clip=ClipConfig(num_segments=8, crop_size=224, short_side=256, horizontal_flip=True),
            loader=LoaderConfig(num_workers=8, on_bad_sample="skip"),
        ),
        model=ModelConfig(name="tsm_resnet50", dropout=0.5),
        optimizer=SGDConfig(base_learning_rate=0.02, base_batch_clips=128, weight_decay=1e-4, nesterov=False),
        schedule=ScheduleConfig(kind="step", milestones_epochs=(20.0, 40.0), warmup_epochs=5),
        training=TrainingConfig(batch_clips=128, epochs=50, clip_gradient_norm=20.0, log_every_steps=20),
    )


def kinetics_tsn() -> Experiment:
    """TSN ResNet-50, the same recipe."""
    experiment = kinetics_tsm()
    return replace(experiment, name="kinetics_tsn", model=replace(experiment.model, name="tsn_resnet50"))
