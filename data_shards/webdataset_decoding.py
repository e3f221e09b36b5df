"""Reads what `reelscale pack` stores through webdataset's own pipeline: a decoder for its members.

    import webdataset as wds
    from data_shards import webdataset_decoder

    dataset = wds.WebDataset("packed/train/shard-{000000..000011}.tar", shardshuffle=False)
    for sample in dataset.decode(webdataset_decoder()):
        sample["frames"]                 # uint8 (T, H, W, 3), all stored frames

webdataset reads every byte of every member; our own loader reads the frames that a clip shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from data_shards.decode import Video
from data_shards.forms.base import FrameSource
from data_shards.forms.frames_file import SUFFIX, FramesFile
from data_shards.forms.payload import MemoryPayload
from data_shards.sources.base import VIDEO_SUFFIXES

ChooseFrames = Callable[[int], Sequence[int] | np.ndarray[Any, Any]]
"""The numbers of the frames to decode, given how many there are."""


def webdataset_decoder(
    choose_frames: ChooseFrames | None = None,
) -> Callable[[str, bytes], np.ndarray[Any, Any] | None]:
    """A handler for `wds.WebDataset(...).decode(...)`: frames files and videos become RGB uint8 (T, H, W, 3).

    Members of other kinds are left to webdataset. The handler can be pickled if `choose_frames` can.

    Args:
        choose_frames: which frames to decode, such as `functools.partial(segment_frames, num_segments=8)`; all
            unless given.
    """
    return partial(_decode_member, choose_frames=choose_frames)


def _decode_member(name: str, content: bytes, *, choose_frames: ChooseFrames | None) -> np.ndarray[Any, Any] | None:
    suffix = "." + name.rsplit(".", 1)[-1].lower()
    source: FrameSource
    if suffix == SUFFIX:
        source = FramesFile(MemoryPayload(content))
    elif suffix in VIDEO_SUFFIXES:
        source = Video(content)
    else:
        return None
    numbers = range(source.num_frames) if choose_frames is None else choose_frames(source.num_frames)
    return source.decode(numbers).frames
