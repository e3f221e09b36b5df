"""The sets of `benchmarks.loader`, built from real footage: class folders of mp4 files, then packed in every form.

`kinetics` is like Kinetics-400: 340x256, 10 s, 300 frames, H.264 as x264 makes it by default (a key frame every 250
frames). Each clip is one real clip played to and fro, so the motion has no cut that a key frame would be put at.
`real` is the footage as it is.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAMES, WIDTH, HEIGHT, FPS = 300, 340, 256, 30
_DONE = "whole"


@dataclass(frozen=True, kw_only=True)
class Footage:
    """One real clip."""

    path: Path
    label: str


def read_footage(source: Path) -> list[Footage]:
    """The clips that SOURCE/labels.csv (columns file, label) lists, one class after the other in turn.

    Raises ValueError where there is no such list.
    """
    listed = source / "labels.csv"
    if not listed.is_file():
        raise ValueError(f"{listed} does not exist; give a folder of clips with a labels.csv (file,label)")
    with listed.open(newline="") as file:
        rows = list(csv.DictReader(file))
    by_class: dict[str, list[Footage]] = {}
    for row in rows:
        by_class.setdefault(row["label"], []).append(Footage(path=source / row["file"], label=row["label"]))
    most = max(map(len, by_class.values()))
    return [clips[place] for place in range(most) for clips in by_class.values() if place < len(clips)]


def make_kinetics_like(source: Path, folder: Path, *, num_clips: int, workers: int) -> Path:
    """`num_clips` clips as class folders below `folder`, made once; returns it."""
    if (folder / _DONE).is_file() and (folder / _DONE).read_text() == str(num_clips):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    footage = read_footage(source)
    tasks = []
    for number in range(num_clips):
        clip = footage[number % len(footage)]
        tasks.append((clip.path, folder / clip.label / f"{number:05d}.mp4"))
        tasks[-1][1].parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_make_clip, tasks))
    (folder / _DONE).write_text(str(num_clips))
    return folder


def make_real(source: Path, folder: Path, *, num_clips: int) -> Path:
    """The first `num_clips` clips of the footage as class folders of links below `folder`; returns it."""
    if (folder / _DONE).is_file() and (folder / _DONE).read_text() == str(num_clips):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for clip in read_footage(source)[:num_clips]:
        (folder / clip.label).mkdir(parents=True, exist_ok=True)
        (folder / clip.label / clip.path.name).symlink_to(clip.path.resolve())
    (folder / _DONE).write_text(str(num_clips))
    return folder


def _make_clip(task: tuple[Path, Path]) -> None:
    source, target = task
    with av.open(str(source)) as container:
        container.streams.video[0].thread_count = 1
        frames = [_center(frame) for frame in container.decode(video=0)]
    target.write_bytes(encode(to_and_fro(frames, FRAMES)))


def to_and_fro(frames: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """`length` frames: forwards, backwards, forwards, ... without showing an end twice."""
    there_and_back = [*frames, *reversed(frames[1:-1])]
    return [there_and_back[number % len(there_and_back)] for number in range(length)]


def encode(frames: Sequence[np.ndarray]) -> bytes:
    """H.264 in mp4 with x264's defaults (medium, crf 23, 3 B-frames, a key frame every 250 frames)."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = 250, 1
        stream.options = {"crf": "23", "preset": "medium"}
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def _center(frame: av.VideoFrame) -> np.ndarray:
    """The middle of a frame at 340x256, its height scaled to 256 where it is another."""
    width = max(round(frame.width * HEIGHT / frame.height), WIDTH)
    picture = frame.to_ndarray(format="rgb24", width=width, height=HEIGHT, threads=1)
    left = (width - WIDTH) // 2
    return np.ascontiguousarray(picture[:, left : left + WIDTH])
