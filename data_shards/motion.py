"""The embedded data set: short clips whose class is a direction of time, rendered and encoded by this program.

    make_motion_dataset(MotionConfig(num_clips=2400), Path("motion"))

writes `motion/clips/<split>/<class>_<index>.mp4` (H.264) and `motion/labels.csv` (file, label, split, scene).

Ten classes in five pairs: left/right, up/down, clockwise/counterclockwise, growing/shrinking,
appearing/vanishing. It is the honest small test of temporal modelling:

- A clip of a pair's second class is a take of the first class with its frames in reverse order
  (`data_shards.motion_scene`), so its frames, without their order, say nothing about the class: a model that
  pools over frames (TSN) is right in half of the cases at best.
- Coding keeps that exact: each frame is a key frame of its own, at a constant quantizer, so a frame decodes
  to the same pixels wherever it stands. With `keyframe_interval_frames` above 1 the coding is lossless.
- The two classes of a pair share their scenes, with takes of their own, and the splits share no scene.

The same configuration gives the same bytes, whatever the number of workers, for the same PyAV.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

from data_shards.durable import folder_written_aside
from data_shards.motion_scene import FORWARD_MOTIONS, draw_scene, render_take
from data_shards.parallel import Progress, ordered_map

__all__ = ["MOTION_CLASSES", "MOTION_PAIRS", "MotionConfig", "encode_h264", "make_motion_dataset", "render_clip"]

MOTION_PAIRS = (
    ("left", "right"),
    ("up", "down"),
    ("clockwise", "counterclockwise"),
    ("growing", "shrinking"),
    ("appearing", "vanishing"),
)
"""Pairs of classes that are each other's time reversal."""

MOTION_CLASSES = tuple(name for pair in MOTION_PAIRS for name in pair)
"""The ten classes, in the order in which the clips take turns."""

SPLITS = ("train", "val", "test")
_FRAMES_PER_SECOND = 15
_QUANTIZER = 24  # visually close to the source; its errors carry no order (see above)
_SCENE_STREAM, _TAKE_STREAM = 1, 2  # keeps the random numbers of scenes and takes apart
_CLIPS_A_CHUNK = 20


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """What to render."""

    num_clips: int = 2400
    """Clips in all splits together; the classes take turns."""
    size: int = 64
    """Width and height of a clip in pixels, a multiple of 4."""
    num_frames: int = 28
    """Frames of each clip, at 15 a second."""
    val_fraction: float = 0.1
    """Share of the clips for validation."""
    test_fraction: float = 0.15
    """Share of the clips for the test."""
    keyframe_interval_frames: int = 1
    """Key frames stand at this distance; above 1 the coding is lossless, and the files twice as large."""
    seed: int = 0
    """Seed of all random choices."""
    workers: int = 0
    """Processes that render; 0 takes one for each usable processor."""

    def __post_init__(self) -> None:
        problems = []
        fractions = (self.val_fraction, self.test_fraction)
        if min(fractions) < 0 or not sum(fractions) < 1:
            problems.append(f"val_fraction and test_fraction are {fractions}, give 0 or more, below 1 together")
        elif self.groups_by_split()["train"] < 1:
            problems.append(f"num_clips is {self.num_clips}, too few: each split takes one clip of each class at least")
        if not 32 <= self.size <= 1024 or self.size % 4:
            problems.append(f"size is {self.size}, give a multiple of 4 from 32 to 1024")
        if not 8 <= self.num_frames <= 1000:
            problems.append(f"num_frames is {self.num_frames}, give 8 to 1000")
        if self.keyframe_interval_frames < 1:
            problems.append(f"keyframe_interval_frames is {self.keyframe_interval_frames}, give 1 or more")
        if self.seed < 0 or self.workers < 0:
            problems.append(f"seed and workers are {self.seed} and {self.workers}, give 0 or more")
        if problems:
            raise ValueError("; ".join(problems))

    def groups_by_split(self) -> dict[str, int]:
        """Groups of ten clips (one of each class) in each split; a split of a positive share has one at least.

        Clips that do not fill a group go to the training split.
        """
        total = self.num_clips // len(MOTION_CLASSES)
        val, test = (
            max(1, round(total * fraction)) if fraction > 0 else 0
            for fraction in (self.val_fraction, self.test_fraction)
        )
        return {"val": val, "test": test, "train": total - val - test}


@dataclass(frozen=True, kw_only=True)
class _Clip:
    """One row of labels.csv."""

    index: int
    label: str
    split: str
    scene: int

    @property
    def file(self) -> str:
        return f"clips/{self.split}/{self.label}_{self.index:06d}.mp4"


def make_motion_dataset(
    config: MotionConfig, folder: str | Path, *, progress: Progress | None = None
) -> dict[str, int]:
    """Render, encode and write the data set into `folder`; it appears when it is whole.

    Returns the number of clips in each split.

    Raises:
        ValueError: `folder` exists and is not an empty folder.
        OSError: the disk is full; nothing is kept.
    """
    clips = _plan(config)
    with folder_written_aside(Path(folder)) as aside:
        for split in {clip.split for clip in clips}:
            (aside / "clips" / split).mkdir(parents=True)
        write = partial(_write_clip, config, aside)
        for _ in ordered_map(write, clips, workers=config.workers, chunk=_CLIPS_A_CHUNK, progress=progress):
            pass
        with (aside / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("file", "label", "split", "scene"))
            rows.writerows((clip.file, clip.label, clip.split, f"scene{clip.scene:06d}") for clip in clips)
    return {split: sum(clip.split == split for clip in clips) for split in SPLITS}


def _plan(config: MotionConfig) -> list[_Clip]:
    """All clips in order. Ten in a row are a group: one of each class, in five scenes that no other group has.

    A group lies in one split as a whole, so the classes are balanced and the splits share no scene.
    """
    num_classes = len(MOTION_CLASSES)
    splits = [split for split, groups in config.groups_by_split().items() for _ in range(groups)]
    clips = []
    for index in range(config.num_clips):
        group, label = divmod(index, num_classes)
        clips.append(
            _Clip(
                index=index,
                label=MOTION_CLASSES[label],
                split=splits[group] if group < len(splits) else "train",
                scene=group * len(MOTION_PAIRS) + label // 2,
            )
        )
    return clips


def render_clip(config: MotionConfig, *, index: int, label: str, scene: int) -> np.ndarray:
    """Frames of one clip: uint8 of shape (num_frames, size * 3 // 2, size), planes of yuv420p."""
    pair = next(pair for pair in MOTION_PAIRS if label in pair)
    forward = FORWARD_MOTIONS[MOTION_PAIRS.index(pair)]
    frames = render_take(
        draw_scene(np.random.default_rng([config.seed, _SCENE_STREAM, scene])),
        forward,
        size=config.size,
        num_frames=config.num_frames,
        rng=np.random.default_rng([config.seed, _TAKE_STREAM, index]),
    )
    return frames if label == forward else frames[::-1]


def _write_clip(config: MotionConfig, folder: Path, clip: _Clip) -> None:
    frames = render_clip(config, index=clip.index, label=clip.label, scene=clip.scene)
    encoded = encode_h264(frames, keyframe_interval_frames=config.keyframe_interval_frames)
    (folder / clip.file).write_bytes(encoded)


def encode_h264(frames: np.ndarray, *, keyframe_interval_frames: int = 1) -> bytes:
    """Encode yuv420p planes, uint8 of shape (T, H * 3 // 2, W), as an mp4 file with one H.264 stream.

    With an interval of 1 every frame is coded alone, at a constant quantizer; above, the coding is lossless with
    P-frames. Either way the pixels decoded for a frame do not depend on its place in the clip. One thread, so
    that the bytes depend on the frames alone.
    """
    alone = keyframe_interval_frames == 1
    options = {
        "preset": "ultrafast",
        "threads": "1",
        "qp": str(_QUANTIZER if alone else 0),
        "g": str(keyframe_interval_frames),
    }
    file = io.BytesIO()  # errors of the disk then come from Python's own write
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FRAMES_PER_SECOND, options=options)
        stream.width, stream.height = frames.shape[2], frames.shape[1] * 2 // 3
        stream.pix_fmt = "yuv420p"
        for index, planes in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, _FRAMES_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()
