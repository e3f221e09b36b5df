"""Kinetics-400, one experiment for each published recipe. 8 frames at 224 pixels, ResNet-50, from ImageNet weights
(`--model.weights resnet50.pth`). All but the TSM repository's take their learning rate from another model or data set:
each docstring says what is sourced and what is assumed.
"""

from __future__ import annotations

from dataclasses import replace

from data_shards.clips import ClipConfig
from data_shards.loader import LoaderConfig
from dist_train.optimizers import OptimizerConfig
from dist_train.run import TrainingConfig
from dist_train.schedules import ScheduleConfig
from launch.config import DataConfig, Experiment, ModelConfig

_DENSE = ClipConfig(
    num_segments=8, sampling="dense", dense_window_frames=64, crop_size=224, short_side=256, horizontal_flip=True
)


def kinetics_tsm() -> Experiment:
    """TSM with its repository's recipe (mit-han-lab/temporal-shift-module, README, opts.py, main.py): 71.2 % top-1.

    8 uniform segments, 50 epochs, SGD 0.02 at batch 128 and linear in it, divided by 10 at 20 and 40, weight decay 1e-4
    but not on norm and bias, biases at 2x and the classifier at 5x the rate, dropout 0.5, gradient norm 20, no warm-up.
    Assumed: nothing; a batch above 256 will need `--schedule.warmup-epochs 5` (MMAction2's for the same model).
    """
    return Experiment(
        name="kinetics_tsm",
        data=DataConfig(
            root="kinetics400",
            clip=ClipConfig(num_segments=8, crop_size=224, short_side=256, horizontal_flip=True),
            loader=LoaderConfig(num_workers="auto", on_bad_sample="skip"),
        ),
        model=ModelConfig(name="tsm_resnet50", dropout=0.5),
        optimizer=OptimizerConfig(
            base_learning_rate=0.02,
            base_batch_clips=128,
            weight_decay=1e-4,
            nesterov=False,
            bias_learning_rate_factor=2.0,
            head_learning_rate_factor=5.0,
        ),
        schedule=ScheduleConfig(kind="step", milestones_epochs=(20.0, 40.0), warmup_epochs=0),
        training=TrainingConfig(batch_clips=128, epochs=50, clip_gradient_norm=20.0, log_every_steps=20),
    )


def kinetics_tsn() -> Experiment:
    """TSN with the same recipe; the repository reports 68.8 % (it trains TSN on 5 segments and tests on 8)."""
    experiment = kinetics_tsm()
    return replace(experiment, name="kinetics_tsn", model=replace(experiment.model, name="tsn_resnet50"))


def kinetics_nonlocal() -> Experiment:
    """TSM with Non-local's recipe, as the TSM repository says of its dense 74.1 % model.

    From facebookresearch/video-nonlocal-net, configs/DBG_kinetics_resnet_8gpu_c2d_nonlocal_400k.yaml: SGD 0.01 at
    batch 64 (8 GPUs x 8 clips), Nesterov, weight decay 1e-4 and none on norm, divided by 10 at 150k and 300k of 400k
    iterations (40 and 80 of 106.7 epochs), zero-gamma, precise batch norm, dropout 0.5, no warm-up. Assumed: precise
    statistics of 200 batches, and 8 frames from a window of 64, the TSM repository's dense sampling.
    """
    experiment = kinetics_tsm()
    return replace(
        experiment,
        name="kinetics_nonlocal",
        data=replace(experiment.data, clip=_DENSE),
        model=replace(experiment.model, zero_init_residual=True),
        optimizer=OptimizerConfig(base_learning_rate=0.01, base_batch_clips=64, weight_decay=1e-4, nesterov=True),
        schedule=ScheduleConfig(kind="step", milestones_epochs=(40.0, 80.0), warmup_epochs=0),
        training=TrainingConfig(batch_clips=64, epochs=106.7, precise_batch_norm_clips=12800, log_every_steps=20),
    )


def kinetics_goyal() -> Experiment:
    """TSM at batch 8,192 with the recipe of Goyal et al. 2017 (arXiv 1706.02677) for ImageNet.

    SGD 0.1 per 256 and linear in the batch, a warm-up of 5 epochs at every iteration from the unscaled rate, divided by
    10 at 30, 60 and 80 of 90 epochs, Nesterov 0.9, weight decay 1e-4, zero-gamma, statistics of each GPU's clips.
    Assumed: that ImageNet's 0.1 per 256 images fits clips; Non-local's rate for clips is 0.04 per 256.
    """
    experiment = kinetics_nonlocal()
    return replace(
        experiment,
        name="kinetics_goyal",
        optimizer=OptimizerConfig(base_learning_rate=0.1, base_batch_clips=256, weight_decay=1e-4, nesterov=True),
        schedule=ScheduleConfig(kind="step", milestones_epochs=(30.0, 60.0, 80.0), warmup_epochs=5),
        training=TrainingConfig(batch_clips=8192, epochs=90, log_every_steps=1),
    )


def kinetics_lars() -> Experiment:
    """TSM at batch 13,056 with MLPerf's LARS reference point of that batch for ImageNet.

    From mlcommons/logging, rcps_resnet.json (training 4.0.0): rate 12.8 at trust coefficient 0.001, 9 epochs of
    warm-up, momentum 0.9, weight decay 2.5e-5, polynomial of power 2 down to 1e-4; label smoothing 0.1 is within its
    rules. Assumed: 46 epochs, where ResNet-50 reaches MLPerf's target on ImageNet, and that the rate fits clips.
    """
    experiment = kinetics_nonlocal()
    return replace(
        experiment,
        name="kinetics_lars",
        model=replace(experiment.model, zero_init_residual=False),
        optimizer=OptimizerConfig(
            name="lars",
            base_learning_rate=12.8,
            base_batch_clips=13056,
            weight_decay=2.5e-5,
            nesterov=False,
            trust_coefficient=0.001,
        ),
        schedule=ScheduleConfig(
            kind="polynomial", power=2.0, end_factor=1e-4 / 12.8, warmup_epochs=9, warmup_start_factor=0.0
        ),
        training=TrainingConfig(batch_clips=13056, epochs=46, label_smoothing=0.1, log_every_steps=1),
    )


def kinetics_study() -> Experiment:
    """*Training Kinetics in 15 Minutes* (Lin, Gan, Han 2019, arXiv 1910.00932): 74.0 % in 14 min 13 s on 1,536 GPUs.

    From its abstract and slides: TSM ResNet-50, 8 frames, 8 clips a GPU, batch 12,288, 100 epochs. Its optimizer
    settings could not be read. Assumed: Non-local's recipe (0.01 at 64 clips, so 0.00125 a GPU of 8 clips), scaled
    linearly to 1.92, its two steps at the same shares of the run (37.5 and 75 epochs), zero-gamma, statistics of 8
    clips (`ghost`, so that fewer and larger GPUs train the same), and Goyal's warm-up of 5 epochs.
    """
    experiment = kinetics_nonlocal()
    return replace(
        experiment,
        name="kinetics_study",
        schedule=ScheduleConfig(kind="step", milestones_epochs=(37.5, 75.0), warmup_epochs=5),
        training=TrainingConfig(
            batch_clips=12288, epochs=100, batch_norm="ghost", ghost_batch_clips=8, log_every_steps=1
        ),
    )
