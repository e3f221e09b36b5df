"""How a sample becomes clips: which frames, which part of them, which colours, which label.

Frames, crop and flip are chosen before anything is decoded, from the manifest's row and the random numbers of the
sample alone, so that who reads ahead and who decodes need not be told.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data_shards.augment.color import ColorJitter
from data_shards.augment.mirror import mirrored_labels
from data_shards.augment.rand_augment import RandAugment
from data_shards.decoding.choice import DecodingConfig
from data_shards.framing import Framing
from data_shards.manifest import Manifest
from data_shards.sampling import dense_frames, sample_generator, segment_frames
from data_shards.transforms import CROP_SCALES, evaluation_framings, training_framing


@dataclass(frozen=True, kw_only=True)
class View:
    """One clip of a sample, chosen before anything is decoded: a sample has one in training, several in evaluation."""

    frame_numbers: np.ndarray
    """int64 (T,): which frames."""
    framing: Framing
    """Which part of them, at which size."""
    mirrored: bool = False
    """Whether left and right change places."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How a video becomes a clip of `num_segments` square frames."""

    num_segments: int = 8
    """Frames of a clip."""
    sampling: Literal["segments", "dense"] = "segments"
    """Frames from equal segments of the whole video (TSN), or evenly spaced in a window (dense, I3D)."""
    dense_window_frames: int = 64
    """Length of the window in frames, for dense sampling."""
    rgb_differences: int = 0
    """Input of a motion stream: each segment is so many differences of frames in a row, stacked as channels, instead of
    a frame (TSN's RGBDiff has 5); 0: frames."""
    crop_size: int = 224
    """Height and width of a clip in pixels."""
    short_side: int = 256
    """Short side in pixels that frames are resized to before a crop at fixed scale (evaluation)."""
    multi_scale_crop: bool = True
    """In training, crop at random scales and aspect ratios (TSN's augmentation) instead of at one scale."""
    crop_scales: tuple[float, ...] = CROP_SCALES
    """Sides of a multi-scale crop as shares of the short side (TSN takes 1, 0.875, 0.75 for RGB differences)."""
    horizontal_flip: bool = False
    """In training, mirror half of the clips; only where left and right do not matter to the classes, or with
    flip_label_pairs."""
    flip_label_pairs: tuple[tuple[str, str], ...] = ()
    """Names of classes that are each other's mirror image, two by two: a mirrored clip changes its label."""
    color: ColorJitter = field(default_factory=ColorJitter)
    """In training, change the colours of a clip at random."""
    rand_augment: RandAugment = field(default_factory=RandAugment)
    """In training, apply random operations to a clip."""
    num_test_clips: int = 1
    """In evaluation, clips of each video, spread over its length; their probabilities are averaged."""
    num_test_crops: Literal[1, 3, 10] = 1
    """In evaluation, crops of each clip: the center; both ends of the long side and the center; or TSN's ten (corners
    and center, mirrored too)."""
    test_crop_size: int = 0
    """Height and width of an evaluation clip in pixels; 0: crop_size."""
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    """What decodes the samples."""

    def __post_init__(self) -> None:
        problems = self.color.problems() + self.rand_augment.problems()
        for name, least in (
            ("num_segments", 1),
            ("crop_size", 1),
            ("short_side", 1),
            ("rgb_differences", 0),
            ("num_test_clips", 1),
            ("test_crop_size", 0),
        ):
            if getattr(self, name) < least:
                problems.append(f"{name} is {getattr(self, name)}, it must be at least {least}")
        if self.sampling not in ("segments", "dense"):
            problems.append(f'sampling is {self.sampling!r}, it must be "segments" or "dense"')
        if self.sampling == "dense" and self.dense_window_frames < self.num_segments:
            problems.append(
                f"dense_window_frames is {self.dense_window_frames}, it must hold num_segments={self.num_segments}"
            )
        for name in ("crop_size", "test_crop_size"):
            if self.short_side < getattr(self, name):
                problems.append(f"short_side is {self.short_side}, smaller than {name}={getattr(self, name)}")
        if not self.crop_scales or not all(0 < scale <= 1 for scale in self.crop_scales):
            problems.append(
                f"crop_scales is {self.crop_scales}, it must be one or more shares of the short side, up to 1"
            )
        if self.num_test_crops not in (1, 3, 10):
            problems.append(f"num_test_crops is {self.num_test_crops}, it must be 1, 3 or 10")
        if self.flip_label_pairs and not self.horizontal_flip:
            problems.append("flip_label_pairs is set, but clips are only mirrored with horizontal_flip")
        if self.flip_label_pairs and self.num_test_crops == 10:
            problems.append(
                "num_test_crops is 10, half of them mirrored, which flip_label_pairs says are other classes"
            )
        if problems:
            raise ValueError("clip: " + "; ".join(problems))

    @property
    def frames_per_segment(self) -> int:
        """Frames in a row that each segment takes: one, or those whose differences are the input."""
        return self.rgb_differences + 1

    @property
    def in_channels(self) -> int:
        """Channels of a frame as a model takes it."""
        return 3 * max(self.rgb_differences, 1)

    def num_views(self, *, training: bool) -> int:
        """Clips that a sample becomes."""
        return 1 if training else self.num_test_clips * self.num_test_crops

    def sample_shape(self, *, training: bool) -> tuple[int, int, int, int, int]:
        """Shape of a sample's pixels as they are stored, uint8: views, frames, height, width, channels."""
        size = self.crop_size if training else self.test_crop_size or self.crop_size
        return self.num_views(training=training), self.num_segments * self.frames_per_segment, size, size, 3

    def views(self, row: np.void, num_frames: int, generator: np.random.Generator | None) -> list[View]:
        """What a sample of `num_frames` frames is shown by (`row` is the manifest's).

        One random view with a generator; else each test clip's crops, one clip after the other.
        """
        if generator is not None:
            # The flip is drawn first: `training_labels` draws it again, without the rest.
            mirrored = self.horizontal_flip and generator.random() < 0.5
            numbers = self._frame_numbers(num_frames, generator)
            return [View(frame_numbers=numbers, framing=self._training_framing(row, generator), mirrored=mirrored)]
        ten = self.num_test_crops == 10
        framings = evaluation_framings(
            int(row["height"]),
            int(row["width"]),
            crop_size=self.test_crop_size or self.crop_size,
            short_side=self.short_side,
            num_crops=5 if ten else self.num_test_crops,
        )
        return [
            View(frame_numbers=numbers, framing=framing, mirrored=mirrored)
            for numbers in (self._frame_numbers(num_frames, None, clip) for clip in range(self.num_test_clips))
            for mirrored in ((False, True) if ten else (False,))
            for framing in framings
        ]

    def _frame_numbers(self, num_frames: int, generator: np.random.Generator | None, clip: int = 0) -> np.ndarray:
        where = {"frames_per_segment": self.frames_per_segment, "clip": clip, "num_clips": self.num_test_clips}
        if self.sampling == "dense":
            return dense_frames(num_frames, self.num_segments, self.dense_window_frames, generator, **where)
        return segment_frames(num_frames, self.num_segments, generator, **where)

    def _training_framing(self, row: np.void, generator: np.random.Generator) -> Framing:
        return training_framing(
            int(row["height"]),
            int(row["width"]),
            crop_size=self.crop_size,
            short_side=self.short_side,
            multi_scale_crop=self.multi_scale_crop,
            generator=generator,
            scales=self.crop_scales,
        )


def training_labels(
    manifest: Manifest, sample_ids: np.ndarray, epochs: np.ndarray, *, clip: ClipConfig, seed: int
) -> np.ndarray:
    """Labels of training clips, int64 (B,): the samples' own, or of the mirror class where the clip is mirrored.

    Pure, as `read_clip` is: nothing is read or decoded for it. ValueError where `clip.flip_label_pairs` names no class.
    """
    labels = manifest.samples["label"][sample_ids].astype(np.int64)
    if not clip.flip_label_pairs:
        return labels
    mirrored = np.array(
        [
            sample_generator(seed, int(epoch), int(sample)).random() < 0.5
            for sample, epoch in zip(sample_ids, epochs, strict=True)
        ],
        dtype=bool,
    )
    return np.where(mirrored, mirrored_labels(manifest.classes, clip.flip_label_pairs)[labels], labels)
