"""Opens a sample in the form that it is stored in."""

from __future__ import annotations

from data_shards.decode import Video
from data_shards.forms.base import Form, FrameSource
from data_shards.reading import Payload


def open_frames(form: Form, payload: Payload) -> FrameSource:
    """The frames of a sample stored as `form`.

    Raises DataError where the bytes are not of that form, without saying which sample; OSError as `Payload` does.
    """
    if form != "video":
        raise NotImplementedError(form)
    return Video(payload.whole())
